"""TRL 0.11.4, third witness of its presets: its defaults, and its own functions on the rollout of the golden file."""

from types import SimpleNamespace

import numpy as np
import numpy_ppo as peer
import pytest
import torch
from test_ppo_presets import FILES, WITHIN, Bigram, Table, far, tensor, weights

from minirlhf.config import preset_options

trl = pytest.importorskip("trl", reason="TRL is not installed")
if not trl.__version__.startswith("0.11."):
    pytest.skip("TRL 0.11 is the last with both trainers", allow_module_level=True)
from trl import PPOConfig, PPOTrainer, PPOv2Config  # noqa: E402
from trl.trainer.utils import first_true_indices  # noqa: E402


def stand_in():
    """What TRL's methods read of their trainer, with TRL's own defaults."""
    from trl.trainer import AdaptiveKLController

    config = PPOConfig()
    controller = AdaptiveKLController(config.init_kl_coef, config.target, config.horizon)
    trainer = SimpleNamespace(config=config, kl_ctl=controller)
    trainer._kl_penalty = lambda *z: PPOTrainer._kl_penalty(trainer, *z)
    return trainer


def test_the_preset_holds_trls_defaults():
    p, c = preset_options("trl-legacy"), PPOConfig()
    ours = (p["ppo.kl_coef"], p["ppo.kl_target"], p["ppo.kl_horizon"], p["ppo.gamma"], p["ppo.gae_lambda"],
            p["ppo.clip_range"], p["ppo.value_clip_range"], p["ppo.value_coef"], p["ppo.epochs"],
            p["ppo.whiten_rewards"], p["ppo.score_norm"], p["ppo.score_clip"] or None)  # fmt: skip
    assert ours == (c.init_kl_coef, c.target, c.horizon, c.gamma, c.lam, c.cliprange, c.cliprange_value, c.vf_coef,
                    c.ppo_epochs, c.whiten_rewards, "none" if not c.use_score_norm else "", c.score_clip)  # fmt: skip
    assert (c.adap_kl_ctrl, c.kl_penalty) == (True, "kl")


def test_the_preset_of_the_second_trainer_holds_its_defaults():
    p, c = preset_options("trl-v2"), PPOv2Config(output_dir="unused")
    ours = (p["ppo.kl_coef"], p["ppo.gamma"], p["ppo.gae_lambda"], p["ppo.clip_range"], p["ppo.value_clip_range"],
            p["ppo.value_coef"], p["ppo.epochs"], p["ppo.whiten_rewards"])  # fmt: skip
    assert ours == (c.kl_coef, c.gamma, c.lam, c.cliprange, c.cliprange_value, c.vf_coef, c.num_ppo_epochs,
                    c.whiten_rewards)  # fmt: skip


def test_one_step_of_trls_own_functions_is_the_golden_step():
    """compute_rewards, compute_advantages and loss of TRL under torch's autograd and AdamW; microbatches averaged, as
    its accumulation of gradients does."""
    golden, trainer, a = FILES["trl-legacy"], stand_in(), peer.ADAM
    x, want = {k: tensor(v) for k, v in golden["inputs"].items()}, golden["expected"]
    mask = (torch.arange(peer.R) < x["lengths"][:, None]).double()  # an integer mask would round its variance to fp32
    rewards, _, kls = PPOTrainer.compute_rewards(trainer, x["scores"], x["old_logprobs"], x["ref_logprobs"], mask)
    assert far(rewards * mask, want["rewards"]) <= WITHIN
    assert far((kls * mask).sum(1).mean(), want["kl"]) <= WITHIN
    values, advantages, returns = PPOTrainer.compute_advantages(trainer, x["values"], rewards, mask)

    models = Bigram(x["E"], x["H"]), Table(x["U"])
    parameters = [p for model in models for p in model.parameters()]
    microbatches = peer.PLANS[0][0]
    rows = np.concatenate(microbatches)
    for name, column in (("advantages", advantages), ("returns", returns)):
        assert far((column * mask)[rows], want["first"][name]) <= WITHIN
    for index in map(torch.tensor, microbatches):
        before = torch.cat([x["prompts"], x["responses"]], 1)[index, peer.P - 1 : -1]
        logits = models[0].head(models[0].hidden(before)) / peer.TAU
        logprobs = logits.log_softmax(-1).gather(-1, x["responses"][index][..., None])[..., 0]
        policy, value, _ = PPOTrainer.loss(
            trainer, x["old_logprobs"][index], values[index], logits, models[1](before), logprobs, mask[index],
            advantages[index], returns[index],
        )  # fmt: skip
        ((policy + value) / len(microbatches)).backward()
    for k, g in (("E", models[0].embed.weight), ("H", models[0].head.weight), ("U", models[1].embed.weight)):
        assert far(g.grad.squeeze(-1), want["first"]["gradients"][k]) <= WITHIN
    for model in models:
        torch.nn.utils.clip_grad_norm_(model.parameters(), a["max_norm"])
    torch.optim.AdamW(parameters, lr=a["lr"], betas=a["betas"], eps=a["adam_eps"], weight_decay=a["decay"]).step()
    assert all(far(w, want["first"]["weights"][k]) <= WITHIN for k, w in weights(models).items())
    trainer.kl_ctl.update(want["kl"], peer.B)
    assert far(trainer.kl_ctl.value, want["next_kl_coef"]) <= WITHIN


def test_where_the_second_trainer_puts_the_score():
    """`first_true_indices` of the padding gives the length; its line of `train` adds 1 where that is a column."""
    golden = FILES["trl-v2"]
    lengths, rewards = tensor(golden["inputs"]["lengths"]), tensor(golden["expected"]["rewards"])
    padding = torch.arange(peer.R) >= lengths[:, None]
    sequence_lengths = first_true_indices(padding) - 1
    one_more = sequence_lengths + 1
    actual_end = torch.where(one_more < peer.R, one_more, sequence_lengths)
    penalty = tensor(golden["inputs"]["old_logprobs"]) - tensor(golden["inputs"]["ref_logprobs"])
    bonus = rewards + 0.05 * torch.where(padding, 0.0, penalty)
    placed = torch.zeros_like(bonus)
    placed[torch.arange(peer.B), actual_end] = tensor(golden["expected"]["scores"])
    assert far(bonus, placed) <= WITHIN
