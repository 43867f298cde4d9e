"""Tokens per second of an optimizer step: packed with shared prompts against ordinary padded rows.

    python -m benchmarks.learner_throughput --out result.json [--dtype bfloat16] [--flex] [--hidden 1536 ...]

Both run the same step (log-probs, DPO, backward, clip, AdamW) on the same batch and model with random weights, in
turn. The unit is *unique* tokens per second: each prompt and completion counted once, whatever a path computes twice.
Runs on CUDA where there is one, else on the CPU.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from transformers import AutoModelForCausalLM, LlamaConfig

from conf.schema import LearnerConfig, LossConfig
from learners.losses.state import LossState
from learners.policy import Policy
from learners.step import optimizer_step
from orchestrator.batching import pack
from orchestrator.types import Completion, FinishReason, PolicyVersion, PreferenceBatch, PreferencePair, Prompt

VERSION = PolicyVersion(number=0, digest="0" * 16)


def make_batch(arguments: argparse.Namespace, seed: int = 0) -> PreferenceBatch:
    """Random tokens: each prompt has `completions` completions, the first against the second, and so on."""
    random = np.random.default_rng(seed)

    def tokens(length: int) -> tuple[int, ...]:
        return tuple(random.integers(0, arguments.vocabulary, length).tolist())

    def completion() -> Completion:
        ids = tokens(int(random.integers(arguments.shortest, arguments.longest + 1)))
        return Completion(
            token_ids=ids, text="", logprobs=(0.0,) * len(ids), finish_reason=FinishReason.EOS, policy=VERSION
        )

    pairs = []
    for number in range(arguments.prompts):
        prompt = Prompt(id=str(number), text="", token_ids=tokens(arguments.prompt_length))
        pairs += [
            PreferencePair(
                id=f"1/{number}/{index}",
                prompt=prompt,
                chosen=completion(),
                rejected=completion(),
                chosen_score=1.0,
                rejected_score=0.0,
                iteration=1,
                reference=VERSION,
                scorer="random",
            )
            for index in range(arguments.completions // 2)
        ]
    batch = pack(pairs)
    return replace(batch, reference_logprobs=np.full(batch.num_completion_tokens, -10.0, np.float32))


def make_policy(arguments: argparse.Namespace, device: str) -> Policy:
    """A Llama with random weights."""
    config = LlamaConfig(
        vocab_size=arguments.vocabulary,
        hidden_size=arguments.hidden,
        intermediate_size=arguments.intermediate,
        num_hidden_layers=arguments.layers,
        num_attention_heads=arguments.heads,
        num_key_value_heads=arguments.kv_heads,
        max_position_embeddings=8192,
        tie_word_embeddings=True,
        attn_implementation="sdpa",
    )
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).to(device).eval()
    policy = Policy(
        model,
        dtype=arguments.dtype,
        vocab_chunk=arguments.vocab_chunk,
        activation_checkpointing=arguments.activation_checkpointing,
        flex=arguments.flex,
    )
    if policy.packing_refused is not None:
        raise RuntimeError(f"packing was refused: {policy.packing_refused}")
    return policy


def timed_step(
    policy: Policy, optimizer: torch.optim.Optimizer, batch: PreferenceBatch, learner: LearnerConfig
) -> tuple[float, float, float]:
    """Seconds, peak MiB above what was held before (CUDA; else 0) and loss of one step."""
    cuda = policy.device.type == "cuda"
    if cuda:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
    held = torch.cuda.memory_allocated() if cuda else 0
    start = time.perf_counter()
    step = optimizer_step(
        policy, optimizer, batch, loss=LossConfig(), learner=learner, lr=1e-7, version=0, state=LossState()
    )
    if cuda:
        torch.cuda.synchronize()
    seconds = time.perf_counter() - start
    peak = (torch.cuda.max_memory_allocated() - held) / 2**20 if cuda else 0.0
    return seconds, peak, step.metrics["loss"]


def run(arguments: argparse.Namespace) -> dict[str, object]:
    """Interleaved measurements of both paths, after one step of each that is not counted."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cpu":
        torch.set_num_threads(arguments.threads)
    policy = make_policy(arguments, device)
    optimizer = torch.optim.AdamW(policy.parameters(), lr=1e-7)
    batch = make_batch(arguments)
    learner = LearnerConfig(micro_batch_tokens=arguments.micro_batch_tokens)
    runs: dict[str, list[tuple[float, float, float]]] = {"packed": [], "padded": []}
    for _ in range(arguments.repeats + 1):
        for kind, results in runs.items():
            policy.packing_refused = None if kind == "packed" else "measuring the padded path"
            results.append(timed_step(policy, optimizer, batch, learner))
    rows: dict[str, dict[str, Any]] = {
        kind: {
            "seconds": statistics.median(seconds for seconds, _, _ in results[1:]),
            "unique_tokens_per_s": batch.num_tokens / statistics.median(seconds for seconds, _, _ in results[1:]),
            "peak_mib": max(peak for _, peak, _ in results[1:]),
            "first_loss": results[0][2],
            "each_s": [seconds for seconds, _, _ in results[1:]],
        }
        for kind, results in runs.items()
    }
    lengths = batch.prompt_lengths[batch.completion_groups] + batch.completion_lengths
    return {
        "device": torch.cuda.get_device_name() if device == "cuda" else f"{platform.machine()} CPU",
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
        "arguments": {key: value for key, value in vars(arguments).items() if key != "out"},
        "parameters": sum(parameter.numel() for parameter in policy.parameters()),
        "unique_tokens": batch.num_tokens,
        "row_tokens": int(lengths.sum()),
        "pairs": batch.num_pairs,
        **rows,
        "speedup": rows["padded"]["seconds"] / rows["packed"]["seconds"],
    }


def options() -> argparse.ArgumentParser:
    """The model's and the batch's size."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="JSON file to write")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--activation-checkpointing", default="none", choices=("none", "selective", "full"))
    parser.add_argument("--flex", action="store_true", help="attention of shared prompts by FlexAttention (CUDA)")
    defaults = {"hidden": 256, "intermediate": 704, "layers": 4, "heads": 4, "kv-heads": 2, "vocabulary": 32000}
    shape = {"prompts": 4, "prompt-length": 256, "completions": 4, "shortest": 64, "longest": 256}
    rest = {"micro-batch-tokens": 8192, "vocab-chunk": 4096, "threads": 2, "repeats": 3}
    for name, default in (defaults | shape | rest).items():
        parser.add_argument(f"--{name}", type=int, default=default)
    return parser


def main() -> None:
    """Measure, print and write."""
    arguments = options().parse_args()
    result = run(arguments)
    text = json.dumps(result, indent=2)
    if arguments.out:
        arguments.out.write_text(text + "\n")
    print(text)


if __name__ == "__main__":
    main()
