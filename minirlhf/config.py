"""Every setting of the scripts, with default, unit and range.

One frozen dataclass per script, made of sections. `key()` gives a field its help line and its range, so that what is
printed by `--help`, what is refused and what is documented cannot differ.
"""

import math
import tomllib
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any, TypeVar

from minirlhf.errors import UsageError
from minirlhf.settings import apply, flatten, key, parse_flags, read_file, show

Config = TypeVar("Config")
PRESETS = ("oai2019", "trl-legacy", "trl-v2", "dschat", "openrlhf", "instructgpt")  # of ppo.preset


# ---- sections -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class RunSection:
    """Where and how a script runs."""

    dir: str = key("", "run folder; empty: the script's default, where a finished run is set aside")
    seed: int = key(0, "every random number derives from it", low=0)
    steps: int = key(600, "optimizer steps (SFT, RM) or iterations (PPO)", low=1)
    device: str = key("cpu", "cpu, cuda or cuda:N")
    dtype: str = key("fp32", "type of matrix products; weights, norms, losses stay fp32", choices=("fp32", "bf16"))
    engine: str = key("none", "sharding over ranks", choices=("none", "mini", "torch"))
    checkpoint_activations: bool = key(False, "run blocks again in the backward pass, keep no activations")
    impl: str = key("auto", "body of the fused head", choices=("auto", "torch", "triton"))
    threads: int = key(
        0, "CPU threads; 0: torch's own, 1 on the built-in task; equal bits need equal threads", low=0, high=1024
    )
    resume: bool = key(False, "go on from the newest checkpoint that verifies")
    save_every: int = key(0, "steps between checkpoints; 0: only at the end and on a signal", low=0)
    keep: int = key(2, "checkpoints kept", low=1)
    best_by: str = key(
        "",
        "max:METRIC or min:METRIC of the log, by which the best checkpoint is kept besides; empty: val/loss, "
        "val/accuracy or objective/rlhf_reward",
    )
    log_every: int = key(10, "steps between lines of metrics.jsonl; validations have theirs", low=1)
    log_with: str = key("none", "where those lines go too", choices=("none", "tensorboard", "wandb"))
    dry_run: bool = key(False, "print the memory that the stage takes, and stop")
    debug: bool = key(False, "show the traceback of a user's mistake")


@dataclass(frozen=True)
class ModelSection:
    """The model a script starts from; the keys after `path` describe a new one."""

    path: str = key("", "a Hugging Face folder or an adapter folder; empty: a new model")
    family: str = key(
        "gpt2",
        "architecture of a new model",
        choices=("gpt2", "bloom", "opt", "llama", "mistral", "qwen2", "qwen3", "gpt_neox"),
    )
    n_layer: int = key(2, "blocks", low=1)
    n_head: int = key(4, "attention heads", low=1)
    d_model: int = key(64, "width C", low=1)
    max_seq_len: int = key(64, "positions T", low=2)
    dropout: float = key(0.0, "dropout in SFT and RM; always off in PPO", low=0.0, high=0.99)
    freeze: str = key("", r"regular expression of parameters that do not learn, e.g. embed|blocks\.[01]\.; empty: none")
    tokenizer: str = key("", "for a new model on own data: chars, bpe, or the path of a tokenizer.json; empty: chars")
    vocab_size: int = key(4096, "tokens of a BPE tokenizer trained on the data", low=260)


@dataclass(frozen=True)
class LoRASection:
    """Low-rank adapters instead of full training; where model.path is an adapter, its copy is trained."""

    r: int = key(0, "rank of a new adapter; 0: train every weight, or the adapter at model.path", low=0)
    alpha: float = key(16.0, "the update of a new adapter is scaled by alpha / r", low=0.0)
    dropout: float = key(0.0, "dropout before A, but in an adapter of the head", low=0.0, high=0.99)
    targets: tuple[str, ...] = key(
        ("auto",),
        "Hugging Face names of modules, or one regular expression; all-linear: every linear layer but the head; "
        "auto: the head too where it is small (tied to the embedding it cannot be merged)",
    )
    rslora: bool = key(False, "scale by alpha / √r instead (rank-stabilised)")


