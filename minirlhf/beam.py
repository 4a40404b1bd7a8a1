"""Beam search: not what the policy would say, but the answers that it finds likeliest, several of them to a prompt.

Each of n beams is extended by every token; the n best unfinished extensions go on, and the n best answers that have
ended are kept, by Σ log π / length^α. A row is done when its best open beam is below its worst kept answer. Ties, order
of filters and the stop are transformers' (its `generate` with num_beams and early_stopping False).
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from minirlhf.errors import NonFiniteError
from minirlhf.generate import Sampling, at_rest, checked, filtered
from minirlhf.model import Cache, CausalLM

WORST = -1.0e9  # of a beam that is none


@dataclass(frozen=True)
class Beams:
    """n answers to each prompt, the best first; right-padded."""

    tokens: Tensor  # (B, n, R) int64
    mask: Tensor  # (B, n, R) bool, True up to and including EOS
    scores: Tensor  # (B, n) Σ log π / length^α


def beam_search(  # noqa: PLR0913  (the names are transformers')
    model: CausalLM,
    input_ids: Tensor,  # (B, P) left-padded prompts
    attention_mask: Tensor | None = None,  # (B, P) True = real; None: all real
    *,
    num_beams: int,  # n
    max_new_tokens: int,
    eos_token_id: int | Sequence[int],
    pad_token_id: int,
    length_penalty: float = 1.0,  # α; above 0 longer answers gain
    repetition_penalty: float = 1.0,
    no_repeat_ngram_size: int = 0,
    min_new_tokens: int = 0,
    suppress_tokens: Sequence[int] = (),
) -> Beams:
    """The n likeliest answers that n beams find.

    Raises ValueError for prompts that are not left-padded or too long, NonFiniteError for logits that are NaN.
    """
    eos = (eos_token_id,) if isinstance(eos_token_id, int) else tuple(eos_token_id)
    how = Sampling(
        max_new_tokens, eos, repetition_penalty=repetition_penalty, no_repeat_ngram_size=no_repeat_ngram_size,
        min_new_tokens=min_new_tokens, suppress_tokens=tuple(suppress_tokens), do_sample=False,
    )  # fmt: skip
    input_ids, mask = checked(model, input_ids, attention_mask, how, num_beams)
    with at_rest(model), torch.no_grad():
        return _search(model, input_ids, mask, how, num_beams, length_penalty, pad_token_id)


def _search(
    model: CausalLM,
    input_ids: Tensor,  # (B, P)
    mask: Tensor,  # (B, P)
    how: Sampling,
    n: int,
    length_penalty: float,
    pad_token_id: int,
) -> Beams:
    (B, P), R, device = input_ids.shape, how.max_new_tokens, input_ids.device
    rows = torch.arange(B, device=device).repeat_interleave(n)  # (B·n,) prompt of each beam
    cache = Cache(model.config, B, P + R, dtype=model.trunk.embed.weight.dtype, device=device)
    hidden = model.hidden(input_ids, mask, cache=cache)[:, -1][rows]  # (B·n, C)
    cache = cache.rows(rows)
    prefix = torch.cat([mask[rows], torch.ones(B * n, R, dtype=torch.bool, device=device)], 1)  # (B·n, P + R)
    tokens = torch.full((B, n, R), pad_token_id, device=device)
    scores = torch.full((B, n), WORST, device=device)  # of the open beams, Σ log π
    scores[:, 0] = 0.0  # all beams begin alike: one of them counts
    best = Beams(tokens.clone(), torch.zeros_like(tokens, dtype=torch.bool), torch.full_like(scores, WORST))
    ends, hopeful = torch.tensor(how.eos_token_ids, device=device), torch.ones(B, dtype=torch.bool, device=device)

    for t in range(R):
        logprobs = model.head(hidden).log_softmax(-1)  # (B·n, V)
        if logprobs.isnan().any():
            raise NonFiniteError(f"logits of row {int(logprobs.isnan().any(-1).nonzero()[0]) // n} are NaN or infinite")
        seen = (input_ids[rows], mask[rows], tokens.flatten(0, 1)[:, :t])
        total = filtered(logprobs, how, t, seen).view(B, n, -1) + scores[:, :, None]  # (B, n, V)
        width = min(max(2, 1 + len(ends)) * n, total[0].numel())
        value, index = total.flatten(1).topk(width)  # (B, width), the best extensions
        beam, token = index // total.shape[2], index % total.shape[2]
        longer = tokens.gather(1, beam[:, :, None].expand(-1, -1, R)).clone()  # (B, width, R)
        longer[:, :, t] = token
        ended = (token[:, :, None] == ends).any(-1) | torch.tensor(t + 1 == R, device=device)  # (B, width)
        counts = ended & (torch.arange(width, device=device) < n) & hopeful[:, None]  # (B, width)
        best = kept(best, longer, value / (t + 1) ** length_penalty, counts, t)
        scores, chosen = torch.where(ended, value + WORST, value).topk(n)  # (B, n)
        tokens = longer.gather(1, chosen[:, :, None].expand(-1, -1, R))
        hopeful &= scores[:, 0] / (t + 1) ** length_penalty > best.scores.amin(1)  # (B,) what is done stays done
        if t + 1 == R or not hopeful.any():
            break
        source = (torch.arange(B, device=device)[:, None] * n + beam.gather(1, chosen)).flatten()  # (B·n,)
        cache = cache.rows(source)
        hidden = model.hidden(tokens[:, :, t].reshape(-1, 1), prefix[:, : P + t + 1], cache=cache)[:, -1]
    longest = int(best.mask.sum(-1).max())
    return Beams(best.tokens[..., :longest], best.mask[..., :longest], best.scores)


def kept(best: Beams, tokens: Tensor, scores: Tensor, ended: Tensor, t: int) -> Beams:
    """The n best of the answers kept so far and those that ended now: tokens (B, w, R), scores and ended (B, w)."""
    mask = (torch.arange(tokens.shape[2], device=tokens.device) <= t).expand_as(tokens)
    scores = torch.cat([best.scores, torch.where(ended, scores, scores + WORST)], 1)  # (B, n + w)
    scores, chosen = scores.topk(best.scores.shape[1])
    where = chosen[:, :, None].expand(-1, -1, tokens.shape[2])
    tokens, mask = (torch.cat(pair, 1).gather(1, where) for pair in ((best.tokens, tokens), (best.mask, mask)))
    return Beams(tokens, mask, scores)
