"""Twelve kills of the matrix (tests/kill_matrix.py runs it in full): resumed, every bit is that of a run left alone."""

import random

import pytest
from kill_matrix import SUBJECTS, Matrix


@pytest.fixture(scope="module")
def matrix(tmp_path_factory):
    return Matrix(tmp_path_factory.mktemp("kill"))


@pytest.mark.parametrize("subject", SUBJECTS)
def test_a_killed_run_goes_on_bit_for_bit(matrix, subject):
    rng = random.Random(f"twelve/{subject}")
    points = [p for p in matrix.named(subject, rng) if "step_" in p[0] or "MANIFEST" in p[0] or "metrics" in p[0]]
    for name, point in [("time", None), *rng.sample(points, 2)]:
        assert matrix.trial(subject, name, point=point) == "", f"{subject}, killed {name}"


@pytest.mark.parametrize("subject", SUBJECTS)
def test_saves_pass_every_named_point(matrix, subject):
    """The crash points are those of the protocol: a save that skips one of its steps would shorten this list."""
    labels = [label for _, label in matrix.points[subject]]
    for part in ("write MANIFEST.json", "fsync MANIFEST.json", "fsync state.json", "fsync checkpoints", "rename final"):
        assert part in labels
    assert any(label.startswith("rename step_") for label in labels)
    assert any(label.startswith("rename .tmp_old_step_") for label in labels)


def test_the_comparison_sees_a_single_changed_bit(matrix, tmp_path):
    """A matrix that compares nothing would pass: one bit of the uninterrupted run's weights is turned here."""
    from kill_matrix import result

    folder = matrix.cwd / "runs/sft"
    file = folder / "final/model.safetensors"
    data = file.read_bytes()
    file.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    try:
        assert result(folder) != matrix.whole["sft"]
    finally:
        file.write_bytes(data)
    assert result(folder) == matrix.whole["sft"]
