"""A rollout and a reward as a package of a stranger: checked, trained from their wheel in one and two processes."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from environments import Environment, build_wheel, make_environment

PACKAGE = Path(__file__).parents[1] / "packages" / "sftx-raft"
ROWS = [{"prompt": f"Question {n}?", "completion": "yes " * (1 + n % 5)} for n in range(1, 17)]


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory) -> Environment:
    made = make_environment(tmp_path_factory.mktemp("environment"))
    made.install(build_wheel(PACKAGE, tmp_path_factory.mktemp("wheels")))
    return made


def steps(directory: Path) -> list[dict[str, Any]]:
    lines = map(json.loads, (directory / "metrics.jsonl").read_text(encoding="utf-8").splitlines())
    return [line for line in lines if line["event"] == "step"]


@pytest.mark.slow
def test_it_trains_alike_in_one_process_and_in_two(environment: Environment, tiny_model: Path, tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS), encoding="utf-8")
    shutil.copytree(tiny_model, tmp_path / "tiny")
    common = "--plugin chatml --plugin lora --plugin packed --plugin raft --plugin word-overlap --model tiny --use-cpu"
    common += " --data rows.jsonl --train-batch-size 4 --per-device-train-batch-size 2 --learning-rate 3e-3"
    common += " --max-steps 6 --set raft.answer_length=8 --set raft.keep=2 --set word-overlap.repetition=1.0"
    for name, more in (("one", ""), ("two", "--nproc 2 --distributed ddp")):
        done = environment.run("sftx", "run", *common.split(), "--output-dir", name, *more.split(), cwd=tmp_path)
        assert done.returncode == 0, done.stdout + done.stderr
    one, two = steps(tmp_path / "one"), steps(tmp_path / "two")
    assert [step["loss"] for step in two] == pytest.approx([step["loss"] for step in one], abs=1e-5)
    assert [step["reward_kept"] for step in two] == [step["reward_kept"] for step in one]
    assert len((tmp_path / "one" / "rollouts.jsonl").read_text(encoding="utf-8").splitlines()) == 6 * 4 * 4


@pytest.mark.slow
@pytest.mark.parametrize("name", ["raft", "word-overlap"])
def test_no_clause_is_broken(environment: Environment, tmp_path: Path, name: str) -> None:
    done = environment.run("sftx", "plugins", "check", name, "--json", cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert {finding["status"] for finding in json.loads(done.stdout)} == {"ok"}
