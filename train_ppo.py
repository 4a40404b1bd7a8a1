"""Stage 3, PPO: answers that the reward model likes, near the model one started from (Ouyang et al. 2022, eq. 2).

Maximises E[score(prompt, answer)] - β KL(π ‖ π_ref) with four roles: policy, frozen reference, frozen reward model,
value model. The step itself is in `minirlhf/ppo.py`, the rollout in `minirlhf/rollout.py`.

    python train_ppo.py                                                  the built-in task, after the other two scripts
    python train_ppo.py --model.path SFT --reward.path RM --ppo.prompts "first,second"
    python train_ppo.py --model.path SFT --reward.fn my_module:reward    a function of texts instead of a model
    python train_ppo.py --reward.fn human --ppo.rollout_size 8           your own judgement, a number per answer
"""

import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from itertools import chain
from typing import Any

from minirlhf import dist, stage
from minirlhf.alarms import Limits, alarms, signals
from minirlhf.config import PPOConfig, preset_line
from minirlhf.data import left_padded, step_rows
from minirlhf.engine import Engine, moment
from minirlhf.evaluate import EXAM, Gold, examine, frontier_share, summary
from minirlhf.forensics import Guard
from minirlhf.memory import dry_run
from minirlhf.ppo import epoch_plans, ppo_iteration, require_finite, rollout_metrics, score_answers, score_moments
from minirlhf.probe import PROBED, TextScore, write_probe
from minirlhf.ptx import Corpus
from minirlhf.records import Asked
from minirlhf.report import SHOWN_STEPS
from minirlhf.reward import AdaptiveKL, FixedKL, load_reward_fn
from minirlhf.rng import generator
from minirlhf.rollout import Partition, Roles, Rollout, collect, save_rollout
from minirlhf.run import Run, Snapshot, run_script, write_json
from minirlhf.safefile import read_json

Known = dict[tuple[int, ...], Asked]  # prompts as tokens → as they were asked
MEASURED = 256  # answers that ppo.metric_fn judges at once
WORDS = ("objective/scores", "gold/score", "objective/kl", "response/length_mean", "tokens_per_s")


