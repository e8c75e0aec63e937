"""docs/observers.md names every option, curve and event, and no others."""

from __future__ import annotations

import dataclasses
import re
import tomllib
from pathlib import Path

from sftx.events import EvalReport, StepReport
from sftx.types import Observer
from sftx_plugins.observers._tracking import evaluation_values, step_values
from sftx_plugins.observers.mlflow import MLflow
from sftx_plugins.observers.tensorboard import TensorBoard
from sftx_plugins.observers.wandb import WeightsAndBiases

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "observers.md").read_text(encoding="utf-8")
PLUGINS = {"tensorboard": TensorBoard, "wandb": WeightsAndBiases, "mlflow": MLflow}


def first_column(heading: str) -> list[str]:
    """Return the words in backticks in the first column of the table with that heading."""
    table = re.search(rf"^\| {heading} \|.*\n\| ---.*\n((?:\|.*\n)+)", PAGE, re.MULTILINE)
    assert table, heading
    return re.findall(r"`([^`]+)`", " ".join(line.split(" | ")[0] for line in table[1].splitlines()))


def test_every_option_has_its_line() -> None:
    options = [f"{name}.{field.name}" for name, cls in PLUGINS.items() for field in dataclasses.fields(cls)]
    assert sorted(first_column("option")) == sorted(options)


def test_every_plugin_has_its_line_and_its_extra() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert first_column("plugin") == list(PLUGINS)
    for name, cls in PLUGINS.items():
        assert f"`sftx[{name}]`" in PAGE
        assert project["optional-dependencies"][name]
        assert project["entry-points"]["sftx.plugins"][name] == f"sftx_plugins.observers.{name}:{cls.__name__}"


def test_the_page_names_the_curves_that_are_written() -> None:
    step = StepReport(1, 1, 1.0, 1.0, 1.0, 1.0, 1, 1, 1.0, 1, {"NAME": 1.0})
    evaluation = EvalReport(1, {"loss": 1.0, "NAME": 1.0})
    written = step_values(step).keys() | evaluation_values(evaluation).keys() | {"summary/NAME"}
    assert set(first_column("name")) == written


def test_every_event_is_named() -> None:
    own = PAGE.partition("## Your own")[2]
    events = [name for name in vars(Observer) if name.startswith("on_") or name == "close"]
    assert all(f"`{name}`" in own for name in events)
    for name in PLUGINS:
        assert len((ROOT / f"plugins/sftx_plugins/observers/{name}.py").read_text(encoding="utf-8").splitlines()) < 200
