"""Model folders: what we write we read back, bit for bit; what lies or lacks something is refused in one line."""

import json
import os
import shutil
import struct
import subprocess
import sys
import time
import tracemalloc
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file
from tolerance import assert_close, exact

from minirlhf.errors import CheckpointError, UsageError
from minirlhf.families import FAMILIES
from minirlhf.heads import RewardModel, ValueModel
from minirlhf.hf_config import parse_config
from minirlhf.model import CausalLM, ModelConfig
from minirlhf.pretrained import load_causal_lm, load_reward_model, load_value_model, read_config, save_pretrained
from minirlhf.tokenizer import Tokenizer

V = 13
IDS = torch.tensor([[3, 1, 4, 1, 5], [9, 2, 6, 5, 3]])
MASK = torch.tensor([[False, True, True, True, True], [True] * 5])


def small(family="llama", **settings):
    settings = {"n_layer": 2, "n_head": 2, "d_model": 8, "d_inner": 12, "max_seq_len": 10} | settings
    return ModelConfig(family=family, vocab_size=V, **settings)


def lm(family="llama", **settings):
    config = small(family, **({"d_inner": None} if family == "bloom" else {}) | settings)
    return CausalLM(config, rng=torch.Generator().manual_seed(0)).eval()


def read(folder, name):
    return json.loads((folder / name).read_text())


def edit(folder, name="config.json", **changes):
    """Change some keys of a JSON file; `...` deletes one."""
    raw = {**read(folder, name), **changes}
    (folder / name).write_text(json.dumps({k: v for k, v in raw.items() if v is not ...}))


# ---- what we write we read ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_round_trip_is_exact(family, dtype, tmp_path):
    model = lm(family).to(dtype)
    save_pretrained(model, tmp_path)
    again = load_causal_lm(tmp_path, dtype=dtype)
    assert again.config == model.config
    assert not again.training
    assert again.state_dict().keys() == model.state_dict().keys()
    for name, tensor in model.state_dict().items():
        assert torch.equal(again.state_dict()[name], tensor), name
        assert again.state_dict()[name].dtype == dtype
    assert all(p.requires_grad for p in again.parameters())
    with torch.no_grad():
        assert_close(again(IDS, MASK), model(IDS, MASK), exact)


@pytest.mark.parametrize("family", FAMILIES)
def test_reward_and_value_models(family, tmp_path):
    reward = RewardModel.from_causal_lm(lm(family)).eval()
    save_pretrained(reward, tmp_path / "reward")
    assert_close(load_reward_model(tmp_path / "reward")(IDS, MASK), reward(IDS, MASK), exact)
    value = ValueModel.from_reward_model(reward).eval()
    save_pretrained(value, tmp_path / "value")
    assert_close(load_value_model(tmp_path / "value")(IDS, MASK), value(IDS, MASK), exact)
    raw = read(tmp_path / "reward", "config.json")
    assert raw["architectures"] == [FAMILIES[family].score_class]
    assert raw["id2label"] == {"0": "LABEL_0"}
    assert read(tmp_path / "value", "config.json")["architectures"] == ["MiniRLHFValueModel"]


SETTINGS = [
    small("gpt2", activation="relu", norm_eps=1e-3, dropout=0.1, tied=False),
    small("bloom", n_head=1, d_inner=None, tied=False),
    small("opt", qkv_bias=False, out_bias=False, mlp_bias=False, activation="gelu"),
    small("llama", n_kv_head=1, head_dim=6, tied=True, rope_theta=5e5, rope_factor=2.0),
    small("llama", rope_factor=8.0, rope_llama3=(1.0, 4.0, 6), mlp_bias=True, bos_token_id=1, eos_token_id=(2, 5)),
    small("mistral", sliding_window=3),
    small("qwen2", sliding_window=2, sliding_layers=(1,)),
    small("qwen3", qkv_bias=True, out_bias=True, pad_token_id=0),
    small("gpt_neox", rope_fraction=0.5, parallel_residual=False, activation="gelu_tanh", rope_theta=77.0),
]


@pytest.mark.parametrize("config", SETTINGS, ids=lambda c: c.family)
def test_every_setting_survives(config, tmp_path):
    save_pretrained(CausalLM(config), tmp_path)
    assert load_causal_lm(tmp_path).config == config


@pytest.mark.parametrize(
    "config",
    [
        small("llama", qkv_bias=True),  # attention_bias adds one to the output too
        small("llama", activation="gelu", sliding_window=3),
        small("gpt2", head_dim=6),
        small("gpt2", position="rotary"),
        small("bloom"),  # d_inner is 4C always
        small("opt", position_offset=0),
        small("mistral", sliding_window=3, sliding_layers=(0,)),
        small("gpt_neox", tied=False, mlp_bias=False),
    ],
    ids=lambda c: c.family,
)
def test_settings_that_the_format_cannot_say_are_refused(config, tmp_path):
    with pytest.raises(UsageError, match=r"model\.[a-z_]+ .*: the format of"):
        save_pretrained(CausalLM(config), tmp_path)
    assert not (tmp_path / "model.safetensors").exists()


