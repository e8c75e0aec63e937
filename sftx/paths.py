"""Directories and files whose places are fixed. Imports nothing of sftx."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Final

import platformdirs

DEMO_RUN_FILE: Final = Path(__file__).parent / "demo" / "run.yaml"
"""The run file of `sftx run` when it is given neither a run file nor data; the demo's rows are beside it."""


def cache_dir() -> Path:
    """Return the directory of converted models and encoded rows: $SFTX_CACHE, or sftx in the user's cache directory."""
    if directory := os.environ.get("SFTX_CACHE"):
        return Path(directory).expanduser()
    return platformdirs.user_cache_path("sftx")
