"""Batched sampling with a key/value cache and an explicit random stream per row.

Three things make it fast: each distinct prompt is run once, finished rows leave the batch, and one pass gives both the
token and its log-prob. One thing makes it reproducible: row r draws its uniform numbers from its own stream and inverts
the cumulative distribution, so that its answer depends neither on its neighbours nor on the batch size.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from minirlhf.errors import NonFiniteError
from minirlhf.model import Cache, CausalLM
from minirlhf.ops import token_logprobs
from minirlhf.prepared import prepared
from minirlhf.products import factor_dtype
from minirlhf.rng import generator
from minirlhf.steps import Steps, decoding

Seen = tuple[Tensor, Tensor, Tensor]  # of b rows: prompt (b, P), its mask (b, P), answer so far (b, t)
NEVER = float("-inf")
COLDEST = 1e-6  # temperature; logits divided by far less are no numbers in fp32
BLOCK = 64  # tokens whose probabilities are summed before they are cumulated


@dataclass(frozen=True)
class Generation:
    """Answers, right-padded; index t is the t-th new token."""

    tokens: Tensor  # (B, R) int64, pad_token_id after the end
    mask: Tensor  # (B, R) bool, True up to and including EOS
    logprobs: Tensor  # (B, R) log π(token) under the unfiltered policy at the sampling temperature; 0 where not mask


@dataclass(frozen=True)
class Sampling:
    """What changes the policy's distribution before a token is drawn; the defaults change nothing."""

    max_new_tokens: int
    eos_token_ids: tuple[int, ...]
    temperature: float = 1.0  # τ
    top_k: int = 0
    top_p: float = 1.0
    repetition_penalty: float = 1.0
    no_repeat_ngram_size: int = 0
    min_new_tokens: int = 0
    begin_suppress_tokens: tuple[int, ...] = ()
    suppress_tokens: tuple[int, ...] = ()
    do_sample: bool = True

    @property
    def looks_back(self) -> bool:
        """Whether a filter asks what was said before."""
        return self.repetition_penalty != 1.0 or self.no_repeat_ngram_size > 0


def generate(  # noqa: PLR0913  (the contract's signature; the names are transformers')
    model: CausalLM,
    input_ids: Tensor,  # (B, P) left-padded prompts
    attention_mask: Tensor | None = None,  # (B, P) True = real; None: all real
    *,
    max_new_tokens: int,
    eos_token_id: int | Sequence[int] | None,
    pad_token_id: int,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    repetition_penalty: float = 1.0,
    no_repeat_ngram_size: int = 0,
    min_new_tokens: int = 0,
    begin_suppress_tokens: Sequence[int] = (),
    suppress_tokens: Sequence[int] = (),
    do_sample: bool = True,
    num_return_sequences: int = 1,
    rng: torch.Generator | Sequence[torch.Generator] | None = None,  # one, or one per returned row; None: torch's own
    stop: Callable[[list[int]], bool] | None = None,  # whether an answer of these tokens, its last one new, is over
) -> Generation:  # each (B · num_return_sequences, R), the answers to one prompt together
    """Draw an answer to every prompt, until its EOS, max_new_tokens, or `stop` says so. Runs in inference mode: what a
    hook on the model keeps cannot be trained on; what is returned can.

    Raises ValueError for prompts that are not left-padded or too long for the model, NonFiniteError for logits that
    are NaN or leave no token to draw.
    """
    eos = (eos_token_id,) if isinstance(eos_token_id, int) else tuple(eos_token_id or ())
    sampling = Sampling(
        max_new_tokens, eos, temperature, top_k, top_p, repetition_penalty, no_repeat_ngram_size, min_new_tokens,
        tuple(begin_suppress_tokens), tuple(suppress_tokens), do_sample,
    )  # fmt: skip
    input_ids, mask = checked(model, input_ids, attention_mask, sampling, num_return_sequences)
    with at_rest(model), torch.inference_mode():
        made = _decode(model, input_ids, mask, sampling, pad_token_id, num_return_sequences, rng, stop)
    return Generation(made.tokens.clone(), made.mask.clone(), made.logprobs.clone())


