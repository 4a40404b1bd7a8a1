"""A rollout: prompts, the policy's answers, and what every role says about each token; its file.

Index t of each (B, R) tensor is the answer token a_t. The models speak of positions of the whole sequence: position p
of token p + 1, see `response_positions` and `of_responses`.
"""

import json
import os
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from minirlhf import dist
from minirlhf.data import Example, collate, decode
from minirlhf.errors import CheckpointError, NonFiniteError
from minirlhf.generate import Generation, generate
from minirlhf.heads import RewardModel, ValueModel, last_true
from minirlhf.model import CausalLM, logit_factors
from minirlhf.ops import head_stats
from minirlhf.tokenizer import Tokenizer

IGNORE = -100  # a target that is not asked for


@dataclass(frozen=True)
class Rollout:
    """B episodes; prompts left-padded, responses right-padded."""

    prompts: Tensor  # (B, P) int64
    prompt_mask: Tensor  # (B, P) bool
    responses: Tensor  # (B, R) int64
    response_mask: Tensor  # (B, R) bool, True up to and including EOS
    sampler_logprobs: Tensor  # (B, R) from the sampler, to be held against old_logprobs
    old_logprobs: Tensor  # (B, R) log π_old(a_t), from the training forward
    ref_logprobs: Tensor  # (B, R) log π_ref(a_t)
    values: Tensor  # (B, R) V(s_t), before a_t
    scores: Tensor  # (B,) of the reward model or reward function, as it gave them
    has_eos: Tensor  # (B,) bool, False: cut by max_new_tokens
    score_at: str = "last"  # token that receives the score, see `action_mask` and `value_mask`

    def __len__(self) -> int:
        return len(self.prompts)

    @property
    def input_ids(self) -> Tensor:  # (B, T)
        """Prompt and response."""
        return torch.cat([self.prompts, self.responses], 1)

    @property
    def attention_mask(self) -> Tensor:  # (B, T)
        """True at real tokens of both."""
        return torch.cat([self.prompt_mask, self.action_mask], 1)

    @property
    def action_mask(self) -> Tensor:  # (B, R) bool
        """Tokens that count as actions: the answer's; with the score in the last column, those after EOS too."""
        if self.score_at == "column":
            return self.response_mask.any(1, keepdim=True).expand_as(self.response_mask)
        return self.response_mask

    @property
    def value_mask(self) -> Tensor:  # (B, R) bool
        """States with a value: those of the actions; with the score after the answer, the state that it ends in too."""
        if self.score_at == "next":
            return self.response_mask | F.pad(self.response_mask, (1, 0))[:, :-1]
        return self.action_mask

    @property
    def lengths(self) -> Tensor:  # (B,)
        """Real tokens of the responses."""
        return self.response_mask.sum(1)

    @property
    def total_lengths(self) -> Tensor:  # (B,)
        """Real tokens of prompts and responses, which is what a forward costs."""
        return self.attention_mask.sum(1)

    def sequences(self) -> tuple[Tensor, Tensor, Tensor]:  # (B, S), (B, S) bool, (B, 1)
        """Prompts and responses as `left_aligned`, and where in them each response begins, see `of_responses`."""
        ids, mask, padding = left_aligned(self.input_ids, self.attention_mask)
        return ids, mask, self.prompts.shape[1] - padding

    def texts(self, tokenizer: Tokenizer) -> tuple[list[str], list[str]]:
        """Prompts and responses."""
        prompts = decode(self.prompts, self.prompt_mask, tokenizer)
        return prompts, decode(self.responses, self.response_mask, tokenizer)

    def tensors(self) -> dict[str, Tensor]:
        """By name, all of them."""
        return {f.name: getattr(self, f.name) for f in fields(self) if f.name != "score_at"}

    def rows(self, index: Tensor) -> "Rollout":
        """These episodes, with the columns that are padding in all of them cut off."""
        first = self.prompts.shape[1] - int(self.prompt_mask[index].sum(1).max())
        R = int(self.value_mask[index].sum(1).max())
        cut: dict[str, Any] = {name: x[index] for name, x in self.tensors().items()}
        for name, x in cut.items():
            if x.ndim == 2:
                cut[name] = x[:, first:] if name in ("prompts", "prompt_mask") else x[:, :R]
        return replace(self, **cut)


