"""Adapters against dense weights, by hand, and against the base they must leave alone."""

import copy
from dataclasses import replace

import pytest
import torch
from tolerance import assert_close, exact, fp32, fp64
from torch.nn import functional as F

from minirlhf.errors import UsageError
from minirlhf.generate import generate
from minirlhf.heads import RewardModel, ValueModel
from minirlhf.lora import (
    LoRAConfig,
    LowRank,
    adapter_parameters,
    adapter_view,
    adapters,
    add_adapter,
    copy_adapter,
    get_adapter,
    merge_adapter,
    remove_adapter,
    target_modules,
    use_adapter,
)
from minirlhf.model import CausalLM, ModelConfig, logit_factors
from minirlhf.rng import generator
from minirlhf.rollout import IGNORE, Rollout, policy_stats, state_values, target_stats

IDS = torch.tensor([[3, 1, 4, 1, 5, 9, 2, 6], [2, 7, 1, 8, 2, 8, 1, 8]])
MASK = torch.tensor([[False, False, True, True, True, True, True, True], [True] * 8])
CONFIG = LoRAConfig(r=3, alpha=6.0)


def lm(family="gpt2", seed=0, **sizes):
    sizes = {"vocab_size": 23, "n_layer": 2, "n_head": 4, "d_model": 16, "max_seq_len": 32} | sizes
    return CausalLM(ModelConfig(family=family, **sizes), rng=generator(seed, "weights")).eval()


def stir(model, name, seed=1, size=0.1):
    """Random A and B (and head), as after training."""
    rng = generator(seed, "stir")
    with torch.no_grad():
        for p in adapter_parameters(model, name).values():
            p.copy_(torch.randn(p.shape, generator=rng, dtype=p.dtype) * size)


def dense(model, name):
    """The same model with W + (α/r) B A written out, entry by entry of the file names."""
    twin = copy.deepcopy(model)
    found = {key.removeprefix(f"adapters.{name}.layers."): p for key, p in adapter_parameters(model, name).items()}
    with torch.no_grad():
        for key in [k.removesuffix(".A") for k in found if k.endswith(".A")]:
            update = torch.einsum("or,ri->oi", found[key + ".B"].double(), found[key + ".A"].double()) * 2.0  # 6 / 3
            weight = twin.get_submodule(key.replace("/", ".")).weight
            weight.copy_(weight.double() + update)
        if "score.module.weight" in found:
            twin.score.weight.copy_(found["score.module.weight"])
    return twin


# ---- numbers --------------------------------------------------------------------------------------------------------


def test_update_by_hand():
    # W = I, A = (1 2), B = (3 4)ᵀ, α = 2, r = 1: W + 2·B·A = [[1+6, 12], [8, 1+16]]
    layer = LowRank(torch.tensor([[1.0, 2.0]]), torch.tensor([[3.0], [4.0]]), LoRAConfig(r=1, alpha=2.0))
    expected = [[7.0, 12.0], [8.0, 17.0]]
    assert_close(layer.merged(torch.eye(2)), expected, exact)
    rows = layer(torch.eye(2), torch.eye(2))  # row i = W' e_i = column i of W'
    assert_close(rows.T, expected, exact)


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_an_adapter_of_the_head(family):
    """Its logits, its log-probs and their gradients are those of W + BA; the embedding, tied or not, stays as it is."""
    model = lm(family, tied=family == "gpt2").double()
    add_adapter(model, "a", replace(CONFIG, targets=("lm_head",)))
    assert list(get_adapter(model, "a").by_path()) == ["head"]
    stir(model, "a", size=0.5)
    twin, update = copy.deepcopy(model), adapter_parameters(model, "a")
    B, A = (next(p for name, p in update.items() if name.endswith(end)) for end in (".B", ".A"))
    W = (model.head.weight + 2.0 * B @ A).detach().requires_grad_()  # 6 / 3
    with torch.no_grad():
        expected = model.hidden(IDS, MASK) @ W.T
    view = adapter_view(model, "a")
    assert_close(view(IDS, MASK)[MASK], expected[MASK], fp64)
    with use_adapter(twin, None):
        assert (twin(IDS, MASK) - expected)[MASK].abs().max() > 0.1
    targets = torch.where(MASK, IDS, IGNORE)[:, 1:]
    target_stats(view, IDS, MASK, targets)["logprobs"].sum().backward()
    logp = (model.hidden(IDS, MASK).detach() @ W.T).log_softmax(-1)[:, :-1]
    logp.gather(-1, IDS[:, 1:, None])[..., 0][MASK[:, 1:]].sum().backward()
    assert_close(B.grad, 2.0 * W.grad @ A.T, fp64)
    assert_close(A.grad, 2.0 * B.T @ W.grad, fp64)
    if model.config.tied:
        with pytest.raises(UsageError, match="which is the embedding too"):
            merge_adapter(model, "a")
    else:
        merge_adapter(model, "a")
        assert_close(model(IDS, MASK)[MASK], expected[MASK], fp64)