@dataclass(frozen=True)
class DataSection:
    """Records; without a path the built-in ReviewWorld task makes them."""

    path: str = key("", "data file (JSON lines, JSON, TSV, text, .gz); empty: the built-in task")
    format: str = key("auto", "a format of `minirlhf.formats`")
    template: str = key("", "prompt template; empty: the model's own, plain for a new one")
    max_length: int = key(0, "tokens of prompt and answer together; 0: max_seq_len", low=0)
    on_bad_row: str = key("error", "what a bad row does", choices=("error", "drop"))
    holdout: int = key(0, "last records of the file, kept out of training for validation", low=0)
    size: int = key(38400, "records the built-in task makes", low=1)
    language: str = key("en", "language of the built-in task", choices=("en", "zh"))


@dataclass(frozen=True)
class PairDataSection(DataSection):
    """Records of preference; the built-in labeler judges answers of the SFT model."""

    size: int = key(32768, "pairs the built-in task makes", low=1)
    labeler: str = key(
        "good", "who judges in the built-in task", choices=("good", "weak", "length_biased", "length_only")
    )


@dataclass(frozen=True)
class OptimSection:
    """AdamW and its schedule."""

    lr: float = key(2e-3, "peak learning rate", low=0.0)
    schedule: str = key("linear", "course of the learning rate after warm-up", choices=("constant", "linear", "cosine"))
    warmup_steps: int = key(20, "optimizer steps of linear warm-up", low=0)
    final_lr: float = key(0.1, "last learning rate as a share of the peak", low=0.0, high=1.0)
    weight_decay: float = key(0.01, "decoupled, on matrices only", low=0.0)
    betas: tuple[float, float] = key((0.9, 0.95), "decay of the moments", low=0.0, high=0.999999)
    eps: float = key(1e-8, "added to the root of the second moment", low=0.0)
    max_grad_norm: float = key(1.0, "gradient norm is cut to this", low=0.0)


@dataclass(frozen=True)
class SFTSection:
    """Supervised fine-tuning."""

    objective: str = key(
        "imitate",
        "what is learnt of answers; imitate: all of them. The others need ranks or labels, see minirlhf/feedback.py",
        choices=("imitate", "chosen", "rwr", "awr", "conditional", "unlikelihood"),
    )
    temperature: float = key(0.5, "τ of the weights of rwr and awr, in units of merit", low=1e-3)
    good: str = key("[good] ", "conditional: words before the prompt of a good answer")
    bad: str = key("[bad] ", "conditional: words before the prompt of a bad one")
    pack: bool = key(False, "short texts share rows of data.max_length tokens; microbatch_size then counts such rows")
    lisa_layers: int = key(0, "blocks that learn at a time, drawn anew every lisa_every steps (LISA); 0: all", low=0)
    lisa_every: int = key(20, "steps until other blocks are drawn", low=1)
    minibatch_size: int = key(64, "sequences of one optimizer step, over all ranks", low=1)
    microbatch_size: int = key(64, "sequences of one forward, per rank", low=1)
    eval_every: int = key(0, "steps between validations; 0: ten in a run", low=0)


