"""The Triton tier against the torch tier and fp64, in Triton's interpreter or on the GPU; and what the compiler says.

The interpreter proves logic in fp32 (its bf16 is wrong without a word), the compiler that the bf16 code is tensor-core
code that does not spill. Neither proves speed, nor the absence of races: that takes a GPU.
"""

import ast
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from test_ops import ALL, SWITCHES, case, naive_head_stats
from tolerance import assert_close, exact

from minirlhf import ops
from minirlhf.ops import head_stats

triton = pytest.importorskip("triton", reason="the package triton is not installed")
head = pytest.importorskip("minirlhf.kernels.head", exc_type=ModuleNotFoundError)

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SHARED_MEMORY = {80: 166_912, 90: 232_448}  # bytes of shared memory a block may have on A100, H100


@pytest.fixture(autouse=True)
def _interpreter(monkeypatch):
    if DEVICE == "cpu":
        monkeypatch.setenv("TRITON_INTERPRET", "1")
        assert not isinstance(head.forward_kernel, triton.JITFunction), "triton was imported before TRITON_INTERPRET=1"


@pytest.fixture
def small_spans(monkeypatch):
    """Several spans, tiles and programs per row, in shapes that the interpreter runs in a blink."""
    monkeypatch.setattr(head, "SPAN", 128)
    monkeypatch.setattr(head, "BUDGET", 1)
    monkeypatch.setattr(head, "GRADIENT_COLS", 32)


def run(inputs, impl, *, trained=(True, True, True), want=ALL, dtype=torch.float32, **options):
    """Statistics, and gradients of the trained ones of hidden, weight, bias, for different weights on each output."""
    hidden, weight, targets, bias, ref_hidden, ref_weight = (
        x if x is None else x.to(DEVICE, dtype if x.is_floating_point() else x.dtype, copy=True) for x in inputs
    )
    leaves = [x for x, on in zip((hidden, weight, bias), trained, strict=True) if on and x is not None]
    for x in leaves:
        x.requires_grad_()
    refs = {"ref_hidden": ref_hidden, "ref_weight": ref_weight} if "kl" in want else {}
    stats = head_stats(hidden, weight, targets, bias=bias, want=want, impl=impl, **refs, **options)
    stats = [x for x in stats if x is not None]
    slopes = torch.linspace(0.5, 1.5, len(hidden), device=DEVICE, dtype=dtype)  # another upstream gradient in each row
    loss = sum((i + 1) * (x * slopes).sum() for i, x in enumerate(stats))
    grads = torch.autograd.grad(loss, leaves) if leaves else ()
    return [x.detach().cpu() for x in (*stats, *grads)]


def assert_same(inputs, **options):
    """As near to fp64 as the torch tier is, or nearly: errors of sums in another order, never of another formula."""
    truth = run(inputs, "torch", dtype=torch.float64, **options)
    for i, (actual, plain, true) in enumerate(
        zip(run(inputs, "triton", **options), run(inputs, "torch", **options), truth, strict=True)
    ):
        assert actual.dtype == plain.dtype == torch.float32
        assert actual.shape == true.shape
        scale = max(1.0, float(true.abs().max())) if true.numel() else 1.0
        error = float((actual - true).abs().max()) if true.numel() else 0.0
        assert error <= 2 * float((plain - true).abs().max() if true.numel() else 0.0) + 2e-6 * scale, (i, error)


# ---- the same function ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("temperature", "softcap", "with_bias", "own_ref_weight"), SWITCHES)
def test_equals_the_torch_tier(small_spans, temperature, softcap, with_bias, own_ref_weight):
    hidden, weight, targets, bias, ref_hidden, ref_weight = case(9, 5, 131)
    refs = (ref_hidden, ref_weight) if own_ref_weight else (hidden.flip(0), None)
    assert_same((hidden, weight, targets, bias if with_bias else None, *refs), temperature=temperature, softcap=softcap)


@pytest.mark.parametrize("want", [(n,) for n in ALL] + [("entropy", "logprobs"), ("lse", "kl"), ALL[::-1]])
@pytest.mark.parametrize("trained", [(1, 0, 0), (0, 1, 0), (0, 0, 1), (1, 1, 0), (1, 1, 1), (0, 0, 0)])
def test_every_combination_of_outputs_and_gradients(small_spans, want, trained):
    assert_same(case(7, 6, 70), want=want, trained=trained, temperature=0.7, softcap=2.5)


SHAPES = [(N, C, V) for N in (1, 2, 31) for C in (1, 17, 33) for V in (1, 2, 63, 65, 193)]


@pytest.mark.parametrize(("N", "C", "V"), [*SHAPES, (0, 3, 7), (129, 32, 64), (5, 64, 2000)])
def test_odd_shapes(small_spans, N, C, V):
    assert_same(case(N, C, V))


def test_real_spans_and_tiles():
    """The constants that a GPU runs with, more than one span."""
    assert_same(case(3, 7, head.SPAN + 3), want=("logprobs", "entropy", "lse"))