def test_under_autocast_the_head_s_adapter_is_exact():
    """Sampling calls the head, log-probs take its weight: both in fp32."""
    model = lm()
    add_adapter(model, "a", replace(CONFIG, targets=("lm_head",)))
    stir(model, "a")
    hidden = torch.randn(5, 16)
    with use_adapter(model, "a"), torch.no_grad():
        expected = hidden @ logit_factors(model.head, hidden)[1].T
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.equal(logit_factors(model.head, hidden)[1], model.head.weight + 2.0 * dense_update(model, "a"))
            assert_close(model.head(hidden), expected, fp32)


def dense_update(model, name):
    layer = get_adapter(model, name).by_path()["head"]
    with torch.autocast("cpu", enabled=False):
        return layer.B @ layer.A


def test_an_adapter_of_the_head_alone_is_nothing_to_a_value_model():
    model = lm()
    add_adapter(model, "a", replace(CONFIG, targets=("lm_head",)))
    with pytest.raises(UsageError, match="changes the head alone"):
        copy_adapter(model, "a", "b", to=ValueModel(model.trunk))


def test_a_copy_for_a_model_without_a_head_leaves_it_behind():
    model = lm()
    add_adapter(model, "a", replace(CONFIG, targets=("c_attn", "lm_head")))
    value = ValueModel(model.trunk)
    copy_adapter(model, "a", "b", to=value)
    assert sorted(get_adapter(value, "b").by_path()) == sorted([*target_modules(value, ("c_attn",)), "score"])
    assert sorted(target_modules(value, get_adapter(value, "b").config.targets)) == sorted(
        target_modules(value, ("c_attn",))
    )


def test_scale():
    assert LoRAConfig(r=4, alpha=8).scale == 2.0
    assert LoRAConfig(r=4, alpha=8, rslora=True).scale == 4.0  # 8 / √4


GPT2 = {"family": "gpt2", "vocab_size": 9, "n_layer": 12, "n_head": 12, "d_model": 768}
BLOOM = {"family": "bloom", "vocab_size": 9, "n_layer": 24, "n_head": 16, "d_model": 1024}
LLAMA = {"family": "llama", "vocab_size": 9, "n_layer": 32, "n_head": 32, "d_model": 4096}


@pytest.mark.parametrize(
    ("config", "targets", "r", "count"),
    [
        (GPT2, ("c_attn",), 8, 294_912),  # 124M: 12·8·(768 + 2304)
        (GPT2, "all-linear", 8, 1_179_648),  # + 12·8·(768 + 768) + 2·12·8·(768 + 3072)
        (BLOOM, ("query_key_value",), 8, 786_432),  # 560m: 24·8·(1024 + 3072)
        (BLOOM, "all-linear", 8, 3_145_728),
        (LLAMA, ("q_proj", "v_proj"), 4, 2_097_152),  # 7B: 32·2·4·(4096 + 4096)
    ],
)
def test_parameter_counts(config, targets, r, count):
    with torch.device("meta"):
        model = CausalLM(ModelConfig(**config))
        add_adapter(model, "a", LoRAConfig(r=r, alpha=16, targets=targets))
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == count


