"""A row of each public data format → records of SFT, of preference (pairs are rankings of two), scores and prompts.

A reader takes a JSON object and gives its records, or raises `Bad`; `formats` names the readers and runs them over
files. What goes wrong elsewhere: prompts cut at a common prefix of characters, answers cut at a second "Assistant:",
rows with an empty answer that teach "empty wins".
"""

from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

from minirlhf.records import SFT, Prompt, Ranking, Record, Scored, Turn
from minirlhf.rows import Bad

Row = dict[str, Any]
Notes = Counter[str]  # parts of a row that a reader left out, by name


LARGEST = 1e30  # score; the difference of two is a number in fp32 too


# ---- fields ---------------------------------------------------------------------------------------------------------


def _get(row: Row, key: str) -> Any:
    if key not in row:
        raise Bad("missing_key", key)
    if row[key] is None:
        raise Bad("null", key)
    return row[key]


def _text(row: Row, key: str, *, blank: str = "empty_response") -> str:
    """A text that is not blank; `blank` is the reason otherwise, "" allows it."""
    value = _get(row, key)
    if not isinstance(value, str):
        raise Bad("wrong_type", key, f"{type(value).__name__}, not text")
    if blank and not value.strip():
        raise Bad(blank, key)
    return value


def _prompt(row: Row, key: str) -> str:
    return _text(row, key, blank="empty_prompt")


def _list(row: Row, key: str) -> list[Any]:
    value = _get(row, key)
    if not isinstance(value, list):
        raise Bad("wrong_type", key, f"{type(value).__name__}, not a list")
    return value


def _objects(row: Row, key: str) -> list[Row]:
    values = _list(row, key)
    if not all(isinstance(value, dict) for value in values):
        raise Bad("wrong_type", key, "not a list of objects")
    return values


def _number(row: Row, key: str) -> float:
    value = _get(row, key)
    if not is_score(value):
        raise Bad("wrong_type", key, f"{type(value).__name__}, not a number up to {LARGEST:.0e}")
    return float(value)


def is_score(value: Any) -> bool:
    """Whether it is a number that can be compared with any other."""
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= LARGEST


def _ranking(
    prompt: str, responses: list[str], ranks: list[int], grades: Sequence[float] = (), *, absolute: bool = True
) -> Ranking:
    """Checked: one rank per response in 0 ... K, at least one strict pair, equal texts ranked equally."""
    if len(ranks) != len(responses):
        raise Bad("rank_invalid", "ranks", f"{len(ranks)} for {len(responses)} responses")
    if any(type(rank) is not int or not 0 <= rank <= len(ranks) for rank in ranks):
        raise Bad("rank_invalid", "ranks", f"not whole numbers from 0 to {len(ranks)}")
    placed = [(text, rank) for text, rank in zip(responses, ranks, strict=True) if rank]
    if len({rank for _, rank in placed}) < 2:
        raise Bad("rank_invalid", "ranks", "no answer is better than another")
    if len(set(placed)) > len({text for text, _ in placed}):
        raise Bad("identical_answers", "responses")
    return Ranking(prompt, responses, ranks, grades=[float(grade) for grade in grades], absolute=absolute)


def _by_score(prompt: str, responses: list[str], scores: list[float]) -> Ranking:
    return _ranking(prompt, responses, [1 + sum(other > score for other in scores) for score in scores], scores)


# ---- conversations --------------------------------------------------------------------------------------------------

ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system"}


def _turns(messages: list[Row], role_key: str, text_key: str, notes: Notes) -> list[Turn]:
    """Turns from the first of the user on, users and assistants alternating, perhaps after one of the system."""
    turns: list[Turn] = []
    for message in messages:
        name = _text(message, role_key, blank="unknown_role")
        role = ROLES.get(name)
        if role is None:
            raise Bad("unknown_role", role_key, ascii(name[:40]))
        blank = {"user": "empty_prompt", "assistant": "empty_response", "system": ""}[role]
        text = _text(message, text_key, blank=blank)
        previous = turns[-1][0] if turns else ""
        if role == "assistant" and previous in ("", "system"):
            notes["leading_answer"] += 1
        elif role == previous or (role == "system" and previous):
            raise Bad("unknown_role", role_key, f"{role} after {previous}")
        elif role != "system" or text.strip():
            turns.append((role, text))
    return turns