def left_aligned(
    input_ids: Tensor,  # (B, T)
    mask: Tensor,  # (B, T) bool, True = real token
) -> tuple[Tensor, Tensor, Tensor]:  # (B, S) each, 2 ≤ S ≤ T, and the padding taken away (B, 1)
    """Rows without the padding before them, cut to the longest: prompts of several lengths cost no forward."""
    first, last = mask.int().argmax(1, keepdim=True), last_true(input_ids, mask)[:, None]  # (B, 1) each
    index = torch.arange(max(2, int((last - first).max()) + 1), device=mask.device) + first  # (B, S)
    inside = index < mask.shape[1]
    index = index.clamp(max=mask.shape[1] - 1)
    return input_ids.gather(1, index), mask.gather(1, index) & inside, first


def response_positions(x: Tensor, R: int) -> Tensor:  # (B, T, ...) → (B, R, ...)
    """Position p of a sequence speaks of token p + 1: R positions, from the last prompt token to the last but one."""
    return x[:, -R - 1 : -1]


def of_responses(
    x: Tensor,  # (B, S) of `Rollout.sequences`
    first: Tensor,  # (B, 1) the position of a_0
    mask: Tensor,  # (B, R) bool
) -> Tensor:  # (B, R), 0 where not mask
    """What the positions say of the response tokens, which follow them."""
    index = first - 1 + torch.arange(mask.shape[1], device=x.device)  # (B, R)
    return torch.where(mask, x.gather(1, index.clamp(0, x.shape[1] - 1)), 0.0)


def target_stats(
    model: CausalLM,
    input_ids: Tensor,  # (B, T)
    attention_mask: Tensor,  # (B, T)
    targets: Tensor,  # (B, R) the last R tokens; IGNORE gives 0
    *,
    texts: Tensor | None = None,  # (B, T) as in `Trunk`
    temperature: float = 1.0,
    want: tuple[str, ...] = ("logprobs",),
    impl: str = "auto",
) -> dict[str, Tensor]:  # each name of `want`: (B, R)
    """What the model says about given tokens. Everything that needs a log-prob comes through here."""
    packed: dict[str, Any] = {} if texts is None else {"texts": texts}  # a model for other rows need not know of them
    hidden = response_positions(model.hidden(input_ids, attention_mask, **packed), targets.shape[1])  # (B, R, C)
    how: dict[str, Any] = {"temperature": temperature, "want": want, "impl": impl}
    stats = head_stats(*logit_factors(model.head, hidden.flatten(0, 1)), targets.flatten(), **how)
    return {name: getattr(stats, name).view_as(targets) for name in want}


def sft_targets(input_ids: Tensor, trained: Tensor) -> Tensor:  # (B, T), (B, T) → (B, T - 1)
    """The labels of positions 0 … T - 2."""
    return torch.where(trained, input_ids, IGNORE)[:, 1:]


def label_logprobs(
    model: CausalLM, examples: Sequence[Example], device: str = "cpu", *, impl: str = "auto"
) -> tuple[Tensor, Tensor]:  # (b, T - 1), (b, T - 1) bool
    """log π of the labels of some texts, 0 elsewhere; and where they are."""
    batch = collate(examples, device)
    targets = sft_targets(batch.input_ids, batch.trained)
    stats = target_stats(model, batch.input_ids, batch.attention_mask, targets, texts=batch.texts, impl=impl)
    return stats["logprobs"], targets != IGNORE


