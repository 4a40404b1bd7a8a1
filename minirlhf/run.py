"""The frame of a run, shared by the scripts: folder, lock, resume, signals, log, checkpoints, exit codes.

A run folder belongs to one configuration. A default folder that holds an earlier run is renamed aside; a folder named
by the user is never touched unless it is empty or resumed. Nothing is overwritten.
"""

import fcntl
import hashlib
import json
import os
import platform
import re
import shutil
import signal
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy
import safetensors
import tokenizers
import torch

from minirlhf import checkpoint, dist, ops
from minirlhf.config import load_config
from minirlhf.errors import AlarmError, NonFiniteError, UsageError, UserError
from minirlhf.log import Progress, append_line, cut_after, exporter, memory, read_lines, tell, to_json
from minirlhf.rng import derive_seed
from minirlhf.safefile import read_json, write_file
from minirlhf.settings import flatten, help_text, to_dict

MAY_DIFFER = ("dir", "engine", "keep", "save_every", "log_every", "resume", "debug")  # between a start and its resume
LOGS = ("metrics.jsonl", "samples.jsonl", "alarms.jsonl", "memory.jsonl")  # a line has a step
OWN = {".lock", "config.json", "environment.json", "dropped.jsonl", "evaluation.json", "probe.json", *LOGS}
OWN |= {"rollouts", "forensics"}
ENDS = 2**20  # bytes at either end of a file, which tell it from others
BEST = {"val/loss": -1, "val/accuracy": 1, "objective/rlhf_reward": 1}  # what makes a checkpoint the best: low, high
Snapshot = Callable[[], tuple[checkpoint.Tensors, dict[str, Any]]]


