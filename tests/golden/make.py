"""Write the golden numbers beside this file. Never imports minirlhf: an expected value comes from elsewhere.

    python tests/golden/make.py            write every file; needs torch, numpy and the source of trl==0.11.4
    python tests/golden/make.py --check    write nothing; exit 1 where a file differs from what would be written

Sources, in each file's `source`: "hand" (the arithmetic is in `provenance`), "closed form" (40-digit decimal arithmetic
below), "library" (another package's function, with its version, on inputs drawn from a seed). null in an input is NaN.
"""

import argparse
import ast
import importlib.metadata
import importlib.util
import json
import sys
from decimal import Decimal, getcontext
from fractions import Fraction
from itertools import combinations
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
import torch.nn.functional as F

HERE = Path(__file__).parent
COMMAND = "python tests/golden/make.py"
TRL = "trl==0.11.4"
TORCH = f"torch=={torch.__version__.split('+')[0]}"
NUMPY = f"numpy=={np.__version__}"
NAN = None
getcontext().prec = 40
files = {}


def golden(name, function, source, provenance, inputs, expected, *, convention="", gradient=None, tolerance="fp64"):
    """`inputs`: parameter → value; `expected`: a value, or result → value; `gradient`: input → value, of the sum of all
    results that are expected."""
    assert name not in files, name
    record = {"function": function, "source": source, "provenance": provenance, "command": COMMAND}
    record |= {"convention": convention} if convention else {}
    record |= {"inputs": plain(inputs), "expected": plain(expected)}
    record |= {"gradient": plain(gradient)} if gradient else {}
    files[name] = record | {"tolerance": tolerance}


def plain(x):
    """Tensors, decimals, fractions → what JSON holds."""
    if isinstance(x, dict):
        return {k: plain(v) for k, v in x.items()}
    if isinstance(x, (list, tuple)):
        return [plain(v) for v in x]
    if isinstance(x, (Decimal, Fraction, np.floating)):
        return float(x)
    if isinstance(x, (torch.Tensor, np.ndarray)):
        return plain(x.tolist())
    return x


# ---- decimal arithmetic ---------------------------------------------------------------------------------------------


def D(x):
    return Decimal(str(x))


def sigmoid(x):
    return 1 / (1 + (-x).exp())


def tanh(x):
    return 2 * sigmoid(2 * x) - 1


def softmax_row(logits, target, tau=1, ref=None):
    """Everything about one row: formulas of the definition, in 40 digits."""
    z = [D(x) / D(tau) for x in logits]
    lse = sum(x.exp() for x in z).ln()
    logp = [x - lse for x in z]
    p = [x.exp() for x in logp]
    entropy = -sum(a * b for a, b in zip(p, logp, strict=True))
    row = {"logprobs": logp[target], "entropy": entropy, "lse": lse}
    slopes = {
        "logprobs": [((i == target) - a) / D(tau) for i, a in enumerate(p)],
        "entropy": [-a * (b + entropy) / D(tau) for a, b in zip(p, logp, strict=True)],
        "lse": [a / D(tau) for a in p],
    }
    if ref is not None:
        y = [D(x) / D(tau) for x in ref]
        logq = [x - sum(v.exp() for v in y).ln() for x in y]
        row["kl"] = sum(a * (b - c) for a, b, c in zip(p, logp, logq, strict=True))
        slopes["kl"] = [a * (b - c - row["kl"]) / D(tau) for a, b, c in zip(p, logp, logq, strict=True)]
    return row, slopes


# ---- trl 0.11.4, its own lines --------------------------------------------------------------------------------------


def peel(file, *names):
    """Functions of trl's source, executed without trl's imports (which ask for packages that have nothing to do with
    them). `Class.method` names a method, which then takes a stand-in as self."""
    assert importlib.metadata.version("trl") == TRL.split("==")[1], importlib.metadata.version("trl")
    path = Path(importlib.util.find_spec("trl").submodule_search_locations[0]) / file
    tree = ast.parse(path.read_text())
    found = {}
    for node in tree.body:
        if isinstance(node, ast.ClassDef):
            found[node.name] = node
            found |= {f"{node.name}.{n.name}": n for n in node.body if isinstance(n, ast.FunctionDef)}
        elif isinstance(node, ast.FunctionDef):
            found[node.name] = node
    for name in names:
        node = found[name]
        node.decorator_list = []
        code = "from __future__ import annotations\n" + ast.unparse(node)  # annotations stay unread
        exec(compile(code, f"{TRL}:{file}:{name}", "exec"), TRL_NAMES)
    return [TRL_NAMES[name.split(".")[-1]] for name in names]


TRL_NAMES = {"torch": torch, "F": F, "nn": torch.nn, "np": np, "flatten_dict": lambda stats: stats}
CORE = ("masked_mean", "masked_var", "masked_whiten", "clip_by_value", "logprobs_from_logits", "entropy_from_logits")


def ppo_trainer(**config):
    """What PPOTrainer's methods read of self."""
    methods = ("compute_rewards", "_kl_penalty", "compute_advantages", "loss")
    found = dict(zip(methods, peel("trainer/ppo_trainer.py", *(f"PPOTrainer.{m}" for m in methods)), strict=True))
    defaults = {"kl_penalty": "kl", "whiten_rewards": False, "gamma": 1.0, "lam": 0.95, "cliprange": 0.2}
    defaults |= {"cliprange_value": 0.2, "vf_coef": 1.0, "ratio_threshold": float("inf")}
    trainer = SimpleNamespace(config=SimpleNamespace(**defaults | config), kl_ctl=SimpleNamespace(value=0.2))
    trainer._kl_penalty = lambda *a: found["_kl_penalty"](trainer, *a)
    for name in ("compute_rewards", "compute_advantages", "loss"):
        setattr(trainer, name, lambda *a, f=found[name]: f(trainer, *a))
    return trainer


def numbers(seed, *shape, scale=1.0):
    """Normal numbers of four decimals, exact in JSON."""
    return torch.tensor(np.round(np.random.default_rng(seed).normal(size=shape) * scale, 4))


def right_padded(*lengths, R):
    return torch.arange(R) < torch.tensor(lengths)[:, None]


def with_grad(*tensors):
    return [t.clone().requires_grad_() for t in tensors]


# ---- masked ---------------------------------------------------------------------------------------------------------


