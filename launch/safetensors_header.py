"""The table that a safetensors file begins with: read whole and strictly before anything is loaded from the file.

https://huggingface.co/docs/safetensors#format: eight bytes of length, that many bytes of JSON, then the tensors' bytes
without gap or overlap.
"""

from __future__ import annotations

import json
import math
from typing import TYPE_CHECKING, Any

from orchestrator.errors import ModelError

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

MAX_HEADER_BYTES = 100 << 20
"""The format's own limit."""
_DTYPE_BITS = {
    "F64": 64,
    "F32": 32,
    "F16": 16,
    "BF16": 16,
    "I64": 64,
    "I32": 32,
    "I16": 16,
    "I8": 8,
    "U8": 8,
    "BOOL": 8,
}
"""Of the format's dtypes, those that have a size in every version; the sizes of others are not checked."""


def read_header(path: Path) -> dict[str, list[int]]:
    """Names and shapes of the tensors in a safetensors file. Raises ModelError when it is damaged or cut short."""
    size = path.stat().st_size
    with path.open("rb") as file:
        start = file.read(8)
        length = int.from_bytes(start, "little")
        if start == b"version ":
            raise ModelError(f"{path}: a git-lfs pointer instead of the weights: run git lfs pull in that folder")
        if len(start) < 8 or length > min(size - 8, MAX_HEADER_BYTES):
            raise ModelError(f"{path}: not a safetensors file, or cut short ({size} bytes): fetch it again")
        try:
            header = json.loads(file.read(length))
            header.pop("__metadata__", None)
            spans = sorted(_span(name, tensor) for name, tensor in header.items())
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
            raise ModelError(f"{path}: its safetensors header is damaged ({error!r}): fetch it again") from error
    end = 8 + length
    for begin, stop, name in spans:
        if 8 + length + begin != end:
            raise ModelError(f"{path}: its header leaves a gap or an overlap before {name!r}: fetch it again")
        end = 8 + length + stop
    if end != size:
        raise ModelError(f"{path}: {size} bytes, but its header promises {end}: cut short; fetch it again")
    return {name: tensor["shape"] for name, tensor in header.items()}


def _span(name: str, tensor: Mapping[str, Any]) -> tuple[int, int, str]:
    """Where the tensor's bytes begin and end. Raises ValueError, TypeError or KeyError where that cannot be."""
    start, stop = tensor["data_offsets"]
    shape = tensor["shape"]
    figures = [start, stop, *shape]
    if not isinstance(shape, list) or any(type(figure) is not int or figure < 0 for figure in figures):
        raise ValueError(f"{name!r} has the offsets {start!r}, {stop!r} and the shape {shape!r}")
    width = _DTYPE_BITS.get(tensor["dtype"])
    if stop < start or (width is not None and 8 * (stop - start) != width * math.prod(shape)):
        raise ValueError(f"{name!r} of shape {shape} and dtype {tensor['dtype']!r} has {stop - start} bytes")
    return start, stop, name
