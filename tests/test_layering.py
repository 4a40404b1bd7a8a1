"""Who may import whom: the floors of the design as a table, and what must stay out of the library altogether."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "minirlhf"
FLOORS = [
    "errors rng families safefile products records",
    "settings config dist masked tokenizer architecture lora_config lora",
    "positions rows readers formats templates review_world data log ops model",
    "heads hf_config pretrained prepared steps generate fsdp engine optim",
    "reward advantage loss",
    "rollout ppo alarms checkpoint run",
]  # what is not named here is the top floor: what a person looks at and talks to
FLOOR = {name: floor for floor, names in enumerate(FLOORS) for name in names.split()}
TOP = len(FLOORS)
MATHEMATICS = {
    "masked": set(),
    "ops": {"products"},
    "advantage": {"masked"},
    "loss": {"masked"},
    "reward": {"masked", "ops", "errors"},
}
OPTIONAL = {"triton", "matplotlib", "tensorboard", "wandb", "transformers", "peft", "trl", "hypothesis"}
CORE = {"torch", "tokenizers", "safetensors", "numpy"}
UNSAFE = {"pickle", "cloudpickle", "dill", "marshal", "shelve"}


def modules():
    return {str(p.relative_to(PACKAGE).with_suffix("")).replace("/", "."): p for p in sorted(PACKAGE.rglob("*.py"))}


def imports(path, *, top_only=False):
    """Dotted names of everything a file imports."""
    tree = ast.parse(path.read_text())
    found = set()
    for node in tree.body if top_only else ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path.name}: relative import"
            found |= {f"{node.module}.{alias.name}" for alias in node.names} | {node.module}
    return found


def ours(path):
    """Names of the modules of minirlhf that a file imports."""
    known = {name.split(".")[0] for name in modules()}
    parts = (name.split(".") for name in imports(path))
    return {p[1] for p in parts if p[0] == "minirlhf" and len(p) > 1 and p[1] in known}


@pytest.mark.parametrize("name", modules())
def test_imports_point_downward(name):
    own = FLOOR.get(name, TOP)
    above = {other for other in ours(modules()[name]) if FLOOR.get(other, TOP) > own}
    assert not above, f"{name} (floor {own}) imports {above}"


@pytest.mark.parametrize("name", MATHEMATICS)
def test_the_mathematics_stands_alone(name):
    assert ours(modules()[name]) <= MATHEMATICS[name]
    others = {top.split(".")[0] for top in imports(modules()[name], top_only=True)}
    assert others - {"minirlhf"} <= {"torch", *sys.stdlib_module_names}


def test_no_cycles():
    graph = {name: ours(path) for name, path in modules().items() if "." not in name}
    done, open_ = set(), []

    def visit(name):
        assert name not in open_, " → ".join([*open_, name])
        if name in done or name not in graph:
            return
        open_.append(name)
        for other in sorted(graph[name]):
            visit(other)
        open_.pop()
        done.add(name)

    for name in graph:
        visit(name)


@pytest.mark.parametrize("name", modules())
def test_only_core_packages_at_import_and_nothing_that_runs_code(name):
    path = modules()[name]
    first = {dotted.split(".")[0] for dotted in imports(path, top_only=True)}
    assert first - {"minirlhf"} <= CORE | set(sys.stdlib_module_names)
    everywhere = {dotted.split(".")[0] for dotted in imports(path)}
    assert everywhere <= CORE | OPTIONAL | {"minirlhf", *sys.stdlib_module_names}
    assert not everywhere & UNSAFE
    assert not {"torch.load", "torch.save"} & calls(path)


def calls(path):
    """Dotted names of everything a file calls."""
    return {ast.unparse(node.func) for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Call)}


def test_kernels_know_torch_and_triton_alone():
    for path in (ROOT / "kernels").glob("*.py"):
        first = {dotted.split(".")[0] for dotted in imports(path)}
        assert first <= {"torch", "triton", *sys.stdlib_module_names}, path.name


def test_scripts_never_import_each_other():
    for path in ROOT.glob("train_*.py"):
        assert not {dotted for dotted in imports(path) if dotted.startswith("train_")}


def test_importing_everything_prints_nothing_and_starts_nothing():
    names = [
        f"minirlhf.{name}" for name in modules() if not name.endswith("__init__") and not name.endswith("__main__")
    ]
    code = (
        f"import importlib, sys, threading\nfor name in {names!r}: importlib.import_module(name)\n"
        "import torch; assert not torch.distributed.is_initialized() and threading.active_count() == 1\n"
        f"print(sorted(set({sorted(OPTIONAL)!r}) & sys.modules.keys()))"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    assert (out.stdout.strip(), out.stderr) == ("[]", "")
