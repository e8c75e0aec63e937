"""docs/reinforcement.md is right: its commands work in their order, and what its tables name exists."""

from __future__ import annotations

import dataclasses
import json
import re
import shlex
from pathlib import Path

import pytest
from click.testing import CliRunner

from sftx.assembly.entry_points import discover
from sftx_plugins.reinforcement.grpo import Grpo

PAGE = (Path(__file__).parents[2] / "docs" / "reinforcement.md").read_text(encoding="utf-8")
QUICK = "--use-cpu --max-new-tokens 4 --set generation.max_rows=2"


def test_the_commands_work_in_their_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from sftx.cli import main

    monkeypatch.chdir(tmp_path)
    for name, numbers in (("sft", range(9)), ("questions", range(10, 19)), ("held", range(20, 24))):
        rows = [{"prompt": f"{n} + 1", "completion": str(n + 1)} for n in numbers]
        Path(f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    blocks = re.findall(r"^```sh\n(.*?)^```$", PAGE, flags=re.MULTILINE | re.DOTALL)
    commands = [line for block in blocks for line in block.replace("\\\n", "").splitlines()]
    assert [command.split()[1] for command in commands] == ["run", "merge", "run"]
    for command in commands:
        quick = "" if "merge" in command else QUICK
        quick += "" if "--model" in command or "merge" in command else " --model sftx:tiny"
        quick += " --set grpo.max_completion_length=4 --output-dir grpo-run" if "grpo" in command else ""
        command = re.sub(r"--max-steps \d+", "--max-steps 2", command)
        done = CliRunner().invoke(main, [*shlex.split(command)[1:], *quick.split()])
        assert done.exit_code == 0, f"{command}\n{done.output}"
    steps = [json.loads(line) for line in Path("grpo-run/metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    reported = next(line for line in steps if line["event"] == "step").keys() | {"kl"}
    table = PAGE.partition("## What to watch")[2].partition("`report.html`")[0]
    named = {name.replace("NAME", "reward-exact-match") for name in re.findall(r"`([\w/]+)`", table)} - {"beta"}
    assert named <= reported
    assert len(Path("grpo-run/rollouts.jsonl").read_text(encoding="utf-8").splitlines()) == (8 + 1) * 8


def test_its_options_and_rewards_exist() -> None:
    options = {field.name for field in dataclasses.fields(Grpo)}
    table = PAGE.partition("| option | say |")[2].partition("\n\n")[0]
    named = {
        name
        for line in table.splitlines()
        for name in re.findall(r"`(\w+)`", line.split("|")[1] if "|" in line else "")
    }
    assert named <= options
    assert len(named) == 8
    rewards = {info.name for info in discover() if info.name.startswith("reward-")}
    assert set(re.findall(r"`(reward-[\w-]+)`", PAGE)) == rewards