class Run:
    """One run of one script in its folder."""

    def __init__(self, config: Any, name: str):
        self.config, self.name = config, name
        self.signal = 0  # exit code asked for by a signal, 0: none
        self.training = self.goes_aside = False
        self.history: list[dict[str, Any]] = []  # the lines of metrics.jsonl
        self.dropped: list[dict[str, Any]] = []  # rows of data files that were left out, and why
        self.folder = Path(config.run.dir or f"runs/{name}")
        self.progress = Progress(name, config.run.steps)
        self.export = exporter(config.run.log_with, self.folder, to_dict(config))
        self._lock: Any = None
        for number, code in ((signal.SIGTERM, 143), (signal.SIGINT, 130)):
            signal.signal(number, lambda *_, code=code: self._on_signal(code))
        self._claim_once()

    # ---- folder ----

    def _claim_once(self) -> None:
        """Rank 0 claims the folder, and all know how that went."""
        refusal = ""
        if dist.rank() == 0:
            try:
                self._claim()
            except UsageError as e:
                refusal = str(e)
        said = {"refusal": refusal, "aside": self.goes_aside, "finished": self.finished}
        said = json.loads(dist.text_of_first(json.dumps(said)))
        if said["refusal"]:
            raise UsageError(said["refusal"])
        self.goes_aside, self.nothing_to_do = said["aside"], said["finished"] and not said["aside"]

    def _claim(self) -> None:
        """Make sure that the folder can become ours, or raise UsageError with the reason. Changes nothing in it."""
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._take_lock()
        except OSError as e:
            raise UsageError(f"run.dir {self.folder}: {e.strerror or e}; choose a folder that can be written") from e
        run = self.config.run
        self.goes_aside = self._used() and not run.resume and not run.dir and not self._unfinished()
        if not self._used():
            self._refuse_foreign()
        elif not self.goes_aside:
            self._refuse_changed()

    def _begin(self) -> None:
        """Everything is loaded and sound: an earlier run goes aside now, and the folder tells whose it is."""
        if self.goes_aside:
            self._set_aside()
        self._note_environment()
        write_json(self.folder / "config.json", to_dict(self.config))
        (self.folder / "dropped.jsonl").unlink(missing_ok=True)
        for row in self.dropped:
            append_line(self.folder / "dropped.jsonl", row)

    def _note_environment(self) -> None:
        """environment.json; a resumed run says where the machine is another one than at first."""
        path, now = self.folder / "environment.json", environment()
        if self.config.run.resume and path.is_file():
            before = read_json(path)
            changed = [f"{key} {before.get(key)} -> {now[key]}" for key in now if before.get(key) != now[key]]
            if changed:
                print(f"resumed elsewhere: {', '.join(changed)}; equal bits are not promised", file=sys.stderr)  # noqa: T201
        write_json(path, now | {"sources": sources(self.config)})

    def _take_lock(self) -> None:
        """An advisory lock that the kernel frees whatever happens to this process."""
        self._lock = (self.folder / ".lock").open("a")
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UsageError(f"run.dir {self.folder}: another process is running here") from None

    def _used(self) -> bool:
        return any((self.folder / part).exists() for part in ("metrics.jsonl", "checkpoints", "final"))

    def _unfinished(self) -> bool:
        return not self.finished and any((self.folder / "checkpoints").glob("step_*"))

    @property
    def finished(self) -> bool:
        """`final/` gets its name by rename, last."""
        return (self.folder / "final").exists()

    def _set_aside(self) -> None:
        n = 1
        while (aside := self.folder.with_name(f"{self.folder.name}.{n}")).exists():
            n += 1
        self.folder.rename(aside)
        print(f"{self.folder} held an earlier run; it is now {aside}", file=sys.stderr)  # noqa: T201
        self.folder.mkdir(parents=True)
        self._take_lock()

    def _refuse_foreign(self) -> None:
        """What is in a folder without a run was left by one that took no step."""
        begun = (self.folder / "environment.json").exists()  # the first file of a run
        own = OWN if begun else {".lock"}
        foreign = {p.name for p in self.folder.iterdir() if not (p.name in own or p.match(".*.tmp"))}
        if foreign:
            raise UsageError(f"run.dir {self.folder} holds {min(foreign)}, which is no run; choose an empty folder")

    def _refuse_changed(self) -> None:
        """The run in the folder is to be resumed, with its own settings, from the same models and data."""
        if not self.config.run.resume:
            state, remedy = (
                ("a finished", "choose another") if self.finished else ("an unfinished", "add --run.resume true")
            )
            raise UsageError(f"run.dir {self.folder} holds {state} run; {remedy}")
        stored = self.folder / "config.json"
        try:
            new = flatten(json.loads(json.dumps(to_dict(self.config))))
            old = flatten(json.loads(stored.read_text()))
        except (OSError, ValueError, AttributeError) as e:
            raise UsageError(f"{stored}: unreadable ({e}); this run cannot be resumed") from e
        allowed = {f"run.{key}" for key in MAY_DIFFER}
        for key in sorted((old.keys() | new.keys()) - allowed):
            if (was := old.get(key)) != (now := new.get(key)):
                raise UsageError(
                    f"run.resume: {key} was {was!r} in {self.folder} and is {now!r} now; they must be equal"
                )
        path = self.folder / "environment.json"
        before = (read_json(path) if path.is_file() else {}).get("sources")
        known: dict[str, Any] = before if isinstance(before, dict) else {}
        for source, digest in sources(self.config).items():
            if known.get(source, digest) != digest:
                raise UsageError(f"run.resume: {source} is not what it was when {self.folder} began; bring it back")

    # ---- steps ----

    def restore(self) -> tuple[int, checkpoint.Tensors, dict[str, Any]] | None:
        """The newest checkpoint that verifies, with the logs cut back to it; None: start from the beginning.

        To be called once everything is loaded: from here on the folder is this run's.
        """
        if dist.rank() == 0:
            self._begin()
        dist.wait_for_first("begun")
        found = checkpoint.load_newest(self.folder / "checkpoints") if self.config.run.resume else None
        step = found[0] if found else 0
        for log in LOGS if dist.rank() == 0 else ():
            cut_after(self.folder / log, step if found else -1)
        dist.wait_for_first("cut")
        self.history = read_lines(self.folder / "metrics.jsonl")
        return found

    def steps(self, start: int, snapshot: Snapshot) -> Iterator[int]:
        """Steps start + 1 … run.steps; after each, a checkpoint when one is due, and the end when a signal came."""
        self.training = True
        run = self.config.run
        for step in range(start + 1, run.steps + 1):
            torch.manual_seed(derive_seed(run.seed, "dropout", step, dist.rank()))  # for dropout, nothing else
            yield step
            code = int(dist.all_max(torch.tensor(self.signal)))  # all ranks end after the same step
            due = step == run.steps or (run.save_every and step % run.save_every == 0)
            if due or code:
                self._save(step, *snapshot())
            if code:
                raise SystemExit(code)
        self.training = False

    def _save(self, step: int, tensors: checkpoint.Tensors, state: dict[str, Any]) -> None:
        """Rank 0 writes a checkpoint."""
        if dist.rank() == 0:
            for log in filter(Path.exists, (self.folder / name for name in LOGS)):
                checkpoint.fsync(log)  # never behind the checkpoint
            how = {"keep": self.config.run.keep, "merits": self._merits()}
            checkpoint.save(self.folder / "checkpoints", step, tensors, state, **how)
        dist.wait_for_first(f"saved {step}")

    def log(self, step: int, metrics: dict[str, Any], words: Sequence[str], *, rare: bool = False) -> None:
        """A line of metrics.jsonl when it is due, or holds what is `rare`, a validation; the terminal's line always."""
        run = self.config.run
        due = rare or step == 1 or step % run.log_every == 0 or step == run.steps
        if due:
            finite = {
                k: None if isinstance(v, float) and v - v != 0 else v for k, v in metrics.items()
            }  # inf, NaN: null
            self.history.append({"step": step, **finite})
            self._append("metrics.jsonl", self.history[-1])
            self._append("memory.jsonl", {"step": step} | memory(run.device))
            self.export(self.history[-1])
        self.progress.show(step, metrics, tuple(words), keep=due)

    def alarm(self, step: int, raised: Sequence[str], *, stop: bool) -> None:
        """A line of alarms.jsonl and of the terminal for each; the end of the run where it is to stop at them."""
        for words in raised:
            self._append("alarms.jsonl", {"step": step, "alarm": words})
            self.say(f"alarm at step {step}: {words}")
        if stop and dist.all_max(torch.tensor(len(raised), device=self.config.run.device)):
            raise AlarmError(f"step {step}: {raised[0] if raised else 'an alarm on rank 0'}")

    def sample(self, step: int, **record: Any) -> None:
        """A line of samples.jsonl."""
        self._append("samples.jsonl", {"step": step, **record})

    def _append(self, name: str, record: dict[str, Any]) -> None:
        if dist.rank() == 0:
            append_line(self.folder / name, record)

    def say(self, text: str) -> None:
        """A line on the terminal, below the live one."""
        if dist.rank() == 0:
            tell(text + "\n")

    def _merits(self) -> dict[int, float]:
        """How good each step was, as far as the log tells."""
        way, _, name = self.config.run.best_by.partition(":")
        name = name or next((name for name in BEST if any(name in line for line in self.history)), "")
        sign = {"max": 1, "min": -1}.get(way) or BEST.get(name, 1)
        return {line["step"]: sign * line[name] for line in self.history if line.get(name) is not None}

    def finish(self, write: Callable[[Path], None]) -> Path:
        """Let `write` fill a temporary folder, which then becomes final/."""
        if self.config.run.best_by and not self._merits():
            self.say(f"run.best_by {self.config.run.best_by}: never logged, so that no checkpoint was the best")
        temporary, final = self.folder / ".tmp_final", self.folder / "final"
        if dist.rank() == 0:
            shutil.rmtree(temporary, ignore_errors=True)
            write(temporary)
            for path in [*temporary.rglob("*"), temporary]:
                checkpoint.fsync(path)
            temporary.rename(final)
            checkpoint.fsync(self.folder)
        dist.wait_for_first("final")
        return final

    def _on_signal(self, code: int) -> None:
        if self.signal or not self.training:  # the second one, or nothing to save yet
            os._exit(code)
        self.signal = code


