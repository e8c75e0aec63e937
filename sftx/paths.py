"""Directories and files whose places are fixed. Imports nothing of sftx."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import Final

import platformdirs

DEMO_RUN_FILE: Final = Path(__file__).parent / "demo" / "run.yaml"
"""The run file of `sftx run` when it is given neither a run file nor data; the demo's rows are beside it."""


_ABSENT: Final = (errno.ENOENT, errno.ENOTDIR, errno.EBADF, errno.ELOOP)
_ABSENT_ON_WINDOWS: Final = (21, 123, 1921)
"""A drive that is not ready, a name that no file can have, a link that leads nowhere."""


def exists(path: Path) -> bool:
    """Return whether the path leads to something. Raises OSError where that cannot be found out.

    So does `Path.exists` before Python 3.14; from then on it says no where the name is too long, or where a directory
    may not be entered.
    """
    try:
        path.stat()
    except OSError as error:
        if error.errno in _ABSENT or getattr(error, "winerror", None) in _ABSENT_ON_WINDOWS:
            return False
        raise
    return True


def cache_dir() -> Path:
    """Return the directory of converted models and encoded rows: $SFTX_CACHE, or sftx in the user's cache directory."""
    if directory := os.environ.get("SFTX_CACHE"):
        return Path(directory).expanduser()
    return platformdirs.user_cache_path("sftx")
