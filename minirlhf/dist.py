"""The process group, and collectives that do nothing in one process, so that callers need no `if`.

Rows, not ranks, decide: row i of a batch belongs to rank i mod W, and what ranks found about their rows is put together
in the order of rows. What goes wrong: a rank that dies or hangs leaves the others waiting. A collective waits for
`TIMEOUT`; besides, every rank shows a sign of life, and when one of them falls silent all end.
"""

import datetime
import os
import sys
import threading
import time
from typing import Any, NoReturn

import torch
import torch.distributed as td
from torch import Tensor

TIMEOUT = datetime.timedelta(seconds=120)
BEAT, SILENCE = 2.0, 60.0  # seconds between signs of life, and without one until all end
FOREVER = datetime.timedelta(days=30)


def start(device: str = "cpu", *, alone: bool = False) -> None:
    """Join the group that torchrun describes in the environment; without one do nothing, or be a group alone."""
    backend = "cpu:gloo,cuda:nccl" if device.startswith("cuda") else "gloo"
    if td.is_initialized():
        return
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        if device == "cuda":
            torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
        td.init_process_group(backend, timeout=TIMEOUT)
        threading.Thread(target=_watch, daemon=True).start()
    elif alone:
        td.init_process_group(backend, store=td.HashStore(), rank=0, world_size=1)


def stop() -> None:
    """Leave the group."""
    if td.is_initialized():
        td.destroy_process_group()


def rank() -> int:
    """This process's number, 0 alone."""
    return td.get_rank() if td.is_initialized() else 0


def world_size() -> int:
    """W, 1 alone."""
    return td.get_world_size() if td.is_initialized() else 1


def mine(rows: Any) -> Any:
    """This rank's of some rows: a list, a range or a tensor."""
    return rows[rank() :: world_size()]


def all_sum(x: Tensor) -> Tensor:
    """Sum over ranks, out of place."""
    if world_size() > 1:
        x = x.clone()
        td.all_reduce(x)
    return x


def all_max(x: Tensor) -> Tensor:
    """Maximum over ranks, out of place."""
    if world_size() > 1:
        x = x.clone()
        td.all_reduce(x, op=td.ReduceOp.MAX)
    return x


def all_rows(x: Tensor, n: int) -> Tensor:  # (len(mine(range(n))), ...) → (n, ...)
    """What every rank found about its rows, in the order of rows. Where later dimensions differ, zeros fill up."""
    if world_size() == 1:
        return x
    shape = all_max(torch.tensor(x.shape))[1:].tolist()
    whole = torch.zeros(n, *shape, dtype=torch.uint8 if x.dtype == torch.bool else x.dtype, device=x.device)
    mine(whole)[(slice(None), *map(slice, x.shape[1:]))] = x
    return all_sum(whole).to(x.dtype)


def text_of_first(text: str) -> str:
    """Rank 0's text, on every rank."""
    if world_size() > 1:
        data = torch.tensor(list(text.encode()), dtype=torch.uint8)
        size = torch.tensor(len(data))
        td.broadcast(size, 0)
        data = data if rank() == 0 else torch.zeros(int(size), dtype=torch.uint8)
        td.broadcast(data, 0)
        text = bytes(data.tolist()).decode()
    return text


def wait_for_first(name: str) -> None:
    """Rank 0 says that something is done; the others wait, longer than for any collective, as long as it lives."""
    if world_size() > 1:
        if rank() == 0:
            _store().set(name, "done")
        else:
            _store().wait([name], FOREVER)


def is_lost(error: RuntimeError) -> bool:
    """Whether a collective failed because of another rank."""
    return world_size() > 1 and (isinstance(error, td.DistError) or "gloo" in str(error) or "NCCL" in str(error))


def silent_ranks() -> str:
    """After a collective has failed: who shows no sign of life."""
    keys = [f"beat/{r}" for r in range(world_size())]
    try:
        store = _store()
        before = store.multi_get(keys)
        time.sleep(3 * BEAT)
        lost = [r for r, (a, b) in enumerate(zip(before, store.multi_get(keys), strict=True)) if a == b]
    except RuntimeError:  # rank 0 keeps the signs of life, unless torchrun does
        lost = [0]
    who = ", ".join(f"rank {r}" for r in lost) or "another rank"
    return f"{who} has ended, hangs or waits elsewhere; all ranks end"


def leave(code: int) -> NoReturn:
    """End this process without waiting for the others."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _store() -> Any:
    """A connection of one's own, since a thread that waits holds it."""
    return td.distributed_c10d._get_default_store().clone()  # type: ignore[attr-defined]


def _watch() -> None:
    """Show a sign of life; rank 0 looks at all others, and they at rank 0."""
    store, me, W = _store(), rank(), world_size()
    watched = range(1, W) if me == 0 else [0]
    seen: dict[int, tuple[bytes, float]] = {}
    beat = 0
    while td.is_initialized():
        try:
            store.set(f"beat/{me}", str(beat := beat + 1))
            found = store.multi_get([f"beat/{r}" for r in watched])
        except RuntimeError:  # the keeper of the store is gone: the next collective says so
            return
        now = time.monotonic()
        for r, value in zip(watched, found, strict=True):
            if value != seen.get(r, (b"", 0.0))[0]:
                seen[r] = value, now
            elif now - seen[r][1] > SILENCE:
                print(f"error: rank {r} has shown no sign of life for {SILENCE:.0f} s; rank {me} ends", file=sys.stderr)  # noqa: T201
                os._exit(1)
        time.sleep(BEAT)
