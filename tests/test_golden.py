"""Numbers with a source. Every file of tests/golden names a function, inputs, what must come out and who says so.

python tests/test_golden.py     the README's table: quantity, oracles, golden files, largest difference
"""

import copy
import importlib
import inspect
import json
from pathlib import Path

import pytest
import tolerance
import torch
from tolerance import assert_close

FOLDER = Path(__file__).parent / "golden"
FILES = {path.stem: json.loads(path.read_text()) for path in sorted(FOLDER.glob("*.json"))}
MODULES = ("masked", "ops", "advantage", "loss", "reward")
WITHOUT_NUMBERS = {"ops.HeadStats", "ops.choose", "ops.tiles", "reward.load_reward_fn"}
KEYS = {"function", "source", "provenance", "command", "convention", "inputs", "expected", "gradient", "tolerance"}


def to_input(x):
    """Lists are tensors: of bool, int64 or fp64; null is NaN."""
    if not isinstance(x, list) or (x and isinstance(x[0], str)):
        return x
    flat = x
    while flat and isinstance(flat[0], list):
        flat = [v for row in flat for v in row]
    if all(isinstance(v, bool) for v in flat):
        return torch.tensor(x, dtype=torch.bool)
    if all(isinstance(v, int) for v in flat):
        return torch.tensor(x)
    return torch.tensor(nan_for_null(x), dtype=torch.float64)


def nan_for_null(x):
    return [nan_for_null(v) for v in x] if isinstance(x, list) else float("nan") if x is None else x


def pairs_of(record):
    """Run the function → [(what, actual, expected)]."""
    module, name = record["function"].split(".")
    function = getattr(importlib.import_module(f"minirlhf.{module}"), name)
    if "updates" in record["inputs"]:
        updates = record["inputs"]["updates"]
        controller = function(**{k: v for k, v in record["inputs"].items() if k != "updates"})
        actual = []
        for kl, n in updates:
            controller.update(kl, n)
            actual.append(controller.coef)
        return [("coef", torch.tensor(actual, dtype=torch.float64), record["expected"])]
    inputs = {k: to_input(v) for k, v in record["inputs"].items()}
    for k in record.get("gradient", {}):
        inputs[k].requires_grad_()
    result = function(**inputs)
    expected = record["expected"]
    if isinstance(expected, dict):
        names = getattr(result, "_fields", tuple(expected))
        parts = [(k, result[names.index(k)], v) for k, v in expected.items()]
    else:
        parts = [("", result, expected)]
    if "gradient" in record:
        sum(actual.sum() for _, actual, _ in parts).backward()
        parts += [(f"gradient of {k}", inputs[k].grad, v) for k, v in record["gradient"].items()]
    return parts


def compare(record):
    for what, actual, expected in pairs_of(record):
        try:
            actual = actual.detach() if actual.is_floating_point() else actual.double()
            assert_close(actual, expected, getattr(tolerance, record["tolerance"]))
        except AssertionError as error:
            raise AssertionError(f"{what}: {error}") from None


@pytest.mark.parametrize("name", FILES)
def test_golden(name):
    compare(FILES[name])


def leaves(x, path=()):
    """Paths of all numbers."""
    if isinstance(x, dict):
        return [p for k, v in x.items() for p in leaves(v, (*path, k))]
    if isinstance(x, list):
        return [p for i, v in enumerate(x) for p in leaves(v, (*path, i))]
    return [path]


def changed(record, key, path):
    """The record with one number 1 % off; 0 becomes 0.01, a bool its opposite."""
    record = copy.deepcopy(record)
    where = record
    for step in (key, *path)[:-1]:
        where = where[step]
    last = (key, *path)[-1]
    old = where[last]
    where[last] = not old if isinstance(old, bool) else old * 1.01 if old else 0.01
    return record


@pytest.mark.parametrize("name", FILES)
def test_one_percent_fails(name):
    """The first, the last and a middle number of everything that is expected; `-m slow`: all of them."""
    assert_one_percent_fails(FILES[name], lambda paths: {paths[0], paths[len(paths) // 2], paths[-1]})


@pytest.mark.slow
@pytest.mark.parametrize("name", FILES)
def test_one_percent_of_any_number_fails(name):
    assert_one_percent_fails(FILES[name], set)


def assert_one_percent_fails(record, choose):
    for key in ("expected", "gradient"):
        for path in choose(leaves(record[key])) if key in record else ():
            wrong = changed(record, key, path)
            with pytest.raises((AssertionError, TypeError)):
                compare(wrong)


@pytest.mark.parametrize("name", FILES)
def test_file_names_its_source(name):
    record = FILES[name]
    assert record.keys() <= KEYS, record.keys() - KEYS
    assert record["source"] in ("hand", "closed form", "library"), record["source"]
    assert record["provenance"], name
    assert record["command"].startswith("python tests/golden/make.py"), record["command"]
    assert (record["source"] == "library") == ("==" in record["provenance"].split()[0]), record["provenance"]
    assert hasattr(tolerance, record["tolerance"]), record["tolerance"]


def public_functions():
    for module in MODULES:
        for name, x in vars(importlib.import_module(f"minirlhf.{module}")).items():
            here = getattr(x, "__module__", "") == f"minirlhf.{module}"
            if here and not name.startswith("_") and (inspect.isfunction(x) or inspect.isclass(x)):
                yield f"{module}.{name}"


@pytest.mark.parametrize("function", sorted(set(public_functions()) - WITHOUT_NUMBERS))
def test_two_witnesses(function):
    """One number by hand or in closed form, and one from another library."""
    sources = {record["source"] for record in FILES.values() if record["function"] == function}
    assert "library" in sources, sources
    assert sources & {"hand", "closed form"}, sources


def test_enough_files():
    assert len(FILES) >= 40
    assert "minirlhf" not in [
        word for line in (FOLDER / "make.py").read_text().splitlines() if "import" in line for word in line.split()[1:2]
    ]


def table():
    """Markdown: what agrees with whom, and how far; the README's."""
    rows = {}
    for record in FILES.values():
        oracle = record["provenance"].split(" ")[0] if record["source"] == "library" else record["source"]
        oracles, files, biggest = rows.setdefault(record["function"], [set(), 0, 0.0])
        for _, actual, expected in pairs_of(record):
            difference = (actual.detach().double() - torch.tensor(expected, dtype=torch.float64)).abs().max()
            biggest = max(biggest, float(difference))
        rows[record["function"]] = [oracles | {oracle}, files + 1, biggest]
    lines = ["| quantity | oracles | golden files | largest difference |", "|---|---|---|---|"]
    for function, (oracles, files, biggest) in sorted(rows.items()):
        lines.append(f"| `{function}` | {', '.join(sorted(oracles))} | {files} | {biggest:.0e} |")
    return "\n".join(lines)


def test_the_readme_has_the_table():
    """Its rows but for the differences, which other machines round otherwise."""
    said = (FOLDER.parent.parent / "README.md").read_text()
    for row in table().splitlines():
        assert row.rpartition("|")[0].rpartition("|")[0] in said, row


if __name__ == "__main__":
    torch.set_num_threads(1)
    print(table())
