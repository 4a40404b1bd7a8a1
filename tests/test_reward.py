"""Rewards, the controller of β and reward functions: what is refused, and with which words. Numbers: test_golden.py."""

import sys

import pytest
import torch
from tolerance import assert_close, exact, fp32

from minirlhf.errors import NonFiniteError, UsageError
from minirlhf.reward import AdaptiveKL, FixedKL, load_reward_fn, score_column, shape_rewards

MASK = torch.tensor([[True, True, False], [True, True, True], [False, False, False]])


# ---- shape_rewards --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_dtypes(dtype):
    scores, x = torch.tensor([1, 2, 3], dtype=dtype), torch.zeros(3, 3, dtype=dtype)
    rewards = shape_rewards(scores, x, x, MASK, kl_coef=0.1)
    assert rewards.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert_close(rewards, [[0, 1, 0], [0, 0, 2], [0, 0, 0]], exact)


@pytest.mark.parametrize(("score_at", "columns"), [("last", [1, 2, 0]), ("next", [2, 2, 1]), ("column", [2, 2, 2])])
def test_columns_of_the_score(score_at, columns):
    assert score_column(MASK, score_at).tolist() == columns
    rewards = shape_rewards(torch.ones(3), torch.zeros(3, 3), torch.zeros(3, 3), MASK, kl_coef=1.0, score_at=score_at)
    assert rewards[:2].argmax(1).tolist() == columns[:2]
    assert rewards.sum(1).tolist() == [1, 1, 0]  # an empty row gets nothing, wherever the score would land


def test_defaults_are_k1_and_the_last_token():
    logprobs, ref = torch.full((3, 3), -1.0), torch.full((3, 3), -1.5)
    rewards = shape_rewards(torch.ones(3), logprobs, ref, MASK, kl_coef=0.2)
    assert_close(rewards, [[-0.1, 0.9, 0], [-0.1, -0.1, 0.9], [0, 0, 0]], fp32)


@pytest.mark.parametrize("options", [{"kl": "k4"}, {"score_at": "first"}])
def test_unknown_words_are_refused(options):
    with pytest.raises(ValueError, match=next(iter(options.values()))):
        shape_rewards(torch.ones(3), torch.zeros(3, 3), torch.zeros(3, 3), MASK, kl_coef=0.1, **options)


def test_one_score_per_row():
    with pytest.raises(AssertionError, match="Size"):
        shape_rewards(torch.ones(2), torch.zeros(3, 3), torch.zeros(3, 3), MASK, kl_coef=0.1)
    with pytest.raises(AssertionError, match="Size"):
        shape_rewards(torch.ones(3, 1), torch.zeros(3, 3), torch.zeros(3, 3), MASK, kl_coef=0.1)


def test_everything_stays_on_the_device_of_the_mask():
    """As far as a machine without an accelerator can tell: tensors of the device `meta` do not mix with others."""
    x, mask = torch.zeros(3, 3, device="meta"), MASK.to("meta")
    for score_at in ("last", "next", "column"):
        assert score_column(mask, score_at).device.type == "meta"
        rewards = shape_rewards(x[:, 0], x, x, mask, kl_coef=0.1, score_at=score_at)
        assert (rewards.device.type, rewards.shape) == ("meta", (3, 3))


# ---- controllers ----------------------------------------------------------------------------------------------------


def test_fixed_kl_stays():
    beta = FixedKL(0.3)
    beta.update(1e9, 1000)
    assert beta.coef == 0.3


@pytest.mark.parametrize(("target", "horizon"), [(0.0, 10.0), (-1.0, 10.0), (6.0, 0.0), (6.0, -5.0)])
def test_target_and_horizon_must_be_positive(target, horizon):
    with pytest.raises(UsageError, match="must be positive"):
        AdaptiveKL(0.2, target=target, horizon=horizon)


@pytest.mark.parametrize("kl", [float("nan"), float("inf"), torch.tensor(float("nan"))])
def test_a_kl_that_is_no_number_stops_the_run(kl):
    beta = AdaptiveKL(0.2, target=6.0, horizon=100.0)
    with pytest.raises(NonFiniteError, match="KL of the rollout"):
        beta.update(kl, 1)
    assert beta.coef == 0.2


