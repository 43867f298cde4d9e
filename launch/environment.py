"""What an actor's process has in its environment before its libraries are loaded."""

from __future__ import annotations

QUIET = {"RAY_USAGE_STATS_ENABLED": "0", "VLLM_NO_USAGE_STATS": "1", "TOKENIZERS_PARALLELISM": "false"}

LARGE_PAGES = {"GLIBC_TUNABLES": "glibc.malloc.hugetlb=1:glibc.cpu.x86_non_temporal_threshold=0x80000"}
"""For glibc 2.35 or later, whose weights are read and written from end to end: memory in pages of 2 MB where the system
has them on demand, and copies of half a MB or more past the cache. glibc would fill the cache that all cores share."""

KEEPS_MEMORY = {
    **LARGE_PAGES,
    **dict.fromkeys(("MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_"), str(1 << 30)),
    "MALLOC_ARENA_MAX": "1",  # an actor's calls run in threads, whose own arenas hold no more than 64 MiB
}
"""For glibc: a step's large temporaries stay with the process. Given back to the system and cleared anew each time they
cost a tenth to a third of a learner's step, and a twentieth of an engine's."""


def threads(count: int) -> dict[str, str]:
    """Sizes of thread pools."""
    return {"OMP_NUM_THREADS": str(count), "MKL_NUM_THREADS": str(count)}
