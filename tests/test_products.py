"""Products by oneDNN against torch's own in fp64, and when they are used."""

import pytest
import torch
from tolerance import assert_close, exact, fp32, fp64
from torch.nn import functional as F

from minirlhf import products
from minirlhf.architecture import ACTIVATIONS, ModelConfig
from minirlhf.model import CausalLM
from minirlhf.products import linear, packed, product

needs_mkl = pytest.mark.skipif(not torch.backends.mkl.is_available(), reason="this torch has no MKL")
needs_onednn = pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="this torch has no oneDNN")


@pytest.fixture
def spy(monkeypatch):
    """Shapes of x in every call of oneDNN, on a processor that is not Intel's."""
    seen, body = [], products._onednn
    monkeypatch.setattr(products, "BY_MKL", False)
    monkeypatch.setattr(products, "_onednn", lambda x, *a: (seen.append(tuple(x.shape)), body(x, *a))[1])
    return seen


def tensors(*shape, out, dtype=torch.float32):
    rng = torch.Generator().manual_seed(0)
    return [torch.randn(s, generator=rng, dtype=torch.float64).to(dtype) for s in (shape, (out, shape[-1]), (out,))]


def results(function, inputs, trained=(True, True, True), *, upstream=None):
    leaves = [x.clone().requires_grad_(on) for x, on in zip(inputs, trained, strict=True)]
    y = function(*leaves)
    g = torch.ones((), dtype=y.dtype).expand(y.shape) if upstream is None else upstream.to(y.dtype)
    return [y.detach(), *torch.autograd.grad(y, [x for x in leaves if x.requires_grad], g)]


@needs_onednn
@pytest.mark.parametrize("shape", [(70, 130), (3, 41, 97), (1, 2, 64, 65), (1, 9001), (1025, 32)])
@pytest.mark.parametrize("trained", [(1, 1, 1), (1, 0, 0), (0, 1, 0), (0, 0, 1)])
@pytest.mark.parametrize("own_gradient", [False, True])
def test_as_exact_as_torch(spy, shape, trained, own_gradient):
    """Values and gradients: at most twice torch's own error against fp64, also for a stride-0 upstream gradient."""
    inputs = tensors(*shape, out=129)
    trained = [bool(on) for on in trained]
    g = tensors(*shape[:-1], 129, out=1)[0] if own_gradient else None
    ours, plain, truth = (
        results(f, [x.to(dtype) for x in inputs], trained, upstream=g)
        for f, dtype in ((linear, torch.float32), (F.linear, torch.float32), (F.linear, torch.float64))
    )
    assert spy
    for a, b, t in zip(ours, plain, truth, strict=True):
        assert a.dtype == torch.float32
        assert a.shape == t.shape
        assert float((a - t).abs().max()) <= 2 * float((b - t).abs().max()) + 2e-6 * float(t.abs().max())


@needs_onednn
def test_twice_the_same_bits_and_the_same_with_and_without_gradients(spy):
    inputs = tensors(64, 256, out=128)
    with torch.no_grad():
        plain = linear(*inputs)
    first, second = results(linear, inputs), results(linear, inputs)
    assert len(spy) > 4
    for a, b in zip(first, second, strict=True):
        assert_close(a, b, exact)
    assert_close(first[0], plain, exact)


@needs_onednn
def test_transposed_and_strided_inputs(spy):
    a, b, _ = tensors(192, 200, out=150)
    for x, y in ((a, b.T), (a.T.contiguous().T, b.T), (a[::2], b.T), (a, b.T.contiguous()), (a[:, :64], b[:, :64].T)):
        assert_close(product(x, y).double(), x.double() @ y.double(), {"rtol": 1e-5, "atol": 2e-5})
    assert len(spy) == 5


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_other_dtypes_are_torchs_own(spy, dtype):
    inputs = tensors(64, 256, out=128, dtype=dtype)
    for a, b in zip(results(linear, inputs), results(F.linear, inputs), strict=True):
        assert_close(a, b, exact)
    if dtype == torch.float64:
        assert_close(product(inputs[0], inputs[1].T), inputs[0] @ inputs[1].T, fp64)
    assert not spy


def test_shapes_that_do_not_fit_are_torchs_to_refuse(spy):
    for function in (
        lambda: linear(torch.ones(64, 99), torch.ones(256, 98)),
        lambda: product(torch.ones(64, 99), torch.ones(98, 256)),
    ):
        with pytest.raises(RuntimeError, match="64x99 and 98x256"):
            function()


