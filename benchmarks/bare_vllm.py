"""vLLM without anything around it, one wave of requests a command: the other side of `generation.py`.

python -m benchmarks.bare_vllm SPEC.json
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path

os.environ |= {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_LOGGING_LEVEL": "ERROR",
    "VLLM_NO_USAGE_STATS": "1",
    "TORCH_COMPILE_DISABLE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
}

from vllm import LLM, SamplingParams


def main() -> None:
    """Answers each line on stdin with the seconds that a wave took."""
    spec = json.loads(Path(sys.argv[1]).read_text())
    llm = LLM(
        spec["model"],
        dtype="float32",
        max_model_len=spec["max_length"],
        max_num_seqs=spec["max_num_seqs"],
        enforce_eager=True,
        kv_cache_memory_bytes=spec["kv_cache_mb"] << 20,
        block_size=32,
        enable_chunked_prefill=False,
        max_num_batched_tokens=4096,
        seed=0,
    )
    for _ in sys.stdin:
        params = [
            SamplingParams(temperature=1.0, max_tokens=spec["max_tokens"], seed=seed, logprobs=0)
            for seed in range(len(spec["prompts"]))
        ]
        prompts = [{"prompt_token_ids": prompt} for prompt in spec["prompts"]]
        start = time.perf_counter()
        llm.generate(prompts, params, use_tqdm=False)
        print("answer", time.perf_counter() - start, flush=True)


if __name__ == "__main__":
    main()
