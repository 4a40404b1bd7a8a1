"""The page of a run: what stands on it, what hostile input cannot do to it, and the laws fitted on it."""

import json
import math
import re
import subprocess
import sys
from html.parser import HTMLParser

import pytest

from minirlhf import report, svg
from minirlhf.figures import fit, reference_curves, turn
from minirlhf.page import shown, spelled
from minirlhf.report import main, write_report

needs_matplotlib = pytest.mark.skipif(not svg.available(), reason="figures need matplotlib")
HOSTILE = "<img src=x onerror=alert(1)></td></table><script>alert(2)</script> \x1b]0;x\x07 \u202edcba \x00 & \"'"
VOID = {"meta", "br", "img", "path", "use", "rect"}


def make_run(folder, steps=12, **files):
    """A PPO run: gold rises and falls, KL grows."""
    folder.mkdir(parents=True)
    lines = [
        {"step": s, "objective/scores": s / 10, "objective/kl": 0.25 * s, "gold/score": 0.5 - (s / 8 - 1) ** 2,
         "response/length_mean": 11.0 - s / 10, "response/empty_frac": 0.01, "objective/entropy": 12.0,
         "policy/clipfrac_avg": 0.1, "value/explained_var": -9.0 / s, "loss/policy_avg": -0.01, "loss/value_avg": 0.4,
         "lr": 3e-4, "tokens_per_s": 900.0, "time/rollout_s": 0.1, "time/update_s": 0.3}
        for s in range(1, steps + 1)
    ]  # fmt: skip
    write_lines(folder / "metrics.jsonl", files.pop("metrics", lines))
    for name, value in files.items():
        if isinstance(value, list) and name != "probe":
            write_lines(folder / f"{name}.jsonl", value)
        else:
            (folder / f"{name}.json").write_text(json.dumps(value))
    return folder


def write_lines(path, records):
    path.write_text("".join(json.dumps(r) + "\n" for r in records))


def html_of(*folders, **kwargs):
    return write_report(*folders, **kwargs).read_text(encoding="utf-8")


class Outline(HTMLParser):
    """Elements, ids, attributes and text, and whether every element is closed in order."""

    def __init__(self, html):
        super().__init__()
        self.open, self.tags, self.ids, self.attributes, self.words = [], [], [], [], []
        self.feed(html)
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        self.attributes += attrs
        self.ids += [value for name, value in attrs if name == "id"]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.handle_starttag(tag, attrs)
        if tag not in VOID:
            self.open.pop()

    def handle_endtag(self, tag):
        if tag not in VOID:
            assert self.open.pop() == tag

    def handle_data(self, data):
        self.words.append(data)

    def all(self, tag):
        return [attrs for name, attrs in self.tags if name == tag]

    @property
    def text(self):
        return " ".join("".join(self.words).split())


# ---- what stands on it ----------------------------------------------------------------------------------------------


