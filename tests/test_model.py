"""The causal language model: against a plain forward pass written out token by token, and its invariances."""

import math

import pytest
import torch
from tolerance import assert_close, bf16, exact, fp32, fp64
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from minirlhf import positions, products
from minirlhf.architecture import ModelConfig
from minirlhf.errors import UsageError
from minirlhf.families import FAMILIES
from minirlhf.model import Cache, CausalLM, Head
from minirlhf.positions import alibi_slopes, rope_frequencies, rotate

V = 19
SIZES = {"vocab_size": V, "n_layer": 2, "max_seq_len": 12}
CONFIGS = {  # every family once in a plain and once in an odd shape
    "gpt2": ModelConfig("gpt2", n_head=3, d_model=12, **SIZES),
    "gpt2-odd": ModelConfig("gpt2", n_head=1, d_model=5, d_inner=7, activation="relu", tied=False, **SIZES),
    "bloom": ModelConfig("bloom", n_head=4, d_model=12, **SIZES),
    "bloom-odd": ModelConfig("bloom", n_head=5, d_model=15, **SIZES),
    "opt": ModelConfig("opt", n_head=2, d_model=6, d_inner=9, **SIZES),
    "llama": ModelConfig("llama", n_head=4, n_kv_head=2, d_model=16, d_inner=10, **SIZES),
    "llama-alibi": ModelConfig("llama", n_head=4, n_kv_head=2, d_model=8, position="alibi", **SIZES),
    "llama-odd": ModelConfig("llama", n_head=3, n_kv_head=1, head_dim=6, d_model=7, mlp_bias=True, **SIZES),
    "llama3": ModelConfig(
        "llama", n_head=2, d_model=16, rope_theta=100.0, rope_factor=8.0, rope_llama3=(1.0, 4.0, 16), **SIZES
    ),
    "mistral": ModelConfig("mistral", n_head=4, n_kv_head=2, d_model=8, sliding_window=3, **SIZES),
    "qwen2": ModelConfig("qwen2", n_head=2, d_model=8, sliding_window=2, sliding_layers=(1,), **SIZES),
    "qwen3": ModelConfig("qwen3", n_head=2, n_kv_head=1, head_dim=4, d_model=6, rope_factor=2.0, **SIZES),
    "gpt_neox": ModelConfig("gpt_neox", n_head=2, d_model=24, **SIZES),  # 3 of 12 dimensions, that is, 4
    "gpt_neox-serial": ModelConfig("gpt_neox", n_head=2, d_model=16, parallel_residual=False, **SIZES),
}
FAMILY = pytest.mark.parametrize("name", CONFIGS)


def make(name, dtype=torch.float64):
    """A model whose every number matters: wide matrices, biases and norms away from their first values."""
    rng = torch.Generator().manual_seed(7)
    model = CausalLM(CONFIGS[name], rng=rng).to(dtype).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn(p.shape, generator=rng) * 0.4 + (1 if p.ndim == 1 and p.mean() > 0.5 else 0))
    return model


def tokens(*shape, seed=0):
    return torch.randint(V, shape, generator=torch.Generator().manual_seed(seed))


def padded(rows, left=True, pad=0):
    """Rows of different lengths as ids and mask."""
    T = max(map(len, rows))
    ids, mask = torch.full((len(rows), T), pad), torch.zeros(len(rows), T, dtype=torch.bool)
    for i, row in enumerate(rows):
        at = slice(T - len(row), T) if left else slice(0, len(row))
        ids[i, at], mask[i, at] = row, True
    return ids, mask


# ---- the plain forward pass -----------------------------------------------------------------------------------------


def plain_norm(x, norm, config):
    if norm.bias is None:
        return x / math.sqrt((x * x).mean() + config.norm_eps) * norm.weight
    return (x - x.mean()) / math.sqrt(((x - x.mean()) ** 2).mean() + config.norm_eps) * norm.weight + norm.bias


def plain_act(x, kind):
    if kind == "relu":
        return x.clamp(min=0)
    if kind == "silu":
        return x / (1 + torch.exp(-x))
    if kind == "gelu":
        return x * 0.5 * (1 + torch.erf(x / math.sqrt(2)))
    return 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def plain_linear(x, layer):
    return layer.weight @ x + (0 if layer.bias is None else layer.bias)


