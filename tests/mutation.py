"""Break the mathematics on purpose, one place at a time, and see whether a test notices.

    python tests/mutation.py                        every mutant of every module below; score and survivors
    python tests/mutation.py loss ppo --jobs 2      these modules
    python tests/mutation.py loss --line 52         mutants of one line, each printed
    python tests/mutation.py ops --every 5          a sample of every fifth

A mutant is a module with one change of its syntax tree (`mutants`). It is run in a fork of a process that has imported
the tests named in TESTS already and gives their functions the changed code (`install`): no file is written. A mutant is
killed if a test fails, the module fails, or nothing has come back after LIMIT times what the untouched module takes.
Survivors that change no behaviour are listed with the reason in mutation_equivalent.json, by the text of their line and
one or more changes ("; " between them, or "any"); the others are gaps.
"""

import argparse
import ast
import contextlib
import copy
import importlib
import io
import json
import os
import signal
import sys
import time
import types
from pathlib import Path

HERE = Path(__file__).parent
PACKAGE = HERE.parent / "minirlhf"
EQUIVALENT = HERE / "mutation_equivalent.json"
LIMIT = 10
# The last one runs scripts, which are other processes.
SKIP = "not one_percent and not names_its_source and not the_readme and not through_the_script"
MATH = ["test_golden.py", "test_properties.py"]
TESTS = {
    "masked": ["test_masked.py", *MATH],
    "ops": ["test_ops.py", *MATH],
    "advantage": ["test_advantage.py", *MATH],
    "reward": ["test_reward.py", *MATH],
    "loss": ["test_loss.py", *MATH],
    "feedback": ["test_feedback.py"],
    "generate": ["test_generate.py", "test_prepared.py"],
    "steps": ["test_steps.py"],
    "alarms": ["test_alarms.py"],
    "probe": ["test_probe.py"],
    "evaluate": ["test_evaluate.py"],
    "prepared": ["test_prepared.py"],
    "heads": ["test_heads.py", "test_train_rm.py"],
    "beam": ["test_beam.py"],
    "prepare": ["test_prepare.py"],
    "ppo": ["test_ppo.py", "test_ppo_parts.py", "test_objectives.py", "test_ppo_presets.py", "test_regressions.py"],
}

# ---- mutants --------------------------------------------------------------------------------------------------------

BINARY = {
    ast.Add: [ast.Sub], ast.Sub: [ast.Add], ast.Mult: [ast.Div], ast.Div: [ast.Mult], ast.FloorDiv: [ast.Mult],
    ast.BitAnd: [ast.BitOr], ast.BitOr: [ast.BitAnd],
}  # fmt: skip
COMPARE = {
    ast.Lt: [ast.LtE, ast.Gt], ast.LtE: [ast.Lt, ast.GtE], ast.Gt: [ast.GtE, ast.Lt], ast.GtE: [ast.Gt, ast.LtE],
    ast.Eq: [ast.NotEq], ast.NotEq: [ast.Eq], ast.In: [ast.NotIn], ast.NotIn: [ast.In], ast.Is: [ast.IsNot],
    ast.IsNot: [ast.Is],
}  # fmt: skip
RENAME = {
    "minimum": "maximum", "maximum": "minimum", "min": "max", "max": "min", "amin": "amax", "amax": "amin",
    "sum": "mean", "mean": "sum", "exp": "expm1", "expm1": "exp", "rsqrt": "sqrt", "logsigmoid": "sigmoid",
    "sigmoid": "logsigmoid", "log_softmax": "softmax", "square": "abs", "abs": "square", "tanh": "sin", "std": "var",
    "all": "any", "any": "all", "zeros_like": "ones_like", "ones_like": "zeros_like", "masked_sum": "masked_mean",
}  # fmt: skip
DIFFERENTIABLE = {
    "exp",
    "expm1",
    "minimum",
    "maximum",
    "clamp",
    "logsigmoid",
    "sigmoid",
    "square",
    "log_softmax",
    "tanh",
    "mm",
}
COMMUTATIVE = {"promote_types", "minimum", "maximum"}
TRANSPARENT = {"detach", "keep", "where", "clamp", "clone", "abs", "double", "reversed", "to"}  # f(x, …) → x


