"""NaN put into each tensor of a step: skipped, named, and after three in a row ended with what is needed to see why."""

import dataclasses
import gc
import json
import signal

import pytest
import torch
from kill_matrix import run
from tolerance import assert_close, exact

import train_ppo
import train_sft
from minirlhf import checkpoint, ppo, stage
from minirlhf.errors import NonFiniteError
from minirlhf.forensics import first_bad_module
from minirlhf.ppo import epoch_plans, require_finite
from minirlhf.rollout import load_rollout

NAN = float("nan")


@pytest.fixture(autouse=True)
def _signals_stay():
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A folder with runs/sft and runs/rm."""
    cwd = tmp_path_factory.mktemp("trained")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(cwd)
        for subject in ("sft", "rm"):
            assert run(subject) == 0
    return cwd


@pytest.fixture
def ppo_run(trained, tmp_path, monkeypatch, capsys):
    """`ppo_run(...)` → exit code, stderr, run folder."""
    monkeypatch.chdir(trained)

    def go(*extra):
        capsys.readouterr()
        code = run("ppo", "--run.dir", str(tmp_path / "x"), "--ppo.kl_target", "0", "--run.steps", "7", *extra)
        return code, capsys.readouterr().err, tmp_path / "x"

    return go


def lines(folder):
    return [json.loads(x) for x in (folder / "metrics.jsonl").read_text().splitlines()]


def spoil(x, row=0):
    """A tensor with NaN in one place."""
    x = x.clone()
    x[(row, *[0] * (x.ndim - 1))] = NAN
    return x


class Steps:
    """Wraps a function of ppo or train_ppo so that it fails at some steps, as `train_ppo.answers` counts them."""

    def __init__(self, monkeypatch, bad):
        self.now, self.bad = 0, bad
        answers = train_ppo.answers

        def counted(config, roles, prompts, sampling, step, partition):
            self.now = step
            return answers(config, roles, prompts, sampling, step, partition)

        monkeypatch.setattr(train_ppo, "answers", counted)
        self.patch = monkeypatch

    def spoil(self, module, name, change):
        real = getattr(module, name)

        def wrapped(*args, **keywords):
            out = real(*args, **keywords)
            return change(out) if self.now in self.bad else out

        self.patch.setattr(module, name, wrapped)


def of_rollout(name):
    return lambda r: dataclasses.replace(r, **{name: spoil(getattr(r, name))})


TENSORS = {
    "scores": ("train", "answers", of_rollout("scores"), "scores of answer 0"),
    "old_logprobs": ("train", "answers", of_rollout("old_logprobs"), "old logprobs of answer 0, token 0"),
    "ref_logprobs": ("train", "answers", of_rollout("ref_logprobs"), "ref logprobs of answer 0, token 0"),
    "values": ("train", "answers", of_rollout("values"), "values of answer 0, token 0"),
    "rewards": ("ppo", "shape_rewards", spoil, "rewards of answer 0, token 0"),
    "advantages": ("ppo", "gae", lambda out: (spoil(out[0]), out[1]), "advantages of answer"),
    "returns": ("ppo", "gae", lambda out: (out[0], spoil(out[1])), "returns of answer 0, token 0"),
    "logprobs": ("ppo", "policy_stats", lambda out: {**out, "logprobs": out["logprobs"] + NAN}, "loss of the policy"),
    "new values": ("ppo", "state_values", lambda out: out + NAN, "loss of the value"),
    "policy loss": ("ppo", "policy_loss", lambda out: out * NAN, "loss of the policy"),
    "value loss": ("ppo", "value_loss", lambda out: out * float("inf"), "loss of the value"),
    "entropy": (
        "ppo",
        "policy_stats",
        lambda out: {**out, "entropy": out["entropy"] * NAN},
        "gradient of the CausalLM",
    ),
}


@pytest.mark.parametrize("name", TENSORS)
def test_nan_in_a_tensor_is_named_and_ends_the_third_step(name, ppo_run, monkeypatch):
    where, function, change, words = TENSORS[name]
    steps = Steps(monkeypatch, {2, 3, 4})
    steps.spoil({"train": train_ppo, "ppo": ppo}[where], function, change)
    code, err, folder = ppo_run(*(["--ppo.entropy_coef", "0.01"] if name == "entropy" else []))
    assert code == 5, err
    error = next(line for line in err.splitlines() if line.startswith("error: "))
    assert error.startswith(f"error: step 4: {words}")
    assert "every module's output is finite" in error
    report = json.loads((folder / "forensics/step_00000004/report.json").read_text())
    assert str(folder / "forensics/step_00000004/report.json") in error
    assert report["what"].startswith(words)
    assert len(report["answers"]) == 8
    assert {"prompt", "response", "length", "score"} == report["answers"][0].keys()
    assert [line["step"] for line in report["recent"]] == [1, 2, 3]
    assert {"response/length_mean", "objective/kl", "objective/scores"} <= report["recent"][0].keys()
    assert "minirlhf.ledger" in report["replay"]
    assert [line.get("skipped", 0) for line in lines(folder)] == [0, 1, 2]
    assert not (folder / "final").exists()


def test_the_kept_rollout_fails_again_from_the_weights_before_the_step(ppo_run, monkeypatch):
    steps = Steps(monkeypatch, {3, 4, 5})
    steps.spoil(train_ppo, "answers", of_rollout("scores"))
    code, _, folder = ppo_run("--run.save_every", "2", "--run.keep", "9")
    assert code == 5
    rollout, state, weights = load_rollout(folder / "rollouts/step_00000005.safetensors")
    assert state["step"] == 5
    assert rollout.scores[0].isnan()
    _, saved, _ = checkpoint.load_newest(folder / "checkpoints")  # after step 4, which changed nothing
    for group, named in saved.items():
        for name, x in named.items():
            assert_close(weights[group][name], x, exact)
    monkeypatch.undo()
    config = dataclasses.replace(
        train_ppo.PPOConfig().ppo,
        rollout_size=8,
        minibatch_size=4,
        microbatch_size=4,
        epochs=1,
        score_at=rollout.score_at,
    )
    with pytest.raises(NonFiniteError, match="scores of answer 0"):
        ppo.ppo_iteration(
            None, None, None, rollout, rollout.scores, epoch_plans(rollout.total_lengths, config, 0, 5), config,
            kl_coef=state["kl_coef"], temperature=1.0, max_grad_norm=1.0,
        )  # fmt: skip


@pytest.mark.parametrize("role", ["policy", "ref_policy", "value_model", "reward_model"])
def test_nan_in_a_weight_names_the_first_module(role, ppo_run, monkeypatch):
    real, seen, where = stage.ppo_roles, [], f"{role}.trunk.blocks.0"

    def roles(*args):
        seen.append(real(*args))
        return seen[0]

    def poison(out):
        model = getattr(seen[0][0], role)
        next(p for name, p in model.named_parameters() if "blocks.0" in name and p.ndim == 2).data[0, 0] = NAN
        return out

    monkeypatch.setattr(stage, "ppo_roles", roles)
    steps = Steps(monkeypatch, {1})
    steps.spoil(train_ppo, "ppo_iteration", poison)  # after the update of step 1
    code, err, folder = ppo_run()
    assert code == 5
    error = next(line for line in err.splitlines() if line.startswith("error: "))
    assert f"first in the output of {where}" in error
    assert error.startswith("error: step 4: ")
    report = json.loads((folder / "forensics/step_00000004/report.json").read_text())
    assert where in report["where"]
    if role == "policy":  # there is no rollout to keep
        assert "logits of row" in error
        assert (folder / "forensics/step_00000004/state/step_00000003/policy.safetensors").exists()


def test_fewer_than_three_in_a_row_are_skipped_and_nothing_is_learned_in_them(ppo_run, monkeypatch):
    steps = Steps(monkeypatch, {2, 3, 5, 6})
    steps.spoil(train_ppo, "answers", of_rollout("scores"))
    code, err, folder = ppo_run("--run.save_every", "1", "--run.keep", "9")
    assert (code, err) == (0, "")
    assert [line.get("skipped", 0) for line in lines(folder)] == [0, 1, 2, 0, 1, 2, 0]
    weights = {step: (folder / f"checkpoints/step_{step:08d}/policy.safetensors").read_bytes() for step in range(1, 8)}
    assert weights[1] == weights[2] == weights[3] != weights[4] == weights[5] == weights[6] != weights[7]


def test_the_first_step_may_be_skipped_too(ppo_run, monkeypatch):
    """Scores are then measured against the first rollout that has them."""
    steps = Steps(monkeypatch, {1})
    steps.spoil(train_ppo, "answers", of_rollout("scores"))
    code, _, folder = ppo_run("--run.save_every", "1", "--run.keep", "9")
    assert code == 0
    states = [json.loads((folder / f"checkpoints/step_{s:08d}/state.json").read_text()) for s in (1, 2, 7)]
    assert "shift" not in states[0]
    assert states[1]["shift"] == states[2]["shift"] == lines(folder)[1]["objective/scores"]


def test_the_count_survives_a_stop(ppo_run, monkeypatch):
    """Two steps are skipped, a signal ends the run, the resumed run's first step is the third."""

    def watch(run, step, limits):
        run.signal = 143 if step == 3 else 0

    with monkeypatch.context() as patch:
        Steps(patch, {2, 3}).spoil(train_ppo, "answers", of_rollout("scores"))
        patch.setattr(train_ppo, "watch", watch)
        with pytest.raises(SystemExit):
            ppo_run()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_DFL)  # the handlers hold the run, and the run its lock
    gc.collect()
    with monkeypatch.context() as patch:
        Steps(patch, {4}).spoil(train_ppo, "answers", of_rollout("scores"))
        code, err, _ = ppo_run("--run.resume", "true")
    assert code == 5, err
    assert "error: step 4: scores of answer 0" in err


