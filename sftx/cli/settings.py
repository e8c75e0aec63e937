"""`--set NAME=VALUE`: any option of a run file, by its dotted name."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import click

from sftx.config.options import SECTIONS
from sftx.config.run_file import parse_value


def parse(settings: Sequence[str]) -> list[tuple[str, Any, str]]:
    """(dotted name, JSON value, what was typed) of each setting. Raises BadParameter."""
    given: list[tuple[str, Any, str]] = []
    for setting in settings:
        name, equals, text = setting.partition("=")
        if not (name and equals) or name.strip() != name or ("." not in name and name not in SECTIONS):
            raise click.BadParameter(
                f"{setting!r} is not of the form PLUGIN.OPTION=VALUE or SECTION.OPTION=VALUE, such as lora.r=32 or "
                "train.seed=1",
                param_hint="--set",
            )
        given.append((name, parse_value(text), f"--set {setting}"))
    return given
