"""A filter of system calls (seccomp) for processes that run code nobody vouches for.

It needs no rights and no namespaces, also where containers forbid the latter. Denied are sockets, new processes,
signals and debugging of other processes, mounts and namespaces, and the doors around these (io_uring, pidfd, keyrings,
signals by file owner), and memory that outlives its process or is not counted by the limit on address space (System V
segments, memfd). Threads and what a process does to itself are allowed. A denied call fails with EPERM.

Numbers are from the kernel's tables (arch/x86/entry/syscalls/syscall_64.tbl, include/uapi/asm-generic/unistd.h), the
filter's layout from Documentation/userspace-api/seccomp_filter.rst. Standard library alone.
"""

from __future__ import annotations

import ctypes
import os
import platform
import struct
from errno import ENOSYS, EPERM

_NEW = (424, 425, 428, 429, 430, 432, 433, 434, 438, 440, 442, 447)
"""pidfd_send_signal, io_uring_setup, open_tree, move_mount, fsopen, fsmount, fspick, pidfd_open, pidfd_getfd,
process_madvise, mount_setattr, memfd_secret: the same on all architectures."""
_CLONE3 = 435
_X32 = 0x40000000

# Per architecture: its name to the kernel; denied; own process only; clone; fcntl; ioctl.
_TABLES = {
    "x86_64": (
        0xC000003E,
        # fork vfork execve execveat socket ptrace process_vm_readv process_vm_writev unshare setns mount umount2
        # pivot_root bpf perf_event_open userfaultfd keyctl add_key request_key tkill rt_sigqueueinfo
        # rt_tgsigqueueinfo setpriority ioprio_set sched_setparam sched_setscheduler sched_setattr kcmp migrate_pages
        # move_pages shmget shmat semget msgget memfd_create
        (
            *(57, 58, 59, 322, 41, 101, 310, 311, 272, 308, 165, 166, 155, 321, 298, 323, 250, 248, 249, 200, 129),
            *(297, 141, 251, 142, 144, 314, 312, 256, 279, 29, 30, 64, 68, 319),
        ),
        (62, 234, 302, 203),  # kill tgkill prlimit64 sched_setaffinity
        (56, 72, 16),
    ),
    "aarch64": (
        0xC00000B7,
        (
            *(221, 281, 198, 117, 270, 271, 97, 268, 40, 39, 41, 280, 241, 282, 219, 217, 218, 130, 138, 240, 140),
            *(30, 118, 119, 274, 272, 238, 239, 194, 196, 190, 186, 279),
        ),
        (129, 131, 261, 122),
        (220, 25, 29),
    ),
}
_SIGNAL_OWNERS = ((8, 10, 15), (0x8901, 0x8902))
"""F_SETOWN, F_SETSIG, F_SETOWN_EX of fcntl; FIOSETOWN, SIOCSPGRP of ioctl."""

_LOAD, _EQUAL, _AT_LEAST, _ANY_BIT, _RETURN = 0x20, 0x15, 0x35, 0x45, 0x06
_ALLOW, _KILL, _FAIL = 0x7FFF0000, 0x80000000, 0x00050000
_NUMBER, _ARCH, _FIRST, _SECOND = 0, 4, 16, 24
"""Offsets in `struct seccomp_data`; of the arguments, their lower halves."""
_CLONE_THREAD = 0x00010000
_NO_NEW_PRIVS, _SET_SECCOMP, _FILTER = 38, 22, 2

Instruction = tuple[int, int, int, int]
"""Code, jump if true, jump if false, operand."""


def filter_calls() -> str:
    """Puts the filter on this process, its threads to come and nothing else, for good; returns why not, or nothing."""
    machine = platform.machine()
    if machine not in _TABLES:
        return f"no table of system calls for {machine}"
    code = b"".join(struct.pack("HBBI", *instruction) for instruction in _program(machine))
    buffer = ctypes.create_string_buffer(code, len(code))
    program = struct.pack("HxxxxxxQ", len(code) // 8, ctypes.addressof(buffer))
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(_NO_NEW_PRIVS, 1, 0, 0, 0) or libc.prctl(_SET_SECCOMP, _FILTER, program, 0, 0):
        return f"no filter of system calls ({os.strerror(ctypes.get_errno())})"
    return ""


def _program(machine: str) -> list[Instruction]:
    arch, denied, own, (clone, *controls) = _TABLES[machine]
    refuse: Instruction = (_RETURN, 0, 0, _FAIL | EPERM)
    allow: Instruction = (_RETURN, 0, 0, _ALLOW)
    program: list[Instruction] = [
        (_LOAD, 0, 0, _ARCH),
        (_EQUAL, 1, 0, arch),
        (_RETURN, 0, 0, _KILL),
        (_LOAD, 0, 0, _NUMBER),
        (_AT_LEAST, 0, 1, _X32),
        refuse,
        (_EQUAL, 0, 1, _CLONE3),
        (_RETURN, 0, 0, _FAIL | ENOSYS),  # its flags cannot be seen; the C library then takes clone
    ]
    for number in (*denied, *_NEW):
        program += [(_EQUAL, 0, 1, number), refuse]
    program += [(_EQUAL, 0, 4, clone), (_LOAD, 0, 0, _FIRST), (_ANY_BIT, 1, 0, _CLONE_THREAD), refuse, allow]
    for number in own:
        program += [
            *[(_EQUAL, 0, 5, number), (_LOAD, 0, 0, _FIRST)],
            *[(_EQUAL, 2, 0, os.getpid()), (_EQUAL, 1, 0, 0), refuse, allow],
        ]
    for number, commands in zip(controls, _SIGNAL_OWNERS, strict=True):
        program += [(_EQUAL, 0, len(commands) + 3, number), (_LOAD, 0, 0, _SECOND)]
        program += [(_EQUAL, len(commands) - place, 0, command) for place, command in enumerate(commands)]
        program += [allow, refuse]
    return [*program, allow]