def test_initial_values():
    model = lm(d_model=64)
    add_adapter(model, "a", LoRAConfig(r=8, alpha=8, targets=("mlp.c_proj",)), rng=generator(5, "adapter"))
    for key, p in adapter_parameters(model, "a").items():
        if key.endswith(".B"):
            assert not p.any()
        else:
            assert p.shape == (8, 256)
            assert p.abs().max() <= 1 / 16  # 1 / √256
            assert p.std().item() == pytest.approx(1 / 16 / 3**0.5, rel=0.05)  # of a uniform distribution
    other = lm(d_model=64)
    add_adapter(other, "a", LoRAConfig(r=8, alpha=8, targets=("mlp.c_proj",)), rng=generator(5, "adapter"))
    for a, b in zip(adapter_parameters(model, "a").values(), adapter_parameters(other, "a").values(), strict=True):
        assert_close(a, b, exact)


@pytest.mark.parametrize("family", ["gpt2", "bloom", "opt", "llama", "mistral", "qwen2", "qwen3", "gpt_neox"])
def test_equals_dense_weights(family):
    model = lm(family)
    base = model(IDS, MASK)
    add_adapter(model, "a", CONFIG)
    with use_adapter(model, "a"):
        assert torch.equal(model(IDS, MASK), base)  # B = 0
    stir(model, "a")
    with use_adapter(model, "a"):
        adapted = model(IDS, MASK)
    assert (adapted - base).abs().max() > 0.01
    assert_close(adapted, dense(model, "a")(IDS, MASK), fp32)
    assert torch.equal(model(IDS, MASK), base)


@pytest.mark.parametrize("kind", [RewardModel, ValueModel])
def test_scalar_models(kind):
    model = kind(ModelConfig(vocab_size=23, d_model=16, max_seq_len=32), rng=generator(0, "weights"))
    base = model(IDS, MASK)
    add_adapter(model, "a", CONFIG)
    with use_adapter(model, "a"):
        assert torch.equal(model(IDS, MASK), base)
    stir(model, "a")
    expected = dense(model, "a")(IDS, MASK)
    with use_adapter(model, "a"):
        assert_close(model(IDS, MASK), expected, fp32)
    assert torch.equal(model(IDS, MASK), base)


def test_gradients_equal_those_of_the_dense_weight():
    # W' = W + s B A, G = ∂L/∂W': ∂L/∂A = s Bᵀ G and ∂L/∂B = s G Aᵀ
    model = lm()
    add_adapter(model, "a", LoRAConfig(r=3, alpha=6, targets=("c_attn",)))
    stir(model, "a")
    twin = dense(model, "a").requires_grad_(True)
    F.cross_entropy(twin(IDS)[:, :-1].flatten(0, 1), IDS[:, 1:].flatten()).backward()
    with use_adapter(model, "a"):
        F.cross_entropy(model(IDS)[:, :-1].flatten(0, 1), IDS[:, 1:].flatten()).backward()
    for i in (0, 1):
        layer = model.adapters["a"].layers[f"trunk/blocks/{i}/attn/qkv"]
        G = twin.trunk.blocks[i].attn.qkv.weight.grad
        assert_close(layer.A.grad, 2.0 * layer.B.T @ G, fp32)
        assert_close(layer.B.grad, 2.0 * G @ layer.A.T, fp32)


# ---- one active at a time -------------------------------------------------------------------------------------------


def test_nesting_and_exceptions():
    model = lm()
    base = model(IDS)
    for i, name in enumerate(("a", "b")):
        add_adapter(model, name, LoRAConfig(r=2, alpha=2, targets=("c_attn",) if i else "all-linear"))
        stir(model, name, seed=i)
    alone = {}
    for name in ("a", "b"):
        with use_adapter(model, name):
            alone[name] = model(IDS)
    assert not torch.equal(alone["a"], alone["b"])
    with use_adapter(model, "a"):
        with use_adapter(model, "b"):
            assert torch.equal(model(IDS), alone["b"])
            with use_adapter(model, None):
                assert torch.equal(model(IDS), base)
        with pytest.raises(RuntimeError, match="boom"), use_adapter(model, "b"):
            raise RuntimeError("boom")
        assert torch.equal(model(IDS), alone["a"])
    assert torch.equal(model(IDS), base)


