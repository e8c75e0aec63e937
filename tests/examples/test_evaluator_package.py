"""An evaluator as a package of a stranger: from its wheel it selects the best checkpoint, in two processes too."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from environments import Environment, build_wheel, make_environment

PACKAGE = Path(__file__).parents[1] / "packages" / "sftx-retention"
ROWS = [{"prompt": f"Question {n}?", "completion": "yes " * (1 + n % 5)} for n in range(1, 17)]


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory) -> Environment:
    made = make_environment(tmp_path_factory.mktemp("environment"))
    made.install(build_wheel(PACKAGE, tmp_path_factory.mktemp("wheels")))
    return made


def evaluations(directory: Path) -> list[dict[str, Any]]:
    lines = map(json.loads, (directory / "metrics.jsonl").read_text(encoding="utf-8").splitlines())
    return [line for line in lines if line["event"] == "evaluate"]


@pytest.mark.slow
@pytest.mark.parametrize("plugins", ["--plugin lora", ""], ids=["lora", "full"])
def test_its_score_selects_the_checkpoint_in_one_process_and_in_two(
    environment: Environment, tiny_model: Path, tmp_path: Path, plugins: str
) -> None:
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS), encoding="utf-8")
    shutil.copytree(tiny_model, tmp_path / "tiny")
    common = f"--plugin chatml {plugins} --plugin retention --model tiny --data rows.jsonl --train-batch-size 4"
    common += " --per-device-train-batch-size 2 --learning-rate 3e-3 --use-cpu --max-steps 6 --eval-steps 2"
    common += " --metric-for-best-model retention --load-best-model-at-end --set train.per_device_eval_batch_size=1"
    seen = []
    for name, more in (("one", ""), ("ddp", "--nproc 2"), ("fsdp2", "--nproc 2 --distributed fsdp2")):
        done = environment.run("sftx", "run", *common.split(), "--output-dir", name, *more.split(), cwd=tmp_path)
        assert done.returncode == 0, done.stdout + done.stderr
        seen.append(evaluations(tmp_path / name))
        best = json.loads((tmp_path / name / "summary.json").read_text(encoding="utf-8"))["best"]
        by_step = {line["step"]: line["retention"] for line in seen[-1] if line["step"] > 0}
        assert best["value"] == max(by_step.values()) == by_step[best["step"]]
    for other in seen[1:]:
        for one, two in zip(seen[0], other, strict=True):
            assert two["step"] == one["step"]
            assert two["retention"] == pytest.approx(one["retention"], abs=1e-4)
            assert two["fluency"] == one["fluency"]
    assert len({line["retention"] for line in seen[0]}) > 2


@pytest.mark.slow
def test_no_clause_is_broken(environment: Environment, tmp_path: Path) -> None:
    done = environment.run("sftx", "plugins", "check", "retention", "--json", cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert {finding["status"] for finding in json.loads(done.stdout)} == {"ok"}
