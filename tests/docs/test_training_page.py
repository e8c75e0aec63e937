"""Options, choices and files that docs/training.md names exist, and it names all of them."""

from __future__ import annotations

import dataclasses
import re
import signal
from pathlib import Path

import pytest

from optimizing import optimizer_stage
from sftx.config.named_plugins import PLUGIN_OPTIONS, PluginOption
from sftx.config.options import GenerationConfig, TrainConfig
from sftx.distributed.signals import Stop

PAGE = (Path(__file__).parents[2] / "docs" / "training.md").read_text(encoding="utf-8")
OPTIONS = {field.name for config in (TrainConfig, GenerationConfig) for field in dataclasses.fields(config)}


def tables() -> list[list[list[str]]]:
    """Return the rows of cells of each table, without the line below the heading."""
    found = re.findall(r"(?:^\|.*\n)+", PAGE, re.MULTILINE)
    return [
        [
            [cell.strip() for cell in line.strip("|\n").split(" | ")]
            for line in table.splitlines()
            if "| ---" not in line
        ]
        for table in found
    ]


def column(heading: str) -> list[str]:
    """Return the names in backticks in the first column of the tables with that heading."""
    cells = [row[0] for table in tables() if table[0][0] == heading for row in table[1:]]
    assert cells, heading
    return re.findall(r"`([^`]+)`", " ".join(cells))


def test_every_option_of_a_table_exists() -> None:
    assert {name for name in column("option") if not name.startswith("--")} <= OPTIONS


@pytest.mark.parametrize("option", PLUGIN_OPTIONS, ids=lambda option: option.name)
def test_every_built_in_plugin_of_an_option_has_its_line(option: PluginOption) -> None:
    assert sorted(column(f"`{option.name}`")) == sorted(option.built_in)


def test_the_memory_of_optimizers_is_what_they_declare() -> None:
    rows = next(table[1:] for table in tables() if table[0][0] == "`optim`")
    for names, _, num_bytes in rows:
        for name in re.findall(r"`(\w+)`", names):
            optimizer = optimizer_stage(TrainConfig(optim=name))
            weight_and_gradient = 2 * (2 if optimizer.bf16_weights else 4)
            assert int(num_bytes) == round(weight_and_gradient + optimizer.state_bytes), name


def test_every_metric_and_evaluator_has_its_line() -> None:
    from sftx.assembly.entry_points import discover

    metrics = {info.name for info in discover() if info.package == "sftx" and "sftx_plugins" in info.value}
    named = set(column("plugin"))
    assert named <= metrics
    assert named == {"exact-match", "rouge", "bleu", "json-valid", "multiple-choice", "lm-eval"}


def test_exit_codes_are_those_of_the_signals() -> None:
    codes = next(row for table in tables() if table[0][0] == "exit code" for row in table if "SIGHUP" in row[1])
    numbers = [int(number) for number in codes[0].split(", ")]
    assert numbers == [
        Stop(number).exit_code for number in (signal.SIGHUP, signal.SIGINT, signal.SIGUSR1, signal.SIGTERM)
    ]


def test_the_files_of_a_checkpoint_are_those_that_are_written() -> None:
    from sftx import atomic_files
    from sftx.checkpoint import layout

    written = {f"{layout.OPTIMIZER}.safetensors", layout.RUN_STATE, layout.TRAINER_STATE, atomic_files.CHECKSUMS}
    assert written | {"adapter_model.safetensors", "model.safetensors"} == set(column("file"))
