"""A fork is a Python like any other, but for what it need not import; where there is none, there is a Python."""

import json
import os
import shlex
import signal
import socket
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from conf.compose import compose
from launch.fork_server import fork_server, forked

SCRIPT = """
import json, os, random, signal, sys
loaded = "torch" in sys.modules
import numpy as np
import torch
print(json.dumps({
    "loaded": loaded, "arguments": sys.argv, "path": sys.path[0], "folder": os.getcwd(), "name": __name__,
    "threads": torch.get_num_threads(), "colour": os.environ["COLOUR"], "parent": os.getppid(),
    "draws": [random.random(), np.random.random(), torch.rand(1).item()],
    "children": signal.getsignal(signal.SIGCHLD) == signal.SIG_DFL,
    "ray": "ray" in sys.modules, "group": os.getpgrp() - os.getpid(),
}))
print("on stderr", file=sys.stderr)
"""


@pytest.fixture(scope="module")
def script(tmp_path_factory):
    path = tmp_path_factory.mktemp("script") / "script.py"
    path.write_text(SCRIPT)
    return path


@pytest.fixture(scope="module")
def client():
    """The command that Ray is given, with its server."""
    with fork_server(compose([])):
        yield shlex.split(forked()["py_executable"])


def said(command, script, folder, timeout=60):
    """What the script found. It may go on after the command has ended, and holds the pipes until it ends itself."""
    done = subprocess.run(
        [*command, str(script), "--one", "two words"],
        cwd=folder,
        env=os.environ | {"OMP_NUM_THREADS": "2", "COLOUR": "blue"},
        capture_output=True,
        text=True,
        timeout=timeout,
        check=True,
    )
    assert done.stderr.startswith("on stderr\n"), "some libraries have last words"
    return json.loads(done.stdout)


def test_a_fork_finds_what_a_python_finds(client, script, tmp_path):
    plain, fork, other = (said(command, script, tmp_path) for command in ([sys.executable], client, client))
    assert [plain["loaded"], fork["loaded"], fork["ray"]] == [False, True, False]
    assert fork["parent"] == other["parent"] != os.getpid(), "both are children of the server"
    assert [fork["folder"], fork["colour"], fork["threads"]] == [str(tmp_path), "blue", 2]
    assert fork["group"] == 0, "Ray ends the group of a worker that died"
    assert len({one["draws"][place] for one in (fork, other) for place in (0, 1, 2)}) == 6, "generators are their own"
    for own in ("loaded", "parent", "draws", "group"):
        del plain[own], fork[own]
    assert fork == plain


def test_most_of_what_ray_brings_with_it_is_there_before(client, tmp_path):
    script = tmp_path / "script.py"
    script.write_text(
        "import json, sys; before = set(sys.modules); import ray, ray.util.serialization_addons\n"
        "import ray._common.pydantic_compat, starlette.datastructures, uvloop\n"
        "print(json.dumps([one for one in {*sys.modules} - before if one.partition('.')[0] != 'ray']))\n"
        "print('on stderr', file=sys.stderr)"
    )
    plain, fork = (len(said(command, script, tmp_path)) for command in ([sys.executable], client))
    assert 5 * fork < plain


@pytest.mark.parametrize("left", [False, True])
def test_without_a_server_it_is_a_python(left, script, tmp_path):
    with fork_server(compose([])):
        command = shlex.split(forked()["py_executable"])
    if left:  # a socket that nobody listens on
        command[-1] = str(tmp_path / "socket")
        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind(command[-1])
    assert forked() == {}
    found = said(command, script, tmp_path)
    assert not found["loaded"]
    assert found["arguments"] == [str(script), "--one", "two words"]


def test_a_request_that_nobody_waits_for_makes_no_fork_and_hurts_no_other(client, script, tmp_path):
    ran = tmp_path / "ran"
    unwanted = tmp_path / "unwanted.py"
    unwanted.write_text(f"open({str(ran)!r}, 'w')")
    request = {"arguments": [str(unwanted)], "environment": {}, "folder": str(tmp_path)}
    server = psutil.Process(said(client, script, tmp_path)["parent"])
    server.suspend()
    for text in (json.dumps(request) + "\n", json.dumps(request)[:20], "no JSON\n", ""):
        with socket.socket(socket.AF_UNIX) as connection:
            connection.connect(client[-1])
            socket.send_fds(connection, [text.encode() or b" "], [0, 1, 2])
    server.resume()
    assert said(client, script, tmp_path)["parent"] == server.pid
    assert not ran.exists()


def test_a_server_ends_with_its_run_however_that_ends():
    code = (
        "import time; from conf.compose import compose; from launch import fork_server\n"
        "with fork_server.fork_server(compose([])): print(fork_server._socket.parent, flush=True); time.sleep(60)"
    )
    run = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    folder = Path(run.stdout.readline().strip())
    assert folder.is_dir()
    (server,) = psutil.Process(run.pid).children()
    run.send_signal(signal.SIGKILL)
    run.communicate(timeout=10)
    server.wait(60)  # raises where it goes on
    assert not folder.exists()


def test_a_process_with_threads_is_not_forked():
    code = (
        "import threading, time; from launch import fork_server\n"
        "threading.Thread(target=time.sleep, args=(60,), daemon=True).start(); fork_server.PRELOADED = ()\n"
        "fork_server._serve(None)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 1
    assert "1 threads were started by imports" in done.stderr


def servers():
    return {one for one in psutil.Process().children() if "launch.fork_server" in one.cmdline()}


@pytest.mark.parametrize(
    "override", ["cluster.address=10.0.0.1:6379", "learner.gpus=1", "generator.gpus_per_actor=0.5"]
)
def test_there_is_none_where_actors_use_gpus_or_another_machine(override):
    before = servers()
    with fork_server(compose([override])):
        assert forked() == {}
        assert servers() == before


def test_it_does_not_hold_up_a_refusal():
    before = servers()
    with fork_server(compose([])):
        (server,) = servers() - before
    assert not server.is_running(), "killed in the midst of its imports"
