"""The prepared model against the model itself: the same numbers, and whoever wants to see a call sees it."""

from collections import Counter

import pytest
import torch
from test_generate import PROMPTS, lm, run, streams
from test_model import FAMILY, make, padded, tokens
from test_ops import Largest
from tolerance import assert_close, bf16, exact, fp32, fp64
from torch import nn

from minirlhf import prepared as prepared_module
from minirlhf import products
from minirlhf.generate import generate
from minirlhf.lora import LoRAConfig, adapter_parameters, add_adapter, use_adapter
from minirlhf.model import MLP, Attention, Cache, CausalLM, Linear, ModelConfig, Norm
from minirlhf.prepared import PLAIN, prepared

# ---- stand-ins ------------------------------------------------------------------------------------------------------


def bare(model):
    """Stand-ins for the modules and nothing else."""
    return prepared(model, 1, 1)


@pytest.fixture
def calls(monkeypatch):
    """Names of the module classes that are called as nn.Module."""
    seen, call = Counter(), nn.Module.__call__
    monkeypatch.setattr(
        nn.Module, "__call__", lambda self, *a, **k: (seen.update([type(self).__name__]), call(self, *a, **k))[1]
    )
    return seen


@FAMILY
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@torch.no_grad()
def test_a_stand_in_gives_the_same_bits(calls, name, dtype):
    """Prompts of three lengths, then token by token, as sampling asks; no module is called."""
    model, (ids, mask) = make(name, dtype), padded([tokens(6), tokens(3, seed=1), tokens(1, seed=2)])
    results = []
    for each in (bare(model), model):
        assert not calls
        cache = Cache(model.config, 3, 12, dtype=dtype)
        steps = [each.hidden(ids, mask, cache=cache)[:, -1:]]
        for t in range(6):
            mask_so_far = torch.cat([mask, mask.new_ones(3, t + 1)], 1)
            steps.append(each.hidden(tokens(3, 1, seed=t), mask_so_far, cache=cache))
        results.append(each.head(torch.cat(steps, 1)))
    assert calls["Trunk"] == 7
    assert results[0].dtype == results[1].dtype == torch.promote_types(dtype, torch.float32)
    assert_close(*results, exact)


def test_all_plain_kinds_are_stood_in_for():
    model = make("llama")
    kinds = {type(m) for m in model.modules()} - {nn.ModuleList}
    assert kinds == set(PLAIN)
    assert type(model) is CausalLM
    stand_in = bare(model)
    assert not isinstance(stand_in, nn.Module)
    assert stand_in.trunk.blocks[1].mlp.up.weight is model.trunk.blocks[1].mlp.up.weight
    assert stand_in.config is model.config


def test_whoever_wants_to_see_a_call_sees_it(calls):
    """A hook, another kind of layer, a function put in place of `forward`, a compiled module; the others go without."""

    class Louder(MLP):
        def forward(self, x):
            return 2 * super().forward(x)

    model = make("gpt2", torch.float32)
    first, second = model.trunk.blocks
    first.mlp = Louder(model.config)
    first.norm1.forward = lambda x: x
    first.attn.out.register_forward_hook(lambda *a: None)
    second.attn.qkv.register_forward_pre_hook(lambda *a: None)
    second.mlp.down = nn.Linear(second.mlp.down.in_features, second.mlp.down.out_features)
    second.norm2._compiled_call_impl = lambda x: x + 1
    for p in model.parameters():
        p.data.fill_(0.1)
    ids = tokens(2, 5)
    with torch.no_grad():
        made = bare(model).hidden(ids)
        assert calls == {"Louder": 1, "Linear": 5, "Norm": 2}  # Louder's two layers are modules too
        assert_close(made, model.hidden(ids), exact)


def test_what_covers_a_parameter_covers_it_in_a_stand_in():
    """As gathered weights cover their shards."""
    model = make("llama", torch.float32)
    vars(model.head)["weight"] = torch.ones(1, 16)
    assert_close(bare(model).head(torch.ones(1, 16)), torch.tensor([[16.0]]), exact)


