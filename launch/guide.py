"""What `agon run --help`, `agon config` and `agon recipes` print, all of it read from `conf/`."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import yaml

from conf.layers import FOLDER, groups, knobs, read

if TYPE_CHECKING:
    from collections.abc import Sequence

    from conf.layers import Setting

EXAMPLES = """\
Examples:
  agon run                                         the tiny model learns addition here, in minutes
  agon run seed=1 run_dir=runs/second              another seed, a folder of your choice
  agon run model=models/mine task=prompts task.path=prompts.jsonl
                                                   your model, your prompts: {"prompt": ..., "answer": ...} a line
  agon run model=models/mine task=gsm8k task.path=train.jsonl task.test_path=test.jsonl cluster=one_node
  agon run --config runs/second/config.yaml loss.beta=0.05 run_dir=runs/third
  agon run --resume runs/second
  agon config loss=rpo                             what would run, and where each value comes from
"""

MOST_USED = (
    *("seed", "run_dir", "pipeline.iterations", "pipeline.prompts_per_iteration"),
    *("generator.samples_per_prompt", "generator.max_tokens", "generator.num_actors", "model.max_length"),
    *("loss.beta", "learner.lr", "learner.epochs", "learner.batch_pairs", "learner.micro_batch_tokens"),
    *("task.path", "task.answer_field", "scorer.verifier", "evaluation.problems", "tracking.wandb"),
)

FURTHER = """\
Further:
  agon config [OVERRIDES]...    every key with its value and source
  agon recipes                  the methods, and the papers they follow
  conf/schema.py                every key with its type, limits and meaning
  docs/                         guides
"""


def guide() -> str:
    """Examples, groups with their choices, the keys used most, and where to look further."""
    defaults = _default_choices()
    lines = [EXAMPLES, "Groups (group=choice; * is the default):"]
    for group, choices in groups().items():
        shown = (f"{choice}*" if choice == defaults[group] else choice for choice in choices)
        lines.append(f"  {group:<12} {', '.join(shown)}{', <folder or hub id>' if group == 'model' else ''}")
    lines += ["", "Keys used most:"]
    width = max(len(key) for key in MOST_USED)
    lines += [f"  {key:<{width}}  {knobs()[key].meaning}" for key in MOST_USED]
    return "\n".join([*lines, "", FURTHER])


def annotated(settings: Sequence[Setting]) -> str:
    """Settings as YAML that `--config` reads back, with the source of each as a comment."""
    rows: list[tuple[str, str]] = []
    above: list[str] = []
    for key, value, source in settings:
        *sections, name = key.split(".")
        for depth, section in enumerate(sections):
            if above[: depth + 1] != sections[: depth + 1]:
                rows.append((f"{'  ' * depth}{section}:", ""))
        above = sections
        rows.append((f"{'  ' * len(sections)}{name}: {_scalar(value)}", source))
    width = min(48, max(len(text) for text, source in rows if source))
    return "\n".join(f"{text:<{width}}  # {source}" if source else text for text, source in rows)


def list_recipes() -> str:
    """Every recipe with its title and source."""
    entries = []
    for name in groups()["recipe"]:
        facts = {key: value for key, value, _ in read(FOLDER / "recipe" / f"{name}.yaml", name)}
        entries.append(f"{name}\n  {facts['recipe.title']}\n  {facts['recipe.source']}")
    return "\n".join(entries)


def _scalar(value: object) -> str:
    """One line of YAML; JSON is that for texts and lists, whatever they hold."""
    if isinstance(value, str | list):
        plain = yaml.safe_dump(value, default_flow_style=True, width=10**6, allow_unicode=True).removesuffix("\n...\n")
        return plain.rstrip("\n") if "\n" not in plain.rstrip("\n") else json.dumps(value, ensure_ascii=False)
    return json.dumps(value)


def _default_choices() -> dict[str, str]:
    entries = yaml.safe_load((FOLDER / "config.yaml").read_text(encoding="utf-8"))["defaults"]
    return {group: choice for entry in entries if isinstance(entry, dict) for group, choice in entry.items()}
