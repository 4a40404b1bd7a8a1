"""PPO without a critic, beside texts, under two ranks: the same numbers as one process."""

import shutil

import pytest
from test_scripts import TINY, script
from test_scripts_dist import assert_same_run, torchrun

ARGV = [
    "--run.steps", "2", "--ppo.rollout_size", "16", "--ppo.minibatch_size", "8", "--ppo.microbatch_size", "2",
    "--reward.fn", "taste:brief", "--ppo.advantage", "rloo", "--ppo.answers_per_prompt", "4", "--ppo.kl_in", "loss",
    "--ppo.kl", "k3", "--ppo.loss_mean", "answer", "--ppo.policy_loss", "gspo", "--ppo.ptx_coef", "2", "--ppo.ema",
    "0.9", "--data.size", "200", "--optim.eps", "1e-5",  # as in test_scripts_dist
]  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["none", "mini", "torch"])
def test_two_ranks_are_one_process(tmp_path, engine):
    script("sft", *TINY["sft"], cwd=tmp_path)
    (tmp_path / "taste.py").write_text(
        "def brief(prompts, responses):\n    return [-float(len(r)) for r in responses]\n"
    )
    script("ppo", *ARGV, "--run.dir", "one", cwd=tmp_path)
    torchrun("ppo", 2, *ARGV, "--run.engine", engine, "--run.dir", "two", cwd=tmp_path)
    assert_same_run(tmp_path / "two", tmp_path / "one")


def test_a_reward_model_as_a_function_of_texts_is_asked_by_each_rank(tmp_path, stages):
    """`reward_of` must not take the other rank's answers for its own."""
    shutil.copytree(stages, tmp_path, dirs_exist_ok=True)
    (tmp_path / "mine.py").write_text("from minirlhf.score import reward_of\n\nreward = reward_of('runs/rm/final')\n")
    argv = [*TINY["ppo"], "--reward.fn", "mine:reward", "--optim.eps", "1e-5"]
    script("ppo", *argv, "--run.dir", "one", cwd=tmp_path)
    torchrun("ppo", 2, *argv, "--run.dir", "two", cwd=tmp_path)
    assert_same_run(tmp_path / "two", tmp_path / "one")
