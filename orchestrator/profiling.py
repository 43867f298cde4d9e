"""`<run>/profile.jsonl`: what each actor of a run did when; `agon profile` draws it.

One JSON object a line: `actor`, `role`, `since` and `until`, between which it was there, and `spans`, each [kind of
work, start, seconds]; times are seconds since the epoch. It is a help for people and nothing counts on it: spans of an
actor that died before it was asked are missing, and one that came in between counts as there since the last time.
"""

from __future__ import annotations

import json
import time
from typing import TYPE_CHECKING, Any

import ray

from orchestrator.files import cut_torn_line, dump_json
from orchestrator.remote import DEATHS
from orchestrator.waits import acquainted

if TYPE_CHECKING:
    from pathlib import Path

    from orchestrator.spans import Span
    from orchestrator.waits import Peer

FILE_NAME = "profile.jsonl"
_ANSWER_S = 1.0
"""Who does not answer within so long is asked again the next time."""


class Profile:
    """Keeps what the actors of this process did.

    Args:
        run_dir: the run folder; it exists.
    """

    def __init__(self, run_dir: Path) -> None:
        self._path = run_dir / FILE_NAME
        if self._path.exists():
            cut_torn_line(self._path)
        self._owed: dict[Any, Peer] = {}
        self._noted = time.time()
        """Until when."""

    def note(self) -> None:
        """Asks every actor that is up for its spans, and writes them."""
        busy = {peer.name for peer in self._owed.values()}
        for peer in acquainted():
            if peer.where is not None and peer.name not in busy:
                self._owed[peer.actor.take_spans.remote()] = peer
        if not self._owed:
            return
        answered, _ = ray.wait(list(self._owed), num_returns=len(self._owed), timeout=_ANSWER_S)
        since, self._noted = self._noted, time.time()
        lines = [self._line(self._owed.pop(ref), ref, since) for ref in answered]
        with self._path.open("a", encoding="utf-8") as file:
            file.writelines(line for line in lines if line)

    def _line(self, peer: Peer, ref: Any, since: float) -> str:
        try:
            spans: list[Span] = ray.get(ref)
        except DEATHS:
            return ""  # whoever waits for its work notices; here nothing is lost but a picture
        rows = [[span.what, span.start, span.seconds] for span in spans]
        told = {"actor": peer.name, "role": peer.role, "since": since, "until": self._noted, "spans": rows}
        return dump_json(told) + "\n"


def read_profile(run_dir: Path) -> list[dict[str, Any]]:
    """The lines of a run's profile, oldest first; none where nothing was noted. A torn last line is left out."""
    path = run_dir / FILE_NAME
    lines = path.read_text(encoding="utf-8").split("\n")[:-1] if path.exists() else []
    return [json.loads(line) for line in lines]