def run_script(
    main: Callable[[Any, Run], None],
    config_class: type,
    name: str,
    argv: Sequence[str] | None = None,
    *,
    dry_run: Callable[[Any, str], str] | None = None,  # config, name → the table of run.dry_run
) -> int:
    """Parse, prepare, run; a user's mistake is one line on stderr and its exit code, never a traceback."""
    argv = list(sys.argv[1:] if argv is None else argv)
    if "--help" in argv or "-h" in argv:
        print(help_text(config_class, f"train_{name}.py"))  # noqa: T201
        return 0
    config: Any = None
    try:
        config = load_config(config_class, argv)
        if config.run.dry_run and dry_run:
            print(dry_run(config, name))  # noqa: T201
            return 0
        prepare_torch(config)
        run = Run(config, name)
        if run.nothing_to_do:
            page = (run.folder / "report.html").exists()
            more = "" if page else f"; python -m minirlhf.report {run.folder} makes the page that is not there"
            run.say(f"{run.folder} is finished; nothing to resume{more}")
            return 0
        main(config, run)
        return 0
    except (UserError, NonFiniteError) as e:
        return complain(e, e.exit_code, config)
    except OSError as e:
        return complain(e, 4, config)
    except RuntimeError as e:
        if isinstance(e, torch.OutOfMemoryError) or "DefaultCPUAllocator" in str(e):
            remedy = f"take a smaller model, {name}.microbatch_size or sample.max_new_tokens"
            return complain(f"out of memory: {remedy} ({e})", 4, config)
        if not dist.is_lost(e):
            raise
        return dist.leave(complain(f"{dist.silent_ranks()} ({e.args[0]})", 1, config))
    finally:
        dist.stop()


