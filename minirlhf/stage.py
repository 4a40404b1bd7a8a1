"""Between the frame of a run and a script's loop: data and models in, `final/` out.

A `final/` folder is a Hugging Face folder with one file more, `minirlhf.json`: the template it was trained under and
what its scores look like. Stages whose templates or tokenizers differ are refused: nothing else would notice.
"""

import copy
import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from types import MappingProxyType, SimpleNamespace
from typing import Any, NamedTuple

import torch

from minirlhf import dist, review_world
from minirlhf.adapt import (
    LOADED,
    META,
    VALUE,
    adapted,
    base_folder,
    freeze,
    loading_device,
    open_model,
    read_meta,
    uses_lora,
    value_model,
    write_model,
)
from minirlhf.architecture import ModelConfig
from minirlhf.config import SampleSection
from minirlhf.data import decode, encode_prompts, left_padded
from minirlhf.errors import CheckpointError, DataError, UsageError
from minirlhf.evaluate import Gold, score_texts
from minirlhf.feedback import judged
from minirlhf.formats import read_records
from minirlhf.heads import ScalarModel
from minirlhf.lora import adapter_view, adapters
from minirlhf.model import CausalLM
from minirlhf.optim import adamw, keep_mean, lr_factor, set_lr
from minirlhf.pretrained import load_causal_lm, load_reward_model
from minirlhf.probe import TextScore
from minirlhf.records import SFT, Asked, Question, Ranking, asked
from minirlhf.report import write_report
from minirlhf.reward import load_reward_fn
from minirlhf.rng import generator
from minirlhf.rollout import Roles, Rollout, reward_model_score, sample_rows
from minirlhf.run import Run, write_json
from minirlhf.safefile import shown
from minirlhf.templates import Template, get_template
from minirlhf.tokenizer import Tokenizer

VALIDATION = 2048  # records that the built-in task adds for validation
JUDGED = 512  # prompts that the built-in task's pairs are drawn from at once, two answers each
OWN = 256  # answers of the starting model that rm.normalize asks for


class Loaded(NamedTuple):
    """A model with what its texts must pass through."""

    model: Any
    tokenizer: Tokenizer
    template: Template


# ---- models ---------------------------------------------------------------------------------------------------------


def load(
    path: str | Path,
    loader: Callable[..., Any],  # load_causal_lm | load_reward_model
    *,
    key: str,  # the setting that names it
    made_by: str,  # the script that makes one
    template: str = "",  # empty: its own
    device: str = "cpu",
    beside: CausalLM | None = None,  # as `open_model` takes it
) -> Loaded:
    """A model or adapter folder. An adapter folder without a tokenizer or `minirlhf.json` has those of its base."""
    folder = Path(path)
    if not folder.is_dir():
        raise CheckpointError(f"{key} {path}: no such folder; run {made_by} first, or give --{key} FOLDER")
    base = base_folder(folder) or folder
    tokenizer = Tokenizer.load(folder if (folder / "tokenizer.json").exists() else base)
    meta = read_meta(folder) or read_meta(base)
    name = template or meta.get("template", "plain")
    if not isinstance(name, str):
        raise CheckpointError(f"{folder / META}: template {shown(name)} is no name")
    pieces = get_template(name)
    if meta.get("template_sha256", pieces.sha256) != pieces.sha256:
        raise UsageError(
            f"data.template {pieces.name}: {path} was trained under {meta.get('template')}, and every stage must "
            f"use the same; leave data.template empty to take the model's own"
        )
    model = open_model(folder, loader, device, beside=beside)
    if tokenizer.vocab_size > model.config.vocab_size:
        raise CheckpointError(
            f"{path}: {tokenizer.vocab_size} tokens in tokenizer.json, but the embedding has {model.config.vocab_size}"
        )
    return Loaded(model, tokenizer, pieces)


def load_policy(config: Any) -> Loaded:
    """The language model of `model.path`."""
    how = {"template": config.data.template, "device": loading_device(config.run)}
    return load(config.model.path, load_causal_lm, key="model.path", made_by="train_sft.py", **how)