@dataclass(frozen=True)
class RMSection:
    """Reward model."""

    minibatch_size: int = key(32, "lists or pairs of one optimizer step, over all ranks", low=1)
    microbatch_size: int = key(32, "lists or pairs of one forward, per rank", low=1)
    loss: str = key(
        "log",
        "of ranked answers; log: InstructGPT's, equal to Bradley-Terry for pairs; direct: (sigmoid(r) - grade)^2 of "
        "answers with grades from 0 to 1",
        choices=("log", "sigmoid", "softmax", "direct"),
    )
    margin: float = key(0.0, "m in log sigmoid(r_w - r_l - m (grade_w - grade_l)), for data with grades", low=0.0)
    centering: float = key(0.0, "c in c (r_w + r_l)^2 (Eisenstein 2023); pairs only", low=0.0)
    hard_negatives: float = key(
        0.0, "pairs with an empty, one-word, repeated or echoing loser, as a share of the data", low=0.0, high=1.0
    )
    normalize: bool = key(False, "at the end: scores of mean 0 and deviation 1 on answers of the model it starts from")
    eval_every: int = key(0, "steps between validations; 0: ten in a run", low=0)


@dataclass(frozen=True)
class DPOSection:
    """Direct preference optimization."""

    beta: float = key(0.1, "β, how near to the reference the policy stays", low=1e-6)
    minibatch_size: int = key(64, "pairs of one optimizer step, over all ranks", low=1)
    microbatch_size: int = key(64, "pairs of one forward, per rank", low=1)
    eval_every: int = key(0, "steps between validations; 0: ten in a run", low=0)


@dataclass(frozen=True)
class RewardSection:
    """What an answer is worth: a reward model, or a Python function of texts."""

    path: str = key("", "reward-model folder; empty without fn: runs/rm/final")
    fn: str = key("", "module:function of lists of prompts and responses, returning floats; or human, who is asked")

    @property
    def folder(self) -> str:
        """The reward model's; empty where a function takes its place."""
        return "" if self.fn else self.path or "runs/rm/final"