def main(config: PPOConfig, run: Run) -> None:
    """Roles, loop, final/."""
    c, o, p = config, config.optim, config.ppo
    roles, loaded, of_texts = stage.ppo_roles(c)
    engine = Engine(c.run, [roles.policy, roles.ref_policy, roles.value_model, roles.reward_model])
    texts, prompts = stage.ppo_prompts(c, run, loaded)
    known: Known = dict(zip(map(tuple, prompts), texts, strict=True))
    score = stage.function_score(of_texts, loaded.tokenizer, known) if c.reward.fn else roles.score
    roles = roles._replace(gathered=engine.gathered, score=score)
    gold, sampling, limits = (stage.gold_reward(c), stage.sampling(c.sample, loaded),
                              Limits(p.kl_target, stage.score_limit(c)))  # fmt: skip
    exam = partial(examine, roles, tokenizer=loaded.tokenizer, sampling=sampling, gold=gold, seed=c.run.seed,
                   device=c.run.device, impl=c.run.impl)  # fmt: skip
    corpus, measure = Corpus(c, run, loaded, engine), measured(c, loaded, exam, known, prompts)

    trained, optimizer = stage.ppo_optimizer(roles, c)
    start, tensors, state = run.restore() or (0, {}, {"kl_coef": p.kl_coef})
    if tensors:
        engine.load(trained, optimizer, tensors)
    beta = AdaptiveKL(state["kl_coef"], target=p.kl_target, horizon=p.kl_horizon) if p.kl_target else FixedKL(p.kl_coef)

    def snapshot() -> tuple[dict[str, Any], dict[str, Any]]:
        return engine.state(trained, optimizer), state | {"kl_coef": beta.coef, "skipped": guard.skipped}

    guard = Guard(run, roles._asdict(), snapshot, state.get("skipped", 0))

    if p.preset:
        run.say(preset_line(c))
    if start == 0:
        look_first(run, exam, texts, prompts, engine.whole_in(roles.reward_model, of_texts))
    for step in run.steps(start, snapshot):
        metrics, rare, began = dict[str, Any](), dict[str, float](), time.perf_counter()
        lr = stage.set_scheduled_lr(optimizer, c, step)
        plan = partial(epoch_plans, options=p, seed=c.run.seed, iteration=step)
        ask = partial(answers, c, roles, prompts, sampling, step, lambda n: list(chain(*plan(n)[0])))  # noqa: B023
        with guard.step(step, ask):
            rollout = ask()
            guard.saw(rollout, loaded.tokenizer, {"shift": 0.0, "scale": 1.0} | state | {"step": step, "lr": lr})
            metrics |= rollout_metrics(rollout) | signals(rollout) | gold_metrics(rollout, loaded, gold)
            if "shift" not in state:  # of the first rollout
                require_finite(scores=rollout.scores)
                state |= score_moments(rollout.scores, p.score_norm)
            scores = score_answers(rollout.scores, rollout.has_eos, p, state["shift"], state["scale"])
            collected = time.perf_counter()
            keep_rollout(run, step, rollout, lr, snapshot)
            metrics |= ppo_iteration(
                roles.policy, roles.value_model, optimizer, rollout, scores, plan(rollout.total_lengths), p,
                kl_coef=beta.coef, temperature=c.sample.temperature, max_grad_norm=o.max_grad_norm,
                longest=c.sample.max_new_tokens, impl=c.run.impl, clip=engine.clip, precision=engine.precision,
                ptx=corpus.beside(step),
            )  # fmt: skip
            rare = corpus.perplexity(step) | measure(step)
            metrics |= rare | {"lr": lr, "objective/kl_coef": beta.coef, "episode": step * p.rollout_size}
            beta.update(metrics["objective/kl"], p.rollout_size)
            done = time.perf_counter()
            metrics |= {"time/rollout_s": collected - began, "time/update_s": done - collected,
                        "tokens_per_s": int(rollout.lengths.sum()) / (done - began)}  # fmt: skip
        run.log(step, metrics | guard.metrics, WORDS, rare=bool(rare))
        watch(run, step, limits)
        if not guard.skipped and (step in SHOWN_STEPS or step == c.run.steps):
            show(run, exam(prompts[:6]), step)

    guard.check_weights()
    look_last(run, exam, prompts)
    policy, critic, mean = (*map(engine.whole, (roles.policy, roles.value_model)),
                            engine.picked(roles.policy, moment(optimizer, "ema")))  # fmt: skip
    stage.conclude(run, lambda folder: stage.save_ppo(folder, loaded._replace(model=policy), critic, mean))


def look_first(
    run: Run, exam: Callable[..., list[Any]], texts: list[Asked], prompts: list[list[int]], of_texts: TextScore
) -> None:
    """Before the first step: is the reward model fit, what does the policy say to six prompts, how good is it."""
    c = run.config
    if not c.reward.fn:
        said = [record["response"] for record in exam(repeated(prompts, PROBED))]
        write_probe(run, of_texts, repeated(texts, PROBED), said, stop=c.ppo.probe == "stop")
    show(run, exam(prompts[:6]), 0)
    if c.reward.fn == "human":  # a person is asked about six answers, not about a thousand
        return
    write_json(run.folder / "evaluation.json", {"before": summary(exam(repeated(prompts, EXAM)))})


