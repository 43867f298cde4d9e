"""Processes of this machine, told from later ones that are given their number."""

from __future__ import annotations

from pathlib import Path


def started(pid: int) -> str | None:
    """When a process started: boot of the machine and ticks since then, whatever the clock; None: there is none."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8")
    except (FileNotFoundError, ProcessLookupError):
        return None
    boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
    return f"{boot}:{stat.rpartition(')')[2].split()[19]}"  # field 22 of proc(5); the name before may hold anything
