"""The labeling page and the report in a real browser. Skipped where chromium and chromedriver are missing."""

import random
import re

import processes
import pytest
import webdriver
from test_chat import folders  # noqa: F401  the fixture
from test_label import TASKS, lines_of, serving, write_tasks
from test_report import HOSTILE, make_run, needs_matplotlib
from test_scripts import script

from minirlhf import review_world
from minirlhf.formats import read_records
from minirlhf.report import write_report

pytestmark = pytest.mark.skipif(not webdriver.available(), reason="needs chromium and chromedriver")
FOCUSED = "return document.activeElement.dataset.answer"
STATUS = "return document.getElementById('status').textContent"
RANKS = "return Object.fromEntries([...document.querySelectorAll('[data-answer]')].map(li =>" \
        "[li.dataset.answer, Number(li.querySelector('.rank').dataset.rank) || 0]))"  # fmt: skip
ORDER = "return [...document.querySelectorAll('[data-answer]')].map(li => Number(li.dataset.answer))"


@pytest.fixture(scope="module")
def chromium():
    browser = webdriver.Browser()
    yield browser
    browser.close()


@pytest.fixture
def browser(chromium):
    """Without memories of the test before, and no word on its console after the test."""
    chromium.resize(1280, 900)
    chromium.open("about:blank")
    chromium.devtools("Storage.clearDataForOrigin", origin="*", storageTypes="all")
    chromium.console()
    yield chromium
    assert [e for e in chromium.console() if "ERR_CONNECTION_REFUSED" not in e["message"]] == []


class Desk:
    """Somebody at the labeling page."""

    def __init__(self, browser, page, out):
        self.browser, self.page, self.out = browser, page, out
        self.open()

    def open(self, url=None):
        self.browser.open(url or self.page.url)
        self.settle()

    def settle(self):
        self.browser.wait("return task !== null && !busy")

    def focus(self, answer):
        self.browser.run("document.querySelector(`[data-answer='${arguments[0]}']`).focus()", answer)

    def rank(self, ranks):
        """A digit for every answer of the file's order."""
        for answer, rank in enumerate(ranks):
            self.focus(answer)
            self.browser.keys(str(rank))

    def save(self):
        before = len(lines_of(self.out))
        self.browser.keys("Enter")
        self.settle()
        lines = lines_of(self.out)
        assert len(lines) == before + 1
        return lines[-1]

    @property
    def ranks(self):
        found = self.browser.run(RANKS)
        return [found[str(i)] for i in range(len(found))]

    @property
    def order(self):
        return self.browser.run(ORDER)

    @property
    def status(self):
        return self.browser.run(STATUS)

    def middle(self, answer, part=".text"):
        script = (
            "let b = document.querySelector(`[data-answer='${arguments[0]}'] ${arguments[1]}`).getBoundingClientRect();"
        )
        return self.browser.run(script + "return [b.x + b.width / 2, b.y + b.height / 2]", answer, part)


@pytest.fixture
def desk(browser, tmp_path):
    """Makes desks; several may share a file."""
    pages = []

    def make(tasks=TASKS, *args):
        manager = serving(write_tasks(tmp_path / "tasks.jsonl", tasks), tmp_path / "rankings.jsonl", *args)
        pages.append(manager)
        return Desk(browser, manager.__enter__(), tmp_path / "rankings.jsonl")

    yield make
    for manager in pages:
        manager.__exit__(None, None, None)


def letters(n):
    return [{"prompt": f"prompt {i}", "responses": [f"answer {c} {i}" for c in "abcdefghi"[:n]]} for i in range(3)]


# ---- what is on the page --------------------------------------------------------------------------------------------


def test_prompt_and_answers_are_there_and_can_have_the_focus(desk):
    here = desk()
    texts = here.browser.run("return [...document.querySelectorAll('[data-answer] .text')].map(e => e.textContent)")
    assert sorted(texts) == sorted(TASKS[0]["responses"])
    whole = here.browser.run("return [...document.querySelectorAll('[data-answer]')].map(e => e.innerText.trim())")
    assert whole == texts  # what is beside it is no text
    assert here.browser.run("return document.getElementById('prompt').textContent") == TASKS[0]["prompt"]
    assert sorted(here.order) == [0, 1, 2]
    for answer in here.order:
        here.focus(answer)
        assert here.browser.run(FOCUSED) == str(answer)


