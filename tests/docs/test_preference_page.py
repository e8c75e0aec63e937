"""docs/preference.md is right: its commands work in their order, and its tables have every option and metric."""

from __future__ import annotations

import dataclasses
import json
import re
import shlex
from pathlib import Path

import pytest
from click.testing import CliRunner

from sftx.assembly.discovery import load_class
from sftx.assembly.entry_points import discover, find

PAGE = (Path(__file__).parents[2] / "docs" / "preference.md").read_text(encoding="utf-8")
LOSSES = ("dpo", "kto", "orpo", "simpo")


def test_the_commands_work_as_they_are_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from sftx.cli import main

    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    for name, text in re.findall(r"^`(\S+\.jsonl)`\n\n```json\n(.*?)^```$", PAGE, flags=re.MULTILINE | re.DOTALL):
        Path(name).write_text(text, encoding="utf-8")
    commands = [
        line
        for block in re.findall(r"^```sh\n(.*?)^```$", PAGE, flags=re.MULTILINE | re.DOTALL)
        for line in block.splitlines()
    ]
    assert len(commands) == 7
    for command in commands:
        done = CliRunner().invoke(main, shlex.split(command)[1:])
        assert done.exit_code == 0, f"{command}\n{done.output}"
    held_out = json.loads(Path("dpo/summary.json").read_text(encoding="utf-8"))["held_out"]
    assert held_out["before"]["loss"] == pytest.approx(0.6931, abs=1e-4)
    kto = [json.loads(line) for line in Path("kto/metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    first = next(line for line in kto if line["event"] == "step")
    assert first["loss"] == pytest.approx(0.5, abs=1e-4)
    reported: set[str] = set()
    for name in LOSSES:
        lines = Path(name, "metrics.jsonl").read_text(encoding="utf-8").splitlines()
        reported |= {key for line in map(json.loads, lines) if line["event"] == "step" for key in line}
    table = PAGE.partition("## What is reported")[2]
    shown = set(
        re.findall(r"`([a-z_]+(?:/[a-z]+)?)`", " ".join(re.findall(r"^\| (`.*?) \|", table, flags=re.MULTILINE)))
    )
    assert shown <= reported
    assert {name for name in reported if "/" in name or name in ("kl", "nll_loss") or "odds" in name} == shown


@pytest.mark.parametrize("name", LOSSES)
def test_the_page_has_every_option_with_its_default(name: str) -> None:
    rows = dict(re.findall(r"^\| (`\w+\.\w+`.*?) \| (.*?) \|", PAGE, flags=re.MULTILINE))
    defaults = {option: default for names, default in rows.items() for option in re.findall(r"`(\w+\.\w+)`", names)}
    fields = dataclasses.fields(load_class(find(name, discover())))
    assert {option for option in defaults if option.startswith(f"{name}.")} == {f"{name}.{f.name}" for f in fields}


def test_the_page_has_every_loss_type() -> None:
    from typing import get_args, get_type_hints

    from sftx_plugins.preference.dpo import DPO

    types, *_ = get_args(get_type_hints(DPO, include_extras=True)["loss_type"])
    assert all(f"`{value}`" in PAGE for value in get_args(types))
