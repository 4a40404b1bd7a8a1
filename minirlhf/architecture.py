"""The switches of the architecture, which make one model a GPT-2, BLOOM, OPT, LLaMA, Qwen or GPT-NeoX."""

from dataclasses import dataclass
from typing import Any

from torch.nn import functional as F

from minirlhf.errors import UsageError
from minirlhf.families import FAMILIES, SWITCHES
from minirlhf.products import Ready, gelu_tanh

DERIVED: Any = None  # default of a field that `__post_init__` fills in, from the family or from the sizes
SIZES: tuple[str, ...] = ("vocab_size", "n_layer", "n_head", "d_model", "max_seq_len")
SIZES += ("n_kv_head", "head_dim", "d_inner", "sliding_window")  # these may be None
ACTIVATIONS: dict[str, Ready] = {"gelu_tanh": gelu_tanh, "gelu": F.gelu, "relu": F.relu, "silu": F.silu}
DROPOUTS = ("dropout", "embed_dropout", "attn_dropout")
CHOICES = {
    "norm": ("layer", "rms"),
    "position": ("learned", "alibi", "rotary"),
    "activation": tuple(ACTIVATIONS),
    "qkv": ("split", "blocks", "heads"),
}


@dataclass(frozen=True)
class ModelConfig:
    """Sizes, and the switches of the architecture; a switch left out (None) is what the family says."""

    family: str = "gpt2"
    vocab_size: int = 256  # rows of the embedding
    n_layer: int = 2
    n_head: int = 4
    d_model: int = 64  # C
    max_seq_len: int = 64  # rows of the position table; only informative without one
    n_kv_head: int = DERIVED  # key/value heads; None: n_head
    head_dim: int = DERIVED  # D; None: C / n_head
    d_inner: int = DERIVED  # None: 4C, or 8C/3 rounded up to a multiple of 8 with a gate
    norm: str = DERIVED  # "layer" | "rms"
    norm_eps: float = DERIVED
    position: str = DERIVED  # "learned" | "alibi" | "rotary"
    position_offset: int = DERIVED  # rows of the position table before position 0
    rope_theta: float = 10000.0
    rope_fraction: float = DERIVED  # share of the head's dimensions that rotate
    rope_factor: float = 1.0  # "linear" scaling: positions / factor
    rope_llama3: tuple[float, float, int] | None = None  # low, high, original length; beside rope_factor
    activation: str = DERIVED  # "gelu_tanh" | "gelu" | "relu" | "silu"
    gated: bool = DERIVED  # act(gate x) · up x instead of act(up x)
    parallel_residual: bool = DERIVED  # x + attn(n1 x) + mlp(n2 x)
    qkv_bias: bool = DERIVED
    out_bias: bool = DERIVED
    mlp_bias: bool = DERIVED
    qk_norm: bool = DERIVED  # RMS norm of each head's query and key, before the rotation
    embed_norm: bool = DERIVED  # norm right after the embedding
    sliding_window: int | None = None  # tokens a query sees, itself included; None: all before it
    sliding_layers: tuple[int, ...] | None = None  # layers with that window; None: all
    tied: bool = DERIVED  # the head is the embedding
    qkv: str = DERIVED  # "split": three matrices; one matrix with rows "blocks" [q | k | v] or "heads" (H, 3, D)
    dropout: float = 0.0  # on both branches
    embed_dropout: float = DERIVED  # after the embedding; None: dropout
    attn_dropout: float = DERIVED  # on attention weights; None: dropout
    bos_token_id: int | None = None  # the three only travel from one folder to the next
    eos_token_id: int | tuple[int, ...] | None = None
    pad_token_id: int | None = None

    def __post_init__(self) -> None:
        if self.family not in FAMILIES:
            raise UsageError(f"model.family {self.family!r} is unknown; choose one of {', '.join(FAMILIES)}")
        for name, value in (SWITCHES | FAMILIES[self.family].switches).items():
            self._default(name, value)
        if self.head_dim is None and self.n_head > 0 and self.d_model % self.n_head:
            raise UsageError(f"model.d_model {self.d_model} is not a multiple of model.n_head {self.n_head}")
        self._default("embed_dropout", self.dropout)
        self._default("attn_dropout", self.dropout)
        self._default("n_kv_head", self.n_head)
        self._default("head_dim", self.d_model // max(self.n_head, 1))
        self._default("d_inner", -(-8 * self.d_model // 24) * 8 if self.gated else 4 * self.d_model)
        self._check()

    def _default(self, name: str, value: object) -> None:
        if getattr(self, name) is None:
            object.__setattr__(self, name, value)

    def _check(self) -> None:
        for name in SIZES:
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise UsageError(f"model.{name} must be at least 1, not {getattr(self, name)}")
        for name in DROPOUTS:
            if not 0 <= getattr(self, name) < 1:
                raise UsageError(f"model.{name} must be in [0, 1), not {getattr(self, name)}")
        for name, allowed in CHOICES.items():
            if getattr(self, name) not in allowed:
                raise UsageError(f"model.{name} {getattr(self, name)!r} is unknown; choose one of {', '.join(allowed)}")
        if self.n_head % self.n_kv_head:
            raise UsageError(f"model.n_head {self.n_head} is not a multiple of model.n_kv_head {self.n_kv_head}")
        if self.qkv != "split" and self.n_kv_head != self.n_head:
            raise UsageError(f"model.n_kv_head {self.n_kv_head} needs model.qkv 'split', not {self.qkv!r}")
        if self.position == "rotary" and self.rope_dim % 2 and self.rope_dim + 1 > self.head_dim:
            raise UsageError(f"model: rotary positions need an even number of dimensions, not {self.rope_dim}")

    @property
    def rope_dim(self) -> int:
        """d, the dimensions of a head that rotate; with an odd d one more turns with the last frequency."""
        return int(self.head_dim * self.rope_fraction)

    def window(self, layer: int) -> int | None:
        """The sliding window of one layer, None for full attention."""
        return self.sliding_window if self.sliding_layers is None or layer in self.sliding_layers else None