def test_the_order_is_blind_and_kept(desk):
    here = desk(letters(9))
    order = here.order
    assert order != list(range(9))  # of 362,880 orders it is one
    here.open()
    assert here.order == order
    assert here.page.task()["shown"] == order


def test_hostile_text_stays_text(desk):
    rows = [{"prompt": HOSTILE, "responses": [HOSTILE, "</li></ol><script>alert(1)</script>", "\u202eabc"]}]
    here = desk(rows)
    assert here.browser.run("return document.querySelectorAll('img, main script').length") == 0
    assert HOSTILE in here.browser.run("return [...document.querySelectorAll('.text')].map(e => e.textContent)")


def test_nothing_comes_from_elsewhere(desk):
    here = desk()
    names = here.browser.run("return performance.getEntriesByType('resource').map(e => e.name)")
    assert len(names) >= 3
    assert all(name.startswith(f"http://127.0.0.1:{here.page.port}/") for name in names)
    assert here.browser.run("return location.href") == f"http://127.0.0.1:{here.page.port}/"  # the token is gone
    assert here.browser.run("return document.cookie") == ""  # HttpOnly


@pytest.mark.parametrize("width", [390, 1280])
def test_it_fits(desk, width):
    here = desk([{"prompt": "w" * 300, "responses": ["x" * 500, "long words " * 80, *"abcdefg"]}])
    here.browser.resize(width, 844)
    here.browser.keys("?")
    assert here.browser.run("return document.documentElement.scrollWidth") <= width
    assert here.browser.run(
        "return [...document.querySelectorAll('button')].every(b => b.getBoundingClientRect().right <= innerWidth)"
    )


def test_names_for_those_who_listen(desk):
    here = desk()
    bar = "let b = document.querySelector('[role=progressbar]');"
    assert here.browser.run(bar + "return [b.ariaValueNow, b.ariaValueMax]") == ["0", "3"]
    here.rank([1, 2, 3])
    labels = here.browser.run("return [...document.querySelectorAll('.rank')].map(e => e.ariaLabel)")
    assert sorted(labels) == ["rank 1", "rank 2", "rank 3"]
    here.save()
    assert here.browser.run(bar + "return b.ariaValueNow") == "1"
    assert here.browser.run("return document.getElementById('status').ariaLive") == "polite"
    assert here.browser.run("return [...document.querySelectorAll('button')].every(b => b.textContent || b.ariaLabel)")


# ---- ranking --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n", range(2, 10))
def test_digits_rank_and_enter_saves(desk, n):
    here = desk(letters(n))
    for seed in range(2):
        ranks = random.Random(seed).sample(range(1, n + 1), n)
        here.rank(ranks)
        assert here.ranks == ranks
        line = here.save()
        assert (line["responses"], line["ranks"]) == (letters(n)[seed]["responses"], ranks)
        assert line["ms"] > 0
    assert [r.ranks for r in read_records(here.out)[0]] == [line["ranks"] for line in lines_of(here.out)]


def test_equal_digits_are_a_tie(desk):
    here = desk()
    here.rank([2, 1, 2])
    assert here.save()["ranks"] == [2, 1, 2]


def test_the_equals_sign_ties_with_the_answer_above(desk):
    here = desk()
    top, middle, bottom = here.order
    here.focus(top)
    here.browser.keys("=")  # nothing is above it
    here.browser.keys("1", "Down", "=", "Down", "3")
    assert dict(enumerate(here.save()["ranks"])) == {top: 1, middle: 1, bottom: 3}


def test_its_button_does_the_same(desk):
    here = desk()
    top, middle, _ = here.order
    here.focus(top)
    here.browser.keys("2")
    here.browser.click(f"[data-answer='{middle}'] .tie")
    assert here.ranks[middle] == 2
    assert here.browser.run(FOCUSED) == str(middle)


@pytest.mark.parametrize(
    ("kind", "part"), [("mouse", ".text"), ("mouse", ".rank"), ("touch", ".rank"), ("pen", ".text")]
)
def test_dragging_ranks_by_place(desk, kind, part):
    here = desk(letters(4))
    a, b, c, d = here.order
    x, y = here.middle(d, part)
    to_x, to_y = here.middle(a, part)
    here.browser.drag([(x, y), (x, (y + to_y) / 2), (to_x, to_y - 15)], kind)
    assert here.order == [d, a, b, c]
    assert [here.ranks[i] for i in (d, a, b, c)] == [1, 2, 3, 4]
    assert sorted(here.save()["ranks"]) == [1, 2, 3, 4]