@contextmanager
def at_rest(model: CausalLM) -> Iterator[None]:
    """Without dropout; afterwards each module is as it was."""
    before = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in before:
            module.training = training


def _decode(
    model: CausalLM,
    input_ids: Tensor,  # (B, P)
    mask: Tensor,  # (B, P)
    sampling: Sampling,
    pad_token_id: int,
    n: int,  # answers per prompt
    rng: torch.Generator | Sequence[torch.Generator] | None,
    stop: Callable[[list[int]], bool] | None,
) -> Generation:
    device, B, R = input_ids.device, len(input_ids) * n, sampling.max_new_tokens
    uniforms = row_uniforms(rng, B, R).to(device) if sampling.do_sample else None  # (B, R)
    ready = prepared(model, B, R)
    prompts, mask = input_ids.repeat_interleave(n, 0), mask.repeat_interleave(n, 0)  # (B, P)
    hidden, step = _prefill(model, ready, prompts, mask, R)  # (b, C) at the last position, b rows still open
    rows = torch.arange(B, device=device)  # (b,)
    tokens = torch.full((B, R), pad_token_id, device=device)
    lengths = torch.full((B,), R, device=device)
    logprobs = torch.zeros(B, R, device=device, dtype=torch.promote_types(hidden.dtype, torch.float32))

    for t in range(R):
        logits = ready.head(hidden)  # (b, V) at least fp32
        at = rows if len(rows) < B else slice(None)  # a slice copies nothing
        seen = (prompts[at], mask[at], tokens[at, :t]) if sampling.looks_back else None
        z = filtered(logits, sampling, t, seen)  # (b, V)
        token, logprob = draw(z, None if uniforms is None else uniforms[at, t])  # (b,) each
        if logprob is None or z is not logits:
            logprob = token_logprobs(logits, token, temperature=sampling.temperature)
        if not math.isfinite(logprob.min()):  # one such logit, and the sum over all of them is no number
            bad = rows[~logprob.isfinite()][0].item()
            raise NonFiniteError(f"logits of row {bad} at new token {t} are NaN or infinite")
        tokens[at, t], logprobs[at, t] = token, logprob
        if t + 1 == R:
            break  # nobody asks what comes next
        over = [last in sampling.eos_token_ids for last in token.tolist()]
        if stop:
            over = [end or stop(answer) for end, answer in zip(over, tokens[at, : t + 1].tolist(), strict=True)]
        if any(over):
            done = torch.tensor(over, device=device)  # (b,)
            lengths[rows[done]] = t + 1
            rows, token = rows[~done], token[~done]
            if len(rows) == 0:
                break
            step.keep((~done).nonzero()[:, 0])
        hidden = step(token)  # (b', C)
    longest = int(lengths.max())
    taken = torch.arange(longest, device=device) < lengths[:, None]  # (B, longest)
    return Generation(tokens[:, :longest], taken, logprobs[:, :longest])


def _prefill(
    model: CausalLM,
    ready: CausalLM,  # the same, prepared
    input_ids: Tensor,  # (B, P)
    mask: Tensor,  # (B, P)
    R: int,
) -> tuple[Tensor, Steps]:
    """Runs each distinct prompt once → the hidden state of each row at its last position (B, C), and how to go on."""
    P = input_ids.shape[1]
    both = torch.cat([input_ids, mask.long()], 1)  # (B, 2P)
    distinct, source = torch.unique(both, dim=0, return_inverse=True)  # (U, 2P), (B,)
    alone = len(distinct) == len(both)  # then in their own order, which saves a copy of the cache
    ids, seen = (input_ids, mask) if alone else (distinct[:, :P], distinct[:, P:].bool())
    dtype = cache_dtype(model.trunk.embed.weight.dtype, ids.device.type)
    cache = Cache(model.config, len(ids), P + R, dtype=dtype, device=ids.device)
    hidden = ready.hidden(ids, seen, cache=cache)[:, -1]
    if not alone:
        cache, hidden = cache.rows(source), hidden[source]
    return hidden, decoding(model, ready, cache, torch.cat([mask, mask.new_ones(len(mask), R)], 1))


