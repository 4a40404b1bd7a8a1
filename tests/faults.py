"""Every call by which Python changes the disk, in order, with a chance to fail or to die before or after each.

`with disk_calls(act):` asks `act(i, label, moment)` around the i-th call; it may raise OSError, or end the process. A
label says what is done to which file: `write policy.safetensors`, `rename step_00000002`, `fsync checkpoints`.
"""

import contextlib
import os
import re

NAMES = ("open", "write", "fsync", "rename", "replace", "mkdir", "unlink", "rmdir")
REAL_WRITE = os.write
WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT


@contextlib.contextmanager
def disk_calls(act):
    """Wrap them all; what only reads is not counted."""
    real, names, count = {name: getattr(os, name) for name in NAMES}, {}, [0]

    def place(path):
        return re.sub(r"^(\.tmp_step_\d+)_\d+$", r"\1_PID", os.path.basename(os.fspath(path)))

    def wrapped(name):
        def call(*args, **keywords):
            if name == "open" and not (len(args) > 1 and args[1] & WRITES):
                fd = real["open"](*args, **keywords)
                names[fd] = place(args[0])
                return fd
            of_file = name in ("write", "fsync")
            where = names.get(args[0], "?") if of_file else place(args[name in ("rename", "replace")])
            i, label = count[0], f"{name} {where}"
            count[0] += 1
            try:
                act(i, label, "before", *(args if name == "write" else ()))
            except OSError as e:
                e.filename = None if of_file else os.fspath(args[0])  # as the real call would say it
                raise
            out = real[name](*args, **keywords)
            if name == "open":
                names[out] = where
            act(i, label, "after")
            return out

        return call

    for name in NAMES:
        setattr(os, name, wrapped(name))
    try:
        yield
    finally:
        for name, function in real.items():
            setattr(os, name, function)


def recorded(job):
    """The labels of what a job does to the disk."""
    labels = []

    def note(i, label, moment, *_):
        if moment == "before":
            labels.append(label)

    with disk_calls(note):
        job()
    return labels


def failing(number, *, at, onward=False):
    """An `act` that raises this errno at one call, or from that call onward."""

    def act(i, label, moment, *_):
        if moment == "before" and (i >= at if onward else i == at):
            raise OSError(number, os.strerror(number))

    return act
