"""Preferences without a reward model and without sampling: DPO (Rafailov et al. 2023, arXiv 2305.18290, eq. 7).

L = -log σ(β [(log π - log π_ref)(better) - (log π - log π_ref)(worse)]), log-probs summed over an answer's tokens.
The reference is the model one starts from; its log-probs are computed once, so that no second model is held.

    python train_dpo.py                                     the built-in labeler judges answers of runs/sft/final
    python train_dpo.py --model.path DIR --data.path FILE   your model, your pairs or rankings
"""

import sys
from collections.abc import Iterator

import torch
from torch import Tensor

from minirlhf import dist, stage
from minirlhf.adapt import sft_model
from minirlhf.config import DPOConfig
from minirlhf.data import Pair, encode_pairs, microbatches, step_rows
from minirlhf.engine import Engine
from minirlhf.evaluate import answer_logprobs
from minirlhf.fit import fit
from minirlhf.loss import dpo_loss
from minirlhf.memory import dry_run
from minirlhf.run import Run, run_script


def main(config: DPOConfig, run: Run) -> None:
    """Data, model, the reference's log-probs, loop, final/."""
    c, size = config, config.dpo.microbatch_size
    loaded = stage.load_policy(c)
    records, held_out = stage.ranked_records(c, run, loaded)
    model = sft_model(loaded.model, c)
    pairs = stage.encoded(c, loaded, encode_pairs, records, "data")
    validation = stage.encoded(c, loaded, encode_pairs, held_out, "held-out data")

    def logprobs(rows: list[Pair]) -> Tensor:  # n pairs → (2, n), of the better and of the worse answers
        both = [pair.better for pair in rows] + [pair.worse for pair in rows]
        return answer_logprobs(model, both, 2 * size, c.run.device, impl=c.run.impl).view(2, -1)

    def shared(rows: list[Pair]) -> Tensor:  # (2, n), each rank its pairs
        found = logprobs(own) if (own := dist.mine(rows)) else torch.zeros(2, 0, device=c.run.device)
        return dist.all_rows(found.T, len(rows)).T

    engine = Engine(c.run, [model])
    model.eval()
    with engine.gathered(model):
        ref, val_ref = shared(pairs), shared(validation)  # (2, N) each

    def losses(step: int) -> Iterator[tuple[Tensor, int]]:
        rows = step_rows(len(pairs), c.dpo.minibatch_size, step - 1, seed=c.run.seed)
        for part in microbatches(rows, size, lambda r: len(pairs[r].better.ids)):
            with engine.precision():
                found = logprobs([pairs[r] for r in part])
            loss = dpo_loss(*found, *ref[:, part], beta=c.dpo.beta)  # (b,)
            yield loss.sum() / len(rows), sum(len(pairs[r].better.ids) + len(pairs[r].worse.ids) for r in part)

    def validate() -> dict[str, float]:
        if not validation:
            return {}
        implicit = c.dpo.beta * (shared(validation) - val_ref)  # (2, n) rewards, Rafailov et al. 2023, eq. 5
        margin = implicit[0] - implicit[1]
        return {"val/accuracy": float((margin > 0).double().mean()), "val/margin": float(margin.mean())}

    words = ("loss", "val/accuracy", "val/margin", "tokens_per_s")
    fit(run, engine, model, losses, validate, eval_every=c.dpo.eval_every, words=words)
    whole = loaded._replace(model=engine.whole(model))
    stage.conclude(run, lambda folder: stage.save(folder, whole))


if __name__ == "__main__":
    sys.exit(run_script(main, DPOConfig, "dpo", dry_run=dry_run))