@needs_matplotlib
def test_every_metric_has_a_figure_that_names_it(tmp_path):
    html = html_of(make_run(tmp_path / "run"))
    page = Outline(html)
    labels = [a["aria-label"] for a in page.all("svg")]
    captions = re.findall(r"<figcaption>(.*?)</figcaption>", html, re.S)
    assert len(labels) == len(captions) >= 12
    for metric in json.loads((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[0]):
        if metric != "step":
            assert any(metric in words for words in labels), metric
            assert any(metric in words for words in captions), metric
    assert any("over the square root of objective/kl" in words for words in labels)
    assert all(a.get("role") == "img" and "viewbox" in a for a in page.all("svg"))
    assert len(page.ids) == len(set(page.ids))
    references = {v[1:] for name, v in page.attributes if name.endswith("href")}
    references |= set(re.findall(r"url\(#(.*?)\)", html))
    assert references
    assert references <= set(page.ids)


def test_the_page_needs_no_network_and_no_scripts(tmp_path):
    html = html_of(make_run(tmp_path / "run"))
    page = Outline(html)
    policy = next(a["content"] for a in page.all("meta") if a.get("http-equiv") == "Content-Security-Policy")
    assert policy.startswith("default-src 'none'")
    assert "script-src" not in policy
    assert "http:" not in html
    assert "https:" not in html
    assert not {"script", "link", "iframe", "img", "object", "form"} & {tag for tag, _ in page.tags}


def test_answers_to_the_same_prompts_stand_side_by_side(tmp_path):
    samples = [
        {"step": s, "prompt": p, "response": f"answer {p} {s}", "score": s / 4, "gold": 0.5, "kl": 1.25, "length": 7}
        for s in (0, 10, 16, 100) for p in ("first", "second")
    ]  # fmt: skip
    samples.append({"step": 0, "prompt": "third", "response": "", "score": 0.0, "eos": False})
    page = Outline(html_of(make_run(tmp_path / "run", samples=samples)))
    assert "step 0 step 10 step 16 step 100" in re.sub(r"(step \d+)", r" \1 ", page.text).replace("  ", " ")
    assert page.words.count("first") == page.words.count("second") == 1
    order = [page.text.index(f"answer {p} {s}") for p in ("first", "second") for s in (0, 10, 16, 100)]
    assert order == sorted(order)
    assert "score 2.50 · gold 0.50 · KL 1.25 · 7 tokens" in page.text
    assert "(empty)" in page.text
    assert "no EOS" in page.text


def test_many_steps_of_samples_are_thinned(tmp_path):
    samples = [{"step": s, "prompt": "p", "response": f"said at {s}"} for s in range(0, 130, 2)]
    text = Outline(html_of(make_run(tmp_path / "run", samples=samples))).text
    assert [int(s) for s in re.findall(r"said at (\d+)", text)] == [0, 10, 16, 100, 128]


def test_probe_evaluation_alarms_and_settings(tmp_path):
    probe = [
        {"name": "ordinary", "score": 0.23, "share_below": 0.5},
        {"name": "empty", "score": 1.11, "share_below": 0.81, "verdict": "red"},
    ]
    moments = {"before": {"answers": 1024, "gold": -0.21}, "after": {"answers": 1024, "gold": 0.41}}
    metrics = [{"step": s, "objective/kl": 1.0} for s in (1, 3, 4)]
    alarms = [(3, "length: too short"), (4, "length: too short"), (9, "negative KL")]
    folder = make_run(
        tmp_path / "run", metrics=metrics, probe={"probe": probe}, evaluation=moments,
        alarms=[{"step": s, "alarm": a} for s, a in alarms],
        config={"run": {"steps": 60}, "ppo": {"kl_coef": 0.05}}, environment={"torch": "2.13.0"},
    )  # fmt: skip
    text = Outline(html_of(folder)).text
    for words in ("1.11", "81 %", "red", "1,024", "length: too short step 3 to 4, 2 times", "negative KL", "step 9",
                  "kl_coef0.05", "torch2.13.0", "not finished, step 4 of 60"):  # fmt: skip
        assert words in text, words
    assert "−0.21 → 0.41" in text.replace("\xa0", " ")


def test_probe_of_the_reward_model_script(tmp_path):
    """evaluate.write_probe wraps its list."""
    folder = make_run(tmp_path / "run", probe={"probe": [{"name": "one full stop", "example": ".", "score": -2.5}]})
    assert "one full stop" in html_of(folder)


def test_the_hash_of_final(tmp_path):
    folder = make_run(tmp_path / "run")
    (folder / "final").mkdir()
    (folder / "final" / "model.safetensors").write_bytes(b"abc")
    assert "ba7816bf8f01cfea" in html_of(folder)  # FIPS 180-2, appendix B.1


def test_equal_runs_give_equal_bytes(tmp_path):
    folder = make_run(tmp_path / "run")
    assert html_of(folder) == html_of(folder)


def test_supervised_runs(tmp_path):
    lines = [{"step": s, "loss": 2 / s, "lr": 1e-3} | ({"val/loss": 1.7} if s == 4 else {}) for s in range(1, 5)]
    page = Outline(html_of(make_run(tmp_path / "sft", metrics=lines)))
    assert "Alarms" not in page.text
    assert not svg.available() or any("loss, val/loss" in a["aria-label"] for a in page.all("svg"))


# ---- several runs ---------------------------------------------------------------------------------------------------


def test_several_runs_share_a_page(tmp_path, capsys):
    first = make_run(tmp_path / "low", config={"ppo": {"kl_coef": 0.02, "epochs": 4}})
    second = make_run(tmp_path / "high", steps=7, config={"ppo": {"kl_coef": 0.3, "epochs": 4}})
    assert main([str(first), str(second)]) == 0
    assert capsys.readouterr().out.strip() == str(first / "report.html")
    assert not (second / "report.html").exists()
    html = (first / "report.html").read_text()
    page = Outline(html)
    assert "differs low high ppo.kl_coef 0.02 0.3" in " ".join(page.words[page.words.index("differs") :][:6])
    if svg.available():
        assert "1 low" in html
        assert "2 high" in html
    out = tmp_path / "both.html"
    assert main([str(first), str(second), "--out", str(out)]) == 0
    assert out.read_text() == html


# ---- mistakes and damage --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("content", [None, "", '{"step": 1, "lo', "[1, 2]\n", '{"loss": 1.0}\n', '{"step": "1"}\n'])
def test_without_metrics(tmp_path, capsys, content):
    (tmp_path / "run").mkdir()
    if content is not None:
        (tmp_path / "run" / "metrics.jsonl").write_text(content)
    assert main([str(tmp_path / "run")]) == 3
    captured = capsys.readouterr()
    assert captured.out == ""
    assert len(captured.err.splitlines()) == 1
    assert str(tmp_path / "run" / "metrics.jsonl") in captured.err
    assert not (tmp_path / "run" / "report.html").exists()


def test_no_such_folder_and_no_argument(tmp_path, capsys):
    assert main([str(tmp_path / "none")]) == 3
    with pytest.raises(SystemExit) as e:
        main([])
    assert e.value.code == 2
    assert main([str(make_run(tmp_path / "run")), "--out", str(tmp_path / "no" / "such" / "page.html")]) == 4
    assert "Traceback" not in capsys.readouterr().err


def test_torn_and_damaged_files(tmp_path):
    folder = make_run(tmp_path / "run", samples=[{"step": 0, "prompt": "p", "response": "whole line"}])
    for name in ("metrics.jsonl", "samples.jsonl"):
        with (folder / name).open("ab") as f:
            f.write(b'{"step": 13, "objective/kl": \xff')
    for name in ("config", "environment", "evaluation", "probe"):
        (folder / f"{name}.json").write_text('{"torn": ')
    text = Outline(html_of(folder)).text
    assert "step 12" in text
    assert "whole line" in text


def test_odd_values(tmp_path):
    lines = [
        {"step": 1, "a": None, "b": 10**400, "c": "text", "d": 1.0, "e": [1], "f": True},
        {"step": 2, "a": 1.0, "b": 2.0, "c": {}, "d": None},
        {"step": 2, "a": 3.0, "samples": "x"},
    ]
    folder = make_run(tmp_path / "run", metrics=lines)
    (folder / "evaluation.json").write_text('{"before": 3, "after": {"x": [1], "gold": "<b>"}, "probe": null}')
    (folder / "probe.json").write_text('{"probe": [{"name": 3, "score": "<i>"}, 7]}')
    (folder / "samples.jsonl").write_text('{"step": "x", "prompt": 3}\n{"step": 1, "prompt": "p", "response": null}\n')
    text = Outline(html_of(folder)).text
    assert "<b>" in text
    assert "<i>" in text
    assert report.traces(report.read_run(folder)).series["a"][-1] == (2, 3.0)  # of a step done twice, the later line


@needs_matplotlib
def test_numbers_that_no_figure_holds_leave_gaps(tmp_path):
    lines = [{"step": s, "objective/kl": x, "gold/score": x, "loss": x} for s, x in ((1, -1e308), (2, 1e308), (3, 7.0))]
    folder = make_run(tmp_path / "run", metrics=[*lines, {"step": 10**400, "loss": 1.0}])
    write_lines(folder / "memory.jsonl", [{"step": 10**400, "memory/process_mb": 1.0}])
    write_lines(folder / "samples.jsonl", [{"step": -(10**400), "prompt": "p", "response": "r"}])
    assert "step 3" in Outline(html_of(folder)).text
    assert [y for _, y in report.traces(report.read_run(folder)).series["loss"] if y == y] == [7.0]


def test_deep_nesting_is_refused_in_one_line(tmp_path, capsys):
    folder = make_run(tmp_path / "run")
    (folder / "samples.jsonl").write_text("[" * 200_000 + "\n")
    assert main([str(folder)]) == 3
    assert len(capsys.readouterr().err.splitlines()) == 1


# ---- hostile text ---------------------------------------------------------------------------------------------------


def test_hostile_text_stays_text(tmp_path):
    folder = make_run(
        tmp_path / "run & <b>",
        metrics=[{"step": s, "time/$\\frac{" + HOSTILE: s, HOSTILE: s, "alarms": [HOSTILE]} for s in (1, 2)],
        samples=[{"step": 1, "prompt": HOSTILE, "response": HOSTILE + "\ud800", "score": 1.0}],
        alarms=[{"step": HOSTILE, HOSTILE: HOSTILE}],
        probe=[{"name": HOSTILE, HOSTILE: HOSTILE, "score": 1.0, "verdict": HOSTILE}],
        config={HOSTILE: {HOSTILE: HOSTILE}}, environment={HOSTILE: HOSTILE},
        evaluation={HOSTILE: {HOSTILE: HOSTILE}},
    )  # fmt: skip
    html = html_of(folder)
    page = Outline(html)
    assert not {"script", "img", "b"} & {tag for tag, _ in page.tags}
    assert not [name for name, _ in page.attributes if name.startswith("on")]
    assert not re.search(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]", html)
    assert "<img src=x onerror=alert(1)>" in page.text
    assert "⟨U+001B⟩" in page.text
    assert "⟨U+202E⟩" in page.text
    assert "⟨U+D800⟩" in page.text
    assert main([str(folder)]) == 0


def test_spelled():
    assert spelled("a\tb") == "a⟨U+0009⟩b"
    assert spelled("a\nb") == "a⏎\nb"
    assert spelled("电影 很棒。 é 👍 a b") == "电影 很棒。 é 👍 a b"
    assert spelled("\u200b\ufeff\u2028\u0085") == "⟨U+200B⟩⟨U+FEFF⟩⟨U+2028⟩⟨U+0085⟩"
    assert shown("<" * 3000).startswith("&lt;" * 2000 + "…")


# ---- figures --------------------------------------------------------------------------------------------------------


def test_without_matplotlib(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    folder = make_run(tmp_path / "run", samples=[{"step": 0, "prompt": "p", "response": "still here"}])
    assert main([str(folder)]) == 0
    assert len(capsys.readouterr().err.splitlines()) == 1
    html = (folder / "report.html").read_text()
    assert "<svg" not in html
    assert "figures need matplotlib" in html
    assert "still here" in html


def test_import_is_light():
    code = "import sys, minirlhf.report; sys.exit('matplotlib' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_fit_finds_the_law_it_was_made_from():
    """R = d (1.5 - 0.8 ln d), first gold -.2; peak at d = exp(1.5/.8 - 1) = 2.3989."""
    dots = [(d / 7, -0.2 + d / 7 * (1.5 - 0.8 * math.log(d / 7))) for d in range(1, 20)]
    assert fit([(0.0, -0.2), *dots], -0.2) == pytest.approx((1.5, 0.8), rel=1e-9)
    assert turn(1.5, 0.8) == ", which turns at d = 2.40"
    assert turn(1.5, -0.8) == ""
    assert fit(dots[:4], -0.2) is None
    assert fit([(1.0, 0.5)] * 9, -0.2) is None  # one distance says nothing of two numbers


def test_reference_curves():
    """The exact frontier at KL 1.521 is .503, at 5.712 .942; best of 64 has gold .721 at KL 3.175."""
    frontier, best = reference_curves(math.sqrt(5.712))
    assert frontier.points[-1] == pytest.approx((math.sqrt(5.712), 0.942), abs=1e-3)
    assert frontier.points[0] == pytest.approx((0, -0.2104), abs=1e-4)
    assert best.points[-1] == pytest.approx((math.sqrt(3.175), 0.721), abs=1e-3)


def test_long_runs_are_thinned_to_means():
    points = [(x, 2.0 * x) for x in range(5000)]
    found = svg.thinned(points)
    assert len(found) == 1000
    assert found[0] == (2.0, 4.0)  # of 0 … 4
    assert svg.thinned(points[:1000]) == points[:1000]


def test_time_and_memory(tmp_path):
    """.1 and .3 seconds a step are a quarter and three quarters; memory.jsonl joins by step."""
    folder = make_run(tmp_path / "run", memory=[{"step": s, "memory/process_mb": 100.0 + s} for s in (1, 2, 99)])
    assert report.traces(report.read_run(folder)).series["memory/process_mb"] == [(1, 101.0), (2, 102.0)]
    html = html_of(folder)
    text = Outline(html).text
    assert "25 %" in text
    assert "75 %" in text
    assert not svg.available() or "memory/process_mb over step" in html
