"""Run a function on W processes that form a gloo group; a forkserver imports torch once for all of them."""

import multiprocessing
import os
import tempfile
import traceback
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as td

MP = multiprocessing.get_context("forkserver")
MP.set_forkserver_preload(["torch", "torch.distributed.fsdp", "minirlhf.fsdp", "minirlhf.heads"])
TIMEOUT = 60  # seconds


def child(function, rank, world, folder, queue, args):
    torch.set_num_threads(1)
    try:
        if world > 1:
            store = td.FileStore(str(Path(folder) / "store"), world)
            td.init_process_group("gloo", store=store, rank=rank, world_size=world, timeout=timedelta(seconds=TIMEOUT))
        result = function(*args)
        if world > 1:
            td.barrier()  # lest one leaves while another still connects
        queue.put((rank, result, None))
    except BaseException:  # noqa: BLE001  (the parent shows it)
        queue.put((rank, None, traceback.format_exc()))
    finally:
        if td.is_initialized():
            td.destroy_process_group()


def on_ranks(world, function, *args):
    """What `function(*args)` returns on each rank; plain Python values and numpy arrays only."""
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    with tempfile.TemporaryDirectory() as folder:
        queue = MP.SimpleQueue()
        processes = [MP.Process(target=child, args=(function, r, world, folder, queue, args)) for r in range(world)]
        for p in processes:
            p.start()
        found = sorted(queue.get() for _ in processes)
        for p in processes:
            p.join()
    errors = [f"rank {rank}:\n{error}" for rank, _, error in found if error]
    assert not errors, "\n".join(errors)
    return [result for _, result, _ in found]