def masked():
    x, mask = [1.0, 2.0, NAN, 4.0], [True, True, False, True]
    golden(
        "keep_hand", "masked.keep", "hand", "NaN stands where the mask is False: 0", {"x": x, "mask": mask},
        [1, 2, 0, 4]
    )  # fmt: skip
    golden("masked_sum_hand", "masked.masked_sum", "hand", "1 + 2 + 4 = 7", {"x": x, "mask": mask}, 7.0)
    golden("masked_mean_hand", "masked.masked_mean", "hand", "7/3", {"x": x, "mask": mask}, Fraction(7, 3))
    golden(
        "masked_mean_count_hand", "masked.masked_mean", "hand",
        "token losses (1, 2, 3) of a step whose other microbatch has one token: (1 + 2 + 3)/4 = 3/2",
        {"x": [1.0, 2.0, 3.0], "mask": [True] * 3, "count": 4}, 1.5, gradient={"x": [0.25] * 3},
        convention="divides by the tokens of the optimizer step, not of the microbatch"
    )  # fmt: skip
    golden(
        "masked_var_hand", "masked.masked_var", "hand", "mean 7/3, ((4/3)² + (1/3)² + (5/3)²)/3 = 14/9",
        {"x": x, "mask": mask}, Fraction(14, 9), convention="divides by n"
    )  # fmt: skip
    golden(
        "masked_var_ddof1_hand", "masked.masked_var", "hand", "the same squares, 42/9, divided by 2: 7/3",
        {"x": x, "mask": mask, "ddof": 1}, Fraction(7, 3), convention="divides by n - 1"
    )  # fmt: skip
    for name, values, center, ddof in (
        ("whiten", [1, 2, 3, 4], True, 0),
        ("whiten_ddof1", [1, 2, 3, 4], True, 1),
        ("whiten_mean_kept", [1, 2, 3, 4], False, 0),
        ("whiten_masked", [1, 2, NAN, 4], True, 0),
        ("whiten_masked_ddof1", [1, 2, NAN, 4], True, 1),
        ("whiten_masked_mean_kept", [1, 2, NAN, 4], False, 0),
    ):
        real = [D(v) for v in values if v is not NAN]
        mean = sum(real) / len(real)
        var = sum((v - mean) ** 2 for v in real) / (len(real) - ddof)
        white = [
            D(0) if v is NAN else (D(v) - mean) / (var + D("1e-8")).sqrt() + (0 if center else mean) for v in values
        ]
        inputs = {"x": [NAN if v is NAN else float(v) for v in values], "mask": [v is not NAN for v in values]}
        golden(
            f"{name}_closed", "masked.whiten", "closed form", "(x - μ)/√(var + 1e-8), in decimal arithmetic",
            inputs | {"center": center, "ddof": ddof}, white, convention=f"ddof {ddof}, padding 0"
        )  # fmt: skip

    x, mask = numbers(1, 6, 9, scale=3) + 2, right_padded(9, 4, 1, 6, 0, 3, R=9)
    inputs = {"x": x, "mask": mask}
    golden("keep_numpy", "masked.keep", "library", f"{NUMPY} np.where", inputs, np.where(mask, x, 0.0))
    kept = np.ma.array(x.numpy(), mask=~mask.numpy())
    golden("masked_sum_numpy", "masked.masked_sum", "library", f"{NUMPY} np.ma.sum", inputs, kept.sum())
    golden("masked_var_numpy", "masked.masked_var", "library", f"{NUMPY} np.ma.var", inputs, kept.var())
    mean, var, whiten = peel("core.py", *CORE)[:3]
    golden(
        "masked_mean_trl", "masked.masked_mean", "library", f"{TRL} trl.core.masked_mean", inputs,
        mean(x, mask.double())
    )  # fmt: skip
    golden(
        "masked_var_trl", "masked.masked_var", "library", f"{TRL} trl.core.masked_var", inputs | {"ddof": 1},
        var(x, mask.double())
    )  # fmt: skip
    for shift in (True, False):
        expected = torch.where(mask, whiten(x, mask.double(), shift_mean=shift), 0.0)
        golden(
            f"whiten_trl{'' if shift else '_mean_kept'}", "masked.whiten", "library",
            f"{TRL} trl.core.masked_whiten(shift_mean={shift})", inputs | {"center": shift, "ddof": 1}, expected,
            convention="trl leaves -μ/σ in the padding, set to 0 here"
        )  # fmt: skip


# ---- ops ------------------------------------------------------------------------------------------------------------


