"""docs/inspect.md is true: its commands work, its checks are those of the code, its pictures are there."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
from click.testing import CliRunner

DOCS = Path(__file__).parents[2] / "docs"
PAGE = (DOCS / "inspect.md").read_text(encoding="utf-8")
COMMANDS = [line for block in re.findall(r"^```sh\n(.*?)^```$", PAGE, flags=re.M | re.S) for line in block.splitlines()]


@pytest.mark.usefixtures("real_model_dir")
@pytest.mark.parametrize("command", COMMANDS)
def test_commands_work_as_they_are_written(command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from sftx.cli import main

    monkeypatch.chdir(tmp_path)
    program, *arguments = shlex.split(command)
    assert program == "sftx"
    done = CliRunner().invoke(main, arguments)
    assert done.exit_code == 0, done.output
    written = {name for name in ("rows.json", "rows.html") if name in arguments}
    assert {path.name for path in tmp_path.iterdir()} == written
    assert done.stdout or written


def test_every_check_stands_on_the_page() -> None:
    from sftx.inspection.diagnosis.diagnose import CHECKS

    assert re.findall(r"^\| `([\w-]+)` \|", PAGE, flags=re.M) == [check.__name__.replace("_", "-") for check in CHECKS]


def test_its_fields_are_those_of_the_code() -> None:
    from dataclasses import fields

    from sftx.inspection.token_report.explained_rows import ExplainedExample, ExplainedRow, TokenReport
    from sftx.inspection.token_report.explained_tokens import ExplainedToken

    named = set(re.findall(r"`(\w+)`", PAGE.partition("### JSON")[2].partition("\n## ")[0]))
    for report in (TokenReport, ExplainedRow, ExplainedExample, ExplainedToken):
        assert {field.name for field in fields(report)} <= named


def test_its_pictures_are_there_and_small() -> None:
    pictures = re.findall(r"!\[.+?\]\((.+?)\)", PAGE)
    assert len(pictures) == 3
    for picture in pictures:
        data = (DOCS / picture).read_bytes()
        assert data.startswith(b"\x89PNG")
        assert len(data) < 200_000