@dataclass(frozen=True)
class PPOSection:
    """Proximal policy optimization (Schulman et al. 2017) with a KL penalty in the reward (Ziegler et al. 2019)."""

    preset: str = key(
        "",
        "another implementation's choices (minirlhf/presets/*_ppo.toml, docs/presets.md); keys that are given override",
        choices=("", *PRESETS),
    )
    prompts: tuple[str, ...] = key((), "prompts to answer (a list, or separated by commas); empty: those of the data")
    rollout_size: int = key(256, "answers of one iteration, over all ranks", low=1)
    minibatch_size: int = key(128, "answers of one optimizer step, over all ranks", low=1)
    microbatch_size: int = key(128, "answers of one forward, per rank", low=1)
    epochs: int = key(4, "passes over a rollout", low=1)
    advantage: str = key(
        "gae",
        "what an answer is held against; gae: a value model, rloo and grpo: the other answers to its prompt, "
        "reinforce: the mean of the rollout. Only gae has a value model",
        choices=("gae", "rloo", "grpo", "reinforce"),
    )
    answers_per_prompt: int = key(1, "answers to each prompt of a rollout, K; rloo and grpo need 2 or more", low=1)
    gamma: float = key(1.0, "discount", low=0.0, high=1.0)
    gae_lambda: float = key(0.95, "λ of GAE", low=0.0, high=1.0)
    policy_loss: str = key(
        "clip",
        "PPO's clipped ratio, or another paper's (docs/objectives.md)",
        choices=("clip", "dual_clip", "gspo", "cispo"),
    )
    clip_range: float = key(0.2, "ε of the policy ratio; inf: no clipping", low=0.0)
    clip_range_high: float = key(0.0, "ε of ratios above 1 (DAPO); 0: that of clip_range", low=0.0)
    dual_clip: float = key(3.0, "c of dual_clip, in advantages", low=1.0)
    value_clip_range: float = key(0.2, "ε_v around the rollout's values; 0: no clipping", low=0.0)
    value_coef: float = key(0.5, "weight of the value loss", low=0.0)
    entropy_coef: float = key(0.0, "weight of the entropy bonus", low=0.0)
    ptx_coef: float = key(0.0, "γ, weight of the loss on texts that shall not be forgotten (PPO-ptx); 0: off", low=0.0)
    ptx_path: str = key(
        "", "file of those texts, its last tenth held out for base/perplexity; empty: the built-in task's corpus"
    )
    kl_coef: float = key(0.1, "β, nats to reward", low=0.0)
    kl_in: str = key(
        "reward", "where the penalty stands; loss: of every token, as GRPO has it", choices=("reward", "loss")
    )
    kl: str = key(
        "k1",
        "estimator; in the reward only k1 has the gradient of the sequence KL, in the loss k2 has that of a token's "
        "KL(π ‖ ref), k3 that of KL(ref ‖ π)",
        choices=("k1", "k2", "k3", "abs"),
    )
    kl_target: float = key(0.0, "nats per answer the adaptive controller aims at; 0: fixed β", low=0.0)
    kl_horizon: float = key(10000.0, "answers over which the controller acts", low=1.0)
    stop_kl: float = key(0.0, "end the epochs when k3(new, old) per token exceeds this; 0: never", low=0.0)
    score_at: str = key(
        "last",
        "where the score lands: the answer's last token, the state after it, or the last column, with tokens after EOS "
        "drawn and counted as actions",
        choices=("last", "next", "column"),
    )
    value_at_end: bool = key(True, "score_at next: train the value of the state after the answer as well")
    score_norm: str = key(
        "first",
        "first: scores minus mean over deviation of the first rollout; mean: minus its mean only",
        choices=("none", "first", "mean"),
    )
    score_clip: float = key(0.0, "scores are cut to ± this; 0: off", low=0.0)
    missing_eos: str = key("none", "an answer without EOS", choices=("none", "replace", "subtract"))
    missing_eos_penalty: float = key(1.0, "score becomes minus this, or loses this", low=0.0)
    whiten_rewards: bool = key(False, "scale rewards to unit variance, mean kept")
    whiten_advantages: bool = key(True, "advantages of gae and reinforce to mean 0, variance 1")
    whiten_over: str = key("rollout", "whose tokens give mean and variance", choices=("rollout", "minibatch"))
    whiten_ddof: int = key(0, "the variance divides by n minus this", low=0, high=1)
    loss_mean: str = key(
        "step",
        "step: sum over tokens by their count in the optimizer step; microbatch: mean of its microbatches' means; "
        "answer: mean of each answer, then over answers (GRPO); budget: sum by answers × max_new_tokens (Dr. GRPO)",
        choices=("step", "microbatch", "answer", "budget"),
    )
    critic: str = key(
        "auto",
        "value model; separate: its own weights, shared: a head on the policy's trunk, lora: an adapter on the "
        "policy's base; auto: lora where the policy is an adapter, else separate",
        choices=("auto", "separate", "shared", "lora"),
    )
    value_init: str = key(
        "auto",
        "value model starts as the trunk, under a zero head, of the reward model (else, and without one, the policy); "
        "kept: as the one that PPO left beside the policy",
        choices=("auto", "reward_trunk", "reward_model", "policy", "kept"),
    )
    ema: float = key(
        0.0,
        "decay of the mean of the policy's weights over optimizer steps, saved as final/ema; 0: none",
        low=0.0,
        high=1.0,
    )
    metric_fn: str = key(
        "", "module:function of lists of prompts and responses, returning floats; their mean is eval/metric of the log"
    )
    eval_every: int = key(0, "iterations between evaluations by metric_fn; 0: ten in a run", low=0)
    probe: str = key("warn", "a reward model that prefers degenerate answers", choices=("warn", "stop"))
    on_alarm: str = key("warn", "what an alarm of the log does; stop: exit code 5", choices=("warn", "stop"))
    save_rollouts: int = key(
        0, "iterations between files rollouts/*.safetensors for `minirlhf.ledger`, weights included; 0: none", low=0
    )


