"""Real runs whose judge is a language model: the policy itself, which has no idea, and no reference answers at all."""

from __future__ import annotations

import json

import pyarrow.parquet as pq
import pytest

from orchestrator.store import read_pairs, read_rollouts
from tests.models import make_model
from tests.runs import do_run

RUBRIC = "{question}{answer}Which mark?\n"


@pytest.fixture
def folder(tmp_path):
    rows = [{"id": f"q{i}", "prompt": [{"role": "user", "content": f"Is {i} odd?"}]} for i in range(24)]
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "rubric.txt").write_text(RUBRIC)
    return tmp_path


def judged(folder, name, **more):
    settings = {
        "recipe": "self_rewarding",
        "task__answer_field": "null",
        "scorer__verifier": "math",
        "scorer__function": "null",
        "evaluation__scorer": "judge",
        "judge__rubric": folder / "rubric.txt",
        "model__max_length": 700,
        "pipeline__iterations": 1,
    }
    return do_run(folder, folder / name, kind="qwen3", **settings | more)


def test_a_policy_that_judges_itself_needs_no_answers(folder):
    """Verdicts by probability: every completion gets points, and no actor of the run could verify anything."""
    assert judged(folder, "run", judge__verdict="probability") == 0
    run_dir = folder / "run"
    summary = json.loads((run_dir / "summary.json").read_text())
    assert summary["status"] == "finished"
    groups = read_rollouts(run_dir / "rollouts" / "iteration-0001-wave-0000.parquet")
    assert all(group.group.prompt.answer is None for group in groups)
    assert all(group.scorer.startswith("llm_judge") and "v0" in group.scorer for group in groups), "iteration start"
    scores = [score.value for group in groups for score in group.scores]
    assert all(value is None or 0 <= value <= 5 for value in scores)
    assert len({value for value in scores if value is not None}) > 10
    assert read_pairs(run_dir / "pairs" / "iteration-0001-wave-0000.parquet")


def test_a_policy_that_cannot_say_a_verdict_stops_with_the_reason(folder, capsys):
    assert judged(folder, "run", judge__max_tokens=8) == 1
    summary = json.loads((folder / "run" / "summary.json").read_text())
    assert summary["status"] == "failed"
    assert "gave no verdict in" in summary["error"]
    assert "judge.max_failed_fraction=0.95" in capsys.readouterr().err


def test_a_search_that_evaluates_its_own_steps(folder, monkeypatch):
    """The policy says of each finished solution how probably its last step is right; a verifier of the outcome."""
    monkeypatch.setattr("actors.judges.reading.MIN_MASS", 1e-4)  # of what a random model is about to say
    settings = {"recipe": "mcts_dpo", "evaluation__scorer": "verifier", "scorer__verifier": "function"}
    settings |= {"scorer__function": "tests.scoring.variety", "search__simulations": 6, "search__separator": " "}
    settings |= {"search__evaluation_weight": 0.5, "search__states": "tree", "judge__rubric": None}
    settings |= {"pairing__max_pairs": None, "generator__samples_per_prompt": None}
    (folder / "step.txt").write_text("{question}{answer}Which?\n")
    assert judged(folder, "run", search__rubric=folder / "step.txt", **settings) == 0
    lines = [json.loads(line) for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()]
    (failed,) = (line["search/evaluation_parse_failure_fraction"] for line in lines if "search/waves" in line)
    assert failed < 1
    rows = pq.read_table(folder / "run" / "trees" / "iteration-0001-wave-0000.parquet").to_pylist()
    values = {row["value"] for row in rows if row["terminal"]}
    assert len(values) > 10, "what a random model says of each is another figure"
    assert max(values) <= 1.5


def test_a_policy_judged_by_its_own_log_ratio_asks_the_learner_for_the_one_before(tmp_path):
    """CREAM: in the first iteration the base model ranks beside the policy, in the second the policy it came from."""
    base = make_model("llama", tmp_path / "base", seed=1)
    settings = {"loss": "cream", "scorer": "implicit", "judge__model": base, "judge__consistency": "mean"}
    settings["evaluation__every"] = 2
    assert do_run(tmp_path, tmp_path / "run", engine="transformers", **settings) == 0
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [line["iteration"] for line in lines if "eval/greedy_value" in line] == [0, 2]
    assert [line["iteration"] for line in lines if "judge/accuracy" in line] == [1, 2], "anchors need no evaluation"
    agreements = [line["judge/consistency"] for line in lines if "judge/consistency" in line]
    for number, agreement in enumerate(agreements, 1):
        pairs = read_pairs(tmp_path / "run" / "pairs" / f"iteration-{number:04d}-wave-0000.parquet")
        assert [pair.label for pair in pairs] == pytest.approx([agreement] * len(pairs))
    assert agreements[0] < 0.8 < agreements[1], "one update moves a ranking less than another model differs"