def load_or_make(config: Any, records: Sequence[Any]) -> Loaded:
    """The language model of `model.path`; without a path a new one, and a tokenizer for it: the built-in task's words,
    or one trained on these records of SFT and the template."""
    if config.model.path:
        return load_policy(config)
    m, template = config.model, get_template(config.data.template or "plain")
    texts = [*(r.prompt + r.response for r in records), *template.around("")]
    if not config.data.path:
        tokenizer = Tokenizer.from_words(review_world.words(config.data.language))
    elif m.tokenizer in ("", "chars"):
        tokenizer = Tokenizer.train_chars(texts)
    elif m.tokenizer == "bpe":
        tokenizer = Tokenizer.train_bpe(texts, m.vocab_size)
    else:
        tokenizer = Tokenizer.load(m.tokenizer)
    sizes = ModelConfig(
        family=m.family, vocab_size=tokenizer.vocab_size, n_layer=m.n_layer, n_head=m.n_head, d_model=m.d_model,
        max_seq_len=m.max_seq_len, dropout=m.dropout, tied=True,
    )  # fmt: skip
    model = CausalLM(sizes, rng=generator(config.run.seed, "weights")).to(loading_device(config.run))
    return Loaded(model, tokenizer, template)


def ppo_optimizer(roles: Roles, config: Any) -> tuple[dict[str, Any], torch.optim.Optimizer]:
    """The roles that PPO trains, and AdamW for them."""
    o = config.optim
    trained = {"policy": roles.policy} | ({"value_model": roles.value_model} if roles.value_model else {})
    named = (pair for role, model in trained.items() for pair in model.named_parameters(role))
    optimizer = adamw(named, lr=o.lr, weight_decay=o.weight_decay, betas=o.betas, eps=o.eps)
    keep_mean(optimizer, roles.policy, config.ppo.ema)
    return trained, optimizer


def set_scheduled_lr(optimizer: torch.optim.Optimizer, config: Any, step: int) -> float:
    """The learning rate of a step, from 1, now that of every group."""
    o = config.optim
    lr = o.lr * lr_factor(step, kind=o.schedule, warmup=o.warmup_steps, total=config.run.steps, final=o.final_lr)
    set_lr(optimizer, lr)
    return lr


def save(folder: Path, trained: Loaded, **meta: Any) -> None:
    """A Hugging Face folder, or the PEFT folder of what was trained of it, with `minirlhf.json`."""
    model, tokenizer, template = trained
    found = write_model(folder, model, tokenizer, template.stop_token_id(tokenizer))
    write_json(folder / META, {"template": template.name, "template_sha256": template.sha256, **meta, **found})


def save_ppo(
    folder: Path, policy: Loaded, critic: ScalarModel | None, mean: Mapping[str, torch.Tensor] | None = None
) -> None:
    """The policy, and beside it the value model, if there is one, so that PPO can go on from here; `ema/` is the policy
    with the mean of its weights, which it takes over at last."""
    save(folder, policy)
    found = write_model(folder / VALUE, critic) if critic else {}
    if found:
        write_json(folder / VALUE / META, found)
    if mean:
        with torch.no_grad():
            for name, p in policy.model.named_parameters():
                p.copy_(mean.get(name, p))
        save(folder / "ema", policy)


def conclude(run: Run, write: Callable[[Path], None]) -> None:
    """`final/`, the report, and where they are."""
    final = run.finish(write)
    if dist.rank() == 0:
        run.say(f"model: {final}\nreport: {write_report(run.folder)}")


def require_same_text(policy: Loaded, reward: Loaded, path: str) -> None:
    """Policy and reward model must read the same tokens under the same template."""
    if policy.template.sha256 != reward.template.sha256:
        raise UsageError(
            f"reward.path {path} was trained under template {reward.template.name}, the policy under "
            f"{policy.template.name}; train both under one data.template"
        )
    if policy.tokenizer.fingerprint != reward.tokenizer.fingerprint:
        raise UsageError(f"reward.path {path}: its tokenizer.json differs from the policy's; train it from that policy")


