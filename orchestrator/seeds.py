"""Seeds derived by name, so that what is drawn does not depend on the order of drawing."""

from __future__ import annotations

import hashlib


def derive_seed(seed: int, *parts: str | int) -> int:
    """A seed in [0, 2**31) for one purpose, stable across machines and Python versions."""
    text = "/".join(str(part) for part in (seed, *parts))
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big") % 2**31
