"""ReviewWorld, the built-in task: short reviews, a gold reward in closed form, labelers with known faults.

Everything is a function of (seed, purpose, i): record i of a list draws from its own stream and from nothing else, so
two machines make the same bytes. Words are ids inside this file; English and Chinese are two spellings of the same ids.
Training may see what a labeler chose, never the gold reward itself: that one is for the log and for tests.
"""

import hashlib
import math
import random
from collections import defaultdict
from collections.abc import Callable, Sequence
from functools import cache
from typing import NamedTuple, TypeVar

from minirlhf.errors import DataError
from minirlhf.records import SFT, Ranking

# fmt: off
WORDS = {
    "en": """<pad> <eos> <unk> Human: how was the ? Assistant: , .
        sure! well, honestly, thanks! enjoy!
        great lovely superb fun solid awful boring broken ugly slow
        film phone hotel novel cafe game bike course
        plot acting music cast ending dialogue screen battery camera speaker signal charger
        room bed pool lobby breakfast view prose hero setting pacing chapters cover
        coffee cake tea seats menu waiter levels graphics controls puzzles bosses maps
        brakes saddle wheels chain frame gears teacher slides homework lectures quizzes textbook""",
    "zh": """<pad> <eos> <unk> 用户： 你 觉得 这个 如何？ 助手： ， 。
        好的！ 嗯， 说实话， 谢谢！ 祝愉快！
        很棒 迷人 出色 有趣 扎实 糟糕 乏味 破损 难看 缓慢
        电影 手机 酒店 小说 咖啡馆 游戏 自行车 课程
        剧情 演技 配乐 阵容 结局 对白 屏幕 电池 相机 喇叭 信号 充电器
        房间 床铺 泳池 大堂 早餐 景观 文笔 主角 背景 节奏 章节 封面
        咖啡 蛋糕 茶饮 座位 菜单 店员 关卡 画面 操作 谜题 首领 地图
        刹车 车座 车轮 链条 车架 变速 老师 课件 作业 讲课 测验 教材""",
}
# fmt: on
UNK, COMMA, STOP = 2, 9, 10
OPENERS, CLOSERS = range(11, 14), range(14, 16)
POSITIVE, ADJECTIVES = range(16, 21), range(16, 26)
TOPICS, ASPECTS = range(26, 34), range(34, 82)
LENGTH_COST = {"good": 0.0, "weak": 0.35, "length_biased": 1.0}  # logits per token by which a longer answer loses
SHARPNESS = 8.0  # logits per unit of gold

Draw = Callable[[], float]  # the next number of a stream, uniform in [0, 1)
T = TypeVar("T")


# ---- words ----------------------------------------------------------------------------------------------------------


def words(language: str = "en") -> list[str]:
    """The 82 words in the order of their ids."""
    return WORDS[language].split()


def prompts(language: str = "en") -> list[str]:
    """The eight prompts, film … course: `Human: how was the <topic> ? Assistant:`."""
    return [spell([3, 4, 5, 6, topic, 7, 8], language) for topic in TOPICS]


def spell(ids: Sequence[int], language: str) -> str:
    """Text of ids: words joined by single spaces, in both languages."""
    table = words(language)
    return " ".join(table[i] for i in ids)


@cache
def _ids(language: str | None) -> dict[str, int]:
    return {w: i for name in ([language] if language else WORDS) for i, w in enumerate(words(name))}


def read(text: str, language: str | None = None) -> list[int]:
    """Ids of a text; None reads both languages. A foreign word is <unk>."""
    table = _ids(language)
    return [table.get(word, UNK) for word in text.split()]


def topic_of(prompt: str, language: str | None = None) -> int:
    """The topic a prompt asks about."""
    ids = read(prompt, language)
    if len(ids) != 7 or ids[:4] != [3, 4, 5, 6] or ids[5:] != [7, 8] or ids[4] not in TOPICS:
        raise DataError(f"prompt {prompt!r} is not ReviewWorld's; its prompts read {prompts(language or 'en')[0]!r}")
    return ids[4]


