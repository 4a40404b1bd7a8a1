"""Stage 1, supervised fine-tuning: imitate good answers (Ouyang et al. 2022, arXiv 2203.02155, section 3.5).

L = -(1/n) Σ log π(a_t | prompt, a_<t) over the n answer tokens of an optimizer step, EOS included. Records without a
prompt are plain texts, of which every token counts.

    python train_sft.py                                     the built-in task
    python train_sft.py --model.path DIR --data.path FILE   your model, your data
"""

import sys
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

from minirlhf import stage
from minirlhf.adapt import sft_model, uses_lora
from minirlhf.config import SFTConfig
from minirlhf.data import encode_sft, microbatches, pack, step_rows
from minirlhf.engine import Engine
from minirlhf.errors import UsageError
from minirlhf.evaluate import sft_loss
from minirlhf.fit import fit
from minirlhf.loss import imitation_loss
from minirlhf.masked import masked_sum
from minirlhf.memory import dry_run
from minirlhf.optim import some_layers
from minirlhf.ptx import perplexity
from minirlhf.rng import generator
from minirlhf.rollout import label_logprobs
from minirlhf.run import Run, run_script


def main(config: SFTConfig, run: Run) -> None:
    """Data, model, loop, final/."""
    c = config
    records, held_out = stage.sft_records(c, run)
    loaded = stage.load_or_make(c, records)
    if c.sft.lisa_layers and uses_lora(loaded.model, c):
        raise UsageError(
            f"sft.lisa_layers draws whole blocks, and model.path {c.model.path} is an adapter; set it to 0"
        )
    model, room = sft_model(loaded.model, c), stage.max_length(c, loaded)
    examples = stage.encoded(c, loaded, encode_sft, records, "data")
    validation = stage.encoded(c, loaded, encode_sft, held_out, "held-out data")
    engine = Engine(c.run, [model])

    def losses(step: int) -> Iterator[tuple[Tensor, int]]:
        rows = step_rows(len(examples), c.sft.minibatch_size, step - 1, seed=c.run.seed)
        texts = [examples[r] for r in rows]
        n = sum(sum(text.trained[1:]) for text in texts)  # labels of this optimizer step
        texts = pack(texts, room, c.sft.microbatch_size) if c.sft.pack else texts
        for part in microbatches(range(len(texts)), c.sft.microbatch_size, lambda i: len(texts[i].ids)):
            own = [texts[i] for i in part]
            with engine.precision():
                logprobs, labels = label_logprobs(model, own, c.run.device, impl=c.run.impl)  # (b, T - 1)
            w = torch.tensor([text.weight for text in own], device=labels.device)[:, None]  # (b, 1)
            loss = imitation_loss(logprobs, w.expand_as(logprobs))  # (b, T - 1)
            yield masked_sum(loss, labels) / n, sum(len(text.ids) for text in own)

    def validate() -> dict[str, float]:
        if not validation:
            return {}
        loss = sft_loss(model, validation, c.sft.microbatch_size, c.run.device, impl=c.run.impl)
        base = {} if c.data.path else {"base/perplexity": perplexity(loss)}  # the texts that PPO shall not forget
        return {"val/loss": loss, **base}

    def learning(step: int) -> AbstractContextManager[None]:
        n, drawn = c.sft.lisa_layers, generator(c.run.seed, "lisa", (step - 1) // c.sft.lisa_every)
        return some_layers(model.trunk.blocks, n, drawn) if n else nullcontext()

    fit(run, engine, model, losses, validate, eval_every=c.sft.eval_every, words=("loss", "val/loss", "tokens_per_s"),
        learning=learning)  # fmt: skip
    whole = loaded._replace(model=engine.whole(model))
    stage.conclude(run, lambda folder: stage.save(folder, whole))


if __name__ == "__main__":
    sys.exit(run_script(main, SFTConfig, "sft", dry_run=dry_run))
