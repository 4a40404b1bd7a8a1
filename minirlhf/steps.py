"""One token after the other: the step of decoding, and on a GPU a recording of it.

A step of a small model is some hundred kernels of a few microseconds each, and Python launches them more slowly than a
GPU runs them. A CUDA graph launches them all at once, but always the same kernels on the same memory. So the numbers of
rows and of keys stay what they are from step to step, and a mask tells which keys count.
"""

import warnings
from collections.abc import Callable
from functools import cache as cached

import torch
from torch import Tensor, nn

from minirlhf.lora import Adapter, LowRank, Whole, apply_slot
from minirlhf.model import Cache, CausalLM
from minirlhf.prepared import plain

WORTH_RECORDING = 16  # steps from which on it pays: a recording runs the step three times
BESIDE = (Adapter, LowRank, Whole, nn.ModuleList, nn.ModuleDict)  # kinds of modules that do nothing but compute
GIVEN_UP: set[torch.device] = set()  # where a recording failed, whose memory may never come back


class Steps:
    """Hidden states after one new token and the next, of the rows that are still open."""

    def __init__(self, model: CausalLM, cache: Cache, real: Tensor | None) -> None:  # (b, S) with all tokens to come
        self.model, self.cache, self.real = model, cache, real

    def keep(self, index: Tensor) -> None:  # (b',) of the b open rows
        """Drops the others."""
        self.cache = self.cache.rows(index)
        self.real = None if self.real is None else self.real[index]

    def __call__(self, token: Tensor) -> Tensor:  # (b,) → (b, C)
        """Adds a token to every open row."""
        real = None if self.real is None else self.real[:, : self.cache.length + 1]
        return self.model.hidden(token[:, None], real, cache=self.cache)[:, -1]


class FixedCache(Cache):
    """A cache whose steps are all alike: attention sees all S places.

    A token goes into the next free place, where later steps find it, and into the last, which no later step needs and
    where `Trunk` expects the newest token. What `length` tells `Trunk` is therefore set by each step.
    """

    def __init__(self, cache: Cache) -> None:  # whose tensors it takes over; S: its tokens and those to come
        self.keys, self.values = cache.keys, cache.values
        last = self.keys[0].shape[2] - 1
        for t in self.keys + self.values:
            t[:, :, cache.length :] = 0  # what is masked counts 0 times, and 0 · NaN would be NaN
        self.places = torch.tensor([cache.length, last], device=self.keys[0].device)  # of the newest token

    def append(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:  # (B, H_kv, 1, D) → (B, H_kv, S, D)
        """Writes the newest token of one layer and returns everything."""
        for t, new in ((self.keys[layer], k), (self.values[layer], v)):
            t.index_copy_(2, self.places, new.to(t.dtype).expand(-1, -1, 2, -1))
        return self.keys[layer], self.values[layer]

    def rows(self, index: Tensor) -> "FixedCache":  # index (B',) int64
        """A new cache with these rows."""
        new = super().rows(index)
        new.length = int(self.places[0])
        return FixedCache(new)


class Replayed(Steps):
    """The same, recorded. Rows that ended stay until they are half; then the others are recorded."""

    cache: FixedCache
    real: Tensor

    def __init__(self, model: CausalLM, cache: Cache, real: Tensor) -> None:  # both are taken over
        real[:, cache.length : -1] = False  # not yet there
        self.left = real.shape[1] - cache.length  # tokens to come
        super().__init__(model, FixedCache(cache), real)
        self.record()

    def record(self) -> None:
        """A recording for the rows there are; where none can be made, the step itself."""
        self.open = torch.arange(len(self.real), device=self.real.device)  # (b,)
        self.token = torch.zeros_like(self.open)[:, None]  # (rows, 1)
        self.replay, device = self.step, self.real.device
        if device in GIVEN_UP:
            return
        try:
            self.replay = recorded(self.step, device)
        except RuntimeError as e:
            warnings.warn(f"sampling without CUDA graphs from now on, one could not be recorded: {e}", stacklevel=2)
            GIVEN_UP.add(device)

    def step(self) -> Tensor:  # (rows, C)
        """What is recorded. It may run several times: it writes the same again."""
        self.cache.length = self.real.shape[1] - 1  # all but the newest
        return self.model.hidden(self.token, self.real, cache=self.cache)[:, -1]

    def keep(self, index: Tensor) -> None:  # (b',) of the b open rows
        """Drops the others, sooner or later."""
        self.open = self.open[index]
        if 2 * len(self.open) <= len(self.token) and self.left >= WORTH_RECORDING:
            super().keep(self.open)
            self.record()

    def __call__(self, token: Tensor) -> Tensor:  # (b,) → (b, C)
        """Adds a token to every open row."""
        self.token.index_copy_(0, self.open, token[:, None])
        hidden = self.replay().index_select(0, self.open)
        place = self.cache.places[:1]
        self.real.index_fill_(1, place, True)
        place += 1
        self.left -= 1
        return hidden


def recorded(step: Callable[[], Tensor], device: torch.device) -> Callable[[], Tensor]:
    """The step as a CUDA graph; its result lies in the same memory each time.

    Not by `torch.cuda.graph`, which gives all memory in reserve back to the driver first.
    """
    with torch.cuda.device(device):
        graph, side, current = torch.cuda.CUDAGraph(), side_stream(device), torch.cuda.current_stream()
        side.wait_stream(current)
        try:
            with torch.cuda.stream(side):
                for _ in range(2):  # libraries allocate at their first calls on a stream, which cannot be recorded
                    step()
                side.synchronize()
                graph.capture_begin(capture_error_mode="thread_local")  # other threads may go on
                try:
                    result = step()
                finally:
                    graph.capture_end()
        finally:
            current.wait_stream(side)

    def replay() -> Tensor:
        graph.replay()
        return result

    return replay


@cached
def side_stream(device: torch.device) -> torch.cuda.Stream:
    """One for all recordings: libraries keep memory for every stream they ever saw."""
    return torch.cuda.Stream(device)


def decoding(
    model: CausalLM,
    ready: CausalLM,  # `model`, prepared
    cache: Cache,  # of the prompts, with room for what is to come
    real: Tensor,  # (b, P + R) True = real token, the R to come included
) -> Steps:
    """The way to decode: recorded where that pays and changes nothing but rounding."""
    if replayable(model, cache, real):
        return Replayed(ready, cache, real)
    return Steps(ready, cache, None if real.all() else real)


def replayable(model: CausalLM, cache: Cache, real: Tensor) -> bool:
    """Whether it pays to record, and all that Python does in a step is to launch kernels."""
    device, R = real.device, real.shape[1] - cache.length
    if type(model) is not CausalLM or device.type != "cuda" or device in GIVEN_UP or R < WORTH_RECORDING:
        return False
    if model.config.position == "learned" and model.config.max_seq_len < real.shape[1]:
        return False  # `Trunk` would wait for the largest position
    return all(plain(module, apply_slot) or silent(module) for module in model.modules())


def silent(module: nn.Module) -> bool:
    """Whether it is a part of an adapter, or a list, and nobody watches it."""
    return type(module) in BESIDE and not (module._forward_hooks or module._forward_pre_hooks)