@dataclass(frozen=True)
class SampleSection:
    """How answers are drawn."""

    max_new_tokens: int = key(26, "longest answer, EOS included", low=1)
    temperature: float = key(1.0, "τ; also in every log-prob", low=1e-6)
    top_k: int = key(0, "0: off", low=0)
    top_p: float = key(1.0, "1: off", low=0.0, high=1.0)
    min_new_tokens: int = key(0, "EOS is excluded before", low=0)
    begin_suppress_eos: bool = key(False, "EOS is excluded as first token")


# ---- one config per script ------------------------------------------------------------------------------------------


def _divides(small: int, big: int, names: str) -> None:
    if big % small:
        raise UsageError(f"{names}: {big} is no multiple of {small}; choose sizes that divide")


@dataclass(frozen=True)
class SFTConfig:
    """`train_sft.py`."""

    run: RunSection = RunSection()
    model: ModelSection = ModelSection()
    lora: LoRASection = LoRASection()
    data: DataSection = DataSection()
    optim: OptimSection = OptimSection()
    sft: SFTSection = SFTSection()
    sample: SampleSection = SampleSection()

    def check(self) -> None:
        """Combinations that cannot work."""
        _divides(self.sft.microbatch_size, self.sft.minibatch_size, "sft.minibatch_size / sft.microbatch_size")
        _check_common(self)
        if self.lora.r and not self.model.path:
            raise UsageError(f"lora.r {self.lora.r}: a new model has no base to freeze; give model.path, or lora.r 0")
        if self.sft.lisa_layers and (self.lora.r or self.run.engine != "none"):
            raise UsageError("sft.lisa_layers draws whole blocks of unsharded weights; set lora.r 0, run.engine none")


@dataclass(frozen=True)
class RMConfig:
    """`train_rm.py`."""

    run: RunSection = RunSection(steps=2048)
    model: ModelSection = ModelSection(path="runs/sft/final")
    lora: LoRASection = LoRASection()
    data: PairDataSection = PairDataSection()
    optim: OptimSection = OptimSection(lr=1.5e-3, warmup_steps=10, final_lr=0.05, weight_decay=0.05, betas=(0.9, 0.999))
    rm: RMSection = RMSection()
    sample: SampleSection = SampleSection()

    def check(self) -> None:
        """Combinations that cannot work."""
        _divides(self.rm.microbatch_size, self.rm.minibatch_size, "rm.minibatch_size / rm.microbatch_size")
        if self.rm.margin and self.rm.loss not in ("log", "sigmoid"):
            raise UsageError(f"rm.margin {self.rm.margin}: rm.loss {self.rm.loss} has no pairs; choose log or sigmoid")
        if self.rm.centering and self.rm.loss == "direct":
            raise UsageError(f"rm.centering {self.rm.centering}: rm.loss direct says where scores lie; set it to 0")
        if not self.data.path and (self.rm.margin or self.rm.loss == "direct"):
            raise UsageError("rm.margin and rm.loss direct need graded answers, which the built-in task has not; give "
                             "--data.path FILE")  # fmt: skip
        _check_common(self)


@dataclass(frozen=True)
class DPOConfig:
    """`train_dpo.py`."""

    run: RunSection = RunSection(steps=512)
    model: ModelSection = ModelSection(path="runs/sft/final")
    lora: LoRASection = LoRASection()
    data: PairDataSection = PairDataSection()
    optim: OptimSection = OptimSection(lr=3e-4, warmup_steps=20, weight_decay=0.0, betas=(0.9, 0.999))
    dpo: DPOSection = DPOSection()
    sample: SampleSection = SampleSection()

    def check(self) -> None:
        """Combinations that cannot work."""
        _divides(self.dpo.microbatch_size, self.dpo.minibatch_size, "dpo.minibatch_size / dpo.microbatch_size")
        _check_common(self)