def language_of(prompt: str) -> str:
    """The language a prompt is written in."""
    return "en" if prompt.startswith(words("en")[3]) else "zh"


# ---- grammar --------------------------------------------------------------------------------------------------------


def stream(seed: int, purpose: str, i: int) -> Draw:
    """The random numbers of record i of a list."""
    key = hashlib.sha256(f"review_world/{seed}/{purpose}/{i}".encode()).digest()[:8]
    return random.Random(int.from_bytes(key, "big")).random


def pick(options: Sequence[T], u: Draw) -> T:
    """One of them, uniformly."""
    return options[int(u() * len(options))]


def aspects(topic: int) -> range:
    """The six aspects of a topic."""
    first = ASPECTS[6 * (topic - TOPICS[0])]
    return range(first, first + 6)


def answer(topic: int, u: Draw) -> list[int]:
    """A review of mixed quality: [opener] 1 to 5 phrases `aspect adjective`, stop, [closer]; now and then nothing."""
    kind = u()
    if kind < 0.05:
        return [] if kind < 0.04 else [STOP]
    opener = [pick(OPENERS, u)] if u() < 0.30 else []
    phrases: list[int] = []
    for _ in range(1 + int(5 * u())):
        about = topic if u() < 0.85 else pick(TOPICS, u)
        phrases += [COMMA, pick(aspects(about), u), pick(ADJECTIVES, u)]
    closer = [pick(CLOSERS, u)] if u() < 0.20 else []
    return [*opener, *phrases[1:], STOP, *closer]


def degenerate(topic: int, u: Draw) -> list[int]:
    """What a policy may fall into: nothing, a stop, a few random words, one phrase, one phrase five times."""
    kind = u()
    phrase = [aspects(topic)[0], POSITIVE[0]]
    if kind < 0.35:
        return [] if kind < 0.25 else [STOP]
    if kind < 0.50:
        return [pick(range(3, 82), u) for _ in range(1 + int(6 * u()))]
    if kind < 0.75:
        return [*phrase, STOP]
    return [*phrase, *[COMMA, *phrase] * 4, STOP]


def corpus(n: int, *, seed: int, language: str = "en", purpose: str = "corpus") -> list[SFT]:
    """The SFT records; their mean gold is -0.2104 and their best is what PPO has to find."""
    asked, records = prompts(language), []
    for i in range(n):
        u = stream(seed, purpose, i)
        topic = pick(TOPICS, u)
        records.append(SFT(asked[topic - TOPICS[0]], spell(answer(topic, u), language)))
    return records


# ---- gold reward ----------------------------------------------------------------------------------------------------


def gold(topic: int, ids: Sequence[int], eos: bool = True) -> float:
    """How good an answer is, in [-1, 1]: different on-topic aspects, praised, in a well-formed sentence.

    .25 clip(pos - neg, ±3) + .10 opener + .15 closer - .25 off - .25 rep - .15 max(0, n - 4) - .25 bad - .50 [no EOS];
    no words at all are worth -1. `ids` are the words before EOS, `eos` says whether it was there.
    """
    if not ids:
        return -1.0
    balance = n = off = rep = bad = closer = 0
    opener = int(ids[0] in OPENERS)
    state, seen, t = "expect", set(), opener
    while t < len(ids):
        word, following = ids[t], ids[t + 1] if t + 1 < len(ids) else UNK
        t += 1
        if state == "expect" and word in ASPECTS and following in ADJECTIVES:
            state, n, t = "after", n + 1, t + 1
            if word not in aspects(topic):
                off += 1
            elif word in seen:
                rep += 1
            else:
                seen.add(word)
                balance += 1 if following in POSITIVE else -1
        elif state == "after" and word == COMMA:
            state = "expect"
        elif state == "after" and word == STOP:
            state = "stop"
        elif state == "stop" and word in CLOSERS and t == len(ids):
            closer = 1
        else:
            bad += 1
    bad += state != "stop"
    return _gold(balance, opener, closer, off, rep, n, bad, eos)


