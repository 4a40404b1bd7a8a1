"""Each preset: one whole PPO step against an implementation in NumPy that shares nothing with ours, in fp64."""

import copy
import importlib
import json
import re
import subprocess
import sys
import tomllib
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import numpy_ppo as peer
import pytest
import torch
from torch import nn

from minirlhf import ppo
from minirlhf.config import PRESETS, PPOConfig, SFTConfig, load_config, preset_line, preset_options
from minirlhf.errors import UsageError
from minirlhf.optim import adamw
from minirlhf.ppo import ppo_iteration, rollout_metrics, score_answers, score_moments
from minirlhf.reward import AdaptiveKL, FixedKL
from minirlhf.rollout import Rollout
from minirlhf.settings import to_dict

HERE = Path(__file__).parent
FILES = {p.stem: json.loads(p.read_text()) for p in sorted((HERE / "golden/ppo").glob("*.json"))}
WITHIN = 1e-10  # of every number, absolute


class Bigram(nn.Module):
    """logits = E[token] Hᵀ, behind the interface of a causal LM."""

    def __init__(self, E, H):
        super().__init__()
        self.embed = nn.Embedding.from_pretrained(E.clone(), freeze=False)
        self.head = nn.Linear(*reversed(H.shape), bias=False, dtype=H.dtype)
        self.head.weight.data.copy_(H)
        self.config = SimpleNamespace(vocab_size=len(H))

    def hidden(self, input_ids, attention_mask=None):
        return self.embed(input_ids)


class Table(nn.Module):
    """V = U[token]."""

    def __init__(self, U):
        super().__init__()
        self.embed = nn.Embedding.from_pretrained(U[:, None].clone(), freeze=False)

    def forward(self, input_ids, attention_mask=None):
        return self.embed(input_ids)[..., 0]


def options_of(name):
    argv = ["--ppo.preset", name] if name else ["--ppo.kl_coef", "0.1", "--ppo.value_coef", "0.5"]
    return load_config(PPOConfig, argv).ppo


def tensor(x):
    """Numbers with a point are fp64."""
    return torch.from_numpy(np.asarray(x))


def rollout_of(x, options):
    t = {k: tensor(v) for k, v in x.items()}
    whole = torch.ones(peer.B, peer.R, dtype=torch.bool)
    return Rollout(
        t["prompts"], torch.ones(peer.B, peer.P, dtype=torch.bool), t["responses"],
        torch.arange(peer.R) < t["lengths"][:, None], torch.where(whole, t["old_logprobs"], 0.0), t["old_logprobs"],
        t["ref_logprobs"], t["values"], t["scores"], t["has_eos"], options.score_at,
    )  # fmt: skip


def run(name, monkeypatch, *, plans=peer.PLANS, optimizer=None, max_norm=peer.ADAM["max_norm"]):
    """The library's iteration on the same rollout → (models, metrics, what entered the losses, scores)."""
    x, o = FILES[name or "minirlhf"]["inputs"], options_of(name)
    policy, value = Bigram(*(tensor(x[k]) for k in "EH")), Table(tensor(x["U"]))
    named = [*policy.named_parameters(), *((f"v.{n}", p) for n, p in value.named_parameters())]
    a = peer.ADAM
    optimizer = (optimizer or (lambda n: adamw(n, lr=a["lr"], weight_decay=a["decay"], betas=a["betas"],
                                               eps=a["adam_eps"])))(named)  # fmt: skip
    seen = []
    formula = {k: getattr(ppo, k) for k in ("policy_loss", "value_loss")}
    spy = lambda name, column: lambda *z, **k: seen.append((column, z[2])) or formula[name](*z, **k)  # noqa: E731
    monkeypatch.setattr(ppo, "policy_loss", spy("policy_loss", "advantages"))
    monkeypatch.setattr(ppo, "value_loss", spy("value_loss", "returns"))
    rollout = rollout_of(x, o)
    scores = score_answers(rollout.scores, rollout.has_eos, o, **score_moments(rollout.scores, o.score_norm))
    metrics = rollout_metrics(rollout) | ppo_iteration(
        policy, value, optimizer, rollout, scores, [[[torch.tensor(r) for r in m] for m in e] for e in plans], o,
        kl_coef=o.kl_coef, temperature=peer.TAU, max_grad_norm=max_norm,
    )  # fmt: skip
    monkeypatch.undo()
    return (policy, value), metrics, seen, scores


def weights(models):
    return {"E": models[0].embed.weight, "H": models[0].head.weight, "U": models[1].embed.weight[:, 0]}


def far(actual, expected):
    """Largest absolute difference."""
    actual = actual.detach().numpy() if isinstance(actual, torch.Tensor) else actual
    return float(np.abs(np.asarray(actual) - np.asarray(expected)).max())


