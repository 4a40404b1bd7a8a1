"""Checkpoints: complete or absent, whatever fails; every changed byte is seen; what is read is what was written."""

import errno
import json
import random
import shutil
from types import SimpleNamespace

import pytest
import torch
from faults import disk_calls, failing, recorded
from tolerance import assert_close, exact

from minirlhf import checkpoint
from minirlhf.engine import Engine
from minirlhf.errors import CheckpointError
from minirlhf.optim import adamw


def tensors(step):
    rng = torch.Generator().manual_seed(step)
    draw = lambda *shape: torch.randn(shape, generator=rng)  # noqa: E731
    return {
        "policy": {"w": draw(5, 7), "b": draw(7).bfloat16(), "one": draw(), "none": draw(0, 3), "t": draw(4, 3).T},
        "optimizer": {"w.exp_avg": draw(5, 7), "w.step": torch.tensor(float(step))},
    }


def save(root, step, **how):
    return checkpoint.save(root, step, tensors(step), {"coef": 0.1 * step, "word": "é"}, **{"keep": 2} | how)


def assert_is(found, step):
    assert found is not None
    assert (found[0], found[2]) == (step, {"coef": 0.1 * step, "word": "é"})
    expected = tensors(step)
    assert found[1].keys() == expected.keys()
    for group, named in expected.items():
        assert found[1][group].keys() == named.keys()
        for name, x in named.items():
            assert found[1][group][name].dtype == x.dtype
            assert_close(found[1][group][name], x, exact)


def said_by(job, act):
    """The error of a job whose disk fails; empty: it went well all the same."""
    try:
        with disk_calls(act):
            job()
    except CheckpointError as e:
        return str(e)
    return ""


def folders(root):
    return sorted(p.name for p in root.iterdir())


def test_what_is_saved_is_loaded(tmp_path):
    assert checkpoint.load_newest(tmp_path / "nowhere") is None
    path = save(tmp_path / "a/b", 3)
    assert path == tmp_path / "a/b/step_00000003"
    assert_is(checkpoint.load_newest(tmp_path / "a/b"), 3)
    assert {p.suffix for p in path.iterdir()} == {".safetensors", ".json"}


def test_the_newest_are_kept_and_the_best(tmp_path):
    merits = {1: 0.5, 2: 0.9, 3: 0.7}
    for step in (1, 2, 3, 4, 5):
        save(tmp_path, step, merits=merits)
    assert folders(tmp_path) == ["best_00000002", "step_00000004", "step_00000005"]
    checkpoint.verify(tmp_path / "best_00000002", 2)
    save(tmp_path, 6, keep=1, merits=merits | {4: 1.0})
    assert folders(tmp_path) == ["best_00000004", "step_00000006"]
    save(tmp_path, 7, keep=1)  # nothing is known: nothing is called the best, and the best so far stays
    assert folders(tmp_path) == ["best_00000004", "step_00000007"]


def test_steps_of_a_damaged_future_push_nothing_out(tmp_path):
    for step in (8, 9, 20):
        save(tmp_path, step, keep=3)
    (tmp_path / "step_00000020/state.json").write_text("{}")
    save(tmp_path, 10, keep=1)
    assert folders(tmp_path) == ["step_00000010"]
    assert_is(checkpoint.load_newest(tmp_path), 10)


def test_a_damaged_checkpoint_of_the_same_step_is_replaced(tmp_path):
    (save(tmp_path, 4) / "state.json").unlink()
    save(tmp_path, 4)
    assert_is(checkpoint.load_newest(tmp_path), 4)


