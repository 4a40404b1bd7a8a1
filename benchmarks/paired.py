"""Paired timing: ours and the rival take turns in one process, so that whatever else the machine does slows both.

A row shows the median seconds of each, and the ratio rival / ours of each pair: its median and its range. What the
machine can do at all (matrix products, copying) is measured before the pairs and printed above the table.
"""

import ctypes
import gc
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch

from minirlhf.products import product

Work = Callable[[], object]


def seconds(work: Work) -> float:
    """Of the wall clock; with one thread of the CPU's, which neighbours on a busy machine disturb less.

    A `prepare` method of the work runs first and does not count.
    """
    getattr(work, "prepare", lambda: None)()
    on_gpu = torch.cuda.is_available()
    clock = time.perf_counter if on_gpu or torch.get_num_threads() > 1 else time.process_time
    began = clock()
    work()
    if on_gpu:
        torch.cuda.synchronize()
    return clock() - began


def compare(label: str, ours: Work, rivals: dict[str, Work], *, runs: int = 5, target: dict[str, float] | None = None):
    """Run all in turn, `runs` times after one unmeasured round; print a row per rival."""
    everyone = {"ours": ours, **rivals}
    for work in everyone.values():
        seconds(work)
    times: dict[str, list[float]] = {name: [] for name in everyone}
    for i in range(runs):  # every other round backwards, so that nobody always follows the same neighbour
        for name, work in list(everyone.items())[:: 1 if i % 2 == 0 else -1]:
            gc.collect()
            times[name].append(seconds(work))
    for name in rivals:
        ratios = [theirs / own for own, theirs in zip(times["ours"], times[name], strict=True)]
        goal = f"  goal {target[name]:.2f}" if target and name in target else ""
        print(
            f"{label:34} {statistics.median(times['ours']):9.4f} s  {name:22} {statistics.median(times[name]):9.4f} s"
            f"  ratio {statistics.median(ratios):6.2f}  [{min(ratios):.2f}, {max(ratios):.2f}]{goal}",
            flush=True,
        )
    return {name: statistics.median(x) for name, x in times.items()}


def extra_memory(work: Work) -> int:
    """Bytes that the process grows by at its peak while `work` runs (Linux, or the GPU's own count)."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        work()
        return torch.cuda.max_memory_allocated() - before
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # VmHWM starts again at VmRSS
    before = _status("VmRSS")
    kept = work()
    grown = _status("VmHWM") - before
    del kept
    return grown


def _status(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field):
            return int(line.split()[1]) * 1024
    raise OSError(f"/proc/self/status has no {field}")


def ceilings(dtypes: tuple[torch.dtype, ...] = (torch.float32,), n: int = 2048) -> dict[torch.dtype, float]:
    """Print the machine, and what it reaches with nothing else to do: products (n, n)·(n, n), and a copy of 256 MiB."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    name = torch.cuda.get_device_name() if device == "cuda" else _cpu()
    print(f"{name}, {torch.get_num_threads()} threads, torch {torch.__version__}, Python {platform.python_version()}")
    rates = {}
    for dtype in dtypes:
        a, b = (torch.randn(n, n, device=device).to(dtype) for _ in range(2))
        rates[dtype] = 2 * n**3 / min(seconds(lambda a=a, b=b: a @ b) for _ in range(7))
        print(f"products {str(dtype)[6:]:9} {rates[dtype] / 1e9:9.0f} GFLOP/s")
    if device == "cpu":
        a, b = torch.randn(n, n), torch.randn(n, n)
        rate = 2 * n**3 / min(seconds(lambda: product(a, b)) for _ in range(7))
        print(f"products float32 by oneDNN {rate / 1e9:.0f} GFLOP/s")
    x = torch.zeros(2**26, device=device)
    y = torch.empty_like(x)
    print(f"copy (read + write) {2 * 4 * len(x) / min(seconds(lambda: y.copy_(x)) for _ in range(7)) / 1e9:9.1f} GB/s")
    return rates


def _cpu() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.split(":")[1].strip()
    return platform.processor()
