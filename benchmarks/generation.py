"""Generation through a generator actor and its pool against vLLM alone, on the same requests with the same seeds.

    python -m benchmarks.generation

A random Llama of 13M parameters, 64 prompts of 128 tokens x 4 completions of 64, float32, one thread each. The actor
decodes in a process of its own, which answers with completions that go through the pool and are compared with nothing.
vLLM alone has the actor's settings of the engine (eager, no chunked prefill, whole prompts in one batch), once with
memory as a process has it that was just started, once as the actor has it; the ratio is to the faster one. It counts
how many tokens were likelier than each sampled one, which the actor leaves out: a twentieth of the time.
"""

from __future__ import annotations

import json
import sys
import tempfile
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import ray

from actors.generator import Generator
from benchmarks.models import VOCABULARY, make_llama
from benchmarks.report import Comparison, in_turn, of_medians, report, seconds
from benchmarks.sides import Side
from launch.environment import KEEPS_MEMORY
from orchestrator.pools import ActorPool
from orchestrator.types import Completion, GenerationRequest, PolicyVersion, SamplingParams

if TYPE_CHECKING:
    from collections.abc import Mapping

ROOT = Path(__file__).resolve().parents[1]
PROMPTS, SAMPLES, PROMPT_TOKENS, MAX_TOKENS = 64, 4, 128, 64
ENGINE = {"max_length": 256, "max_num_seqs": 256, "kv_cache_mb": 512}
WAIT_S = 600.0


def start_pool(
    model: Path, *, engine: Mapping[str, int], actor: type[Generator] = Generator
) -> ActorPool[GenerationRequest, Completion]:
    """A pool of one generator, which serves the model as it is."""
    options = {
        **engine,
        "model_dir": str(model),
        "dtype": "float32",
        "gpu_memory_utilization": 0.9,
        "tensor_parallel_size": 1,
        "seed": 0,
    }
    environment = {"env_vars": KEEPS_MEMORY | {"OMP_NUM_THREADS": "1", "VLLM_NO_USAGE_STATS": "1"}}
    version = PolicyVersion(number=0, digest="0" * 16)
    pool: ActorPool[GenerationRequest, Completion] = ActorPool(
        role="generator",
        make=lambda index: (
            ray.remote(actor)
            .options(num_cpus=1, runtime_env=environment)
            .remote(f"generator-{index}", "vllm", options, version)
        ),
        num_actors=1,
        restarts=0,
        start_deadline_s=WAIT_S,
    )
    pool.wait_ready()
    return pool


def generate(
    pool: ActorPool[GenerationRequest, Completion], prompts: list[list[int]], round_number: list[int]
) -> float:
    """Seconds of a wave. Each finds the prompts of the one before in the prefix cache, as bare vLLM's do."""
    round_number[0] += 1
    sampling = SamplingParams(temperature=1.0, max_tokens=MAX_TOKENS)
    requests = [
        GenerationRequest(id=f"{round_number[0]}/{seed}", prompt_token_ids=tuple(prompt), sampling=sampling, seed=seed)
        for seed, prompt in enumerate(prompts)
    ]
    return seconds(
        lambda: pool.map(
            lambda actor, share: actor.generate.remote(share),
            requests,
            what="a wave",
            deadline_s=WAIT_S,
            knob="none",
        )
    )


def main() -> int:
    """Measures and keeps the ratio."""
    random = np.random.default_rng(0)
    drawn = [random.integers(3, VOCABULARY, PROMPT_TOKENS).tolist() for _ in range(PROMPTS)]
    prompts = [prompt for prompt in drawn for _ in range(SAMPLES)]
    with tempfile.TemporaryDirectory() as folder:
        model = make_llama(Path(folder) / "model", hidden=256, layers=6, heads=4)
        spec = Path(folder) / "spec.json"
        spec.write_text(json.dumps({**ENGINE, "model": str(model), "prompts": prompts, "max_tokens": MAX_TOKENS}))
        ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
        pool = start_pool(model, engine=ENGINE)
        command = [sys.executable, "-m", "benchmarks.bare_vllm", str(spec)]
        one = {"OMP_NUM_THREADS": "1"}
        with Side(command, one, ROOT) as bare, Side(command, one | KEEPS_MEMORY, ROOT) as tuned:
            taken = in_turn(
                {
                    "agon": partial(generate, pool, prompts, [0]),
                    "bare vLLM": partial(bare.ask, "wave"),
                    "bare vLLM, our memory": partial(tuned.ask, "wave"),
                },
                repetitions=7,
            )
        ray.shutdown()
    tokens = PROMPTS * SAMPLES * MAX_TOKENS
    rates = {name: [tokens / value for value in values] for name, values in taken.items()}
    return report(
        Comparison(
            key="generation_vs_bare_vllm",
            title="Generation through a generator actor against bare vLLM",
            unit="tokens/s",
            sides=rates,
            ratio=min(of_medians(rates["agon"], rates[name]) for name in rates if name != "agon"),
            least=0.97,
            notes=__doc__.partition("benchmarks.generation")[2].strip(),
        )
    )


if __name__ == "__main__":
    sys.exit(main())
