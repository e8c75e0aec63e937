"""Runs that are assembled but not started, for tests of their parts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from sftx.config.loading import load
from sftx.trainer.session import Session
from sftx.training import assemble


def session_of(model: Path, data: Path, *plugins: str, adapter: str = "lora", **options: Any) -> Session:
    """Assemble a run with chatml, an adapter and these plugins; `options` are dotted names with '__' for the dot."""
    given: dict[str, Any] = {"model": str(model), "data.train": str(data)}
    given |= {"output_dir": str(data.parent / "never-written")}
    given["data.max_overlap"] = 1  # tests may evaluate the rows that they train on
    given |= {name.replace("__", "."): value for name, value in options.items()}
    assignments = [(name, value, f"--set {name}") for name, value in given.items()]
    return assemble(load(None, add=["chatml", adapter, *plugins], assignments=assignments))