def test_a_drag_can_be_undone(desk):
    here = desk(letters(3))
    order = here.order
    x, y = here.middle(order[0])
    here.browser.drag([(x, y), (x, here.middle(order[2])[1] + 15)])
    assert here.order == [*order[1:], order[0]]
    here.browser.keys("u")
    assert (here.order, here.ranks) == (order, [0, 0, 0])


def test_a_finger_on_the_text_scrolls(desk):
    here = desk(letters(4))
    order = here.order
    here.browser.drag([here.middle(order[3]), here.middle(order[1]), here.middle(order[0])], "touch")
    assert here.order == order
    assert here.ranks == [0] * 4


def test_a_click_is_no_drag(desk):
    here = desk()
    second = here.order[1]
    here.browser.drag([here.middle(second), here.middle(second)])
    assert here.browser.run(FOCUSED) == str(second)
    assert here.ranks == [0, 0, 0]


def test_shift_and_arrows_move_an_answer(desk):
    here = desk(letters(4))
    a, b, c, d = here.order
    here.focus(c)
    here.browser.keys("Up", "Up", "Up", held=["Shift"])
    assert here.order == [c, a, b, d]
    assert [here.ranks[i] for i in here.order] == [1, 2, 3, 4]
    here.browser.keys("Down", held=["Shift"])
    assert here.order == [a, c, b, d]
    assert here.browser.run(FOCUSED) == str(c)


def test_arrows_move_the_focus(desk):
    here = desk()
    order = here.order
    assert here.browser.run(FOCUSED) == str(order[0])
    here.browser.keys("Down", "Down", "Down")
    assert here.browser.run(FOCUSED) == str(order[2])
    here.browser.keys("Up")
    assert here.browser.run(FOCUSED) == str(order[1])


def test_what_has_no_rank_is_left_out(desk):
    here = desk()
    here.rank([1, 2, 3])
    here.focus(1)
    here.browser.keys("0")
    assert here.save()["ranks"] == [1, 0, 3]


def test_a_digit_beyond_the_answers_is_refused(desk):
    here = desk()
    here.focus(0)
    here.browser.keys("4")
    assert here.ranks == [0, 0, 0]
    assert "1 to 3" in here.status


@pytest.mark.parametrize("ranks", [[0, 0, 0], [1, 0, 0]])
def test_too_little_is_not_saved(desk, ranks):
    here = desk()
    here.rank(ranks)
    here.browser.keys("Enter")
    assert "at least two" in here.status
    assert lines_of(here.out) == []


def test_enter_twice_saves_once(desk):
    here = desk()
    here.rank([1, 2, 3])
    here.browser.keys("Enter", "Enter", "Enter")
    here.settle()
    assert len(lines_of(here.out)) == 1


# ---- skip, undo, edit, flag -----------------------------------------------------------------------------------------


def test_skip(desk):
    here = desk()
    here.browser.keys("s")
    here.settle()
    assert [line["ranks"] for line in lines_of(here.out)] == [[0, 0, 0]]
    assert here.browser.run("return document.getElementById('prompt').textContent") == TASKS[1]["prompt"]


def test_undo_takes_back_step_by_step(desk):
    here = desk()
    order = here.order
    here.focus(order[0])
    here.browser.keys("1", "2")
    here.browser.keys("Down", held=["Shift"])
    assert here.order != order
    here.browser.keys("u")
    assert (here.order, here.ranks[order[0]]) == (order, 2)
    here.browser.keys("u")
    assert here.ranks[order[0]] == 1
    here.browser.keys("u")
    assert here.ranks == [0, 0, 0]


def test_undo_goes_back_and_saving_again_is_a_new_revision(desk):
    here = desk()
    here.rank([1, 2, 3])
    first = here.save()
    here.browser.keys("u")
    here.browser.wait("return task.task === arguments[0]", first["task"])
    assert here.ranks == [1, 2, 3]
    here.rank([3, 2, 1])
    second = here.save()
    assert (second["task"], second["ranks"], second["rev"]) == (first["task"], [3, 2, 1], 2)
    assert here.browser.run("return document.getElementById('progress').textContent") == "1 / 3"


def test_a_flag_is_stored(desk):
    here = desk()
    here.browser.keys("b")
    here.rank([1, 2, 3])
    assert here.save()["flags"] == ["flag"]
    here.rank([1, 2, 3, 4])
    assert here.save()["flags"] == []


