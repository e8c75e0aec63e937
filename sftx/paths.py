"""Directories and files whose places are fixed. Imports nothing of sftx."""

from __future__ import annotations

from pathlib import Path
from typing import Final

DEMO_RUN_FILE: Final = Path(__file__).parent / "demo" / "run.yaml"
"""The run file of `sftx run` when it is given neither a run file nor data; the demo's rows are beside it."""
