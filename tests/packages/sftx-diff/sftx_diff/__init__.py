"""The command `sftx diff`: the options in which two runs differ, from their run.yaml."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
import yaml

from sftx import ConfigError

_RUN = click.Path(exists=True, file_okay=False, path_type=Path)


@click.command()
@click.argument("first", type=_RUN)
@click.argument("second", type=_RUN)
def command(first: Path, second: Path) -> None:
    """Print the options in which the runs FIRST and SECOND differ."""
    a, b = options(first), options(second)
    for name in sorted(a.keys() | b.keys()):
        if a.get(name) != b.get(name):
            click.echo(f"{name}: {a.get(name)} -> {b.get(name)}")


def options(run: Path) -> dict[str, Any]:
    """Return the options of a run under their dotted names. Raises ConfigError."""
    file = run / "run.yaml"
    if not file.is_file():
        raise ConfigError(f"{run}: is no run directory, it has no run.yaml")
    return dict(_flat(yaml.safe_load(file.read_text(encoding="utf-8")), ""))


def _flat(values: dict[str, Any], prefix: str) -> Iterator[tuple[str, Any]]:
    for name, value in values.items():
        if isinstance(value, dict) and value:
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value