def ops():
    logits, target = [1.0, 2.0, 0.5, -1.0], 1
    one = [[float(i == j) for j in range(4)] for i in range(4)]  # as head weight: u = h
    for tau in (1.0, 0.7):
        row, slopes = softmax_row(logits, target, tau)
        name = f"tau{tau}".replace(".", "_")
        golden(
            f"token_logprobs_{name}_closed", "ops.token_logprobs", "closed form", "z_a - ln Σ e^z, z = logits/τ",
            {"logits": [logits], "targets": [target], "temperature": tau}, [row["logprobs"]],
            gradient={"logits": [slopes["logprobs"]]}
        )  # fmt: skip
        for field in ("logprobs", "entropy", "lse"):
            golden(
                f"head_stats_{field}_{name}_closed", "ops.head_stats", "closed form",
                "the definition, weight = identity",
                {"hidden": [logits], "weight": one, "targets": [target], "temperature": tau, "want": [field]},
                {field: [row[field]]}, gradient={"hidden": [slopes[field]]}
            )  # fmt: skip
    ref = [0.5, -1.0, 2.0, 0.0]
    row, slopes = softmax_row(logits, target, 0.7, ref)
    golden(
        "head_stats_kl_closed", "ops.head_stats", "closed form", "Σ p (ln p - ln q), weight = identity, τ = 0.7",
        {"hidden": [logits], "weight": one, "targets": [target], "temperature": 0.7, "ref_hidden": [ref],
        "want": ["kl"]}, {"kl": [row["kl"]]}, gradient={"hidden": [slopes["kl"]]}
    )  # fmt: skip
    row, _ = softmax_row(logits, target, 1, [0, 0, 0, 0])
    golden(
        "head_stats_kl_uniform_hand", "ops.head_stats", "hand", "against the uniform q: ln 4 - H",
        {"hidden": [logits], "weight": one, "targets": [target], "ref_hidden": [[0.0] * 4], "want": ["kl"]},
        {"kl": [D(4).ln() - row["entropy"]]}
    )  # fmt: skip
    capped = [3 * tanh(D(x) / 3) for x in logits]
    row, slopes = softmax_row(capped, target, 0.7)
    bend = [1 - (v / 3) ** 2 for v in capped]
    golden(
        "head_stats_softcap_closed", "ops.head_stats", "closed form", "z = 3 tanh(u/3)/0.7", {"hidden": [logits],
        "weight": one, "targets": [target], "temperature": 0.7, "softcap": 3.0, "want": ["logprobs"]},
        {"logprobs": [row["logprobs"]]},
        gradient={"hidden": [[a * b for a, b in zip(slopes["logprobs"], bend, strict=True)]]}
    )  # fmt: skip
    golden(
        "head_stats_ignored_hand", "ops.head_stats", "hand",
        "equal logits: log p = -ln 2, H = lse = ln 2; ignored rows 0", {"hidden": [[0.0], [NAN], [0.0]],
        "weight": [[1.0], [2.0]], "targets": [0, -100, 1], "want": ["logprobs", "entropy", "lse"]},
        {"logprobs": [-D(2).ln(), 0, -D(2).ln()], "entropy": [D(2).ln(), 0, D(2).ln()],
        "lse": [D(2).ln(), 0, D(2).ln()]}
    )  # fmt: skip

    logits, targets = numbers(2, 5, 7, 11, scale=3), torch.tensor(np.random.default_rng(3).integers(0, 11, (5, 7)))
    logprobs_from_logits, entropy_from_logits = peel("core.py", *CORE)[-2:]
    golden(
        "token_logprobs_trl", "ops.token_logprobs", "library", f"{TRL} trl.core.logprobs_from_logits",
        {"logits": logits, "targets": targets}, logprobs_from_logits(logits, targets)
    )  # fmt: skip
    hidden, weight, targets = (
        numbers(4, 13, 6),
        numbers(5, 17, 6),
        torch.tensor(np.random.default_rng(6).integers(0, 17, 13)),
    )
    head = {"hidden": hidden, "weight": weight, "targets": targets}
    h, w = with_grad(hidden, weight)
    loss = F.linear_cross_entropy(h, w, targets, reduction="none", options=torch.nn.LinearCrossEntropyOptions())
    (-loss).sum().backward()
    golden(
        "head_stats_logprobs_torch", "ops.head_stats", "library", f"{TORCH} F.linear_cross_entropy, negated",
        head | {"want": ["logprobs"]}, {"logprobs": -loss.detach()}, gradient={"hidden": h.grad, "weight": w.grad}
    )  # fmt: skip
    h, w = with_grad(hidden, weight)
    entropy = entropy_from_logits(h @ w.T / 1.3)
    entropy.sum().backward()
    golden(
        "head_stats_entropy_trl", "ops.head_stats", "library", f"{TRL} trl.core.entropy_from_logits of h Wᵀ/1.3",
        head | {"temperature": 1.3, "want": ["entropy"]}, {"entropy": entropy.detach()},
        gradient={"hidden": h.grad, "weight": w.grad}
    )  # fmt: skip
    bias = numbers(7, 17)
    h, w, b = with_grad(hidden, weight, bias)
    lse = torch.logsumexp(F.linear(h, w, b), -1)
    lse.sum().backward()
    golden(
        "head_stats_lse_torch", "ops.head_stats", "library", f"{TORCH} torch.logsumexp(F.linear(h, W, b))",
        head | {"bias": bias, "want": ["lse"]}, {"lse": lse.detach()},
        gradient={"hidden": h.grad, "weight": w.grad, "bias": b.grad}
    )  # fmt: skip
    ref_hidden, ref_weight = numbers(8, 13, 3), numbers(9, 17, 3)
    h, w = with_grad(hidden, weight)
    logq = (ref_hidden @ ref_weight.T).log_softmax(-1)
    kl = F.kl_div(logq, (h @ w.T).log_softmax(-1), log_target=True, reduction="none").sum(-1)
    kl.sum().backward()
    golden(
        "head_stats_kl_torch", "ops.head_stats", "library", f"{TORCH} F.kl_div(log q, log p, log_target=True)",
        head | {"ref_hidden": ref_hidden, "ref_weight": ref_weight, "want": ["kl"]}, {"kl": kl.detach()},
        gradient={"hidden": h.grad, "weight": w.grad}
    )  # fmt: skip

    x = [D("0.5"), D("-0.5")]
    for kind, values in (
        ("k1", x),
        ("k2", [v * v / 2 for v in x]),
        ("k3", [(-v).exp() - 1 + v for v in x]),
        ("abs", [abs(v) for v in x]),
    ):
        golden(
            f"kl_estimate_{kind}_closed", "ops.kl_estimate", "closed form", "x = ±0.5; x, x²/2, e^(-x) - 1 + x, |x|",
            {"logprobs": [-1.0, -1.5], "ref_logprobs": [-1.5, -1.0], "kind": kind}, values
        )  # fmt: skip
    a, b = numbers(10, 4, 6), numbers(11, 4, 6)
    for kind, theirs in (("k1", "kl"), ("k2", "mse"), ("abs", "abs")):
        golden(
            f"kl_estimate_{kind}_trl", "ops.kl_estimate", "library", f"{TRL} PPOTrainer._kl_penalty({theirs!r})",
            {"logprobs": a, "ref_logprobs": b, "kind": kind}, ppo_trainer(kl_penalty=theirs)._kl_penalty(a, b)
        )  # fmt: skip
    nll = F.poisson_nll_loss(b - a, torch.ones_like(a), log_input=True, reduction="none")
    golden(
        "kl_estimate_k3_torch", "ops.kl_estimate", "library",
        f"{TORCH} F.poisson_nll_loss(-x, 1) - 1 = e^(-x) + x - 1", {"logprobs": a, "ref_logprobs": b, "kind": "k3"},
        nll - 1
    )  # fmt: skip


# ---- advantage ------------------------------------------------------------------------------------------------------