def plain_rotate(x, position, config):
    """Pairs (i, i + d/2) as complex numbers, turned by position · frequency."""
    d = int(config.head_dim * config.rope_fraction)
    half = (d + 1) // 2
    x = x.clone()
    for i in range(half):
        f = config.rope_theta ** (-2 * i / d)
        if config.rope_llama3 is not None:
            low, high, n = config.rope_llama3
            wavelength = 2 * math.pi / f
            s = (n / wavelength - low) / (high - low)
            if wavelength > n / low:
                f = f / config.rope_factor
            elif wavelength >= n / high:
                f = (1 - s) * f / config.rope_factor + s * f
        else:
            f = f / config.rope_factor
        turned = complex(x[i], x[i + half]) * complex(math.cos(position * f), math.sin(position * f))
        x[i], x[i + half] = turned.real, turned.imag
    return x


def plain_qkv(x, attn, config):
    """q (H, D), k and v (H_kv, D) of one token, by the layouts of the families' files."""
    H, D = config.n_head, config.head_dim
    if config.qkv == "split":
        return tuple(plain_linear(x, layer).view(-1, D) for layer in (attn.q, attn.k, attn.v))
    flat = plain_linear(x, attn.qkv)
    if config.qkv == "blocks":
        return tuple(flat[i * H * D : (i + 1) * H * D].view(H, D) for i in range(3))
    return tuple(torch.stack([flat[(3 * h + i) * D : (3 * h + i + 1) * D] for h in range(H)]) for i in range(3))


def plain_attention(xs, attn, config, window):
    H, D, out = config.n_head, config.head_dim, []
    packed = [plain_qkv(x, attn, config) for x in xs]
    if config.qk_norm:
        packed = [
            (
                torch.stack([plain_norm(row, attn.q_norm, config) for row in q]),
                torch.stack([plain_norm(row, attn.k_norm, config) for row in k]),
                v,
            )
            for q, k, v in packed
        ]
    if config.position == "rotary":
        packed = [
            (*(torch.stack([plain_rotate(row, t, config) for row in part]) for part in (q, k)), v)
            for t, (q, k, v) in enumerate(packed)
        ]
    slopes = alibi_slopes(H) if config.position == "alibi" else [0.0] * H
    for t, (q, _, _) in enumerate(packed):
        heads = []
        for h in range(H):
            group = h * config.n_kv_head // H
            seen = [j for j in range(t + 1) if window is None or j > t - window]
            scores = [float(q[h] @ packed[j][1][group]) / math.sqrt(D) - slopes[h] * (t - j) for j in seen]
            weights = [math.exp(s - max(scores)) for s in scores]
            heads.append(sum(w * packed[j][2][group] for w, j in zip(weights, seen, strict=True)) / sum(weights))
        out.append(plain_linear(torch.cat(heads), attn.out))
    return out


def plain_mlp(x, mlp, config):
    up = plain_linear(x, mlp.up)
    if config.gated:
        return plain_linear(plain_act(plain_linear(x, mlp.gate), config.activation) * up, mlp.down)
    return plain_linear(plain_act(up, config.activation), mlp.down)


@torch.no_grad()
def plain_logits(model, row):
    """Logits after every token of one row, from the definitions and one token at a time."""
    trunk, config = model.trunk, model.config
    xs = [trunk.embed.weight[i] for i in row]
    if config.position == "learned":
        xs = [x + trunk.pos_embed.weight[t + config.position_offset] for t, x in enumerate(xs)]
    if config.embed_norm:
        xs = [plain_norm(x, trunk.embed_norm, config) for x in xs]
    for i, block in enumerate(trunk.blocks):
        window = config.sliding_window if config.sliding_layers is None or i in config.sliding_layers else None
        attended = plain_attention([plain_norm(x, block.norm1, config) for x in xs], block.attn, config, window)
        middle = [x + a for x, a in zip(xs, attended, strict=True)]
        sources = xs if config.parallel_residual else middle
        normed = [plain_norm(s, block.norm2, config) for s in sources]
        xs = [m + plain_mlp(y, block.mlp, config) for m, y in zip(middle, normed, strict=True)]
    head = trunk.embed.weight if config.tied else model.head.weight
    return torch.stack([head @ plain_norm(x, trunk.final_norm, config) for x in xs])


