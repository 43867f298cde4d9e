"""Files that a process may change, and processes that it may look into, limited by the kernel's Landlock.

It takes no rights and no namespaces, which containers often forbid; Linux 5.13 or newer. A confined process writes
beneath its folder only, and is refused the memory, the environment and the debugging of every process outside.

Numbers are from include/uapi/linux/landlock.h and the kernel's tables of system calls (the same on all architectures);
what it means is in Documentation/userspace-api/landlock.rst. Standard library alone.
"""

from __future__ import annotations

import ctypes
import os
import struct

_CREATE, _ADD_RULE, _RESTRICT = 444, 445, 446
_ASK_VERSION, _PATH_BENEATH = 1, 1
_WRITE_FILE, _REFER, _TRUNCATE = 1 << 1, 1 << 13, 1 << 14
_REMOVE_OR_MAKE = 0b1_1111_1111 << 4
_NO_NEW_PRIVS = 38


def restrict_files(work_dir: str) -> str:
    """Leaves this process `work_dir` to write to, and `/dev/null`; returns why not, or nothing."""
    libc = ctypes.CDLL(None, use_errno=True)
    version = libc.syscall(_CREATE, None, 0, _ASK_VERSION)
    if version < 1:
        return f"no Landlock ({os.strerror(ctypes.get_errno())})"
    changes = _WRITE_FILE | _REMOVE_OR_MAKE | (_REFER if version >= 2 else 0) | (_TRUNCATE if version >= 3 else 0)
    handled = struct.pack("Q", changes)
    rules = libc.syscall(_CREATE, handled, len(handled), 0)
    try:
        allowed = all(
            (
                _allow(libc, rules, work_dir, changes),
                _allow(libc, rules, os.devnull, changes & (_WRITE_FILE | _TRUNCATE)),
            )
        )
        if not allowed or libc.prctl(_NO_NEW_PRIVS, 1, 0, 0, 0) or libc.syscall(_RESTRICT, rules, 0):
            return f"no Landlock ({os.strerror(ctypes.get_errno())})"
    finally:
        if rules >= 0:
            os.close(rules)
    return ""


def _allow(libc: ctypes.CDLL, rules: int, path: str, changes: int) -> bool:
    place = os.open(path, os.O_PATH | os.O_CLOEXEC)
    try:
        return not libc.syscall(_ADD_RULE, rules, _PATH_BENEATH, struct.pack("=Qi", changes, place), 0)
    finally:
        os.close(place)
