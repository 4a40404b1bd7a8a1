"""The three scripts as a user runs them: subprocesses, tiny settings, exit codes, files, resumption."""

import hashlib
import json
import os
import signal
import time

import processes
import pytest
from processes import ROOT

TINY = {
    "sft": ["--run.steps", "30", "--data.size", "600", "--optim.warmup_steps", "3", "--sft.eval_every", "15"],
    "rm": ["--run.steps", "12", "--data.size", "200", "--optim.warmup_steps", "2", "--rm.minibatch_size", "32",
           "--rm.microbatch_size", "32", "--rm.eval_every", "6"],
    "ppo": ["--run.steps", "3", "--ppo.rollout_size", "16", "--ppo.minibatch_size", "8", "--ppo.microbatch_size", "8"],
}  # fmt: skip


def start(name, *argv, cwd):
    return processes.start(ROOT / f"train_{name}.py", *argv, cwd=cwd)


def script(name, *argv, cwd, code=0, run=processes.run):
    found, out, err = run(ROOT / f"train_{name}.py", *argv, cwd=cwd)
    assert found == code, f"exit code {found}, not {code}\n{out}\n{err}"
    if code in (2, 3, 4, 5):
        lines = [line for line in err.splitlines() if line.startswith("error: ")]
        assert len(lines) == 1, err
        assert "Traceback" not in err
        return lines[0]
    return out


def killed(name, *argv, cwd):
    """The script, forked as `script` is, until its second checkpoint; the last argument is its folder."""
    command = [str(x) for x in (ROOT / f"train_{name}.py", *argv)]
    process = processes.forked(processes.interpreter, command, str(cwd), [os.devnull] * 3)
    while process.is_alive() and not (argv[-1] / "checkpoints/step_00000002").exists():
        time.sleep(0.005)
    process.kill()
    process.join()
    assert not (argv[-1] / "final").exists()


def metrics(folder):
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [
        {k: v for k, v in json.loads(x).items() if not k.startswith("time/") and k != "tokens_per_s"} for x in lines
    ]


def digests(folder):
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in sorted(folder.rglob("*")) if p.is_file()}


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory):
    """One folder in which the three scripts have run with no run.dir."""
    cwd = tmp_path_factory.mktemp("pipeline")
    said = {name: script(name, *TINY[name], cwd=cwd, run=processes.run_anew) for name in ("sft", "rm", "ppo")}
    return cwd, said


def test_the_whole_of_rlhf(pipeline):
    cwd, said = pipeline
    for name in ("sft", "rm", "ppo"):
        folder = cwd / "runs" / name
        for part in ("config.json", "metrics.jsonl", "checkpoints", "report.html", "final/config.json",
                     "final/model.safetensors", "final/tokenizer.json"):  # fmt: skip
            assert (folder / part).exists(), part
        assert f"runs/{name}/report.html" in said[name]
        assert metrics(folder)[0]["step"] == 1
    ppo = metrics(cwd / "runs/ppo")
    assert ppo[0]["objective/kl"] == 0
    assert ppo[0]["val/first_ratio_gap"] == 0
    assert all(m["val/first_ratio_gap"] == 0 for m in ppo)
    assert ppo[1]["objective/kl"] != 0
    wanted = (
        "objective/scores policy/approxkl_avg policy/clipfrac_avg loss/policy_avg loss/value_avg val/ratio lr episode "
        "response/length_mean response/empty_frac response/eos_frac value/explained_var gold/score"
    )
    assert set(wanted.split()) <= ppo[0].keys()
    samples = [json.loads(x) for x in (cwd / "runs/ppo/samples.jsonl").read_text().splitlines()]
    assert {s["step"] for s in samples} == {0, 3}
    assert {"step", "prompt", "response", "score", "gold"} <= samples[0].keys()
    assert {"accuracy", "accuracy_low", "accuracy_high", "exact_order"} <= {
        k.removeprefix("val/") for k in metrics(cwd / "runs/rm")[-1]
    }
    assert len(json.loads((cwd / "runs/rm/probe.json").read_text())["probe"]) >= 8
    exams = json.loads((cwd / "runs/ppo/evaluation.json").read_text())
    assert [exams[when]["answers"] for when in ("before", "after")] == [64, 64]


