"""Peak memory of token log-probs, forward and backward: chunked over the vocabulary against whole logits.

    python -m benchmarks.logprob_memory [--tokens 8192] [--vocabulary 32000] [--hidden 512] [--repeats 3]

Each measurement is a process of its own, the two kinds in turn. Memory is the process's highest resident set during the
step minus its resident set just before, with inputs already in memory. Linux only. Accepted: ours under a quarter.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time

from benchmarks.resident import resident, settle

ACCEPTED_RATIO = 0.25


def measure(kind: str, tokens: int, vocabulary: int, hidden_size: int, vocab_chunk: int) -> dict[str, float]:
    """One forward and backward; returns peak MiB and seconds."""
    import torch
    import torch.nn.functional as F

    from learners.logprobs import ChunkedLogprobs

    torch.manual_seed(0)
    hidden = torch.randn(tokens, hidden_size, requires_grad=True)
    weight = (torch.randn(vocabulary, hidden_size) / hidden_size**0.5).requires_grad_()
    targets = torch.randint(0, vocabulary, (tokens,))
    (hidden[:64] @ weight[:64].T).sum().backward()  # threads and buffers of the matrix product exist from here on
    hidden.grad = weight.grad = None
    before, start = settle(), time.perf_counter()
    if kind == "chunked":
        logprobs = ChunkedLogprobs.apply(hidden, weight, None, targets, vocab_chunk, False, 0)[0]  # type: ignore[no-untyped-call]
    else:
        logprobs = F.linear(hidden, weight).log_softmax(-1).gather(1, targets[:, None])[:, 0]
    logprobs.sum().backward()
    return {
        "peak_mib": resident("VmHWM") - before,
        "seconds": time.perf_counter() - start,
        "sum": float(logprobs.detach().double().sum()),
    }


def main() -> int:
    """Compare both kinds; the exit code says whether the ratio is accepted."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--vocabulary", type=int, default=32000)
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--vocab-chunk", type=int, default=4096)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--kind", choices=("chunked", "whole"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.kind:
        shape = (arguments.tokens, arguments.vocabulary, arguments.hidden, arguments.vocab_chunk)
        print(json.dumps(measure(arguments.kind, *shape)))
        return 0
    results: dict[str, list[dict[str, float]]] = {"chunked": [], "whole": []}
    for _ in range(arguments.repeats):
        for kind, runs in results.items():
            command = [sys.executable, "-m", "benchmarks.logprob_memory", *sys.argv[1:], "--kind", kind]
            output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
            runs.append(json.loads(output))
    print(f"{arguments.tokens} tokens x {arguments.vocabulary} vocabulary, hidden {arguments.hidden}, fp32")
    print(f"{'':10}{'peak MiB':>10}{'seconds':>10}   each run")
    for kind, runs in results.items():
        peaks, seconds = ([run[key] for run in runs] for key in ("peak_mib", "seconds"))
        each = ", ".join(f"{peak:.0f}" for peak in peaks)
        print(f"{kind:10}{statistics.median(peaks):10.0f}{statistics.median(seconds):10.2f}   {each}")
    difference = abs(results["chunked"][0]["sum"] / results["whole"][0]["sum"] - 1)
    ratio = max(run["peak_mib"] for run in results["chunked"]) / min(run["peak_mib"] for run in results["whole"])
    accepted = ratio < ACCEPTED_RATIO
    print(f"worst ratio {ratio:.3f} ({'accepted' if accepted else 'too much'}: under {ACCEPTED_RATIO})")
    print(f"sums of log-probs differ by {difference:.1e}, relative")
    return 0 if accepted else 1


if __name__ == "__main__":
    raise SystemExit(main())
