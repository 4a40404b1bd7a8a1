"""Where each token stands and which others it sees: positions, ALiBi, rotation, masks.

Positions count the real tokens of a row, so padding on the left, or holes in it, change nothing. What goes wrong: a
query that may see no key turns into NaN, and NaN spreads through gradients; therefore every query sees at least itself.
"""

import math
from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from minirlhf.architecture import ModelConfig
from minirlhf.errors import UsageError


class View(NamedTuple):
    """What all layers share in one forward pass."""

    positions: Tensor  # (B or 1, T) of the new tokens, 0 and up
    masks: list[Tensor | None]  # of every layer, see Attention
    rope: tuple[Tensor, Tensor] | None


def make_view(
    config: ModelConfig,
    mask: Tensor | None,  # (B, S) bool, True = real token; None: all
    T: int,
    past: int,
    x: Tensor,  # (B, T, C) embeddings, for their dtype and device
    texts: Tensor | None,  # (B, S) as in `Trunk`
) -> View:
    """Positions, masks and rotations for the last T of past + T tokens, made once for all layers."""
    S = past + T
    if mask is None:
        keys = torch.arange(S, device=x.device)[None]  # (1, S) position of every token
    else:
        keys = (mask.cumsum(1) - 1).clamp(min=0)  # (B, S)
    if texts is not None:  # every text begins at 0
        new = texts != F.pad(texts[:, :-1], (1, 0), value=-1)  # (B, S)
        keys = keys - torch.where(new, keys, 0).cummax(1).values
    positions = keys[:, past:]  # (B or 1, T)
    if config.position == "learned" and config.max_seq_len < S and int(keys.max()) >= config.max_seq_len:
        raise UsageError(f"{int(keys.max()) + 1} tokens in a row, but model.max_seq_len is {config.max_seq_len}")
    wide = torch.promote_types(x.dtype, torch.float32)
    bias = None
    if config.position == "alibi":
        bias = alibi_column(config.n_head, wide, x.device) * keys[:, None, None].to(wide)  # (B, H, 1, S)
    rope = None
    if config.position == "rotary":
        angle = positions[:, None, :, None] * rope_row(config, wide, x.device)  # (B, 1, T, d)
        rope = angle.cos(), angle.sin()
    windows = [config.window(i) for i in range(config.n_layer)]
    if mask is not None and T == S and bool((mask[:, 1:] <= mask[:, :-1]).all()):
        mask = None  # padding on the right alone is after all that is real: causal attention does not see it
    masks = {w: visible(mask, keys, T, w, bias, texts) for w in set(windows)}
    return View(positions, [masks[w] for w in windows], rope)


def visible(
    mask: Tensor | None,  # (B, S) bool, True = real token
    keys: Tensor,  # (B or 1, S) positions
    T: int,  # the last T tokens ask
    window: int | None,
    bias: Tensor | None,  # (B or 1, H, 1, S) ALiBi
    texts: Tensor | None = None,  # (B, S), then T = S
) -> Tensor | None:  # (B or 1, 1, T, S) bool, or (B, H, T, S) with a bias; None: plain causal, no mask needed
    """Key j is visible to query i when j ≤ i, j is real, of the same text, and pos_i - window < pos_j; and every query
    sees itself."""
    S = keys.shape[1]
    if window is not None and window >= S:
        window = None
    if mask is None and window is None and texts is None and (T == 1 or (T == S and bias is None)):
        return bias
    if T == 1:
        seen = keys.new_ones((1, S), dtype=torch.bool) if mask is None else F.pad(mask[:, :-1], (0, 1), value=True)
        seen = seen[:, None, None]  # (B, 1, 1, S)
    else:
        query = torch.arange(S - T, S, device=keys.device)[:, None]  # (T, 1)
        key = torch.arange(S, device=keys.device)[None]  # (1, S)
        seen = (key <= query)[None, None]  # (1, 1, T, S)
        if mask is not None:
            seen = (seen & mask[:, None, None]) | (key == query)
        if texts is not None:
            seen = seen & (texts[:, None, :, None] == texts[:, None, None])
    if window is not None:
        seen = seen & (keys[:, None, None] > keys[:, None, S - T :, None] - window)
    return seen if bias is None else torch.where(seen, bias, -torch.inf)


def alibi_slopes(n_head: int) -> list[float]:
    """Slopes of Press et al. 2021 (arXiv 2108.12409, section 3) as BLOOM uses them, for any number of heads.

    n = largest power of two ≤ H: b, b², … bⁿ with b = 2^(-8/n); then the odd powers of 2^(-8/2n) for the other heads.
    """
    n = 2 ** int(math.log2(n_head))
    return [2 ** (-8 * i / n) for i in range(1, n + 1)] + [2 ** (-4 * i / n) for i in range(1, 2 * (n_head - n), 2)]


@cache
@torch.inference_mode(False)  # what is kept serves training too
def alibi_column(n_head: int, dtype: torch.dtype, device: torch.device) -> Tensor:  # (H, 1, 1)
    """The slopes, to be multiplied with positions."""
    return torch.tensor(alibi_slopes(n_head), dtype=dtype, device=device)[:, None, None]


def rope_frequencies(config: ModelConfig, like: Tensor) -> Tensor:  # (⌈rope_dim / 2⌉,)
    """θ^(-2i/d) (Su et al. 2021, arXiv 2104.09864, eq. 15), scaled as LLaMA 3.1 does where the config says so.

    Linear: f / factor. llama3, with wavelength λ = 2π/f and n the original length: f where λ < n/high, f / factor where
    λ > n/low, and between them the mix (1-s)·f/factor + s·f with s = (n/λ - low) / (high - low).
    """
    d = config.rope_dim
    f = 1.0 / config.rope_theta ** (torch.arange(0, d, 2, device=like.device).to(like.dtype) / d)
    if config.rope_llama3 is None:
        return f / config.rope_factor
    low, high, n = config.rope_llama3
    s = ((n * f / (2 * math.pi) - low) / (high - low)).clamp(0, 1)
    return (1 - s) * f / config.rope_factor + s * f


@cache
@torch.inference_mode(False)
def rope_row(config: ModelConfig, dtype: torch.dtype, device: torch.device) -> Tensor:  # (d,)
    """(-f, f), to be multiplied with positions: the cosines of both halves are the same, the sines differ in sign."""
    f = rope_frequencies(config, torch.empty(0, dtype=dtype, device=device))
    return torch.cat([-f, f])


def rotate(
    x: Tensor,  # (B, H, T, D)
    cos_sin: tuple[Tensor, Tensor],  # each (B, 1, T, d), at least fp32, of the d/2 angles: (cos, cos) and (-sin, sin)
) -> Tensor:  # (B, H, T, D)
    """Rotates the first d dimensions, dimension i paired with i + d/2 (the half convention of LLaMA and GPT-NeoX)."""
    cos, sin = cos_sin
    d = cos.shape[-1]
    if d < x.shape[-1]:
        return torch.cat([rotate(x[..., :d], cos_sin), x[..., d:]], -1)
    wide = x if x.dtype == cos.dtype else x.to(cos.dtype)
    y = torch.addcmul(wide * cos, wide.roll(d // 2, -1), sin)
    return y if y.dtype == x.dtype else y.to(x.dtype)
