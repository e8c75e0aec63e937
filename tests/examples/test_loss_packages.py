"""Losses of other kinds as packages of a stranger: checked and trained from their wheels, in two processes too."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from environments import Environment, build_wheel, make_environment

PACKAGES = Path(__file__).parents[1] / "packages"
ROWS = [{"prompt": f"Question {n}?", "completion": "yes " * (1 + n % 5), "label": n % 3 != 0} for n in range(1, 17)]


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory) -> Environment:
    directory = tmp_path_factory.mktemp("wheels")
    made = make_environment(tmp_path_factory.mktemp("environment"))
    made.install(*(build_wheel(PACKAGES / name, directory) for name in ("sftx-bco", "sftx-dft")))
    return made


@pytest.mark.slow
def test_a_statistic_of_a_step_is_the_same_in_two_processes(
    environment: Environment, tiny_model: Path, tmp_path: Path
) -> None:
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS), encoding="utf-8")
    shutil.copytree(tiny_model, tmp_path / "tiny")
    common = "--plugin chatml --plugin lora --plugin bco --model tiny --data rows.jsonl --train-batch-size 8 --use-cpu"
    common += " --per-device-train-batch-size 2 --learning-rate 1e-2 --num-train-epochs 3"
    lines = []
    for name, more in (("one", []), ("two", ["--nproc", "2"])):
        done = environment.run("sftx", "run", *common.split(), "--output-dir", name, *more, cwd=tmp_path)
        assert done.returncode == 0, done.stdout + done.stderr
        text = (tmp_path / name / "metrics.jsonl").read_text(encoding="utf-8")
        lines.append([line for line in map(json.loads, text.splitlines()) if line["event"] == "step"])
    assert len(lines[0]) == 6
    for one, two in zip(*lines, strict=True):
        assert two["loss"] == pytest.approx(one["loss"], abs=1e-5)
        assert two["shift"] == pytest.approx(one["shift"], abs=1e-4)
    assert max(abs(line["shift"]) for line in lines[0]) > 0.01


@pytest.mark.slow
@pytest.mark.parametrize(("name", "exempt"), [("bco", 0), ("dft", 1)])
def test_no_clause_is_broken(environment: Environment, tmp_path: Path, name: str, exempt: int) -> None:
    done = environment.run("sftx", "plugins", "check", name, "--json", cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    states = [finding["status"] for finding in json.loads(done.stdout)]
    assert states.count("exempt") == exempt
    assert set(states) <= {"ok", "exempt"}