@FAMILY
def test_plain_forward_pass(name):
    model, row = make(name), tokens(9)
    expected = plain_logits(model, row)
    assert expected.std() > 0.3
    with torch.no_grad():
        assert_close(model(row[None])[0], expected, fp64)


# ---- invariances ----------------------------------------------------------------------------------------------------


@FAMILY
@torch.no_grad()
def test_padding_changes_nothing(name):
    """On either side, and whatever id stands in the padding."""
    model = make(name)
    rows = [tokens(n, seed=n) for n in (1, 5, 9)]
    alone = [model(row[None])[0] for row in rows]
    for left in (True, False):
        for pad in (0, 3):
            ids, mask = padded(rows, left, pad)
            together = model(ids, mask)
            for logits, real, expected in zip(together, mask, alone, strict=True):
                assert_close(logits[real], expected, fp64)
            assert together.isfinite().all()


@FAMILY
@torch.no_grad()
def test_holes_in_the_mask_are_skipped(name):
    """Positions count real tokens, so that a row with holes is the row without them."""
    model, ids = make(name), tokens(2, 10)
    mask = torch.tensor([[0, 1, 0, 0, 1, 1, 0, 1, 1, 0], [1, 1, 1, 0, 1, 0, 1, 1, 1, 1]], dtype=torch.bool)
    logits = model(ids, mask)
    for row, real, got in zip(ids, mask, logits, strict=True):
        assert_close(got[real], model(row[real][None])[0], fp64)


@FAMILY
@torch.no_grad()
def test_batch_mates_change_nothing(name):
    model, ids = make(name), tokens(5, 7)
    logits = model(ids)
    for i in range(5):
        assert_close(logits[i], model(ids[i : i + 1])[0], fp64)
    order = torch.tensor([3, 0, 4, 1, 2])
    assert_close(model(ids[order]), logits[order], fp64)


@FAMILY
@torch.no_grad()
def test_no_token_sees_the_future(name):
    model, ids = make(name), tokens(1, 8)
    before = model(ids)
    for t in range(8):
        changed = ids.clone()
        changed[0, t] = (ids[0, t] + 1) % V
        after = model(changed)
        assert_close(after[:, :t], before[:, :t], fp64)
        assert (after[:, t] - before[:, t]).abs().max() > 1e-3


@FAMILY
def test_no_gradient_reaches_the_future(name):
    model, ids = make(name), tokens(1, 6)
    x = model.trunk.embed(ids).detach().requires_grad_()
    model.trunk.embed.forward = lambda _: x
    model(ids)[0, 3].sum().backward()
    assert (x.grad[0, :4].abs().amax(1) > 0).all() or model.config.sliding_window is not None
    assert (x.grad[0, 4:] == 0).all()


@FAMILY
@torch.no_grad()
@pytest.mark.parametrize("steps", [(5, 1, 1, 1, 1), (1,) * 9, (4, 3, 2)], ids=str)
def test_decoding_with_a_cache_is_the_full_forward(name, steps):
    model = make(name)
    rows = [tokens(n, seed=n) for n in (2, 9, 6)]
    ids, mask = padded(rows)
    full = model(ids, mask)
    cache, at, parts = Cache(model.config, 3, 9, torch.float64), 0, []
    for n in steps:
        parts.append(model.head(model.hidden(ids[:, at : at + n], mask[:, : at + n], cache=cache)))
        at += n
    assert cache.length == 9
    assert_close(torch.cat(parts, 1)[mask], full[mask], fp64)


@torch.no_grad()
def test_cache_without_a_mask_and_in_fp32():
    model, ids = make("llama", torch.float32), tokens(2, 9)
    cache = Cache(model.config, 2, 12)
    parts = [model.head(model.hidden(ids[:, i : i + 1], cache=cache)) for i in range(9)]
    assert (torch.cat(parts, 1) - model(ids)).abs().max() <= 2e-5