def test_the_name_comes_last_and_old_ones_go_after_it(tmp_path):
    save(tmp_path, 1, keep=1)
    labels = recorded(lambda: save(tmp_path, 2, keep=1))
    named = labels.index("rename step_00000002")
    written = ["policy.safetensors", "optimizer.safetensors", "state.json", "MANIFEST.json", ".tmp_step_00000002_PID"]
    assert [x.split()[1] for x in labels[:named] if x.startswith("fsync")] == written
    assert not [x for x in labels[:named] if x.split()[0] in ("unlink", "rmdir", "rename")]
    assert labels[named + 1] == f"fsync {tmp_path.name}"
    assert labels[named + 2] == "rename .tmp_old_step_00000001"
    assert not [x for x in labels[named + 1 :] if x.startswith(("write", "open"))]


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EIO, errno.EROFS])
@pytest.mark.parametrize("onward", [False, True])
def test_every_call_failing_in_turn_leaves_the_newest_complete_one(tmp_path, number, onward, capsys):
    save(tmp_path / "made", 1)
    save(tmp_path / "made", 2)
    shutil.copytree(tmp_path / "made", tmp_path / "count")
    total = len(recorded(lambda: save(tmp_path / "count", 3)))
    assert total > 25
    reached, silent = set(), []
    for at in range(total):
        root = tmp_path / f"x{at}"
        shutil.copytree(tmp_path / "made", root)
        words = said_by(lambda: save(root, 3), failing(number, at=at, onward=onward))  # noqa: B023
        found = checkpoint.load_newest(root)
        assert_is(found, found[0])
        reached.add(found[0])
        if words:
            assert words.startswith(f"{root}/step_00000003: cannot be written (")
            assert f"complete one is step_{found[0]:08d}" in words
            assert "\n" not in words
        else:
            silent.append(at)
        save(root, 4)
        assert folders(root)[-1] == "step_00000004"
        assert not list(root.glob(".*"))
        assert_is(checkpoint.load_newest(root), 4)
    assert silent in ([], [0])  # a folder that exists already need not be made
    assert reached == {2, 3}
    assert "damaged" not in capsys.readouterr().err


def test_the_first_save_failing_says_that_there_is_none(tmp_path):
    words = said_by(lambda: save(tmp_path / "c", 1), failing(errno.ENOSPC, at=3))
    assert "No space left on device" in words
    assert "there is none yet" in words
    assert checkpoint.load_newest(tmp_path / "c") is None


def test_a_file_that_is_read_back_otherwise_gets_no_name(tmp_path, monkeypatch):
    """A disk that loses what it took, after it was hashed."""
    save(tmp_path, 1)
    real = checkpoint.verify

    def late(folder, step):
        file = folder / "policy.safetensors"
        file.write_bytes(file.read_bytes()[:-4])
        real(folder, step)

    monkeypatch.setattr(checkpoint, "verify", late)
    with pytest.raises(CheckpointError, match="differs from the manifest"):
        save(tmp_path, 2)
    assert folders(tmp_path) == ["step_00000001"]


# ---- corruption -----------------------------------------------------------------------------------------------------


def corrupt(root, rng):
    """One change of a checkpoint folder; a few words about it."""
    folder = rng.choice(sorted(root.iterdir()))
    file = rng.choice(sorted(folder.iterdir()))
    data, kind = file.read_bytes(), rng.randrange(10)
    at = rng.randrange(len(data))
    if kind <= 3:
        file.write_bytes(data[:at] + bytes([data[at] ^ (1 << rng.randrange(8))]) + data[at + 1 :])
    elif kind == 4:
        file.write_bytes(data[:at])
    elif kind == 5:
        file.unlink()
    elif kind == 6:
        file.write_bytes(data + rng.choice([b"\0", b"\n", b" ", data]))
    elif kind == 7:
        other = rng.choice([p for p in sorted(folder.iterdir()) if p != file])
        theirs = other.read_bytes()
        file.write_bytes(theirs), other.write_bytes(data)
    elif kind == 8:
        twin = next(p for p in root.iterdir() if p != folder) / file.name
        theirs = twin.read_bytes()
        twin.write_bytes(data), file.write_bytes(theirs)
    else:
        end = min(len(data), at + rng.choice([1, 16, 512]))
        file.write_bytes(data[:at] + bytes(255 - b for b in data[at:end]) + data[end:])
    return folder.name, f"{kind} {file.name} {at}"


def corruptions(tmp_path, n):
    for step in (1, 2):
        save(tmp_path / "good", step)
    good = {p.relative_to(tmp_path / "good"): p.read_bytes() for p in (tmp_path / "good").rglob("*") if p.is_file()}
    missed = []
    for i in range(n):
        for name, data in good.items():
            (tmp_path / "good" / name).write_bytes(data)
        name, what = corrupt(tmp_path / "good", random.Random(i))
        words = said_by(lambda: checkpoint.verify(tmp_path / "good" / name, int(name[5:])), lambda *_: None)  # noqa: B023
        if name not in words or not words.isprintable():
            missed.append(what)
    return missed


