"""What a row of data, a labeler or a judgement gives: an answer, a list of ranked ones, a labelled one, a prompt."""

from dataclasses import dataclass, field
from typing import TypeVar

Turn = tuple[str, str]  # role (system, user, input, assistant) and text


@dataclass(slots=True)
class SFT:
    """A prompt and its answer; an empty prompt makes it a plain text."""

    prompt: str
    response: str
    context: tuple[Turn, ...] = ()  # the turns before the answer, where they are more than the one prompt
    line: int = 0
    weight: float = 1.0  # of its loss; below 0: to be unlearnt

    @property
    def turns(self) -> tuple[Turn, ...]:
        """The whole conversation, where it is more than a prompt and its answer."""
        return (*self.context, ("assistant", self.response)) if self.context else ()


@dataclass(slots=True)
class Ranking:
    """K answers to one prompt: 1 = best, ties allowed, 0 = absent. A pair has the ranks 1, 2."""

    prompt: str
    responses: list[str]
    ranks: list[int]
    line: int = 0
    grades: list[float] = field(default_factory=list)  # one per answer, higher is better; empty where none were given
    absolute: bool = True  # False: of the grades only the differences were given


@dataclass(slots=True)
class Scored:
    """An answer with a label in [0, 1]."""

    prompt: str
    response: str
    label: float
    line: int = 0


@dataclass(slots=True)
class Prompt:
    """A prompt alone."""

    prompt: str
    line: int = 0


Record = SFT | Ranking | Scored | Prompt
Asked = str | tuple[Turn, ...]
Question = TypeVar("Question", bound=Asked)


def asked(record: Record) -> Asked:
    """What is to be answered: the prompt, or the turns of a conversation where they are more."""
    return getattr(record, "context", ()) or record.prompt