def test_beta_stays_positive():
    """0.2 n/h = 1 would make β 0: that horizon is refused, one answer more is not."""
    beta = AdaptiveKL(0.2, target=6.0, horizon=20.0)
    with pytest.raises(UsageError, match=r"horizon .* is too short for 100 answers; take more than 20$"):
        beta.update(0.0, 100)
    assert beta.coef == 0.2
    beta.update(0.0, 99)
    assert beta.coef == pytest.approx(0.2 * 0.01)
    with pytest.raises(UsageError, match=r"horizon 20.5 .* for 104 answers; take more than 20\.8$"):
        AdaptiveKL(0.2, target=6.0, horizon=20.5).update(0.0, 104)
    small = AdaptiveKL(0.2, target=0.5, horizon=0.5)
    small.update(torch.tensor(0.5), 1)
    assert small.coef == 0.2
    assert type(small.coef) is float


# ---- reward functions -----------------------------------------------------------------------------------------------


@pytest.fixture
def module(tmp_path, monkeypatch):
    """→ write(text): a module of a new name in the current folder."""
    monkeypatch.chdir(tmp_path)

    def write(text):
        name = f"taste_{len(list(tmp_path.iterdir()))}_{tmp_path.name}".replace("-", "_")
        (tmp_path / f"{name}.py").write_text(text)
        return name

    return write


def test_a_function_of_the_current_folder(module):
    name = module("def brief(prompts, responses):\n    return [len(p) - len(r) for p, r in zip(prompts, responses)]")
    path = list(sys.path)
    score = load_reward_fn(f"{name}:brief")
    assert score(["abc", ""], ["a", "bb"]) == [2.0, -2.0]
    assert all(type(x) is float for x in score(["abc"], ["a"]))
    assert sys.path == path


def test_a_module_that_cannot_be_imported(module):
    name, path = module("raise RuntimeError('two\\n  lines')"), list(sys.path)
    with pytest.raises(UsageError, match=f"importing {name} failed: RuntimeError: two lines$"):
        load_reward_fn(f"{name}:f")
    assert sys.path == path


def test_the_current_folder_comes_first(module, tmp_path, monkeypatch):
    name = module("def f(prompts, responses):\n    return [7] * len(responses)")
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / f"{name}.py").write_text("def f(prompts, responses):\n    return [8] * len(responses)")
    monkeypatch.syspath_prepend(tmp_path / "elsewhere")
    assert load_reward_fn(f"{name}:f")(["p"], ["r"]) == [7.0]


def test_a_person_may_be_asked():
    assert load_reward_fn("human").__name__ == "checked"


@pytest.mark.parametrize("name", ["", "module", "module:", ":function"])
def test_names_that_are_not_module_and_function(name):
    with pytest.raises(UsageError, match="is not module:function"):
        load_reward_fn(name)


@pytest.mark.parametrize("name", ["math:nothing", "math:pi"])
def test_a_module_without_the_function(name):
    with pytest.raises(UsageError, match="math has no function"):
        load_reward_fn(name)


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("return [1.0]", "returned 1 scores for 2 responses"),
        ("return [1.0, 2.0, 3.0]", "returned 3 scores for 2 responses"),
        ("return [0.0, float('nan')]", "returned nan for response 1: 'bb'"),
        ("return [float('inf'), float('nan')]", "returned inf for response 0: 'a'"),
        ("return [0.0, -1e39]", "returned -1e+39 for response 1: 'bb'"),  # which fp32 does not hold
        ("return ['x', 1]", "failed: ValueError: could not convert"),
        ("raise KeyError('gone')", "failed: KeyError: 'gone'"),
        ("return None", "failed: TypeError"),
    ],
)
def test_every_call_is_checked(module, body, message):
    score = load_reward_fn(f"{module(f'def f(prompts, responses):{chr(10)}    {body}')}:f")
    with pytest.raises(UsageError) as error:
        score(["p", "q"], ["a", "bb"])
    assert message in str(error.value)
    assert "\n" not in str(error.value)
