"""Small real runs: a model with random weights, chat prompts from a file, real Ray, a real engine."""

import json

from conf.compose import compose
from launch.run import run
from tests.models import make_model

NUM_PROMPTS = 24
REFERENCE = {
    "engine": "transformers",
    "pipeline__iterations": 3,
    "pipeline__wave_prompts": 3,
    "pipeline__keep_checkpoints": 3,
    "learner__checkpoint_steps": 2,
    "learner__batch_pairs": 4,
}
"""Of a run with three waves and several segments in each iteration, to be broken."""


def write_prompts(path):
    rows = [
        {"id": f"q{i}", "prompt": [{"role": "user", "content": f"Is {i} + {i + 3} = {2 * i + 3}?"}], "answer": "yes"}
        for i in range(NUM_PROMPTS)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def overrides(folder, run_dir, *, kind="llama", engine="vllm", **more):
    """Of a run of some seconds; `folder` gets the model and the prompts. A key that is given None is not set."""
    model = folder / kind
    if not model.exists():
        make_model(kind, model)
    prompts = folder / "prompts.jsonl"
    if not prompts.exists():
        write_prompts(prompts)
    settings = {
        "run_dir": run_dir,
        "model": model,
        "model.max_length": 64,
        "task": "prompts",
        "task.path": prompts,
        "task.id_field": "id",
        "task.answer_field": "answer",
        "task.test_fraction": 0.2,
        "generator": engine,
        "generator.num_actors": 1,
        "generator.max_tokens": 12,
        "generator.samples_per_prompt": 4,
        "scorer.verifier": "function",
        "scorer.function": "tests.scoring.variety",
        "pairing.max_pairs": 2,
        "filter.drop_truncated_chosen": "false",
        "learner.lr": 1e-3,
        "learner.batch_pairs": 8,
        "learner.epochs": 1,
        "pipeline.iterations": 2,
        "pipeline.prompts_per_iteration": 8,
        "tracking": "offline",
        "tracking.console": "quiet",
    } | {key.replace("__", "."): value for key, value in more.items()}
    return [f"{key}={value}" for key, value in settings.items() if value is not None]


def do_run(folder, run_dir, **settings):
    """Runs in this process; returns the exit code."""
    return run(compose(overrides(folder, run_dir, **settings)))