def _conversation(messages: list[Row], role_key: str, text_key: str, notes: Notes) -> SFT:
    turns = _turns(messages, role_key, text_key, notes)
    if turns and turns[-1][0] == "user":
        notes["last_question"] += 1
        turns.pop()
    if not turns or turns[-1][0] != "assistant":
        raise Bad("empty_response", remark="no answer of the assistant")
    *context, (_, answer) = turns
    return SFT("\n\n".join(text for _, text in context), answer, tuple(context) if len(context) > 1 else ())


def _single_turn(messages: list[Row], key: str) -> tuple[str, str]:
    """(question, answer) of a conversation of two turns, or of its answer alone."""
    found = [(_text(m, "role", blank="unknown_role"), _text(m, "content")) for m in messages]
    roles = [ROLES.get(role) for role, _ in found]
    if roles not in (["user", "assistant"], ["assistant"]):
        raise Bad("wrong_type", key, "only one question with its answer can be ranked")
    return found[0][1] if len(found) == 2 else "", found[-1][1]


# ---- preferences ----------------------------------------------------------------------------------------------------

HUMAN, ASSISTANT = "\n\nHuman:", "\n\nAssistant:"


def _split_transcript(row: Row, key: str) -> tuple[str, str]:
    """(all up to and including the last Assistant:, the rest); together the text, byte for byte."""
    text = _text(row, key)
    before, marker, answer = text.rpartition(ASSISTANT)
    if not marker or not text.startswith(HUMAN) or HUMAN in answer:
        raise Bad("wrong_type", key, "neither a transcript of Human: and Assistant: nor beside a prompt")
    if not answer.strip():
        raise Bad("empty_response", key)
    return before + marker, answer


def preference(row: Row, notes: Notes) -> Iterator[Record]:
    """chosen and rejected, as transcripts, texts or messages, with or without a prompt."""
    sides = [_get(row, "chosen"), _get(row, "rejected")]
    if isinstance(sides[0], list):
        prompt, answers = _from_messages(row)
    elif "prompt" in row:
        prompt, answers = _prompt(row, "prompt"), [_text(row, "chosen"), _text(row, "rejected")]
        marker = "Assistant:"
        if all(answer.startswith(marker) for answer in answers):
            prompt, answers = prompt + marker, [answer.removeprefix(marker) for answer in answers]
            for key, answer in zip(("chosen", "rejected"), answers, strict=True):
                _text({key: answer}, key)
    else:
        (prompt, chosen), (other, rejected) = _split_transcript(row, "chosen"), _split_transcript(row, "rejected")
        if prompt != other:
            raise Bad("prompt_mismatch", "chosen and rejected")
        answers = [chosen, rejected]
    if answers[0] == answers[1]:
        raise Bad("identical_answers", "chosen and rejected")
    margin = "score_chosen" not in row
    yield _ranking(prompt, answers, [1, 2], _margin(row, notes) if margin else _scores(row, notes), absolute=not margin)


def _scores(row: Row, notes: Notes) -> list[float]:
    """Of chosen and rejected; none where they contradict these names."""
    grades = [_number(row, "score_chosen"), _number(row, "score_rejected")]
    if grades[0] == grades[1]:
        raise Bad("rank_invalid", "score_chosen", "a tie")
    if grades[0] < grades[1]:
        notes["scores_against_choice"] += 1
        return []
    return grades


def _margin(row: Row, notes: Notes) -> list[float]:
    """How much better the chosen one is, where the row says that in a number."""
    margin = row.get("margin")
    if margin is None:
        return []
    if not is_score(margin) or margin < 0:
        notes["unusable_margin"] += 1
        return []
    return [float(margin), 0.0]


