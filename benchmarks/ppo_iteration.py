"""One PPO iteration (64 answers to 64 prompts, scored by four models, 4 epochs) against the PPOTrainer of TRL 1.12.0.

    pip install --no-deps --target DIR trl==1.12.0     the last release with PPO; its dependencies are TRL's usual ones
    python benchmarks/ppo_iteration.py --trl DIR                 fp32, all prompts 16 and all answers 32 tokens long
    python benchmarks/ppo_iteration.py --trl DIR --ragged        prompts and answers a third of that in the mean
    python benchmarks/ppo_iteration.py --trl DIR --dtype bf16    autocast in both

Both: 4 layers of 256, vocabulary 4096, microbatches of 16, one optimizer step an epoch, AdamW, no gradient
checkpointing (TRL's default is on). TRL's trainer is built outside the measured time. With bf16 TRL runs in both modes:
on a CPU its better one may be fp32.
"""

import argparse
import sys
import tempfile
from itertools import chain
from pathlib import Path

import torch
from paired import ceilings, compare
from tokenizers import Tokenizer, models

from minirlhf.config import PPOSection
from minirlhf.heads import RewardModel, ValueModel
from minirlhf.model import CausalLM, ModelConfig
from minirlhf.optim import adamw
from minirlhf.ppo import epoch_plans, ppo_iteration
from minirlhf.pretrained import save_pretrained
from minirlhf.rng import generator
from minirlhf.rollout import Roles, collect, reward_model_score

PAD, EOS, V, P, R, ROLLOUTS, MICRO, EPOCHS = 0, 1, 4096, 16, 32, 64, 16, 4
CONFIG = ModelConfig(family="gpt2", vocab_size=V, n_layer=4, n_head=4, d_model=256, max_seq_len=128)


def make_models(eos_logit: float) -> tuple[CausalLM, RewardModel]:
    """A policy whose answers end with a chance of about e^x/(V + e^x) per token, and a reward model."""
    policy = CausalLM(CONFIG, rng=generator(0, "policy"))
    with torch.no_grad():
        policy.trunk.final_norm.bias.fill_(1.0)
        policy.trunk.embed.weight[EOS] = eos_logit / CONFIG.d_model
        policy.trunk.embed.weight[PAD] = -20.0 / CONFIG.d_model  # never drawn: TRL takes it for padding
    return policy, RewardModel(CONFIG, rng=generator(0, "reward"))


def make_prompts(ragged: bool) -> list[list[int]]:
    rng = generator(0, "prompts")
    lengths = torch.randint(1, 11, (ROLLOUTS,), generator=rng).tolist() if ragged else [P] * ROLLOUTS
    lengths[0] = P
    return [torch.randint(2, V, (n,), generator=rng).tolist() for n in lengths]


class Ours:
    def __init__(self, policy: CausalLM, reward: RewardModel, prompts: list[list[int]], ragged: bool, bf16: bool):
        self.policy, self.value = policy, ValueModel.from_reward_model(reward)
        self.roles = Roles(policy, CausalLM(CONFIG), self.value, reward_model_score(reward), reward)
        self.roles.ref_policy.load_state_dict(policy.state_dict())
        for frozen in (self.roles.ref_policy, reward):
            frozen.requires_grad_(False).eval()
        self.ids = torch.tensor([[PAD] * (P - len(p)) + p for p in prompts])
        self.mask = torch.tensor([[False] * (P - len(p)) + [True] * len(p) for p in prompts])
        self.eos, self.step = EOS if ragged else -1, 0
        self.options = PPOSection(rollout_size=ROLLOUTS, minibatch_size=ROLLOUTS, microbatch_size=MICRO, epochs=EPOCHS)
        named = [*policy.named_parameters(prefix="policy"), *self.value.named_parameters(prefix="value")]
        self.optimizer = adamw(named, lr=3e-6, weight_decay=0.0, betas=(0.9, 0.999), eps=1e-8)
        self.precision = lambda: torch.autocast("cpu", torch.bfloat16, enabled=bf16)

    def __call__(self) -> float:
        self.step += 1
        plan = lambda n: epoch_plans(n, self.options, 0, self.step)  # noqa: E731
        with self.precision():
            rollout = collect(
                self.roles, self.ids, self.mask, eos_token_id=self.eos, pad_token_id=PAD, max_new_tokens=R,
                temperature=1.0, rng=generator(0, "sample", self.step), partition=lambda n: list(chain(*plan(n)[0])),
            )  # fmt: skip
        ppo_iteration(
            self.policy, self.value, self.optimizer, rollout, rollout.scores, plan(rollout.total_lengths), self.options,
            kl_coef=0.05, temperature=1.0, max_grad_norm=1.0, precision=self.precision,
        )  # fmt: skip
        return float(rollout.lengths.float().mean())