# ---- coming and going -----------------------------------------------------------------------------------------------


def test_reloading_keeps_what_was_not_saved(desk):
    here = desk()
    here.rank([2, 0, 1])
    here.open(f"http://127.0.0.1:{here.page.port}/")  # with the cookie
    assert here.ranks == [2, 0, 1]


def test_the_end_and_back(desk):
    here = desk(TASKS[:1])
    here.rank([1, 2, 3])
    here.save()
    assert here.browser.run("return !document.getElementById('end').hidden && document.getElementById('work').hidden")
    here.browser.keys("Enter", "s", "1")
    assert len(lines_of(here.out)) == 1
    here.browser.click("#undo")
    here.browser.wait("return task.task !== null")
    assert here.ranks == [1, 2, 3]


def test_two_annotators(desk):
    ann = desk(letters(9), "--annotator", "ann")
    order = ann.order
    ann.rank(range(1, 10))
    ann.save()
    bob = desk(letters(9), "--annotator", "bob")
    assert bob.order != order
    assert bob.browser.run("return document.getElementById('who').textContent") == "bob"
    assert bob.browser.run("return document.getElementById('progress').textContent") == "0 / 3"
    bob.rank(range(9, 0, -1))
    assert bob.save()["annotator"] == "bob"
    first, second = lines_of(bob.out)
    assert first["task"] == second["task"]


def test_a_killed_server_loses_nothing(desk):
    here = desk()
    here.rank([1, 2, 3])
    first = here.save()
    here.rank([4, 3, 2, 1])
    here.page.close()
    here.browser.keys("Enter")
    here.browser.wait("return document.getElementById('status').classList.contains('bad')")
    assert "not saved" in here.status.lower()
    assert here.ranks == [4, 3, 2, 1]
    again = desk(TASKS, "--port", str(here.page.port))
    assert again.ranks == [4, 3, 2, 1]  # what was not saved is still in the browser
    assert again.save()["ranks"] == [4, 3, 2, 1]
    assert lines_of(again.out)[0] == first
    assert len(lines_of(again.out)) == 2


def test_an_old_token_is_told(browser, desk):
    here = desk()
    here.rank([1, 2, 3])
    here.browser.devtools("Network.clearBrowserCookies")
    here.browser.keys("Enter")
    here.browser.wait("return document.getElementById('status').classList.contains('bad')")
    assert "started anew" in here.status
    assert lines_of(here.out) == []
    assert any("403" in entry["message"] for entry in browser.console())


# ---- language and view ----------------------------------------------------------------------------------------------


def test_both_languages(desk):
    here = desk()
    assert here.browser.run("return document.documentElement.lang") == "en"
    here.browser.click("#language")
    words = here.browser.run("return [...document.querySelectorAll('button')].map(b => b.textContent)")
    assert {"保存", "跳过", "撤销"} <= set(words)
    here.open()
    assert here.browser.run("return document.documentElement.lang") == "zh-CN"  # it is remembered
    here.browser.click("#language")
    assert here.browser.run("return document.getElementById('save').textContent") == "Save"


def test_spaces_can_be_seen(desk):
    here = desk([{"prompt": "a  b\nc", "responses": ["x\ty", " x\u200b"]}])
    here.browser.keys("w")
    text = here.browser.run("return [...document.querySelectorAll('.text')].map(e => e.textContent)")
    plain = sorted(t.replace("\u200b", "") for t in text)
    assert plain == sorted(["a··b⏎\nc", "x⇥\ty", "·x⟨U+200B⟩"])


def test_help(desk):
    here = desk()
    assert here.browser.run("return document.getElementById('help').hidden")
    here.browser.keys("?")
    assert "Enter" in here.browser.run("return document.getElementById('help').textContent")
    here.browser.keys("?")
    assert here.browser.run("return document.getElementById('help').hidden")


# ---- a person who tries everything ----------------------------------------------------------------------------------


