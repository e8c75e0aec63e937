"""Control plugins steer a run, and a resumed run goes on with what they had decided."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import pytest

import sftx
from sftx import Control, Decision, EvalReport, RunInfo, StepReport
from sftx.assembly.stages.control_stage import ControlStage
from sftx_plugins.controls.early_stopping import EarlyStopping

CODE = '''
from dataclasses import dataclass
from sftx import Control, Decision, hookimpl

@dataclass(frozen=True, eq=False)
class Plan:
    """Follows a plan."""
    stop_at: int = 100
    @hookimpl
    def sftx_control(self, run):
        return Steps(self.stop_at)

class Steps(Control):
    def __init__(self, stop_at):
        self.stop_at, self.seen = stop_at, 0
    def after_step(self, report):
        self.seen += 1
        assert self.seen == report.step, "what it remembers is that of a run without interruption"
        return {2: Decision(rate_factor=0.5), 3: Decision(save=True), 4: Decision(evaluate=True, reason="looks"),
                5: Decision(rate_factor=0.25), self.stop_at: Decision(stop=True, reason="enough")}.get(report.step)
    def after_evaluate(self, report):
        return Decision(save=report.step == 4)
    def state_dict(self):
        return {"seen": self.seen}
    def load_state_dict(self, state):
        self.seen = state["seen"]
'''
ROWS = [
    {"messages": [{"role": "user", "content": f"say {n}"}, {"role": "assistant", "content": str(n)}]} for n in range(16)
]


@pytest.fixture
def run(tmp_path: Path, install_plugin: Any, monkeypatch: pytest.MonkeyPatch) -> Callable[..., sftx.api.TrainedRun]:
    install_plugin("sftx-plan", CODE, {"plan": "Plan"})
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("SFTX_CACHE", str(tmp_path / "cache"))

    def make(output_dir: str, **options: Any) -> sftx.api.TrainedRun:
        plugins = {"chatml": {}, "lora": {"r": 2}, "plan": options.pop("plan", {})}
        return sftx.run(
            data=ROWS,
            eval_data=ROWS[:2],
            plugins=plugins,
            model="sftx:tiny",
            add_tokens=True,
            train_batch_size=2,
            learning_rate=1e-2,
            lr_scheduler_type="constant",
            output_dir=output_dir,
            max_overlap=1.0,
            **options,
        )

    return make


def test_decisions_are_carried_out(run: Callable[..., Any]) -> None:
    done = run("out", save_total_limit=3)
    rates = [line["learning_rate"] for line in done.history if line["event"] == "step"]
    assert rates == pytest.approx([1e-2, 1e-2, 5e-3, 5e-3, 5e-3, 2.5e-3, 2.5e-3, 2.5e-3])
    assert [line["step"] for line in done.history if line["event"] == "evaluate"] == [0, 4, 8]
    assert {path.name for path in (done.output_dir / "checkpoints").iterdir()} == {"step-3", "step-4", "step-8"}


def test_a_stopped_run_has_its_artefact_and_is_complete(
    run: Callable[..., Any], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", "sftx")
    done = run("out", plan={"stop_at": 6})
    assert done.summary["num_steps"] == 6
    assert done.history[-1]["event"] == "evaluate"
    assert done.history[-1]["step"] == 6
    assert done.metrics["loss"] != done.summary["held_out"]["before"]["loss"]
    assert "ends after step 6 (plan: enough)" in caplog.text
    assert (done.output_dir / "adapter" / "adapter_model.safetensors").is_file()
    assert sftx.resume("out") == done


@pytest.mark.parametrize(
    ("decision", "named"),
    [
        ("stop", "after_step returned str, expected a Decision or None"),
        (False, "after_step returned bool"),
        (Decision(stop="no"), "after_step asked for stop='no', expected True or False"),  # type: ignore[arg-type]
        (Decision(save=1), "after_step asked for save=1"),
        (Decision(evaluate=None), "after_step asked for evaluate=None"),  # type: ignore[arg-type]
        (Decision(rate_factor=float("nan")), "rate_factor nan, expected a number above 0"),
        (Decision(rate_factor="2"), "rate_factor '2'"),  # type: ignore[arg-type]
        (Decision(reason=3), "gave the reason 3, expected text"),  # type: ignore[arg-type]
    ],
)
def test_what_is_no_decision_is_refused(decision: Any, named: str) -> None:
    class Late(Control):
        def after_step(self, report: StepReport) -> Any:
            return decision

    with pytest.raises(sftx.PluginError, match=f"^late: .*{re.escape(named)}"):
        ControlStage("late", Late()).after_step(cast(Any, None))


@pytest.mark.parametrize("kept", [3, 4])
def test_a_resumed_run_goes_on_with_what_was_decided(run: Callable[..., Any], tmp_path: Path, kept: int) -> None:
    whole = run("whole", plan={"stop_at": 7}, save_total_limit=9)
    shutil.copytree(whole.output_dir, tmp_path / "cut")
    cut = tmp_path / "cut"
    for path in (cut / "summary.json", cut / "report.html"):
        path.unlink()
    shutil.rmtree(cut / "adapter")
    for path in (cut / "checkpoints").iterdir():
        if int(path.name.removeprefix("step-")) > kept:
            shutil.rmtree(path)
    text = (cut / "run.yaml").read_text().replace("output_dir: whole", "output_dir: cut")
    (cut / "run.yaml").write_text(text)
    again = sftx.resume("cut")
    assert again.summary["num_steps"] == 7
    assert [line["loss"] for line in again.history] == [line["loss"] for line in whole.history]
    saved = "adapter/adapter_model.safetensors"
    assert (cut / saved).read_bytes() == (whole.output_dir / saved).read_bytes()


@pytest.mark.parametrize(
    ("options", "train", "values", "stops_at"),
    [
        ({"patience": 2}, {}, [3.0, 2.0, 2.5, 1.9, 2.0, 2.1], 6),
        ({"patience": 1}, {"metric_for_best_model": "eval_score"}, [0.1, 0.2, 0.2], 3),
        # A gain within the threshold makes the best, and is none for the patience.
        ({"patience": 2, "threshold": 0.15}, {"metric_for_best_model": "score"}, [0.1, 0.2, 0.3, 0.5], 3),
        ({"patience": 2, "threshold": 0.15}, {"metric_for_best_model": "score"}, [0.1, 0.2, 0.5, 0.6], None),
        ({"patience": 1}, {"metric_for_best_model": "score", "greater_is_better": False}, [0.3, 0.2, 0.1], None),
    ],
)
def test_when_early_stopping_stops(
    options: dict[str, Any], train: dict[str, Any], values: list[float], stops_at: int | None
) -> None:
    train = {"metric_for_best_model": None, "greater_is_better": None} | train
    control = EarlyStopping(**options).sftx_control(RunInfo(Path("run"), {"train": train}))
    name = (train["metric_for_best_model"] or "loss").removeprefix("eval_")
    decisions = [control.after_evaluate(EvalReport(step, {name: value})) for step, value in enumerate(values, 1)]
    stops = [step for step, decision in enumerate(decisions, 1) if decision is not None and decision.stop]
    assert (stops[0] if stops else None) == stops_at