def test_new_folder_over_an_old_one(tmp_path):
    """Shards of an older model leave no index behind that contradicts the new file."""
    save_pretrained(lm(), tmp_path)
    shard(tmp_path)
    new = lm("gpt2")
    save_pretrained(new, tmp_path)
    assert_close(load_causal_lm(tmp_path)(IDS), new(IDS), exact)


def test_library_reads_what_we_write(tmp_path):
    model = lm()
    save_pretrained(model, tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    assert torch.equal(tensors["model.layers.1.mlp.down_proj.weight"], model.trunk.blocks[1].mlp.down.weight)


def test_tokenizer_goes_along(tmp_path):
    tokenizer = Tokenizer.from_words(["<pad>", "<eos>", "<unk>", "a", "b", "c"])
    config = replace(small(), vocab_size=tokenizer.vocab_size)
    save_pretrained(CausalLM(config), tmp_path, tokenizer=tokenizer)
    again = read_config(tmp_path)
    assert (again.eos_token_id, again.pad_token_id) == (tokenizer.eos_id, tokenizer.pad_id)
    assert read(tmp_path, "generation_config.json")["eos_token_id"] == tokenizer.eos_id
    assert Tokenizer.load(tmp_path).encode("a b") == tokenizer.encode("a b")
    with pytest.raises(UsageError, match="embedding"):
        save_pretrained(CausalLM(replace(config, vocab_size=2)), tmp_path, tokenizer=tokenizer)


def test_every_token_that_ends_an_answer_is_said(tmp_path):
    """A template's stop token beside the tokenizer's EOS, and a list that a folder had."""
    tokenizer = Tokenizer.from_words(["<pad>", "<eos>", "<unk>", "a", "<|im_end|>", "c"])
    config = replace(small(), vocab_size=tokenizer.vocab_size)
    for listed, stop, expected in ((None, 4, [1, 4]), ((5, 1), None, [5, 1]), ((5, 1), 4, [5, 1, 4]), (3, 1, 1)):
        model = CausalLM(replace(config, eos_token_id=listed))
        save_pretrained(model, tmp_path, tokenizer=tokenizer, stop_token_id=stop)
        assert read(tmp_path, "config.json")["eos_token_id"] == expected
        assert read(tmp_path, "generation_config.json")["eos_token_id"] == expected
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": "<eos>"}')
    save_pretrained(CausalLM(config), tmp_path, tokenizer=tokenizer, stop_token_id=4)
    save_pretrained(load_causal_lm(tmp_path), tmp_path / "again", tokenizer=Tokenizer.load(tmp_path))
    assert read(tmp_path / "again", "generation_config.json")["eos_token_id"] == [1, 4]


@pytest.mark.parametrize("family", FAMILIES)
def test_head_widths_that_transformers_refuses(family, tmp_path):
    """llama asks of n_head that it divides d_model even with a head_dim; mistral, qwen2 and qwen3 do not."""
    config = ModelConfig(family=family, vocab_size=V, n_layer=1, n_head=3, d_model=10, head_dim=4)
    if family in ("mistral", "qwen2", "qwen3"):
        save_pretrained(CausalLM(config), tmp_path)
        assert load_causal_lm(tmp_path).config == config
    elif family in ("llama", "gpt_neox"):
        with pytest.raises(
            UsageError, match=r"model\.d_model 10 is not a multiple of model\.n_head 3, .*head_dim \(4\)"
        ):
            save_pretrained(CausalLM(config), tmp_path)
        assert not list(tmp_path.iterdir())


def test_a_disk_that_refuses(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(CheckpointError, match="cannot be written"):
        save_pretrained(lm(), tmp_path / "file")


def shard(folder, parts=3):
    """Cut model.safetensors into pieces with an index."""
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names = sorted(tensors)
    weight_map = {}
    for i in range(parts):
        file = f"model-{i + 1:05d}-of-{parts:05d}.safetensors"
        save_file({n: tensors[n] for n in names[i::parts]}, folder / file)
        weight_map |= dict.fromkeys(names[i::parts], file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


def test_loading_draws_no_random_number(tmp_path):
    save_pretrained(lm(), tmp_path)
    before = torch.get_rng_state()
    load_causal_lm(tmp_path)
    assert torch.equal(torch.get_rng_state(), before)


def test_shards_and_indices_that_are_read(tmp_path):
    model = lm()
    save_pretrained(model, tmp_path)
    names = load_file(tmp_path / "model.safetensors")
    index = {"weight_map": dict.fromkeys(names, "model.safetensors"), "metadata": {"total_size": 1}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    assert_close(load_causal_lm(tmp_path)(IDS), model(IDS), exact)
    (tmp_path / "model.safetensors.index.json").unlink()
    shard(tmp_path)
    assert_close(load_causal_lm(tmp_path)(IDS), model(IDS), exact)


def test_old_files_with_buffers_other_prefixes_and_a_repeated_head(tmp_path):
    model = lm("gpt2")
    save_pretrained(model, tmp_path)
    tensors = {k.removeprefix("transformer."): v for k, v in load_file(tmp_path / "model.safetensors").items()}
    tensors["h.0.attn.bias"] = torch.ones(1, 1, 10, 10, dtype=torch.uint8)
    tensors["h.1.attn.masked_bias"] = torch.tensor(-1e4)
    tensors["lm_head.weight"] = tensors["wte.weight"].clone()
    save_file(tensors, tmp_path / "model.safetensors")  # without metadata
    again = load_causal_lm(tmp_path)
    assert again.head.weight is again.trunk.embed.weight
    assert_close(again(IDS), model(IDS), exact)


def test_links_and_a_byte_order_mark_are_fine(tmp_path):
    """Caches of the hub are folders of links."""
    model = lm()
    save_pretrained(model, tmp_path / "blobs")
    (tmp_path / "snapshot").mkdir()
    for file in (tmp_path / "blobs").iterdir():
        (tmp_path / "snapshot" / file.name).symlink_to(file)
    config = tmp_path / "blobs" / "config.json"
    config.write_bytes(b"\xef\xbb\xbf" + config.read_bytes())
    assert_close(load_causal_lm(tmp_path / "snapshot")(IDS), model(IDS), exact)


def test_code_of_a_folder_is_never_run(tmp_path):
    save_pretrained(lm(), tmp_path)
    (tmp_path / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    edit(tmp_path, auto_map={"AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.Model"})
    (tmp_path / "pytorch_model.bin").write_bytes(b"cposix\nsystem\n(S'touch ran'\ntR.")
    load_causal_lm(tmp_path)
    assert not (tmp_path / "ran").exists()


def test_class_default_ids_beside_a_smaller_vocabulary_count_as_absent(tmp_path):
    """transformers writes GPT-2's 50256 into every config whose author said nothing."""
    save_pretrained(lm("gpt2"), tmp_path)
    edit(tmp_path, bos_token_id=50256, eos_token_id=50256)
    assert read_config(tmp_path).eos_token_id is None


MEASURE = """
import sys, torch
from minirlhf.pretrained import load_causal_lm, load_reward_model, save_pretrained
def peak():
    return next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith("VmHWM"))
torch.set_num_threads(1)
load_causal_lm(sys.argv[1])  # what the first call costs beside the weights
load_reward_model(sys.argv[4])
assert "torch._dynamo" not in sys.modules  # a second's import
before = peak()
model = load_causal_lm(sys.argv[2])
weights = sum(p.numel() * p.element_size() for p in model.parameters())
print((peak() - before) / weights)
before = peak()
save_pretrained(model, sys.argv[3])
print((peak() - before) / weights)
"""


@pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="reads the peak of a process from /proc")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_loading_holds_the_weights_once(dtype, tmp_path):
    save_pretrained(lm("gpt2"), tmp_path / "tiny")
    big = ModelConfig(family="gpt2", vocab_size=20000, n_layer=8, n_head=16, d_model=768, max_seq_len=64)
    save_pretrained(CausalLM(big).to(dtype), tmp_path / "big")
    save_pretrained(RewardModel(lm("gpt2").config), tmp_path / "reward")
    command = [sys.executable, "-c", MEASURE, *(tmp_path / name for name in ("tiny", "big", "out", "reward"))]
    loading, saving = map(float, subprocess.run(command, capture_output=True, text=True, check=True).stdout.split())
    assert 0.9 < loading <= 1.15, f"{loading:.3f} times the weights"  # 290 MB in fp32
    assert saving <= 0.5, f"{saving:.3f} times the weights"  # the embedding is a third of them


# ---- hostile folders ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    """One sound folder of each kind, with a tokenizer where the kind has one."""
    root = tmp_path_factory.mktemp("good")
    tokenizer = Tokenizer.from_words(["<pad>", "<eos>", "<unk>", "a", "b", "c"])
    for family in ("llama", "gpt2"):
        model = lm(family)
        model = CausalLM(
            replace(model.config, bos_token_id=None, eos_token_id=1, pad_token_id=0), rng=torch.Generator()
        )
        save_pretrained(model, root / family, tokenizer=tokenizer)
        save_pretrained(RewardModel.from_causal_lm(model), root / f"{family}-reward")
    save_pretrained(ValueModel(small()), root / "value")
    return root


def weights(folder):
    return folder / "model.safetensors"


def parts(folder):
    data = weights(folder).read_bytes()
    n = struct.unpack("<Q", data[:8])[0]
    return json.loads(data[8 : 8 + n]), data[8 + n :]


def header(text=None, length=None, data=None, **changes):
    """Rewrite the header: as text, with a wrong length, or some lines of it."""

    def act(folder):
        lines, old = parts(folder)
        lines = {k: v for k, v in {**lines, **changes}.items() if v is not ...}
        raw = json.dumps(lines) if text is None else text(lines) if callable(text) else text
        raw = raw if isinstance(raw, bytes) else raw.encode()
        n = len(raw) if length is None else length
        weights(folder).write_bytes(struct.pack("<Q", n) + raw + (old if data is None else data(old)))

    return act


def entry(name, **changes):
    """Rewrite fields of one tensor's line."""

    def act(folder):
        line = {k: v for k, v in {**parts(folder)[0][name], **changes}.items() if v is not ...}
        header(**{name: line})(folder)

    return act


def tensor(name, change):
    """Rewrite one tensor of the file; None deletes it."""

    def act(folder):
        tensors = load_file(weights(folder))
        tensors[name] = change(tensors.get(name))
        save_file({k: v for k, v in tensors.items() if v is not None}, weights(folder))

    return act


def config(**changes):
    return lambda folder: edit(folder, **changes)


def file(name, content):
    return lambda folder: (folder / name).write_bytes(content.encode() if isinstance(content, str) else content)


def replaced(name, make):
    def act(folder):
        (folder / name).unlink()
        make(folder / name)

    return act


def index(change):
    def act(folder):
        shard(folder)
        path = folder / "model.safetensors.index.json"
        result = change(read(folder, path.name)["weight_map"])
        path.write_text(result if isinstance(result, str) else json.dumps({"weight_map": result}))

    return act


def put(value):
    def change(t):
        t.view(-1)[3] = value
        return t

    return change


NORM = "model.norm.weight"  # (8,)
DOWN = "model.layers.1.mlp.down_proj.weight"  # (8, 12)
FIRST = "model-00001-of-00003.safetensors"
TWICE = '{{"a": {0}, "a": {0}}}'.format('{"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}')
HEADER = {
    "empty": file("model.safetensors", ""),
    "seven-bytes": file("model.safetensors", "1234567"),
    "length-2^63": header(length=2**63),
    "length-beyond-the-file": header(length=10**6),
    "length-1": header(length=1),
    "cut": header(length=40),
    "not-utf8": header(text=b'{"\xff\xfe": 1}'),
    "no-json": header(text="{tensors}"),
    "a-list": header(text="[]"),
    "deep": header(text="[" * 200_000),
    "nan": header(text='{"a": NaN}'),
    "repeated-name": header(text=TWICE, data=lambda old: bytes(4)),
    "repeated-name-hidden-by-the-last": header(text=lambda lines: '{"lm_head.weight": 1, ' + json.dumps(lines)[1:]),
    "repeated-field": header(text=lambda lines: json.dumps(lines).replace('"dtype"', '"dtype": "F16", "dtype"', 1)),
    "metadata-number": header(__metadata__={"format": 1}),
    "metadata-list": header(__metadata__=["pt"]),
    "line-is-a-list": header(**{NORM: [1, 2]}),
    "no-offsets": entry(NORM, data_offsets=...),
    "extra-field": entry(NORM, strides=[1]),
    "unknown-dtype": entry(NORM, dtype="F4"),
    "dtype-number": entry(NORM, dtype=4),
    "integers": entry(NORM, dtype="I32"),
    "float8": tensor(NORM, lambda t: t.to(torch.float8_e4m3fn)),
    "booleans": tensor(NORM, lambda t: t > 0),
    "negative-shape": entry(NORM, shape=[-8]),
    "two-negatives": entry(NORM, shape=[-2, -4]),
    "overflowing-shape": entry(NORM, shape=[2**40, 2**40, 2**40]),
    "petabytes": entry(NORM, shape=[2**47], data_offsets=[0, 2**49]),
    "shape-float": entry(NORM, shape=[8.0]),
    "shape-boolean": entry(NORM, shape=[8, True]),
    "shape-text": entry(NORM, shape="8"),
    "shape-other": entry(NORM, shape=[2, 4]),
    "shape-transposed": entry(DOWN, shape=[12, 8]),
    "offsets-reversed": lambda f: entry(NORM, data_offsets=parts(f)[0][NORM]["data_offsets"][::-1])(f),
    "offsets-overlap": lambda f: entry(NORM, data_offsets=[0, 32])(f),
    "offsets-three": entry(NORM, data_offsets=[0, 16, 32]),
    "hole": header(**{NORM: ...}),
    "short": header(data=lambda old: old[:-1]),
    "trailing": header(data=lambda old: old + b"\0"),
    "too-many-tensors": header(text=json.dumps({str(i): {} for i in range(100_001)})),
}
NAMES = {
    "missing": tensor(NORM, lambda t: None),
    "missing-head": tensor("lm_head.weight", lambda t: None),
    "surplus": tensor("model.layers.2.input_layernorm.weight", lambda t: torch.ones(8)),
    "surplus-bias": tensor("model.layers.0.self_attn.q_proj.bias", lambda t: torch.zeros(8)),
    "adapter-inside": tensor("model.layers.0.self_attn.q_proj.lora_A.weight", lambda t: torch.zeros(2, 8)),
    "same-with-and-without-prefix": tensor("norm.weight", lambda t: torch.ones(8)),
    "head-with-prefix": lambda f: (
        [tensor("model.lm_head.weight", lambda t: torch.ones(V, 8))(f)] and tensor("lm_head.weight", lambda t: None)(f)
    ),
    "score": tensor("score.weight", lambda t: torch.ones(1, 8)),
    "scalar": tensor(NORM, lambda t: torch.tensor(1.0)),
    "zero-size": tensor(NORM, lambda t: torch.ones(0)),
}
FOLDER = {
    "no-config": lambda f: (f / "config.json").unlink(),
    "no-weights": lambda f: weights(f).unlink(),
    "pickle": lambda f: weights(f).rename(f / "pytorch_model.bin"),
    "pickle-pt": lambda f: weights(f).rename(f / "model.pt"),
    "shards-without-index": lambda f: [shard(f), (f / "model.safetensors.index.json").unlink()],
    "weights-fifo": replaced("model.safetensors", os.mkfifo),
    "weights-folder": replaced("model.safetensors", os.mkdir),
    "weights-device": replaced("model.safetensors", lambda p: p.symlink_to("/dev/zero")),
    "weights-link-loop": replaced("model.safetensors", lambda p: p.symlink_to(p)),
    "weights-dangling": replaced("model.safetensors", lambda p: p.symlink_to(p.parent / "gone")),
    "config-fifo": replaced("config.json", os.mkfifo),
    "adapter": lambda f: (f / "config.json").rename(f / "adapter_config.json"),
    "index-path": index(lambda m: {**m, NORM: "../" + m[NORM]}),
    "index-absolute": index(lambda m: {**m, NORM: "/etc/passwd"}),
    "index-backslash": index(lambda m: {**m, NORM: "..\\" + m[NORM]}),
    "index-nul": index(lambda m: {**m, NORM: m[NORM] + "\0"}),
    "index-newline": index(lambda m: {**m, NORM: m[NORM] + "\n"}),
    "index-pickle": index(lambda m: dict.fromkeys(m, "pytorch_model-00001-of-00001.bin")),
    "index-number": index(lambda m: {**m, NORM: 1}),
    "index-inverted": index(lambda m: {FIRST: [k for k in m if m[k] == FIRST]}),
    "index-no-map": index(lambda m: '{"metadata": {}}'),
    "index-no-json": index(lambda m: "{"),
    "index-repeated": index(lambda m: '{"weight_map": {"a": "b.safetensors", "a": "c.safetensors"}}'),
    "index-empty": index(lambda m: {}),
    "index-lacks-one": index(lambda m: {k: v for k, v in m.items() if k != NORM}),
    "index-one-too-many": index(lambda m: {**m, "ghost": FIRST}),
    "index-other-shard": index(lambda m: {**m, NORM: next(v for v in m.values() if v != m[NORM])}),
    "index-no-shard": index(lambda m: {**m, NORM: "model-00009-of-00003.safetensors"}),
    "index-beside-another-file": lambda f: [shutil.copy(weights(f), f / "x"), shard(f), (f / "x").rename(weights(f))],
    "tensor-in-two-shards": lambda f: [
        shard(f),
        save_file({**load_file(f / FIRST), NORM: torch.ones(8)}, f / FIRST),
    ],
}
CONFIG = {
    "no-json": file("config.json", "{"),
    "not-an-object": file("config.json", '["llama"]'),
    "repeated-key": lambda f: file("config.json", '{"hidden_size": 8, ' + (f / "config.json").read_text()[1:])(f),
    "nan": lambda f: file("config.json", '{"rms_norm_eps2": NaN, ' + (f / "config.json").read_text()[1:])(f),
    "large": lambda f: file("config.json", (f / "config.json").read_text() + " " * (1 << 20))(f),
    "latin1": file("config.json", b'{"model_type": "\xe9"}'),
    "no-model-type": config(model_type=...),
    "unknown-model-type": config(model_type="mamba"),
    "list-model-type": config(model_type=["llama"]),
    "quantised": config(quantization_config={"quant_method": "gptq", "bits": 4}),
    "layers-too-few": config(num_hidden_layers=1),
    "layers-too-many": config(num_hidden_layers=3),
    "layers-million": config(num_hidden_layers=10**6),
    "width-absurd": config(hidden_size=2**40),
    "vocabulary-absurd": config(vocab_size=2**60),
    "vocabulary-large": config(vocab_size=2**25),
    "inner-large": config(intermediate_size=2**25),
    "heads-absurd": config(num_attention_heads=2**20, num_key_value_heads=2**20, head_dim=2**25),
    "width-zero": config(hidden_size=0),
    "width-negative": config(hidden_size=-8),
    "width-text": config(hidden_size="8"),
    "width-float": config(hidden_size=8.0),
    "width-true": config(num_hidden_layers=True),
    "width-null": config(hidden_size=None),
    "width-other": config(hidden_size=10),
    "heads-do-not-divide": config(num_attention_heads=3, head_dim=None),
    "kv-heads-do-not-divide": config(num_attention_heads=4, num_key_value_heads=3, head_dim=2),
    "eps-infinite": lambda f: file("config.json", (f / "config.json").read_text().replace("1e-06", "1e400"))(f),
    "eps-negative": config(rms_norm_eps=-1.0),
    "tied-text": config(tie_word_embeddings="yes"),
    "tied-but-different": config(tie_word_embeddings=True),
    "activation": config(hidden_act="swiglu9"),
    "activation-list": config(hidden_act=["silu"]),
    "bias": config(attention_bias=True),
    "eos-beyond": config(eos_token_id=V),
    "eos-negative": config(eos_token_id=-1),
    "eos-text": config(eos_token_id="</s>"),
    "eos-list-beyond": config(eos_token_id=[1, 99]),
    "pad-beyond": config(pad_token_id=V + 3),
    "pad-minus-one": config(pad_token_id=-1),
}
TOKENIZER = {
    "no-json": file("tokenizer.json", "{"),
    "no-vocabulary": file("tokenizer.json", '{"model": {}}'),
    "vocabulary-number": file("tokenizer.json", '{"model": {"vocab": 3}}'),
    "fifo": replaced("tokenizer.json", os.mkfifo),
    "id-beyond": lambda f: words(f, lambda v: {**v, "zebra": V}),
    "id-negative": lambda f: words(f, lambda v: {**v, "zebra": -1}),
    "id-text": lambda f: words(f, lambda v: {**v, "zebra": "7"}),
    "eos-renamed": lambda f: file("tokenizer.json", (f / "tokenizer.json").read_text().replace('"<eos>"', '"<end>"'))(
        f
    ),
    "eos-elsewhere": config(eos_token_id=2),
    "eos-of-generation-elsewhere": lambda f: [
        edit(f, eos_token_id=None),
        edit(f, "generation_config.json", eos_token_id=2),
    ],
    "eos-not-held": lambda f: edit(f, "generation_config.json", eos_token_id=[1, 12]),
    "eos-list-of-lists": lambda f: edit(f, "generation_config.json", eos_token_id=[[1]]),
    "bos-not-held": config(bos_token_id=11),
    "name-not-held": lambda f: edit(f, "tokenizer_config.json", bos_token="<bos>"),
    "name-of-the-map-not-held": lambda f: edit(f, "special_tokens_map.json", eos_token={"content": "</s>"}),
    "decoder-elsewhere": lambda f: edit(
        f, "tokenizer_config.json", added_tokens_decoder={"5": {"content": "<eos>", "special": True}}
    ),
    "decoder-not-held": lambda f: edit(f, "tokenizer_config.json", added_tokens_decoder={"12": {"content": "<x>"}}),
    "config-no-json": file("tokenizer_config.json", "]"),
}
AFTER = {  # found only while the numbers are read
    "nan": tensor(DOWN, put(torch.nan)),
    "infinity": tensor(DOWN, put(torch.inf)),
    "minus-infinity-in-the-embedding": tensor("model.embed_tokens.weight", put(-torch.inf)),
}
REWARD = {
    "no-head": tensor("score.weight", lambda t: None),
    "two-labels": config(id2label={"0": "a", "1": "b"}),
    "two-rows": tensor("score.weight", lambda t: torch.ones(2, 8)),
    "head-bias": tensor("score.bias", lambda t: torch.zeros(1)),
    "head-of-another-name": lambda f: [
        tensor("score.weight", lambda t: None)(f),
        tensor("v_head.weight", lambda t: torch.ones(1, 8))(f),
    ],
    "head-nan": tensor("score.weight", put(torch.nan)),
    "head-with-prefix": lambda f: [
        tensor("score.weight", lambda t: None)(f),
        tensor("model.score.weight", lambda t: torch.ones(1, 8))(f),
    ],
    "language-model-head": tensor("lm_head.weight", lambda t: torch.ones(V, 8)),
    "normalised": config(normalize_reward=True),
    "value-model": config(minirlhf_head="value"),
}


def words(folder, change):
    data = read(folder, "tokenizer.json")
    data["model"]["vocab"] = change(data["model"]["vocab"])
    (folder / "tokenizer.json").write_text(json.dumps(data))


def refused(load, folder):
    """The error, which must be one line that names a file in the folder or the folder."""
    with pytest.raises(CheckpointError) as caught:
        load(folder)
    message = str(caught.value)
    assert "\n" not in message
    assert str(folder) in message
    assert message.isprintable()
    assert len(message) < 400 + len(str(folder))
    return message


@pytest.fixture
def no_memory(monkeypatch):
    """Memory for weights must not be taken before the folder is known to be sound."""

    def taken(*args, **kwargs):
        raise AssertionError("took memory for the weights of a hostile folder")

    monkeypatch.setattr(torch.nn.Module, "to_empty", taken)


CASES = {"header": HEADER, "names": NAMES, "folder": FOLDER, "config": CONFIG, "tokenizer": TOKENIZER}
BEFORE = {f"{group}-{name}": case for group, cases in CASES.items() for name, case in cases.items()}
del BEFORE["config-tied-but-different"]
AFTER["tied-but-different"] = CONFIG["tied-but-different"]


@pytest.mark.parametrize("name", BEFORE)
def test_hostile_folders_are_refused_before_memory_is_taken(name, good, tmp_path, no_memory):
    folder = tmp_path / "f"
    shutil.copytree(good / "llama", folder)
    BEFORE[name](folder)
    refused(load_causal_lm, folder)


@pytest.mark.parametrize("name", AFTER)
def test_hostile_numbers_are_refused(name, good, tmp_path):
    folder = tmp_path / "f"
    shutil.copytree(good / "llama", folder)
    AFTER[name](folder)
    refused(load_causal_lm, folder)


@pytest.mark.parametrize("name", REWARD)
def test_hostile_reward_models_are_refused(name, good, tmp_path):
    folder = tmp_path / "f"
    shutil.copytree(good / "llama-reward", folder)
    REWARD[name](folder)
    refused(load_reward_model, folder)


def test_the_sound_folders_load(good):
    for family in ("llama", "gpt2"):
        load_causal_lm(good / family)
        load_reward_model(good / f"{family}-reward")
    load_value_model(good / "value")


def test_kinds_are_not_confused(good):
    for family in ("llama", "gpt2"):
        assert "has no head score.weight" in refused(load_reward_model, good / family)
        assert "not a language model" in refused(load_causal_lm, good / f"{family}-reward")
    assert "load_value_model" in refused(load_reward_model, good / "value")
    assert "load_reward_model" in refused(load_value_model, good / "llama-reward")


def test_overflow_in_the_asked_dtype_is_refused(good, tmp_path):
    folder = tmp_path / "f"
    shutil.copytree(good / "llama", folder)
    tensor(DOWN, put(1e6))(folder)
    load_causal_lm(folder)
    assert "float16" in refused(lambda f: load_causal_lm(f, dtype=torch.float16), folder)


def test_no_such_folder(tmp_path):
    refused(load_causal_lm, tmp_path / "gone")
    (tmp_path / "file").touch()
    refused(load_causal_lm, tmp_path / "file")


SETTINGS_REFUSED = [
    ("llama", "rope_scaling", {"type": "dynamic", "factor": 2.0}),
    ("llama", "rope_scaling", {"rope_type": "yarn", "factor": 2.0}),
    ("llama", "rope_scaling", {"type": "linear"}),
    ("llama", "rope_scaling", {"type": "linear", "factor": 0}),
    ("llama", "rope_scaling", {"type": "linear", "factor": 2.0, "attention_factor": 2.0}),
    ("llama", "rope_scaling", {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 4, "high_freq_factor": 4}),
    ("llama", "rope_scaling", [2.0]),
    ("llama", "rope_theta", "10000"),
    ("llama", "rope_theta", 0),
    ("llama", "rope_theta", 20000.0),  # rope_parameters says 10000
    ("llama", "rope_parameters", {"rope_theta": 10000.0, "mrope_section": [1, 2]}),
    ("llama", "rope_parameters", {"rope_theta": 10000.0, "partial_rotary_factor": 0.5}),
    ("llama", "sliding_window", 4),
    ("llama", "residual_multiplier", 0.5),
    ("llama", "attn_logit_softcapping", 30.0),
    ("llama", "is_encoder_decoder", True),
    ("llama", "pruned_heads", {"0": [1]}),
    ("llama", "foo", False),
    ("gpt2", "scale_attn_weights", False),
    ("gpt2", "scale_attn_by_inverse_layer_idx", True),
    ("gpt2", "add_cross_attention", True),
    ("gpt2", "hidden_size", 16),  # n_embd says 8
    ("gpt2", "rope_theta", 10000.0),
    ("gpt2", "n_ctx", 11),
    ("bloom", "apply_residual_connection_post_layernorm", True),
    ("bloom", "n_embed", 16),
    ("bloom", "slow_but_exact", True),  # leaves two biases out in transformers, with a pretraining_tp above 1
    ("opt", "do_layer_norm_before", False),
    ("opt", "word_embed_proj_dim", 4),
    ("opt", "_remove_final_layer_norm", True),
    ("opt", "layer_norm_elementwise_affine", False),
    ("mistral", "layer_types", ["full_attention", "sliding_attention"]),
    ("qwen2", "layer_types", ["full_attention"]),
    ("qwen2", "layer_types", ["full_attention", "sliding_attention"]),  # no window in use
    ("qwen2", "layer_types", "full_attention"),
    ("qwen2", "layer_types", [["full_attention"], {}]),
    ("qwen2", "use_mrope", True),
    ("qwen3", "num_experts", 8),
    ("gpt_neox", "rotary_pct", 1.5),
    ("gpt_neox", "hidden_act", "quick_gelu"),
    ("gpt_neox", "rope_theta", 20000.0),  # rotary_emb_base says 10000
    ("gpt_neox", "partial_rotary_factor", 0.5),
]


@pytest.mark.parametrize(("family", "name", "value"), SETTINGS_REFUSED)
def test_settings_are_refused_by_name(family, name, value, tmp_path, no_memory):
    save_pretrained(lm(family), tmp_path)
    edit(tmp_path, **{name: value})
    words = {"rope_scaling": "rope", "rope_parameters": "rope setting|partial_rotary_factor"}
    words |= {"rotary_pct": "partial_rotary_factor", "hidden_act": "quick_gelu"}
    with pytest.raises(CheckpointError, match=words.get(name, name)):
        load_causal_lm(tmp_path)


@pytest.mark.parametrize("extra", [{"model_max_length": 4096}, {"z_loss_weight": 0}])
def test_other_baichuan_models_are_refused(extra, tmp_path, no_memory):
    save_pretrained(lm(), tmp_path)
    edit(tmp_path, model_type="baichuan", **extra)
    assert "Baichuan" in refused(load_causal_lm, tmp_path)


HARMLESS = {"torch_dtype": "float16", "_name_or_path": "x", "transformers_version": "4.20.0", "pretraining_tp": 4}
HARMLESS |= {"do_sample": True, "temperature": 0.6, "max_length": 20, "task_specific_params": {"a": 1}, "foo": None}
# of SmolLM2, of early conversions of LLaMA, of OPT
HARMLESS |= {"is_llama_config": True, "rope_interleaved": False, "max_sequence_length": 2048, "activation_dropout": 0.0}
# of SmolLM2's chat models, of Dolly
HARMLESS |= {"transformers.js_config": {"kv_cache_dtype": {"fp16": "float16"}}, "custom_pipelines": {"a": {}}}


def test_harmless_settings_are_passed_over(tmp_path):
    save_pretrained(lm(), tmp_path)
    edit(tmp_path, **HARMLESS)
    load_causal_lm(tmp_path)
    edit(tmp_path, rope_interleaved=True)
    assert "rope_interleaved True" in refused(load_causal_lm, tmp_path)


def test_the_files_of_a_tokenizer_with_many_added_tokens_are_large(good, tmp_path):
    folder = tmp_path / "f"
    shutil.copytree(good / "llama", folder)
    edit(folder, "tokenizer_config.json", chat_template="x" * (1 << 20))
    load_causal_lm(folder)
    Tokenizer.load(folder)


def test_gpt_neox_folders_of_transformers_4_say_their_rotation_twice(tmp_path):
    save_pretrained(lm("gpt_neox", rope_fraction=0.5, rope_theta=77.0), tmp_path)
    edit(tmp_path, rope_theta=77, partial_rotary_factor=0.5)
    assert load_causal_lm(tmp_path).config == small("gpt_neox", rope_fraction=0.5, rope_theta=77.0)


def test_the_layers_of_a_small_file_take_no_memory(tmp_path):
    """A list of them would, before the tensors are counted."""
    windows = {"use_sliding_window": True, "max_window_layers": 0}
    tracemalloc.start()
    with pytest.raises(CheckpointError, match="num_hidden_layers"):
        parse_config({"model_type": "qwen3", "num_hidden_layers": 1 << 26, **windows}, tmp_path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 1 << 20


def test_a_repeated_name_among_many_is_found_at_once(tmp_path):
    names = [str(i) for i in range(100_000)]
    (tmp_path / "config.json").write_text("{" + ",".join(f'"{name}":0' for name in [*names, names[-1]]) + "}")
    before = time.process_time()
    assert "'99999' twice" in refused(load_causal_lm, tmp_path)
    assert time.process_time() - before < 20  # comparing each with each takes minutes


def test_random_bytes_end_in_one_kind_of_error(good, tmp_path):
    """Bytes of header, config and tokenizer changed at random: loaded or refused, never anything else."""
    folder, rng = tmp_path / "f", torch.Generator().manual_seed(0)
    shutil.copytree(good / "llama", folder)
    messages = []
    for name, span in (("model.safetensors", 1600), ("config.json", 900), ("tokenizer.json", 900)):
        path = folder / name
        sound = path.read_bytes()
        for _ in range(150):
            at, value = (int(torch.randint(n, (), generator=rng)) for n in (min(span, len(sound)), 256))
            path.write_bytes(sound[:at] + bytes([value]) + sound[at + 1 :])
            try:
                load_causal_lm(folder)
            except CheckpointError as e:
                messages.append(str(e))
        path.write_bytes(sound)
    assert len(messages) > 100
    assert all(str(folder) in message and "\n" not in message for message in messages)
