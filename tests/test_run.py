"""Whole runs with real parts: what comes out, that it comes out the same twice, and what dying does to it."""

import json
import math
import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from actors.generator import Generator
from conf.compose import compose
from launch.audit import audit
from launch.export import export
from launch.placement import _signals_held, start_ray
from launch.profile import profile
from launch.run import Run, _signals_interrupt, _signals_restored, run
from learners.checkpoint import Checkpoint
from orchestrator.errors import ConfigError, DeadlineError, ModelError
from orchestrator.ledger import LedgerReader
from orchestrator.rollouts import Rollouts
from orchestrator.store import read_pairs, read_rollouts
from tests.runs import REFERENCE, do_run, overrides

# Two engines, so that one can be lost or wrong beside another, and long enough that something can happen on the way.
TWO = {"generator__num_actors": 2}
LONG = {**TWO, "kind": "qwen3", "pipeline__iterations": 3}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("inputs")


@pytest.fixture(scope="module")
def finished(folder, tmp_path_factory):
    """A run of three iterations that nothing disturbed."""
    run_dir = tmp_path_factory.mktemp("runs") / "finished"
    assert do_run(folder, run_dir, **LONG, pipeline__keep_checkpoints=3) == 0
    return run_dir


def pairs_of(run_dir):
    return {path.name: path.read_bytes() for path in sorted((run_dir / "pairs").iterdir())}


def weights_of(run_dir):
    return (run_dir / "model" / "model.safetensors").read_bytes()


def assert_logprobs_match(model, run_dir, iteration):
    """Sampled log-probs in the rollouts equal a forward of transformers with the weights that were published."""
    scored = read_rollouts(run_dir / "rollouts" / f"iteration-{iteration:04d}-wave-0000.parquet")
    for group in (item.group for item in scored):
        for completion in group.completions:
            tokens = torch.tensor([group.prompt.token_ids + completion.token_ids])
            with torch.no_grad():
                logprobs = model(tokens).logits[0, :-1].float().log_softmax(-1)
            start = len(group.prompt.token_ids)
            picked = logprobs.gather(1, tokens[0, 1:, None])[start - 1 :, 0]
            torch.testing.assert_close(picked, torch.tensor(completion.logprobs), atol=1e-4, rtol=0)


def assert_policy_is_what_sampled_and_was_trained(run_dir, initial):
    model = AutoModelForCausalLM.from_pretrained(initial)
    assert_logprobs_match(model, run_dir, 1)
    model.load_state_dict(Checkpoint(run_dir / "checkpoints" / "iteration-0001").read("weights"), strict=False)
    model.tie_weights()
    assert_logprobs_match(model, run_dir, 2)
    trained = AutoModelForCausalLM.from_pretrained(run_dir / "model")
    assert not torch.equal(trained.get_input_embeddings().weight, model.get_input_embeddings().weight)
    assert AutoTokenizer.from_pretrained(run_dir / "model").chat_template


@pytest.mark.parametrize(("kind", "engine"), [("gpt2", "vllm"), ("qwen3", "transformers")])
def test_a_chat_model_runs_end_to_end(folder, tmp_path, kind, engine):
    run_dir = tmp_path / "run"
    assert do_run(folder, run_dir, kind=kind, engine=engine) == 0
    summary = json.loads((run_dir / "summary.json").read_text())
    assert (summary["status"], summary["iterations"]) == ("finished", 2)
    assert 0 <= summary["accuracy"]["end"]["greedy"]["value"] <= 1
    assert summary["tokens"]["collect"] > 0
    assert_policy_is_what_sampled_and_was_trained(run_dir, folder / kind)


def test_sampled_logprobs_are_those_of_the_weights_that_sampled(folder, finished):
    assert_policy_is_what_sampled_and_was_trained(finished, folder / LONG["kind"])


def test_nothing_was_lost_or_done_twice(finished):
    found = audit(finished)
    assert found.findings == []
    assert (found.iterations, found.pairs > 0, found.batches > 0) == (3, True, True)
    assert not list((finished / "samples").iterdir())