def differences(name, want, monkeypatch):
    """What was compared → how far apart, for everything in a golden file."""
    models, metrics, seen, scores = run(name, monkeypatch)
    found = {f"last {k}": far(w, want["last_weights"][k]) for k, w in weights(models).items()}
    found["scores"] = far(scores, want["scores"])
    found["rlhf_reward"] = far(metrics["objective/rlhf_reward"], np.sum(want["rewards"]) / peer.B)
    found |= {k: far(metrics[m], want[k]) for k, m in (("kl", "objective/kl"), ("policy_loss", "loss/policy_avg"),
                                                       ("value_loss", "loss/value_avg"))}  # fmt: skip
    o = options_of(name)
    beta = AdaptiveKL(o.kl_coef, target=o.kl_target, horizon=o.kl_horizon) if o.kl_target else FixedKL(o.kl_coef)
    beta.update(metrics["objective/kl"], peer.B)
    found["next_kl_coef"] = far(beta.coef, want["next_kl_coef"])

    row = 0  # what entered the losses of the first optimizer step, microbatch by microbatch
    for index in peer.PLANS[0][0]:
        for column in ("advantages", "returns"):
            kind, got = seen.pop(0)
            assert kind == column
            part = np.asarray(want["first"][column])[row : row + len(index), : got.shape[1]]
            found[column] = max(found.get(column, 0.0), far(got, part))
        row += len(index)

    first = [[peer.PLANS[0][0]]]
    models, *_ = run(name, monkeypatch, plans=first)
    found |= {f"first {k}": far(w, want["first"]["weights"][k]) for k, w in weights(models).items()}
    start = FILES[name or "minirlhf"]["inputs"]
    sgd = lambda named: torch.optim.SGD([p for _, p in named], lr=1.0)  # noqa: E731  (a step is the gradient)
    models, *_ = run(name, monkeypatch, plans=first, optimizer=sgd, max_norm=1e9)
    for k, w in weights(models).items():
        found[f"gradient {k}"] = far(np.asarray(start[k]) - w.detach().numpy(), want["first"]["gradients"][k])
    return found


@pytest.mark.parametrize("name", peer.PEERS)
def test_one_whole_step_is_that_of_the_numpy_implementation(name, monkeypatch):
    expected = FILES[name or "minirlhf"]["expected"]
    found = differences(name, expected, monkeypatch)
    assert len(found) == 17, found
    assert max(found.values()) <= WITHIN, found


@pytest.mark.parametrize("name", peer.PEERS)
def test_golden_files_are_what_numpy_says_today(name):
    want, got = FILES[name or "minirlhf"], json.loads(json.dumps(peer.golden(name)))
    assert want["inputs"] == got["inputs"]
    assert want["convention"] == got["convention"]
    flat = [list(leaves(part["expected"])) for part in (want, got)]
    assert max(abs(a - b) for a, b in zip(*flat, strict=True)) < 1e-13


def leaves(x):
    """Every number of a nested value."""
    for part in x.values() if isinstance(x, dict) else x if isinstance(x, list) else ():
        yield from leaves(part)
    if isinstance(x, int | float):
        yield float(x)


@pytest.mark.parametrize("path", ["scores", "rewards", "kl", "next_kl_coef", "policy_loss", "value_loss",
                                  "first.advantages", "first.returns", "first.gradients.E", "first.gradients.H",
                                  "first.gradients.U", "first.weights.E", "last_weights.U"])  # fmt: skip
def test_one_percent_is_noticed(path, monkeypatch):
    wrong = copy.deepcopy(FILES["trl-v2"]["expected"])
    *parents, last = path.split(".")
    place = wrong
    for k in parents:
        place = place[k]
    place[last] = (np.asarray(place[last]) * 1.01).tolist()
    assert max(differences("trl-v2", wrong, monkeypatch).values()) > WITHIN


def test_no_two_presets_agree():
    """Every preset is told from every other by the weights of this very rollout."""
    ends = [np.concatenate([np.ravel(w) for w in FILES[n or "minirlhf"]["expected"]["last_weights"].values()])
            for n in peer.PEERS]  # fmt: skip
    for i, a in enumerate(ends):
        assert all(np.abs(a - b).max() > 1e-6 for b in ends[:i])


@pytest.mark.parametrize("name", peer.PEERS)
def test_a_filler_row_alone_in_its_microbatch_moves_nothing(name, monkeypatch):
    """Row 0 has no token: its microbatch gives no gradient, and no NaN."""
    ends, real = [], list(range(1, peer.B))
    for microbatches in ([real], [real, [0]]):
        with monkeypatch.context() as m:
            m.setitem(FILES[name or "minirlhf"]["inputs"], "lengths", [0, *peer.LENGTHS[1:]])
            models, *_ = run(name, m, plans=[[microbatches]])
        ends.append(torch.cat([w.detach().flatten() for w in weights(models).values()]))
    assert ends[1].isfinite().all()
    if options_of(name).loss_mean == "step":  # else it is one mean of two, and halves the step's gradient
        assert far(ends[0], ends[1]) <= WITHIN