@pytest.mark.parametrize("target", [0, 63, 64, 129])
def test_a_target_at_the_edge_of_a_tile(small_spans, target):
    hidden, weight, targets, *rest = case(4, 5, 130)
    assert_same((hidden, weight, torch.full_like(targets, target), *rest))


@pytest.mark.parametrize("offset", [100.0, -1000.0])
def test_a_common_offset_costs_no_digits(small_spans, offset):
    hidden, weight, targets, bias, ref_hidden, ref_weight = case(4, 5, 130)
    inputs = (hidden, weight, targets, bias.round(decimals=1) + offset, ref_hidden, ref_weight)
    assert_same(inputs, want=("logprobs", "entropy", "kl"))


def test_excluded_tokens(small_spans):
    """A bias of -inf takes tokens out of the distribution, a whole span of them here."""
    hidden, weight, targets, bias, ref_hidden, ref_weight = case(6, 5, 300)
    bias[100:260] = -torch.inf
    targets[:] = torch.tensor([0, 1, 99, 260, 299, 270])
    actual = run((hidden, weight, targets, bias, ref_hidden, ref_weight), "triton", want=("logprobs", "entropy", "lse"))
    keep = torch.cat([torch.arange(100), torch.arange(260, 300)])
    w, b = weight[keep], bias[keep]
    where = torch.searchsorted(keep, targets)
    expected = naive_head_stats(hidden, w, where, b)
    for a, e in zip(actual[:3], expected[:3], strict=True):
        assert_close(a, e.float(), {"rtol": 1e-5, "atol": 1e-5})
    dh, dw, db = actual[3:]
    assert torch.isfinite(dh).all()
    assert dw[100:260].eq(0).all()
    assert db[100:260].eq(0).all()


def test_ignored_rows_give_zero_and_no_gradient(small_spans):
    hidden, weight, targets, bias, ref_hidden, ref_weight = case(9, 5, 70)
    targets[[0, 4, 8]] = -100
    hidden[[0, 4, 8]] = torch.nan
    inputs = (hidden, weight, targets, bias, ref_hidden, ref_weight)
    out = run(inputs, "triton")
    for x in out[:4]:
        assert x[[0, 4, 8]].eq(0).all()
    assert out[4][[0, 4, 8]].eq(0).all()
    assert all(torch.isfinite(x).all() for x in out)
    assert_same(inputs)


def test_all_rows_ignored(small_spans):
    hidden, weight, targets, *rest = case(4, 5, 70)
    for x in run((hidden, weight, torch.full_like(targets, -100), *rest), "triton"):
        assert x.eq(0).all()


def test_the_reference_gets_no_gradient(small_spans):
    hidden, weight, targets, _, _, _ = case(4, 5, 70, dtype=torch.float32)
    hidden, weight, ref = (x.to(DEVICE).requires_grad_() for x in (hidden, weight, hidden.flip(0)))
    head_stats(hidden, weight, targets.to(DEVICE), ref_hidden=ref, want=("kl",), impl="triton").kl.sum().backward()
    assert ref.grad is None
    assert weight.grad is not None


def test_twice_the_same_bits_and_inputs_untouched(small_spans):
    inputs = case(33, 17, 131)
    before = [x.clone() for x in inputs]
    first, second = (run(inputs, "triton", temperature=0.7, softcap=3.0) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(inputs, before, strict=True))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_inputs_give_fp32(small_spans, dtype):
    inputs = [x if x.dtype == torch.int64 else x.to(dtype) for x in case(6, 16, 70)]
    actual, expected = run(inputs, "triton", dtype=dtype), run(inputs, "torch", dtype=torch.float64)
    for a, e in zip(actual[:4], expected[:4], strict=True):
        assert a.dtype == torch.float32
        assert_close(a, e.float(), {"rtol": 2e-5, "atol": 5e-6})
    assert [x.dtype for x in actual[4:]] == [dtype] * 3


def test_fp64_stays_fp64(small_spans):
    inputs = case(5, 4, 70)
    for a, e in zip(run(inputs, "triton", dtype=torch.float64), run(inputs, "torch", dtype=torch.float64), strict=True):
        assert a.dtype == torch.float64
        assert_close(a, e, {"rtol": 1e-12, "atol": 1e-12})


def test_gradients_pass_gradcheck(small_spans):
    hidden, weight, targets, bias, ref_hidden, ref_weight = (x.to(DEVICE) for x in case(3, 2, 5))
    leaves = [x.requires_grad_() for x in (hidden, weight, bias)]

    def stats(hidden, weight, bias):
        return tuple(head_stats(hidden, weight, targets, bias=bias, ref_hidden=ref_hidden, ref_weight=ref_weight,
                                temperature=0.7, softcap=2.5, want=ALL, impl="triton"))  # fmt: skip

    assert torch.autograd.gradcheck(stats, leaves, fast_mode=True)


