"""Models that are made here, once for each user: whole or absent whatever dies and however many processes make one."""

from __future__ import annotations

import os
import shutil
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable


def default_cache() -> Path:
    """``$XDG_CACHE_HOME/agon/models``, or the same under ``~/.cache``."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "agon" / "models"


def made_once(name: str, make: Callable[[Path], None], *, cache: Path | None = None) -> Path:
    """The folder `name` of the cache, made on first use.

    Args:
        name: changes with everything that the model is made from.
        make: writes the model into a folder that does not exist yet.
        cache: where models are kept; None: `default_cache`.
    """
    folder = (cache or default_cache()) / name
    if folder.is_dir():
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    aside = Path(tempfile.mkdtemp(prefix=".unfinished-", dir=folder.parent))
    try:
        make(aside / name)
        (aside / name).rename(folder)
    except OSError:
        if not folder.is_dir():  # else another process was faster, and its model is as good
            raise
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    return folder
