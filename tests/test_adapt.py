"""What a stage trains: roles on one base, critics of every kind, adapter folders that stand for models."""

import gc
import json
import shutil
from dataclasses import replace
from functools import partial

import pytest
import torch
from safetensors.torch import load_file
from tolerance import assert_close, exact, fp32

from minirlhf import review_world, stage
from minirlhf.adapt import (
    LOADED,
    TRAINED,
    adapted,
    base_folder,
    fingerprint,
    open_model,
    reward_model,
    set_dropout,
    sft_model,
    write_model,
)
from minirlhf.config import (
    LoRASection,
    ModelSection,
    PPOConfig,
    PPOSection,
    RewardSection,
    RMConfig,
    SFTConfig,
)
from minirlhf.data import left_padded
from minirlhf.errors import CheckpointError, UsageError
from minirlhf.heads import RewardModel, SharedValueModel, ValueModel
from minirlhf.lora import adapter_parameters, adapters, fill, merge_adapter
from minirlhf.model import Attention, Block, CausalLM, ModelConfig
from minirlhf.pretrained import load_causal_lm, load_reward_model, load_value_model, save_pretrained
from minirlhf.rng import generator
from minirlhf.rollout import collect, judge, state_values
from minirlhf.templates import get_template
from minirlhf.tokenizer import Tokenizer

WORDS = Tokenizer.from_words(review_world.words("en"))
PLAIN = get_template("plain")
PROMPTS = [[5, 6, 7], [8, 9], [5, 6]]
A_BYTES = 4  # of an fp32 number


def lm(seed=0, family="llama", **sizes):
    sizes = {"vocab_size": WORDS.vocab_size, "d_model": 16, "n_layer": 2, "n_head": 2, "max_seq_len": 64} | sizes
    return CausalLM(ModelConfig(family=family, **sizes), rng=generator(seed, "weights")).eval()


def stir(model, seed):
    """Random A and B (and head) in every adapter, as after training."""
    rng = generator(seed, "stir")
    with torch.no_grad():
        for name in adapters(model):
            for p in adapter_parameters(model, name).values():
                p.copy_(torch.randn(p.shape, generator=rng) * 0.2)
    return model


def section(path, **lora):
    return {"model": ModelSection(path=str(path)), "lora": LoRASection(**lora)}


@pytest.fixture
def folders(tmp_path):
    """base; sft: an adapter on it; rm: an adapter on it, started from sft's; full_rm: a reward model by itself."""
    base = lm()
    save_pretrained(base, tmp_path / "base", tokenizer=WORDS)
    made = sft_model(base, SFTConfig(**section(tmp_path / "base", r=2)))
    stage.save(tmp_path / "sft", stage.Loaded(stir(made, 1), WORDS, PLAIN))
    start = open_model(tmp_path / "sft", load_causal_lm, "cpu")
    made = reward_model(start, RMConfig(**section(tmp_path / "sft")))
    stage.save(tmp_path / "rm", stage.Loaded(stir(made, 2), WORDS, PLAIN))
    stage.save(
        tmp_path / "full_rm", stage.Loaded(RewardModel.from_causal_lm(base, rng=generator(4, "head")), WORDS, PLAIN)
    )
    return tmp_path


def config(folders, policy="sft", reward="rm", r=0, **ppo):
    return PPOConfig(
        **section(folders / policy, r=r), reward=RewardSection(path=str(folders / reward)), ppo=PPOSection(**ppo)
    )


def roll(roles, seed=0):
    ids, mask = left_padded(PROMPTS, 0, "cpu")
    return collect(
        roles, ids, mask, partition=lambda n: [torch.arange(len(n))], max_new_tokens=5, eos_token_id=1, pad_token_id=0,
        temperature=0.9, rng=generator(seed, "sample"),
    )  # fmt: skip


def parameter_storages():
    """Every storage behind a live parameter → bytes."""
    gc.collect()
    live = [x for x in gc.get_objects() if isinstance(x, torch.nn.Parameter)]
    return {p.untyped_storage().data_ptr(): p.untyped_storage().nbytes() for p in live}


def numel(parameters):
    return sum(p.numel() for p in parameters)


# ---- roles on one base ----------------------------------------------------------------------------------------------


