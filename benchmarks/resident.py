"""Memory of this process as Linux sees it. Imports nothing, so that processes of other environments can use it too."""

from __future__ import annotations

import ctypes
import gc
from pathlib import Path


def resident(field: str = "VmRSS") -> float:
    """VmRSS (now) or VmHWM (highest) of this process, MiB."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) / 1024
    raise RuntimeError(f"/proc/self/status has no {field}")


def settle() -> float:
    """Gives freed memory back, so that the highest mark counts from here; returns what is held, MiB."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM
    return resident()
