"""What a judge is told: a text file with places for the question, the answers and the principles."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import xxhash

from orchestrator.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from conf.schema import JudgeConfig, SearchConfig

FOLDER = Path(__file__).parent / "rubrics"
PLACES = {
    "pointwise": ("question", "answer"),
    "pairwise": ("question", "answer_a", "answer_b"),
    "step": ("question", "answer"),
    "step_shown": ("question", "reference", "answer"),
}
"""Placeholders that the rubric of each style must have, written in braces."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Rubric:
    """Instructions of one style. Example: ``Rubric(text="Grade ... {question} ... {answer}", style="pointwise")``."""

    text: str
    """Principles are in it already."""
    style: str

    @property
    def digest(self) -> str:
        """Eight hex digits that change with the text: part of the judge's name."""
        return xxhash.xxh3_64_hexdigest(self.text.encode())[:8]

    def fill(self, values: Mapping[str, str]) -> str:
        """The text with its placeholders replaced in one pass: braces in a value stay what they are."""
        return re.sub(r"\{(" + "|".join(PLACES[self.style]) + r")\}", lambda found: values[found[1]], self.text)


def load_rubric(config: JudgeConfig) -> Rubric:
    """The rubric of `judge.rubric`, or the packaged one of `judge.style`, with the principles put in.

    Raises:
        ConfigError: a file cannot be read, or the rubric lacks a placeholder that it needs.
    """
    text = _read(config.rubric, "judge.rubric") if config.rubric else _read(str(FOLDER / f"{config.style}.txt"))
    wanted = [*PLACES[config.style], *(["principles"] if config.principles else [])]
    _check_places(text, wanted, f"judge.rubric={config.rubric}: the rubric of judge.style={config.style}")
    principles = f"\n{_read(config.principles, 'judge.principles').strip()}\n" if config.principles else ""
    return Rubric(text=text.replace("{principles}", principles), style=config.style)


def load_step_rubric(config: SearchConfig) -> Rubric:
    """The rubric of `search.rubric`, or the packaged one for single steps. Raises ConfigError as `load_rubric` does."""
    style = "step_shown" if config.show_answer else "step"
    text = _read(config.rubric, "search.rubric") if config.rubric else _read(str(FOLDER / f"{style}.txt"))
    _check_places(text, PLACES[style], f"search.rubric={config.rubric}: the rubric")
    return Rubric(text=text, style=style)


def _check_places(text: str, wanted: Sequence[str], rubric: str) -> None:
    missing = [f"{{{place}}}" for place in wanted if f"{{{place}}}" not in text]
    if missing:
        raise ConfigError(f"{rubric} lacks {', '.join(missing)}: write each where its text is to stand")


def _read(path: str, key: str = "the packaged rubric") -> str:
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{key}={path}: cannot be read as a UTF-8 text file: {error}") from error
    if not text.strip():
        raise ConfigError(f"{key}={path}: the file is empty")
    return text