def test_the_numpy_side_shares_nothing_with_ours():
    text = (HERE / "numpy_ppo.py").read_text()
    imported = set(re.findall(r"^(?:import|from) (\w+)", text, re.M))
    assert imported == {"json", "pathlib", "numpy"}
    code = "import sys; sys.path.insert(0, sys.argv[1]); import numpy_ppo; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code, str(HERE)], check=True, timeout=60)


# ---- configuration --------------------------------------------------------------------------------------------------


def test_presets_set_the_same_options():
    keys = {name: set(preset_options(name)) for name in PRESETS}
    assert len(set(map(frozenset, keys.values()))) == 1
    assert tuple(PRESETS) == ("oai2019", "trl-legacy", "trl-v2", "dschat", "openrlhf", "instructgpt")


def test_what_is_given_overrides_the_preset(tmp_path):
    path = tmp_path / "c.toml"
    path.write_text('[ppo]\npreset = "openrlhf"\nkl_coef = 0.3\ngamma = 0.9\n')
    o = load_config(PPOConfig, [str(path), "--ppo.gamma", "0.8"]).ppo
    assert (o.preset, o.gae_lambda, o.kl_coef, o.gamma, o.score_clip) == ("openrlhf", 1.0, 0.3, 0.8, 10.0)
    path.write_text("[ppo]\nkl_coef = 0.3\n")
    assert load_config(PPOConfig, [str(path), "--ppo.preset", "dschat"]).ppo.kl_coef == 0.3
    assert load_config(PPOConfig, ["--ppo.kl_coef", "0.7", "--ppo.preset", "dschat"]).ppo.kl_coef == 0.7


@pytest.mark.parametrize("name", PRESETS)
def test_the_resolved_config_holds_the_values_and_the_name(name, tmp_path):
    config = load_config(PPOConfig, ["--ppo.preset", name, "--ppo.epochs", "2"])
    resolved = to_dict(config)
    assert resolved["ppo"]["preset"] == name
    expected = preset_options(name) | {"ppo.epochs": 2}
    assert all(resolved["ppo"][k.removeprefix("ppo.")] == v for k, v in expected.items())
    (tmp_path / "config.json").write_text(json.dumps(resolved))
    assert load_config(PPOConfig, [str(tmp_path / "config.json")]) == config


def test_the_line_says_every_option_and_what_was_given_instead():
    line = preset_line(load_config(PPOConfig, ["--ppo.preset", "trl-v2", "--ppo.epochs", "2"]))
    assert "\n" not in line
    assert line.startswith("preset trl-v2: ")
    for word in ("score_at next", "kl_coef 0.05", "whiten_ddof 1", "loss_mean microbatch", "epochs 2 (not 4)"):
        assert word in line
    assert len(line.split(", ")) == len(preset_options("trl-v2"))


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--ppo.preset", "trlv2"], ["ppo.preset", "trl-v2"]),
        (["--ppo.preset", "oai2019", "--sample.min_new_tokens", "3"], ["score_at", "min_new_tokens"]),
    ],
)
def test_a_wrong_preset_is_one_line(argv, words):
    with pytest.raises(UsageError) as e:
        load_config(PPOConfig, argv)
    assert all(w in str(e.value) for w in words)
    with pytest.raises(UsageError, match=r"ppo\.preset"):
        load_config(SFTConfig, ["--ppo.preset", "dschat"])


def test_a_resolved_config_and_another_preset_are_refused(tmp_path):
    path = tmp_path / "config.json"
    path.write_text(json.dumps(to_dict(load_config(PPOConfig, []))))
    with pytest.raises(UsageError, match=r"ppo\.preset"):
        load_config(PPOConfig, [str(path), "--ppo.preset", "dschat"])


def test_preset_files_are_configs():
    folder = Path(importlib.import_module("minirlhf").__file__).parent / "presets"
    for name in PRESETS:
        assert set(tomllib.loads((folder / f"{name}_ppo.toml").read_text(encoding="utf-8"))) == {"ppo"}


def test_the_table_of_the_docs_is_that_of_the_files():
    rows = [
        [cell.strip(" `") for cell in line.strip("|").split("|")]
        for line in (HERE.parent / "docs/presets.md").read_text(encoding="utf-8").splitlines()
        if line.startswith(("| `", "| option"))
    ]
    assert tuple(rows[0][1:]) == PRESETS
    for i, name in enumerate(PRESETS):
        said = {row[0]: row[1 + i] for row in rows[1:]}
        held = {k.removeprefix("ppo."): v for k, v in preset_options(name).items()}
        assert said == {k: str(v).lower() if isinstance(v, bool) else f"{v:g}" if isinstance(v, int | float) else v
                        for k, v in held.items()}  # fmt: skip