def test_one_copy_of_the_base(folders):
    before = parameter_storages()
    roles, loaded, _ = stage.ppo_roles(config(folders))
    new = {at: n for at, n in parameter_storages().items() if at not in before}
    base = numel(lm().parameters())
    adapter = numel(adapter_parameters(roles.policy, TRAINED).values())
    heads = 4 * 16  # of the reward and the value adapter, and of the two models that brought them
    assert adapter == numel(t for t in load_file(folders / "sft/adapter_model.safetensors").values())
    assert sum(new.values()) == A_BYTES * (base + 4 * adapter + heads)  # SFT's, policy's, reward's, critic's
    assert loaded.model is roles.policy


def test_only_adapters_are_trained(folders):
    roles, _, _ = stage.ppo_roles(config(folders))
    for model in (roles.policy, roles.value_model):
        trained = {name for name, p in model.named_parameters() if p.requires_grad}
        assert trained
        assert trained == set(adapter_parameters(model, TRAINED))
    assert not any(p.requires_grad for p in roles.ref_policy.parameters())
    theirs = {p.data_ptr() for p in adapter_parameters(roles.policy, TRAINED).values()}
    assert theirs.isdisjoint(p.data_ptr() for p in roles.ref_policy.parameters())


def test_the_reference_is_the_adapter_of_sft(folders):
    roles, _, _ = stage.ppo_roles(config(folders))
    rollout = roll(roles)
    assert torch.equal(rollout.old_logprobs, rollout.ref_logprobs)  # KL at step 0 is 0
    dense = open_model(folders / "sft", load_causal_lm, "cpu")
    twin = roles._replace(policy=merged(dense), ref_policy=lm())
    assert_close(judge(rollout, [torch.arange(3)], twin, temperature=0.9).old_logprobs, rollout.ref_logprobs, fp32)
    plain = judge(rollout, [torch.arange(3)], twin, temperature=0.9).ref_logprobs  # the adapter off
    assert (plain - rollout.ref_logprobs).abs().max() > 0.01
    stir(roles.policy, 9)
    after = judge(rollout, [torch.arange(3)], roles, temperature=0.9)
    assert torch.equal(after.ref_logprobs, rollout.ref_logprobs)
    assert not torch.equal(after.old_logprobs, rollout.old_logprobs)


def merged(view):
    """The same model without adapters, from weights of its own."""
    fill(view, {})
    for name in list(adapters(view)):
        merge_adapter(view, name)
    return view


def test_the_reward_is_the_folder_by_itself(folders):
    roles, _, of_texts = stage.ppo_roles(config(folders))
    rollout = roll(roles)
    alone = open_model(folders / "rm", load_reward_model, "cpu")
    with torch.no_grad():
        assert torch.equal(rollout.scores, alone(rollout.input_ids, rollout.attention_mask))
    assert len(of_texts(["a"], ["b"])) == 1


def test_full_sft_under_adapters(folders):
    """SFT trained every weight, the reward model and PPO adapters on its folder: the reference is that folder."""
    made = reward_model(load_causal_lm(folders / "base"), RMConfig(**section(folders / "base", r=3)))
    stage.save(folders / "rm3", stage.Loaded(stir(made, 5), WORDS, PLAIN))
    roles, _, _ = stage.ppo_roles(config(folders, "base", "rm3", r=2))
    rollout = roll(roles)
    assert torch.equal(rollout.old_logprobs, rollout.ref_logprobs)
    assert roles.value_model.trunk.embed.weight is roles.policy.trunk.embed.weight
    assert {p.shape[0] for n, p in roles.value_model.named_parameters() if n.endswith(".A")} == {3}
    assert {p.shape[0] for n, p in roles.policy.named_parameters() if n.endswith(".A")} == {2}
    twin = roles._replace(policy=load_causal_lm(folders / "base"))
    assert torch.equal(judge(rollout, [torch.arange(3)], twin, temperature=0.9).old_logprobs, rollout.ref_logprobs)


def test_full_ppo_with_a_reward_adapter(folders):
    made = reward_model(load_causal_lm(folders / "base"), RMConfig(**section(folders / "base", r=3)))
    stage.save(folders / "rm3", stage.Loaded(stir(made, 5), WORDS, PLAIN))
    roles, _, _ = stage.ppo_roles(config(folders, "base", "rm3", value_init="reward_model"))
    assert all(p.requires_grad for m in (roles.policy, roles.value_model) for p in m.parameters())
    assert not list(adapters(roles.policy))
    rollout = roll(roles)
    last = rollout.attention_mask.int().cumsum(1).argmax(1)
    with torch.no_grad():
        values = roles.value_model(rollout.input_ids, rollout.attention_mask)
    assert_close(values[torch.arange(3), last], rollout.scores, fp32)  # its weights hold the adapter's