def advantage():
    for name, why, rewards, values, mask, gamma, lam, A in (
        (
            "gae_hand",
            "δ = (-.1, -.1, .7); .7, -.1 + .95·.7 = .565, -.1 + .95·.565 = .43675",
            [0, 0, 1],
            [0.5, 0.4, 0.3],
            [1, 1, 1],
            1.0,
            0.95,
            [0.43675, 0.565, 0.7],
        ),
        (
            "gae_ledger_hand",
            "δ = (.06, .12, .5); .5, .12 + .95·.5 = .595, .06 + .95·.595 = .62525",
            [-0.04, 0.02, 0.8],
            [0.1, 0.2, 0.3],
            [1, 1, 1],
            1.0,
            0.95,
            [0.62525, 0.595, 0.5],
        ),
        (
            "gae_reward_to_go_hand",
            "λ = 1: reward to go 1, less V",
            [0, 0, 1],
            [0.5, 0.4, 0.3],
            [1, 1, 1],
            1.0,
            1.0,
            [0.5, 0.6, 0.7],
        ),
        (
            "gae_one_step_hand",
            "λ = 0: δ = 0 + .4 - .5, 0 + .3 - .4, 1 - .3",
            [0, 0, 1],
            [0.5, 0.4, 0.3],
            [1, 1, 1],
            1.0,
            0.0,
            [-0.1, -0.1, 0.7],
        ),
        ("gae_one_token_hand", ".7 - .2", [0.7], [0.2], [1], 1.0, 0.95, [0.5]),
        (
            "gae_discount_hand",
            "δ = (1 + .9 - .5, .18 - 1, 2 - .2); γλ = .72: 1.8, -.82 + .72·1.8, 1.4 + .72·.476",
            [1, 0, 2],
            [0.5, 1, 0.2],
            [1, 1, 1],
            0.9,
            0.8,
            [1.74272, 0.476, 1.8],
        ),
        (
            "gae_hole_hand",
            "the hole is skipped: δ = (.3 - .5, 1 - .3); .7, -.2 + .95·.7 = .465",
            [0, NAN, 1],
            [0.5, NAN, 0.3],
            [1, 0, 1],
            1.0,
            0.95,
            [0.465, 0, 0.7],
        ),
        (
            "gae_padded_hand",
            "as gae_hand, then padding",
            [0, 0, 1, NAN, 9],
            [0.5, 0.4, 0.3, 9, NAN],
            [1, 1, 1, 0, 0],
            1.0,
            0.95,
            [0.43675, 0.565, 0.7, 0, 0],
        ),
    ):
        returns = [D(a) + D(v) if m else 0 for a, v, m in zip(A, values, mask, strict=True)]
        rewards, values = ([x if x is NAN else float(x) for x in row] for row in (rewards, values))
        golden(
            name, "advantage.gae", "hand", why,
            {"rewards": [rewards], "values": [values], "mask": [[bool(m) for m in mask]], "gamma": gamma, "lam": lam},
            {"advantages": [A], "returns": [returns]}, convention="V = 0 after the last token"
        )  # fmt: skip
    rewards, values, mask = numbers(12, 5, 8), numbers(13, 5, 8), right_padded(8, 3, 1, 5, 7, R=8)
    for gamma, lam in ((1.0, 0.95), (0.9, 0.7)):
        peel("core.py", *CORE)
        used, _, returns = ppo_trainer(gamma=gamma, lam=lam).compute_advantages(values, rewards, mask)
        golden(
            f"gae_trl_{gamma}_{lam}".replace(".", "_"), "advantage.gae", "library",
            f"{TRL} PPOTrainer.compute_advantages: returns, and returns - values",
            {"rewards": rewards, "values": values, "mask": mask, "gamma": gamma, "lam": lam},
            {"advantages": torch.where(mask, returns - used, 0.0), "returns": torch.where(mask, returns, 0.0)}
        )  # fmt: skip

    s = [1, 2, 3, 6]
    others = [Fraction(s_i) - Fraction(sum(s) - s_i, 3) for s_i in s]
    std = (D(14) / 3).sqrt()
    for kind, why, A in (
        ("mean", "mean 3", [-2, -1, 0, 3]),
        ("rloo", "1 - 11/3, 2 - 10/3, 3 - 9/3, 6 - 6/3", others),
        ("grpo", "(s - 3)/(√(14/3) + 1e-4)", [(x - 3) / (std + D("1e-4")) for x in s]),
    ):
        golden(
            f"group_advantages_{kind}_hand", "advantage.group_advantages", "hand", why,
            {"scores": [[float(x) for x in s]], "kind": kind}, [A]
        )  # fmt: skip
    scores = numbers(14, 6, 5).numpy()
    K = scores.shape[1]
    left_out = np.stack([scores[:, i] - np.delete(scores, i, 1).mean(1) for i in range(K)], 1)
    centered = scores - scores.mean(1, keepdims=True)
    for kind, what, A in (
        ("mean", "s - np.mean", centered),
        ("rloo", "s_i - np.delete(s, i).mean()", left_out),
        ("grpo", "(s - np.mean)/(np.std(ddof=1) + 1e-4)", centered / (scores.std(1, ddof=1, keepdims=True) + 1e-4)),
    ):
        golden(
            f"group_advantages_{kind}_numpy", "advantage.group_advantages", "library", f"{NUMPY} {what}",
            {"scores": scores, "kind": kind}, A
        )  # fmt: skip

    golden(
        "explained_variance_hand", "advantage.explained_variance", "hand",
        "R (1.5, 2, 4): Var = 3.5/3; R - V (.5, 0, 1): Var = .5/3; 1 - 1/7 = 6/7",
        {"values": [[1.0, 2.0, NAN, 3.0]], "returns": [[1.5, 2.0, 9.0, 4.0]], "mask": [[True, True, False, True]]},
        Fraction(6, 7)
    )  # fmt: skip
    real = mask.numpy()
    v, r = values.numpy()[real], rewards.numpy()[real]
    golden(
        "explained_variance_numpy", "advantage.explained_variance", "library", f"{NUMPY} 1 - np.var(R - V)/np.var(R)",
        {"values": values, "returns": rewards, "mask": mask}, 1 - np.var(r - v) / np.var(r)
    )  # fmt: skip


# ---- loss -----------------------------------------------------------------------------------------------------------


def ppo_losses():
    cases = [
        (1, 1.5, -1.2, 0),
        (1, 0.5, -0.5, -0.5),
        (-1, 1.5, 1.5, 1.5),
        (-1, 0.5, 0.8, 0),
        (2, 1.1, -2.2, -2.2),
        (2, 1.5, -2.4, 0),
        (2, 0.5, -1, -1),
        (-2, 1.1, 2.2, 2.2),
        (-2, 1.5, 3, 3),
        (-2, 0.5, 1.6, 0),
        (3, 1, -3, -3),
        (0, 1.5, 0, 0),
    ]
    A, ratios, losses, slopes = (list(column) for column in zip(*cases, strict=True))
    inputs = {"logprobs": [[D(x).ln() for x in ratios]], "old_logprobs": [[0.0] * len(A)], "clip_range": 0.2}
    inputs |= {"advantages": [[float(a) for a in A]]}
    golden(
        "policy_loss_hand", "loss.policy_loss", "hand", "(Â, ρ) → -min(ρÂ, clip(ρ, .8, 1.2)Â); slope -ρÂ or 0",
        inputs, [losses], gradient={"logprobs": [slopes]}
    )  # fmt: skip
    golden(
        "is_clipped_hand", "loss.is_clipped", "hand", "Â > 0 and ρ > 1.2, or Â < 0 and ρ < .8", inputs,
        [[a * (r - 1) > 0.2 * abs(a) for a, r in zip(A, ratios, strict=True)]]
    )  # fmt: skip
    value = {"values": [[1.0, 0.9, 0.6, 0.5]], "old_values": [[0.5] * 4], "returns": [[0.2, 1.5, 1.5, 0.5]]}
    golden(
        "value_loss_clipped_hand", "loss.value_loss", "hand",
        "½·.8² = .32 (clipped ½·.5²); clipped to .7: ½·.8² = .32 (unclipped .18, no slope); inside: ½·.9² = .405; 0",
        value | {"clip_range": 0.2}, [[0.32, 0.32, 0.405, 0]], gradient={"values": [[0.8, 0, -0.9, 0]]}
    )  # fmt: skip
    golden(
        "value_loss_hand", "loss.value_loss", "hand", "½(.8², .6², .9², 0)", value, [[0.32, 0.18, 0.405, 0]],
        gradient={"values": [[0.8, -0.6, -0.9, 0]]}, convention="with the ½"
    )  # fmt: skip

    old, new, A = numbers(15, 3, 5), numbers(15, 3, 5) + numbers(16, 3, 5, scale=0.3), numbers(17, 3, 5)
    old_v, v, R = numbers(18, 3, 5), numbers(18, 3, 5) + numbers(19, 3, 5, scale=0.3), numbers(20, 3, 5)
    peel("core.py", *CORE)
    trainer, (lp, vp) = ppo_trainer(), with_grad(new, v)
    policy, value, clipped = (torch.zeros(3, 5, dtype=torch.float64) for _ in range(3))
    for b in range(3):
        for t in range(5):  # one real token at a time: trl gives means only
            mask = torch.zeros(3, 5, dtype=torch.bool)
            mask[b, t] = True
            pg, vf, stats = trainer.loss(old, old_v, torch.zeros(3, 5, 2).double(), vp, lp, mask, A, R)
            (pg + vf).backward()
            policy[b, t], value[b, t], clipped[b, t] = pg.detach(), vf.detach(), stats["policy"]["clipfrac"]
    source = f"{TRL} PPOTrainer.loss, one real token at a time"
    inputs = {"logprobs": new, "old_logprobs": old, "advantages": A, "clip_range": 0.2}
    golden("policy_loss_trl", "loss.policy_loss", "library", source, inputs, policy, gradient={"logprobs": lp.grad})
    golden("is_clipped_trl", "loss.is_clipped", "library", f"{source}: clipfrac", inputs, clipped.bool())
    golden(
        "value_loss_trl", "loss.value_loss", "library", source,
        {"values": v, "old_values": old_v, "returns": R, "clip_range": 0.2}, value, gradient={"values": vp.grad}
    )  # fmt: skip
    vp = with_grad(v)[0]
    half = 0.5 * F.mse_loss(vp, R, reduction="none")
    half.sum().backward()
    golden(
        "value_loss_torch", "loss.value_loss", "library", f"{TORCH} F.mse_loss/2",
        {"values": v, "old_values": old_v, "returns": R}, half.detach(), gradient={"values": vp.grad}
    )  # fmt: skip


