"""An SQLite connection that several threads of a process share."""

from __future__ import annotations

import sqlite3
from threading import RLock
from typing import Any


class SharedConnection(sqlite3.Connection):
    """For threads that take turns: a statement waits until the transaction of another thread is over."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.turn = RLock()
        """Held by a thread for as long as its transaction lasts."""

    def execute(self, *args: Any) -> sqlite3.Cursor:
        """As its parent's, in turn."""
        with self.turn:
            return super().execute(*args)

    def executemany(self, *args: Any) -> sqlite3.Cursor:
        """As its parent's, in turn."""
        with self.turn:
            return super().executemany(*args)
