"""What takes rights away from the process that calls it: limits, namespaces, capabilities, system calls.

Namespaces of its own leave it no network and show it every file system as read-only, its work folder aside, which is
memory; and the kernel lets it look into no process outside. Landlock does the last two without namespaces. Standard
library alone.
"""

from __future__ import annotations

import ctypes
import fcntl
import os
import resource
import signal
from pathlib import Path

from actors.sandbox.landlock import restrict_files
from actors.sandbox.syscalls import filter_calls

FILE_MB = 16
"""Largest file, and in all with namespaces four such."""
MAX_OPEN_FILES = 128
_NEW_USER, _NEW_MOUNTS, _NEW_IPC, _NEW_NETWORK = 0x10000000, 0x20000, 0x08000000, 0x40000000
_MOUNT_SETATTR, _HERE, _RECURSIVE, _READ_ONLY = 442, -100, 0x8000, 1
_NO_SUID, _NO_DEVICES = 2, 4
_CAPABILITY_VERSION = 0x20080522


def end_with_parent(life: int) -> None:
    """Lets the kernel kill this process when nobody holds the other end of the pipe `life` any more."""
    fcntl.fcntl(life, fcntl.F_SETOWN, os.getpid())
    fcntl.fcntl(life, fcntl.F_SETSIG, signal.SIGKILL)
    fcntl.fcntl(life, fcntl.F_SETFL, os.O_ASYNC)


def confine(work_dir: str, *, memory_mb: int, cpu_s: int) -> list[str]:
    """Takes all rights away that can be taken; returns what could not be had, for people.

    Args:
        work_dir: the one folder that stays writable; becomes the working folder.
        memory_mb: address space, MiB.
        cpu_s: processor time; the limit may be moved later, never above what is left of the hard one.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    lacking = [_own_namespaces(libc, work_dir)]
    os.chdir(work_dir)
    no_rights = ((ctypes.c_uint32 * 2)(_CAPABILITY_VERSION, 0), (ctypes.c_uint32 * 6)())
    if libc.capset(*no_rights):
        lacking.append(f"capabilities are kept ({_error()})")
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_NOFILE, (MAX_OPEN_FILES, MAX_OPEN_FILES))
    resource.setrlimit(resource.RLIMIT_FSIZE, (FILE_MB << 20, FILE_MB << 20))
    resource.setrlimit(resource.RLIMIT_AS, (memory_mb << 20, memory_mb << 20))
    resource.setrlimit(resource.RLIMIT_CPU, (cpu_s, resource.RLIM_INFINITY))
    unruly = restrict_files(work_dir)
    lacking += [unruly if lacking[0] else "", filter_calls()]  # with namespaces Landlock is a second wall
    return [words for words in lacking if words]


def _own_namespaces(libc: ctypes.CDLL, work_dir: str) -> str:
    user, group = os.getuid(), os.getgid()
    if libc.unshare(_NEW_USER | _NEW_MOUNTS | _NEW_IPC | _NEW_NETWORK):
        return f"no namespaces of its own ({_error()})"
    Path("/proc/self/setgroups").write_text("deny", encoding="ascii")
    Path("/proc/self/uid_map").write_text(f"{user} {user} 1", encoding="ascii")
    Path("/proc/self/gid_map").write_text(f"{group} {group} 1", encoding="ascii")
    change = (ctypes.c_uint64 * 4)(_READ_ONLY, 0, 0, 0)
    if libc.syscall(_MOUNT_SETATTR, _HERE, b"/", _RECURSIVE, change, ctypes.sizeof(change)):
        return f"file systems stay writable ({_error()})"
    size = f"size={4 * FILE_MB}m,mode=700".encode()
    if libc.mount(b"tmpfs", os.fsencode(work_dir), b"tmpfs", _NO_SUID | _NO_DEVICES, size):
        return f"no work folder in memory ({_error()})"
    return ""


def _error() -> str:
    return os.strerror(ctypes.get_errno())