def test_a_rerun_is_bitwise_equal_and_sets_the_earlier_run_aside(pipeline):
    cwd, _ = pipeline
    for name in ("sft", "ppo"):
        before, earlier = digests(cwd / f"runs/{name}/final"), metrics(cwd / f"runs/{name}")
        script(name, *TINY[name], cwd=cwd)  # off a process with other hash seeds
        assert digests(cwd / f"runs/{name}/final") == before
        assert digests(cwd / f"runs/{name}.1/final") == before
        assert metrics(cwd / f"runs/{name}") == earlier


def test_a_resolved_config_is_a_config(pipeline):
    cwd, _ = pipeline
    script("sft", "runs/sft/config.json", "--run.dir", "again", cwd=cwd)
    assert digests(cwd / "again/final") == digests(cwd / "runs/sft/final")


@pytest.mark.parametrize("name", [*(pytest.param(name, marks=pytest.mark.slow) for name in ("sft", "rm")), "ppo"])
def test_a_killed_run_resumes_bit_for_bit(pipeline, name, tmp_path):
    cwd, _ = pipeline
    argv = [*TINY[name], "--run.save_every", "1", "--run.log_every", "1", "--run.dir"]
    script(name, *argv, tmp_path / "whole", cwd=cwd)
    killed(name, *argv, tmp_path / "cut", cwd=cwd)
    script(name, *argv, tmp_path / "cut", "--run.resume", "true", cwd=cwd)
    assert digests(tmp_path / "cut/final") == digests(tmp_path / "whole/final")
    assert metrics(tmp_path / "cut") == metrics(tmp_path / "whole")
    if name == "ppo":
        assert (tmp_path / "cut/samples.jsonl").read_text() == (tmp_path / "whole/samples.jsonl").read_text()
        assert (tmp_path / "cut/evaluation.json").read_text() == (tmp_path / "whole/evaluation.json").read_text()


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_ends_a_step_saves_and_says_so(pipeline, tmp_path, number, code):
    cwd, _ = pipeline
    process = start("sft", "--data.size", "600", "--run.dir", tmp_path / "x", cwd=cwd)
    while not (tmp_path / "x/metrics.jsonl").exists():
        time.sleep(0.01)
    began = time.monotonic()
    process.send_signal(number)
    process.communicate(timeout=20)
    assert process.returncode == code
    assert time.monotonic() - began < 15
    assert len(list((tmp_path / "x/checkpoints").glob("step_*"))) == 1


def test_mistakes_end_in_one_line_and_their_code(pipeline, tmp_path):
    cwd, _ = pipeline
    (tmp_path / "empty.jsonl").write_text("")
    (tmp_path / "bad.jsonl").write_text('{"prompt": "a", "completion": "b"}\n{"prompt": 3}\n')
    (tmp_path / "file").write_text("")
    (tmp_path / "full").mkdir()
    (tmp_path / "full/letter.txt").write_text("mine")
    assert "nofile" in script("sft", "--data.path", "nofile", cwd=cwd, code=3)
    assert "empty.jsonl" in script("sft", "--data.path", tmp_path / "empty.jsonl", cwd=cwd, code=3)
    assert "bad.jsonl:2" in script("sft", "--data.path", tmp_path / "bad.jsonl", cwd=cwd, code=3)
    assert "run.steps" in script("sft", "--run.step", "3", cwd=cwd, code=2)
    assert "/proc" in script("sft", "--run.dir", "/proc/minirlhf", cwd=cwd, code=2)
    assert "file" in script("sft", "--run.dir", tmp_path / "file", cwd=cwd, code=2)
    assert "letter.txt" in script("sft", "--run.dir", tmp_path / "full", cwd=cwd, code=2)
    assert "finished" in script("sft", *TINY["sft"], "--run.dir", "runs/sft", cwd=cwd, code=2)
    assert "seed" in script("sft", *TINY["sft"], "--run.seed", "9", "--run.resume", "true", cwd=cwd, code=2)
    assert "cuda" in script("sft", "--run.device", "cuda:9", cwd=cwd, code=2)
    for device in ("meta", "mps", "cpu:7", "cuda:x"):
        assert device in script("sft", "--run.device", device, cwd=cwd, code=2)
    for name in ("sft", "dpo"):
        assert "triton" in script(name, "--run.impl", "triton", "--run.dir", "other", cwd=cwd, code=2)
    assert "sample.max_new_tokens" in script(
        "rm", "--sample.max_new_tokens", "100", "--run.dir", "other", cwd=cwd, code=3
    )
    assert "train_sft.py" in script("rm", cwd=tmp_path, code=4)
    assert "train_sft.py" in script("ppo", cwd=tmp_path, code=4)
    assert "train_rm.py" in script("ppo", "--reward.path", "nowhere", cwd=cwd, code=4)
    assert "nomodule" in script("ppo", "--reward.fn", "nomodule:f", cwd=cwd, code=2)
    assert "template" in script("rm", "--data.template", "chatml", cwd=cwd, code=2)
    assert (tmp_path / "full/letter.txt").read_text() == "mine"