def test_unknown_name():
    model = lm()
    with pytest.raises(UsageError, match="'a' is unknown; this model has: none"):
        use_adapter(model, "a")
    add_adapter(model, "policy", CONFIG)
    for call in (use_adapter, remove_adapter, merge_adapter, adapter_parameters, adapter_view):
        with pytest.raises(ValueError, match="'polcy' is unknown; this model has: policy"):
            call(model, "polcy")


def test_names_taken_or_unusable():
    model = lm()
    add_adapter(model, "a", CONFIG)
    with pytest.raises(UsageError, match="exists already"):
        add_adapter(model, "a", CONFIG)
    for name in ("", "a.b", "values", "train"):
        with pytest.raises(UsageError, match="cannot be used"):
            add_adapter(model, name, CONFIG)
    assert list(adapters(model)) == ["a"]


def test_only_the_adapter_is_trained():
    model = lm().train()
    before = {name: p.clone() for name, p in model.named_parameters()}
    base = model(IDS).detach()
    add_adapter(model, "a", CONFIG)
    add_adapter(model, "idle", CONFIG)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.1)
    for _ in range(3):
        with use_adapter(model, "a"):
            loss = F.cross_entropy(model(IDS)[:, :-1].flatten(0, 1), IDS[:, 1:].flatten())
        loss.backward()
        optimizer.step()
    for name, p in before.items():
        assert torch.equal(p, model.get_parameter(name))
    assert all(p.grad is None for p in adapter_parameters(model, "idle").values())
    assert torch.equal(model(IDS), base)
    with use_adapter(model, "a"):
        assert not torch.equal(model(IDS), base)


def test_dropout_only_in_training_mode():
    model = lm()
    add_adapter(model, "a", LoRAConfig(r=3, alpha=6, dropout=0.5))
    stir(model, "a")
    with use_adapter(model, "a"):
        state = torch.get_rng_state()
        assert torch.equal(model(IDS), model(IDS))
        assert torch.equal(torch.get_rng_state(), state)
        model.train()
        torch.manual_seed(1)
        first = model(IDS)
        assert not torch.equal(model(IDS), first)
        torch.manual_seed(1)
        assert torch.equal(model(IDS), first)
    # dropout keeps the mean: x → A with x = 1 and many rows
    layer = LowRank(torch.ones(1, 1000), torch.ones(1, 1), LoRAConfig(r=1, alpha=1, dropout=0.25)).train()
    assert layer(torch.ones(200, 1000), torch.zeros(200, 1)).mean().item() == pytest.approx(1000, rel=0.01)


def test_dtypes():
    model = lm().to(torch.bfloat16)
    base = model(IDS)
    add_adapter(model, "a", CONFIG)
    assert {p.dtype for p in adapter_parameters(model, "a").values()} == {torch.float32}
    with use_adapter(model, "a"):
        assert torch.equal(model(IDS), base)
        stir(model, "a")
        assert model.hidden(IDS).dtype == torch.bfloat16
    wide = lm().double()
    add_adapter(wide, "a", CONFIG)
    stir(wide, "a")
    assert {p.dtype for p in adapter_parameters(wide, "a").values()} == {torch.float64}
    expected = dense(wide, "a")(IDS)
    with use_adapter(wide, "a"):
        assert_close(wide(IDS), expected, fp64)
    mixed = lm()
    add_adapter(mixed, "a", CONFIG)
    stir(mixed, "a")
    with use_adapter(mixed, "a"), torch.autocast("cpu", torch.bfloat16):
        assert mixed.trunk.blocks[0].attn.qkv(torch.ones(1, 16)).dtype == torch.bfloat16
        mixed(IDS).sum().backward()
    assert {p.grad.dtype for p in adapter_parameters(mixed, "a").values()} == {torch.float32}


