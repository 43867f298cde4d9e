"""Stands in for Python where Ray starts a worker: has `launch/fork_server.py` fork one, or else is Python.

    python -S -I fork_client.py SOCKET script.py [argument ...]

A process of its own for each worker, so that it imports as little as it can, and nothing of the project. It ends once
there is a fork: Ray knows a worker by the process that reports to it, not by the one that it started.
"""

import json
import os
import socket
import sys

ANSWER_S = 30.0
"""Less than the 60 s in which Ray expects a worker to report."""


def asks(address: str, arguments: list[str]) -> bool:
    """Whether a worker was forked."""
    request = {"arguments": arguments, "environment": dict(os.environ), "folder": os.getcwd()}
    try:
        with socket.socket(socket.AF_UNIX) as connection:
            connection.settimeout(ANSWER_S)
            connection.connect(address)
            socket.send_fds(connection, [json.dumps(request).encode() + b"\n"], [0, 1, 2])
            return connection.recv(1) != b""
    except OSError:
        return False


if __name__ == "__main__":
    if not asks(sys.argv[1], sys.argv[2:]):
        os.execv(sys.executable, [sys.executable, *sys.argv[2:]])
