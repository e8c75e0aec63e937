"""Helpers of the bench's tests: tiny cases of each operation, and the command run in this process."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from click.testing import CliRunner, Result

from sftx.cli import bench as cli
from sftx_kernels.bench import devices
from sftx_kernels.bench.cases import Shape
from sftx_kernels.bench.operations import (
    CrossEntropyShape,
    GroupedLoraShape,
    LinearCrossEntropyShape,
    LinearKLShape,
    LoraShape,
    RmsNormShape,
    RotaryShape,
    SwigluShape,
    shape_entry,
)

CPU = torch.device("cpu")
SHAPES: list[Shape] = [
    CrossEntropyShape(24, 130),
    LinearCrossEntropyShape(24, 16, 130),
    LinearCrossEntropyShape(24, 16, 130, trained=True, logits="zipf"),
    LoraShape(24, 32, (16,), rank=4),
    LoraShape(24, 32, (16, 8, 8), rank=4),
    GroupedLoraShape(24, 5, 32, 16, rank=4),
    RmsNormShape(24, 40),
    SwigluShape(24, 40),
    RotaryShape(24, 3, 1, 8),
    LinearKLShape(24, 16, 20, 130),
    LinearKLShape(24, 16, 20, 130, "jsd", trained=True),
]
PEAKS = devices.Peaks({"fp32": 1e11, "bf16": 1e11, "fp16": 1e11, "fp64": 1e11}, 1e10, 0, "made up")


def shapes_file(directory: Path, *shapes: Shape) -> Path:
    path = directory / "shapes.json"
    path.write_text(json.dumps([shape_entry(shape) for shape in shapes]))
    return path


def bench(*arguments: object) -> Result:
    return CliRunner().invoke(cli.command, [str(argument) for argument in arguments])


def rows_of(path: Path) -> dict[str, dict[str, Any]]:
    """Return the rows of a result by provider."""
    return {row["provider"]: row for row in json.loads(path.read_text())["rows"]}
