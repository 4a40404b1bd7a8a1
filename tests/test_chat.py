"""The conversation: one answer per line, the sampler's own tokens, nothing that depends on anything but the input."""

import io
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from processes import ENV

from minirlhf import chat, review_world, stage
from minirlhf.generate import generate
from minirlhf.heads import RewardModel
from minirlhf.model import CausalLM, ModelConfig
from minirlhf.pretrained import load_reward_model
from minirlhf.rng import generator
from minirlhf.templates import get_template
from minirlhf.tokenizer import Tokenizer

FILM, HOTEL = review_world.prompts()[0], review_world.prompts()[2]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Two language models and a reward model with random weights, large enough to give answers of some variety."""
    root = tmp_path_factory.mktemp("models")
    tokenizer = Tokenizer.from_words(review_world.words())
    config = ModelConfig(family="gpt2", vocab_size=82, n_layer=2, n_head=2, d_model=32, max_seq_len=48)
    for i, name in enumerate(("a", "b", "rm")):
        kind = RewardModel if name == "rm" else CausalLM
        model = kind(config, rng=generator(i, "weights"))
        with torch.no_grad():
            for p in model.parameters():
                p.mul_(4)
        (root / name).mkdir()
        stage.save(root / name, stage.Loaded(model, tokenizer, get_template("plain")))
    return root


@pytest.fixture
def talk(monkeypatch, capsys, folders):
    """Lines in → (exit code, lines of stdout, stderr)."""

    def run(text, *args, names=("a",)):
        raw = text if isinstance(text, bytes) else text.encode()
        monkeypatch.setattr(sys, "stdin", SimpleNamespace(buffer=io.BytesIO(raw), isatty=lambda: False))
        code = chat.main([*(str(folders / name) for name in names), "--max_new_tokens", "8", *args])
        captured = capsys.readouterr()
        return code, captured.out.split("\n")[:-1], captured.err

    return run


def test_a_template_is_named_by_its_option(talk):
    for name, words in (("nowhere", "nowhere: unknown; choose"), ("data.template.json", "data.template.json: ")):
        code, out, err = talk(FILM, "--template", name)
        assert (code, out) == (2, [])
        assert err.startswith(f"error: --template {words}")


def test_a_line_in_an_answer_out(talk):
    code, out, err = talk(f"{FILM}\n{HOTEL}\n\n")
    assert (code, len(out), err) == (0, 2, "")
    assert all(0 <= len(line.split()) <= 8 for line in out)
    assert talk("") == (0, [], "")
    assert talk(FILM)[1] == out[:1]  # a last line without its end
    assert talk(f"{FILM}\r\n")[1] == out[:1]


def test_quit(talk):
    code, out, _ = talk(f"{FILM}\nquit\n{HOTEL}\n")
    assert (code, len(out)) == (0, 1)


def test_clear_forgets_and_history_counts(talk):
    first, second = talk(f"{FILM}\n{FILM}\n")[1]
    again = talk(f"{FILM}\nclear\n{FILM}\n")[1]
    assert again == [first, first]
    assert second != first
    other_past = talk(f"{HOTEL}\n{FILM}\n")[1][1]
    assert other_past != second


def test_the_seed_decides(talk):
    outs = [talk(f"{FILM}\n{HOTEL}\n", "--seed", str(seed))[1] for seed in (0, 0, 1, 2)]
    assert outs[0] == outs[1]
    assert len({tuple(out) for out in outs}) == 3


def test_temperature_0_is_greedy(talk):
    outs = [talk(f"{FILM}\n", "--temperature", "0", "--seed", str(seed))[1] for seed in (0, 1)]
    assert outs[0] == outs[1]


def test_side_by_side(talk, folders):
    text = f"{FILM}\n{HOTEL}\n"
    both = talk(text, names=("a", "b"))[1]
    alone = [talk(text, names=(name,))[1] for name in ("a", "b")]
    assert both == [f"{folders / name}: {alone[i][turn]}" for turn in (0, 1) for i, name in enumerate(("a", "b"))]


def test_score_is_the_reward_model_s(talk, folders):
    _, out, _ = talk(f"{FILM}\n{HOTEL}\n", "--score", str(folders / "rm"))
    assert len(out) == 4
    words = {word: i for i, word in enumerate(review_world.words())}
    model = load_reward_model(folders / "rm")
    ids = []
    for prompt, answer, score in ((FILM, out[0], out[1]), (HOTEL, out[2], out[3])):  # the second sees the first
        ids += [words[w] for w in f"{prompt} {answer}".split()] + [1]
        with torch.no_grad():
            assert score == f"score {float(model(torch.tensor([ids]))):.3f}"


def test_a_long_conversation_goes_on(talk):
    """48 positions, 8 for the answer, 40 for what was said: after a few turns the oldest are forgotten."""
    code, out, err = talk(f"{FILM}\n" * 12)
    assert (code, len(out), err) == (0, 12, "")


def test_a_line_that_is_too_long(talk):
    code, out, err = talk("great " * 41 + f"\n{FILM}\n")
    assert (code, out) == (0, talk(f"{FILM}\n")[1])
    assert len(err.splitlines()) == 1
    assert "41 tokens" in err


def test_bytes_that_are_no_text(talk):
    code, out, _ = talk(b"\xff\xfe \x00 \x1b[2J\n" + FILM.encode() + b"\n")
    assert (code, len(out)) == (0, 2)


def test_special_tokens_of_a_user_are_words(talk):
    """A typed <eos> is an unknown word; the unknown word itself gives the same answer."""
    assert talk("<eos> <pad>\n")[1] == talk("xyz xyz\n")[1]


@pytest.mark.parametrize(
    ("args", "code"),
    [
        (["nowhere"], 4),
        (["{rm}"], 4),
        (["{a}", "--score", "{b}"], 4),
        (["{a}", "--score", "nowhere"], 4),
        (["{a}", "--max_new_tokens", "48"], 2),
        (["{a}", "--template", "unheard-of"], 2),
        (["{a}", "--device", "meta"], 2),
        (["{a}", "--device", "cuda:9"], 2),
    ],
)
def test_mistakes_are_one_line(folders, monkeypatch, capsys, args, code):
    monkeypatch.setattr(sys, "stdin", SimpleNamespace(buffer=io.BytesIO(b""), isatty=lambda: False))
    assert chat.main([a.format(**{n: folders / n for n in ("a", "b", "rm")}) for a in args]) == code
    captured = capsys.readouterr()
    assert captured.out == ""
    assert len(captured.err.splitlines()) == 1
    assert captured.err.startswith("error: ")


@pytest.mark.parametrize(
    "args",
    [[], ["x", "--temperature", "-1"], ["x", "--temperature", "1e-40"], ["x", "--top_p", "0"], ["x", "--seed", "one"]],
)
def test_usage(args):
    with pytest.raises(SystemExit) as e:
        chat.main(args)
    assert e.value.code == 2


def test_a_terminal_is_not_steered(capsys):
    chat.say("a\x1b]0;title\x07\x9b2J\u202eb\tc\n")
    assert capsys.readouterr().out == "a⟨U+001B⟩]0;title⟨U+0007⟩⟨U+009B⟩2J⟨U+202E⟩b\tc\n"


@pytest.mark.parametrize(
    "options", [[], ["--temperature", "0.5", "--top_k", "9"], ["--top_p", "0.7"], ["--temperature", "0"]]
)
def test_an_answer_is_what_generate_draws_and_comes_in_pieces(folders, options):
    args = chat.parse([str(folders / "a"), "--max_new_tokens", "20", *options])
    for seed in range(4):
        one, pieces = chat.speaker(str(folders / "a"), args), []
        ids = torch.tensor([one.loaded.tokenizer.encode(FILM)])
        made = generate(one.loaded.model, ids, rng=generator(seed, "chat"), **one.sampling)
        one.answer(FILM, seed, pieces.append)
        assert "".join(pieces) == one.turns[-1][1] == one.loaded.tokenizer.decode(made.tokens[0].tolist())
        assert len(pieces) == made.tokens.shape[1]


def heard(raw, stops, monkeypatch):
    """The pieces of an answer of these bytes, a token each, the last of which no `stop` is asked about."""

    def generate(model, ids, *, stop, **sampling):
        n = next((n for n in range(1, len(raw)) if stop(list(raw[:n]))), len(raw))
        return SimpleNamespace(tokens=torch.tensor([list(raw[:n])]), mask=torch.ones(1, n, dtype=torch.bool))

    tokenizer = SimpleNamespace(decode=lambda ids: bytes(ids).decode("utf-8", "replace"))
    trunk = SimpleNamespace(embed=SimpleNamespace(weight=torch.zeros(())))
    loaded, pieces = SimpleNamespace(tokenizer=tokenizer, model=SimpleNamespace(trunk=trunk)), []
    monkeypatch.setattr(chat, "generate", generate)
    chat.Speaker("x", loaded, {}, stops)._drawn([1], torch.Generator(), pieces.append)
    return [p for p in pieces if p]


def test_characters_of_several_tokens_wait_until_they_are_whole(monkeypatch):
    """Byte-level tokens: é and 你 are two and three of them, and the answer ends within a character."""
    raw = "aé你b".encode() + "你".encode()[:2]
    assert heard(raw, (), monkeypatch) == ["a", "é", "你", "b", "\ufffd"]


def test_a_stop_text_ends_an_answer_before_it(talk, monkeypatch):
    """Nothing of the stop text is seen, though it comes in pieces; what only looks like its beginning is not lost."""
    whole = talk(FILM)[1][0].split(" ")
    assert len(whole) > 4
    code, out, _ = talk(FILM, "--stop", "never", "--stop", f" {whole[2]} {whole[3]}")
    assert (code, out) == (0, [" ".join(whole[:2])])
    for raw, stops, pieces in (
        (b"ab-c--d", ("--d",), ["a", "b", "-c"]),
        (b"ab-c--e-", ("--d",), ["a", "b", "-c", "--e", "-"]),
        (b"abcde", ("cdx", "de"), ["a", "b", "c"]),
    ):
        assert heard(raw, stops, monkeypatch) == pieces


def test_a_pipe_gives_the_same_twice(folders):
    """As a program: stdout depends on folders, flags and input alone."""
    text = f"{FILM}\n{HOTEL}\nclear\n{FILM}\nquit\n{HOTEL}\n"
    command = [sys.executable, "-m", "minirlhf.chat", str(folders / "a"), str(folders / "b"), "--seed", "7"]
    command += ["--max_new_tokens", "8", "--score", str(folders / "rm")]
    outs = []
    for seed in ("0", "1"):
        env = ENV | {"PYTHONHASHSEED": seed}
        done = subprocess.run(command, input=text, env=env, capture_output=True, text=True, timeout=120, check=False)
        assert (done.returncode, done.stderr) == (0, "")
        outs.append(done.stdout)
    assert outs[0] == outs[1]
    lines = outs[0].splitlines()
    assert len(lines) == 3 * 2 * 2  # an answer and a score of either model
    assert lines[8:] == lines[:4]