class Model:
    """What the page should show after a key."""

    def __init__(self, order):
        self.order, self.ranks, self.past = order, [0] * len(order), []

    def press(self, answer, key):
        before, at = (list(self.order), list(self.ranks)), self.order.index(answer)
        to = at + {"up": -1, "down": 1}.get(key, 0)
        if key == "u":
            self.order, self.ranks = self.past.pop() if self.past else before
            return
        if key.isdigit() and int(key) <= len(self.order):
            self.ranks[answer] = int(key)
        elif key == "=" and at and self.ranks[self.order[at - 1]]:
            self.ranks[answer] = self.ranks[self.order[at - 1]]
        elif to != at and 0 <= to < len(self.order):
            self.order.insert(to, self.order.pop(at))
            for place, i in enumerate(self.order):
                self.ranks[i] = place + 1
        else:
            return
        self.past.append(before)


def play(here, actions, seed):
    """Random keys, against the model."""
    rng = random.Random(seed)
    model, saved = Model(here.order), 0
    for _ in range(actions):
        answer, key = rng.choice(model.order), rng.choice(["0", *"112233445", "=", "up", "down", "u", "Enter"])
        here.focus(answer)
        if key == "Enter":
            if sum(rank > 0 for rank in model.ranks) >= 2:
                assert here.save()["ranks"] == model.ranks
                model, saved = Model(here.order), saved + 1
        elif key != "u" or model.past:  # without a past it goes back a task
            here.browser.keys(key.capitalize() if len(key) > 1 else key, held=["Shift"] if len(key) > 1 else [])
            model.press(answer, key)
        assert (here.order, here.ranks) == (model.order, model.ranks)
    assert len(lines_of(here.out)) == saved > 0


MANY = [{"prompt": f"p {i}", "responses": [f"{c} {i}" for c in "abcd"]} for i in range(300)]


def test_random_actions(desk):
    play(desk(MANY), 80, 0)


@pytest.mark.slow
def test_1000_random_actions(desk):
    play(desk(MANY), 1000, 1)


# ---- what it is for -------------------------------------------------------------------------------------------------


def test_labels_made_here_train_a_reward_model_that_agrees(desk, folders, tmp_path):  # noqa: F811
    """Of 16 tasks with 4 answers each, ranked with keys by their length."""
    counts = [random.Random(i).sample(range(1, 12), 4) for i in range(16)]
    answers = [[" ".join(["great"] * n) + " ." for n in four] for four in counts]
    tasks = [{"prompt": p, "responses": a} for p, a in zip(review_world.prompts() * 2, answers, strict=True)]
    here = desk(tasks)
    for task in tasks:
        lengths = [len(text) for text in task["responses"]]
        here.rank([1 + sum(other < length for other in lengths) for length in lengths])
        here.save()
    argv = ["--run.steps", "25", "--optim.warmup_steps", "3", "--run.dir", "rm"]
    script("rm", "--model.path", folders / "a", "--data.path", here.out, *argv, cwd=tmp_path)
    code, _, err = processes.run("-m", "minirlhf.score", "rm/final", here.out, cwd=tmp_path)
    assert code == 0, err
    assert "of 96 pairs" in err
    assert float(re.search(r"agrees with ([\d.]+)", err)[1]) > 0.95


# ---- the report -----------------------------------------------------------------------------------------------------


@needs_matplotlib
@pytest.mark.parametrize("width", [390, 1280])
def test_the_report_fits_is_silent_and_asks_nobody(browser, tmp_path, width):
    samples = [
        {"step": s, "prompt": p, "response": f"answer {s} " * 30 + "x" * 200, "score": s / 4, "gold": 0.5, "kl": 1.25}
        for s in (0, 10, 16, 100) for p in ("first", "p" * 300, HOSTILE)
    ]  # fmt: skip
    probe = [{"name": "empty", "example": "e" * 300, "score": 1.11, "percentile": 0.81, "verdict": "red"}]
    config = {"run": {"steps": 60, "dir": "d" * 200}, "ppo": {"prompts": ["p" * 300]}}
    folder = make_run(tmp_path / ("run" + "n" * 80), samples=samples, probe=probe, config=config,
                      alarms=[{"step": 3, "alarm": "a" * 300, "value": 1.5}], environment={"torch": "2"})  # fmt: skip
    browser.devtools("Network.enable")
    browser.resize(width, 900)
    browser.open(write_report(folder).as_uri())
    assert browser.run("return document.documentElement.scrollWidth") <= width
    assert browser.run("return performance.getEntriesByType('resource').length") == 0
    assert browser.run("return document.scripts.length") == 0
    boxes = browser.run("return [...document.querySelectorAll('svg')].map(e => e.getBoundingClientRect().right)")
    assert len(boxes) > 10
    assert max(boxes) <= width