def test_records_of_a_run_say_where_they_come_from(finished):
    with LedgerReader(finished) as ledger:
        versions = [iteration.version for iteration in ledger.finished()]
    assert len({version.digest for version in versions}) == 4
    for number in (1, 2, 3):
        pairs = read_pairs(finished / "pairs" / f"iteration-{number:04d}-wave-0000.parquet")
        assert len({pair.id for pair in pairs}) == len(pairs) > 0
        for pair in pairs:
            assert pair.chosen.policy == pair.rejected.policy == pair.reference == versions[number - 1]
            assert pair.chosen_score > pair.rejected_score
    lines = [json.loads(line) for line in (finished / "metrics.jsonl").read_text().splitlines()]
    steps = [line for line in lines if "step/loss" in line]
    assert all(line["step/staleness_max"] == 0 for line in steps), "sync is strictly on-policy"
    first = next(line for line in steps if line["iteration"] == 1)
    assert first["step/margin"] == pytest.approx(0, abs=1e-5), "the first step starts from the reference"
    assert first["step/loss"] == pytest.approx(0.693147, abs=1e-5)


def test_each_actor_notes_what_it_did(finished):
    actors = json.loads(profile(finished, as_json=True))["actors"]
    for name, kinds in (("generator-0", {"decode", "load weights"}), ("learner", {"step", "publish", "copy state"})):
        assert kinds <= actors[name]["working"].keys()
        assert actors[name]["waiting"]["promote"] > 0
    assert "score" in actors["verifier-0"]["working"]


def test_the_same_seed_gives_the_same_whichever_generators_are_killed(folder, finished, tmp_path, monkeypatch):
    """Killed between two waves and then found dead: its share is drawn again, with the same seeds and weights."""
    import ray

    sample, killed = Rollouts.sample, []

    def sample_then_kill(self, prompts, draws):
        drawn = sample(self, prompts, draws)
        if len(killed) < 2:
            actor = self._roles.generators.actors[len(killed)]
            killed.append(ray.get(actor.ready.remote()))
            os.kill(killed[-1], signal.SIGKILL)
        return drawn

    monkeypatch.setattr(Rollouts, "sample", sample_then_kill)
    run_dir = tmp_path / "killed"
    assert do_run(folder, run_dir, **LONG) == 0
    assert len(killed) == 2
    assert pairs_of(run_dir) == pairs_of(finished)
    assert weights_of(run_dir) == weights_of(finished)


class CorruptedGenerator(Generator):
    """Its second actor receives the second publication with one bit of one tensor turned."""

    def receive(self, publication, deadline_s):
        buckets = super().receive(publication, deadline_s)
        if self.name == "generator-1" and publication.version.number == 1:
            record = next(r for r in publication.records if r.name == "model.layers.1.mlp.down_proj.weight")
            buckets = [bucket.copy() for bucket in buckets]
            buckets[record.bucket][record.offset + 5] ^= 1
        return buckets


