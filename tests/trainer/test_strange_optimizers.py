"""Optimizers and schedules of strangers: a run uses them, goes on with them, and refuses what would train wrongly."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import sftx
from sftx import PluginError
from sftx.config import loading
from sftx.inspection.memory_plan import target_device

CODE = '''
from dataclasses import dataclass
from typing import ClassVar
import torch
import sftx

@dataclass(frozen=True, eq=False)
class Lazy:
    """Signs of a momentum, and one fault."""
    fault: str = ""

    @sftx.hookimpl
    def sftx_optimizer(self, run):
        return Builder(self.fault, run.config["train"]["weight_decay"])

@dataclass(frozen=True)
class Builder:
    fault: str
    weight_decay: float
    state_bytes: ClassVar = 4.0
    elementwise: ClassVar = False

    def build(self, params):
        kept = params[1:] if self.fault == "leaves out" else params
        return [Momentum(sftx.parameter_groups(kept, self.weight_decay), {"lr": 0.0, "fault": self.fault})]

class Momentum(torch.optim.Optimizer):
    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for p in group["params"]:
                state = self.state[p]
                if not state:
                    state["momentum"] = torch.zeros_like(p)
                if group["fault"] == "keeps a list":
                    state["seen"] = [1]
                if group["fault"] == "keeps a key":
                    self.state["seen"] = {"count": 1}
                if group["fault"] == "raises":
                    raise RuntimeError("no step today")
                if group["fault"] == "needs values":
                    p.grad.nonzero()
                state["momentum"].lerp_(p.grad, 0.5)
                p.sub_(state["momentum"].sign(), alpha=group["lr"])

@dataclass(frozen=True, eq=False)
class Halving:
    """Halves each step, and is negative from a step on."""
    until: int = 100
    warmup_start: ClassVar = 0.5

    @sftx.hookimpl
    def sftx_schedule(self):
        return self

    def factor(self, step, num_steps):
        return 0.5 ** step if step < self.until else -1.0
'''
ROWS = [
    {"messages": [{"role": "user", "content": f"say {n}"}, {"role": "assistant", "content": str(n)}]} for n in range(12)
]


@pytest.fixture
def run(tmp_path: Path, install_plugin: Any, monkeypatch: pytest.MonkeyPatch) -> Callable[..., sftx.api.TrainedRun]:
    install_plugin("sftx-lazy", CODE, {"lazy": "Lazy", "halving-schedule": "Halving"})
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("SFTX_CACHE", str(tmp_path / "cache"))

    def make(
        output_dir: str, *, plugins: dict[str, Any] | None = None, has_lora: bool = True, **options: Any
    ) -> sftx.api.TrainedRun:
        return sftx.run(
            data=ROWS,
            plugins={"chatml": {}, **({"lora": {"r": 2}} if has_lora else {}), **(plugins or {})},
            model="sftx:tiny",
            add_tokens=True,
            train_batch_size=2,
            learning_rate=1e-2,
            use_cpu=True,
            output_dir=output_dir,
            **options,
        )

    return make


def test_a_run_has_the_rates_of_the_schedule_and_goes_on_bit_for_bit(run: Callable[..., Any], tmp_path: Path) -> None:
    whole = run("whole", optim="lazy", lr_scheduler_type="halving", warmup_steps=2, save_steps=2, save_total_limit=9)
    steps = [line for line in whole.history if line["event"] == "step"]
    assert [line["learning_rate"] for line in steps] == [0.5e-2, 0.75e-2, 1e-2, 0.5e-2, 0.25e-2, 0.125e-2]
    assert steps[-1]["loss"] < steps[0]["loss"]
    kept = (whole.output_dir / "checkpoints" / "step-4" / "run_state.json").read_text()
    assert re.search(r'"optim": "lazy"', kept)
    cut = tmp_path / "cut"
    shutil.copytree(whole.output_dir, cut)
    for path in (cut / "summary.json", cut / "report.html"):
        path.unlink()
    shutil.rmtree(cut / "adapter")
    shutil.rmtree(cut / "checkpoints" / "step-6")
    (cut / "run.yaml").write_text((cut / "run.yaml").read_text().replace("output_dir: whole", "output_dir: cut"))
    again = sftx.resume("cut")
    assert [line["loss"] for line in again.history] == [line["loss"] for line in whole.history]
    for name in ("adapter/adapter_model.safetensors", "checkpoints/step-6/optimizer.safetensors"):
        assert (cut / name).read_bytes() == (whole.output_dir / name).read_bytes()


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("leaves out", "build leaves out 1 of 28 parameters, which would not be trained (first: model.model.layers"),
        ("keeps a list", "has [1] as 'seen', expected tensors and finite numbers, which a checkpoint can hold"),
        ("keeps a key", "its state has 'seen', expected the state of parameters alone"),
        ("raises", "step failed: RuntimeError: no step today"),
    ],
)
def test_an_optimizer_that_would_train_or_resume_wrongly_is_refused(
    run: Callable[..., Any], fault: str, message: str
) -> None:
    with pytest.raises(PluginError, match=r"^plugin 'lazy' \(sftx-lazy 1\.0\): .*" + re.escape(message)):
        run("out", plugins={"lazy": {"fault": fault}})
    assert not list(Path("out").glob("checkpoints/*"))


def test_a_negative_rate_ends_the_run_before_it_begins(run: Callable[..., Any]) -> None:
    message = r"^plugin 'halving-schedule' \(sftx-lazy 1\.0\): factor\(5, 6\) is -1\.0, expected a finite number of at"
    with pytest.raises(PluginError, match=message):
        run("out", plugins={"halving-schedule": {"until": 3}})
    assert not Path("out").exists()


@pytest.mark.parametrize("fault", ["", "needs values"])
def test_a_plan_has_the_state_of_the_step_or_what_the_plugin_declares(run: Callable[..., Any], fault: str) -> None:
    from sftx.inspection.memory_plan.planner import plan_run

    given = [("model", "sftx:tiny", "--model"), ("data.train", ["none.jsonl"], "--data"), ("data.max_length", 32, "")]
    loaded = loading.load(None, add=["chatml", "lazy"], assignments=[*given, ("plugins.lazy.fault", fault, "--set")])
    plan = plan_run(loaded, target_device.CPU)
    assert plan.need.kinds["optimizer"] == 4 * plan.need.num_trainable
    said = [line for line in plan.assumptions if line.startswith("4 bytes of optimizer state a parameter, as plugin ")]
    assert len(said) == (fault == "needs values")


def test_fsdp2_takes_no_optimizer_that_needs_whole_tensors(run: Callable[..., Any]) -> None:
    with pytest.raises(sftx.ConfigError, match=r"train.optim': lazy needs whole tensors.* take adamw, lion or sgd"):
        run("out", optim="lazy", has_lora=False, distributed="fsdp2")