class Theirs:
    """A trainer for one update, made anew, on models that go on training."""

    def __init__(self, folder: Path, prompts: list[list[int]], ragged: bool, bf16: bool):
        from datasets import Dataset
        from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, PreTrainedTokenizerFast

        def scalar():
            return AutoModelForSequenceClassification.from_pretrained(folder / "reward", num_labels=1)

        self.policy, self.ref = (AutoModelForCausalLM.from_pretrained(folder / "policy") for _ in range(2))
        self.value, self.reward = scalar(), scalar()
        words = Tokenizer(models.WordLevel({f"t{i}": i for i in range(V)}, unk_token="t2"))
        self.tokenizer = PreTrainedTokenizerFast(
            tokenizer_object=words, pad_token=f"t{PAD}", eos_token=f"t{EOS}", padding_side="left"
        )
        self.policy.generation_config.pad_token_id = PAD
        self.data = Dataset.from_dict({"input_ids": prompts})
        self.folder, self.ragged, self.bf16 = folder, ragged, bf16

    def prepare(self):
        from trl.experimental.ppo import PPOConfig, PPOTrainer

        config = PPOConfig(
            output_dir=str(self.folder / "run"), per_device_train_batch_size=MICRO, use_cpu=True, report_to=[],
            gradient_accumulation_steps=ROLLOUTS // MICRO, num_mini_batches=1, total_episodes=ROLLOUTS,
            num_ppo_epochs=EPOCHS, response_length=R, temperature=1.0, stop_token="eos" if self.ragged else None,
            num_sample_generations=0, bf16=self.bf16, gradient_checkpointing=False, save_strategy="no",
            disable_tqdm=True, dataloader_pin_memory=False,
        )  # fmt: skip
        self.trainer = PPOTrainer(
            args=config, processing_class=self.tokenizer, model=self.policy, ref_model=self.ref,
            reward_model=self.reward, value_model=self.value, train_dataset=self.data, eval_dataset=self.data,
        )  # fmt: skip
        self.trainer.log = lambda metrics: None

    def __call__(self) -> None:
        self.trainer.train()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trl", required=True)
    parser.add_argument("--ragged", action="store_true")
    parser.add_argument("--dtype", choices=["fp32", "bf16"], default="fp32")
    parser.add_argument("--runs", type=int, default=5)
    args = parser.parse_args()
    sys.path.insert(0, args.trl)
    ceilings((torch.float32, torch.bfloat16))
    policy, reward = make_models(6.1 if args.ragged else -20.0)
    prompts, bf16 = make_prompts(args.ragged), args.dtype == "bf16"
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        save_pretrained(policy, folder / "policy")
        save_pretrained(reward, folder / "reward")
        ours = Ours(policy, reward, prompts, args.ragged, bf16)
        rivals = {"TRL 1.12.0 fp32": Theirs(folder, prompts, args.ragged, False)}
        if bf16:
            rivals["TRL 1.12.0 bf16"] = Theirs(folder, prompts, args.ragged, True)
        goal = 2.5 if args.ragged or bf16 else 1.6
        label = f"PPO iteration {args.dtype}{' ragged' if args.ragged else ''}"
        compare(label, ours, rivals, runs=args.runs, target=dict.fromkeys(rivals, goal))
        print(f"  mean answer: {ours():.1f} tokens")


if __name__ == "__main__":
    main()