def changes(node):
    """Replacements of one node: [(what, a function of a fresh copy of the node → the new node)]."""
    kinds = {
        ast.BinOp: operator, ast.AugAssign: operator, ast.UnaryOp: unary, ast.Compare: compare, ast.BoolOp: boolean,
        ast.Constant: constant, ast.If: condition, ast.IfExp: condition, ast.While: condition, ast.Slice: bounds,
        ast.Break: lambda _: [("Break → Continue", lambda _: ast.Continue())], ast.Call: call,
    }  # fmt: skip
    return kinds[type(node)](node) if type(node) in kinds else []


def setting(field, new):
    def apply(node):
        setattr(node, field, new)
        return node

    return apply


def operator(node):
    old = type(node.op)
    return [(f"{old.__name__} → {new.__name__}", setting("op", new())) for new in BINARY.get(old, [])]


def unary(node):
    constant_below = isinstance(node.operand, ast.Constant)
    return [] if constant_below else [(f"{type(node.op).__name__} removed", lambda n: n.operand)]


def compare(node):
    old, rest = type(node.ops[0]), node.ops[1:]
    return [(f"{old.__name__} → {new.__name__}", setting("ops", [new(), *rest])) for new in COMPARE.get(old, [])]


def boolean(node):
    new = ast.Or if isinstance(node.op, ast.And) else ast.And
    return [(f"{type(node.op).__name__} → {new.__name__}", setting("op", new()))]


def condition(node):
    return [("condition negated", setting("test", ast.UnaryOp(ast.Not(), node.test)))]


def bounds(node):
    fields = [field for field in ("lower", "upper") if getattr(node, field) is not None]
    return [(f"slice without {field}", setting(field, None)) for field in fields]


def constant(node):
    value = node.value
    if isinstance(value, bool):
        return [(f"{value} → {not value}", lambda _: ast.Constant(not value))]
    if isinstance(value, int):
        return [(f"{value} → {v}", lambda _, v=v: ast.Constant(v)) for v in {value + 1, value - 1}]
    if isinstance(value, float):
        return [(f"{value} → {v}", lambda _, v=v: ast.Constant(v)) for v in [value * 2 if value else 1.0]]
    return []


def name_of(function):
    return getattr(function, "attr", getattr(function, "id", ""))


def renamed(node, new):
    if isinstance(node.func, ast.Attribute):
        node.func.attr = new
    else:
        node.func.id = new
    return node


def call(node):
    name, out = name_of(node.func), []
    if name in RENAME:
        out.append((f"{name} → {RENAME[name]}", lambda n: renamed(n, RENAME[name])))
    if name in TRANSPARENT:
        out.append((f"{name}(x) → x", transparent))
    if name == "where":
        out.append(("where(m, x, y) → y", lambda n: n.args[-1]))
    if name in DIFFERENTIABLE:
        out.append((f"{name}(…).detach()", lambda n: ast.Call(ast.Attribute(n, "detach", ast.Load()), [], [])))
    names = [a for a in node.args if isinstance(a, ast.Name | ast.Attribute)]
    if name not in COMMUTATIVE and len(names) == len(node.args) == 2:
        out.append((f"{name}: arguments swapped", swapped))
    for i, keyword in enumerate(node.keywords):
        if keyword.arg:
            out.append((f"{name}: {keyword.arg}= dropped", lambda n, i=i: without(n, i)))
    return out


def transparent(node):
    """The value that the call would pass on: its object, or the first argument; of torch.where the second."""
    module = isinstance(node.func, ast.Name) or getattr(node.func.value, "id", "") in ("torch", "F")
    if not module:
        return node.func.value
    return node.args[1 if name_of(node.func) == "where" else 0]


def swapped(node):
    node.args.reverse()
    return node


def without(node, i):
    del node.keywords[i]
    return node


def removable(statement):
    """Statements whose absence leaves a program: effects, checks, second assignments to a name."""
    docstring = isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Constant)
    target = statement.targets[0] if isinstance(statement, ast.Assign) else None
    if isinstance(target, ast.Name):
        return any(isinstance(n, ast.Name) and n.id == target.id for n in ast.walk(statement.value))
    effect = isinstance(statement, ast.Expr | ast.AugAssign | ast.Assert | ast.Raise)
    return isinstance(target, ast.Subscript | ast.Attribute) or (effect and not docstring)


