"""The options without a critic, through the same loop: the optimum in closed form, as docs/optima.md says."""

import pytest
from test_optimum import CLOSE, distance

NO_CRITIC = {"value_coef": 0.0, "answers_per_prompt": 4}


def test_rloo_reaches_the_optimum():
    """One table; the others, and the other baselines, with -m slow."""
    assert distance(2, steps=120, advantage="rloo", **NO_CRITIC)[1] <= CLOSE


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 2])
def test_a_mean_over_all_states_is_a_baseline_with_noise(seed):
    """At π* the reward to go of a state is no noise, but states differ, and one mean cannot follow them all."""
    assert distance(seed, advantage="reinforce", **NO_CRITIC)[1] <= 3 * CLOSE


@pytest.mark.slow
@pytest.mark.parametrize(
    "changes",
    [{"policy_loss": "dual_clip"}, {"policy_loss": "gspo", "epochs": 1, "minibatch_size": 512},
     {"policy_loss": "cispo"}, {"clip_range": float("inf")}],
)  # fmt: skip
def test_every_policy_loss_reaches_the_optimum(changes):
    """On a policy that no longer moves every ratio is 1, and each loss has the policy gradient's zero. GSPO's ratio is
    no importance weight: with several steps on a rollout and ε 0.2 it ends at 0.018."""
    assert distance(2, advantage="rloo", **NO_CRITIC, **changes)[1] <= CLOSE


@pytest.mark.slow
def test_the_penalty_in_the_loss_does_not():
    how = {"advantage": "grpo", "kl_in": "loss", "kl": "k3"}
    assert distance(2, **how, **NO_CRITIC)[1] > 4 * CLOSE
