"""The recorded step against the plain one. Without a GPU a tape stands for a CUDA graph: what it holds runs again on
the same memory, Python does not."""

import sys
from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import torch
from test_generate import PROMPTS, lm, padded, run, streams
from test_model import FAMILY, make
from tolerance import assert_close, bf16, exact, fp32, fp64
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from minirlhf.lora import LoRAConfig, adapter_parameters, add_adapter
from minirlhf.model import Cache, CausalLM
from minirlhf.steps import FixedCache, Replayed, Steps, decoding, recorded, replayable

steps_module = sys.modules["minirlhf.steps"]
# Kernels after which Python waits for the device, which a recording cannot.
WAITS = {"_local_scalar_dense", "nonzero", "equal", "_unique2", "unique_dim", "lift_fresh"}


class Tape(TorchDispatchMode):
    """Every call of a kernel, to be run again on the tensors it had, into the tensors it made."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        with self:  # in inference mode calls come whole; their parts come here again
            out = func.decompose(*args, **(kwargs or {}))
        if out is not NotImplemented:
            return out
        masked = any(t.dtype == torch.bool for t in tree_leaves(args[1:]) if isinstance(t, torch.Tensor))
        if func.overloadpacket.__name__ in WAITS or (func.overloadpacket.__name__ == "index" and masked):
            raise RuntimeError(f"{func} is not permitted when a stream is capturing")
        out = func(*args, **(kwargs or {}))
        self.calls.append((func, args, kwargs or {}, out))
        return out

    def replay(self):
        for func, args, kwargs, out in self.calls:
            for old, new in zip(tree_leaves(out), tree_leaves(func(*args, **kwargs)), strict=True):
                if isinstance(old, torch.Tensor) and old.data_ptr() != new.data_ptr():
                    old.copy_(new)


@pytest.fixture
def tapes(monkeypatch):
    """Every step is recorded, on the tapes of this list."""
    made = []

    def record(step, device):
        assert device.type == "cpu"
        step()
        with Tape() as tape:
            result = step()
        made.append(tape)
        return lambda: (tape.replay(), result)[1]

    monkeypatch.setattr(steps_module, "recorded", record)
    monkeypatch.setattr(steps_module, "replayable", lambda *_: True)
    return made


@FAMILY
@pytest.mark.parametrize("do_sample", [True, False])
def test_a_recorded_step_gives_the_same_answers(tapes, monkeypatch, name, do_sample):
    """Left padding, windows, ALiBi, rotation, groups, repeated prompts, and rows that end one after the other."""
    monkeypatch.setattr(steps_module, "WORTH_RECORDING", 1)
    results = []
    for _ in range(2):
        results.append(run(make(name), PROMPTS, eos_token_id=None, num_return_sequences=3, max_new_tokens=6,
                           do_sample=do_sample, rng=streams(15), stop=lambda said: sum(said) % 4 == 0))  # fmt: skip
        monkeypatch.setattr(steps_module, "replayable", lambda *_: False)
    got, expected = results
    assert torch.equal(got.tokens, expected.tokens)
    assert torch.equal(got.mask, expected.mask)
    assert_close(got.logprobs, expected.logprobs, fp64)
    assert 1 <= len(tapes) <= 4  # of 15 rows, then of 7 at most, 3, 1
    assert not do_sample or len(set(got.mask.sum(1).tolist())) > 3


def begun(kind, model, ids, mask, R):
    """Decoding of this kind after these prompts."""
    cache = Cache(model.config, len(ids), ids.shape[1] + R, dtype=torch.float64)
    model.hidden(ids, mask, cache=cache)
    return kind(model, cache, torch.cat([mask, mask.new_ones(len(mask), R)], 1))


@torch.inference_mode()
def test_rows_that_end_leave_by_halves(tapes):
    """And not at all where too few steps are left."""
    model, (ids, mask) = lm("mistral"), padded([[3, 4], [5], [6, 7], [8], [2, 3, 4], [5, 6], [7], [8, 9]])
    plain, recording = (begun(kind, model, ids, mask, 21) for kind in (Steps, Replayed))
    rows = []
    for left in (8, 7, 5, 4, 3, 2, 2, 1):
        if left < len(plain.real):
            index = torch.arange(len(plain.real))[-left:]
            plain.keep(index)
            recording.keep(index)
        token = torch.arange(left) + 2
        assert_close(recording(token), plain(token), fp64)
        rows.append(len(recording.token))
    assert rows == [8, 8, 8, 4, 4, 2, 2, 2]
    assert len(tapes) == 3


def test_a_step_is_the_tape_and_nothing_else(tapes, monkeypatch):
    """The model is called for the prompts, to warm up, and to record."""
    calls, hidden = [], CausalLM.hidden
    monkeypatch.setattr(CausalLM, "hidden", lambda self, *a, **k: (calls.append(1), hidden(self, *a, **k))[1])
    run(lm(), PROMPTS, rng=streams(5), eos_token_id=None, max_new_tokens=20)
    assert (len(tapes), len(calls)) == (1, 3)


def test_memory_that_was_never_written_is_not_seen(tapes, monkeypatch):
    """A cache is made without being filled; NaN there would reach every row, 0 times or not."""
    empty = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *a, **k: empty(*a, **k).fill_(torch.nan))
    got = run(lm("bloom"), PROMPTS, rng=streams(5))
    assert got.logprobs.isfinite().all()


def test_an_adapter_is_recorded(tapes, monkeypatch):
    model = lm("llama", torch.float32)
    add_adapter(model, "policy", LoRAConfig(r=2, alpha=4, dropout=0.5), rng=torch.Generator().manual_seed(0))
    with torch.no_grad():
        for p in adapter_parameters(model, "policy").values():
            p.add_(0.1)
    got = run(model.train(), PROMPTS, rng=streams(5))
    assert len(tapes) >= 1
    monkeypatch.setattr(steps_module, "replayable", lambda *_: False)
    expected = run(model, PROMPTS, rng=streams(5))
    assert torch.equal(got.tokens, expected.tokens)
    assert_close(got.logprobs, expected.logprobs, fp32)


def test_autocast_and_a_cache_of_another_type(tapes, monkeypatch):
    results = []
    for _ in range(2):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            results.append(run(lm("llama", torch.float32), PROMPTS, rng=streams(5), max_new_tokens=3))
        monkeypatch.setattr(steps_module, "replayable", lambda *_: False)
    assert tapes
    assert_close(*(r.logprobs[:, 0] for r in results), exact)
    assert_close(*(r.logprobs[r.mask.all(1)] for r in results), bf16)


@pytest.mark.parametrize("failing", [1, 2, 3])
def test_what_cannot_be_recorded_is_done_step_by_step(tapes, monkeypatch, failing):
    """The first recording, or a later one; what was written before stays."""
    record, tries = steps_module.recorded, []
    monkeypatch.setattr(steps_module, "WORTH_RECORDING", 1)

    def fails(step, device):
        tries.append(1)
        if len(tries) < failing:
            return record(step, device)

        def broken():
            return step() * torch.ones(1).item()

        return record(broken, device)

    monkeypatch.setattr(steps_module, "recorded", fails)
    monkeypatch.setattr(steps_module, "GIVEN_UP", set())
    settings = {"eos_token_id": None, "num_return_sequences": 2, "stop": lambda said: sum(said) % 5 == 0}
    with pytest.warns(UserWarning, match="without CUDA graphs from now on.* recorded: aten._local_scalar_dense"):
        got = run(lm("gpt2"), PROMPTS, rng=streams(10), max_new_tokens=20, **settings)
    assert {torch.device("cpu")} == steps_module.GIVEN_UP
    assert len(tries) == failing
    monkeypatch.setattr(steps_module, "replayable", lambda *_: False)
    expected = run(lm("gpt2"), PROMPTS, rng=streams(10), max_new_tokens=20, **settings)
    assert torch.equal(got.tokens, expected.tokens)
    assert_close(got.logprobs, expected.logprobs, fp64)


def test_a_fault_of_ours_is_no_reason_to_go_on(tapes, monkeypatch):
    monkeypatch.setattr(steps_module, "recorded", lambda *_: exec("assert False"))
    with pytest.raises(AssertionError):
        run(lm("gpt2"), PROMPTS, rng=streams(5))


@pytest.mark.parametrize("recording", [True, False])
def test_steps_use_the_prepared_model(tapes, monkeypatch, recording):
    """Whose modules are not called as nn.Module is."""
    monkeypatch.setattr(steps_module, "replayable", lambda *_: recording)
    model = lm("llama")
    monkeypatch.setattr(nn.Module, "__call__", None)
    run(model, PROMPTS, rng=streams(5))
    assert bool(tapes) is recording


def test_what_costs_nothing_but_time_and_memory():
    model, real = lm("gpt2"), torch.ones(2, 9, dtype=torch.bool)
    cache = Cache(model.config, 2, 9)
    assert decoding(model, model, cache, real).real is None
    assert FixedCache(cache).keys[0] is cache.keys[0]
    real[0, 0] = False
    assert decoding(model, model, cache, real).real is real


# ---- when, and how --------------------------------------------------------------------------------------------------


def on_gpu(*, S=24, device="cuda"):
    """As much as `replayable` asks of the mask of real tokens."""
    return SimpleNamespace(device=torch.device(device), shape=(3, S))


def may(model, **kwargs):
    cache = SimpleNamespace(length=8)
    return replayable(model, cache, on_gpu(**kwargs))


def test_recorded_on_a_gpu_where_it_pays(monkeypatch):
    model = lm("gpt2")
    assert may(model)
    with monkeypatch.context() as patch:
        patch.setattr(steps_module, "GIVEN_UP", {torch.device("cuda")})
        assert not may(model)
    assert not may(model, device="cpu")
    assert not may(model, S=23)  # 15 new tokens
    assert may(lm("gpt2", max_seq_len=24))
    assert not may(lm("gpt2", max_seq_len=23))
    assert may(lm("llama", max_seq_len=23))


def test_recorded_only_if_python_does_nothing_else():
    def watch(*_):
        return None

    model = lm("llama")
    add_adapter(model, "policy", LoRAConfig(r=2, alpha=4), rng=torch.Generator())
    assert may(model)
    for module in model.modules():
        for register in (module.register_forward_hook, module.register_forward_pre_hook):
            handle = register(watch)
            assert not may(model)
            handle.remove()
    assert may(model)
    model.trunk.blocks[0].mlp.act = nn.SiLU()
    assert not may(model)


class Gpu:
    """What `recorded` calls, in order; one of them may fail."""

    def __init__(self, fault):
        self.fault, self.seen, self.result = fault, [], torch.ones(1)

    def happens(self, what):
        self.seen.append(what)
        if self.seen.count(what) == self.fault.get(what):
            raise RuntimeError(what)

    def stream(self, name):
        return SimpleNamespace(
            name=name, wait_stream=lambda other: self.happens(f"{name} waits for {other.name}"),
            synchronize=lambda: self.happens(f"{name} is done"),
        )  # fmt: skip

    def graph(self):
        return SimpleNamespace(
            capture_begin=lambda capture_error_mode: self.happens(f"begin {capture_error_mode}"),
            capture_end=lambda: self.happens("end"), replay=lambda: self.happens("replay"),
        )  # fmt: skip

    @contextmanager
    def within(self, what):
        self.happens(f"in {getattr(what, 'name', what)}")
        try:
            yield
        finally:
            self.happens("out")

    def step(self):
        self.happens("step")
        return self.result


@pytest.mark.parametrize("fault", [{}, {"step": 1}, {"step": 3}, {"end": 1}])
def test_how_a_graph_is_recorded(monkeypatch, fault):
    """Warm up beside the stream in use, record, and in any case wait for each other; then replay alone."""
    gpu, device = Gpu(fault), torch.device("cuda:1")
    fakes = {"Stream": lambda device: gpu.stream(f"side of {device}"), "current_stream": lambda: gpu.stream("current")}
    for name, value in (fakes | {"CUDAGraph": gpu.graph, "device": gpu.within, "stream": gpu.within}).items():
        monkeypatch.setattr(torch.cuda, name, value)
    steps_module.side_stream.cache_clear()
    before = ["in cuda:1", "side of cuda:1 waits for current", "in side of cuda:1", "step"]
    recording = ["step", "side of cuda:1 is done", "begin thread_local", "step", "end"]
    after = ["out", "current waits for side of cuda:1", "out"]
    if fault:
        with pytest.raises(RuntimeError, match=next(iter(fault))):
            recorded(gpu.step, device)
        assert gpu.seen == before + (recording if fault != {"step": 1} else []) + after
    else:
        replay = recorded(gpu.step, device)
        assert gpu.seen == before + recording + after
        assert replay() is gpu.result
        assert gpu.seen[-1] == "replay"
    assert steps_module.side_stream(device) is steps_module.side_stream(device)
    steps_module.side_stream.cache_clear()