def ppo_loss_variants():
    gradient_of = "logprobs"

    def by_hand(name, function, why, cases, **options):
        """Cases of (Â, ρ, loss, slope) under π_old = 1."""
        A, ratios, losses, slopes = (list(column) for column in zip(*cases, strict=True))
        inputs = {"logprobs": [[D(x).ln() for x in ratios]], "old_logprobs": [[0.0] * len(A)]}
        inputs |= {"advantages": [[float(a) for a in A]]} | options
        golden(name, function, "hand", why, inputs, [losses], gradient={gradient_of: [slopes]})

    wide = [0.2, 0.3]
    by_hand(
        "policy_loss_asymmetric_hand", "loss.policy_loss", "-min(ρÂ, clip(ρ, .8, 1.3)Â)",
        [(1, 1.5, -1.3, 0), (1, 1.25, -1.25, -1.25), (-1, 0.7, 0.8, 0), (-1, 1.5, 1.5, 1.5)], clip_range=wide
    )  # fmt: skip
    golden(
        "is_clipped_asymmetric_hand", "loss.is_clipped", "hand", "Â > 0 and ρ > 1.3, or Â < 0 and ρ < .8",
        {"logprobs": [[D("1.25").ln(), D("1.35").ln(), D("0.75").ln()]], "old_logprobs": [[0.0] * 3],
         "advantages": [[1.0, 1.0, -1.0]], "clip_range": wide}, [[False, True, True]]
    )  # fmt: skip
    by_hand(
        "dual_clip_loss_hand", "loss.dual_clip_loss", "policy_loss, but at most 3|Â| where Â < 0",
        [(-1, 5, 3, 0), (-1, 2, 2, 2), (-2, 1.5, 3, 3), (-2, 4, 6, 0), (1, 5, -1.2, 0), (-1, 0.5, 0.8, 0)],
        clip_range=0.2, dual_clip=3.0
    )  # fmt: skip
    A, ratios, weights = [1, 1, -1, -2], [1.5, 0.9, 0.5, 1.1], [1.2, 0.9, 0.6, 1.1]
    golden(
        "cispo_loss_closed", "loss.cispo_loss", "closed form", "-clip(ρ, .6, 1.2) Â ln π, π_old = 1; slope -clip(ρ)Â",
        {"logprobs": [[D(x).ln() for x in ratios]], "old_logprobs": [[0.0] * 4],
         "advantages": [[float(a) for a in A]], "clip_range": [0.4, 0.2]},
        [[-D(w) * a * D(x).ln() for w, a, x in zip(weights, A, ratios, strict=True)]],
        gradient={gradient_of: [[-w * a for w, a in zip(weights, A, strict=True)]]}
    )  # fmt: skip
    golden(
        "sequence_policy_loss_hand", "loss.sequence_policy_loss", "hand",
        "ln ρ (ln 4, 0, padding): s = 2; Â 1: clipped to 1.2; Â -1: 2 at both tokens, slope 2·2·½ at each",
        {"logprobs": [[D(4).ln(), 0.0, NAN]] * 2, "old_logprobs": [[0.0, 0.0, NAN]] * 2, "clip_range": 0.2,
         "advantages": [[1.0, 1.0, NAN], [-1.0, -1.0, NAN]], "mask": [[True, True, False]] * 2},
        [[-1.2, -1.2, 0], [2, 2, 0]], gradient={gradient_of: [[0, 0, 0], [2, 2, 0]]}
    )  # fmt: skip
    golden(
        "sequence_log_ratio_hand", "loss.sequence_log_ratio", "hand", "(1 + 0.5)/2 and -3/1",
        {"logprobs": [[0.0, -0.5, NAN], [-4.0, NAN, NAN]], "old_logprobs": [[-1.0, -1.0, NAN], [-1.0, NAN, NAN]],
         "mask": [[True, True, False], [True, False, False]]},
        [[0.75, 0.75, 0], [-3, 0, 0]], gradient={gradient_of: [[1, 1, 0], [1, 0, 0]]}
    )  # fmt: skip

    old, new, A = numbers(31, 3, 5), numbers(31, 3, 5) + numbers(32, 3, 5, scale=0.5), numbers(33, 3, 5)
    inputs = {"logprobs": new, "old_logprobs": old, "advantages": A, "clip_range": 0.2}
    lp, old_lp, a, mask = new.numpy(), old.numpy(), A.numpy(), right_padded(5, 3, 4, R=5)
    ratio = np.exp(lp - old_lp)
    clipped = -np.minimum(ratio * a, np.clip(ratio, 0.8, 1.2) * a)
    golden(
        "dual_clip_loss_numpy", "loss.dual_clip_loss", "library", f"{NUMPY} np.clip between bounds by the sign of Â",
        inputs | {"dual_clip": 1.1}, np.where(a < 0, np.minimum(clipped, 1.1 * np.abs(a)), clipped)
    )  # fmt: skip
    golden(
        "cispo_loss_numpy", "loss.cispo_loss", "library", f"{NUMPY} -np.clip(ρ) Â log π", inputs,
        -np.clip(ratio, 0.8, 1.2) * a * lp
    )  # fmt: skip
    real = mask.numpy()
    log_s = np.ma.masked_array(lp - old_lp, ~real).mean(1, keepdims=True).filled(0)
    s = np.exp(log_s)
    golden(
        "sequence_policy_loss_numpy", "loss.sequence_policy_loss", "library", f"{NUMPY} np.ma.mean of ln ρ",
        inputs | {"mask": mask}, np.where(real, -np.minimum(s * a, np.clip(s, 0.8, 1.2) * a), 0.0)
    )  # fmt: skip
    golden(
        "sequence_log_ratio_numpy", "loss.sequence_log_ratio", "library", f"{NUMPY} np.ma.mean of ln ρ",
        {"logprobs": new, "old_logprobs": old, "mask": mask}, np.where(real, log_s, 0.0)
    )  # fmt: skip


