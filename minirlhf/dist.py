"""The process group, and collectives that do nothing in one process, so that callers need no `if`."""

import datetime
import os

import torch
import torch.distributed as td
from torch import Tensor

TIMEOUT = datetime.timedelta(seconds=120)


def start(device: str = "cpu") -> None:
    """Join the group that torchrun describes in the environment; alone, do nothing."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1 and not td.is_initialized():
        td.init_process_group("nccl" if device.startswith("cuda") else "gloo", timeout=TIMEOUT)


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


def all_sum(x: Tensor) -> Tensor:
    """Sum over ranks, out of place."""
    if td.is_initialized():
        x = x.clone()
        td.all_reduce(x)
    return x


def all_max(x: Tensor) -> Tensor:
    """Maximum over ranks, out of place."""
    if td.is_initialized():
        x = x.clone()
        td.all_reduce(x, op=td.ReduceOp.MAX)
    return x


def barrier() -> None:
    """Wait for every rank."""
    if td.is_initialized():
        all_sum(torch.zeros(1))