def test_two_runs_in_one_folder_are_refused(pipeline, tmp_path):
    cwd, _ = pipeline
    first = start("sft", "--data.size", "600", "--run.dir", tmp_path / "x", cwd=cwd)
    while not (tmp_path / "x/metrics.jsonl").exists():
        time.sleep(0.01)
    try:
        assert "another process" in script("sft", "--run.dir", tmp_path / "x", cwd=cwd, code=2)
    finally:
        first.kill()
        first.communicate()


def test_ranked_texts_go_through_all_three_stages(tmp_path):
    words = ["good", "fine", "bad", "awful"]
    rows = ["\t".join(f"the {thing} number {i} was {w}" for w in words) for i in range(12) for thing in ("film", "tea")]
    (tmp_path / "ranked.tsv").write_text("\n".join(rows) + "\n")
    model = ["--model.d_model", "16", "--model.n_head", "2", "--data.holdout", "4", "--sft.minibatch_size", "8",
             "--sft.microbatch_size", "4"]  # fmt: skip
    data = ["--data.path", "ranked.tsv"]
    script("sft", *data, *model, "--run.steps", "5", "--optim.warmup_steps", "1", cwd=tmp_path)
    script("rm", *data, "--run.steps", "5", "--data.holdout", "4", "--optim.warmup_steps", "1",
           "--rm.minibatch_size", "8", "--rm.microbatch_size", "4", cwd=tmp_path)  # fmt: skip
    script("ppo", *TINY["ppo"], "--ppo.prompts", "the film,the tea", cwd=tmp_path)
    last = metrics(tmp_path / "runs/rm")[-1]
    assert last["val/pairs"] == 4 * 6
    assert "gold/score" not in metrics(tmp_path / "runs/ppo")[0]
    assert "prompts" in script("ppo", *TINY["ppo"], *data, cwd=tmp_path, code=3)


@pytest.mark.parametrize("name", ["sft", "rm", "dpo"])
def test_texts_that_may_be_longer_than_the_positions_are_refused_before_the_first_step(pipeline, tmp_path, name):
    """However late a step would meet one."""
    cwd, _ = pipeline
    row = {"prompt": "Human: how was the hotel ? Assistant:", "chosen": "bed great .", "rejected": "bed awful ."}
    (tmp_path / "data.jsonl").write_text(json.dumps(row) + "\n")
    argv = ["--model.path", "runs/sft/final", "--data.path", tmp_path / "data.jsonl", "--data.max_length", 65]
    said = script(name, *argv, "--run.dir", tmp_path / "x", cwd=cwd, code=2)
    assert "data.max_length 65 exceeds the model's 64 positions; lower it" in said
    assert not (tmp_path / "x/metrics.jsonl").exists()


def test_a_python_function_is_a_reward(pipeline, tmp_path):
    cwd, _ = pipeline
    (cwd / "taste.py").write_text("def brief(prompts, responses):\n    return [-float(len(r)) for r in responses]\n")
    script("ppo", *TINY["ppo"], "--reward.fn", "taste:brief", "--run.dir", tmp_path / "x", cwd=cwd)
    samples = [json.loads(x) for x in (tmp_path / "x/samples.jsonl").read_text().splitlines()]
    assert all(s["score"] == -float(len(s["response"])) for s in samples)


def test_help_needs_no_folder(tmp_path):
    for name in ("sft", "rm", "ppo"):
        assert "--run.seed 0" in script(name, "--help", cwd=tmp_path)
    assert not list(tmp_path.iterdir())
