"""A control as a stranger's package: from its wheel it ends a run early, with an artefact and a state to go on from."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from environments import Environment, build_wheel, make_environment

PACKAGE = Path(__file__).parents[1] / "packages" / "sftx-plateau"
ROWS = [{"prompt": f"Question {n}?", "completion": "yes"} for n in range(64)]


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory) -> Environment:
    made = make_environment(tmp_path_factory.mktemp("environment"))
    made.install(build_wheel(PACKAGE, tmp_path_factory.mktemp("wheels")))
    return made


@pytest.mark.slow
def test_it_ends_a_run_that_loads_and_goes_on(environment: Environment, tiny_model: Path, tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS), encoding="utf-8")
    shutil.copytree(tiny_model, tmp_path / "tiny")
    # A rate that changes nothing, so that the loss does not fall.
    common = (
        "run --plugin chatml --plugin lora --plugin plateau --set plateau.patience=3 --model tiny --data rows.jsonl"
    )
    common += " --train-batch-size 4 --learning-rate 1e-9 --use-cpu --set plateau.least=1 --output-dir out"

    def run(*more: str) -> str:
        done = environment.run("sftx", *common.split(), *more, cwd=tmp_path)
        assert done.returncode == 0, done.stdout + done.stderr
        return str(done.stdout + done.stderr)

    def num_steps() -> int:
        return int(json.loads((tmp_path / "out" / "summary.json").read_text(encoding="utf-8"))["num_steps"])

    assert "ends after step 4 (plateau: no lower loss for 3 steps)" in run("--max-steps", "12")
    assert num_steps() == 4
    assert (tmp_path / "out" / "checkpoints" / "step-4").is_dir()
    exported = environment.run("sftx", "export", "out", "--to", "safetensors", cwd=tmp_path)  # it loads the adapter
    assert exported.returncode == 0, exported.stderr
    assert "nothing is left to do" in run("--max-steps", "12", "--resume")
    longer = run("--max-steps", "20", "--resume")
    assert "the run was stopped (plateau: no lower loss for 3 steps), and goes on" in longer
    assert "resumed after step 4" in longer
    assert num_steps() == 5  # it still waits for a lower loss, as it remembers


@pytest.mark.slow
def test_no_clause_is_broken(environment: Environment, tmp_path: Path) -> None:
    done = environment.run("sftx", "plugins", "check", "plateau", "--json", cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert {finding["status"] for finding in json.loads(done.stdout)} == {"ok"}
