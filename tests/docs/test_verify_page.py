"""docs/verify.md has every check with what it shows, and the tolerances that are used."""

from __future__ import annotations

import re
from pathlib import Path

from click.testing import CliRunner

from sftx.cli import main
from sftx.verify.findings import CHECKS

PAGE = (Path(__file__).parents[2] / "docs" / "verify.md").read_text(encoding="utf-8")


def test_every_check_has_its_line() -> None:
    lines = re.findall(r"^\| `([\w-]+)` \| ([^|]+) \|", PAGE, re.MULTILINE)
    assert dict(lines) == dict(CHECKS)
    assert [name for name, _ in lines] == list(CHECKS)


def test_the_tolerances_are_those_that_are_used() -> None:
    from sftx.verify.splits import TOLERANCES

    lines = re.findall(r"^\| (\w+) \| ([\de-]+) \| ([\de-]+) \|$", PAGE, re.MULTILINE)
    used = {str(dtype).removeprefix("torch."): allowed for dtype, allowed in TOLERANCES.items()}
    assert {name: (float(loss), float(gradient)) for name, loss, gradient in lines} == used


def test_its_options_exist() -> None:
    text = CliRunner().invoke(main, ["verify", "--help"]).output
    named = set(re.findall(r"(--[a-z][a-z-]+)", PAGE))
    assert {option for option in named if option not in text} == set()