def cache_dtype(weights: torch.dtype, device: str) -> torch.dtype:
    """That of keys and values; on a CPU at least fp32, where one query at a time is fastest."""
    return torch.promote_types(weights, torch.float32) if device == "cpu" else factor_dtype(weights, device)


def row_uniforms(rng: torch.Generator | Sequence[torch.Generator] | None, rows: int, n: int) -> Tensor:  # (rows, n)
    """Row r's numbers come from its own stream: derived from one number of `rng` and r, or from `rng[r]`."""
    if rng is None or isinstance(rng, torch.Generator):
        device = "cpu" if rng is None else rng.device
        base = int(torch.randint(2**62, (), generator=rng, device=device))
        rng = [generator(base, "sample", row=r) for r in range(rows)]
    if len(rng) != rows:
        raise ValueError(f"generate: rng holds {len(rng)} generators for {rows} rows")
    return torch.stack([torch.rand(n, generator=g, dtype=torch.float64, device=g.device).cpu() for g in rng])


def draw(
    logits: Tensor,  # (b, V)
    uniform: Tensor | None,  # (b,) u in [0, 1); None: greedy
) -> tuple[Tensor, Tensor | None]:  # (b,) each
    """Invert the cumulative distribution (Devroye 1986, section III.2): the first token whose cumulated probability
    exceeds u, and its log-prob, which is at hand unless it is greedy.

    In two steps, first the block of tokens and then the token in it: sums are cheaper than cumulated sums in fp64.
    """
    if uniform is None:
        return logits.argmax(-1), None
    probs = logits.softmax(-1)  # (b, V)
    short = -probs.shape[-1] % BLOCK
    blocks = (F.pad(probs, (0, short)) if short else probs).view(len(probs), -1, BLOCK)
    sums = blocks.sum(-1)  # (b, V / BLOCK)
    cumulated = sums.cumsum(-1, dtype=torch.float64)
    target = uniform[:, None] * cumulated[:, -1:]  # u · total, so that rounding of the total cannot matter
    block = (cumulated <= target).sum(-1, keepdim=True)  # (b, 1); the last one is above, since u < 1
    beyond = (cumulated.gather(1, block) - target) / sums.gather(1, block)  # (b, 1) the part of the block above it
    probs = blocks.gather(1, block[..., None].expand(-1, -1, BLOCK))[:, 0]  # (b, BLOCK)
    cumulated = probs.cumsum(-1, dtype=torch.float64)
    target = (1 - beyond).clamp_(min=0) * cumulated[:, -1:]
    inside = (cumulated <= target).sum(-1, keepdim=True)  # (b, 1)
    return (block * BLOCK + inside)[:, 0], probs.gather(1, inside)[:, 0].log()


def filtered(
    logits: Tensor,  # (b, V) of the policy
    sampling: Sampling,
    t: int,  # new tokens so far
    seen: Seen | None,  # None: not asked for, see `Sampling.looks_back`
) -> Tensor:  # (b, V) whose softmax is drawn from; `logits` itself where nothing changes it
    """Penalties, exclusions, temperature, top-k, top-p, in the order of transformers; inputs stay as they are."""
    z = logits
    if seen and sampling.repetition_penalty != 1.0:
        z = penalize_repetition(z, sampling.repetition_penalty, seen)
    if seen and sampling.no_repeat_ngram_size:
        z = ban_repeated_ngrams(z, sampling.no_repeat_ngram_size, seen)
    excluded = list(sampling.suppress_tokens)
    excluded += sampling.eos_token_ids if t < sampling.min_new_tokens else ()
    excluded += sampling.begin_suppress_tokens if t == 0 else ()
    if excluded:
        z = z.index_fill(-1, torch.tensor(excluded, device=z.device), NEVER)
    if z is not logits and (z == NEVER).all(-1).any():
        raise NonFiniteError(f"the sampling filters leave no token to draw at new token {t}; loosen them")
    if not sampling.do_sample:
        return z
    if sampling.temperature != 1.0:
        z = z / sampling.temperature
    if 0 < sampling.top_k < z.shape[-1]:
        kth = z.topk(sampling.top_k, dim=-1).values[:, -1:]  # (b, 1)
        z = z.masked_fill(z < kth, NEVER)
    if sampling.top_p < 1.0:
        z = nucleus(z, sampling.top_p)
    return z