def test_a_function_of_the_class_may_change_between_two_answers(monkeypatch):
    """Who tries something out changes the model in one place."""
    monkeypatch.setattr(prepared_module, "WORTH_PREPARING", 1)
    monkeypatch.setattr(products, "SMALLEST", 1)
    model = lm("llama", torch.float32)
    before = run(model, PROMPTS, rng=streams(5)).tokens
    for kind, name, change in (
        (Attention, "attend", lambda self, q, k, v, mask: q),
        (MLP, "forward", lambda self, x: x),
        (Norm, "forward", lambda self, x: 2 * x),
        (Linear, "forward", lambda self, x: x @ self.weight.T + 1),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(kind, name, change)
            assert not torch.equal(run(model, PROMPTS, rng=streams(5)).tokens, before), kind


def test_global_hooks_see_every_call(monkeypatch):
    monkeypatch.setattr(prepared_module, "WORTH_PREPARING", 1)
    monkeypatch.setattr(products, "SMALLEST", 1)
    seen = Counter()
    hook = nn.modules.module.register_module_forward_hook(lambda module, *a: seen.update([type(module).__name__]))
    try:
        run(lm(dtype=torch.float32), PROMPTS, rng=streams(5), eos_token_id=None)
    finally:
        hook.remove()
    assert seen["Linear"] == 12 * 2 * 7  # of the prompts and of eleven steps: two blocks of seven layers
    assert seen["Head"] == seen["Trunk"] == 12


# ---- fewer calls ----------------------------------------------------------------------------------------------------


def test_weights_are_prepared_from_sixteen_tokens_on(monkeypatch):
    """A head of bf16 is brought to fp32 once, even where no product is large enough to be packed."""
    monkeypatch.setattr(products, "SMALLEST", 10**12)
    for dtype in (torch.float32, torch.bfloat16):
        model = lm(dtype=dtype)
        for steps in (15, 16):
            made = prepared(model, 1, steps)
            assert type(made.trunk.blocks[0].mlp.up).__name__ == "Linear"
            assert type(made.trunk.blocks[0].attn.out).__name__ == "Linear"
            if dtype == torch.bfloat16 and steps == 16:
                wide = made.head.keywords["weight"]
                assert_close(wide, model.head.weight.float(), exact)
                assert wide.dtype == torch.float32
            else:
                assert type(made.head).__name__ == "Head"


@pytest.mark.parametrize(("smallest", "on_gpu"), [(1, False), (10**12, False), (10**12, True)])
def test_under_autocast_weights_are_rounded_once(monkeypatch, smallest, on_gpu):
    """Whether packed or not: a step casts no weight, and multiplies what the model itself would multiply."""
    monkeypatch.setattr(products, "SMALLEST", smallest)
    monkeypatch.setattr(products, "LOGITS_BY_FP32", ("meta" if on_gpu else "cpu",))
    model = make("gpt2", torch.float32)
    x = torch.randn(3, 1, model.config.d_model, generator=torch.Generator().manual_seed(0))
    block, packs, pack = model.trunk.blocks[0], [], products.packed

    def packed(*a):
        ready = pack(*a)
        return ready and (lambda x: (packs.append(x), ready(x))[1])

    monkeypatch.setattr(prepared_module, "packed", packed)
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16, cache_enabled=False):
        made = prepared(model, 3, 16)
        inner = made.trunk.blocks[0]
        assert_close(made.head(x), model.head(x), fp32)
        assert_close(inner.attn.qkv(x), block.attn.qkv(x), exact if smallest > 1 else bf16)
        assert_close(inner.mlp(x), block.mlp(x), exact if smallest > 1 else bf16)
        with Largest() as seen:
            inner.attn.qkv(x), inner.mlp(x)
    assert seen.numel <= x.numel() * 4  # (3, 1, 4C) activations, no (C, 4C) weight
    assert len(packs) == (1 + 2 * 3 if smallest == 1 and torch.backends.mkldnn.is_available() else 0)


@pytest.mark.parametrize("family", ["gpt2", "llama"])
@pytest.mark.parametrize("by", ["function", "module"])
def test_another_activation_is_sampled_from(monkeypatch, family, by):
    """Whoever puts one of his own into the model, as a function or as a module, has it in packed layers too."""
    monkeypatch.setattr(products, "SMALLEST", 1)
    model = make(family, torch.float32)
    mlp, x = model.trunk.blocks[0].mlp, torch.randn(3, 1, model.config.d_model)
    before = prepared(model, 3, 16).trunk.blocks[0].mlp(x)
    mlp.act = torch.sin if by == "function" else nn.Mish()
    made = prepared(model, 3, 16).trunk.blocks[0].mlp
    assert (made.ready is not None) == products._enabled()
    assert_close(made(x), mlp(x), fp32)
    assert not torch.allclose(mlp(x), before, rtol=0.1)


class Unhashable:
    __hash__ = None

    def __call__(self, x):
        return x.sin()


@pytest.mark.parametrize("by_mkl", [False, True])
def test_an_activation_that_cannot_be_a_key(monkeypatch, by_mkl):
    monkeypatch.setattr(products, "SMALLEST", 1)
    monkeypatch.setattr(products, "BY_MKL", by_mkl and torch.backends.mkl.is_available())
    mlp, x = make("gpt2", torch.float32), torch.randn(3, 1, 12)
    mlp.trunk.blocks[0].mlp.act = Unhashable()
    assert_close(prepared(mlp, 3, 16).trunk.blocks[0].mlp(x), mlp.trunk.blocks[0].mlp(x), fp32)