def ppo_roles(config: Any) -> tuple[Roles, Loaded, TextScore]:
    """Policy, frozen reference, value model and reward, each on its own weights or as adapters on one base; the policy
    with its tokenizer; and the reward as a function of texts, for the probe."""
    c = config
    loaded = load_policy(c)
    if uses_lora(loaded.model, c):
        policy = adapted(loaded.model, c, loaded.model)
        ref_policy = adapter_view(loaded.model, LOADED if LOADED in adapters(loaded.model) else None)
    else:
        policy, ref_policy = loaded.model, copy.deepcopy(loaded.model)
    ref_policy.requires_grad_(False)
    reward_model = None
    if c.reward.fn:
        function = load_reward_fn(c.reward.fn)
        score = function_score(function, loaded.tokenizer)
        of_texts: TextScore = function
    else:
        beside = policy if policy is not loaded.model else None
        how = {"template": c.data.template, "device": loading_device(c.run), "beside": beside}
        reward = load(c.reward.folder, load_reward_model, key="reward.path", made_by="train_rm.py", **how)
        require_same_text(loaded, reward, c.reward.folder)
        reward_model = reward.model.requires_grad_(False)
        score = reward_model_score(reward_model)
        of_texts = partial(score_texts, *reward, device=c.run.device)
    critic = value_model(policy, reward_model, c) if c.ppo.advantage == "gae" else None
    for model in filter(None, (policy, ref_policy, critic)):
        model.eval()  # no dropout: old and new log-probs must agree
    freeze(policy, c.model.freeze)
    return Roles(policy, ref_policy, critic, score, reward_model), loaded._replace(model=policy), of_texts


def score_limit(config: Any) -> float:
    """The highest score of the reward model's validation and one deviation more; infinite where it is not known."""
    meta = read_meta(Path(config.reward.folder)) if config.reward.folder else {}
    highest, deviation = meta.get("score_max"), meta.get("score_std")
    return highest + deviation if isinstance(highest, float) and isinstance(deviation, float) else math.inf


def function_score(
    function: TextScore,
    tokenizer: Tokenizer,
    known: Mapping[tuple[int, ...], Asked] = MappingProxyType({}),  # prompts as tokens → as they were asked
) -> Callable[[Rollout], torch.Tensor]:
    """A reward function of texts as a score of rollouts. It gets known prompts without the template around them: a
    reward model among its parts puts its own there."""

    def score(rollout: Rollout) -> torch.Tensor:  # (B,)
        read, responses = rollout.texts(tokenizer)
        rows = zip(read, rollout.prompts, rollout.prompt_mask, strict=True)
        asked = [known.get(tuple(ids[real].tolist()), text) for text, ids, real in rows]
        return torch.tensor(list(function(asked, responses)), dtype=torch.float32)

    return score


def sampling(s: SampleSection, loaded: Loaded) -> dict[str, Any]:
    """The arguments of `generate`: what the settings say, and nothing else is excluded.

    A token that is never drawn costs PPO nothing: it moves probability there, which lowers the log-probs of all that is
    drawn; the KL penalty takes that for closeness to the reference. top_k, top_p, begin_suppress_eos do the same.
    """
    eos = loaded.template.stop_token_id(loaded.tokenizer)
    return {
        "max_new_tokens": s.max_new_tokens,
        "eos_token_id": eos,
        "pad_token_id": loaded.tokenizer.pad_id,
        "temperature": s.temperature,
        "top_k": s.top_k,
        "top_p": s.top_p,
        "min_new_tokens": s.min_new_tokens,
        "begin_suppress_tokens": (eos,) if s.begin_suppress_eos else (),
    }


def never_drawn(loaded: Loaded) -> tuple[int, ...]:
    """For people who read answers: <pad> and <unk>, unless they end one, and embedding rows that no token has."""
    tokenizer = loaded.tokenizer
    spare = range(tokenizer.vocab_size, loaded.model.config.vocab_size)
    ids = {i for i in (tokenizer.pad_id, tokenizer.unk_id, *spare) if i is not None}
    return tuple(sorted(ids - {loaded.template.stop_token_id(tokenizer)}))


# ---- data -----------------------------------------------------------------------------------------------------------


def unheard() -> Any:
    """In the place of a run, where data is read beside one: nothing is said, and what is dropped is not kept."""
    return SimpleNamespace(dropped=[], say=lambda text: None)


def read(config: Any, run: Run) -> list[Any]:
    """All records of data.path; rows that were dropped are counted on the terminal and kept in dropped.jsonl."""
    data = config.data
    records, summary = read_records(data.path, format=data.format, on_bad_row=data.on_bad_row)
    run.dropped += [{"path": data.path, "line": row.line, "reason": row.what} for row in summary.dropped]
    if summary.dropped or summary.notes:
        run.say(str(summary))
    if not records:
        raise DataError(f"{data.path}: no usable record")
    if data.holdout >= len(records):
        raise DataError(f"{data.path}: data.holdout {data.holdout} leaves nothing of {len(records)} records")
    return records


def split(records: list[Any], holdout: int) -> tuple[list[Any], list[Any]]:
    """All but the last `holdout` records, and those."""
    return records[: len(records) - holdout], records[len(records) - holdout :]


