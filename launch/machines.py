"""What this machine has: memory, GPUs, disk. Asks neither torch nor Ray, both of which take seconds to load."""

from __future__ import annotations

import os
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

import psutil

MIB = 1 << 20


@dataclass(frozen=True, kw_only=True, slots=True)
class Machine:
    """What there is to use."""

    memory: int
    """Bytes that can be had now, container limits included."""
    gpus: tuple[int, ...]
    """Memory of each GPU, bytes."""


def this_machine() -> Machine:
    """Memory that is free now and the GPUs that are visible; asks neither torch nor Ray."""
    return Machine(memory=min(psutil.virtual_memory().available, _container_memory()), gpus=_gpus())


def _container_memory() -> int:
    """What the control group leaves, bytes; a container sees the whole machine in /proc."""
    group = Path("/sys/fs/cgroup")
    for limit, used, stat in (
        ("memory.max", "memory.current", "memory.stat"),
        ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes", "memory/memory.stat"),
    ):
        try:
            most = int((group / limit).read_text())
            lines = (line.split() for line in (group / stat).read_text().splitlines())
            cache = next(int(size) for name, size in lines if name in ("inactive_file", "total_inactive_file"))
            return max(0, most - int((group / used).read_text()) + cache)
        except (OSError, ValueError, StopIteration):
            continue  # "max", or no such group: no limit
    return 1 << 62


def _gpus() -> tuple[int, ...]:
    if os.environ.get("CUDA_VISIBLE_DEVICES") == "" or shutil.which("nvidia-smi") is None:
        return ()
    query = ["nvidia-smi", "--query-gpu=memory.total", "--format=csv,noheader,nounits"]
    try:
        answer = subprocess.run(query, capture_output=True, text=True, timeout=5, check=True)
    except (OSError, subprocess.SubprocessError):
        return ()
    found = tuple(int(line) * MIB for line in answer.stdout.split("\n") if line.strip().isdigit())
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    return found if visible is None else found[: len(visible.split(","))]


def free_disk(path: Path) -> int:
    """Bytes free where `path` is, or would be made."""
    return shutil.disk_usage(existing_parent(path)).free


def existing_parent(path: Path) -> Path:
    """The nearest folder that exists, `path` itself included."""
    return next(folder for folder in (path.absolute(), *path.absolute().parents) if folder.exists())
