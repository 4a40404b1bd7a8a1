"""The errors a user can cause, each with the exit code of the scripts. One line: what, where, what to do."""

import os
import re
import sys
from collections.abc import Callable
from functools import wraps
from typing import Any


class UserError(ValueError):
    """Base of all mistakes that end a script with one line instead of a traceback."""

    exit_code = 2


class UsageError(UserError):
    """Configuration, command line, run folder."""


class DataError(UserError):
    """A data file or one of its rows; the text begins with PATH or PATH:LINE."""

    exit_code = 3


class CheckpointError(UserError):
    """Checkpoints, model folders, adapters, tokenizer files, disk; the text names the file."""

    exit_code = 4


class AlarmError(UserError):
    """A run that was told to stop at an alarm, or at a reward model unfit to be maximised."""

    exit_code = 5


class NonFiniteError(FloatingPointError):
    """NaN or infinity where a number must be; the text names tensor, step and rank."""

    exit_code = 5


def tool(
    os_error: int = 4,
    options: tuple[str, ...] = (),  # settings of the section data that are options here, `--template`
) -> Callable[[Callable[..., int]], Callable[..., int]]:
    """For the `main` of a tool: a mistake is one line on stderr and its exit code, never a traceback."""

    def around(main: Callable[..., int]) -> Callable[..., int]:
        @wraps(main)
        def guarded(*argv: Any) -> int:
            try:
                code = main(*argv)
                sys.stdout.flush()
                return code
            except (UserError, NonFiniteError) as e:
                code, words = e.exit_code, str(e)
            except BrokenPipeError:  # who read the answers has left
                silence()
                return 0
            except OSError as e:
                code, words = os_error, f"{e.filename}: {e.strerror}" if e.filename else str(e)
                try:
                    sys.stdout.flush()
                except OSError:  # that is where it came from
                    silence()
            except KeyboardInterrupt:
                return 130
            for name in options:  # as a word of its own, not as a part of a path
                words = re.sub(rf"(?<!\S)data\.{name}(?![\w.:/])", f"--{name}", words)
            for name in {"format", "on_bad_row"}.difference(options):  # no advice that cannot be taken
                words = re.sub(rf"; (see |say )?data\.{name}(?![\w.:/])[^;)]*", "; mend the file", words)
            print("error: " + " ".join(words.split()), file=sys.stderr)  # noqa: T201
            return code

        return guarded

    return around


def silence() -> None:
    """What stdout still holds goes nowhere, when Python writes it at the end."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