def test_every_corruption_is_detected(tmp_path):
    assert corruptions(tmp_path, 200) == []


@pytest.mark.slow
def test_two_thousand_corruptions_are_detected(tmp_path):
    assert corruptions(tmp_path, 2000) == []


def test_folders_that_are_swapped_renamed_or_joined_are_damaged(tmp_path):
    for step in (1, 2):
        save(tmp_path, step)
    one, two = tmp_path / "step_00000001", tmp_path / "step_00000002"
    shutil.copytree(one, tmp_path / "step_00000007")
    (two / "extra.safetensors").write_bytes((one / "policy.safetensors").read_bytes())
    one.rename(tmp_path / "step_00000005")
    (tmp_path / "step_00000009").write_text("no folder")
    (tmp_path / "step_00000010").mkdir()
    with pytest.raises(CheckpointError, match="no checkpoint verifies"):
        checkpoint.load_newest(tmp_path)


def test_a_manifest_that_hashes_itself_but_names_other_places_is_refused(tmp_path):
    folder = save(tmp_path, 1)
    for name in ("../x", "/etc/passwd", ".", "a/b", "policy.safetensors\0"):
        files = json.loads((folder / "MANIFEST.json").read_text())["files"]
        files[name] = files.pop("policy.safetensors")
        (folder / "MANIFEST.json").write_bytes(checkpoint.manifest(1, files))
        with pytest.raises(CheckpointError):
            checkpoint.verify(folder, 1)
        (folder / "MANIFEST.json").unlink()
        folder = save(tmp_path, 1)


def test_each_damaged_one_is_named_and_the_next_older_one_taken(tmp_path, capsys):
    for step in (1, 2, 3):
        save(tmp_path, step, keep=3)
    (tmp_path / "step_00000003/policy.safetensors").write_bytes(b"")
    (tmp_path / "step_00000002/MANIFEST.json").unlink()
    assert_is(checkpoint.load_newest(tmp_path), 1)
    said = capsys.readouterr().err.splitlines()
    assert ["step_00000003/policy.safetensors" in said[0], "step_00000002/MANIFEST.json" in said[1]] == [True, True]
    (tmp_path / "step_00000001/state.json").unlink()
    with pytest.raises(CheckpointError) as error:
        checkpoint.load_newest(tmp_path)
    assert error.value.exit_code == 4


# ---- modules and optimizers -----------------------------------------------------------------------------------------


def trained(steps, model=None, optimizer=None, first=0):
    if model is None:
        torch.manual_seed(0)
        model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Tanh(), torch.nn.Linear(4, 1))
        model[0].bias.requires_grad_(False)
        named = list(model.named_parameters())
        optimizer = adamw(named, lr=0.1, weight_decay=0.1, betas=(0.9, 0.99), eps=1e-8)
    for step in range(first, steps):
        x = torch.randn(8, 3, generator=torch.Generator().manual_seed(step))
        model(x).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    return model, optimizer


def engine_of(model):
    run = SimpleNamespace(engine="none", device="cpu", dtype="fp32", checkpoint_activations=False)
    return Engine(run, [model]), {"model": model}


def test_a_restored_optimizer_goes_on_bit_for_bit(tmp_path):
    whole, _ = trained(7)
    model, optimizer = trained(3)
    engine, roles = engine_of(model)
    groups = engine.state(roles, optimizer)
    assert "0.bias" not in groups["model"]
    checkpoint.save(tmp_path, 3, groups, {}, keep=1)
    _, found, _ = checkpoint.load_newest(tmp_path)
    fresh, new = trained(0)
    engine, roles = engine_of(fresh)
    engine.load(roles, new, found)
    trained(7, fresh, new, first=3)
    for a, b in zip(fresh.parameters(), whole.parameters(), strict=True):
        assert torch.equal(a, b)


def test_tensors_of_another_model_are_refused():
    model, optimizer = trained(1)
    engine, roles = engine_of(model)
    good = engine.state(roles, optimizer)
    for other in (
        {k: v for k, v in good["model"].items() if k != "2.bias"},
        good["model"] | {"2.bias": torch.zeros(2)},
    ):
        with pytest.raises(CheckpointError, match=r"model differ in 2\.bias"):
            engine.load(roles, optimizer, good | {"model": other})