def _gold(balance: int, opener: int, closer: int, off: int, rep: int, n: int, bad: int = 0, eos: bool = True) -> float:
    """In hundredths first: sums of whole numbers are exact, and equal golds are equal in every bit."""
    hundredths = 25 * max(-3, min(3, balance)) + 10 * opener + 15 * closer
    hundredths -= 25 * (off + rep + bad) + 15 * max(0, n - 4) + (0 if eos else 50)
    return max(-100, min(100, hundredths)) / 100


def gold_of_texts(
    prompts: Sequence[str],
    responses: Sequence[str],
    eos: Sequence[bool] | None = None,  # None: every answer ended by itself
    *,
    language: str | None = None,  # None: either
) -> list[float]:
    """Gold reward of answers as text; a reward function for `reward.fn`, which cannot know a missing EOS."""
    ended = [True] * len(responses) if eos is None else eos
    return [
        gold(topic_of(prompt, language), read(response, language), end)
        for prompt, response, end in zip(prompts, responses, ended, strict=True)
    ]


# ---- labelers -------------------------------------------------------------------------------------------------------


def preference(topic: int, a: Sequence[int], b: Sequence[int], labeler: str) -> float:
    """P(a ≻ b). Bradley-Terry on gold (Ouyang et al. 2022, arXiv 2203.02155, eq. 1), less a cost per token:
    σ(8 (g_a - g_b) + c (len_b - len_a)); `length_only` prefers the shorter one with probability .8."""
    longer = len(a) - len(b)
    if labeler == "length_only":
        return 0.5 if longer == 0 else 0.8 if longer < 0 else 0.2
    logit = SHARPNESS * (gold(topic, a) - gold(topic, b)) - LENGTH_COST[labeler] * longer
    return 1 / (1 + math.exp(min(-logit, 700)))  # beyond, exp is no number


def comparable(a: Sequence[int], b: Sequence[int], labeler: str) -> bool:
    """Different answers; the length-biased labelers are shown answers with two adjectives or more only."""
    least = 2 if labeler in ("weak", "length_biased") else 0
    return list(a) != list(b) and all(sum(i in ADJECTIVES for i in ids) >= least for ids in (a, b))


def pairs(n: int, *, labeler: str, seed: int, language: str = "en", split: str = "") -> list[Ranking]:
    """Judged pairs of the grammar's answers, the better one first; `split` "val" is another list.

    In one pair of ten the good labeler sees a degenerate answer. It is judged like any other.
    """
    asked, records = prompts(language), []
    for i in range(n):
        u = stream(seed, f"pair/{labeler}" + (f"/{split}" if split else ""), i)
        while True:
            topic = pick(TOPICS, u)
            a, b = answer(topic, u), answer(topic, u)
            if labeler == "good" and u() < 0.10:
                b = degenerate(topic, u)
            if comparable(a, b, labeler):
                break
        if u() >= preference(topic, a, b, labeler):
            a, b = b, a
        both = [spell(a, language), spell(b, language)]
        records.append(Ranking(asked[topic - TOPICS[0]], both, [1, 2]))
    return records


def judge(prompt: str, a: str, b: str, *, labeler: str, seed: int, purpose: str, i: int) -> Ranking | None:
    """What the labeler says of two given answers, as `pairs` does of the grammar's; None: it is not asked about these.

    Its noise, and the degenerate answer that takes the place of b in one pair of ten of the good labeler, come from
    stream i of `purpose`.
    """
    u, topic, language = stream(seed, f"judge/{labeler}/{purpose}", i), topic_of(prompt), language_of(prompt)
    if labeler == "good" and u() < 0.10:
        b = spell(degenerate(topic, u), language)
    read_a, read_b = read(a, language), read(b, language)
    if not comparable(read_a, read_b, labeler):
        return None
    first = u() < preference(topic, read_a, read_b, labeler)
    return Ranking(prompt, [a, b] if first else [b, a], [1, 2])


# ---- what is possible -----------------------------------------------------------------------------------------------


class Outcome(NamedTuple):
    """What a labeler and the gold reward see of an answer."""

    gold: float
    length: int  # tokens with EOS
    phrases: int


