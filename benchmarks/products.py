"""The matrix products of a piece of work, and what they take alone."""

from __future__ import annotations

import time
from collections import Counter
from typing import TYPE_CHECKING, Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

if TYPE_CHECKING:
    from collections.abc import Callable

_aten = torch.ops.aten
_PLACES: dict[Any, int] = {_aten.mm: 0, _aten.bmm: 0, _aten.addmm: 1, _aten.baddbmm: 1}
"""Where among its arguments the first factor stands; the second follows it."""

Layout = tuple[tuple[int, ...], tuple[int, ...], torch.dtype]
"""Of a factor: size, strides, type."""


class Products(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Notes the factors of each matrix product that is computed meanwhile; attention's own kernels are not seen."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.seen: Counter[tuple[Layout, Layout]] = Counter()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Notes one, and computes it."""
        place = _PLACES.get(function.overloadpacket)
        if place is not None:
            left, right = args[place : place + 2]
            self.seen[_layout(left), _layout(right)] += 1
        return function(*args, **(kwargs or {}))


def _layout(factor: torch.Tensor) -> Layout:
    return tuple(factor.shape), factor.stride(), factor.dtype


def products_of(work: Callable[[], object]) -> Callable[[], float]:
    """Does it once; returns what computes the same products with factors of its own and says how many seconds it took.

    Equal products share their factors, and results are written over: nothing is allocated while it is timed.
    """
    with Products() as products:
        work()
    made = []
    for (left, right), count in products.seen.items():
        factors = [torch.empty_strided(size, strides, dtype=dtype).normal_() for size, strides, dtype in (left, right)]
        made.append((*factors, torch.matmul(*factors), count))

    def compute() -> float:
        start = time.perf_counter()
        for left, right, out, count in made:
            for _ in range(count):
                torch.matmul(left, right, out=out)
        return time.perf_counter() - start

    return compute
