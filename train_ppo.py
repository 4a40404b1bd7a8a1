"""Stage 3, PPO: answers that the reward model likes, near the model one started from (Ouyang et al. 2022, eq. 2).

Maximises E[score(prompt, answer)] - β KL(π ‖ π_ref) with four roles: policy, frozen reference, frozen reward model, value model.
The step itself is `minirlhf/ppo.py`, the rollout `minirlhf/rollout.py`.

    python train_ppo.py                                                  the built-in task, after the other two scripts
    python train_ppo.py --model.path SFT --reward.path RM --ppo.prompts "first,second"
    python train_ppo.py --model.path SFT --reward.fn my_module:reward    a function of texts instead of a model
"""

import sys
import time
from functools import partial
from typing import Any

from minirlhf import stage
from minirlhf.checkpoint import load_module, load_optimizer, module_tensors, optimizer_tensors
from minirlhf.config import PPOConfig
from minirlhf.data import encode_prompts, left_padded, step_rows
from minirlhf.evaluate import examine, summary
from minirlhf.optim import adamw, lr_factor, set_lr
from minirlhf.ppo import epoch_plans, ppo_iteration, rollout_metrics, score_answers
from minirlhf.report import write_report
from minirlhf.reward import AdaptiveKL, FixedKL
from minirlhf.rng import generator
from minirlhf.rollout import collect
from minirlhf.run import Run, run_script, write_json

SHOWN = (0, 10, 16, 100)  # iterations after which the same prompts are answered for the report, and the last one
WORDS = ("objective/scores", "gold/score", "objective/kl", "response/length_mean", "tokens_per_s")


def main(config: PPOConfig, run: Run) -> None:
    """Roles, loop, final/."""
    c, o, p = config, config.optim, config.ppo
    roles, loaded, _ = stage.ppo_roles(c)
    policy, value_model, tokenizer = roles.policy, roles.value_model, loaded.tokenizer
    prompts, gold = stage.prompt_texts(c, run), stage.gold_reward(c)
    room = policy.config.max_seq_len - c.sample.max_new_tokens
    encoded, counts = encode_prompts(prompts, tokenizer, loaded.template, room)
    stage.report_counts("prompts", counts, len(prompts))
    sampling = stage.sampling(c, loaded)
    exam = partial(examine, roles, tokenizer=tokenizer, sampling=sampling, gold=gold, seed=c.run.seed, device=c.run.device)

    named = [(f"{role}.{n}", x) for role in ("policy", "value_model") for n, x in getattr(roles, role).named_parameters()]
    optimizer = adamw(named, lr=o.lr, weight_decay=o.weight_decay, betas=o.betas, eps=o.eps)
    start, tensors, state = run.restore() or (0, {}, {"kl_coef": p.kl_coef, "shift": 0.0, "scale": 1.0})
    if tensors:
        load_module(policy, tensors["policy"])
        load_module(value_model, tensors["value_model"])
        load_optimizer(optimizer, named, tensors["optimizer"])
    beta = AdaptiveKL(state["kl_coef"], target=p.kl_target, horizon=p.kl_horizon) if p.kl_target else FixedKL(p.kl_coef)

    def snapshot() -> tuple[dict[str, Any], dict[str, Any]]:
        weights = {"policy": module_tensors(policy), "value_model": module_tensors(value_model)}
        return weights | {"optimizer": optimizer_tensors(optimizer, named)}, state | {"kl_coef": beta.coef}

    def show(step: int) -> None:
        for record in exam(encoded[:6]):
            run.sample(step, **record)

    if start == 0:
        show(0)
        write_json(run.folder / "evaluation.json", {"before": summary(exam(stage.cycle(encoded, 1024)))})
    for step in run.steps(start, snapshot):
        began = time.perf_counter()
        rows = step_rows(len(encoded), p.rollout_size, step - 1, seed=c.run.seed)
        ids, mask = left_padded([encoded[r] for r in rows], sampling["pad_token_id"], c.run.device)
        plan = partial(epoch_plans, options=p, seed=c.run.seed, iteration=step)
        rngs = [generator(c.run.seed, "sample", step, row) for row in range(len(rows))]
        with stage.precision(c.run):
            rollout = collect(roles, ids, mask, partition=lambda n: sum(plan(n)[0], []), rng=rngs, **sampling)  # noqa: B023
        metrics = rollout_metrics(rollout)
        if gold:
            golds = gold(*rollout.texts(tokenizer), rollout.has_eos.tolist())
            metrics["gold/score"] = sum(golds) / len(golds)
        if step == 1 and p.score_norm == "first":
            state |= {"shift": metrics["objective/scores"], "scale": max(metrics["objective/scores_std"], 1e-8)}
        scores = score_answers(rollout.scores, rollout.has_eos, p, state["shift"], state["scale"])
        collected = time.perf_counter()

        lr = o.lr * lr_factor(step, kind=o.schedule, warmup=o.warmup_steps, total=c.run.steps, final=o.final_lr)
        set_lr(optimizer, lr)
        metrics |= {"lr": lr, "objective/kl_coef": beta.coef, "episode": step * p.rollout_size}
        with stage.precision(c.run):
            metrics |= ppo_iteration(
                policy, value_model, optimizer, rollout, scores, plan(rollout.lengths), p,
                kl_coef=beta.coef, temperature=c.sample.temperature, max_grad_norm=o.max_grad_norm,
            )  # fmt: skip
        beta.update(metrics["objective/kl"], p.rollout_size)
        done = time.perf_counter()
        metrics |= {"time/rollout_s": collected - began, "time/update_s": done - collected}
        metrics["tokens_per_s"] = int(rollout.lengths.sum()) / (done - began)
        run.log(step, metrics, WORDS)
        if step in SHOWN or step == c.run.steps:
            show(step)

    stage.write_evaluation(run, summary(exam(stage.cycle(encoded, 1024))), gold is not None)
    final = run.finish(lambda folder: stage.save_ppo(folder, loaded, value_model))
    run.say(f"model: {final}\nreport: {write_report(run.folder)}")


if __name__ == "__main__":
    sys.exit(run_script(main, PPOConfig, "ppo"))