def _from_messages(row: Row) -> tuple[str, list[str]]:
    sides = [_single_turn(_objects(row, key), key) for key in ("chosen", "rejected")]
    questions = {question for question, _ in sides if question}
    given = row.get("prompt")
    if isinstance(given, list):
        prompts = _objects(row, "prompt")
        if len(prompts) != 1 or _text(prompts[0], "role") != "user":
            raise Bad("wrong_type", "prompt", "only one question can be ranked")
        questions.add(_prompt(prompts[0], "content"))
    elif given is not None:
        questions.add(_prompt(row, "prompt"))
    if len(questions) != 1:
        raise Bad("prompt_mismatch" if questions else "missing_key", "prompt")
    return questions.pop(), [answer for _, answer in sides]


def native_ranking(row: Row, notes: Notes) -> Iterator[Record]:
    """prompt, responses, a rank per response, perhaps a score; what the labeling page (its rows have an `annotator`)
    noted as skipped or all tied prefers nothing and is left out, counted."""
    responses = _list(row, "responses")
    texts = [_text({f"responses[{i}]": text}, f"responses[{i}]") for i, text in enumerate(responses)]
    prompt, ranks = _prompt(row, "prompt"), _list(row, "ranks")
    if "annotator" in row and len(ranks) == len(texts) and len({str(rank) for rank in ranks if rank}) < 2:
        notes["no_preference"] += 1
    else:
        scores = row.get("scores") or []
        if scores and not (isinstance(scores, list) and len(scores) == len(texts) and all(map(is_score, scores))):
            notes["unusable_scores"] += 1
            scores = []
        yield _ranking(prompt, texts, ranks, scores)


def ultrafeedback_raw(row: Row, notes: Notes) -> Iterator[Record]:
    """A ranking by the overall score; equal scores tie."""
    completions = _objects(row, "completions")
    texts = [_text(c, "response") for c in completions]
    yield _by_score(_prompt(row, "instruction"), texts, [_number(c, "overall_score") for c in completions])


def summarize(row: Row, notes: Notes) -> Iterator[Record]:
    """The prompt as TRL and OpenAI write it; the texts begin with a space themselves."""
    info, summaries, choice = _get(row, "info"), _objects(row, "summaries"), _get(row, "choice")
    if not isinstance(info, dict):
        raise Bad("wrong_type", "info", "not an object")
    if len(summaries) != 2 or type(choice) is not int or choice not in (0, 1):
        raise Bad("rank_invalid", "choice", "not 0 or 1 of two summaries")
    if info.get("post") is not None:
        parts = [f"SUBREDDIT: r/{_text(info, 'subreddit')}", f"TITLE: {_text(info, 'title', blank='')}"]
        prompt = "\n\n".join([*parts, f"POST: {_prompt(info, 'post')}", "TL;DR:"])
    else:
        prompt = f"Article: {_prompt(info, 'article')}\n\nTL;DR:"
    yield _ranking(prompt, [_text(s, "text") for s in summaries], [1 + (choice != i) for i in (0, 1)])


def lm_human_preferences(row: Row, notes: Notes) -> Iterator[Record]:
    """The best of four samples; published files hold token ids, which only GPT-2's tokenizer can read."""
    if any(isinstance(row.get(key), list) for key in ("query", "sample0")):
        raise Bad("wrong_type", "query", "GPT-2 token ids; decode them into text first")
    samples, best = [_text(row, f"sample{i}") for i in range(4)], _get(row, "best")
    if type(best) is not int or not 0 <= best < 4:
        raise Bad("rank_invalid", "best", "not 0 to 3")
    yield _ranking(_prompt(row, "query"), samples, [1 + (best != i) for i in range(4)])


def webgpt(row: Row, notes: Notes) -> Iterator[Record]:
    """Two answers and their scores; a tie prefers nothing and is refused."""
    question = _get(row, "question")
    prompt = _prompt(question, "full_text") if isinstance(question, dict) else _prompt(row, "question")
    yield _by_score(prompt, [_text(row, f"answer_{i}") for i in (0, 1)], [_number(row, f"score_{i}") for i in (0, 1)])


def stack_exchange(row: Row, notes: Notes) -> Iterator[Record]:
    """response_j was voted above response_k."""
    yield _ranking(_prompt(row, "question"), [_text(row, "response_j"), _text(row, "response_k")], [1, 2])


