"""Stage 2, the reward model: learn from ranked answers what people like (Ouyang et al. 2022, arXiv 2203.02155, eq. 1).

L = -1/C(K,2) Σ log σ(r_better - r_worse) over the pairs of a list of K answers, each answer through the trunk once; for
K = 2 that is Bradley-Terry. The score is read at an answer's last token.

    python train_rm.py                                     the built-in labeler judges answers of runs/sft/final
    python train_rm.py --model.path DIR --data.path FILE   your model, your pairs or rankings
"""

import sys
from collections.abc import Iterator, Sequence
from functools import partial

import torch
from torch import Tensor

from minirlhf import stage
from minirlhf.adapt import reward_model
from minirlhf.config import RMConfig, RMSection
from minirlhf.data import RankedList, encode_lists, microbatches, pad, side_by_side, step_rows
from minirlhf.engine import Engine
from minirlhf.errors import DataError
from minirlhf.evaluate import ranking_accuracy, score_rows, score_sequences, score_texts
from minirlhf.fit import fit
from minirlhf.loss import centering_penalty, direct_score_loss, ranking_loss
from minirlhf.masked import keep
from minirlhf.memory import dry_run
from minirlhf.probe import hard_negatives, write_probe
from minirlhf.run import Run, run_script


def main(config: RMConfig, run: Run) -> None:
    """Data, model, loop, probe, final/."""
    c, size = config, config.rm.microbatch_size
    policy, tokenizer, template = loaded = stage.load_policy(c)
    records, held_out = stage.ranked_records(c, run, loaded, loss=c.rm.loss)
    own = stage.own_answers(c, loaded, records) if c.rm.normalize else None
    model = reward_model(policy, c)
    records = [*records, *hard_negatives(records, c.rm.hard_negatives, c.run.seed)]
    lists = stage.encoded(c, loaded, encode_lists, records, "data")
    if c.rm.margin and not any(one.grades for one in lists):
        raise DataError(f"{c.data.path}: its answers have no scores or margins, which rm.margin multiplies")
    validation = stage.encoded(c, loaded, encode_lists, held_out, "held-out data")
    if c.rm.loss == "direct":
        validation = side_by_side(validation, 16, seed=c.run.seed)
        if held_out and not validation:
            run.say(f"data: the last {len(held_out)} records, held out, have one label; no accuracy. Shuffle the file")
    engine = Engine(c.run, [model])

    def losses(step: int) -> Iterator[tuple[Tensor, int]]:
        rows = step_rows(len(lists), c.rm.minibatch_size, step - 1, seed=c.run.seed)
        for part in microbatches(rows, size, lambda r: max(map(len, lists[r].sequences))):
            flat = [s for r in part for s in lists[r].sequences]  # N answers
            with engine.precision():
                scores = score_sequences(model, flat, size, c.run.device, in_step=True)  # (N,)
            yield list_losses(scores, [lists[r] for r in part], c.rm).sum() / len(rows), sum(map(len, flat))

    def validate() -> dict[str, float]:
        found = ranking_accuracy(model, validation, size, c.run.device) if validation else {}
        return {f"val/{name}": value for name, value in found.items()}

    words = ("loss", "val/accuracy", "tokens_per_s")
    found = fit(run, engine, model, losses, validate, eval_every=c.rm.eval_every, words=words)
    if found:
        run.say(verdict(found))
    ordinary = [(r.prompt, r.responses[i % len(r.responses)]) for i, r in enumerate(held_out or records)]
    prompts, answers = [p for p, _ in ordinary], [a for _, a in ordinary]
    with engine.gathered(model):
        if own:
            model.normalize(score_rows(model, own, 64, c.run.device))
        scores = torch.tensor(score_texts(model, tokenizer, template, prompts, answers, c.run.device))
        write_probe(run, partial(score_texts, model, tokenizer, template, device=c.run.device), prompts, answers)
    statistics = {"score_gain": model.gain, "score_bias": model.bias, "score_mean": float(scores.mean()),
                  "score_std": float(scores.std(correction=0)), "score_max": float(scores.max())}  # fmt: skip
    whole = loaded._replace(model=engine.whole(model))
    stage.conclude(run, lambda folder: stage.save(folder, whole, **statistics))


def list_losses(found: Tensor, part: Sequence[RankedList], how: RMSection) -> Tensor:  # (N,) → (b,)
    """The loss of each of b lists, from the scores of their N answers one after another."""
    ranks = pad([one.ranks for one in part], 0, device=found.device)  # (b, K)
    given = pad([[True] * len(one.ranks) for one in part], False, device=found.device)  # (b, K)
    grades = pad([one.grades or [0.0] * len(one.ranks) for one in part], 0.0, device=found.device)  # (b, K)
    scores = found.new_zeros(ranks.shape).masked_scatter(given, found)  # (b, K)
    if how.loss == "direct":
        loss = keep(direct_score_loss(scores, grades), given).sum(1) / given.sum(1)
    else:
        margin = how.margin * (grades[:, :, None] - grades[:, None, :]) if how.margin else 0.0  # (b, K, K)
        loss = ranking_loss(scores, ranks, kind=how.loss, margin=margin)
    return loss + how.centering * centering_penalty(scores, ranks) if how.centering else loss


def verdict(found: dict[str, float]) -> str:
    """The whole run in a line."""
    names = ("accuracy", "accuracy_low", "accuracy_high", "best_worst_accuracy", "exact_order")
    right, low, high, ends, exact = (found[f"val/{name}"] for name in names)
    return (f"right on {right:.1%} of {found['val/pairs']:,} held-out pairs (95 % interval {low:.1%} to {high:.1%}), "
            f"{ends:.1%} of best against worst, {exact:.1%} of whole orders")  # fmt: skip


if __name__ == "__main__":
    sys.exit(run_script(main, RMConfig, "rm", dry_run=dry_run))