def skipped(tree):
    """Nodes whose change no test should see: annotations, texts, what only words an error."""
    out = set()
    for node in ast.walk(tree):
        parts = []
        if isinstance(node, ast.Raise | ast.JoinedStr):
            parts = [node.exc] if isinstance(node, ast.Raise) else [node]
        elif isinstance(node, ast.Assert):
            parts = [node.msg]
        elif isinstance(node, ast.arg | ast.AnnAssign):
            parts = [node.annotation]
        elif isinstance(node, ast.FunctionDef):
            parts = [node.returns]
        for part in parts:
            out |= {id(n) for n in ast.walk(part)} if part is not None else set()
    return out


def mutants(source):
    """→ [(line, what, mutated source)], in the order of the text, each different from the original."""
    tree = ast.parse(source)
    skip, plans = skipped(tree), []
    for i, node in enumerate(ast.walk(tree)):
        if id(node) not in skip:
            plans += [(node.lineno, what, i, apply) for what, apply in changes(node) if hasattr(node, "lineno")]
        for field in ("body", "orelse"):
            block = getattr(node, field, [])
            for j, statement in enumerate(block if isinstance(block, list) else []):
                if removable(statement):
                    plans.append((statement.lineno, f"{type(statement).__name__} removed", i, removal(field, j)))
        for j, decorator in enumerate(getattr(node, "decorator_list", [])):
            if "no_grad" in ast.unparse(decorator):
                plans.append((node.lineno, "no_grad removed", i, lambda n, j=j: n.decorator_list.pop(j) and n))
    found, seen = [], {ast.unparse(tree)}
    for line, what, i, apply in sorted(plans, key=lambda p: p[0]):
        text = applied(tree, i, apply)
        if text not in seen:
            seen.add(text)
            found.append((line, what, text))
    return found


def removal(field, j):
    def apply(node):
        getattr(node, field)[j] = ast.Pass()
        return node

    return apply


def applied(tree, index, apply):
    """The source with the index-th node, in the order of ast.walk, replaced by apply(node)."""
    tree = copy.deepcopy(tree)
    target = next(n for i, n in enumerate(ast.walk(tree)) if i == index)
    new = apply(target)
    if new is not target:
        for parent in ast.walk(tree):
            for field, value in ast.iter_fields(parent):
                if value is target:
                    setattr(parent, field, new)
                elif isinstance(value, list) and any(v is target for v in value):
                    value[[v is target for v in value].index(True)] = new
    return ast.unparse(ast.fix_missing_locations(tree))


# ---- running --------------------------------------------------------------------------------------------------------


def install(module, text):
    """Give the imported module the functions of `text`: the very objects that everybody has imported get other code."""
    old = importlib.import_module(f"minirlhf.{module}").__dict__
    new = types.ModuleType(f"minirlhf.{module}").__dict__
    exec(compile(text, f"<mutant of {module}>", "exec"), new)
    for name, x in new.items():
        was = old.get(name)
        if isinstance(x, type) and isinstance(was, type):
            if x is not was:
                install_class(was, x)
        elif not transplant(was, x) and not name.startswith("__") and not isinstance(x, type):
            old[name] = x


def install_class(was, x):
    """Methods, properties and constants; a dataclass that is no longer frozen loses and changes methods."""
    for name in [n for n, f in vars(was).items() if isinstance(f, types.FunctionType) and n not in vars(x)]:
        delattr(was, name)
    for name, f in vars(x).items():
        try:
            done = transplant(vars(was).get(name), f)
        except ValueError:  # it closes over something else
            setattr(was, name, f)
        else:
            if not done and not name.startswith("__") and isinstance(f, int | float | str | tuple):
                setattr(was, name, f)


def transplant(was, x):
    """Function to function; → whether they are functions."""
    was, x = (getattr(f, "__func__", getattr(f, "fget", f)) for f in (was, x))  # staticmethod, classmethod, property
    while hasattr(was, "__wrapped__") and isinstance(x, types.FunctionType):
        if hasattr(x, "__wrapped__"):
            x = x.__wrapped__
        else:  # without its no_grad
            cells = dict(zip(was.__code__.co_freevars, was.__closure__, strict=True))
            cells["ctx_factory"].cell_contents = contextlib.nullcontext
        was = was.__wrapped__
    if not (isinstance(was, types.FunctionType) and isinstance(x, types.FunctionType)):
        return False
    was.__code__, was.__defaults__, was.__kwdefaults__ = x.__code__, x.__defaults__, x.__kwdefaults__
    return True