def test_a_reward_adapter_on_another_base_keeps_it(folders):
    save_pretrained(lm(7), folders / "other", tokenizer=WORDS)
    made = reward_model(load_causal_lm(folders / "other"), RMConfig(**section(folders / "other", r=3)))
    stage.save(folders / "rm3", stage.Loaded(stir(made, 5), WORDS, PLAIN))
    roles, _, _ = stage.ppo_roles(config(folders, reward="rm3"))
    rollout = roll(roles)
    alone = open_model(folders / "rm3", load_reward_model, "cpu")
    with torch.no_grad():
        assert torch.equal(rollout.scores, alone(rollout.input_ids, rollout.attention_mask))
    assert roles.value_model.trunk.embed.weight is roles.policy.trunk.embed.weight
    with pytest.raises(UsageError, match=r"ppo.value_init reward_trunk: the reward model is no adapter"):
        stage.ppo_roles(config(folders, reward="rm3", value_init="reward_trunk"))


# ---- critics --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("critic", ["auto", "separate", "shared", "lora"])
@pytest.mark.parametrize(("policy", "reward"), [("sft", "rm"), ("sft", "full_rm"), ("base", "rm"), ("base", "full_rm")])
def test_critics(folders, policy, reward, critic):
    lora = policy == "sft"
    wanted = config(folders, policy, reward, critic=critic)
    if critic == "lora" and not lora:
        with pytest.raises(UsageError, match=r"ppo.critic lora: .*set lora.r"):
            stage.ppo_roles(wanted)
        return
    roles, loaded, _ = stage.ppo_roles(wanted)
    rollout, value = roll(roles), roles.value_model
    assert not rollout.values.any()  # a zero head
    kind = {"auto": "lora" if lora else "separate"}.get(critic, critic)
    trained = {name for name, p in value.named_parameters() if p.requires_grad}
    shared_base = value.trunk.embed.weight is roles.policy.trunk.embed.weight
    assert shared_base == (kind != "separate")
    if kind == "separate":
        assert trained == set(dict(ValueModel(lm().config).named_parameters()))
    elif kind == "shared":
        assert trained == {"score.weight"}
        assert isinstance(value, SharedValueModel)
    else:
        assert all(name.startswith(f"adapters.{TRAINED}.") for name in trained)
    (state_values(value, rollout) - 1).square().sum().backward()  # the head is 0, so it alone gets a gradient
    got = {name for name, p in value.named_parameters() if p.grad is not None and p.grad.any()}
    assert len(got) == 1
    assert "score" in got.pop()
    folder = folders / "final"
    stage.save_ppo(folder, loaded, roles.value_model)
    with torch.no_grad():
        stirred_head(value).fill_(0.5)
    write_model(folder / "value_model", value)
    expected = state_values(value, rollout)
    again = open_model(folder / "value_model", load_value_model, "cpu")
    assert_close(state_values(again, rollout).detach(), expected.detach(), exact if kind != "separate" else fp32)


def stirred_head(value):
    found = [p for name, p in value.named_parameters() if "score" in name and p.requires_grad]
    assert len(found) == 1
    return found[0]


def test_a_shared_critic_trains_the_policy(folders):
    for policy in ("sft", "base"):
        roles, _, _ = stage.ppo_roles(config(folders, policy, critic="shared"))
        with torch.no_grad():
            roles.value_model.score.weight.fill_(0.5)
        state_values(roles.value_model, roll(roles)).sum().backward()
        assert any(p.grad is not None and p.grad.any() for p in roles.policy.parameters())


def test_critics_start_where_they_are_told(folders):
    for start, source in (("reward_trunk", "rm"), ("policy", "sft")):
        roles, _, _ = stage.ppo_roles(config(folders, value_init=start))
        theirs = [t for k, t in load_file(folders / source / "adapter_model.safetensors").items() if "score" not in k]
        ours = [p for k, p in adapter_parameters(roles.value_model, TRAINED).items() if "score" not in k]
        assert {t.numpy().tobytes() for t in theirs} == {p.detach().numpy().tobytes() for p in ours}
    roles, _, _ = stage.ppo_roles(config(folders, value_init="reward_model"))
    rollout = roll(roles)
    last = rollout.attention_mask.int().cumsum(1).argmax(1)
    with torch.no_grad():
        values = roles.value_model(rollout.input_ids, rollout.attention_mask)
    assert_close(values[torch.arange(3), last], rollout.scores, fp32)


