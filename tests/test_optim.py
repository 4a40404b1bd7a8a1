"""AdamW by hand, its groups, schedules at their corners, clipping."""

import math

import pytest
import torch
from tolerance import assert_close, fp32

from minirlhf.optim import adamw, clip_model, lr_factor, parameter_groups, set_lr


def layer():
    torch.manual_seed(0)
    return torch.nn.Linear(2, 2)


def test_three_steps_of_adamw_by_hand():
    """m ← β₁m + (1-β₁)g, v ← β₂v + (1-β₂)g², p ← p - lr·wd·p - lr·m̂/(√v̂ + eps); no decay for the bias."""
    lr, wd, (b1, b2), eps = 0.1, 0.05, (0.9, 0.99), 1e-6
    model = layer()
    optimizer = adamw(model.named_parameters(), lr=lr, weight_decay=wd, betas=(b1, b2), eps=eps)
    p = {n: [float(x) for x in t.detach().flatten()] for n, t in model.named_parameters()}
    m, v = ({n: [0.0] * len(x) for n, x in p.items()} for _ in range(2))
    for step in (1, 2, 3):
        for i, t in enumerate(model.parameters()):
            t.grad = torch.full_like(t, 0.3 * step - i)
        optimizer.step()
        for i, (name, values) in enumerate(p.items()):
            g = 0.3 * step - i
            for k in range(len(values)):
                m[name][k] = b1 * m[name][k] + (1 - b1) * g
                v[name][k] = b2 * v[name][k] + (1 - b2) * g * g
                values[k] -= lr * (wd if name == "weight" else 0.0) * values[k]
                values[k] -= lr * (m[name][k] / (1 - b1**step)) / (math.sqrt(v[name][k] / (1 - b2**step)) + eps)
    for name, t in model.named_parameters():
        assert_close(t.detach().flatten(), p[name], fp32)


def test_matrices_decay_and_vectors_do_not():
    model = torch.nn.ModuleDict({"a": torch.nn.Linear(3, 4), "n": torch.nn.LayerNorm(4), "e": torch.nn.Embedding(5, 3)})
    groups = parameter_groups(model.named_parameters(), 0.1)
    assert [g["weight_decay"] for g in groups] == [0.1, 0.0]
    assert {tuple(p.shape) for p in groups[0]["params"]} == {(4, 3), (5, 3)}
    assert {tuple(p.shape) for p in groups[1]["params"]} == {(4,)}


def test_frozen_and_shared_parameters():
    model = layer()
    model.bias.requires_grad_(False)
    named = [*model.named_parameters(), ("again", model.weight)]
    groups = parameter_groups(named, 0.1)
    assert len(groups) == 1
    assert len(groups[0]["params"]) == 1


@pytest.mark.parametrize(
    ("kind", "step", "expected"),
    [
        ("linear", 1, 0.25), ("linear", 4, 1.0), ("linear", 8, 0.5), ("linear", 12, 0.0),
        ("cosine", 2, 0.5), ("cosine", 4, 1.0), ("cosine", 8, 0.5), ("cosine", 12, 0.0),
        ("cosine", 6, 0.5 * (1 + math.cos(math.pi / 4))),
        ("constant", 3, 0.75), ("constant", 4, 1.0), ("constant", 12, 1.0),
    ],
)  # fmt: skip
def test_schedules_with_four_of_twelve_steps_of_warm_up(kind, step, expected):
    assert lr_factor(step, kind=kind, warmup=4, total=12) == pytest.approx(expected, abs=1e-15)


@pytest.mark.parametrize("kind", ["linear", "cosine"])
def test_schedules_end_at_a_share_of_the_peak(kind):
    assert lr_factor(12, kind=kind, warmup=0, total=12, final=0.1) == pytest.approx(0.1)
    assert lr_factor(6, kind=kind, warmup=0, total=12, final=0.1) == pytest.approx(0.55)
    assert lr_factor(99, kind=kind, warmup=0, total=12, final=0.1) == pytest.approx(0.1)  # never rises again


def test_a_warm_up_as_long_as_the_run():
    assert [lr_factor(s, kind="linear", warmup=3, total=3) for s in (1, 2, 3)] == [1 / 3, 2 / 3, 1.0]
    assert lr_factor(1, kind="cosine", warmup=1, total=1) == 1.0


def test_every_group_has_the_rate():
    optimizer = adamw(layer().named_parameters(), lr=1.0, weight_decay=0.1, betas=(0.9, 0.99), eps=1e-8)
    set_lr(optimizer, 0.125)
    assert [g["lr"] for g in optimizer.param_groups] == [0.125, 0.125]


def test_clipping_scales_to_the_norm_and_tells_what_it_was():
    model = layer()
    model.weight.grad, model.bias.grad = torch.full((2, 2), 3.0), torch.full((2,), 4.0)  # √(36 + 32)
    assert_close(clip_model(model, 1.0), math.sqrt(68.0), fp32)
    assert_close(model.weight.grad, torch.full((2, 2), 3.0 / math.sqrt(68.0)), {"rtol": 1e-5, "atol": 0.0})
    norm = clip_model(model, 100.0)
    assert_close(norm, 1.0, {"rtol": 1e-5, "atol": 0.0})
    assert_close(model.bias.grad, torch.full((2,), 4.0 / math.sqrt(68.0)), {"rtol": 1e-5, "atol": 0.0})
