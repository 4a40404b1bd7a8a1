"""Talk with a model, or with several side by side: a line in, an answer out, token by token as it is drawn.

    python -m minirlhf.chat runs/sft/final runs/ppo/final --score runs/rm/final

Every model sees the conversation with its own answers; `clear` forgets it, `quit` ends. What is answered depends on
folders, flags and input alone: the random stream of a turn is derived from the seed and the turn's place in the
conversation. The oldest turns are forgotten when a conversation grows too long for a model.
"""

import argparse
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch

from minirlhf import stage
from minirlhf.config import SampleSection
from minirlhf.data import decode
from minirlhf.errors import CheckpointError, DataError, UsageError, tool
from minirlhf.evaluate import score_sequences
from minirlhf.generate import COLDEST, generate
from minirlhf.page import spelled
from minirlhf.pretrained import load_causal_lm, load_reward_model
from minirlhf.rng import generator
from minirlhf.run import require_device

MAX_NEW_TOKENS = 256  # unless half of the model's positions are fewer
Turn = tuple[str, str]  # role, text


@dataclass
class Speaker:
    """One model and its side of the conversation."""

    name: str
    loaded: stage.Loaded
    sampling: dict[str, Any]  # as `generate` takes it
    stops: tuple[str, ...] = ()  # an answer ends before the first of these
    turns: list[Turn] = field(default_factory=list)
    place: int = 0  # lines answered in this conversation

    def prompt_ids(self) -> list[int]:
        """The conversation so far as tokens; its oldest turns are dropped until there is room for an answer."""
        room = self.loaded.model.config.max_seq_len - self.sampling["max_new_tokens"]
        while True:
            ids = self.loaded.template.prompt_ids(self.loaded.tokenizer, tuple(self.turns))
            if len(ids) <= room:
                return ids
            if len(self.turns) == 1:
                raise DataError(f"{self.name}: {len(ids)} tokens are too many; {room} leave room for an answer")
            del self.turns[:2]

    def answer(self, line: str, seed: int, say: Callable[[str], object]) -> None:
        """Say something; `say` gets the pieces of the answer as they come. The turn is kept once it is complete."""
        before = list(self.turns)
        self.turns.append(("user", line))
        try:
            ids = self.prompt_ids()
            if not ids:
                raise DataError(f"{self.name}: nothing of this line is left as tokens")
            text = self._drawn(ids, generator(seed, "chat", self.place), say)
        except BaseException:
            self.turns = before
            raise
        self.turns.append(("assistant", text))
        self.place += 1

    def clear(self) -> None:
        """Forget the conversation."""
        self.turns, self.place = [], 0

    def _drawn(self, ids: Sequence[int], rng: torch.Generator, say: Callable[[str], object]) -> str:
        """The answer, said as tokens complete it; the first bytes of a character wait for the rest."""
        model, said = self.loaded.model, ""

        def heard(tokens: list[int]) -> bool:
            nonlocal said
            whole = self.loaded.tokenizer.decode(tokens)
            text = before(whole, self.stops)
            sure = text[: len(text) - begun(text, self.stops)]
            if text == whole and sure.startswith(said) and not text.endswith("\ufffd"):
                say(sure[len(said) :])
                said = sure
            return text != whole

        prompt = torch.tensor([ids], device=model.trunk.embed.weight.device)  # (1, P)
        made = generate(model, prompt, rng=rng, stop=heard, **self.sampling)
        text = before(decode(made.tokens, made.mask, self.loaded.tokenizer)[0], self.stops)
        say(text.removeprefix(said))
        return text


def before(text: str, stops: Sequence[str]) -> str:
    """The text up to the first of the stop strings; all of it where there is none."""
    return text[: min((text.find(stop) for stop in stops if stop in text), default=len(text))]


def begun(text: str, stops: Sequence[str]) -> int:
    """How many characters at the end may be the beginning of a stop string."""
    ends = (n for stop in stops for n in range(1, len(stop)) if text.endswith(stop[:n]))
    return max(ends, default=0)


# ---- setting up -----------------------------------------------------------------------------------------------------


def open_folder(path: str, loader: Callable[..., Any], *, template: str = "", device: str = "cpu") -> stage.Loaded:
    """A model folder with its tokenizer and template, outside a training script."""
    require_device(device, "--device")
    if not Path(path).is_dir():
        raise CheckpointError(f"{path}: no such folder; give a model's folder, such as runs/ppo/final")
    return stage.load(path, loader, key="template", made_by="a script", template=template, device=device)


def speaker(path: str, args: argparse.Namespace) -> Speaker:
    """A model that is ready to answer."""
    loaded = open_folder(path, load_causal_lm, template=args.template, device=args.device)
    return Speaker(path, loaded, sampling(loaded, args, path), tuple(args.stop))