@pytest.mark.parametrize("critic", ["separate", "shared", "lora"])
@pytest.mark.parametrize(("policy", "reward"), [("sft", "rm"), ("base", "full_rm")])
def test_ppo_goes_on_with_the_critic_it_left(folders, policy, reward, critic):
    if critic == "lora" and policy == "base":
        return
    roles, loaded, _ = stage.ppo_roles(config(folders, policy, reward, critic=critic))
    with torch.no_grad():
        stirred_head(roles.value_model).fill_(0.5)
    rollout = roll(roles)
    stage.save_ppo(folders / "ppo", loaded, roles.value_model)
    again, _, _ = stage.ppo_roles(config(folders, "ppo", reward, critic=critic, value_init="kept"))
    assert_close(roll(again).values, rollout.values, exact)
    assert rollout.values.abs().max() > 0.1
    trained = {name: p.requires_grad for name, p in again.value_model.named_parameters()}
    assert trained == {name: p.requires_grad for name, p in roles.value_model.named_parameters()}
    fresh, _, _ = stage.ppo_roles(config(folders, "ppo", reward, critic=critic))
    assert not roll(fresh).values.any()
    with pytest.raises(CheckpointError, match=r"only train_ppo.py leaves one"):
        stage.ppo_roles(config(folders, policy, reward, value_init="kept"))


# ---- what goes on from what -----------------------------------------------------------------------------------------


def test_the_next_stage_starts_as_a_copy(folders):
    start = open_model(folders / "sft", load_causal_lm, "cpu")
    ids = torch.tensor([[3, 4, 5, 6]])
    model = sft_model(start, SFTConfig(**section(folders / "sft")))
    assert torch.equal(model(ids), start(ids))
    stir(model, 8)
    assert not torch.equal(model(ids), start(ids))
    rm = reward_model(start, RMConfig(**section(folders / "sft", dropout=0.25))).eval()
    assert torch.equal(rm.trunk(ids), start.trunk(ids))
    assert rm.adapters[TRAINED].config.dropout == 0.25
    assert {layer.dropout for k, layer in rm.adapters[TRAINED].by_path().items() if k != "score"} == {0.25}


def test_another_rank_is_refused(folders):
    start = open_model(folders / "sft", load_causal_lm, "cpu")
    sft_model(start, SFTConfig(**section(folders / "sft", r=2)))
    with pytest.raises(UsageError, match=r"lora.r 8: .*sft is an adapter with r 2"):
        sft_model(open_model(folders / "sft", load_causal_lm, "cpu"), SFTConfig(**section(folders / "sft", r=8)))
    with pytest.raises(UsageError, match=r"lora.r 8: a new model has no base"):
        SFTConfig(lora=LoRASection(r=8)).check()


def test_settings_unlike_the_adapter_are_refused(folders):
    def train(**lora):
        start = open_model(folders / "sft", load_causal_lm, "cpu")
        return sft_model(start, SFTConfig(**section(folders / "sft", **lora)))

    train(r=2, alpha=16.0, targets=("all-linear",), dropout=0.5)
    for lora, word in (({"alpha": 8.0}, "lora.alpha 8.0: .* with alpha 16,"), ({"rslora": True}, "lora.rslora"),
                       ({"r": 2, "targets": ("q_proj",)}, "lora.targets")):  # fmt: skip
        with pytest.raises(UsageError, match=word):
            train(**lora)
    for lora in ({"alpha": 8.0}, {"dropout": 0.1}, {"rslora": True}):
        with pytest.raises(UsageError, match=r"without an adapter; give lora.r"):
            sft_model(lm(), SFTConfig(**section(folders / "base", **lora)))
    with pytest.raises(UsageError, match=r"lora.targets q_proj without lora.r"):
        SFTConfig(lora=LoRASection(targets=("q_proj",))).check()


def test_the_old_name_of_a_head_may_be_said_again(tmp_path):
    """One config for every stage, with the name that transformers 4 had for the head of gpt_neox."""
    save_pretrained(lm(family="gpt_neox"), tmp_path / "base", tokenizer=WORDS)
    targets = {"r": 2, "targets": ("query_key_value", "embed_out")}
    write_model(tmp_path / "sft", sft_model(lm(family="gpt_neox"), SFTConfig(**section(tmp_path / "base", **targets))))
    start = open_model(tmp_path / "sft", load_causal_lm, "cpu")
    assert "head" in adapters(sft_model(start, SFTConfig(**section(tmp_path / "sft", **targets))))[TRAINED].by_path()


