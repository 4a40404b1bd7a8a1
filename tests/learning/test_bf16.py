"""PPO with matrix products in bf16 comes to where fp32 comes to."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from processes import ENV, ROOT


def run(name, *argv, cwd):
    done = subprocess.run([sys.executable, ROOT / f"train_{name}.py", *argv], cwd=cwd, env=ENV, capture_output=True)
    assert done.returncode == 0, done.stderr.decode()


def after(folder):
    return json.loads((Path(folder) / "evaluation.json").read_text())["after"]


@pytest.mark.slow
def test_bf16_reaches_the_gold_of_fp32(tmp_path):
    run("sft", cwd=tmp_path)
    run("rm", "--run.steps", "1024", cwd=tmp_path)
    for dtype in ("fp32", "bf16"):
        run("ppo", "--run.steps", "60", "--run.dtype", dtype, "--run.dir", dtype, cwd=tmp_path)
    full, low = after(tmp_path / "fp32"), after(tmp_path / "bf16")
    assert full["gold"] > 0.2  # it has learned something
    assert abs(low["gold"] - full["gold"]) <= 0.1
    lines = [json.loads(x) for x in (tmp_path / "bf16/metrics.jsonl").read_text().splitlines()]
    assert all(line["val/first_ratio_gap"] == 0 for line in lines)
    assert max(line["sampler/mismatch_mean"] for line in lines) < 2e-2