def corpora(config: Any, n: int, held_out: int) -> tuple[list[SFT], list[SFT]]:
    """Texts of the built-in task: n to train on, and others."""
    make = partial(review_world.corpus, seed=config.run.seed, language=config.data.language)
    return make(n), make(held_out, purpose="corpus/val")


def sft_records(config: Any, run: Run) -> tuple[list[Any], list[Any]]:
    """Training and validation records; of a ranked list every text is one record."""
    if not config.data.path:
        return corpora(config, config.data.size, VALIDATION)
    train, held_out = split(read(config, run), config.data.holdout)
    how = config.sft
    if how.objective == "imitate":
        bare = sum(not hasattr(record, "response") and not hasattr(record, "responses") for record in train)
        if bare:
            run.say(f"data: {bare} of {len(train)} records have no answer and are learnt whole, as plain texts")
        return texts_of(train), texts_of(held_out)
    learn = partial(judged, objective=how.objective, temperature=how.temperature, good=how.good, bad=how.bad)
    examples = learn(train)
    if not examples:
        raise DataError(
            f"{config.data.path}: no answer is the best (label 1), which sft.objective {how.objective} learns; use rwr"
        )
    return examples, [answer for answer in learn(held_out) if answer.weight > 0]


def texts_of(records: Sequence[Any]) -> list[Any]:
    """Ranked lists → one record per text; other records as they are."""
    out: list[Any] = []
    for record in records:
        if hasattr(record, "responses"):
            out += [SFT(record.prompt, response, line=record.line) for response in record.responses]
        elif hasattr(record, "response"):
            out.append(record)
        else:
            out.append(SFT("", record.prompt, line=record.line))
    return out


def ranked_records(config: Any, run: Run, loaded: Loaded, *, loss: str = "") -> tuple[list[Any], list[Any]]:
    """Training and validation lists: of the file, or pairs of the model's own answers that the labeler judged. `loss`
    is the reward model's; for `direct` an answer with a label is a list of one."""
    data = config.data
    if data.path:
        records = read(config, run)
        if loss == "direct":
            records = [graded(record, data.path) for record in records]
        elif not hasattr(records[0], "ranks"):
            more = "; --rm.loss direct learns from labels" if loss and hasattr(records[0], "label") else ""
            raise DataError(f"{data.path}: holds no preferences; pairs or ranked answers are needed{more}")
        return split(records, data.holdout)
    return tuple(judged_pairs(config, loaded, n, purpose) for n, purpose in ((data.size, "pair"), (VALIDATION, "val")))  # type: ignore[return-value]


def graded(record: Any, path: str) -> Any:
    """The record as a list of answers with grades from 0 to 1."""
    if hasattr(record, "label"):
        return Ranking(record.prompt, [record.response], [1], record.line, [record.label])
    if not getattr(record, "grades", ()) or not record.absolute:
        raise DataError(f"{path}:{record.line}: no label or score of each answer, which rm.loss direct learns")
    if not all(0 <= grade <= 1 for grade in record.grades):
        raise DataError(f"{path}:{record.line}: scores {record.grades} are not from 0 to 1, as rm.loss direct needs")
    return record


def own_answers(config: Any, loaded: Loaded, records: Sequence[Any]) -> list[list[int]]:
    """Prompts of the records, each with what the model says to it, as PPO will see them: OWN token lists.

    Raises DataError where the records have no prompts, or the model always says the same.
    """
    how, data, seed = sampling(config.sample, loaded), config.data, config.run.seed
    prompts = list(dict.fromkeys(record.prompt for record in records))
    if not any(loaded.template.prompt_ids(loaded.tokenizer, prompt) for prompt in prompts):
        raise DataError(f"{data.path}: its records have no prompts, which rm.normalize answers; leave it out")
    some = torch.randperm(len(prompts), generator=generator(seed, "own/prompts")).tolist()[:OWN]
    _, encoded, _ = with_room(config, loaded, [prompts[i] for i in some])
    asked = [encoded[r % len(encoded)] for r in range(OWN)]
    ids, mask = left_padded(asked, how["pad_token_id"], config.run.device)
    loaded.model.to(config.run.device)
    made = sample_rows(loaded.model, ids, mask, rng=[generator(seed, "own", 0, r) for r in range(OWN)], **how)
    drawn = [tokens[real].tolist() for tokens, real in zip(made.tokens, made.mask, strict=True)]
    answers = [prompt + answer for prompt, answer in zip(asked, drawn, strict=True)]
    if len(set(map(tuple, answers))) == 1:
        raise DataError("rm.normalize: the model always says the same; raise sample.temperature, or leave it out")
    return answers