# ---- targets --------------------------------------------------------------------------------------------------------


def test_targets():
    model = lm()
    blocks = [f"trunk.blocks.{i}." for i in (0, 1)]
    assert [*target_modules(model, ("c_proj",))] == [b + m for b in blocks for m in ("attn.out", "mlp.down")]
    assert [*target_modules(model, ("mlp.c_proj",))] == [b + "mlp.down" for b in blocks]
    assert [*target_modules(model, ("transformer.h.1.attn.c_attn",))] == [blocks[1] + "attn.qkv"]
    assert [*target_modules(model, r"transformer\.h\.0\..*c_(attn|fc)")] == [
        blocks[0] + m for m in ("attn.qkv", "mlp.up")
    ]
    everything = [b + m for b in blocks for m in ("attn.qkv", "attn.out", "mlp.up", "mlp.down")]
    for targets in ("all-linear", ("all-linear",), ["All-Linear"], ("c_attn", "all-linear")):
        assert [*target_modules(model, LoRAConfig(r=1, alpha=1, targets=targets).targets)] == everything
    llama = target_modules(lm("llama", n_layer=1), ("q_proj", "down_proj"))
    assert llama == {
        "trunk.blocks.0.attn.q": "model.layers.0.self_attn.q_proj",
        "trunk.blocks.0.mlp.down": "model.layers.0.mlp.down_proj",
    }
    neox = target_modules(lm("gpt_neox", n_layer=1), ("dense",))  # not dense_h_to_4h: an entry begins after a dot
    assert [*neox.values()] == ["gpt_neox.layers.0.attention.dense"]


@pytest.mark.parametrize(
    ("targets", "message"),
    [
        (("q_prj",), "'q_prj' matches no module of this model; nearest: .*q_proj"),
        (("q_proj", "zzz"), "'zzz' matches no module of this model; nearest: .*down_proj, gate_proj"),
        (r"model\.layers\.7\..*", "matches no module"),
        ("q_proj", "'q_proj' matches no module"),  # a string is a pattern for the whole path
        ("(", "no regular expression"),
        (("embed_tokens",), "matches model.embed_tokens, which can have no"),
        (r".*norm", "matches model.*norm, which can have no"),
    ],
)
def test_targets_refused(targets, message):
    model = lm("llama")
    with pytest.raises(UsageError, match=message):
        add_adapter(model, "a", LoRAConfig(r=2, alpha=2, targets=targets))
    assert not adapters(model)
    assert all(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"r": 0}, "lora.r must be"),
        ({"r": True}, "lora.r must be"),
        ({"r": 2.0}, "lora.r must be"),
        ({"alpha": float("nan")}, "lora.alpha must be"),
        ({"alpha": 10**400}, "lora.alpha must be"),
        ({"alpha": 1e300}, "lora.alpha must be"),  # beyond fp32
        ({"dropout": 1.0}, "lora.dropout must be"),
        ({"dropout": -0.1}, "lora.dropout must be"),
        ({"rslora": 1}, "lora.rslora must be"),
        ({"targets": ()}, "lora.targets must"),
        ({"targets": ("",)}, "lora.targets must"),
        ({"targets": 5}, "lora.targets must"),
    ],
)
def test_config_refused(change, message):
    with pytest.raises(UsageError, match=message):
        LoRAConfig(**({"r": 2, "alpha": 2.0} | change))


# ---- merge, copy, remove --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [CausalLM, RewardModel])
def test_merge(kind):
    model = kind(ModelConfig(vocab_size=23, d_model=16, max_seq_len=32), rng=generator(0, "weights"))
    add_adapter(model, "a", CONFIG)
    stir(model, "a")
    with use_adapter(model, "a"):
        before = model(IDS)
    error = merge_adapter(model, "a", probe=IDS)
    assert_close(model(IDS), before, fp32)
    assert error.weights == 0.0
    assert error.outputs == (model(IDS) - before).abs().max()
    assert not adapters(model)


