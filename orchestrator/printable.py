"""Text of others on a terminal: what could move the cursor, change colours or turn lines around is written out.

Prompts, completions, judges' words and names in configurations are data and may hold anything. They are kept as they
are, and pass through `printable` wherever they are shown.
"""

from __future__ import annotations

import re

_UNSAFE = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")
"""Control characters other than line feed and tab, signs that set the direction of writing, halves of surrogate pairs.
All are below 2**16, so that four digits name them."""


def printable(text: str) -> str:
    r"""`text` with such characters as ``\u001b``, which JSON reads back; all others are left as they are."""
    return _UNSAFE.sub(lambda match: f"\\u{ord(match[0]):04x}", text)