def test_a_corrupted_publication_stops_the_run_and_is_named(folder, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("launch.placement.Generator", CorruptedGenerator)
    run_dir = tmp_path / "corrupted"
    assert do_run(folder, run_dir, engine="transformers", **TWO) == 1
    error = capsys.readouterr().err
    assert "generator-1: tensor model.layers.1.mlp.down_proj.weight of weights v1-" in error
    summary = json.loads((run_dir / "summary.json").read_text())
    assert (summary["status"], summary["iterations"]) == ("failed", 0)
    assert "generator-1" in summary["error"]


def test_iterations_without_pairs_end_the_run_with_advice(folder, tmp_path, capsys):
    run_dir = tmp_path / "ties"
    settings = {"scorer__function": "tests.scoring.constant", "pipeline__iterations": 5}
    assert do_run(folder, run_dir, engine="transformers", **settings) == 1
    error = capsys.readouterr().err
    assert "3 iterations in a row made no pair" in error
    assert "Traceback" not in error
    assert "scorer.verifier=function gave a mean score of 0.5, abstained on 0%" in error
    summary = json.loads((run_dir / "summary.json").read_text())
    assert (summary["status"], summary["iterations"], summary["pairs"]) == ("failed", 3, 0)


def agon(*arguments, **options):
    return subprocess.Popen([sys.executable, "-m", "launch", *map(str, arguments)], text=True, **options)


def stop(process, number, at_least=4):
    """Sends a signal; returns what the process said on stderr. It must end soon and leave no orphans."""
    children = psutil.Process(process.pid).children(recursive=True)
    assert len(children) >= at_least, "Ray and its actors"
    process.send_signal(number)
    started = time.monotonic()
    _, error = process.communicate(timeout=60)
    assert time.monotonic() - started < 30, "10 on an idle machine"
    assert process.returncode == 130
    _, alive = psutil.wait_procs(children, timeout=5)
    assert not alive, f"orphans: {alive}"
    return error


def test_signals_stop_at_once_and_resume_ends_as_if_nothing_had_happened(reference_run, tmp_path):
    run_dir = tmp_path / "interrupted"
    process = agon("run", *overrides(reference_run.parent / "inputs", run_dir, **REFERENCE), stderr=subprocess.PIPE)
    wait_for(run_dir, process, lambda ledger: any(done.iteration >= 1 for done in ledger.finished()))
    assert parents_of(process, "Generator", "Learner") == {"launch.fork_server"}
    assert f"run --resume {run_dir}" in stop(process, signal.SIGINT)
    status = agon("status", run_dir, stdout=subprocess.PIPE).communicate(timeout=60)[0]
    assert "interrupted" in status
    assert json.loads((run_dir / "summary.json").read_text())["status"] == "interrupted"
    process = agon("run", "--resume", run_dir, stderr=subprocess.PIPE)
    resumed = time.time()
    wait_for(run_dir, process, lambda ledger: any(phase.started > resumed for phase in ledger.phases()))
    stop(process, signal.SIGTERM)
    assert agon("run", "--resume", run_dir).wait(timeout=300) == 0
    assert pairs_of(run_dir) == pairs_of(reference_run)
    assert weights_of(run_dir) == weights_of(reference_run)
    assert audit(run_dir).findings == []
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    evaluated = [line["iteration"] for line in lines if "eval/greedy_value" in line]
    assert evaluated == [0, 1, 2, 3], "no line of an iteration that was done again is left"


def test_a_ray_that_was_slow_to_start_is_started_again(monkeypatch):
    tries = []

    def start(config, text="The current node timed out during startup.", enough=3):
        tries.append(subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"]))
        if len(tries) < enough:
            raise RuntimeError(text)

    monkeypatch.setattr("launch.placement._init_ray", start)
    start_ray(compose([]))
    assert [psutil.pid_exists(one.pid) for one in tries] == [False, False, True], "what the late ones left is ended"
    tries[-1].kill()
    late = ("The current node timed out during startup.", "Timed out waiting for file /tmp/gcs_server_port_39c0")
    for text, expected in ((late[0], 3), (late[1], 3), ("no such folder", 1)):
        tries.clear()
        monkeypatch.setattr("launch.placement._init_ray", lambda config, text=text: start(config, text, math.inf))
        with pytest.raises(DeadlineError, match=rf"Ray could not be started here: {text}"):
            start_ray(compose([]))
        assert len(tries) == expected
        tries[-1].kill()


def test_a_signal_while_ray_starts_leaves_no_orphans(folder, tmp_path):
    run_dir = tmp_path / "early"
    process = agon("run", *overrides(folder, run_dir), stderr=subprocess.PIPE)
    end = time.monotonic() + 120
    while not any("raylet" in name for name in names_of_children(process)):
        assert time.monotonic() < end
        time.sleep(0.05)
    assert "no iteration was finished" in stop(process, signal.SIGINT, at_least=1)
    assert json.loads((run_dir / "summary.json").read_text())["status"] == "interrupted"


def test_rays_own_answer_to_sigterm_is_a_stop_too():
    """While it starts, Ray takes the signal and ends the process with it."""

    def start():
        with _signals_held():
            signal.signal(signal.SIGTERM, lambda number, _: sys.exit(number))
            os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(KeyboardInterrupt):
        start()


def test_signals_do_nothing_from_the_end_of_a_run_until_its_last_word():
    before = signal.getsignal(signal.SIGTERM)
    with _signals_restored():
        with pytest.raises(KeyboardInterrupt), _signals_interrupt():
            os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGTERM)
    assert signal.getsignal(signal.SIGTERM) is before


def parents_of(process, *actors):
    """Which modules the processes are that Ray's workers of some actors were started by."""
    found, names = set(), tuple(f"ray::{name}" for name in actors)
    for one in psutil.Process(process.pid).children(recursive=True):
        with suppress(psutil.NoSuchProcess):  # others come and go
            if " ".join(one.cmdline()).startswith(names):
                found.add(one.parent().cmdline()[-2])
    return found


def names_of_children(process):
    return [child.name() for child in psutil.Process(process.pid).children(recursive=True) if child.is_running()]


def wait_for(run_dir, process, reached):
    """Two iterations of the run at least are left then, so that it does not end before it is stopped."""
    end = time.monotonic() + 240
    while time.monotonic() < end:
        assert process.poll() is None, process.communicate()[1]
        if (run_dir / "ledger.sqlite").exists():
            with LedgerReader(run_dir) as ledger:
                if reached(ledger):
                    return
        time.sleep(0.2)
    raise AssertionError("the run did not get so far in time")


def test_export_names_what_it_cannot_find(finished, tmp_path):
    assert export(finished, tmp_path / "first", iteration=1).is_dir()
    with pytest.raises(ModelError, match="not empty"):
        export(finished, tmp_path / "first")
    with pytest.raises(ModelError, match="no checkpoint of iteration 7; it has 1, 2, 3"):
        export(finished, tmp_path / "other", iteration=7)


def test_export_follows_a_run_that_goes_on(finished, tmp_path, monkeypatch):
    """Which lets go of a checkpoint while that is read."""
    newest = [Path("checkpoints/iteration-0002"), Path("checkpoints/iteration-0003")]
    monkeypatch.setattr(sys.modules["launch.export"], "_find", lambda run, iteration: newest.pop(0))
    read = []

    def write(model, checkpoint, dtype, folder):
        read.append(checkpoint)
        if "0002" in checkpoint:
            raise ModelError("it is gone")
        Path(folder).mkdir()

    assert export(finished, tmp_path / "out", write=write).is_dir()
    assert [Path(checkpoint).name for checkpoint in read] == ["iteration-0002", "iteration-0003"]
    newest[:] = [Path("checkpoints/iteration-0002")] * 2
    with pytest.raises(ModelError, match="it is gone"):
        export(finished, tmp_path / "other", write=write)


def test_a_finished_run_can_be_extended_but_not_changed(finished):
    config = finished / "config.yaml"
    with pytest.raises(ConfigError, match=r"loss\.beta=0\.7 \(was 0\.1\): cannot change"):
        run(compose(["loss.beta=0.7"], config), resume=finished)
    before, summary = weights_of(finished), (finished / "summary.json").read_bytes()
    assert run(compose([], config), resume=finished) == 0
    assert (weights_of(finished), (finished / "summary.json").read_bytes()) == (before, summary), "nothing left to do"
    assert run(compose(["pipeline.iterations=4"], config), resume=finished) == 0
    assert weights_of(finished) != before
    assert json.loads((finished / "summary.json").read_text())["iterations"] == 4


@pytest.mark.parametrize(
    ("found", "scorer", "said"),
    [
        (7, "verifier", "only 7 held-out prompts to evaluate on: raise task.test_fraction"),
        (60, "verifier", "60 prompts are held out: evaluation.final_problems=100 takes all of them"),
        (100, "verifier", None),
        (7, "none", None),
    ],
)
def test_it_is_said_where_fewer_prompts_are_held_out_than_are_asked_for(found, scorer, said):
    messages = []
    started = SimpleNamespace(
        _config=compose([f"evaluation.scorer={scorer}", "evaluation.final_problems=100"]),
        _inputs=SimpleNamespace(test_prompts=range(found)),
        _tracker=SimpleNamespace(message=messages.append),
    )
    Run._warn_of_few_problems(started)
    assert len(messages) == (said is not None)
    assert all(said in message for message in messages)
