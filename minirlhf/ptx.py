"""Text that the policy shall not forget: PPO-ptx (Ouyang et al. 2022, arXiv 2203.02155, eq. 2), and base perplexity.

L = L_ppo + γ L_ptx with L_ptx = -mean log π over the labels of a minibatch of texts, one minibatch beside each
optimizer step. Of a plain text every token is a label, of a prompt with its answer the answer's, as in SFT.
"""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from minirlhf import stage
from minirlhf.data import encode_sft, microbatches, step_rows
from minirlhf.engine import Engine
from minirlhf.errors import UserError
from minirlhf.evaluate import sft_loss
from minirlhf.ppo import Texts, no_texts
from minirlhf.rollout import label_logprobs

HELD_OUT = 512  # texts, at most, that base perplexity is of; of a file its last tenth


class Corpus:
    """The texts of `ppo.ptx_path`, or those of the built-in task; none where there are only the user's prompts."""

    def __init__(self, config: Any, run: Any, loaded: stage.Loaded, engine: Engine) -> None:
        self.config, self.policy, self.engine = config, loaded.model, engine
        records = texts(config, run)
        try:
            parts = [stage.encoded(config, loaded, encode_sft, part, "ppo.ptx_path") for part in records]
        except UserError as e:
            raise type(e)(f"ppo.ptx_path {config.ppo.ptx_path}: {e}") from e
        self.train, self.held_out = parts

    def beside(self, iteration: int) -> Texts:
        """The texts of an iteration's optimizer steps, as many to each as it has answers; none where γ = 0."""
        o, run = self.config.ppo, self.config.run
        if not o.ptx_coef:
            return no_texts
        first = (iteration - 1) * o.epochs * (o.rollout_size // o.minibatch_size)

        def losses(k: int) -> Iterator[tuple[Tensor, Tensor, int]]:
            rows = step_rows(len(self.train), o.minibatch_size, first + k, seed=run.seed)
            n = sum(sum(self.train[r].trained[1:]) for r in rows)  # labels of this optimizer step
            for part in microbatches(rows, o.microbatch_size, lambda r: len(self.train[r].ids)):
                own = [self.train[r] for r in part]
                with self.engine.precision():
                    logprobs, labels = label_logprobs(self.policy, own, run.device, impl=run.impl)  # (b, T - 1)
                yield -logprobs, labels, n

        return losses

    def perplexity(self, step: int) -> dict[str, float]:
        """`base/perplexity`, e to the nats per label of the held-out texts, ten times in a run, first and last."""
        run, steps = self.config.run, self.config.run.steps
        if not self.held_out or not (step in (1, steps) or step % max(1, steps // 10) == 0):
            return {}
        with self.engine.gathered(self.policy):
            nats = sft_loss(self.policy, self.held_out, self.config.ppo.microbatch_size, run.device, impl=run.impl)
        return {"base/perplexity": perplexity(nats)}


def perplexity(nats: float) -> float:
    """e to the nats per token; infinite where that is beyond all numbers."""
    return float(torch.tensor(nats, dtype=torch.float64).exp())


def texts(config: Any, run: Any) -> tuple[list[Any], list[Any]]:
    """Records to train on, which only γ > 0 needs, and held-out ones."""
    data, o = config.data, config.ppo
    if not o.ptx_path:
        own = data.path or o.prompts  # the user's
        return ([], []) if own else stage.corpora(config, data.size if o.ptx_coef else 0, HELD_OUT)
    source = replace(config, data=replace(data, path=o.ptx_path, format="auto", holdout=0))
    records = stage.texts_of(stage.read(source, run))
    return stage.split(records, min(HELD_OUT, len(records) // 10))
