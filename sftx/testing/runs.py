"""A run of two steps on the tiny model, by the names of installed plugins: all that `sftx run` does, in a second."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from sftx.assembly.registry import activate
from sftx.assembly.stages import make
from sftx.config.loading import load
from sftx.events import Result
from sftx.model import tiny
from sftx.run import run
from sftx.testing.kit import CONVERSATIONS, Kit
from sftx.types import Record


def run_tiny(
    names: Sequence[str],
    directory: Path,
    *,
    rows: Sequence[Record] = (),
    model: Path | None = None,
    settings: Mapping[str, Any] | None = None,
) -> Result:
    """Two steps with these plugins on `rows`; the run lies in `directory`/run. Raises SftxError as `sftx run` does.

    A plugin that fills the parser brings its own samples when no rows are given. Where none fills the template,
    ChatML does. The rows are held out too. `settings`: dotted names such as `lora.r` or `train.max_steps`.
    """
    given = {
        "model": str(model or directory / "model"),
        "data.train": [str(directory / "rows.jsonl")],
        "data.eval": [str(directory / "rows.jsonl")],
        "output_dir": str(directory / "run"),
        "train.max_steps": 2,
        "train.per_device_train_batch_size": 2,
        "train.use_cpu": True,
        "generation.max_rows": 2,
        "generation.max_new_tokens": 4,
        **(settings or {}),
    }
    assignments = [(name, value, f"{name}={value}") for name, value in given.items()]
    loaded = load(None, add=names, assignments=assignments)
    assembly = activate(loaded)
    templates = assembly.providers("sftx_template")
    if not templates:
        loaded = load(None, add=[*names, "chatml"], assignments=assignments)
    directory.mkdir(parents=True, exist_ok=True)
    if model is None:
        _write_model(directory / "model", templates[0].plugin if templates else None)
    own = [active.plugin for active in assembly.providers("sftx_parser") if active.info.name in names]
    rows = rows or [record for plugin in own for record in _samples(plugin)] or _messages()
    (directory / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return run(loaded, name="tiny")


def _write_model(place: Path, template: object) -> None:
    """The tiny model beside a tokenizer that has the control tokens of the plugin's template."""
    shutil.copytree(tiny.model_dir(), place)
    Kit(template).tokenizer.save_pretrained(place)


def _samples(plugin: object) -> Sequence[Record]:
    samples: Sequence[Record] = make(plugin, "sftx_parser").samples
    return samples


def _messages() -> list[Record]:
    return [
        {"messages": [{"role": turn.role, "content": turn.content} for turn in conversation.messages]}
        for conversation in CONVERSATIONS
    ]
