"""Fixtures that make a `DatasetView`: of the tiny model, or a copy of it with another tokenizer, and given rows."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

MakeView = Callable[..., Any]
"""`make_view(rows, held_out=..., model=..., plugins=..., **options of data)`: a `DatasetView`."""


def write_rows(path: Path, rows: Sequence[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


@pytest.fixture
def make_view(tmp_path: Path) -> MakeView:
    from sftx.config import loading
    from sftx.inspection.dataset_view import view_dataset

    def make(
        rows: Sequence[dict[str, Any]],
        *,
        held_out: Sequence[dict[str, Any]] = (),
        model: str | Path = "sftx:tiny",
        plugins: Sequence[str] = ("chatml",),
        settings: dict[str, Any] | None = None,
        **options: Any,
    ) -> Any:
        assignments = [
            ("model", str(model), "--model"),
            ("data.train", [write_rows(tmp_path / "rows.jsonl", rows)], ""),
        ]
        if held_out:
            assignments.append(("data.eval", [write_rows(tmp_path / "held.jsonl", held_out)], ""))
        assignments += [(f"data.{name}", value, f"--{name}") for name, value in options.items()]
        assignments += [(name, value, name) for name, value in (settings or {}).items()]
        return view_dataset(loading.load(None, add=plugins, assignments=assignments))

    return make


@pytest.fixture
def make_model(tmp_path: Path) -> Callable[..., Path]:
    """A copy of the tiny model; `change` alters its tokenizer, `options` are written into its config.json."""

    def make(change: Callable[[Any], None] = lambda tokenizer: None, *, called: str = "model", **options: Any) -> Path:
        from sftx.model.names import resolve
        from sftx.model.tiny import make_tokenizer

        directory = Path(shutil.copytree(resolve("sftx:tiny"), tmp_path / called))
        tokenizer = make_tokenizer()
        change(tokenizer)
        for file in directory.glob("*token*"):
            file.unlink()
        for name in ("chat_template.jinja", "generation_config.json"):
            (directory / name).unlink(missing_ok=True)
        tokenizer.save_pretrained(directory)
        config = directory / "config.json"
        config.write_text(json.dumps(json.loads(config.read_text()) | options))
        return directory

    return make