def test_small_products_are_torchs_own(spy):
    inputs = tensors(1, 4, out=8)
    assert_close(linear(*inputs), F.linear(*inputs), exact)
    assert linear(torch.zeros(0, 4096), torch.zeros(4096, 4096)).shape == (0, 4096)
    assert not spy


def test_autocast_is_torchs_own(spy):
    x, w, b = tensors(64, 256, out=128)
    with torch.autocast("cpu", torch.bfloat16):
        assert linear(x, w, b).dtype == torch.bfloat16
    assert not spy


@needs_onednn
def test_turned_off_it_changes_no_more_than_rounding(spy):
    config = ModelConfig(vocab_size=512, n_layer=2, n_head=4, d_model=128, max_seq_len=64)
    model = CausalLM(config, rng=torch.Generator().manual_seed(0))
    ids = torch.randint(512, (8, 64), generator=torch.Generator().manual_seed(1))
    fast = model(ids).detach()
    used = len(spy)
    with torch.backends.mkldnn.flags(enabled=False):
        plain = model(ids).detach()
    assert used == len(spy) == 2 * 4 + 1
    assert_close(fast, plain, {"rtol": 1e-5, "atol": 2e-6})


@needs_onednn
@pytest.mark.parametrize("bias", [
    torch.arange(256.0)[::2], torch.ones(1).expand(128), torch.ones(1), torch.tensor(2.0), torch.arange(128.0)
])  # fmt: skip
def test_any_bias_that_torch_takes(bias):
    x, w, _ = tensors(64, 256, out=128)
    assert_close(linear(x, w, bias), F.linear(x, w, bias), fp32)
    if bias.shape == (128,):
        assert_close(packed(w, bias, torch.float32, 64)(x), F.linear(x, w, bias), fp32)


def test_whose_processor_it_is(tmp_path, monkeypatch):
    for maker, expected in (("AuthenticAMD", False), ("GenuineIntel", torch.backends.mkl.is_available())):
        (tmp_path / "cpuinfo").write_text(f"processor\t: 0\nvendor_id\t: {maker}\n")
        assert products.intel(tmp_path / "cpuinfo") is expected
        monkeypatch.setattr("platform.processor", lambda maker=maker: f"Family 6 Model 143, {maker}")
        assert products.intel(tmp_path / "none") is expected


@needs_onednn
def test_on_intel_torch_keeps_all_but_logits(spy, monkeypatch):
    monkeypatch.setattr(products, "BY_MKL", True)
    x, w, b = tensors(64, 256, out=128)
    for a, c in zip(results(linear, (x, w, b)), results(F.linear, (x, w, b)), strict=True):
        assert_close(a, c, exact)
    assert_close(product(x, w.T), x @ w.T, exact)
    assert not spy
    linear(x, w, alike=True)
    assert spy == [(64, 256)]


@needs_onednn
@needs_mkl
@pytest.mark.parametrize(("by_mkl", "dtype", "called"), [
    (False, torch.float32, "mkldnn::_linear_pointwise"), (True, torch.float32, "mkl::_mkl_linear"),
    (True, torch.bfloat16, "mkldnn::_linear_pointwise"),
])  # fmt: skip
def test_whose_layout_it_is(by_mkl, dtype, called, monkeypatch):
    monkeypatch.setattr(products, "BY_MKL", by_mkl)
    x, w, b = tensors(16, 256, out=512, dtype=dtype)
    ready = packed(w, b, dtype, 16)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as seen:
        ready(x)
    assert called in {event.name for event in seen.events()}


@needs_onednn
@pytest.mark.parametrize("by_mkl", [False, pytest.param(True, marks=needs_mkl)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("act", [*ACTIVATIONS.values(), torch.tanh])
def test_an_activation_in_the_same_call(act, dtype, by_mkl, monkeypatch):
    """What the function makes of the product, in fp64 of the same numbers; for other rows and unknown ones too."""
    monkeypatch.setattr(products, "BY_MKL", by_mkl)
    x, w, b = tensors(16, 1, 256, out=512, dtype=dtype)
    truth = F.linear(x.double(), w.double(), b.double())
    near = {"rtol": 1e-5, "atol": 2e-5} if dtype == torch.float32 else {"rtol": 1e-2, "atol": 1e-3}
    for then, expected in ((None, truth), (act, act(truth))):
        call = packed(w, b, dtype, 16, then)
        assert call is not None
        for given in (x, x.double()):  # rounded to the dtype first
            for rows in (slice(16), slice(3, 7), slice(1)):
                made = call(given[rows])
                assert made.dtype == dtype
                assert_close(made.double(), expected[rows], near)
        many = call(x.expand(3, 16, 1, 256))
        assert_close(many.double(), expected.expand(3, 16, 1, 512), near)