def test_spans_hold_whole_tiles():
    for dtype in (torch.bfloat16, torch.float32, torch.float64):
        for capability in (0, 80, 90):
            for plain, kl in ((True, False), (False, False), (False, True)):
                assert head.SPAN % head.forward_tile(dtype, capability, plain=plain, kl=kl).cols == 0


@pytest.mark.parametrize("N", [0, 1, 8192, 10**6])
def test_vocabulary_tiles_cover_every_column_once(N):
    for V in (1, 512, 513, 50257, 250880):
        tiles = head._vocabulary_tiles(N, V)
        assert [tiles[0].start, *(t.stop for t in tiles)] == [*(t.start for t in tiles), V]
        assert all(t.stop - t.start <= max(512, head.BUDGET // (4 * max(N, 1))) for t in tiles)


# ---- the switch -----------------------------------------------------------------------------------------------------


def child(code, **env):
    """A fresh Python without the interpreter: stdout's last line."""
    clean = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | {"OMP_NUM_THREADS": "1"} | env
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=clean)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip().splitlines()[-1]


CALL = """
import torch
from minirlhf.ops import head_stats
try:
    print(head_stats(torch.zeros(1, 2), torch.zeros(3, 2), torch.zeros(1, dtype=torch.long), impl="triton").logprobs[0])
except RuntimeError as error:
    print(error)
"""


@pytest.mark.skipif(DEVICE == "cuda", reason="there is a GPU")
def test_without_gpu_or_interpreter_the_error_names_both():
    message = child(CALL)
    assert "CUDA" in message
    assert "TRITON_INTERPRET=1" in message


@pytest.mark.skipif(DEVICE == "cuda", reason="there is a GPU")
def test_the_interpreter_asked_for_too_late():
    message = child(f"import triton.language, os; os.environ['TRITON_INTERPRET'] = '1'{CALL}")
    assert "TRITON_INTERPRET=1 before Python starts" in message


def test_the_interpreter_asked_for_in_time():
    assert "-1.09" in child(CALL, TRITON_INTERPRET="1")


# ---- the compiler ---------------------------------------------------------------------------------------------------


CASES = [
    (kernel, capability, dtype, variant)
    for kernel in ("forward_kernel", "gradient_kernel")
    for capability in (80, 90)
    for dtype, variants in (
        ("bfloat16", ("plain", "bias_softcap", "kl", "all")),
        ("float16", ("plain",)),
        ("float32", ("plain", "all")),
        ("float64", ("all",)),
    )
    for variant in variants
]


@pytest.fixture(scope="module")
def compiled(tmp_path_factory):
    """Every case, compiled in a process without the interpreter and without what an earlier run left behind."""
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    env |= {"TRITON_CACHE_DIR": str(tmp_path_factory.mktemp("triton")), "TRITON_DEFAULT_FP_FUSION": "1"}
    command = [sys.executable, str(Path(__file__).with_name("aot.py")), json.dumps(CASES)]
    done = subprocess.run(command, capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stderr
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    return {(x["kernel"], x["capability"], x["dtype"], x["variant"]): x for x in lines}


@pytest.mark.parametrize(("kernel", "capability", "dtype", "variant"), CASES)
def test_aot(compiled, kernel, capability, dtype, variant):
    """sm_80 and sm_90: 16-bit products on tensor cores, no spills, shared memory that a block may have."""
    result = compiled[kernel, capability, dtype, variant]
    assert result["target"].startswith(f"sm_{capability}")
    assert result["stack"] == 0
    assert result["shared"] <= SHARED_MEMORY[capability]
    if kernel == "forward_kernel" and dtype in ("bfloat16", "float16"):
        assert result["wgmma" if capability == 90 else "mma"]


def test_aot_covers_every_kernel_that_is_launched():
    """A launch reads NAME[grid](...); NAME must be among the cases."""
    launched = set()
    for path in Path(head.__file__).parent.glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Subscript):
                launched.add(ast.unparse(node.func.value))
    assert launched
    assert launched == {kernel for kernel, *_ in CASES}


def test_head_stats_launches_every_kernel(monkeypatch):
    seen = []
    for name in ("forward_kernel", "gradient_kernel"):
        kernel = getattr(head, name)

        class Spy:
            def __init__(self, name, kernel):
                self.name, self.kernel = name, kernel

            def __getitem__(self, grid):
                seen.append(self.name)
                return self.kernel[grid]

        monkeypatch.setattr(head, name, Spy(name, kernel))
    run(case(3, 4, 9), "triton")
    assert set(seen) == {"forward_kernel", "gradient_kernel"}


def test_auto_is_the_torch_tier_bit_for_bit_without_cuda():
    if DEVICE == "cuda":
        pytest.skip("there is a GPU")
    inputs = case(33, 17, 131)
    for a, e in zip(run(inputs, "auto"), run(inputs, "torch"), strict=True):
        assert_close(a, e, exact)
    assert ops.choose("auto", inputs[0]) is ops._head_stats_torch
