"""Which library computes a CPU's float32 matrix products."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch

_SETTINGS: Any = torch.backends.mkldnn
_ROUNDED = "bf16"
_TOLERANCE = 1e-5
"""Relative norm of a product's error. float32 leaves 5e-7, bfloat16 2e-3."""
_SHAPES = ((256, 256, 256), (64, 1024, 96), (17, 40, 2000))


def use_fastest_products() -> bool:
    """For this process: oneDNN's products where they are float32's, whether they are; else torch's own choice, MKL.

    MKL has no kernels for AVX-512 on other processors than Intel's: on an AMD EPYC oneDNN takes less than half of its
    time for large products, and 10 us more for tiny ones. torch hands float32 to oneDNN only where oneDNN may round
    the factors to bfloat16. It does so where there are matrix tiles (AMX), which is not what `dtype: float32` promises;
    elsewhere it has no such kernel. No documentation says that, so it is tried.
    """
    if is_exact := not torch.cuda.is_available() and _is_exact():
        _SETTINGS.matmul.fp32_precision = _ROUNDED
    return is_exact


@cache
def _is_exact() -> bool:
    before = _SETTINGS.matmul.fp32_precision
    _SETTINGS.matmul.fp32_precision = _ROUNDED
    try:
        return all(_error(*shape) <= _TOLERANCE for shape in _SHAPES)
    finally:
        _SETTINGS.matmul.fp32_precision = before


def _error(rows: int, inner: int, columns: int) -> float:
    """Of a product of random factors, as a layer has it."""
    random = torch.Generator().manual_seed(0)
    left = torch.randn(rows, inner, generator=random)
    right = torch.randn(columns, inner, generator=random)
    exact = left.double() @ right.double().T
    return float((torch.nn.functional.linear(left, right) - exact).norm() / exact.norm())