def imitation():
    lp, w = [D("0.5").ln(), D("0.25").ln(), D("0.25").ln(), D("0.5").ln()], [1.0, 2.0, -1.0, 0.0]
    golden(
        "imitation_loss_closed", "loss.imitation_loss", "closed form", "ln 2, 2 ln 4, -ln(1 - 1/4), 0; slope p/(1 - p)",
        {"logprobs": [lp], "weights": [w]}, [[D(2).ln(), 2 * D(4).ln(), -D("0.75").ln(), 0]],
        gradient={"logprobs": [[-1, -2, Fraction(1, 3), 0]]}
    )  # fmt: skip
    lp, w = -numbers(34, 3, 5).abs() - 0.05, numbers(35, 3, 5)
    x, v = lp.numpy(), w.numpy()
    golden(
        "imitation_loss_numpy", "loss.imitation_loss", "library", f"{NUMPY} np.log1p(-np.exp(log π))",
        {"logprobs": lp, "weights": w}, np.where(v < 0, v * np.log1p(-np.exp(x)), -v * x)
    )  # fmt: skip


def reward_model_losses():
    gap = D("0.9")
    golden(
        "pairwise_loss_closed", "loss.pairwise_loss", "closed form",
        "ln(1 + e^-.9), ln(1 + e^.9), ln 2; slope σ(gap) - 1",
        {"chosen": [1.2, 0.3, 0.7], "rejected": [0.3, 1.2, 0.7]},
        [-sigmoid(gap).ln(), -sigmoid(-gap).ln(), D(2).ln()],
        gradient={"chosen": [sigmoid(gap) - 1, sigmoid(-gap) - 1, -0.5]}
    )  # fmt: skip
    golden(
        "pairwise_loss_margin_closed", "loss.pairwise_loss", "closed form", "ln(1 + e^-(.9 - .5))",
        {"chosen": [1.2], "rejected": [0.3], "margin": 0.5}, [-sigmoid(D("0.4")).ln()]
    )  # fmt: skip
    golden(
        "pairwise_loss_far_hand", "loss.pairwise_loss", "hand",
        "a gap of -1000 costs 1000 + ln(1 + e^-1000) = 1000; +1000: 0",
        {"chosen": [-500.0, 500.0], "rejected": [500.0, -500.0]}, [1000, 0]
    )  # fmt: skip
    scores = [D("1"), D("0.5"), D("0"), D("-0.5")]

    def listwise(ranks, term, slope, grades=(0, 0, 0, 0)):
        """Sums over the strict pairs, and the slopes of each score; margins are the grades' differences."""
        total, slopes, n = D(0), [D(0)] * 4, 0
        for i in range(4):
            for j in range(4):
                if 0 < ranks[i] < ranks[j]:
                    gap = scores[i] - scores[j] - (D(grades[i]) - D(grades[j]))
                    total, n = total + term(gap), n + 1
                    slopes[i], slopes[j] = slopes[i] + slope(gap), slopes[j] - slope(gap)
        return (total / n, [s / n for s in slopes]) if n else (D(0), slopes)

    def log(x):
        return -sigmoid(x).ln()

    def minus(x):
        return -sigmoid(x)

    pair = {"log": (log, lambda x: sigmoid(x) - 1), "sigmoid": (minus, lambda x: -sigmoid(x) * (1 - sigmoid(x)))}
    for name, ranks in (
        ("", [1, 2, 3, 4]),
        ("_ties", [1, 2, 2, 3]),
        ("_absent", [1, 2, 0, 3]),
        ("_all_tied", [2, 2, 2, 2]),
        ("_shuffled", [3, 1, 4, 1]),
        ("_one", [0, 0, 1, 0]),
    ):
        for kind, (term, slope) in pair.items():
            loss, slopes = listwise(ranks, term, slope)
            golden(
                f"ranking_loss_{kind}{name}_closed", "loss.ranking_loss", "closed form",
                "mean over the pairs with i ranked above j, in decimal arithmetic; no pair: 0",
                {"scores": [[NAN if r == 0 else s for s, r in zip(scores, ranks, strict=True)]], "ranks": [ranks],
                "kind": kind}, [loss], gradient={"scores": [slopes]},
                convention="divides by the strict pairs that exist"
            )  # fmt: skip
    grades = ["0.75", "0", "0.5", "-1"]
    margin = [[D(a) - D(b) for b in grades] for a in grades]
    for kind, (term, slope) in pair.items():
        loss, slopes = listwise([1, 2, 2, 0], term, slope, grades)
        golden(
            f"ranking_loss_{kind}_margin_closed", "loss.ranking_loss", "closed form",
            "margin of a pair: the difference of the grades .75, 0, .5, -1; two tied, one absent",
            {"scores": [[*scores[:3], NAN]], "ranks": [[1, 2, 2, 0]], "kind": kind, "margin": [margin]}, [loss],
            gradient={"scores": [slopes]}
        )  # fmt: skip
    p = [s.exp() / sum(x.exp() for x in scores) for s in scores]
    golden(
        "ranking_loss_softmax_closed", "loss.ranking_loss", "closed form", "-ln softmax(r)[best]",
        {"scores": [scores], "ranks": [[1, 2, 3, 4]], "kind": "softmax"}, [-p[0].ln()],
        gradient={"scores": [[p[0] - 1, *p[1:]]]}
    )  # fmt: skip
    p = [s.exp() / (scores[0].exp() + scores[1].exp() + scores[3].exp()) for s in scores]
    golden(
        "ranking_loss_softmax_ties_closed", "loss.ranking_loss", "closed form",
        "third answer absent, the first two tied best: -(ln p_0 + ln p_1)/2 among the present",
        {"scores": [[scores[0], scores[1], NAN, scores[3]]], "ranks": [[2, 2, 0, 5]], "kind": "softmax"},
        [-(p[0].ln() + p[1].ln()) / 2], gradient={"scores": [[p[0] - D("0.5"), p[1] - D("0.5"), 0, p[3]]]}
    )  # fmt: skip
    golden(
        "centering_penalty_hand", "loss.centering_penalty", "hand",
        "(1.2 + .3)² = 2.25; pairs (1, 2), (1, 3), tied 2 and 3: (1² + 3²)/2 = 5; no strict pair: 0",
        {"scores": [[1.2, 0.3, NAN], [1.0, 0.0, 2.0], [1.0, 1.0, NAN]], "ranks": [[1, 2, 0], [1, 2, 2], [1, 1, 0]]},
        [2.25, 5, 0], gradient={"scores": [[3, 3, 0], [4, 1, 3], [0, 0, 0]]}
    )  # fmt: skip
    s, labels = [1, 0, D("-0.5"), D("-0.4"), D("1.2")], [D("0.75"), D("0.5"), D("0.35"), D("0.4"), D("0.8")]
    golden(
        "direct_score_loss_closed", "loss.direct_score_loss", "closed form", "(1/(1 + e^-s) - label)²",
        {"scores": [float(x) for x in s], "labels": labels},
        [(sigmoid(D(x)) - y) ** 2 for x, y in zip(s, labels, strict=True)]
    )  # fmt: skip
    golden(
        "dpo_loss_closed", "loss.dpo_loss", "closed form",
        "x = .1((-10 + 11) - (-12 + 11.5)) = .15: ln(1 + e^-.15), slope -.1 σ(-.15)", {"policy_chosen": [-10.0, -3.0],
        "policy_rejected": [-12.0, -4.0], "ref_chosen": [-11.0, -3.0], "ref_rejected": [-11.5, -4.0], "beta": 0.1},
        [-sigmoid(D("0.15")).ln(), D(2).ln()],
        gradient={"policy_chosen": [-D("0.1") * sigmoid(-D("0.15")), -0.05],
        "policy_rejected": [D("0.1") * sigmoid(-D("0.15")), 0.05]}
    )  # fmt: skip


