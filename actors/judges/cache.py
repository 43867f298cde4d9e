"""Verdicts by the content of their question, so that nothing is judged twice and repeats are identical."""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from actors.judges.verdicts import Verdict

    Ask = Callable[[Mapping[str, str]], Mapping[str, Verdict]]
    """{key: question} -> {key: verdict}, one for each."""

CAPACITY = 200_000
"""Verdicts kept, some hundred bytes each."""


def question_key(*parts: str | int) -> str:
    """Digest of all that a verdict depends on; no two lists of parts share one."""
    digest = hashlib.blake2b(digest_size=16)
    for part in parts:
        data = str(part).encode("utf-8", "surrogatepass")
        digest.update(len(data).to_bytes(8, "big") + data)
    return digest.hexdigest()


class VerdictCache:
    """The latest verdicts, at most `capacity`; the one that was least recently used goes first."""

    def __init__(self, capacity: int = CAPACITY) -> None:
        self._capacity = capacity
        self._verdicts: OrderedDict[str, Verdict] = OrderedDict()
        self.hits = 0
        """Verdicts since the last `start_anew` that were wanted and needed no asking."""

    def __len__(self) -> int:
        return len(self._verdicts)

    def start_anew(self) -> int:
        """Forgets all verdicts; returns how many were wanted again.

        A process that was resumed then asks the same questions together as one that has judged the waves before, and
        gets the same verdicts to the last bit.
        """
        hits, self.hits = self.hits, 0
        self._verdicts.clear()
        return hits

    def resolve(self, questions: Sequence[tuple[str, str]], ask: Ask) -> list[Verdict]:
        """The verdicts of (key, question)s, in order. Those that are not remembered are asked, each once, in one call.

        Args:
            questions: keys of `question_key` and what the judge is asked; equal keys are one question.
            ask: gives the verdicts of those that are new.
        """
        found = {key: self._verdicts[key] for key, _ in questions if key in self._verdicts}
        new = {key: question for key, question in questions if key not in found}
        self.hits += len(questions) - len(new)
        found |= ask(new) if new else {}
        for key, verdict in found.items():
            self._verdicts[key] = verdict
            self._verdicts.move_to_end(key)
        while len(self._verdicts) > self._capacity:
            self._verdicts.popitem(last=False)
        return [found[key] for key, _ in questions]
