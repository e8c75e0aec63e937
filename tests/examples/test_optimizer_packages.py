"""An optimizer and a schedule as packages of a stranger: checked, trained from their wheels, killed and resumed."""

from __future__ import annotations

import importlib
import json
import re
import shutil
import signal
import time
from pathlib import Path

import pytest

from environments import Environment, build_wheel, make_environment
from sftx.testing import check_optimizer, check_schedule
from sftx.verify.run_differences import differences

PACKAGES = Path(__file__).parents[1] / "packages"
ROWS = [{"prompt": f"Question {n}?", "completion": "yes " * (1 + n % 5)} for n in range(1, 25)]
OPTIONS = (
    "--plugin chatml --plugin lora --set lora.lora_dropout=0.1 --model tiny --data rows.jsonl --use-cpu "
    "--train-batch-size 2 --learning-rate 1e-2 --weight-decay 0.1 --warmup-steps 4 --save-steps 5 --max-steps 80 "
    "--optim cautious-adamw --set cautious-adamw.least=0.2 --output-dir out "
    "--lr-scheduler-type rsqrt --set rsqrt-schedule.timescale=20"
)


def test_they_keep_their_contracts_in_this_process(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("sftx-cautious", "sftx-rsqrt"):
        monkeypatch.syspath_prepend(PACKAGES / name)
    optimizer = importlib.import_module("sftx_cautious").CautiousAdamW
    schedule = importlib.import_module("sftx_rsqrt").ReciprocalSquareRoot
    check_optimizer(optimizer())
    check_optimizer(optimizer(least=1.0))
    check_schedule(schedule())
    check_schedule(schedule(cooldown=1.0))
    factors = schedule(timescale=8, cooldown=0.25).sftx_schedule(num_warmup_steps=4, num_training_steps=16)
    # 12 steps after warm-up, of which the last 4 cool down.
    assert [factors.factor(step, 12) for step in (0, 8, 10, 12)] == pytest.approx(
        [1, 2**-0.5, 0.5 * (8 / 18) ** 0.5, 0]
    )


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory) -> Environment:
    directory = tmp_path_factory.mktemp("wheels")
    made = make_environment(tmp_path_factory.mktemp("environment"))
    made.install(*(build_wheel(PACKAGES / name, directory) for name in ("sftx-cautious", "sftx-rsqrt")))
    return made


@pytest.mark.slow
def test_a_run_that_is_killed_ends_as_one_that_is_not(
    environment: Environment, tiny_model: Path, tmp_path: Path
) -> None:
    shutil.copytree(tiny_model, tmp_path / "tiny")
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS), encoding="utf-8")
    done = environment.run("sftx", "run", *OPTIONS.split(), cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert re.search(r"^optimizer +cautious-adamw +sftx-cautious 0\.1\.0 +least=0\.2", done.stdout, flags=re.MULTILINE)
    assert re.search(r"^schedule +rsqrt-schedule +sftx-rsqrt 0\.1\.0 +timescale=20", done.stdout, flags=re.MULTILINE)

    straight, out = tmp_path / "straight", tmp_path / "out"
    out.rename(straight)
    for step in (10, 30):
        process = environment.start("sftx", "run", *OPTIONS.split(), "--resume", cwd=tmp_path)
        deadline = time.monotonic() + 300
        while process.poll() is None and not (out / "checkpoints" / f"step-{step}").exists():
            assert time.monotonic() < deadline
            time.sleep(0.001)
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL, "it ended before it was killed"
    done = environment.run("sftx", "run", *OPTIONS.split(), "--resume", cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert differences(out, straight) == []


@pytest.mark.slow
@pytest.mark.parametrize(("name", "exempt"), [("cautious-adamw", ["is-elementwise"]), ("rsqrt-schedule", [])])
def test_no_clause_is_broken(environment: Environment, tmp_path: Path, name: str, exempt: list[str]) -> None:
    done = environment.run("sftx", "plugins", "check", name, "--json", cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    findings = json.loads(done.stdout)
    assert [finding["clause"] for finding in findings if finding["status"] == "exempt"] == exempt
    assert {finding["status"] for finding in findings} <= {"ok", "exempt"}