@torch.no_grad()
def test_rows_of_a_cache():
    """Finished rows dropped, the others in another order; one prompt repeated for several answers."""
    model, ids = make("bloom"), tokens(3, 6)
    cache = Cache(model.config, 3, 8, torch.float64)
    model.hidden(ids, cache=cache)
    for index in (torch.tensor([2, 0]), torch.tensor([1, 1, 1, 0])):
        next_ids = tokens(len(index), 1, seed=4)
        got = model.hidden(next_ids, cache=cache.rows(index))
        assert_close(got[:, 0], model.hidden(torch.cat([ids[index], next_ids], 1))[:, -1], fp64)
    twice = cache.rows(torch.arange(3).repeat_interleave(2))
    got = model.hidden(tokens(6, 1, seed=5), cache=twice)
    expected = model.hidden(torch.cat([ids.repeat_interleave(2, 0), tokens(6, 1, seed=5)], 1))[:, -1]
    assert_close(got[:, 0], expected, fp64)
    assert cache.length == 6
    with pytest.raises(AssertionError, match="cache of 8"):
        model.hidden(tokens(3, 3), cache=cache)


@torch.no_grad()
def test_a_window_hides_what_lies_before_it():
    """Two layers of window 3 see 2 · 2 tokens back, and no further."""
    model, ids = make("mistral"), tokens(1, 10)
    before = model(ids)
    changed = ids.clone()
    changed[0, 2] = (ids[0, 2] + 1) % V
    moved = (model(changed) - before)[0].abs().amax(1) > 1e-9
    assert moved.tolist() == [t in (2, 3, 4, 5, 6) for t in range(10)]


@FAMILY
@torch.no_grad()
def test_rows_of_nothing_but_padding_are_finite(name):
    model, ids = make(name), tokens(2, 5)
    mask = torch.tensor([[False] * 5, [True] * 5])
    logits = model(ids, mask)
    assert logits.isfinite().all()
    assert_close(logits[1], model(ids[1:])[0], fp64)


def test_gradients_are_finite_with_padding():
    model = make("bloom")
    ids, mask = padded([tokens(2), tokens(7)])
    model(ids, mask)[mask].square().sum().backward()
    assert all(p.grad.isfinite().all() for p in model.parameters())


# ---- positions ------------------------------------------------------------------------------------------------------


def test_alibi_slopes():
    """By hand from the rule: 2^(-8i/n), then the odd powers of 2^(-8/2n)."""
    assert alibi_slopes(1) == [2**-8]
    assert alibi_slopes(8) == [2**-1, 2**-2, 2**-3, 2**-4, 2**-5, 2**-6, 2**-7, 2**-8]
    assert alibi_slopes(3) == [2**-4, 2**-8, 2**-2]
    assert alibi_slopes(6) == [2**-2, 2**-4, 2**-6, 2**-8, 2**-1, 2**-3]
    assert alibi_slopes(12)[8:] == pytest.approx([0.7071068, 0.3535534, 0.1767767, 0.0883883], rel=1e-6)
    forty = alibi_slopes(40)
    assert len(forty) == 40
    assert forty[0] == pytest.approx(0.8408964)  # 2^-0.25
    assert forty[-1] == pytest.approx(0.2726269)  # 2^-1.875


def test_rotation_by_hand():
    """D = 4, θ = 100: angles p and p/10; dimension i goes with i + 2."""
    config = ModelConfig("llama", n_head=1, d_model=4, rope_theta=100.0)
    f = rope_frequencies(config, torch.empty(0, dtype=torch.float64))
    assert_close(f, [1.0, 0.1], fp64)
    angle = torch.cat([f, f])[None, None, None] * 3  # position 3
    x = torch.tensor([1.0, 2.0, 0.0, -1.0], dtype=torch.float64).view(1, 1, 1, 4)
    c, s, c1, s1 = math.cos(3), math.sin(3), math.cos(0.3), math.sin(0.3)
    expected = torch.tensor([c, 2 * c1 + s1, s, 2 * s1 - c1], dtype=torch.float64)
    sign = torch.tensor([-1.0, -1.0, 1.0, 1.0])
    assert_close(rotate(x, (angle.cos(), angle.sin() * sign))[0, 0, 0], expected, fp64)


