"""Every `agon run` and `agon config` that the documentation shows composes."""

import re
import shlex
from pathlib import Path

import pytest

from conf.compose import compose
from conf.objectives import OBJECTIVES

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
COMMAND = re.compile(r"\bagon (?:run|config)\b(?: *[^`\n]*\\\n)*[^`|\n]*")


def commands():
    """Overrides of each command by its page, placeholders filled in; those that need a run's folder left out."""
    for page in PAGES:
        for found in COMMAND.findall(page.read_text()):
            line = re.sub(r"\\\n", " ", found).replace("[key=value ...]", "")
            words = shlex.split(line.split(";")[0], comments=True)[2:]
            words = [word for word in words if "=" in word]
            if not words or {"--resume", "--config"} & set(shlex.split(line, comments=True)):
                continue
            filled = [word.replace("=NAME", "=iterative_dpo").replace("seed=S", "seed=0") for word in words]
            yield pytest.param(filled, id=f"{page.name}:{' '.join(words)}")


def test_commands_are_found():
    assert len(list(commands())) > 10
    assert any(len(found.values[0]) > 5 for found in commands()), "with their continued lines"


@pytest.mark.parametrize("overrides", commands())
def test_commands_compose(overrides):
    compose(overrides)


def test_the_table_of_keys_is_that_of_the_facts():
    by_keys = {}
    for name, facts in OBJECTIVES.items():
        by_keys.setdefault(facts.reads, []).append(f"`{name}`")
    rows = [f"| {', '.join(f'`{key}`' for key in keys)} | {', '.join(names)} |" for keys, names in by_keys.items()]
    table = "| `loss.*` | `loss.name` |\n|---|---|\n" + "\n".join(rows) + "\n"
    assert table in (ROOT / "docs" / "losses.md").read_text(), table
