"""Run a function on W processes that form a gloo group.

A process that dies is an error of its rank, and one that hangs shows where and is ended: a test never waits for ever.
"""

import faulthandler
import tempfile
import traceback
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as td
from processes import MP, forked

TIMEOUT, DEADLINE = 60, 600  # seconds: of a collective, of a process


def child(function, rank, world, folder, answer, args):
    faulthandler.dump_traceback_later(DEADLINE, exit=True)
    torch.set_num_threads(1)
    try:
        if world > 1:
            store = td.FileStore(str(Path(folder) / "store"), world)
            td.init_process_group("gloo", store=store, rank=rank, world_size=world, timeout=timedelta(seconds=TIMEOUT))
        result = function(*args)
        if world > 1:
            td.barrier()  # lest one leaves while another still connects
        answer.send((result, None))
    except BaseException:  # noqa: BLE001  (the parent shows it)
        answer.send((None, traceback.format_exc()))
    finally:
        if td.is_initialized():
            td.destroy_process_group()


def on_ranks(world, function, *args):
    """What `function(*args)` returns on each rank; plain Python values and numpy arrays only."""
    with tempfile.TemporaryDirectory() as folder:
        answers, processes = [], []
        for rank in range(world):
            answer, theirs = MP.Pipe(duplex=False)
            processes.append(forked(child, function, rank, world, folder, theirs, args))
            theirs.close()  # so that the end of the process is the end of the pipe
            answers.append(answer)
        found = [received(a) for a in answers]
        for p in processes:
            p.join()
    errors = [
        f"rank {rank}, exit code {p.exitcode}: {error or 'after its answer'}"
        for rank, (p, (_, error)) in enumerate(zip(processes, found, strict=True))
        if error or p.exitcode
    ]
    assert not errors, "\n".join(errors)
    return [result for result, _ in found]


def received(answer):
    """A rank's result and error."""
    try:
        return answer.recv()
    except EOFError:
        return None, "it ended without an answer"