def policy_stats(
    model: CausalLM,
    rollout: Rollout,
    *,
    temperature: float,  # τ, the same as in sampling
    want: tuple[str, ...] = ("logprobs",),
    impl: str = "auto",
) -> dict[str, Tensor]:  # each (B, R); logprobs: log π(a_t), 0 at padding
    """The one function behind old, new and reference log-probs."""
    ids, mask, first = rollout.sequences()
    answers = mask[:, 1:] & (torch.arange(1, ids.shape[1], device=ids.device) >= first)  # (B, S - 1)
    targets = torch.where(answers, ids[:, 1:], IGNORE)  # (B, S - 1)
    stats = target_stats(model, ids, mask, targets, temperature=temperature, want=want, impl=impl)
    return {name: of_responses(x, first, rollout.action_mask) for name, x in stats.items()}


def state_values(model: ValueModel, rollout: Rollout) -> Tensor:  # (B, R) V(s_t), before a_t; 0 outside value_mask
    """The value model at the positions from which the answer's tokens are drawn."""
    ids, mask, first = rollout.sequences()
    return of_responses(model(ids, mask), first, rollout.value_mask)


Partition = Callable[[Tensor], Sequence[Tensor]]


class Roles(NamedTuple):
    """The models of PPO; the reward model is whatever scores a rollout's answers."""

    policy: CausalLM
    ref_policy: CausalLM
    value_model: ValueModel | None  # None: advantages without a critic
    score: Callable[[Rollout], Tensor]  # → (B,)
    reward_model: RewardModel | None = None  # behind `score`
    gathered: Callable[..., AbstractContextManager[Any]] = lambda *models: nullcontext()  # in it they are whole


def reward_model_score(model: RewardModel) -> Callable[[Rollout], Tensor]:
    """Scores of prompt and answer, read at the answer's last token."""

    def score(rollout: Rollout) -> Tensor:  # → (B,)
        ids, mask, _ = left_aligned(rollout.input_ids, torch.cat([rollout.prompt_mask, rollout.response_mask], 1))
        return model(ids, mask)

    return score


def collect(
    roles: Roles,
    prompts: Tensor,  # (B, P) left-padded
    prompt_mask: Tensor,  # (B, P)
    *,
    eos_token_id: int,
    score_at: str = "last",  # "column": sampling goes on after EOS, see `Rollout.action_mask`
    impl: str = "auto",
    partition: Partition,  # total lengths (B,) → rows of each forward
    **sampling: Any,  # as `generate` takes it
) -> Rollout:
    """Let the policy answer, then ask every role about the answers.

    `partition` gives the microbatches of the first epoch: old log-probs come from the very forwards that the update
    repeats, and its first ratio is 1 in every bit.
    """
    stop = None if score_at == "column" else eos_token_id
    with roles.gathered(roles.policy):
        made = sample_rows(roles.policy, prompts, prompt_mask, eos_token_id=stop, **sampling)
    ends = (made.tokens == eos_token_id) & made.mask  # (B, R)
    answer = made.mask & (ends.cumsum(1) - ends.long() == 0)  # (B, R) no EOS before
    blank = torch.zeros_like(made.logprobs)  # (B, R)
    voids = blank, blank, blank, blank[:, 0]  # `judge` fills them
    rollout = Rollout(
        prompts, prompt_mask, made.tokens, answer, made.logprobs, *voids, has_eos=ends.any(1), score_at=score_at
    )
    temperature = sampling.get("temperature", 1.0)
    return judge(rollout, partition(rollout.total_lengths), roles, temperature=temperature, impl=impl)


def sample_rows(
    model: CausalLM,
    prompts: Tensor,  # (B, P) left-padded
    prompt_mask: Tensor,  # (B, P)
    *,
    rng: Any = None,  # a generator for each answer; with one rank also as `generate` takes it
    **sampling: Any,
) -> Generation:  # (B · answers, R) each
    """`generate`, each rank its prompts. No rank waits for another before all are done; where one finds a number that
    is none, all raise NonFiniteError."""
    if dist.world_size() == 1:
        return generate(model, prompts, prompt_mask, rng=rng, **sampling)
    B, K = len(prompts), sampling.get("num_return_sequences", 1)
    own = dist.mine(range(B))
    rows = list(own) or [0]  # a rank without a prompt draws an answer that does not count
    streams = [rng[i * K + k] for i in rows for k in range(K)]
    found = ""
    try:
        made = generate(model, prompts[rows], prompt_mask[rows], rng=streams, **sampling)
    except NonFiniteError as e:
        found = str(e)
    if dist.all_max(torch.tensor(len(found))):
        raise NonFiniteError(found or "logits of another rank's rows are NaN or infinite")
    R = int(dist.all_max(torch.tensor(made.tokens.shape[1])))
    tokens = F.pad(made.tokens, (0, R - made.tokens.shape[1]), value=sampling["pad_token_id"])
    parts = (x.view(len(rows), K, -1)[: len(own)] for x in (tokens, made.mask, made.logprobs))
    return Generation(*(dist.all_rows(x, B).flatten(0, 1) for x in parts))


