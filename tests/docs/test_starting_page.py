"""The commands in docs/starting.md write and print what the page shows."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from click.testing import CliRunner

PAGE = (Path(__file__).parents[2] / "docs" / "starting.md").read_text(encoding="utf-8")
(ROWS,) = re.findall(r"```json\n(.*?)```", PAGE, re.DOTALL)
FIRST, SECOND = re.findall(r"```console\n\$ sftx (.*?)\n(.*?)```", PAGE, re.DOTALL)


def test_the_commands_print_what_the_page_shows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from sftx.cli import main

    monkeypatch.chdir(tmp_path)
    Path("rows.jsonl").write_text(ROWS, encoding="utf-8")
    command, output = FIRST
    done = CliRunner().invoke(main, command.split(), catch_exceptions=False)
    assert done.exit_code == 0, done.output
    assert done.stdout == output
    command, pipe, pattern = SECOND[0].partition(" | grep ")
    done = CliRunner().invoke(main, command.split(), catch_exceptions=False)
    assert pipe
    assert "".join(x for x in done.stdout.splitlines(keepends=True) if pattern.strip("'") in x) == SECOND[1]
