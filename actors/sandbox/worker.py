"""The confined process: a function that is called again and again, or a program and its tests, once.

Speaks frames, four bytes of length and JSON, over two pipes of its own; what the code prints goes nowhere. Standard
library alone: it starts in tens of milliseconds, and the code finds nothing of ours that it could spoil.
"""

from __future__ import annotations

import builtins
import errno
import json
import math
import os
import resource
import site
import sys
import threading
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any, NoReturn

from actors.sandbox.confinement import confine, end_with_parent

if TYPE_CHECKING:
    from collections.abc import Callable

_USED_UP = (errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.EAGAIN, errno.ENOSPC, errno.EDQUOT)
SHOWN = 300
"""Characters of an error of the code that are told."""


class Channel:
    """Frames to and from the parent; the calls wait for ever, since the parent has the deadline."""

    def __init__(self, requests: int, replies: int) -> None:
        self._requests, self._replies = os.fdopen(requests, "rb"), os.fdopen(replies, "wb")

    def read(self) -> Any:
        """The next frame. Leaves where the parent has gone."""
        head = self._requests.read(4)
        body = self._requests.read(int.from_bytes(head, "big"))
        if len(head) < 4:
            os._exit(0)
        return json.loads(body)

    def write(self, message: Any) -> None:
        """Sends a frame."""
        body = json.dumps(message).encode()
        self._replies.write(len(body).to_bytes(4, "big") + body)
        self._replies.flush()


def main() -> NoReturn:
    """Runs as ``python -I -S -c "..." ROOT REQUESTS REPLIES LIFE``, the last three file descriptors."""
    requests, replies, life = map(int, sys.argv[2:5])
    channel = Channel(requests, replies)
    end_with_parent(life)
    sys.dont_write_bytecode = True
    first = channel.read()
    lacking = confine(first["work_dir"], memory_mb=first["memory_mb"], cpu_s=first["cpu_s"])
    channel.write({"lacking": lacking})
    if "function" not in first:
        sys.path[:] = first["path"]
        _test(channel)
    site.main()  # put off by -S: links to packages that are being worked on
    sys.path[:] = first["path"]
    _serve(channel, first["function"], first["cpu_s"])


def _serve(channel: Channel, dotted: str, cpu_s: int) -> NoReturn:
    """Loads the function and says its version or why it is refused; then answers calls, a frame each."""
    try:
        function, version = _load(*dotted.rsplit(".", 1))
    except LookupError as refusal:
        channel.write({"refused": str(refusal)})
        os._exit(0)
    channel.write({"version": version})
    while True:
        for number, *arguments in channel.read():
            used = resource.getrusage(resource.RUSAGE_SELF)
            limit = math.ceil(used.ru_utime + used.ru_stime) + cpu_s
            resource.setrlimit(resource.RLIMIT_CPU, (limit, resource.RLIM_INFINITY))
            channel.write({"call": number, **_call(function, arguments)})


def _load(module_name: str, name: str) -> tuple[Callable[..., Any], str]:
    """The function and the digest of the files of its package. Raises LookupError saying what is wrong."""
    import importlib
    import inspect

    try:
        module = importlib.import_module(module_name)
    except BaseException as error:
        raise LookupError(
            f"module {module_name!r} cannot be imported ({_told(error)}). Is its folder on PYTHONPATH?"
        ) from error
    function = getattr(module, name, None)
    if not callable(function):
        found = "has no such name" if function is None else f"has it as {type(function).__name__}, not as a function"
        raise LookupError(f"module {module_name!r} {found}: {name!r}.")
    try:
        inspect.signature(function).bind("prompt", "completion", "answer")
    except TypeError as error:
        raise LookupError(f"{module_name}.{name} does not take these three arguments: {error}.") from error
    return function, _version(module_name.partition(".")[0])


def _version(package: str) -> str:
    """Of the files of all modules that were loaded of a package; the function may be made of any of them."""
    import hashlib

    digest = hashlib.blake2b(digest_size=4)
    for name, module in sorted(sys.modules.items()):
        file = getattr(module, "__file__", None)
        if file and (name == package or name.startswith(f"{package}.")):
            digest.update(hashlib.blake2b(Path(file).read_bytes()).digest())
    return digest.hexdigest()


def _call(function: Callable[..., Any], arguments: list[str | None]) -> dict[str, Any]:
    try:
        value = function(*arguments)
        if value is None:
            return {"silent": "the function abstained"}
        if isinstance(value, int | float) and math.isfinite(value):
            return {"value": float(value)}
        return {"silent": f"the function returned {_short(repr(value))}, which is no finite number"}
    except BaseException as error:  # noqa: BLE001 - it is not our code, and whatever it raises says nothing of the text
        return {"silent": f"the function raised {_told(error)}", "spent": _is_spent(error)}


def _is_spent(error: BaseException) -> bool:
    """Whether the process has used up what it may take, so that later calls would fail for what earlier ones hold."""
    return isinstance(error, MemoryError) or getattr(error, "errno", None) in _USED_UP


def _test(channel: Channel) -> NoReturn:
    """Runs a program, then its tests in the same names; the token that says so comes only after the last of them.

    Between the two, what the program may have put around the tests is taken away: tracing and changed builtins.
    """
    module = ModuleType("solution")
    sys.modules["solution"] = module
    names = vars(builtins)
    untouched = dict(names)
    run, build, leave = exec, compile, os._exit
    code = channel.read()["code"]
    failure = _run(lambda: run(build(code, "<completion>", "exec"), vars(module)))
    sys.settrace(None)
    sys.setprofile(None)
    threading.settrace(None)
    threading.setprofile(None)
    names.clear()
    names.update(untouched)
    if failure:
        channel.write({"failed": f"the code raised {failure}"})
        leave(0)
    channel.write({"ran": True})
    tests = channel.read()["tests"]
    try:
        checks = build(tests, "<tests>", "exec")
    except (SyntaxError, ValueError, MemoryError, RecursionError) as error:
        channel.write({"unusable": _told(error)})
        leave(0)
    if failure := _run(lambda: run(checks, vars(module))):
        channel.write({"failed": f"the tests raised {failure}"})
        leave(0)
    channel.write({"token": channel.read()["token"]})
    leave(0)


def _run(step: Callable[[], None]) -> str:
    """What the step raised, leaving included; nothing where it ended well."""
    try:
        step()
    except BaseException as error:  # noqa: BLE001 - any of them is a failure of the code under test
        return _told(error)
    return ""


def _told(error: BaseException) -> str:
    """An error of the code's in a few words; its own `__str__` may fail as well."""
    try:
        return _short(f"{type(error).__name__}: {error}")
    except BaseException as second:  # noqa: BLE001 - see above
        return f"{type(error).__name__}, which raised {type(second).__name__} when it was to be shown"


def _short(text: str) -> str:
    return text if len(text) <= SHOWN else text[:SHOWN] + "..."