def reward_model_losses_of_others():
    chosen, rejected, margin = numbers(21, 7, scale=2), numbers(22, 7, scale=2), numbers(23, 7).abs()
    (compute_loss,) = peel("trainer/reward_trainer.py", "RewardTrainer.compute_loss")

    def theirs(c, r, center=None, **more):
        """One pair: trl gives the mean over a batch."""
        trainer = SimpleNamespace(
            use_reward_data_collator=True, args=SimpleNamespace(center_rewards_coefficient=center)
        )
        inputs = {
            "input_ids_chosen": c,
            "attention_mask_chosen": 0,
            "input_ids_rejected": r,
            "attention_mask_rejected": 0,
        }
        return compute_loss(trainer, lambda input_ids, **_: {"logits": input_ids}, inputs | more)

    c, r = with_grad(chosen, rejected)
    loss = torch.stack([theirs(*row) for row in zip(c, r, strict=True)])
    loss.sum().backward()
    source = f"{TRL} RewardTrainer.compute_loss, a pair at a time"
    golden(
        "pairwise_loss_trl", "loss.pairwise_loss", "library", source, {"chosen": chosen, "rejected": rejected},
        loss.detach(), gradient={"chosen": c.grad, "rejected": r.grad}
    )  # fmt: skip
    loss = torch.stack([theirs(c, r, margin=m) for c, r, m in zip(chosen, rejected, margin, strict=True)])
    golden(
        "pairwise_loss_margin_trl", "loss.pairwise_loss", "library", source,
        {"chosen": chosen, "rejected": rejected, "margin": margin}, loss
    )  # fmt: skip
    loss = torch.stack([theirs(c, r, center=1.0) - theirs(c, r) for c, r in zip(chosen, rejected, strict=True)])
    golden(
        "centering_penalty_trl", "loss.centering_penalty", "library",
        f"{source}: with center_rewards_coefficient 1, less without",
        {"scores": torch.stack([chosen, rejected], 1), "ranks": [[1, 2]] * 7}, loss
    )  # fmt: skip

    scores = numbers(24, 4, 6, scale=2)
    ranks = torch.tensor([[2, 1, 5, 4, 3, 6], [6, 5, 4, 3, 2, 1], [1, 2, 3, 4, 5, 6], [3, 6, 1, 2, 4, 5]])
    order = ranks.argsort(1)
    margins = torch.stack([theirs(*scores[:, :2].T[:, b : b + 1], margin=margin[b]).view(1) for b in range(4)])
    golden(
        "ranking_loss_margin_trl", "loss.ranking_loss", "library", f"{source}, a pair to a list",
        {"scores": scores[:, :2], "ranks": [[1, 2]] * 4, "margin": margin[:4].view(4, 1, 1)}, margins.view(4)
    )  # fmt: skip
    for kind in ("log", "sigmoid", "softmax"):
        (s,) = with_grad(scores)
        if kind == "softmax":
            what, loss = "F.cross_entropy(scores, best)", F.cross_entropy(s, order[:, 0], reduction="none")
        else:
            gaps = torch.stack(
                [torch.stack([s[b, i] - s[b, j] for i, j in combinations(order[b].tolist(), 2)]) for b in range(4)]
            )
            if kind == "log":
                what = "F.binary_cross_entropy_with_logits over itertools.combinations, mean"
                loss = F.binary_cross_entropy_with_logits(gaps, torch.ones_like(gaps), reduction="none").mean(1)
            else:
                what, loss = "torch.sigmoid over itertools.combinations, mean, negated", -gaps.sigmoid().mean(1)
        loss.sum().backward()
        golden(
            f"ranking_loss_{kind}_torch", "loss.ranking_loss", "library", f"{TORCH} {what}",
            {"scores": scores, "ranks": ranks, "kind": kind}, loss.detach(), gradient={"scores": s.grad}
        )  # fmt: skip
    labels = numbers(25, 7).sigmoid().mul(1e4).round().div(1e4)
    golden(
        "direct_score_loss_torch", "loss.direct_score_loss", "library",
        f"{TORCH} F.mse_loss(sigmoid(scores), labels)", {"scores": chosen, "labels": labels},
        F.mse_loss(chosen.sigmoid(), labels, reduction="none")
    )  # fmt: skip

    kinds = {
        "FDivergenceType": SimpleNamespace(
            ALPHA_DIVERGENCE=SimpleNamespace(value="alpha"), JS_DIVERGENCE=SimpleNamespace(value="js")
        )
    }
    TRL_NAMES.update(kinds)
    (dpo_loss,) = peel("trainer/dpo_trainer.py", "DPOTrainer.dpo_loss")
    trainer = SimpleNamespace(
        accelerator=SimpleNamespace(device="cpu"),
        reference_free=False,
        f_divergence_type="reverse_kl",
        beta=0.3,
        label_smoothing=0.0,
        loss_type="sigmoid",
    )
    four = [numbers(26 + i, 7, scale=5) - 20 for i in range(4)]
    leaves = with_grad(*four)
    loss = dpo_loss(trainer, *leaves)[0]
    loss.sum().backward()
    names = ("policy_chosen", "policy_rejected", "ref_chosen", "ref_rejected")
    golden(
        "dpo_loss_trl", "loss.dpo_loss", "library", f"{TRL} DPOTrainer.dpo_loss(loss_type='sigmoid')",
        dict(zip(names, four, strict=True)) | {"beta": 0.3}, loss.detach(),
        gradient={name: leaf.grad for name, leaf in zip(names[:2], leaves[:2], strict=True)}
    )  # fmt: skip


# ---- reward ---------------------------------------------------------------------------------------------------------