@dataclass(frozen=True)
class PPOConfig:
    """`train_ppo.py`."""

    run: RunSection = RunSection(steps=100, log_every=1)
    model: ModelSection = ModelSection(path="runs/sft/final")
    reward: RewardSection = RewardSection()
    lora: LoRASection = LoRASection()
    data: DataSection = DataSection()
    optim: OptimSection = OptimSection(lr=5e-4, schedule="constant", warmup_steps=0, weight_decay=0.0)
    ppo: PPOSection = PPOSection()
    sample: SampleSection = SampleSection()

    def check(self) -> None:
        """Combinations that cannot work."""
        _divides(self.ppo.minibatch_size, self.ppo.rollout_size, "ppo.rollout_size / ppo.minibatch_size")
        _divides(self.ppo.microbatch_size, self.ppo.minibatch_size, "ppo.minibatch_size / ppo.microbatch_size")
        _check_common(self)
        if self.reward.path and self.reward.fn:
            raise UsageError("reward.path and reward.fn are both given; keep one of them")
        if self.reward.fn and self.ppo.value_init.startswith("reward"):
            raise UsageError(f"ppo.value_init {self.ppo.value_init}: reward.fn has no model to start from; use policy")
        if self.ppo.score_at == "column" and self.sample.min_new_tokens:
            raise UsageError("ppo.score_at column: every answer has sample.max_new_tokens; set sample.min_new_tokens 0")
        if not self.model.path:
            raise UsageError("model.path is empty: PPO starts from a trained policy; give its folder")
        if self.ppo.critic == "shared" and self.ppo.value_init.startswith("reward"):
            raise UsageError(f"ppo.value_init {self.ppo.value_init}: a shared critic stands on the policy's trunk")
        if self.ppo.metric_fn and self.reward.fn == "human":
            raise UsageError("ppo.metric_fn: its answers would be shown to the person of reward.fn human; leave it out")
        if self.ppo.ptx_coef and not self.ppo.ptx_path and (self.data.path or self.ppo.prompts):
            raise UsageError(
                f"ppo.ptx_coef {self.ppo.ptx_coef}: your own prompts need your own texts; give ppo.ptx_path"
            )
        if self.ppo.kl_target and not self.ppo.kl_coef:
            raise UsageError(
                f"ppo.kl_target {self.ppo.kl_target}: ppo.kl_coef 0 stays 0; give the coefficient to begin with"
            )
        if self.ppo.kl_target and self.ppo.rollout_size >= 5 * self.ppo.kl_horizon:
            raise UsageError(f"ppo.kl_horizon {self.ppo.kl_horizon} is too short for ppo.rollout_size "
                             f"{self.ppo.rollout_size}; take more than a fifth of it")  # fmt: skip
        _check_objective(self.ppo)


def _check_objective(o: PPOSection) -> None:
    _divides(o.answers_per_prompt, o.rollout_size, "ppo.rollout_size / ppo.answers_per_prompt")
    if math.isinf(o.kl_coef):
        raise UsageError("ppo.kl_coef inf: no score counts beside it; give a number")
    siblings = o.advantage in ("rloo", "grpo")
    if siblings and o.answers_per_prompt < 2:
        raise UsageError(f"ppo.advantage {o.advantage} compares answers to one prompt; set ppo.answers_per_prompt 2")
    if siblings and o.whiten_over == "minibatch":
        raise UsageError(f"ppo.whiten_over minibatch: ppo.advantage {o.advantage} is of whole rollouts; use rollout")
    if o.policy_loss == "gspo" and not siblings:
        raise UsageError(f"ppo.policy_loss gspo: one ratio of a whole answer needs one advantage of it, and "
                         f"ppo.advantage {o.advantage} has one for each token; use rloo or grpo")  # fmt: skip
    for name, value in (("critic", o.critic), ("value_init", o.value_init)):
        if o.advantage != "gae" and value != "auto":
            raise UsageError(f"ppo.{name} {value}: ppo.advantage {o.advantage} has no value model; leave it out")
    if o.kl_in == "loss" and o.kl in ("k1", "abs"):
        reason = {"k1": "has expected gradient 0, which is no penalty at all", "abs": "is no KL"}[o.kl]
        raise UsageError(f"ppo.kl {o.kl}: as a loss it {reason}; set ppo.kl k2 or k3, or ppo.kl_in reward")