def pytest_main(module, *options):
    import pytest

    chosen = ["-q", "--no-header", "-p", "no:cacheprovider", "-k", SKIP]
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        return int(pytest.main([*chosen, *options, *(str(HERE / f) for f in TESTS[module])]))


def run_tests(module, text):
    """In this process, which is a fork: 0 if every test passes."""
    install(module, text)
    return pytest_main(module, "-x")


def start(module, text):
    """A fork that runs the tests → (its id, when it began)."""
    pid = os.fork()
    if pid == 0:
        code = 1
        with contextlib.suppress(BaseException):
            null = os.open(os.devnull, os.O_WRONLY)
            os.dup2(null, 1)
            os.dup2(null, 2)
            code = run_tests(module, text)
        os._exit(code)
    return pid, time.monotonic()


def finish(pid, began, seconds):
    """Wait → "killed", "timeout" or "survived"; "running" if it is not over yet."""
    done, status = os.waitpid(pid, os.WNOHANG)
    if done:
        return "survived" if status == 0 else "killed"
    if time.monotonic() - began < seconds:
        return "running"
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    return "timeout"


def run_all(module, jobs, found):
    """[(line, what, text)] → (line, what, outcome), as they end."""
    assert pytest_main(module, "--collect-only") == 0, module  # imports everything, before the forks
    pid, began = start(module, (PACKAGE / f"{module}.py").read_text())
    _, status = os.waitpid(pid, 0)
    seconds = time.monotonic() - began
    assert status == 0, f"{module}: the tests fail without any change"
    print(f"{module}: {len(found)} mutants, {seconds:.1f} s for the untouched module", flush=True)
    waiting, running = list(range(len(found))), {}
    while waiting or running:
        while waiting and len(running) < jobs:
            i = waiting.pop(0)
            running[i] = start(module, found[i][2])
        for i in list(running):
            outcome = finish(*running[i], max(30, LIMIT * seconds))
            if outcome != "running":
                del running[i]
                yield *found[i][:2], outcome
        time.sleep(0.02)


def report(module, source, ended, show):
    """Print survivors and the score; → (mutants, killed, survivors known to be equivalent, other survivors)."""
    lines, n, times, killed, equivalent = source.splitlines(), 0, 0, 0, 0
    listed = json.loads(EQUIVALENT.read_text())
    known = {(e["module"], e["line"], change) for e in listed for change in e["change"].split("; ")}
    for line, what, outcome in ended:
        text = lines[line - 1].strip()
        same = outcome == "survived" and not known.isdisjoint({(module, text, what), (module, text, "any")})
        n, times, killed, equivalent = (
            n + 1, times + (outcome == "timeout"), killed + (outcome != "survived"), equivalent + same,
        )  # fmt: skip
        if show or (outcome == "survived" and not same):
            print(f"  {outcome:9}{module}.py:{line}: {what}\n            {text}", flush=True)
    gaps = n - killed - equivalent
    print(f"{module}: {killed} of {n} killed ({100 * killed / max(n, 1):.1f} %), {times} by time; "
          f"{equivalent} survivors change nothing, {gaps} are gaps", flush=True)  # fmt: skip
    return n, killed, equivalent, gaps


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("modules", nargs="*", default=list(TESTS))
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--line", type=int, default=0)
    parser.add_argument("--every", type=int, default=1, help="only every n-th mutant: a sample")
    parser.add_argument("--list", action="store_true", help="print the mutants, run nothing")
    args = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = "1"
    os.environ["EXAMPLES"] = "8"  # of each property
    os.chdir(HERE.parent)
    sys.path.insert(0, str(HERE.parent))
    sys.dont_write_bytecode = True
    import torch

    torch.set_num_threads(1)
    totals = []
    for module in args.modules:
        source = (PACKAGE / f"{module}.py").read_text()
        found = [m for m in mutants(source) if args.line in (0, m[0])][:: args.every]
        if args.list:
            print(f"{module}: {len(found)} mutants")
            continue
        totals.append(report(module, source, run_all(module, args.jobs, found), show=bool(args.line)))
    if totals:
        n, killed, equivalent, gaps = map(sum, zip(*totals, strict=True))
        print(f"all: {killed} of {n} killed ({100 * killed / max(n, 1):.1f} %), {equivalent} equivalent, {gaps} gaps")
        sys.exit(gaps > 0)


if __name__ == "__main__":
    main()
