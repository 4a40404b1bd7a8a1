"""Reward model (one score per answer) and value model (one number per token): a trunk and one output row.

Not here: losses, and shaping scores into rewards. What goes wrong: reading the score at the wrong token. The attention
mask alone says where a row ends, never the id of the padding token, which may be the EOS token.
"""

import copy
from typing import Self

import torch
from torch import Tensor, nn

from minirlhf.architecture import ModelConfig
from minirlhf.model import Cache, CausalLM, Head, Trunk, initialize, normal, trunk_names


class ScalarModel(nn.Module):
    """A trunk with `score`: hidden state → one number, at least fp32."""

    def __init__(self, config_or_trunk: ModelConfig | Trunk, *, rng: torch.Generator | None = None) -> None:
        """Draws what is new: the head always, the trunk when only its config is given."""
        super().__init__()
        if isinstance(config_or_trunk, ModelConfig):
            self.trunk = Trunk(config_or_trunk)
            initialize(self.trunk, rng)
        else:
            self.trunk = config_or_trunk
        self.config = self.trunk.config
        self.score = Head(self.config.d_model, 1)
        # Stiennon et al. 2020 (arXiv 2009.01325): a new head is normal(0, 1/√(C+1)).
        normal(self.score.weight, (self.config.d_model + 1) ** -0.5, rng)
        self.score.to(self.trunk.embed.weight.device)

    def module_names(self) -> dict[str, str]:
        """Our path of every module with weights → its path in the family's Hugging Face class."""
        return trunk_names(self.trunk) | {"score": "score"}


class RewardModel(ScalarModel):
    """One score per row, read at its last real token (Ouyang et al. 2022, arXiv 2203.02155, section 3.5).

    Scores are `gain` · what the head says + `bias`, which are no weights and which no training changes.
    """

    gain, bias = 1.0, 0.0

    def normalize(self, scores: Tensor) -> None:  # (N,) of answers of the policy that PPO will start from
        """From now on scores like these have mean 0 and deviation 1 (Ziegler et al. 2019, arXiv 1909.08593, section
        2); where they are all equal, mean 0."""
        mean, std = float(scores.double().mean()), float(scores.double().std(correction=0))
        std = std if std > 1e-6 * abs(mean) else 1.0
        self.gain, self.bias = self.gain / std, (self.bias - mean) / std

    @classmethod
    def from_causal_lm(cls, model: CausalLM, rng: torch.Generator | None = None) -> Self:
        """A copy of a language model's trunk under a new head."""
        return cls(copy.deepcopy(model.trunk), rng=rng)

    def forward(
        self,
        input_ids: Tensor,  # (B, T) int64
        attention_mask: Tensor | None = None,  # (B, T) True = real token
    ) -> Tensor:  # (B,)
        """The score at the last True of the mask, on whichever side the padding is."""
        hidden = self.trunk(input_ids, attention_mask)  # (B, T, C)
        row = torch.arange(len(hidden), device=hidden.device)
        said = self.score(hidden[row, last_true(input_ids, attention_mask)])[:, 0]  # (B,)
        return self.gain * said + self.bias


class ValueModel(ScalarModel):
    """V(s_t) at every token (Ziegler et al. 2019, arXiv 1909.08593, section 2.2)."""

    @classmethod
    def from_trunk(cls, trunk: Trunk) -> Self:
        """A copy of a trunk under a zero head: all first values are 0."""
        value = cls(copy.deepcopy(trunk), rng=torch.Generator())
        nn.init.zeros_(value.score.weight)
        return value

    @classmethod
    def from_reward_model(cls, model: RewardModel, *, zero_head: bool = False) -> Self:
        """A copy of a reward model, read at every token; a zero head makes all first values 0."""
        value = cls.from_trunk(model.trunk)
        if not zero_head:
            value.score.load_state_dict(model.score.state_dict())
        return value

    def forward(
        self,
        input_ids: Tensor,  # (B, T) int64
        attention_mask: Tensor | None = None,  # (B, T) True = real token
        *,
        cache: Cache | None = None,
    ) -> Tensor:  # (B, T)
        """The value of the state after each token, that is, before the next one."""
        return self.score(self.trunk(input_ids, attention_mask, cache=cache))[..., 0]


class SharedValueModel(ValueModel):
    """A value head on the trunk of the policy, which stays the policy's: of this model only `score` is a parameter."""

    def __init__(self, policy: CausalLM) -> None:
        nn.Module.__init__(self)
        self._policy = (policy,)  # in a tuple, lest it become a submodule
        self.config = policy.config
        self.score = Head(self.config.d_model, 1).to(policy.trunk.embed.weight.device)
        nn.init.zeros_(self.score.weight)

    @property
    def policy(self) -> CausalLM:
        """The language model whose trunk is read."""
        return self._policy[0]

    @property
    def trunk(self) -> Trunk:  # type: ignore[override]
        """The policy's."""
        return self.policy.trunk


def last_true(input_ids: Tensor, attention_mask: Tensor | None) -> Tensor:  # (B, T) → (B,) int64
    """Index of the last real token; 0 in a row without any."""
    B, T = input_ids.shape
    if attention_mask is None:
        return torch.full((B,), T - 1, device=input_ids.device)
    index = torch.arange(T, device=input_ids.device)
    return torch.where(attention_mask.to(torch.bool), index, 0).amax(1)