def _check_common(config: Any) -> None:
    run, model, optim, sample = config.run, config.model, config.optim, config.sample
    if run.best_by and not (run.best_by[:4] in ("max:", "min:") and run.best_by[4:]):
        raise UsageError(f"run.best_by {run.best_by!r}: write max:METRIC or min:METRIC, such as max:gold/score")
    if optim.warmup_steps > run.steps:
        raise UsageError(f"optim.warmup_steps {optim.warmup_steps} exceeds run.steps {run.steps}")
    if not optim.max_grad_norm:
        raise UsageError("optim.max_grad_norm 0 leaves nothing of any gradient; inf cuts none")
    if model.d_model % model.n_head:
        raise UsageError(f"model.d_model {model.d_model} is no multiple of model.n_head {model.n_head}")
    if sample.min_new_tokens > sample.max_new_tokens:
        raise UsageError(
            f"sample.min_new_tokens {sample.min_new_tokens} exceeds max_new_tokens {sample.max_new_tokens}"
        )
    if not model.path and sample.max_new_tokens >= model.max_seq_len:
        raise UsageError(
            f"sample.max_new_tokens {sample.max_new_tokens} leaves no prompt in max_seq_len {model.max_seq_len}"
        )
    if config.lora.r and not config.lora.targets:
        raise UsageError("lora.targets is empty while lora.r > 0; name the modules, or set lora.r 0")
    if not config.lora.r and config.lora.targets != LoRASection().targets:
        raise UsageError(f"lora.targets {','.join(config.lora.targets)} without lora.r; give lora.r, or leave it out")


# ---- reading --------------------------------------------------------------------------------------------------------


def load_config(cls: type[Config], argv: Sequence[str]) -> Config:
    """`[CONFIG.toml|json] [--section.key value ...]` → a checked config; every mistake is a UsageError."""
    try:
        return _resolved(cls, argv)
    except UsageError as e:
        if not argv or argv[0].startswith("--") or argv[0] in str(e):
            raise
        place = argv[0] if len(argv) == 1 else f"{argv[0]} or the command line"
        said = "".join(c if c.isprintable() else ascii(c)[1:-1] for c in str(e))[:400]  # what a file holds may be long
        raise UsageError(f"{place}: {said}") from e


def _resolved(cls: type[Config], argv: Sequence[str]) -> Config:
    """The defaults, then the preset, the file, the flags."""
    flags = list(argv)
    file = flatten(read_file(Path(flags.pop(0)))) if flags and not flags[0].startswith("--") else {}
    given = [file, parse_flags(flags)]
    names = {str(flat["ppo.preset"]) for flat in given if "ppo.preset" in flat}
    if len(names) > 1:
        raise UsageError(
            f"ppo.preset: the file says {file['ppo.preset']!r} and holds options of its own; name the preset there"
        )
    config: Any = cls()
    presets = [preset_options(name) for name in names if name in PRESETS and hasattr(config, "ppo")]
    for flat in (*presets, *given):
        config = apply(config, flat)
    config.check()
    return config


def preset_options(name: str) -> dict[str, Any]:
    """What a preset of PPO sets: `ppo.key` → value."""
    text = resources.files("minirlhf").joinpath("presets", f"{name}_ppo.toml").read_text("utf-8")
    return flatten(tomllib.loads(text))


def preset_line(config: Any) -> str:
    """The preset's options in one line, with what was given instead."""
    words = []
    for name, value in preset_options(config.ppo.preset).items():
        key_name = name.removeprefix("ppo.")
        now = getattr(config.ppo, key_name)
        words.append(f"{key_name} {show(now)}" + ("" if now == value else f" (not {show(value)})"))
    return f"preset {config.ppo.preset}: " + ", ".join(words)