@pytest.mark.parametrize("without", ["q", "k", "v"])
def test_layers_with_and_without_bias_are_no_one_product(monkeypatch, without):
    monkeypatch.setattr(products, "SMALLEST", 1)
    model = make("opt", torch.float32)
    attn = model.trunk.blocks[0].attn
    with torch.no_grad():
        for layer in (attn.q, attn.k, attn.v):
            layer.bias.normal_()
    getattr(attn, without).bias = None
    ids = tokens(3, 4)
    assert_close(prepared(model, 12, 16).hidden(ids), model.hidden(ids), fp32)


@pytest.mark.parametrize("family", ["gpt2", "bloom", "llama"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("autocast", [False, True])
def test_prepared_weights_are_the_plain_ones(monkeypatch, family, dtype, autocast):
    """The fast path against its plain twin: with weights in another layout, and without."""
    groups = 2 if family == "llama" else 4
    config = ModelConfig(
        family=family, vocab_size=96, n_layer=2, n_head=4, n_kv_head=groups, d_model=128, max_seq_len=64
    )
    model = CausalLM(config, rng=torch.Generator().manual_seed(0)).to(dtype)
    ids = torch.randint(1, 96, (6, 9), generator=torch.Generator().manual_seed(1))
    results, packed = [], []
    for steps in (1, 10**9):
        monkeypatch.setattr(prepared_module, "WORTH_PREPARING", steps)
        monkeypatch.setattr(products, "SMALLEST", 1 if steps == 1 else 10**12)
        real = prepared_module.packed
        monkeypatch.setattr(prepared_module, "packed", lambda *a, real=real: (packed.append(a), real(*a))[1])
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            results.append(generate(model, ids, max_new_tokens=20, eos_token_id=0, pad_token_id=0,
                                    rng=torch.Generator().manual_seed(2)))  # fmt: skip
        monkeypatch.undo()
    fewer = 2 * (config.qkv == "split") + config.gated  # q, k and v are one product, gate and up another
    assert len(packed) == sum(isinstance(m, Linear) for m in model.modules()) - config.n_layer * fewer
    fast, plain = results
    if dtype == torch.float32 and not autocast:
        assert torch.equal(fast.tokens, plain.tokens)
        assert_close(fast.logprobs, plain.logprobs, fp32)
    else:  # rounding to bf16 may turn a draw; the first tokens come from the same forward but for it
        assert_close(fast.logprobs[:, 0].exp(), plain.logprobs[:, 0].exp(), bf16)


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_prepared_weights_under_an_adapter(monkeypatch, family):
    """What an adapter adds to a product is added before the nonlinearity, prepared or not."""
    config = ModelConfig(family=family, vocab_size=96, n_layer=2, n_head=4, d_model=128, max_seq_len=64)
    model = CausalLM(config, rng=torch.Generator().manual_seed(0))
    ids = torch.randint(1, 96, (6, 9), generator=torch.Generator().manual_seed(1))
    add_adapter(model, "a", LoRAConfig(r=4, alpha=8.0), rng=torch.Generator().manual_seed(3))
    with torch.no_grad():
        for p in adapter_parameters(model, "a").values():
            p.add_(0.05)
    monkeypatch.setattr(prepared_module, "WORTH_PREPARING", 1)
    monkeypatch.setattr(products, "SMALLEST", 1)
    with use_adapter(model, "a"):
        made = generate(model, ids, max_new_tokens=20, eos_token_id=None, pad_token_id=0,
                        rng=torch.Generator().manual_seed(2))  # fmt: skip
        whole = model(torch.cat([ids, made.tokens], 1))[:, 8:-1].log_softmax(-1)  # (6, 20, V)
        base = model(torch.cat([ids, made.tokens], 1)).argmax(-1)
    assert_close(made.logprobs, whole.gather(2, made.tokens[..., None])[..., 0], fp32)
    assert not torch.equal(base, model(torch.cat([ids, made.tokens], 1)).argmax(-1))


@pytest.mark.parametrize(
    ("family", "layer"), [("gpt2", "mlp.up"), ("llama", "mlp.gate"), ("llama", "mlp.up"), ("llama", "attn.k")]
)
def test_hooks_and_layers_of_others_are_called(monkeypatch, family, layer):
    """What is one call without them is not with them: a layer and its activation, or q, k and v."""
    monkeypatch.setattr(prepared_module, "WORTH_PREPARING", 1)
    monkeypatch.setattr(products, "SMALLEST", 1)
    model, called = lm(family, torch.float32), Counter()
    places = [f"trunk.blocks.{i}.{layer}" for i in (0, 1)]
    one, two = (model.get_submodule(place) for place in places)
    part, child = layer.split(".")
    for block in prepared(model, 16, 16).trunk.blocks:
        made = getattr(block, part)
        assert made.ready is not None
        assert type(getattr(made, child)).__name__ == "Linear"  # its work is done, it is not prepared by itself
    one.register_forward_pre_hook(lambda *a: called.update(["before"]))
    two.register_forward_hook(lambda *a: called.update(["after"]))
    run(model, PROMPTS, rng=streams(5), eos_token_id=None)
    assert called == {"before": 12, "after": 12}
    other = torch.nn.Linear(*one.weight.T.shape, bias=one.bias is not None)
    other.load_state_dict(one.state_dict())
    other.register_forward_hook(lambda *a: called.update(["other"]))
    model.set_submodule(places[0], other)
    assert_close(
        run(model, PROMPTS, rng=streams(5)).logprobs,
        run(lm(family, torch.float32), PROMPTS, rng=streams(5)).logprobs,
        fp32,
    )
    assert called["other"]


def test_a_hook_may_be_any_object_that_can_be_called():
    class Watch(list):  # not hashable
        def __call__(self, module, args, output):
            self.append(output)

    model, watch = lm("gpt2"), Watch()
    model.trunk.blocks[1].register_forward_hook(watch)
    run(model, PROMPTS, rng=streams(5), eos_token_id=None, max_new_tokens=4)
    assert len(watch) == 4


def norm_of(kind, size, dtype=torch.float32):
    """A norm with weights and biases of all sizes."""
    norm, rng = Norm(kind, size, 1e-6).to(dtype), torch.Generator().manual_seed(1)
    for p in norm.parameters():
        p.data.normal_(generator=rng)
    return norm


def normed(norm, x):
    """w (x - mean x) / √(mean (x - mean x)² + ε) + b in fp64, for RMSNorm without mean and b."""
    x = x.double() if norm.bias is None else x.double() - x.double().mean(-1, keepdim=True)
    y = norm.weight.double() * x / (x.square().mean(-1, keepdim=True) + norm.eps).sqrt()
    return (y if norm.bias is None else y + norm.bias.double()).detach()


@pytest.mark.parametrize("size", [1, 7, 256])
@pytest.mark.parametrize("scale", [0.0, 1e-5, 1e-3, 1.0, 1e6])
def test_rms_norm_in_fewer_calls(size, scale):
    """√C w x / √(|x|² + Cε), also where ε decides, and for nothing but zeros."""
    norm, x = norm_of("rms", size), torch.randn(3, 2, size, generator=torch.Generator().manual_seed(0)) * scale
    with torch.inference_mode():
        made = prepared_module._norm(norm)(x)
    assert_close(made.double(), normed(norm, x), {"rtol": 5e-7, "atol": 0.0})


def test_norms_stay_what_they_are_elsewhere():
    for kind in ("rms", "layer"):
        assert prepared_module._norm(Norm(kind, 4, 1e-6).to("meta")) is None


@pytest.mark.parametrize("kind", ["rms", "layer"])
@pytest.mark.parametrize("weights", [torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("inputs", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("autocast", [False, True])
def test_norms_are_as_wide_in_fewer_calls(kind, weights, inputs, autocast):
    """Computed in the wider of fp32, weights and inputs, given back as the inputs are."""
    norm = norm_of(kind, 200, weights)
    x = torch.randn(5, 200, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * 1e-3  # as large as √ε
    x = x.to(inputs)
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        made = prepared_module._norm(norm)(x)
    truth = normed(norm, x)
    assert made.dtype == inputs
    if inputs.itemsize == 2:  # rounded once
        assert (made == truth.to(inputs)).double().mean() > 0.99
    else:
        assert_close(made, truth.to(inputs), fp64 if weights == inputs == torch.float64 else fp32)


def test_layer_norm_of_bf16_is_one_call(monkeypatch):
    """torch widens within it; a copy of x in fp32 before and one back would take longer than the norm."""
    seen, layer_norm = [], torch.layer_norm
    monkeypatch.setattr(torch, "layer_norm", lambda x, *rest: (seen.append(x.dtype), layer_norm(x, *rest))[1])
    for weights in (torch.bfloat16, torch.float32):
        prepared_module._norm(norm_of("layer", 8, weights))(torch.ones(2, 8, dtype=torch.bfloat16))
    assert seen == [torch.bfloat16] * 2


def test_norms_of_queries_and_keys(monkeypatch):
    monkeypatch.setattr(prepared_module, "WORTH_PREPARING", 1)
    model = make("qwen3", torch.float32)
    made = generate(model, tokens(3, 4), max_new_tokens=8, eos_token_id=None, pad_token_id=0)
    whole = model(torch.cat([tokens(3, 4), made.tokens], 1))[:, 3:-1].log_softmax(-1)
    assert_close(made.logprobs, whole.gather(2, made.tokens[..., None])[..., 0], fp32)
