"""The options without a critic, through the same loop: the optimum in closed form, as docs/optima.md says."""

import pytest
from test_optimum import CLOSE, TABLES, distance

NO_CRITIC = {"value_coef": 0.0, "answers_per_prompt": 4}


def test_rloo_reaches_the_optimum():
    """One table; the others, and the other baselines, with -m slow."""
    assert distance(2, steps=120, advantage="rloo", **NO_CRITIC)[1] <= CLOSE


@pytest.mark.slow
@pytest.mark.parametrize("seed", TABLES)
@pytest.mark.parametrize("advantage", ["rloo", "grpo", "reinforce"])
def test_every_baseline_reaches_the_optimum_of_every_table(advantage, seed):
    assert distance(seed, advantage=advantage, **NO_CRITIC)[1] <= CLOSE


@pytest.mark.slow
@pytest.mark.parametrize(
    "changes",
    [{"policy_loss": "dual_clip"}, {"policy_loss": "gspo"}, {"policy_loss": "cispo"}, {"clip_range": float("inf")}],
)
def test_every_policy_loss_reaches_the_optimum(changes):
    """On a policy that no longer moves every ratio is 1, and each loss has the policy gradient's zero."""
    assert distance(2, advantage="rloo", **NO_CRITIC, **changes)[1] <= CLOSE


@pytest.mark.slow
def test_the_penalty_in_the_loss_does_not():
    how = {"advantage": "grpo", "kl_in": "loss", "kl": "k3"}
    assert distance(2, **how, **NO_CRITIC)[1] > 4 * CLOSE
