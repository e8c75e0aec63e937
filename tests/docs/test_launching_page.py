"""The run files in docs/launching.md are launched, and the page shows what the command prints."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
import yaml
from click.testing import CliRunner, Result

from sftx.config.launch_options import launch_names

PAGE = (Path(__file__).parents[2] / "docs" / "launching.md").read_text(encoding="utf-8")
FILES = re.findall(r"```yaml\n(.*?)```", PAGE, re.DOTALL)
(CONSOLE,) = re.findall(r"```console\n(.*?)```", PAGE, re.DOTALL)


def launch(values: str, *arguments: str) -> Result:
    from sftx.cli import main

    Path("run.yaml").write_text(values, encoding="utf-8")
    Path("rows.jsonl").write_text('{"prompt": "a", "completion": "b"}\n', encoding="utf-8")
    return CliRunner().invoke(main, arguments, catch_exceptions=False)


def test_the_run_files_are_launched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    command, _, output = CONSOLE.removeprefix("$ sftx ").partition("\n")
    assert launch(FILES[0], *shlex.split(command)).stdout == output
    run = yaml.safe_load(FILES[0])
    for text, tool in zip(FILES[1:], ("skypilot", "kubernetes"), strict=True):
        merged = yaml.safe_dump(run | yaml.safe_load(text))
        assert launch(merged, "run", "run.yaml", "--launch", tool).exit_code == 0


def test_the_table_has_every_option() -> None:
    table = PAGE[PAGE.index("| `launch:` |") : PAGE.index("## A job that")]
    options = {name.removeprefix("launch.") for name in launch_names() if name.count(".") == 1}
    assert set(re.findall(r"`(\w+)`", "".join(line.split("|")[1] for line in table.splitlines() if line))) == options