def test_targets_by_name_and_by_expression(folders):
    def paths(*targets):
        model = lm()
        view = adapted(model, SFTConfig(**section(folders / "base", r=1, targets=targets, rslora=True)), model)
        assert view.adapters[TRAINED].config.rslora
        return [path.removeprefix("trunk.blocks.") for path in view.adapters[TRAINED].by_path()]

    assert paths("q_proj", "down_proj") == ["0.attn.q", "0.mlp.down", "1.attn.q", "1.mlp.down"]
    assert paths(r".*\.1\..*[qk]_proj") == ["1.attn.q", "1.attn.k"]
    assert paths("model.layers.0.self_attn.v_proj") == ["0.attn.v"]
    assert len(paths("all-linear")) == 14
    with pytest.raises(UsageError, match="matches no module"):
        paths("c_attn")


@pytest.mark.parametrize("p", [0.0, 0.3])
def test_dropout_is_that_of_the_setting(tmp_path, p):
    save_pretrained(lm(family="gpt2", dropout=0.1), tmp_path, tokenizer=WORDS)
    loaded = load_causal_lm(tmp_path)
    assert loaded.config.dropout == 0.1
    for stage_config, make in ((SFTConfig, sft_model), (RMConfig, lambda m, c: reward_model(m, c))):
        for r in (0, 2):
            c = stage_config(model=ModelSection(path=str(tmp_path), dropout=p), lora=LoRASection(r=r))
            model = make(load_causal_lm(tmp_path), c).train()
            assert model.config.dropout == model.trunk.config.embed_dropout == p
            assert {m.dropout for m in model.modules() if isinstance(m, Attention | Block)} == {p}
            ids = torch.tensor([[3, 4, 5, 6]])
            assert torch.equal(model(ids), model(ids)) == (p == 0)
    set_dropout(loaded, p)
    assert not loaded.training


def test_no_dropout_in_ppo(folders):
    c = config(folders)
    roles, _, _ = stage.ppo_roles(replace(c, lora=replace(c.lora, dropout=0.5)))
    assert not any(m.training for role in (roles.policy, roles.ref_policy, roles.value_model) for m in role.modules())
    assert torch.equal(roll(roles).old_logprobs, roll(roles).old_logprobs)


# ---- folders --------------------------------------------------------------------------------------------------------


def edit(folder, **changes):
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def load(path, loader=load_causal_lm):
    return stage.load(str(path), loader, key="model.path", made_by="train_sft.py")


def test_the_base_is_found_from_here_and_from_the_adapter(folders, monkeypatch):
    found = (folders / "base").resolve()
    assert base_folder(folders / "base") is None
    assert base_folder(folders / "sft") == found  # absolute, as it is written
    edit(folders / "sft", base_model_name_or_path="../base")
    assert base_folder(folders / "sft").resolve() == found
    edit(folders / "sft", base_model_name_or_path="base")
    with pytest.raises(CheckpointError, match="'base' is no folder here"):
        base_folder(folders / "sft")
    monkeypatch.chdir(folders)
    assert base_folder(folders / "sft") == found
    load("sft")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"base_model_name_or_path": "some/name-on-a-hub"}, "no folder here; download"),
        ({"base_model_name_or_path": None}, "names no base"),
        ({"base_model_name_or_path": "a\0b"}, "no folder here"),
        ({"base_model_name_or_path": "x" * 10000}, "no folder here"),
        ({"base_model_name_or_path": "../rm"}, "is an adapter itself"),
        ({"use_dora": True}, "use_dora"),
    ],
)
def test_bases_refused(folders, changes, message):
    edit(folders / "sft", **changes)
    with pytest.raises(CheckpointError, match=message) as caught:
        load(folders / "sft")
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 500


def test_another_base_under_the_same_name_is_refused(folders):
    save_pretrained(lm(3), folders / "base", tokenizer=WORDS)
    for name, loader in (("sft", load_causal_lm), ("rm", load_reward_model)):
        with pytest.raises(CheckpointError, match="is not the model that it was trained on"):
            load(folders / name, loader)
    assert fingerprint(lm(3)) != fingerprint(lm(0)) == fingerprint(open_model_without_meta(folders))


def open_model_without_meta(folders):
    """An adapter of PEFT knows nothing of fingerprints."""
    (folders / "sft/minirlhf.json").unlink()
    load(folders / "sft")
    return lm(0)