def test_scaled_frequencies_by_hand():
    """Factor 4, low 1, high 4, n = 40: wavelengths below 10 stay, above 40 are stretched, 20 is a third of the way."""
    like = torch.empty(0, dtype=torch.float64)
    theta = (20 / (2 * math.pi)) ** 2  # D = 4: wavelengths 2π and 20
    config = ModelConfig("llama", n_head=1, d_model=4, rope_theta=theta, rope_factor=4.0, rope_llama3=(1.0, 4.0, 40))
    f = 2 * math.pi / 20
    assert_close(rope_frequencies(config, like), [1.0, f / 4 * 2 / 3 + f / 3], fp64)  # s = (40/20 - 1) / 3
    config = ModelConfig("llama", n_head=1, d_model=4, rope_theta=1e6, rope_factor=4.0, rope_llama3=(1.0, 4.0, 40))
    assert_close(rope_frequencies(config, like), [1.0, 1e-3 / 4], fp64)
    linear = ModelConfig("llama", n_head=1, d_model=4, rope_theta=1e4, rope_factor=2.0)
    assert_close(rope_frequencies(linear, like), [0.5, 0.005], fp64)


@pytest.mark.parametrize("name", ["gpt2", "opt"])
def test_position_table_ends(name):
    model = make(name)
    model(tokens(1, 12))
    with pytest.raises(UsageError, match="13 tokens in a row"):
        model(tokens(1, 13))
    mask = torch.ones(1, 13, dtype=torch.bool)
    mask[0, 4] = False
    model(tokens(1, 13), mask)  # 12 real tokens


@pytest.mark.parametrize("name", ["bloom", "llama", "gpt_neox"])
def test_models_without_a_table_go_on(name):
    assert make(name)(tokens(1, 30)).isfinite().all()


# ---- sizes, dtypes, switches ----------------------------------------------------------------------------------------