def test_merge_into_bf16_reports_what_is_lost():
    model = lm().to(torch.bfloat16)
    with torch.no_grad():
        for p in model.parameters():
            p.fill_(1.0)
    add_adapter(model, "a", LoRAConfig(r=1, alpha=1, targets=("c_attn",)))
    with torch.no_grad():
        for p in adapter_parameters(model, "a").values():
            p.fill_(0.03125)
    # 1 + 2⁻¹⁰ between bf16's 1 and 1 + 2⁻⁷: the whole update is lost
    assert merge_adapter(model, "a") == (2**-10, None)
    assert (model.trunk.blocks[0].attn.qkv.weight == 1).all()


def test_merge_and_remove_refuse_an_adapter_in_use():
    model = lm()
    add_adapter(model, "a", CONFIG)
    for call in (merge_adapter, remove_adapter):
        with use_adapter(model, "a"), pytest.raises(UsageError, match="in use"):
            call(model, "a")
        with pytest.raises(UsageError, match="in use"):
            call(adapter_view(model, "a"), "a")
    remove_adapter(model, "a")
    assert not adapters(model)


def test_copy_is_independent():
    model = lm()
    add_adapter(model, "a", CONFIG)
    stir(model, "a")
    copy_adapter(model, "a", "b")
    outputs = []
    for name in ("a", "b"):
        with use_adapter(model, name):
            outputs.append(model(IDS))
    assert torch.equal(*outputs)
    stir(model, "a", seed=9)
    with use_adapter(model, "b"):
        assert torch.equal(model(IDS), outputs[1])


# ---- four roles on one base -----------------------------------------------------------------------------------------


def four_roles(family="gpt2", dropout=0.0):
    """Policy, reference, reward and value model as adapters on one trunk, each stirred differently."""
    base = lm(family)
    config = LoRAConfig(r=3, alpha=6.0, dropout=dropout)
    reward, value = RewardModel(base.trunk, rng=generator(1, "r")), ValueModel(base.trunk, rng=generator(1, "v"))
    owners = {"policy": base, "reference": base, "reward": reward, "value": value}
    for i, (name, model) in enumerate(owners.items()):
        add_adapter(model, name, config)
        stir(model, name, seed=i, size=0.2)
    return owners, {name: adapter_view(model, name) for name, model in owners.items()}


def storages(models):
    return {p.untyped_storage().data_ptr(): p.untyped_storage().nbytes() for m in models for p in m.parameters()}


@pytest.mark.parametrize("family", ["gpt2", "bloom", "llama"])
def test_one_copy_of_the_base(family):
    plain = sum(storages([lm(family)]).values())
    owners, views = four_roles(family)
    own = sum(p.numel() * 4 for name, model in owners.items() for p in adapter_parameters(model, name).values())
    heads = 2 * 16 * 4  # the untrained score heads that reward and value model brought along
    assert sum(storages([*owners.values(), *views.values()]).values()) == plain + own + heads
    for name, view in views.items():
        trained = {key for key, p in view.named_parameters() if p.requires_grad}
        assert trained == set(adapter_parameters(view, name))
        for key, p in adapter_parameters(view, name).items():
            assert p is adapter_parameters(owners[name], name)[key]
    if family != "llama":
        assert views["policy"].head.weight is views["policy"].trunk.embed.weight


def test_views_compute_what_use_adapter_computes():
    owners, views = four_roles()
    for name, model in owners.items():
        with use_adapter(model, name):
            expected = model(IDS, MASK)
        for other in owners:  # whatever else is active
            with use_adapter(owners[other], other):
                assert torch.equal(views[name](IDS, MASK), expected)
    base = adapter_view(owners["policy"], None)
    with use_adapter(owners["policy"], None):
        assert torch.equal(base(IDS), owners["policy"](IDS))
    assert not list(adapters(base))
    view = views["policy"]
    expected = view(IDS)
    with use_adapter(view, None):
        assert torch.equal(view(IDS), base(IDS))
    assert torch.equal(view(IDS), expected)


