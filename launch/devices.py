"""What devices can do, to reckon with before there is one.

GPUs as NVIDIA's data sheets have them (dense, without sparsity). A core is what those of this project's benchmarks
reach, within a factor of two.
"""

from __future__ import annotations

from dataclasses import dataclass

from launch.resources import GIB
from orchestrator.errors import ConfigError

TERA, GIGA = 10**12, 10**9


@dataclass(frozen=True, kw_only=True, slots=True)
class Device:
    """One of them.

    Example: ``Device(name="H100", memory=80 * GIB, flops=989e12, bandwidth=3.35e12)``
    """

    name: str
    memory: int
    """Bytes; 0 of a core, which has none of its own."""
    flops: float
    """Of matrix products a second, in bfloat16; in float32 a GPU is reckoned half as fast."""
    bandwidth: float
    """Of its memory, bytes a second."""


GPUS = {
    gpu.name.lower(): gpu
    for gpu in (
        Device(name="A100-40GB", memory=40 * GIB, flops=312 * TERA, bandwidth=1.555 * TERA),
        Device(name="A100-80GB", memory=80 * GIB, flops=312 * TERA, bandwidth=2.039 * TERA),
        Device(name="L40S", memory=48 * GIB, flops=362 * TERA, bandwidth=0.864 * TERA),
        Device(name="RTX4090", memory=24 * GIB, flops=165 * TERA, bandwidth=1.008 * TERA),
        Device(name="H100", memory=80 * GIB, flops=989 * TERA, bandwidth=3.35 * TERA),
        Device(name="H200", memory=141 * GIB, flops=989 * TERA, bandwidth=4.8 * TERA),
        Device(name="B200", memory=180 * GIB, flops=2250 * TERA, bandwidth=7.7 * TERA),
    )
}
CORE = Device(name="CPU core", memory=0, flops=80 * GIGA, bandwidth=10 * GIGA)


def find_gpu(name: str) -> Device:
    """A GPU by its name. Raises ConfigError: nothing is known of it."""
    if (gpu := GPUS.get(name.lower())) is None:
        known = ", ".join(one.name for one in GPUS.values())
        raise ConfigError(f"--gpu {name}: nothing is known of it; known are {known}: take the one most like it")
    return gpu
