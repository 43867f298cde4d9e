"""Sides of a comparison that are processes of their own and live side by side, so that they can be measured in turn."""

from __future__ import annotations

import os
import subprocess
import tempfile
from typing import TYPE_CHECKING, Self

from launch.environment import KEEPS_MEMORY
from learners.products import use_fastest_products

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path


def tuned() -> dict[str, str]:
    """Environment of a peer's process that shall have the allocator and the matrix products of our learner's.

    But for the one heap of all threads: ours needs it, since it computes in a thread of its own; a peer's attention,
    whose kernels allocate in every thread, would be slow by it.
    """
    memory = {name: value for name, value in KEEPS_MEMORY.items() if name != "MALLOC_ARENA_MAX"}
    return memory | ({"FP32_PRODUCTS": "bf16"} if use_fastest_products() else {})


class Side:
    """A process that answers each line on its stdin with a line ``answer <number>``.

    Args:
        command: starts it.
        environment: beside that of this process.
        folder: it runs in.
    """

    def __init__(self, command: Sequence[str], environment: Mapping[str, str], folder: Path) -> None:
        self._errors = tempfile.TemporaryFile("w+")  # noqa: SIM115 - as long as the process
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            text=True,
            env=os.environ | environment,
            cwd=folder,
        )

    def ask(self, command: str) -> float:
        """Its answer.

        Raises:
            RuntimeError: it ended instead, with its last words.
        """
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(command + "\n")
        self._process.stdin.flush()
        for line in self._process.stdout:
            if line.startswith("answer "):
                return float(line.split()[1])
        self._errors.seek(0)
        raise RuntimeError(f"{self._process.args!r}: {self._errors.read()[-3000:]}")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.wait()