@cache
def outcomes() -> dict[Outcome, float]:
    """The exact probability of every outcome of the grammar; it is the same for every topic."""
    new, off_topic = 0.85 + 0.15 / 8, 0.15 * 7 / 8  # of a phrase: about the topic, about another
    law = defaultdict(float, {Outcome(-1.0, 1, 0): 0.04, Outcome(_gold(0, 0, 0, 0, 0, 0, bad=2), 2, 0): 0.01})
    states = {(0, 0, 0): 1.0}  # (pos - neg, different aspects, off topic) → probability
    for n in range(1, 6):
        following: defaultdict[tuple[int, int, int], float] = defaultdict(float)
        for (balance, seen, off), p in states.items():
            following[balance, seen, off + 1] += p * off_topic
            following[balance, seen, off] += p * new * seen / 6  # a repetition
            for sign in (1, -1):
                following[balance + sign, seen + 1, off] += p * new * (6 - seen) / 12
        states = dict(following)
        for (balance, seen, off), p in states.items():
            for opener, p_opener in ((1, 0.30), (0, 0.70)):
                for closer, p_closer in ((1, 0.20), (0, 0.80)):
                    g = _gold(balance, opener, closer, off, n - seen - off, n)
                    law[Outcome(g, opener + 3 * n + closer + 1, n)] += 0.95 / 5 * p * p_opener * p_closer
    return {outcome: p for outcome, p in law.items() if p > 0}


@cache
def gold_law() -> list[tuple[float, float]]:
    """(gold, probability) of the grammar's answers, ascending."""
    law: defaultdict[float, float] = defaultdict(float)
    for outcome, p in outcomes().items():
        law[outcome.gold] += p
    return sorted(law.items())


def tilted(beta: float) -> tuple[float, float]:
    """KL in nats per answer and mean gold of π ∝ π_ref exp(gold/β), the best policy under a penalty of β per nat
    (Korbak et al. 2022, arXiv 2205.11275): KL = E_π[gold]/β - ln Z."""
    weights = [(g, p * math.exp((g - 1) / beta)) for g, p in gold_law()]  # by exp(-1/β): the largest exponent is 0
    z = sum(w for _, w in weights)
    mean = sum(g * w for g, w in weights) / z
    return (mean - 1) / beta - math.log(z), mean


def frontier(kl: float) -> float:
    """The largest mean gold at a given KL from the corpus. No run can be above it, but for noise and the distance
    between its SFT model and the corpus."""
    if kl <= 0:
        return sum(g * p for g, p in gold_law())
    best, p_best = gold_law()[-1]
    if kl >= -math.log(p_best):
        return best
    low, high = 1e-3, 1e6  # β by bisection of its logarithm: KL falls as β rises
    for _ in range(100):
        middle = math.sqrt(low * high)
        low, high = (middle, high) if tilted(middle)[0] > kl else (low, middle)
    return tilted(low)[1]


def best_of_n_kl(n: int) -> float:
    """KL of best-of-n from what it draws from, nats per answer: ln n - (n - 1)/n (Gao et al. 2022, arXiv 2210.10760);
    exact without ties, else an upper bound."""
    return math.log(n) - (n - 1) / n


def best_of_n_gold(n: int) -> float:
    """Mean gold of the best of n of the grammar's answers: Σ g (F(g)^n - F(g-)^n)."""
    below, mean = 0.0, 0.0
    for g, p in gold_law():
        mean += g * ((below + p) ** n - below**n)
        below += p
    return mean


def best_of_n_estimate(proxy: Sequence[float], golds: Sequence[float], n: int) -> float:
    """Mean gold of the best of n by proxy, from all subsets of N answers to one prompt, without bias:
    Σ_i C(i - 1, n - 1)/C(N, n) gold_(i), answers in ascending order of proxy."""
    ordered = [g for _, g in sorted(zip(proxy, golds, strict=True), key=lambda x: x[0])]
    return sum(math.comb(i, n - 1) * g for i, g in enumerate(ordered)) / math.comb(len(ordered), n)