def penalize_repetition(z: Tensor, theta: float, seen: Seen) -> Tensor:  # (b, V)
    """z/θ if z > 0 else zθ for tokens of prompt and answer (Keskar et al. 2019, arXiv 1909.05858)."""
    prompt, real, answer = seen
    count = torch.zeros_like(z).scatter_add_(-1, prompt, real.to(z.dtype))
    count = count.scatter_add_(-1, answer, torch.ones_like(answer, dtype=z.dtype))
    return torch.where(count > 0, torch.where(z > 0, z / theta, z * theta), z)


def ban_repeated_ngrams(z: Tensor, n: int, seen: Seen) -> Tensor:  # (b, V)
    """Exclude every token that would complete an n-gram that prompt or answer already hold."""
    prompt, real, answer = seen
    z = z.clone()
    for row in range(len(z)):
        ids = prompt[row][real[row]].tolist() + answer[row].tolist()
        tail = ids[len(ids) - n + 1 :]
        banned = [ids[i + n - 1] for i in range(len(ids) - n + 1) if ids[i : i + n - 1] == tail]
        z[row, banned] = NEVER
    return z


def nucleus(z: Tensor, p: float) -> Tensor:  # (b, V)
    """Keep the smallest set of most likely tokens whose probability reaches p (Holtzman 2019, arXiv 1904.09751)."""
    ordered, index = torch.sort(z, dim=-1, descending=True, stable=True)
    probs = ordered.softmax(-1)
    outside = probs.cumsum(-1) - probs >= p  # (b, V) the tokens before it reach p already
    outside[:, 0] = False
    return z.masked_fill(torch.zeros_like(outside).scatter(-1, index, outside), NEVER)


def checked(
    model: CausalLM, input_ids: Tensor, attention_mask: Tensor | None, sampling: Sampling, n: int
) -> tuple[Tensor, Tensor]:  # (B, P) int64, (B, P) bool
    """Prompts, with id 0 under the padding, where there need be no token, and their mask. Refuse what `generate` cannot
    answer; n answers to each prompt."""
    mask = torch.ones_like(input_ids, dtype=torch.bool) if attention_mask is None else attention_mask.bool()
    assert input_ids.ndim == 2, input_ids.shape
    assert mask.shape == input_ids.shape, (mask.shape, input_ids.shape)
    s = sampling
    if s.max_new_tokens < 1 or n < 1 or not s.repetition_penalty > 0 or not s.temperature >= COLDEST:  # NaN is neither
        raise ValueError(
            f"generate: max_new_tokens {s.max_new_tokens}, repetition_penalty {s.repetition_penalty} and the number of "
            f"answers {n} must be positive, and temperature {s.temperature} at least {COLDEST:g}"
        )
    if not mask.numel() or not mask[:, -1].all() or (mask[:, :-1] > mask[:, 1:]).any():
        raise ValueError("generate: prompts must be left-padded and not empty")
    if model.config.position == "learned":
        longest = int(mask.sum(-1).max()) + s.max_new_tokens
        if longest > model.config.max_seq_len:
            raise ValueError(
                f"generate: prompt and answer of {longest} tokens exceed {model.config.max_seq_len} positions"
            )
    return torch.where(mask, input_ids, 0), mask
