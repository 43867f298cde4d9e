"""What is tracked can be read back, and a tracker that fails costs the record, never the run."""

import json
import math
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import psutil
import pytest

from conf.schema import TrackingConfig
from orchestrator import wandb_tracker
from orchestrator.errors import ConfigError
from orchestrator.ledger import RunStatus
from orchestrator.tracking import JsonlTracker, RunInfo, Tracker, Trackers
from orchestrator.wandb_tracker import WandbTracker, wandb_mode
from tests.records import completion, pair

KEY = "0123456789abcdef0123456789abcdef01234567"


def info(run_dir, **changes):
    return RunInfo(
        recipe="iterative_dpo", seed=0, run_dir=run_dir, iterations=3, config={"loss": {"beta": 0.5}}, **changes
    )


@pytest.fixture(autouse=True)
def no_account(monkeypatch, tmp_path):
    for name in ("WANDB_API_KEY", "WANDB_MODE", "WANDB_BASE_URL"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))


# --- metrics.jsonl


def lines(run_dir):
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


def test_a_line_is_on_disk_when_log_returns(tmp_path):
    tracker = JsonlTracker()
    tracker.start(info(tmp_path))
    tracker.log({"train/loss": 0.5, "train/grad_norm": math.inf}, iteration=1, step=4)
    (line,) = lines(tmp_path)
    assert abs(line.pop("time") - time.time()) < 60
    assert line == {"iteration": 1, "step": 4, "train/loss": 0.5, "train/grad_norm": None}
    tracker.finish(RunStatus.FINISHED)
    tracker.finish(RunStatus.FINISHED)


def test_a_resumed_run_has_each_iteration_once(tmp_path):
    tracker = JsonlTracker()
    tracker.start(info(tmp_path))
    for iteration in (0, 1, 2):
        tracker.log({"x": 1.0}, iteration=iteration, step=iteration)
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"iteration": 2, "st')  # killed while writing
    resumed = JsonlTracker()
    resumed.start(info(tmp_path, start_iteration=2))
    resumed.log({"x": 2.0}, iteration=2, step=2)
    resumed.finish(RunStatus.FINISHED)
    assert [(line["iteration"], line["x"]) for line in lines(tmp_path)] == [(0, 1.0), (1, 1.0), (2, 2.0)]


# --- several trackers


class Recorder(Tracker):
    def __init__(self, calls, error=None):
        self.calls, self.error = calls, error

    def start(self, run):
        self.calls.append("start")

    def stage(self, iteration, stage):
        self.calls.append(("stage", iteration, stage))

    def progress(self, stage, done, total, tokens):
        self.calls.append(("progress", stage, done, total, tokens))

    def log(self, metrics, *, iteration, step):
        self.calls.append(("log", metrics, iteration, step))

    def pairs(self, pairs):
        self.calls.append(("pairs", len(pairs)))

    def message(self, text):
        self.calls.append(("message", text))

    def finish(self, status):
        self.calls.append(("finish", status))
        if self.error:
            raise self.error


def tell_everything(tracker, run_dir):
    tracker.start(info(run_dir))
    tracker.stage(1, "train")
    tracker.progress("train", 1, 2, 30)
    tracker.log({"a": 1.0}, iteration=1, step=1)
    tracker.pairs([pair(completion(1), completion(2))])
    tracker.message("hello")


def test_all_are_told_everything(tmp_path):
    told = [[], []]
    alone = []
    tell_everything(Recorder(alone), tmp_path)
    tell_everything(Trackers([Recorder(calls) for calls in told]), tmp_path)
    assert len(alone) == 6
    assert told == [alone, alone]


@pytest.mark.parametrize("failing", [0, 1])
def test_all_are_finished_even_when_one_raises(failing):
    told = [[], []]
    trackers = [Recorder(calls, OSError("disk full") if k == failing else None) for k, calls in enumerate(told)]
    with pytest.raises(OSError, match="disk full"):
        Trackers(trackers).finish(RunStatus.FAILED)
    assert told == [[("finish", RunStatus.FAILED)]] * 2


def test_a_tracker_may_ignore_everything(tmp_path):
    tracker = Tracker()
    tell_everything(tracker, tmp_path)
    tracker.finish(RunStatus.FINISHED)


# --- wandb


