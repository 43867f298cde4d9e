"""A run that cannot go on is refused at once: exit code 2, and not a byte of its folder is changed."""

import sys

import pytest
import torch

from actors.judges import build_scorer
from conf.compose import compose, resolved_yaml
from launch import cli
from launch.model_files import fingerprint
from launch.resuming import check_resumable
from launch.run import _identity
from learners.checkpoint import State, write_folder
from orchestrator.errors import DataError
from orchestrator.ledger import Ledger, RunStatus
from orchestrator.summary import build_summary, write_summary
from orchestrator.types import PolicyVersion
from tests.models import make_model

CHECKPOINT = "checkpoints/iteration-0002"


@pytest.fixture
def run_dir(tmp_path, monkeypatch):
    """As a run of two iterations leaves it, without the work."""
    folder = tmp_path / "run"
    with Ledger(folder) as ledger:
        ledger.begin(recipe="iterative_dpo", seed=0, config_hash="0" * 16, iterations=2)
        for number in range(3):
            ledger.finish_iteration(
                number,
                version=PolicyVersion(number=number, digest=f"{number:016x}"),
                cursor=number,
                checkpoint=CHECKPOINT if number == 2 else None,
                metrics={},
            )
        ledger.end(RunStatus.FINISHED)
        write_summary(folder, build_summary(ledger))
    (folder / "config.yaml").write_text(resolved_yaml(compose(["pipeline.iterations=2"])))
    parts = {name: {"w": torch.zeros(8)} for name in ("weights", "optimizer", "reference")}
    write_folder(folder / CHECKPOINT, State(tensors=parts, facts={"step": 2}), file_bytes=32)
    monkeypatch.setattr("launch.run.Run", None)  # what is not refused fails here, before Ray
    return folder


def refused(run_dir, monkeypatch, capsys, *overrides):
    before = contents(run_dir)
    monkeypatch.setattr(sys, "argv", ["agon", "run", "--resume", str(run_dir), *overrides])
    with pytest.raises(SystemExit) as left:
        cli.main()
    assert left.value.code == 2
    assert contents(run_dir) == before
    return capsys.readouterr().err


def contents(run_dir):
    """Without the two files by which SQLite knows its readers, and the lock."""
    files = [
        path for path in run_dir.rglob("*") if path.is_file() and not path.name.endswith(("-shm", "-wal", ".lock"))
    ]
    return {str(path): path.read_bytes() for path in files}


def test_a_damaged_checkpoint_refuses_nothing(run_dir):
    """The learner goes on from the one before (tests/test_faults.py)."""
    for path in (run_dir / CHECKPOINT).iterdir():
        path.write_bytes(path.read_bytes()[:-1])
    check_resumable(compose(["pipeline.iterations=2"]), run_dir)


def test_fewer_iterations_than_are_finished(run_dir, monkeypatch, capsys):
    said = refused(run_dir, monkeypatch, capsys, "pipeline.iterations=1")
    assert "pipeline.iterations=1" in said
    assert "has finished 2 iterations already" in said


def test_what_is_whole_passes(run_dir):
    check_resumable(compose(["pipeline.iterations=2"]), run_dir)
    check_resumable(compose(["pipeline.iterations=3"]), run_dir)


def test_a_function_that_was_changed_since(run_dir, monkeypatch, capsys, tmp_path):
    """Scores of two functions are not to be mixed."""
    module = tmp_path / "changing_rewards.py"
    module.write_text("def f(prompt, completion, answer):\n    return 1.0\n")
    monkeypatch.syspath_prepend(tmp_path)
    chosen = ["pipeline.iterations=3", "scorer.verifier=function", "scorer.function=changing_rewards.f"]
    (run_dir / "config.yaml").write_text(resolved_yaml(compose(chosen)))
    verifier = build_scorer(compose(chosen).scorer).name
    with Ledger(run_dir) as ledger:
        ledger.db.execute("UPDATE run SET config_hash = ?", (_identity(compose(chosen), verifier),))
    module.write_text("def f(prompt, completion, answer):\n    return 0.0\n")
    said = refused(run_dir, monkeypatch, capsys)
    assert "other content in the files that it names: prompts, models, rubrics, scorer.function" in said


@pytest.mark.parametrize("key", ["model", "judge.model"])
def test_another_model_in_the_same_folder_makes_another_run(key, tmp_path):
    """The reference and the KL would be another's, and nothing else would tell."""
    make_model("llama", tmp_path / "model")
    chosen = [f"{key}={tmp_path / 'model'}"] + ["scorer=llm_judge"] * (key != "model")
    before = _identity(compose(chosen), None)
    assert _identity(compose(chosen), None) == before
    path = tmp_path / "model" / "model.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    assert _identity(compose(chosen), None) != before


def test_a_prompt_that_moved_from_one_file_to_the_other_makes_another_run(tmp_path):
    train, test = tmp_path / "train.jsonl", tmp_path / "test.jsonl"
    config = compose(["task=prompts", f"task.path={train}", f"task.test_path={test}"])
    identities = set()
    for cut in (1, 2):
        train.write_text("".join(f'{{"prompt": "{number}"}}\n' for number in range(cut)))
        test.write_text("".join(f'{{"prompt": "{number}"}}\n' for number in range(cut, 3)))
        identities.add(_identity(config, None))
    assert len(identities) == 2


@pytest.mark.parametrize("left", ["checkpoints", "pairs", "rollouts"])
def test_a_ledger_that_is_gone_is_missed(tmp_path, left):
    check_resumable(compose([]), tmp_path)  # it stopped before it began
    (tmp_path / left).mkdir()
    check_resumable(compose([]), tmp_path)
    (tmp_path / left / "iteration-0001").mkdir()
    with pytest.raises(DataError, match=rf"has no ledger.sqlite, which says what of its {left} counts"):
        check_resumable(compose([]), tmp_path)


def test_another_template_or_another_tensor_makes_another_model(tmp_path):
    model = tmp_path / "model"
    model.mkdir()
    (model / "config.json").write_text("{}")
    weights = bytearray(8 << 20)
    (model / "model.safetensors").write_bytes(weights)
    seen = {fingerprint(model)}
    (model / "chat_template.jinja").write_text("<user>")
    seen.add(fingerprint(model))
    weights[3 << 20 : 4 << 20] = bytes([1]) * (1 << 20)
    (model / "model.safetensors").write_bytes(weights)
    seen.add(fingerprint(model))
    assert len(seen) == 3