@pytest.mark.parametrize(
    ("change", "word"), [(lambda x: x * NAN, "loss"), (lambda x: x + 0 * (x - x.detach()).sqrt(), "gradient")]
)
def test_supervised_steps_too(trained, tmp_path, monkeypatch, capsys, change, word):
    """x - x is 0, and the slope of its root is infinite."""
    monkeypatch.chdir(trained)
    real, calls = train_sft.label_logprobs, []

    def found(*args, **keywords):
        logprobs, labels = real(*args, **keywords)
        calls.append(1)
        return change(logprobs) if len(calls) > 4 else logprobs, labels  # two microbatches a step

    monkeypatch.setattr(train_sft, "label_logprobs", found)
    assert run("sft", "--run.dir", str(tmp_path / "s")) == 5
    error = next(x for x in capsys.readouterr().err.splitlines() if x.startswith("error"))
    assert error.startswith(f"error: step 5: the {word} is NaN or infinite")
    report = json.loads((tmp_path / "s/forensics/step_00000005/report.json").read_text())
    assert report["where"] == "every module's output is finite"
    state = checkpoint.load_newest(tmp_path / "s/forensics/step_00000005/state")
    assert state[0] == 4
    saved = checkpoint.load_newest(tmp_path / "s/checkpoints")
    assert saved[0] == 4
    for name, x in saved[1]["model"].items():
        assert torch.equal(state[1]["model"][name], x)