def test_adapters_of_the_wrong_kind(folders):
    with pytest.raises(CheckpointError, match="score head"):
        load(folders / "rm")
    with pytest.raises(CheckpointError, match="without the score head"):
        load(folders / "sft", load_reward_model)
    roles, loaded, _ = stage.ppo_roles(config(folders))
    stage.save_ppo(folders / "ppo", loaded, roles.value_model)
    with pytest.raises(CheckpointError, match="of a value model, and a reward model is needed"):
        open_model(folders / "ppo/value_model", load_reward_model, "cpu")
    with pytest.raises(CheckpointError, match="of a reward model, and a value model is needed"):
        open_model(folders / "rm", load_value_model, "cpu")
    again, _, _ = stage.ppo_roles(config(folders, "ppo"))  # PPO goes on from PPO
    assert torch.equal(roll(again).ref_logprobs, roll(roles).old_logprobs)


def test_an_adapter_without_a_tokenizer_has_that_of_its_base(folders):
    for name in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "minirlhf.json"):
        (folders / "sft" / name).unlink()
    (folders / "base/minirlhf.json").write_text('{"template": "hh"}')
    found = load(folders / "sft")
    assert found.tokenizer.fingerprint == WORDS.fingerprint
    assert found.template.name == "hh"


def test_more_tokens_than_rows_are_refused(folders):
    shutil.rmtree(folders / "base")
    save_pretrained(lm(vocab_size=WORDS.vocab_size - 1), folders / "base")
    WORDS.save(folders / "base")
    (folders / "sft/minirlhf.json").unlink()
    for name in ("base", "sft"):
        with pytest.raises(CheckpointError, match=r"tokenizer.json"):
            load(folders / name)


def test_a_reward_adapter_on_a_reward_model(folders):
    """PEFT trains such: a sequence classifier as the base."""
    edit(folders / "rm", base_model_name_or_path=str(folders / "full_rm"))
    (folders / "rm/minirlhf.json").unlink()
    ids = torch.tensor([[3, 4, 5]])
    with torch.no_grad():
        found = load(folders / "rm", load_reward_model).model(ids)
        edit(folders / "rm", base_model_name_or_path=str(folders / "base"))
        assert torch.equal(found, load(folders / "rm", load_reward_model).model(ids))  # the head is the adapter's own


def test_a_loaded_adapter_is_in_evaluation_mode(folders):
    for name, loader in (("sft", load_causal_lm), ("rm", load_reward_model)):
        edit(folders / name, lora_dropout=0.5)
        assert not any(m.training for m in load(folders / name, loader).model.modules())


def test_only_adapters_are_written(folders):
    roles, loaded, _ = stage.ppo_roles(config(folders))
    stage.save_ppo(folders / "ppo", loaded, roles.value_model)
    files = sorted(p.relative_to(folders / "ppo").as_posix() for p in (folders / "ppo").rglob("*.safetensors"))
    assert files == ["adapter_model.safetensors", "value_model/adapter_model.safetensors"]
    for name in files:
        for key in load_file(folders / "ppo" / name):
            assert key.endswith((".lora_A.weight", ".lora_B.weight", ".score.weight")), key


def test_meta_device_reads_nothing(folders):
    """What dry_run counts: the same roles, without memory."""
    for policy, reward in (("sft", "rm"), ("base", "full_rm")):
        c = config(folders, policy, reward)
        roles, _, _ = stage.ppo_roles(replace(c, run=replace(c.run, device="meta")))
        real, _, _ = stage.ppo_roles(c)
        for a, b in zip(roles[:3], real[:3], strict=True):
            assert all(p.is_meta for p in a.parameters())
            described = partial(map, lambda x: (x[0], x[1].shape, x[1].requires_grad))
            assert [*described(a.named_parameters())] == [*described(b.named_parameters())]
    assert LOADED == "loaded"


def test_answers_for_people_have_no_rows_without_a_token_and_ppo_excludes_nothing(folders):
    padded = lm(vocab_size=WORDS.vocab_size + 3)
    save_pretrained(padded, folders / "padded", tokenizer=WORDS)
    loaded = load(folders / "padded")
    spare = {WORDS.vocab_size, WORDS.vocab_size + 1, WORDS.vocab_size + 2}
    assert set(stage.never_drawn(loaded)) == {WORDS.pad_id, WORDS.unk_id} | spare
    how = stage.sampling(config(folders).sample, loaded)  # where probability could hide from the KL penalty
    assert not how.keys() & {"suppress_tokens", "repetition_penalty", "no_repeat_ngram_size"}
    assert (how["top_k"], how["top_p"], how["min_new_tokens"], how["begin_suppress_tokens"]) == (0, 1.0, 0, ())