def test_models_over_one_trunk_take_turns():
    owners, views = four_roles()
    with use_adapter(owners["policy"], "policy"), use_adapter(owners["value"], "value"):
        assert torch.equal(owners["value"](IDS), views["value"](IDS))  # not both adapters on top of each other
    assert torch.equal(owners["policy"](IDS), lm()(IDS))


def rollout():
    prompt, response = IDS[:, :3], IDS[:, 3:]
    keep = torch.tensor([[True] * 5, [True] * 3 + [False] * 2])
    zeros = torch.zeros(2, 5)
    prompt_mask = torch.tensor([[False, True, True], [True] * 3])
    return Rollout(prompt, prompt_mask, response, keep, zeros, zeros, zeros, zeros, zeros[:, 0], keep[:, 0])


@pytest.mark.parametrize("checkpointing", [False, True])
def test_interleaved_backward(checkpointing):
    part = rollout()

    def loss_of(views, name):
        view = views[name].train()
        view.trunk.checkpoint = checkpointing
        if name in ("policy", "reference"):
            return policy_stats(view, part, temperature=0.7)["logprobs"].sin().sum()
        if name == "value":
            return state_values(view, part).square().sum()
        return view(part.input_ids, part.attention_mask).sum()

    expected = {}
    for name in ("policy", "value", "reward", "reference"):  # each by itself, on a set of its own
        owners, views = four_roles()
        views[name].trunk.checkpoint = False
        loss_of(views, name).backward()
        expected[name] = {key: p.grad for key, p in adapter_parameters(owners[name], name).items()}
    owners, views = four_roles()
    losses = [loss_of(views, name) for name in expected]
    with use_adapter(owners["policy"], "reference"), torch.no_grad():
        owners["policy"](IDS)
    losses[2].backward()
    (losses[0] + losses[1] * 1.0 + losses[3]).backward()
    for name, grads in expected.items():
        for key, grad in grads.items():
            assert grad.abs().max() > 0
            assert_close(adapter_parameters(owners[name], name)[key].grad, grad, fp32)
    assert all(p.grad is None for p in owners["policy"].trunk.parameters())


def test_checkpointing_inside_use_adapter():
    model = lm().train()
    add_adapter(model, "a", CONFIG)
    stir(model, "a")
    grads = []
    for model.trunk.checkpoint in (False, True):
        model.zero_grad()
        with use_adapter(model, "a"):
            model(IDS).square().sum().backward()
        grads.append([p.grad.clone() for p in adapter_parameters(model, "a").values()])
    for plain, recomputed in zip(*grads, strict=True):
        assert_close(recomputed, plain, fp32)


def test_modes_are_independent():
    owners, views = four_roles(dropout=0.5)
    expected = views["reference"](IDS)
    views["policy"].train()
    assert not torch.equal(views["policy"](IDS), views["policy"](IDS))
    assert torch.equal(views["reference"](IDS), expected)
    assert not owners["policy"].training


def test_sampling_under_a_view():
    owners, views = four_roles()
    options = {"max_new_tokens": 4, "eos_token_id": None, "pad_token_id": 0, "temperature": 0.8}
    with use_adapter(owners["policy"], "policy"):
        expected = generate(owners["policy"], IDS, rng=generator(0, "sample"), **options)
    with use_adapter(owners["policy"], "reference"):
        made = generate(views["policy"], IDS, rng=generator(0, "sample"), **options)
    assert torch.equal(made.tokens, expected.tokens)
    assert torch.equal(made.logprobs, expected.logprobs)


def test_copies_of_a_trunk_do_not_follow_the_original():
    model = lm()
    add_adapter(model, "a", CONFIG)
    stir(model, "a")
    value = ValueModel.from_trunk(model.trunk)
    torch.nn.init.ones_(value.score.weight)
    expected = value(IDS)
    with use_adapter(model, "a"):
        assert torch.equal(value(IDS), expected)