def with_room(
    config: Any, loaded: Loaded, prompts: Sequence[Question]
) -> tuple[list[Question], list[list[int]], dict[str, int]]:
    """The prompts that leave room for an answer, as texts and as tokens; and how many do not."""
    room = max_length(config, loaded) - config.sample.max_new_tokens
    return encode_prompts(prompts, loaded.tokenizer, loaded.template, room)


def judged_pairs(config: Any, loaded: Loaded, n: int, purpose: str) -> list[Any]:
    """n pairs of answers of the model, judged by the built-in task's labeler; equal answers are drawn again."""
    data, seed = config.data, config.run.seed
    prompts, encoded, _ = with_room(config, loaded, review_world.prompts(data.language))
    how = sampling(config.sample, loaded)
    loaded.model.to(config.run.device)
    pairs: list[Any] = []
    drawn = 0
    while len(pairs) < n:
        before = len(pairs)
        rows = range(drawn, drawn + JUDGED)
        ids, mask = left_padded([encoded[r % len(prompts)] for r in rows], how["pad_token_id"], config.run.device)
        rngs = [generator(seed, f"pair/{purpose}", 0, 2 * r + side) for r in rows for side in (0, 1)]
        made = sample_rows(loaded.model, ids, mask, num_return_sequences=2, rng=rngs, **how)
        texts = decode(made.tokens, made.mask, loaded.tokenizer)
        for r, a, b in zip(rows, texts[::2], texts[1::2], strict=True):
            pair = review_world.judge(
                prompts[r % len(prompts)], a, b, labeler=data.labeler, seed=seed, purpose=purpose, i=r
            )
            if pair is not None:
                pairs.append(pair)
        if len(pairs) == before:
            raise DataError(
                f"data.labeler {data.labeler}: prefers none of {JUDGED} pairs of the model's answers; train model.path "
                f"for longer, raise sample.temperature, or choose another labeler"
            )
        drawn += JUDGED
    return pairs[:n]


def ppo_prompts(
    config: Any, run: Run, policy: Loaded, *, held_out: bool = False
) -> tuple[list[Asked], list[list[int]]]:
    """PPO's prompts as texts and as tokens: those of the setting, of the data file less the last data.holdout (or these
    alone), or of the built-in task; ones without room are counted."""
    if config.ppo.prompts:
        texts: list[Asked] = [*config.ppo.prompts]
    elif not config.data.path:
        texts = [*review_world.prompts(config.data.language)]
    else:
        texts = [asked(record) for record in split(read(config, run), config.data.holdout)[held_out]]
        if not any(texts):
            raise DataError(f"{config.data.path}: its records have no prompts; give --ppo.prompts")
    kept, encoded, counts = with_room(config, policy, texts)
    report_counts("prompts", counts, len(texts))
    return kept, encoded


def gold_reward(config: Any) -> Gold | None:
    """The built-in task's gold reward of prompts, responses and EOS flags, for the log alone; None on other data."""
    if config.data.path or config.ppo.prompts:
        return None
    return partial(review_world.gold_of_texts, language=config.data.language)


def max_length(config: Any, loaded: Loaded) -> int:
    """Tokens that prompt and answer may have together. Raises UsageError where the model has fewer positions, for a
    step may meet such a text late."""
    sizes, longest = loaded.model.config, config.data.max_length
    if sizes.position == "learned" and longest > sizes.max_seq_len:
        raise UsageError(f"data.max_length {longest} exceeds the model's {sizes.max_seq_len} positions; lower it")
    return longest or sizes.max_seq_len


def encoded(
    config: Any,
    loaded: Loaded,
    encode: Callable[..., tuple[list[Any], dict[str, int]]],  # encode_sft | encode_lists | encode_pairs
    records: Sequence[Any],
    name: str,
) -> list[Any]:
    """What training works on, nothing of no records; says what did not go in as it was."""
    if not records:
        return []
    made, counts = encode(records, loaded.tokenizer, loaded.template, max_length(config, loaded))
    report_counts(name, counts, len(records))
    return made


def report_counts(name: str, counts: dict[str, int], total: int) -> None:
    """Say what did not go in as it was."""
    for reason, n in counts.items():
        if n and dist.rank() == 0:
            print(f"{name}: {n} of {total} {reason.replace('_', ' ')}")  # noqa: T201
