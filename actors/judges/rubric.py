"""What a judge is told: a text file with places for the question, the answers and the principles."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import xxhash

from orchestrator.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Mapping

    from conf.schema import JudgeConfig

FOLDER = Path(__file__).parent / "rubrics"
PLACES = {"pointwise": ("question", "answer"), "pairwise": ("question", "answer_a", "answer_b")}
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
    missing = [f"{{{place}}}" for place in wanted if f"{{{place}}}" not in text]
    if missing:
        raise ConfigError(
            f"judge.rubric={config.rubric}: the rubric of judge.style={config.style} lacks {', '.join(missing)}: write"
            " each where its text is to stand"
        )
    principles = f"\n{_read(config.principles, 'judge.principles').strip()}\n" if config.principles else ""
    return Rubric(text=text.replace("{principles}", principles), style=config.style)


def _read(path: str, key: str = "the packaged rubric") -> str:
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{key}={path}: cannot be read as a UTF-8 text file: {error}") from error
    if not text.strip():
        raise ConfigError(f"{key}={path}: the file is empty")
    return text
