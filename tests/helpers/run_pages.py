"""Run directories written by hand, and a parser of the pages that are made from them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

from click.testing import CliRunner, Result

from sftx.config import run_file
from sftx.inspection.run_report.run_record import read_run
from sftx.inspection.run_report.write_report import page_data


class Page(HTMLParser):
    """The elements of a page, and the text of its scripts and styles."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.inline: list[tuple[str, dict[str, str | None], str]] = []
        self.text = path.read_text(encoding="utf-8")
        self.feed(self.text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        if self.elements and self.elements[-1][0] in ("script", "style") and data.strip():
            self.inline.append((*self.elements[-1], data))

    @property
    def data(self) -> Any:
        (text,) = [text for _, attributes, text in self.inline if attributes.get("id") == "data"]
        return json.loads(text)

    def only(self, tag: str) -> str:
        (text,) = [text for of, attributes, text in self.inline if of == tag and not attributes]
        return text


def step(number: int, **values: Any) -> dict[str, Any]:
    usual = {"loss": 2.0 / number, "grad_norm": 1.0, "learning_rate": 1e-3, "tokens_per_second": 50.0}
    more = {"num_steps": 4, "num_label_tokens": 10, "seconds": 6.0, "peak_bytes": 10**9 + number, "epoch": number / 4}
    return {"event": "step", "step": number, **usual, **more, **values}


def lines(values: Sequence[Any]) -> str:
    return "".join(json.dumps(one) + "\n" for one in values)


def write_run(path: Path, *, metrics: str | None = None, config: Any = None, **files: Any) -> Path:
    """Write a run directory; `files` are JSON values by the names of files without their suffix."""
    path.mkdir(parents=True)
    run_file.write({"model": "m", "plugins": {"lora": {"r": 8}}} if config is None else config, path / "run.yaml")
    evaluations = [{"event": "evaluate", "step": n, "loss": 1.0 - n / 8, "seconds": 1.0} for n in (0, 4)]
    usual = lines([evaluations[0], *map(step, range(1, 5)), evaluations[1]])
    (path / "metrics.jsonl").write_text(usual if metrics is None else metrics, encoding="utf-8")
    for name, values in files.items():
        (path / f"{name}.json").write_text(json.dumps(values), encoding="utf-8")
    return path


def as_json(runs: Sequence[Path]) -> Any:
    """Return the data of the page of these runs."""
    return json.loads(json.dumps(page_data([read_run(run) for run in runs]), allow_nan=False))


def sftx(*arguments: Any) -> Result:
    from sftx.cli import main

    return CliRunner().invoke(main, ["report", *map(str, arguments)], catch_exceptions=False)
