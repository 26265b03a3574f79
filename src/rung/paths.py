"""Where Rung keeps what it can make again."""

from __future__ import annotations

import os
from pathlib import Path


def cache_folder() -> Path:
    """`RUNG_CACHE`, or `rung` below `XDG_CACHE_HOME`, or `~/.cache/rung`."""
    if given := os.environ.get("RUNG_CACHE"):
        return Path(given)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "rung"
