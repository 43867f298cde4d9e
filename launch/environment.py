"""What an actor's process has in its environment before its libraries are loaded."""

from __future__ import annotations

QUIET = {"RAY_USAGE_STATS_ENABLED": "0", "VLLM_NO_USAGE_STATS": "1", "TOKENIZERS_PARALLELISM": "false"}

KEEPS_MEMORY = {
    # Pages of 2 MB where the system has them on demand; copies of half a MB or more past the cache, which all cores
    # share and glibc would fill.
    "GLIBC_TUNABLES": "glibc.malloc.hugetlb=1:glibc.cpu.x86_non_temporal_threshold=0x80000",
    **dict.fromkeys(("MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_"), str(1 << 30)),
    "MALLOC_ARENA_MAX": "1",  # an actor's calls run in threads, whose own arenas hold no more than 64 MiB
}
"""For glibc (its tunables from 2.35 on), in actors on CPUs: a step's large temporaries stay with the process. Given
back to the system and cleared anew each time they cost a tenth to a third of a learner's step, and a twentieth of an
engine's."""


def threads(count: int) -> dict[str, str]:
    """Sizes of thread pools."""
    return {"OMP_NUM_THREADS": str(count), "MKL_NUM_THREADS": str(count)}