def test_weights_that_the_last_step_spoiled_are_not_handed_on(trained, tmp_path, monkeypatch, capsys):
    """AdamW with eps 0 divides 0 by 0 where a gradient has always been 0; two steps are too few to end the run."""
    monkeypatch.chdir(trained)
    out = tmp_path / "s"
    assert run("sft", "--run.dir", str(out), "--run.steps", "3", "--optim.eps", "0") == 5
    assert "model.trunk" in capsys.readouterr().err.splitlines()[-1]
    assert not (out / "final").exists()


# ---- pieces ---------------------------------------------------------------------------------------------------------


def test_require_finite_names_the_first_tensor_and_place():
    good, bad = torch.zeros(2, 3), torch.zeros(2, 3)
    bad[1, 2] = float("-inf")
    require_finite(a=good, b=good)
    with pytest.raises(NonFiniteError, match=r"old logprobs of answer 1, token 2: -inf"):
        require_finite(a=good, old_logprobs=bad, c=bad)


def test_the_innermost_module_comes_first():
    model = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Sequential(torch.nn.ReLU(), torch.nn.Linear(2, 2)))
    x = torch.ones(1, 2)
    assert first_bad_module({"m": model}, lambda: model(x)) == "every module's output is finite"
    model[1][1].weight.data[0, 0] = NAN
    assert first_bad_module({"m": model}, lambda: model(x)) == "first in the output of m.1.1"
    assert not any(module._forward_hooks for module in model.modules())