def sampling(loaded: stage.Loaded, args: argparse.Namespace, path: str) -> dict[str, Any]:
    """The arguments of `generate` that the command line asks for; what no person should read is excluded."""
    longest = answer_length(loaded, args.max_new_tokens, path)
    how = SampleSection(longest, args.temperature or 1.0, args.top_k, args.top_p)
    more = {"suppress_tokens": stage.never_drawn(loaded), "do_sample": args.temperature > 0}
    return stage.sampling(how, loaded) | more


def answer_length(loaded: stage.Loaded, asked: int, path: str) -> int:
    """So many tokens as were asked for; 0: MAX_NEW_TOKENS, or half of the model's positions."""
    positions = loaded.model.config.max_seq_len
    longest = asked or max(1, min(MAX_NEW_TOKENS, positions // 2))
    if longest >= positions:
        raise UsageError(f"--max_new_tokens {longest}: {path} has {positions} positions, and the prompt needs some")
    return longest


@torch.no_grad()
def opinion(judge: stage.Loaded, turns: Sequence[Turn], device: str) -> float:
    """The reward model's score of the last answer; of a long conversation it reads the end."""
    prompt = judge.template.prompt_ids(judge.tokenizer, tuple(turns[:-1]))
    ids = prompt + judge.template.response_ids(judge.tokenizer, turns[-1][1])
    return float(score_sequences(judge.model, [ids[-judge.model.config.max_seq_len :]], 1, device))


# ---- the conversation -----------------------------------------------------------------------------------------------


def lines() -> Iterator[str]:
    """What is typed, or piped in; a line ends at \\n only."""
    if sys.stdin.isatty():
        while True:
            try:
                yield input("> ")
            except EOFError:
                return
    for raw in sys.stdin.buffer:
        yield raw.decode("utf-8", "replace").rstrip("\r\n")


def converse(speakers: Sequence[Speaker], judge: Callable[[Sequence[Turn]], float] | None, seed: int) -> None:
    """Until `quit` or the end of the input. A line that cannot be answered is said on stderr, and the next one read."""
    for line in lines():
        if line.strip() == "quit":
            return
        if line.strip() == "clear":
            for one in speakers:
                one.clear()
        elif line.strip():
            for one in speakers:
                name = f"{one.name}: " if len(speakers) > 1 else ""
                begin = iter([name])  # a line that is refused leaves no trace on stdout
                try:
                    one.answer(line, seed, lambda piece: say(next(begin, "") + piece))  # noqa: B023
                except DataError as e:
                    say(f"error: {e}\n", sys.stderr)
                    continue
                say("\n" if judge is None else f"\n{name}score {judge(one.turns):.3f}\n")


def say(text: str, out: Any = None) -> None:
    """Without what could steer a terminal."""
    out = out or sys.stdout
    out.write(spelled(text, plain="\n\t"))
    out.flush()


def options(
    parser: argparse.ArgumentParser, argv: Sequence[str] | None, *, greedy: bool, **limits: tuple[float, float]
) -> argparse.Namespace:
    """The command line, with what drawing answers needs, perhaps without chance; and limits of more numbers."""
    add = parser.add_argument
    coldest = "0: always the likeliest token" if greedy else "above 0"
    add("--seed", type=int, default=0, help="seed of the answers (default 0)")
    add("--max_new_tokens", type=int, default=0, help=f"default {MAX_NEW_TOKENS}, or half the positions")
    add("--temperature", type=float, default=1.0, help=f"{coldest} (default 1)")
    add("--top_k", type=int, default=0, help="draw from so many likeliest tokens; 0: off")
    add("--top_p", type=float, default=1.0, help="draw from the likeliest tokens that have this probability; 1: off")
    add("--stop", action="append", default=[], metavar="TEXT", help="end an answer before this text; may be repeated")
    add("--template", default="", help="prompt template (default: the model's own, plain where it has none)")
    add("--device", default="cpu", help="cpu, cuda or cuda:N (default cpu)")
    args = parser.parse_args(argv)
    if not all(args.stop):
        parser.error("--stop: an empty text ends every answer")
    least = 0 if greedy and args.temperature == 0 else COLDEST
    known = {"max_new_tokens": (0, 2**31), "temperature": (least, 1e6), "top_k": (0, 2**31), "top_p": (1e-9, 1.0)}
    for name, (low, high) in (known | limits).items():
        if not low <= getattr(args, name) <= high:
            parser.error(f"--{name} {getattr(args, name)} is out of range")
    return args


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m minirlhf.chat", allow_abbrev=False)
    parser.add_argument("folders", nargs="+", metavar="FOLDER", help="folder of a model")
    parser.add_argument("--score", default="", metavar="FOLDER", help="a reward model that judges each answer")
    return options(parser, argv, greedy=True)


@tool(options=("template",))
def main(argv: Sequence[str] | None = None) -> int:
    """Command line; a mistake is one line on stderr and its exit code."""
    args = parse(argv)
    judge = None
    if args.score:
        loaded = open_folder(args.score, load_reward_model, template=args.template, device=args.device)
        judge = partial(opinion, loaded, device=args.device)
    converse([speaker(path, args) for path in args.folders], judge, args.seed)
    return 0


if __name__ == "__main__":
    sys.exit(main())