def complain(error: object, code: int, config: Any) -> int:
    """One line on stderr; the traceback only when asked for."""
    if config is not None and config.run.debug:
        traceback.print_exc()
    rank = f"rank {dist.rank()}: " if dist.rank() else ""
    print(f"error: {rank}" + " ".join(str(error).split()), file=sys.stderr, flush=True)  # noqa: T201
    return code


def prepare_torch(config: Any) -> None:
    """Device, threads and exactness, before any tensor is made."""
    run = config.run
    require_device(run.device, "run.device")
    if ":" in run.device and int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise UsageError(f"run.device {run.device}: with several ranks use cuda; each takes the GPU of its number")
    built_in = not config.data.path and not getattr(getattr(config, "ppo", None), "prompts", ())
    if run.threads or built_in:
        torch.set_num_threads(run.threads or 1)  # the built-in task's products are too small to be shared
    torch.set_float32_matmul_precision("highest")
    dist.start(run.device)
    try:
        ops.choose(run.impl, torch.empty(0, device=run.device))
    except RuntimeError as e:
        raise UsageError(f"run.impl {run.impl}: {e}") from e


def require_device(device: str, setting: str) -> None:
    """Raises UsageError for what is no device of this machine."""
    named = re.fullmatch(r"cpu|cuda(?::(\d+))?", device)
    if not named:
        raise UsageError(f"{setting} {device!r} is no device; use cpu, cuda or cuda:N")
    if device != "cpu" and int(named[1] or 0) >= torch.cuda.device_count():
        raise UsageError(f"{setting} {device}: no such CUDA device is available; use cpu")


def sources(config: Any) -> dict[str, str]:
    """The models and data files that a run reads, its own tokenizer and template among them → sha256 of their files'
    names, sizes, first and last bytes."""
    tokenizer, template = config.model.tokenizer, config.data.template
    places = [config.model.path, config.data.path, template if template.endswith(".json") else ""]
    places += [tokenizer] if not config.model.path and tokenizer not in ("chars", "bpe") else []
    if hasattr(config, "ppo"):
        places += [config.ppo.ptx_path, config.reward.folder]
    found = {}
    for place in filter(None, places):
        path, digest = Path(place), hashlib.sha256()
        files = sorted(p for p in path.iterdir() if p.suffix in (".json", ".safetensors")) if path.is_dir() else [path]
        for file in filter(Path.is_file, files):
            with file.open("rb") as f:
                size = file.stat().st_size
                digest.update(f"{file.name} {size}".encode() + f.read(ENDS))
                f.seek(max(0, size - ENDS))
                digest.update(f.read())
        found[place] = digest.hexdigest()
    return found


def environment() -> dict[str, Any]:
    """What equal numbers depend on besides the configuration."""
    modules = (torch, numpy, tokenizers, safetensors)
    return {
        "python": platform.python_version(),
        **{m.__name__: m.__version__ for m in modules},
        "threads": torch.get_num_threads(),
        "ranks": dist.world_size(),
        "machine": platform.machine(),
    }


def write_json(path: Path, value: dict[str, Any]) -> None:
    """Complete or absent; rank 0 writes."""
    if dist.rank() != 0:
        return
    temporary = path.with_name(f".{path.name}.tmp")
    write_file(temporary, [to_json(path, value, indent=1)])
    os.replace(temporary, path)
