"""`--reward.fn human`: answers are shown in the terminal, and the number that a person types is the reward.

Every answer of a rollout is asked for, so `ppo.rollout_size` should be small. What is typed is read from standard
input, a number a line; the run can be scripted, and goes on from its checkpoint after an interruption.
"""

import math
import sys
from collections.abc import Sequence

from minirlhf import dist
from minirlhf.page import spelled
from minirlhf.records import Asked


def reward(prompts: Sequence[Asked], responses: Sequence[str]) -> list[float]:
    """One number per answer. Raises EOFError where the input ends before."""
    if dist.world_size() > 1:
        raise RuntimeError("a person sits at one terminal; start the script without torchrun")
    scores = []
    for i, (prompt, response) in enumerate(zip(prompts, responses, strict=True), 1):
        asked = prompt if isinstance(prompt, str) else "\n".join(f"{role}: {text}" for role, text in prompt)
        _say(f"\n[{i}/{len(responses)}] {spelled(asked)}\n> {spelled(response) or '(empty)'}\nreward: ")
        scores.append(_number())
    return scores


def _number() -> float:
    """The next line that is a number."""
    while line := sys.stdin.readline():
        try:
            value = float(line)
        except ValueError:
            value = math.nan
        if math.isfinite(value):
            return value
        _say("a number, such as 1 or -0.5: ")
    raise EOFError("the input ended; every answer needs a number")


def _say(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()