def reward():
    row = {
        "scores": [0.7],
        "logprobs": [[-1.0, -0.5, -2.0]],
        "ref_logprobs": [[-1.2, -0.4, -1.5]],
        "mask": [[True] * 3],
    }
    golden(
        "shape_rewards_hand", "reward.shape_rewards", "hand", "KL (.2, -.1, -.5): -.2·.2, .2·.1, .2·.5 + .7",
        row | {"kl_coef": 0.2}, [[-0.04, 0.02, 0.8]]
    )  # fmt: skip
    golden(
        "shape_rewards_k2_hand", "reward.shape_rewards", "hand", "KL (.02, .005, .125): -.004, -.001, -.025 + .7",
        row | {"kl_coef": 0.2, "kl": "k2"}, [[-0.004, -0.001, 0.675]]
    )  # fmt: skip
    x = [D("0.2"), D("-0.1"), D("-0.5")]
    k3 = [(-v).exp() - 1 + v for v in x]
    golden(
        "shape_rewards_k3_closed", "reward.shape_rewards", "closed form", "-.2 (e^-x - 1 + x), + .7 at the last",
        row | {"kl_coef": 0.2, "kl": "k3"}, [[-k3[0] / 5, -k3[1] / 5, D("0.7") - k3[2] / 5]]
    )  # fmt: skip
    golden(
        "shape_rewards_abs_hand", "reward.shape_rewards", "hand", "KL (.2, .1, .5): -.04, -.02, -.1 + .7",
        row | {"kl_coef": 0.2, "kl": "abs"}, [[-0.04, -0.02, 0.6]]
    )  # fmt: skip
    padded = {
        "scores": [0.7, 0.5, NAN],
        "kl_coef": 0.2,
        "logprobs": [[-1.0, -0.5, NAN, 9.0], [-1.0, -0.5, -2.0, -1.0], [NAN] * 4],
        "ref_logprobs": [[-1.2, -0.4, 5.0, NAN], [-1.2, -0.4, -1.5, -1.0], [1.0] * 4],
        "mask": [[True, True, False, False], [True] * 4, [False] * 4],
    }
    for score_at, why, rewards in (
        (
            "last",
            "on the last real token; a row without one gets nothing",
            [[-0.04, 0.72, 0, 0], [-0.04, 0.02, 0.1, 0.5], [0] * 4],
        ),
        ("next", "one later where there is a column", [[-0.04, 0.02, 0.7, 0], [-0.04, 0.02, 0.1, 0.5], [0] * 4]),
        ("column", "in the last column", [[-0.04, 0.02, 0, 0.7], [-0.04, 0.02, 0.1, 0.5], [0] * 4]),
    ):
        golden(
            f"shape_rewards_{score_at}_hand", "reward.shape_rewards", "hand", why, padded | {"score_at": score_at},
            rewards
        )  # fmt: skip
    masks = [[True, True, False, False], [True] * 4, [True, False, True, False], [False, True, False, False]]
    for score_at, columns in (("last", [1, 3, 2, 1]), ("next", [2, 3, 3, 2]), ("column", [3, 3, 3, 3])):
        golden(
            f"score_column_{score_at}_hand", "reward.score_column", "hand", "counted",
            {"mask": masks, "score_at": score_at}, columns
        )  # fmt: skip
    lengths = torch.tensor([8, 3, 1, 5, 7])
    mask = right_padded(*lengths.tolist(), R=8)
    (first_true,) = peel("trainer/utils.py", "first_true_indices")
    for score_at, shift in (("last", 1), ("next", 0)):
        where = (first_true(~mask) - shift).clamp(max=7)
        golden(
            f"score_column_{score_at}_trl", "reward.score_column", "library",
            f"{TRL} first_true_indices(padding){' - 1' * shift}, at most R - 1", {"mask": mask, "score_at": score_at},
            where
        )  # fmt: skip
    scores, a, b = numbers(30, 5), numbers(31, 5, 8) - 2, numbers(32, 5, 8) - 2
    for kl, theirs in (("k1", "kl"), ("k2", "mse"), ("abs", "abs")):
        rewards, _, _ = ppo_trainer(kl_penalty=theirs).compute_rewards(scores, a, b, mask)
        golden(
            f"shape_rewards_{kl}_trl", "reward.shape_rewards", "library",
            f"{TRL} PPOTrainer.compute_rewards({theirs!r})",
            {"scores": scores, "logprobs": a, "ref_logprobs": b, "mask": mask, "kl_coef": 0.2, "kl": kl},
            torch.where(mask, rewards, 0.0), convention="trl leaves the penalty in the padding, set to 0 here"
        )  # fmt: skip
    for kl, coef in (
        (12, 0.201024),
        (3, 0.198976),
        (6.5, D("0.2") * (1 + D(256) / D(120000))),
        (6, 0.2),
        (6.6, 0.200512),
        (100, 0.201024),
        (-5, 0.198976),
    ):
        golden(
            f"adaptive_kl_{str(kl).replace('.', '_').replace('-', 'minus')}_hand", "reward.AdaptiveKL", "hand",
            ".2 (1 + clip(KL/6 - 1, ±.2)·256/10000)",
            {"coef": 0.2, "target": 6.0, "horizon": 10000.0, "updates": [[float(kl), 256]]}, [coef]
        )  # fmt: skip
    (controller,) = peel("trainer/utils.py", "AdaptiveKLController")
    theirs, updates, coefs = controller(0.15, 4.0, 500), [[float(k), 64] for k in numbers(33, 12, scale=4).abs()], []
    for kl, n in updates:
        theirs.update(kl, n)
        coefs.append(theirs.value)
    golden(
        "adaptive_kl_trl", "reward.AdaptiveKL", "library", f"{TRL} AdaptiveKLController",
        {"coef": 0.15, "target": 4.0, "horizon": 500.0, "updates": updates}, coefs
    )  # fmt: skip
    golden(
        "fixed_kl_hand", "reward.FixedKL", "hand", "stays", {"coef": 0.05, "updates": [[12.0, 256], [0.0, 1]]},
        [0.05, 0.05]
    )  # fmt: skip
    (controller,) = peel("trainer/utils.py", "FixedKLController")
    theirs, coefs = controller(0.07), []
    for kl, n in updates:
        theirs.update(kl, n)
        coefs.append(theirs.value)
    golden(
        "fixed_kl_trl", "reward.FixedKL", "library", f"{TRL} FixedKLController", {"coef": 0.07, "updates": updates},
        coefs
    )  # fmt: skip


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 where a file differs")
    check = parser.parse_args().check
    chapters = (masked, ops, advantage, ppo_losses, ppo_loss_variants, imitation, reward_model_losses)
    for chapter in (*chapters, reward_model_losses_of_others, reward):
        chapter()
    different = {p.stem for p in HERE.glob("*.json")} ^ files.keys()
    for name, record in files.items():
        path, text = HERE / f"{name}.json", to_text(record)
        if check:
            if not path.exists() or not same(json.loads(path.read_text()), json.loads(text)):
                different.add(name)
        else:
            path.write_text(text)
    if check and different:
        print("differs:", *sorted(different))
        sys.exit(1)
    print(f"{len(files)} golden files")


def to_text(record):
    """One key a line."""
    lines = (f"  {json.dumps(k)}: {json.dumps(v, ensure_ascii=False, allow_nan=False)}" for k, v in record.items())
    return "{\n" + ",\n".join(lines) + "\n}\n"


def same(a, b):
    """Equal, numbers to 1e-12: another machine's libm may differ in the last digit."""
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, list) and isinstance(b, list):
        return len(a) == len(b) and all(map(same, a, b))
    if isinstance(a, (int, float)) and isinstance(b, (int, float)):
        return abs(a - b) <= 1e-12 * max(1, abs(a))
    return a == b


if __name__ == "__main__":
    main()
