"""Stage 2, the reward model: learn from ranked answers what people like (Ouyang et al. 2022, arXiv 2203.02155, eq. 1).

L = -1/C(K,2) Σ log σ(r_better - r_worse) over the pairs of a list of K answers, each answer through the trunk once; for
K = 2 that is Bradley-Terry. The score is read at an answer's last token.

    python train_rm.py                                     the built-in labeler judges answers of runs/sft/final
    python train_rm.py --model.path DIR --data.path FILE   your model, your pairs or rankings
"""

import sys
from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor

from minirlhf import stage
from minirlhf.adapt import reward_model
from minirlhf.config import RMConfig
from minirlhf.data import encode_lists, microbatches, pad, step_rows
from minirlhf.engine import Engine
from minirlhf.evaluate import ranking_accuracy, score_sequences, score_texts
from minirlhf.fit import fit
from minirlhf.loss import centering_penalty, ranking_loss
from minirlhf.memory import dry_run
from minirlhf.pretrained import load_causal_lm
from minirlhf.probe import hard_negatives, write_probe
from minirlhf.run import Run, run_script


def main(config: RMConfig, run: Run) -> None:
    """Data, model, loop, probe, final/."""
    c, size = config, config.rm.microbatch_size
    policy, tokenizer, template, _ = stage.load(
        c.model.path, load_causal_lm, c, key="model.path", made_by="train_sft.py"
    )
    loaded = stage.Loaded(policy, tokenizer, template, {})
    records, held_out = stage.ranked_records(c, run, loaded)
    model = reward_model(policy, c)
    max_length = c.data.max_length or model.config.max_seq_len
    records = [*records, *hard_negatives(records, c.rm.hard_negatives, c.run.seed)]
    lists, counts = encode_lists(records, tokenizer, template, max_length)
    stage.report_counts("data", counts, len(records))
    validation = encode_lists(held_out, tokenizer, template, max_length)[0] if held_out else []
    engine = Engine(c.run, [model])

    def losses(step: int) -> Iterator[tuple[Tensor, int]]:
        rows = step_rows(len(lists), c.rm.minibatch_size, step - 1, seed=c.run.seed)
        for part in microbatches(rows, size, lambda r: max(map(len, lists[r].sequences))):
            flat = [s for r in part for s in lists[r].sequences]  # N answers
            ranks = pad([lists[r].ranks for r in part], 0, device=c.run.device)  # (b, K)
            given = pad([[True] * len(lists[r].ranks) for r in part], False, device=c.run.device)
            with engine.precision():
                found = score_sequences(model, flat, size, c.run.device, in_step=True)  # (N,)
            scores = found.new_zeros(ranks.shape).masked_scatter(given, found)  # (b, K)
            loss = ranking_loss(scores, ranks, kind=c.rm.loss)  # (b,)
            if c.rm.centering:
                loss = loss + c.rm.centering * centering_penalty(scores, ranks)
            yield loss.sum() / len(rows), sum(map(len, flat))

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
        scores = torch.tensor(score_texts(model, tokenizer, template, prompts, answers, c.run.device))
        write_probe(run, partial(score_texts, model, tokenizer, template, device=c.run.device), prompts, answers)
    statistics = {"score_mean": float(scores.mean()), "score_std": float(scores.std(correction=0)),
                  "score_max": float(scores.max())}  # fmt: skip
    whole = engine.whole(model)
    stage.conclude(run, lambda folder: stage.save(folder, whole, tokenizer, template, **statistics))


def verdict(found: dict[str, float]) -> str:
    """The whole run in a line."""
    names = ("accuracy", "accuracy_low", "accuracy_high", "best_worst_accuracy", "exact_order")
    right, low, high, ends, exact = (found[f"val/{name}"] for name in names)
    return (f"right on {right:.1%} of {found['val/pairs']:,} held-out pairs (95 % interval {low:.1%} to {high:.1%}), "
            f"{ends:.1%} of best against worst, {exact:.1%} of whole orders")  # fmt: skip


if __name__ == "__main__":
    sys.exit(run_script(main, RMConfig, "rm", dry_run=dry_run))
