"""Workers of Ray that need not import torch and transformers: forks of a process that has.

    run -- starts --> fork server (imports while the run is checked and Ray starts)
    Ray -- starts --> fork client -- its arguments, environment and files --> fork server -- forks --> worker

Learner, generators and scorers each took seconds of processor time for the same imports, which now are made once, and
again whenever one that died is replaced. Forks share the memory of what was imported until they write to it.

For actors without GPUs, on a Ray of the run's own, on Linux. Ray is imported by the workers themselves: it reads its
settings as it is imported. Where no fork is to be had, a worker is a Python like any other.
"""

from __future__ import annotations

import importlib
import json
import os
import runpy
import select
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from launch.environment import KEEPS_MEMORY, QUIET, threads
from orchestrator.startup import uncollected

if TYPE_CHECKING:
    from collections.abc import Iterator

    from conf.schema import Config

PRELOADED = ("learners.saving", "learners.trainer", "actors.transformers_engine", "conf.schema")
"""All that a learner and that engine import, without Ray, and what actors are configured by."""
BESIDE_RAY = (
    *("google.protobuf.struct_pb2", "jsonschema", "pydantic.main", "pydantic.v1", "requests"),
    *("starlette.datastructures", "uvloop"),
)
"""What Ray imports in each worker that is not Ray's own, where it is installed: half of the time that takes."""

_CLIENT = Path(__file__).with_name("fork_client.py")
_PATIENCE_S = 5.0
"""For a request to come in whole, and for a thread to be gone."""
_ENVIRONMENT = {
    **QUIET,
    **KEEPS_MEMORY,
    **threads(1),  # libraries start their threads as they are loaded, and a process with threads cannot be forked
    "CUDA_VISIBLE_DEVICES": "",  # nor one that has looked for GPUs
    "TORCH_COMPILE_DISABLE": "1",  # read by torch as it is imported; vLLM's engine wants it on CPUs
}
_NICE = 10
_socket: Path | None = None
"""Of the server of this process, which has one Ray at a time and so one server."""


@contextmanager
def fork_server(config: Config) -> Iterator[None]:
    """Runs one beside the block, for actors that are started in it, where it is of use."""
    global _socket
    on_gpus = config.learner.gpus or config.generator.gpus_per_actor
    if sys.platform != "linux" or on_gpus or config.cluster.address is not None:
        yield
        return
    # Where Ray has its files as well: the name of a socket has 107 bytes at most, which elsewhere may be too few.
    folder = Path(tempfile.mkdtemp(prefix="agon-", dir="/tmp"))
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(folder / "socket"))
        listener.listen()  # whoever asks from now on waits for the imports
        server = subprocess.Popen(
            [sys.executable, "-m", __name__, str(listener.fileno())],
            stdin=subprocess.PIPE,  # its end is ours: the server ends with this process, however that ends
            pass_fds=[listener.fileno()],
            env=os.environ | _ENVIRONMENT,
            cwd=Path(__file__).parents[1],
            start_new_session=True,  # ctrl-C is answered by the run
        )
    _socket = folder / "socket"
    try:
        yield
    finally:
        _socket = None
        server.kill()  # in the midst of its imports where the block was a refusal
        server.wait()
        shutil.rmtree(folder)


def forked() -> dict[str, str]:
    """What the `runtime_env` of an actor without GPUs says, so that its worker is a fork where there is a server."""
    if _socket is None:
        return {}
    return {"py_executable": shlex.join([sys.executable, "-S", "-I", str(_CLIENT), str(_socket)])}


def _serve(listener: socket.socket) -> tuple[dict[str, Any], list[int]]:
    """Forks a process for each request; returns in the forks, with the request and its files."""
    behind = threading.Thread(target=_import)
    behind.start()
    behind.join()
    end = time.monotonic() + _PATIENCE_S
    while (count := len(os.listdir("/proc/self/task"))) > 1:  # one that was joined may still be on its way out
        if time.monotonic() > end:
            raise RuntimeError(f"{count - 1} threads were started by imports: actors import for themselves")
        time.sleep(0.001)
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for forks to end
    while True:
        ready, _, _ = select.select([listener, sys.stdin], [], [])
        if (
            sys.stdin in ready
        ):  # the run is gone, and was killed if this process was not: nobody else removes the socket
            shutil.rmtree(Path(listener.getsockname()).parent, ignore_errors=True)
            os._exit(0)
        with listener.accept()[0] as connection:
            try:
                if request := _answer(connection):
                    return request
            except (OSError, ValueError):
                traceback.print_exc()  # its client, left without an answer, is the worker itself


def _import() -> None:
    """Behind all others: Ray starts meanwhile, and waits for a second where it was not up in time for its own glance.

    A thread's priority is its own: forks of the main thread have the usual one.
    """
    os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), _NICE)
    with uncollected():
        for module in PRELOADED:
            importlib.import_module(module)
        for module in BESIDE_RAY:
            with suppress(ImportError):
                importlib.import_module(module)


def _answer(connection: socket.socket) -> tuple[dict[str, Any], list[int]] | None:
    """Forks: the request in the fork, None in the server."""
    connection.settimeout(_PATIENCE_S)
    text, files, _, _ = socket.recv_fds(connection, 1 << 16, 3)
    try:
        while not text.endswith(b"\n"):
            more = connection.recv(1 << 16)
            if not more:
                raise ConnectionResetError("a request ended halfway")
            text += more
        request = json.loads(text)
        if select.select([connection], [], [], 0)[0]:  # it has nothing more to say
            raise ConnectionResetError("a client did not wait for its fork")
        if os.fork() == 0:
            return request, [os.dup(file) for file in files]
        connection.send(b"1")
        return None
    finally:
        for file in files:
            os.close(file)


def _become(request: dict[str, Any], files: list[int]) -> None:
    """Runs the request's script as if Python had been started with it."""
    os.setpgrp()  # as Ray starts workers: where one dies, it ends all of its group
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    os.environ.update(request["environment"])
    os.chdir(request["folder"])
    for place, file in enumerate(files):
        os.dup2(file, place)
        os.close(file)
    _read_environment()
    sys.argv = request["arguments"]
    sys.path[0] = str(Path(sys.argv[0]).parent)
    runpy.run_path(sys.argv[0], run_name="__main__")


def _read_environment() -> None:
    """What libraries would have read from it as they were loaded; glibc's settings are those of the server."""
    import numpy as np
    import torch

    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    np.random.seed()  # each fork has states of its own
    torch.seed()


if __name__ == "__main__":
    with socket.socket(fileno=int(sys.argv[1])) as _listener:
        _request = _serve(_listener)
    _become(*_request)
