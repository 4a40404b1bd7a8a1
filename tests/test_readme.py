"""The documents keep their word: files, modules, settings and functions that they name are there."""

import importlib.util
import re
from dataclasses import fields, is_dataclass
from pathlib import Path

import pytest

from minirlhf.config import PPOConfig, RMConfig, SFTConfig

ROOT = Path(__file__).parent.parent
DOCUMENTS = sorted([*ROOT.glob("README*.md"), *ROOT.glob("docs/*.md")])
CONFIGS = {"sft": SFTConfig, "rm": RMConfig, "ppo": PPOConfig}


def keys(config):
    """Every --section.key of a script."""
    sections = [(s.name, getattr(config, s.name)) for s in fields(config) if is_dataclass(getattr(config, s.name))]
    return {f"{name}.{key.name}" for name, section in sections for key in fields(section)}


@pytest.fixture(params=DOCUMENTS, ids=lambda p: p.name)
def document(request):
    return request.param.read_text()


def commands(text):
    """The lines of the document's bash blocks, continued lines joined."""
    blocks = re.findall(r"```bash\n(.*?)```", text, re.S)
    lines = "\n".join(blocks).replace("\\\n", " ").splitlines()
    return [line for line in lines if line.strip() and not line.startswith("#")]


def test_the_first_command_installs_and_runs_and_the_second_tests():
    first, second = commands((ROOT / "README.md").read_text())[:2]
    assert re.match(r"pip install .* && python train_sft\.py && python train_rm\.py && python train_ppo\.py$", first)
    assert second == "python -m pytest"


def test_the_chinese_one_begins_with_the_same_commands():
    english, chinese = (commands((ROOT / name).read_text()) for name in ("README.md", "README.zh.md"))
    assert chinese[:2] == english[:2]


def test_links_lead_somewhere(document, request):
    for target in re.findall(r"\]\(([^)#\s]+)[^)]*\)|src=\"([^\"]+)\"", document):
        link = target[0] or target[1]
        if not re.match(r"https?:|mailto:", link):
            base = request.node.callspec.params["document"].parent
            assert (base / link).exists(), link


def test_scripts_and_modules_exist(document):
    for script in re.findall(r"python ((?:\w+/)*\w+\.py)", document):
        assert (ROOT / script).is_file(), script
    for module in re.findall(r"python -m (minirlhf[\w.]*)", document):
        assert importlib.util.find_spec(module.rstrip(".")), module


def test_settings_exist(document):
    """In a command, the settings of its script; elsewhere, of some script."""
    anywhere = set().union(*(keys(config()) for config in CONFIGS.values()))
    for line in commands(document):
        for part in re.split(r"&&|\|", line):
            script = re.search(r"train_(sft|rm|ppo)\.py", part)
            known = keys(CONFIGS[script[1]]()) if script else anywhere
            for name in re.findall(r"--(\w+\.\w+)", part):
                assert name in known, f"{name} in {part}"
    for name in set(re.findall(r"`--(\w+\.\w+)", document)) - {"section.key"}:
        assert name in anywhere, name


def test_no_places_of_one_machine(document):
    assert not re.search(r"/(work|opt|tmp|root|home)/", document)