def measured(
    config: PPOConfig,
    loaded: stage.Loaded,
    exam: Callable[..., list[Any]],
    known: Known,  # to which held-out prompts are added
    prompts: list[list[int]],
) -> Callable[[int], dict[str, float]]:
    """By ppo.metric_fn, of answers to the held-out prompts of the file, or to all where none are; for the log alone."""
    c, p = config, config.ppo
    if not p.metric_fn:
        return lambda step: {}
    function, every = load_reward_fn(p.metric_fn, key="ppo.metric_fn"), p.eval_every or max(1, c.run.steps // 10)
    if c.data.path and c.data.holdout and not p.prompts:
        texts, prompts = stage.ppo_prompts(c, stage.unheard(), loaded, held_out=True)
        known.update(zip(map(tuple, prompts), texts, strict=True))

    def measure(step: int) -> dict[str, float]:
        if step % every and step != c.run.steps:
            return {}
        some = repeated(prompts, MEASURED)
        values = function([known[tuple(ids)] for ids in some], [record["response"] for record in exam(some)])
        return {"eval/metric": sum(values) / len(values)}

    return measure


def watch(run: Run, step: int, limits: Limits) -> None:
    """What the step's line of the log gives reason to."""
    logged = run.history and run.history[-1]["step"] == step  # by one rank, at steps that are due
    sound = [line for line in run.history if "skipped" not in line]
    run.alarm(step, alarms(sound, limits) if logged and sound else [], stop=run.config.ppo.on_alarm == "stop")


def look_last(run: Run, exam: Callable[..., list[Any]], prompts: list[list[int]]) -> None:
    """How good the policy has become."""
    if run.config.reward.fn == "human":
        return
    before = read_json(run.folder / "evaluation.json")["before"]
    after = summary(exam(repeated(prompts, EXAM)))
    if "gold" in after:
        after["frontier_share"] = frontier_share(before["gold"], after["gold"], after["kl"])
    write_json(run.folder / "evaluation.json", {"before": before, "after": after})
    run.say(verdict(before, after))


def answers(
    config: PPOConfig, roles: Roles, prompts: list[list[int]], sampling: dict[str, Any], step: int, partition: Partition
) -> Rollout:
    """The rollout of a step: its prompts, each as often as it has answers, a random stream for each of its rows."""
    c, K = config, config.ppo.answers_per_prompt
    drawn = step_rows(len(prompts), c.ppo.rollout_size // K, step - 1, seed=c.run.seed)
    rows = [r for r in drawn for _ in range(K)]
    ids, mask = left_padded([prompts[r] for r in rows], sampling["pad_token_id"], c.run.device)
    rngs = [generator(c.run.seed, "sample", step, row) for row in range(len(rows))]
    how: dict[str, Any] = {"score_at": c.ppo.score_at, "impl": c.run.impl, "rng": rngs}
    return collect(roles, ids, mask, partition=partition, **how, **sampling)


def keep_rollout(run: Run, step: int, rollout: Rollout, lr: float, snapshot: Snapshot) -> None:
    """Where ppo.save_rollouts says so: the rollout, and all that its update needs, for `python -m minirlhf.ledger`."""
    every = run.config.ppo.save_rollouts
    if every and step % every == 0:
        weights, state = snapshot()
        if dist.rank() != 0:
            return
        path = run.folder / f"rollouts/step_{step:08d}.safetensors"
        save_rollout(path, rollout, state | {"step": step, "lr": lr}, weights)


def gold_metrics(rollout: Rollout, loaded: stage.Loaded, gold: Gold | None) -> dict[str, float]:
    """The mean gold reward, where there is one. Training does not see it."""
    if gold is None:
        return {}
    golds = gold(*rollout.texts(loaded.tokenizer), rollout.has_eos.tolist())
    return {"gold/score": sum(golds) / len(golds)}


def verdict(before: dict[str, float], after: dict[str, float]) -> str:
    """The whole run in a line."""
    changes = [
        f"{name} {before[name]:.2f} → {after[name]:.2f}" for name in ("score", "gold", "length") if name in after
    ]
    share = f"; {after['frontier_share']:.0%} of the gold that this KL can buy" if "frontier_share" in after else ""
    return f"{', '.join(changes)} at KL {after['kl']:.2f} nats per answer{share}"


def show(run: Run, records: list[dict[str, Any]], step: int) -> None:
    """The same prompts after every so many iterations, in samples.jsonl."""
    for record in records:
        run.sample(step, **record)


def repeated(prompts: Sequence[Any], n: int) -> list[Any]:
    """n prompts, each as often as the others."""
    return [prompts[i % len(prompts)] for i in range(n)]


if __name__ == "__main__":
    sys.exit(run_script(main, PPOConfig, "ppo", dry_run=dry_run))