def test_mode_follows_the_key(monkeypatch, tmp_path):
    assert [wandb_mode(choice) for choice in ("auto", "offline", "disabled")] == ["offline", "offline", "disabled"]
    with pytest.raises(ConfigError, match="no key was found"):
        wandb_mode("online")
    (tmp_path / "netrc").write_text(f"machine api.wandb.ai login user password {KEY}\n")
    (tmp_path / "netrc").chmod(0o600)
    assert (wandb_mode("auto"), wandb_mode("online")) == ("online", "online")
    monkeypatch.setenv("WANDB_BASE_URL", "https://wandb.example.org")
    assert wandb_mode("auto") == "offline"
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    assert wandb_mode("auto") == "online"
    monkeypatch.setenv("WANDB_MODE", "disabled")
    assert (wandb_mode("auto"), wandb_mode("offline")) == ("disabled", "offline")


def services():
    return [process for process in psutil.Process().children(recursive=True) if "wandb" in process.name()]


def read_wandb(run_dir):
    """Records of all wandb runs in a run folder, by kind."""
    found = {}
    for path in sorted(run_dir.rglob("*.wandb")):
        command = [sys.executable, "-m", "wandb", "leet", "inspect", "--json", str(path)]
        output = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True).stdout
        for record in map(json.loads, output.splitlines()):
            found.setdefault(record["type"], []).append(record.get(record["type"]))
    return found


def test_an_offline_run_is_whole_silent_and_resumable(tmp_path, capfd):
    before, told = dict(os.environ), []
    for start in (0, 2):
        tracker = WandbTracker(TrackingConfig(project="test"), told.append)
        tracker.start(info(tmp_path, start_iteration=start))
        assert services()
        tracker.log({"step/loss": 0.5}, iteration=start, step=7)
        tracker.pairs([pair(completion(k), completion(99)) for k in range(40)])
        tracker.log({"eval/greedy_value": 0.25}, iteration=start, step=8)
        tracker.finish(RunStatus.FINISHED)
        tracker.finish(RunStatus.FINISHED)
        assert services() == []
    assert dict(os.environ) == before
    assert told == []
    assert capfd.readouterr() == ("", "")
    found = read_wandb(tmp_path)
    assert len({run["run_id"] for run in found["run"]}) == 1
    assert found["run"][0]["project"] == "test"
    assert found["run"][0]["config"]["update"]["loss"] == {"beta": 0.5}
    steps = {metric.get("glob_name"): metric.get("step_metric") for metric in found["metric"]}
    assert (steps["step/*"], steps["train/*"], steps["eval/*"]) == ("step", "iteration", "iteration")
    history = [line["item"] for line in found["history"]]
    assert [(h["iteration"], h["step"]) for h in history if "eval/greedy_value" in h] == [(0, 8), (2, 8)]
    tables = sorted(tmp_path.rglob("*.table.json"))
    rows = json.loads(tables[0].read_text())["data"]
    assert 8 <= len(rows) <= 16
    assert rows[1] == [1, "1+1\n", "3", "99", 1.0, 0.0, 1.0, "verifier:test@1"]


def test_without_a_server_the_run_goes_on_offline(tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")
    monkeypatch.setattr(wandb_tracker, "_INIT_TIMEOUT_S", 2)
    told = []
    tracker = WandbTracker(TrackingConfig(), told.append)
    tracker.start(info(tmp_path))
    tracker.log({"eval/greedy_value": 0.25}, iteration=0, step=0)
    tracker.finish(RunStatus.FINISHED)
    assert len(told) == 1
    assert told[0].startswith("wandb: could not start online")
    assert [line["item"]["eval/greedy_value"] for line in read_wandb(tmp_path)["history"]] == [0.25]
    written = b"".join(path.read_bytes() for path in tmp_path.rglob("*") if path.is_file())
    assert KEY.encode() not in written


class JustEnoughServer(BaseHTTPRequestHandler):
    """Answers what wandb asks when a run starts."""

    def do_POST(self):
        query = json.loads(self.rfile.read(int(self.headers["Content-Length"]))).get("query", "")
        project = {"id": "p", "name": "agon", "entity": {"id": "e", "name": "me"}}
        bucket = {"id": "b", "name": "r", "displayName": "r", "config": "{}", "project": project}
        data = {"upsertBucket": {"bucket": bucket, "inserted": True}} if "upsertBucket" in query else {"model": None}
        body = json.dumps({"data": data}).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *arguments):
        pass