def scored(row: Row, notes: Notes) -> Iterator[Record]:
    """A text, or a prompt and its answer, with a label."""
    label = _get(row, "label")
    if not isinstance(label, int | float) or not 0 <= label <= 1:
        raise Bad("label_invalid", "label", "not a number from 0 to 1")
    if "text" in row:
        yield Scored("", _text(row, "text"), float(label))
    else:
        key = "completion" if "completion" in row else "response"
        yield Scored(_prompt(row, "prompt"), _text(row, key), float(label))


# ---- SFT ------------------------------------------------------------------------------------------------------------


def _with_input(prompt: str, extra: str, response: str) -> SFT:
    if not extra.strip():
        return SFT(prompt, response)
    return SFT(f"{prompt}\n{extra}", response, (("user", prompt), ("input", extra)))


def instruction(row: Row, notes: Notes) -> Iterator[Record]:
    """Alpaca, BELLE (instruction, input, output) and dolly (instruction, context, response); input may be missing."""
    extra = next((key for key in ("input", "context") if row.get(key) is not None), None)
    response = _text(row, "output" if "output" in row else "response")
    yield _with_input(_prompt(row, "instruction"), _text(row, extra, blank="") if extra else "", response)


def prompt_response(row: Row, notes: Notes) -> Iterator[Record]:
    """A prompt and its response."""
    yield SFT(_prompt(row, "prompt"), _text(row, "response"))


def completion(row: Row, notes: Notes) -> Iterator[Record]:
    """A prompt and its completion, as texts or as messages."""
    if isinstance(row.get("prompt"), list) and isinstance(row.get("completion"), list):
        yield _conversation(_objects(row, "prompt") + _objects(row, "completion"), "role", "content", notes)
    else:
        yield SFT(_prompt(row, "prompt"), _text(row, "completion"))


def sharegpt(row: Row, notes: Notes) -> Iterator[Record]:
    """Turns from human and gpt, or assistant."""
    yield _conversation(_objects(row, "conversations"), "from", "value", notes)


def messages(row: Row, notes: Notes) -> Iterator[Record]:
    """Turns of user and assistant."""
    yield _conversation(_objects(row, "messages"), "role", "content", notes)


def seed_tasks(row: Row, notes: Notes) -> Iterator[Record]:
    """Every instance of an instruction is a record."""
    for instance in _objects(row, "instances"):
        extra = _text(instance, "input", blank="")
        yield _with_input(_prompt(row, "instruction"), extra, _text(instance, "output"))


def hc3(row: Row, notes: Notes) -> Iterator[Record]:
    """Every answer to a question is a record."""
    for key in ("human_answers", "chatgpt_answers"):
        for answer in _list(row, key):
            yield SFT(_prompt(row, "question"), _text({key: answer}, key))


def qa(row: Row, notes: Notes) -> Iterator[Record]:
    """A question and its answer; the markers that some files already hold would come twice from a template."""
    question, answer = _prompt(row, "q").removeprefix("问："), _text(row, "a").removeprefix("答：")
    yield SFT(_prompt({"q": question}, "q"), _text({"a": answer}, "a"))


def prompts(row: Row, notes: Notes) -> Iterator[Record]:
    """A prompt alone, as a text or as one message of the user."""
    messages = row.get("messages", row.get("prompt"))
    if isinstance(messages, list):
        turns = _turns(_objects({"messages": messages}, "messages"), "role", "content", notes)
        if [role for role, _ in turns] != ["user"]:
            raise Bad("wrong_type", "messages", "not one question of the user")
        yield Prompt(turns[0][1])
    else:
        yield Prompt(_prompt(row, "prompt"))


def texts(row: Row, notes: Notes) -> Iterator[Record]:
    """Plain texts."""
    yield SFT("", _text(row, "text"))


def ranked_columns(row: Row, notes: Notes) -> Iterator[Record]:
    """Best first, no prompt; `width` is how many columns the file has."""
    columns = row["columns"]
    if len(columns) != row["width"] or len(columns) < 2:
        raise Bad("wrong_type", remark=f"{len(columns)} columns, other rows have {row['width']}")
    texts = [_text({f"column {i}": text}, f"column {i}") for i, text in enumerate(columns, 1)]
    yield _ranking("", texts, list(range(1, len(texts) + 1)))
