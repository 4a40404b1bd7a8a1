"""The errors a user can cause, each with the exit code of the scripts. One line: what, where, what to do."""


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