PUBLISHED = {  # counted by the published formulas
    "BLOOM-560m": (ModelConfig("bloom", vocab_size=250880, n_layer=24, n_head=16, d_model=1024), 559_214_592),
    "GPT-2": (
        ModelConfig("gpt2", vocab_size=50257, n_layer=12, n_head=12, d_model=768, max_seq_len=1024),
        124_439_808,
    ),
    "LLaMA-7B": (
        ModelConfig("llama", vocab_size=32000, n_layer=32, n_head=32, d_model=4096, d_inner=11008),
        6_738_415_616,
    ),
    "Baichuan-7B": (
        ModelConfig("llama", vocab_size=64000, n_layer=32, n_head=32, d_model=4096, d_inner=11008),
        7_000_559_616,
    ),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_parameters_of_published_models(name):
    config, count = PUBLISHED[name]
    with torch.device("meta"):
        model = CausalLM(config)
    assert sum(p.numel() for p in model.parameters()) == count


def test_bloom_count_by_formula():
    """L(12C² + 13C) + 4C + VC."""
    L, C, rows = 24, 1024, 250880
    assert L * (12 * C * C + 13 * C) + 4 * C + rows * C == PUBLISHED["BLOOM-560m"][1]


def test_logits_are_fp32_at_least():
    """The head multiplies in fp32 whatever the trunk is: no rounding to bf16 after the sum."""
    model = make("llama", torch.bfloat16)
    hidden = model.hidden(tokens(1, 4))
    assert hidden.dtype == torch.bfloat16
    logits = model(tokens(1, 4))
    assert logits.dtype == torch.float32
    assert_close(logits.double(), hidden.double() @ model.head.weight.double().T, fp32)
    assert make("llama")(tokens(1, 4)).dtype == torch.float64


@pytest.mark.parametrize("on_gpu", [False, True])
def test_under_autocast_a_gpu_rounds_the_factors_of_logits_and_nothing_else(on_gpu, monkeypatch):
    """There W h of bf16 numbers, summed in fp32; on a CPU, as a score everywhere, of fp32 numbers; fp64 stays."""
    monkeypatch.setattr(products, "LOGITS_BY_FP32", ("meta" if on_gpu else "cpu",))
    model, score = make("llama", torch.float32), Head(16, 1)
    x = torch.randn(5, 16, generator=torch.Generator().manual_seed(0))
    nn.init.constant_(score.weight, 0.3)
    with torch.autocast("cpu", torch.bfloat16):
        logits, scores, wide = model.head(x), score(x), make("llama").head(x.double())
    weight = model.head.weight
    assert logits.dtype == scores.dtype == torch.float32
    truth = {
        on: h.double() @ w.double().T for on, h, w in ((True, x.bfloat16(), weight.bfloat16()), (False, x, weight))
    }
    assert_close(logits.double(), truth[on_gpu], fp32)
    assert bool(((logits - truth[not on_gpu]).abs() > 1e-4).any())
    assert_close(scores.double(), x.double() @ score.weight.double().T, fp32)
    assert wide.dtype == torch.float64
    logits.sum().backward()
    rows = (x.bfloat16() if on_gpu else x).double().sum(0)  # (C,), the gradient of every token's row
    assert_close(weight.grad.double(), rows.expand_as(weight), bf16 if on_gpu else fp32)


@FAMILY
def test_padding_on_the_right_alone_needs_no_mask(name, monkeypatch):
    """What is real comes first and is that of the row alone; with padding elsewhere in one row there is a mask."""
    model, ids, masks = make(name), tokens(3, 6), []
    build = positions.visible
    monkeypatch.setattr(positions, "visible", lambda mask, *a: (masks.append(mask), build(mask, *a))[1])
    mask = torch.arange(6) < torch.tensor([[6], [4], [1]])
    hidden = model.hidden(ids, mask)
    assert masks
    assert all(m is None for m in masks)
    for row, length in enumerate((6, 4, 1)):
        assert_close(hidden[row, :length], model.hidden(ids[row : row + 1, :length])[0], fp64)
    for gap in (0, 2):
        masks.clear()
        model.hidden(ids, mask.index_put((torch.tensor(1), torch.tensor(gap)), torch.tensor(False)))
        assert all(m is not None for m in masks)


class Rounded(TorchDispatchMode):
    """Shapes of what is rounded to bf16."""

    def __init__(self):
        super().__init__()
        self.shapes = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if func is torch.ops.aten._to_copy.default and out.dtype == torch.bfloat16:
            self.shapes.append(tuple(out.shape))
        return out


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_under_autocast_activations_are_rounded_once(name):
    """Per layer the outputs of the two norms, for q, k and v or gate and up together."""
    model, ids = make(name, torch.float32), tokens(3, 5)
    config = model.config
    with torch.autocast("cpu", torch.bfloat16, cache_enabled=False), Rounded() as seen:
        model.hidden(ids)
    assert seen.shapes.count((3, 5, config.d_model)) == 2 * config.n_layer


@pytest.mark.parametrize("name", ["gpt2", "bloom", "llama"])
@torch.no_grad()
def test_bf16_stays_near_fp32(name):
    model, ids = make(name, torch.float32), tokens(2, 8)
    wide = model(ids)
    assert (make(name, torch.bfloat16)(ids) - wide).abs().max() < 0.05 * wide.abs().max() + 0.2


def test_tied_head_is_the_embedding():
    model = make("gpt2")
    assert model.head.weight is model.trunk.embed.weight
    assert make("llama").head.weight is not make("llama").trunk.embed.weight


def test_first_weights_come_from_the_generator_alone():
    first = CausalLM(CONFIGS["llama"], rng=torch.Generator().manual_seed(3))
    torch.manual_seed(99)
    before = torch.get_rng_state()
    second = CausalLM(CONFIGS["llama"], rng=torch.Generator().manual_seed(3))
    assert torch.equal(torch.get_rng_state(), before)
    for a, b in zip(first.parameters(), second.parameters(), strict=True):
        assert torch.equal(a, b)
    wide = CausalLM(ModelConfig("opt", vocab_size=500, d_model=64), rng=torch.Generator().manual_seed(0))
    assert wide.trunk.embed.weight.std().item() == pytest.approx(0.02, rel=0.03)
    assert wide.trunk.blocks[0].mlp.up.weight.std().item() == pytest.approx(0.02, rel=0.03)
    assert wide.trunk.blocks[0].mlp.up.bias.abs().max() == 0
    assert (wide.trunk.blocks[0].norm1.weight == 1).all()


def test_recomputing_blocks_gives_the_same_gradients():
    ids, mask = padded([tokens(3), tokens(8)])
    grads = []
    for on in (False, True):
        model = make("llama").train()
        model.trunk.checkpoint = on
        model(ids, mask)[mask].square().sum().backward()
        grads.append([p.grad for p in model.parameters()])
    for a, b in zip(*grads, strict=True):
        assert_close(a, b, exact)


@pytest.mark.parametrize("which", ["embed_dropout", "attn_dropout", "dropout"])
def test_dropout_acts_in_training_only(which):
    rates = {"dropout": 0.0, "embed_dropout": 0.0, "attn_dropout": 0.0} | {which: 0.5}
    model = CausalLM(ModelConfig("gpt2", n_head=3, d_model=12, **rates, **SIZES), rng=torch.Generator().manual_seed(0))
    ids = tokens(2, 8)
    assert not torch.equal(model.train()(ids), model(ids))
    assert torch.equal(model.eval()(ids), model(ids))


def test_dropout_keeps_the_mean_of_a_branch():
    """Scaled by 1/(1-p): the mean over many passes is the pass without."""
    torch.manual_seed(0)
    model = CausalLM(ModelConfig("gpt2", n_layer=1, dropout=0.3), rng=torch.Generator().manual_seed(0))
    x = torch.ones(1000, 64)
    model.train()
    dropped = model.trunk.blocks[0].drop(x)
    assert dropped.mean().item() == pytest.approx(1.0, abs=0.02)
    assert (dropped == 0).float().mean().item() == pytest.approx(0.3, abs=0.02)


def test_activations():
    """gelu(1) = Φ(1) = 0.8413447; its tanh form 0.8411920; silu(1) = 0.7310586."""
    one = torch.ones(1, dtype=torch.float64)
    for name, value in (("gelu", 0.8413447461), ("gelu_tanh", 0.8411919906), ("silu", 0.7310585786), ("relu", 1.0)):
        mlp = CausalLM(ModelConfig("gpt2", activation=name)).trunk.blocks[0].mlp
        assert_close(mlp.act(one), [value], fp64)


BAD = [
    ({"family": "gpt3"}, "family"),
    ({"n_layer": 0}, "n_layer"),
    ({"vocab_size": -1}, "vocab_size"),
    ({"n_head": 0}, "n_head"),
    ({"d_model": 10, "n_head": 4}, "d_model 10 is not a multiple"),
    ({"family": "llama", "n_kv_head": 3}, "n_kv_head 3"),
    ({"n_kv_head": 2}, "qkv"),
    ({"activation": "tanh"}, "activation"),
    ({"norm": "batch"}, "norm"),
    ({"position": "sinus"}, "position"),
    ({"family": "llama", "d_model": 12, "n_head": 4}, "even number"),
    ({"dropout": 1.0}, "dropout"),
    ({"dropout": -0.1}, "dropout"),
    ({"sliding_window": 0}, "sliding_window"),
]


@pytest.mark.parametrize(("settings", "message"), BAD, ids=[m for _, m in BAD])
def test_impossible_models_are_refused(settings, message):
    with pytest.raises(UsageError, match=message):
        ModelConfig(**settings)


def test_families_are_complete():
    """Every family makes a model whose modules all have a Hugging Face name."""
    for family in FAMILIES:
        model = CausalLM(ModelConfig(family, **SIZES))
        named = {path for path, module in model.named_modules() if list(module.parameters(recurse=False))}
        assert named == set(model.module_names())
        assert len(set(model.module_names().values())) == len(named)


def test_attention_mask_must_cover_the_tokens():
    with pytest.raises(AssertionError):
        make("llama")(tokens(2, 5), torch.ones(2, 4, dtype=torch.bool))


def test_integer_masks_are_read_as_booleans():
    model, ids = make("llama"), tokens(1, 4)
    mask = torch.tensor([[0, 1, 1, 1]])
    assert_close(model(ids, mask), model(ids, mask.bool()), exact)