@torch.no_grad()
def judge(
    rollout: Rollout, parts: Sequence[Tensor], roles: Roles, *, temperature: float, impl: str = "auto"
) -> Rollout:
    """Every role's opinion of every part: old and reference log-probs, values, scores. Part i is of rank i mod W."""
    how: dict[str, Any] = {"temperature": temperature, "impl": impl}
    asked: dict[str, tuple[Any, Callable[[Rollout], Tensor]]] = {
        "old_logprobs": (roles.policy, lambda part: policy_stats(roles.policy, part, **how)["logprobs"]),
        "ref_logprobs": (roles.ref_policy, lambda part: policy_stats(roles.ref_policy, part, **how)["logprobs"]),
        "scores": (roles.reward_model, roles.score),
    }
    if (critic := roles.value_model) is not None:
        asked["values"] = critic, lambda part: state_values(critic, part)
    out: dict[str, Any] = {}
    for name, (model, ask) in asked.items():
        found = torch.zeros_like(getattr(rollout, name))
        with roles.gathered(model):
            for index in dist.mine(parts):
                said = ask(rollout.rows(index)).to(found)
                found[(index, *map(slice, said.shape[1:]))] = said
        out[name] = dist.all_sum(found)
    return replace(rollout, **out)


# ---- file -----------------------------------------------------------------------------------------------------------


def save_rollout(
    path: Path,
    rollout: Rollout,
    state: dict[str, Any],  # numbers and words: step, β, seed ...
    weights: dict[str, dict[str, Tensor]],  # group (policy, value_model, optimizer) → name → tensor, before the update
) -> None:
    """Everything that runs an update again, in one safetensors file that is complete or absent."""
    groups = {"rollout": rollout.tensors()} | weights
    tensors = {f"{group}.{name}": x for group, named in groups.items() for name, x in named.items()}
    words = json.dumps({"score_at": rollout.score_at, "state": state, "weights": list(weights)}, ensure_ascii=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        save_file(
            {k: v.detach().contiguous().cpu() for k, v in tensors.items()}, temporary, metadata={"minirlhf": words}
        )
    except SafetensorError as e:
        temporary.unlink(missing_ok=True)
        raise CheckpointError(f"{path}: cannot be written ({e}); make room, or leave ppo.save_rollouts out") from e
    with temporary.open("rb") as f:
        os.fsync(f.fileno())
    os.replace(temporary, path)


def load_rollout(path: Path) -> tuple[Rollout, dict[str, Any], dict[str, dict[str, Tensor]]]:
    """→ rollout, state, weights of `save_rollout`. Raises CheckpointError."""
    groups: dict[str, dict[str, Tensor]] = {}
    try:
        with safe_open(path, framework="pt") as file:
            words = json.loads(file.metadata()["minirlhf"])
            for key in file.keys():  # noqa: SIM118  (safe_open is no dict)
                group, name = key.split(".", 1)
                groups.setdefault(group, {})[name] = file.get_tensor(key)
        weights = {group: groups.get(group, {}) for group in words["weights"]}  # no moments before the first step
        return Rollout(**groups["rollout"], score_at=words["score_at"]), words["state"], weights
    except (SafetensorError, OSError, ValueError, KeyError, TypeError, RecursionError) as e:
        raise CheckpointError(f"{path}: is no rollout that ppo.save_rollouts wrote ({e})") from e
