"""docs/ppo.md is right: its function and its command work, and what its tables name exists."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path

import pytest
from click.testing import CliRunner

from sftx.assembly.entry_points import discover

PAGE = (Path(__file__).parents[2] / "docs" / "ppo.md").read_text(encoding="utf-8")


def test_the_command_trains_and_reports_what_the_table_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from sftx.cli import main

    monkeypatch.chdir(tmp_path)
    (function,) = re.findall(r"^`reward\.py`\n\n```python\n(.*?)^```$", PAGE, flags=re.MULTILINE | re.DOTALL)
    Path("reward.py").write_text(function, encoding="utf-8")
    rows = [{"prompt": f"{n} + 1", "completion": str(n + 1)} for n in range(20)]
    Path("prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    (block,) = re.findall(r"^```sh\n(.*?)^```$", PAGE, flags=re.MULTILINE | re.DOTALL)
    quick = "--model sftx:tiny --max-steps 2 --use-cpu --set ppo.response_length=4 --output-dir out"
    done = CliRunner().invoke(main, [*shlex.split(block.replace("\\\n", ""))[1:], *quick.split()])
    assert done.exit_code == 0, done.output
    lines = [json.loads(line) for line in Path("out/metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    reported = next(line for line in lines if line["event"] == "step").keys()
    table = PAGE.partition("| curve | is |")[2].partition("\n\n")[0]
    named = {name for line in table.splitlines() for name in re.findall(r"`([\w/]+)`", line.split(" | ")[0])}
    assert len(named) == 13
    assert named <= reported
    assert {"reward", "rewards/reward-function/mean", "kl", "entropy", "completions/mean_length"} <= reported


def test_the_table_has_every_reward() -> None:
    table = PAGE.partition("| plugin | an answer gets |")[2].partition("\n\n")[0]
    names = {line.split("`")[1] for line in table.splitlines() if line.startswith("| `")}
    assert names == {info.name for info in discover() if info.package == "sftx" and info.name.startswith("reward-")}