@pytest.mark.timeout(120)  # what is tested is that it ends
def test_a_network_that_goes_away_does_not_hold_the_run_up(tmp_path, monkeypatch):
    server = ThreadingHTTPServer(("127.0.0.1", 0), JustEnoughServer)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    monkeypatch.setenv("WANDB_BASE_URL", f"http://127.0.0.1:{server.server_port}")
    monkeypatch.setattr(wandb_tracker, "_FINISH_TIMEOUT_S", 2)
    told = []
    tracker = WandbTracker(TrackingConfig(), told.append)
    tracker.start(info(tmp_path))
    server.shutdown()
    server.server_close()
    tracker.log({"eval/greedy_value": 0.25}, iteration=0, step=0)
    tracker.finish(RunStatus.FINISHED)
    assert told == []
    assert services() == []
    assert [path.parent.name.startswith("run-") for path in tmp_path.rglob("*.wandb")] == [True]  # it was online
    assert [line["item"]["eval/greedy_value"] for line in read_wandb(tmp_path)["history"]] == [0.25]


@pytest.mark.timeout(60)
def test_what_is_interrupted_is_not_held_up_by_an_upload(tmp_path, monkeypatch, capfd):
    """Finishing a whole run may take a minute; here it would take the test's time."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), JustEnoughServer)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    monkeypatch.setenv("WANDB_BASE_URL", f"http://127.0.0.1:{server.server_port}")
    monkeypatch.setattr(wandb_tracker, "_FINISH_TIMEOUT_S", 600)
    tracker = WandbTracker(TrackingConfig(), pytest.fail)
    tracker.start(info(tmp_path))
    server.shutdown()
    server.server_close()
    tracker.log({"eval/greedy_value": 0.25}, iteration=0, step=0)
    tracker.finish(RunStatus.INTERRUPTED)
    assert services() == []
    assert capfd.readouterr() == ("", "")


INTERRUPTED = """
import signal
import sys
from pathlib import Path
from conf.schema import TrackingConfig
from orchestrator.ledger import RunStatus
from orchestrator.wandb_tracker import WandbTracker
from tests.test_tracking import info
signal.signal(signal.SIGINT, signal.default_int_handler)  # which a shell's background processes are without
tracker = WandbTracker(TrackingConfig(), print)
try:
    tracker.start(info(Path(sys.argv[1])))
except KeyboardInterrupt:
    tracker.finish(RunStatus.INTERRUPTED)
    print("interrupted")
"""


def test_an_interrupt_while_wandb_starts_leaves_no_word_of_it(tmp_path):
    """Its server takes the connection and is silent, so that `wandb.init` waits."""
    with socket.create_server(("127.0.0.1", 0)) as silent:
        server = {"WANDB_API_KEY": KEY, "WANDB_BASE_URL": f"http://127.0.0.1:{silent.getsockname()[1]}"}
        process = subprocess.Popen(
            [sys.executable, "-c", INTERRUPTED, str(tmp_path)],
            env=os.environ | server | {"WANDB_MODE": "online"},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        silent.settimeout(60)
        connection, _ = silent.accept()
        process.send_signal(signal.SIGINT)
        told = process.communicate(timeout=60)
        connection.close()
    assert told == ("interrupted\n", "")
    assert process.returncode == 0


def test_a_service_that_dies_does_not_take_the_run_down(tmp_path):
    told = []
    tracker = WandbTracker(TrackingConfig(), told.append)
    tracker.start(info(tmp_path))
    dying = services()
    for process in dying:
        process.kill()
    psutil.wait_procs(dying, timeout=10)
    for step in range(3):
        tracker.log({"train/loss": 0.5}, iteration=1, step=step)
        tracker.pairs([pair(completion(1), completion(2))])
    tracker.finish(RunStatus.FINISHED)
    assert len(told) == 1
    assert told[0].startswith("wandb: recording ended")
    assert services() == []


def test_disabled_writes_nothing(tmp_path):
    tracker = WandbTracker(TrackingConfig(wandb="disabled"), pytest.fail)
    tell_everything(tracker, tmp_path)
    tracker.finish(RunStatus.FINISHED)
    assert list(tmp_path.iterdir()) == []
