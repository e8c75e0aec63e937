"""Tests of the observer contract: bad observers that break one clause each, and the built-in ones, which break none."""

from __future__ import annotations

import io
import json
import os
import random
import re
import signal
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook

from contracts import assert_every_clause_is_broken, assert_fails, assert_fails_only, whole_suite_cases
from sftx import EvalReport, Observer, RunInfo, StartReport, StepReport, hookimpl
from sftx.assembly.discovery import hooks_of, load_class
from sftx.assembly.entry_points import discover
from sftx.testing import ContractError
from sftx.testing.kit import built_in
from sftx.testing.observer import SUITE, check_observer
from sftx.testing.observer_case import events, run_info
from sftx.testing.process import process


class Good(Observer):
    """A good observer that writes a line for each step; the classes below change one thing."""

    def __init__(self, run: RunInfo) -> None:
        self.run = run
        self.path = run.output_dir / "losses.txt"

    def on_step(self, report: StepReport) -> None:
        with self.path.open("a", encoding="utf-8") as file:
            file.write(f"{report.step} {report.loss}\n")


class NoObserver:
    def __init__(self, run: RunInfo) -> None:
        pass


class CannotBegin(Good):
    def __init__(self, run: RunInfo) -> None:
        raise RuntimeError("the server does not answer")


class CannotSave(Good):
    def on_save(self, step: int, directory: Path) -> None:
        (directory / "model.safetensors").read_bytes()


class KeepsHistory(Good):
    history: list[float] = []  # noqa: RUF012 - the mistake

    def on_step(self, report: StepReport) -> None:
        self.history.append(report.loss)
        self.path.write_text("".join(f"{loss}\n" for loss in self.history))


class KeepsTheFile(Good):
    file: Any = None

    def on_step(self, report: StepReport) -> None:
        cls = type(self)
        cls.file = cls.file or self.path.open("w")
        cls.file.write(f"{report.loss}\n")

    def close(self) -> None:
        if self.file:
            self.file.close()


class KeepsThePath(Good):
    """Continues the file of the last run if that still exists."""

    last: Path | None = None

    def on_start(self, report: StartReport) -> None:
        if self.last and self.last.exists():
            self.path = self.last
        type(self).last = self.path


class WritesOnce(Good):
    done = False

    def close(self) -> None:
        if not self.done and self.run.output_dir.exists():
            self.path.with_suffix(".done").touch()
            type(self).done = True


@pytest.fixture(autouse=True)
def forget_earlier_tests(monkeypatch: pytest.MonkeyPatch) -> None:
    """Give the classes above, whose mistake is what they keep, their first state; what a test adds ends with it."""
    monkeypatch.setattr(KeepsHistory, "history", [])
    monkeypatch.setattr(KeepsTheFile, "file", None)
    monkeypatch.setattr(KeepsThePath, "last", None)
    monkeypatch.setattr(WritesOnce, "done", False)


class NeedsHeldOut(Good):
    def on_end(self, summary: Mapping[str, Any]) -> None:
        summary["held_out"]["after"]


class NeedsTerminal(Good):
    def on_start(self, report: StartReport) -> None:
        if not sys.stdout.isatty():
            raise io.UnsupportedOperation("not a terminal")


class ClosesWhatItStarted(Good):
    def on_start(self, report: StartReport) -> None:
        self.model = report.model

    def close(self) -> None:
        print(self.model)


class ClosesWhatItStepped(Good):
    started = False

    def on_start(self, report: StartReport) -> None:
        self.started = True

    def close(self) -> None:
        if self.started:
            self.path.read_text()


class ClosesWhatItEnded(Good):
    """Needs the summary in close() once there was a step."""

    summary: Mapping[str, Any] | None = None

    def on_end(self, summary: Mapping[str, Any]) -> None:
        self.summary = summary

    def close(self) -> None:
        if self.path.exists():
            print(self.summary["wall_seconds"])  # type: ignore[index]


class TakesTheSamples(Good):
    def on_end(self, summary: Mapping[str, Any]) -> None:
        summary.pop("samples", None)  # type: ignore[attr-defined]


class RoundsMetrics(Good):
    def on_evaluate(self, report: EvalReport) -> None:
        for name, value in report.metrics.items():
            report.metrics[name] = round(value) + 7  # type: ignore[index]


class TakesTheConfig(Good):
    def __init__(self, run: RunInfo) -> None:
        super().__init__(run)
        self.train = run.config["train"]
        self.train["learning_rate"] = str(self.train["learning_rate"])


class TakesTheConfigLater(Good):
    def on_start(self, report: StartReport) -> None:
        del self.run.config["output_dir"]  # type: ignore[attr-defined]


class MakesTheDirectory(Good):
    def __init__(self, run: RunInfo) -> None:
        super().__init__(run)
        run.output_dir.mkdir(parents=True, exist_ok=True)


class WritesBeside(Good):
    def on_end(self, summary: Mapping[str, Any]) -> None:
        Path("summaries.jsonl").write_text(json.dumps(summary))


class WritesOver(Good):
    def on_end(self, summary: Mapping[str, Any]) -> None:
        (self.run.output_dir / "summary.json").write_text(json.dumps(summary))


class Prunes(Good):
    def on_save(self, step: int, directory: Path) -> None:
        (directory / "tokenizer.json").unlink()


class KeepsStdout(Good):
    """Restores stdout when the run ends successfully, but not in close()."""

    def on_start(self, report: StartReport) -> None:
        self.stdout, sys.stdout = sys.stdout, io.StringIO()

    def on_end(self, summary: Mapping[str, Any]) -> None:
        sys.stdout = self.stdout


class LooksIn(Good):
    """Hooks into the modules to log activations, and halves them."""

    def on_start(self, report: StartReport) -> None:
        self.handle = nn.modules.module.register_module_forward_hook(self.look)

    def look(self, module: nn.Module, inputs: Any, output: Any) -> Any:
        return output / 2 if isinstance(module, nn.Linear) else None

    def close(self) -> None:
        if hasattr(self, "handle"):
            self.handle.remove()


class Detaches(LooksIn):
    def look(self, module: nn.Module, inputs: Any, output: Any) -> Any:
        return output.detach() if isinstance(output, Tensor) else None


class ShrinksWeights(Good):
    """Changes the weights in a hook that runs after every optimizer step."""

    def on_start(self, report: StartReport) -> None:
        self.handle = register_optimizer_step_post_hook(self.look)

    def look(self, optimizer: Any, *_: Any) -> None:
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                parameter.data.clamp_(-0.1, 0.1)

    def close(self) -> None:
        if hasattr(self, "handle"):
            self.handle.remove()


def sets(what: Callable[[], Any], event: str = "on_step") -> type[Observer]:
    """Return an observer class that calls `what` in one event."""
    return type("Sets", (Good,), {event: lambda self, *_: what() and None})


def seeds_when_made(run: RunInfo) -> Observer:
    torch.manual_seed(1)
    return Good(run)


class Plugin:
    """A plugin whose hook calls `made`."""

    def __init__(self, made: Callable[[RunInfo], Any]) -> None:
        self.made = made

    @hookimpl
    def sftx_observer(self, run: RunInfo) -> Any:
        return self.made(run)


STATE = [
    (lambda: random.seed(1), "Python's random numbers"),
    (lambda: torch.rand(1), "torch's random numbers"),
    (lambda: numpy.random.rand(1), "numpy's random numbers"),
    (lambda: torch.set_grad_enabled(False), "torch's gradient mode"),
    (lambda: torch.set_default_dtype(torch.bfloat16), "torch's default dtype"),
    (lambda: torch.set_default_device("meta"), "torch's default device"),
    (lambda: torch.set_num_threads(torch.get_num_threads() + 1), "torch's number of threads"),
    (lambda: torch.set_float32_matmul_precision("medium"), "torch's matmul precision"),
    (lambda: torch.set_anomaly_enabled(True), "torch's anomaly detection"),
    (lambda: torch.use_deterministic_algorithms(True), "torch's deterministic algorithms"),
    (lambda: setattr(torch.backends.cudnn, "benchmark", not torch.backends.cudnn.benchmark), "cuDNN's flags"),
    (lambda: signal.signal(signal.SIGTERM, lambda *_: None), "the signal handlers"),
]

BAD: list[tuple[Callable[[RunInfo], Any], str, str]] = [
    (NoObserver, "made", "returned NoObserver, expected an Observer"),
    (CannotBegin, "made", "RuntimeError: the server does not answer"),
    (CannotSave, "takes-every-event", "on_save raised FileNotFoundError"),
    (KeepsHistory, "repeats", "losses.txt has 2 lines in the first run, 6 in a second one"),
    (KeepsTheFile, "repeats", "on_step raised ValueError: I/O operation on closed file"),
    (KeepsThePath, "repeats", "a later run changed losses.txt of the one before"),
    (WritesOnce, "repeats", "the first run has 12 files, a second one has 11"),
    (NeedsHeldOut, "takes-any-run", "in a run without held-out rows on_end raised KeyError"),
    (NeedsTerminal, "takes-any-run", "in a run whose output is no terminal on_start raised UnsupportedOperation"),
    (ClosesWhatItStarted, "closes-early", "in a run that failed before it started close raised AttributeError"),
    (ClosesWhatItStepped, "closes-early", "in a run that failed after its start close raised FileNotFoundError"),
    (ClosesWhatItEnded, "closes-early", "in a run that failed after a step close raised TypeError"),
    (TakesTheSamples, "reports-stay", "on_end changed its arguments"),
    (RoundsMetrics, "reports-stay", "on_evaluate changed its arguments"),
    (TakesTheConfig, "reports-stay", "the hook changed the config"),
    (TakesTheConfigLater, "reports-stay", "on_start changed the config"),
    (MakesTheDirectory, "writes-only-in-the-run", "the hook made runs;"),
    (WritesBeside, "writes-only-in-the-run", "it wrote summaries.jsonl beside the run directory"),
    (WritesOver, "writes-only-in-the-run", "it changed summary.json"),
    (Prunes, "writes-only-in-the-run", "it changed adapter/tokenizer.json"),
    *((sets(what), "leaves-the-state", f"on_step changed {message}") for what, message in STATE),
    (sets(lambda: os.environ.update(SFTX_SEEN="1"), "on_start"), "leaves-the-state", "the environment variables"),
    (sets(lambda: sys.path.append("/nowhere"), "on_start"), "leaves-the-state", "sys.path"),
    (sets(lambda: os.chdir("/"), "close"), "leaves-the-state", "close changed the working directory"),
    (KeepsStdout, "leaves-the-state", "close changed sys.stdout"),
    (seeds_when_made, "leaves-the-state", "the hook changed torch's random numbers"),
    (LooksIn, "changes-no-training", "parameters end up different"),
    (Detaches, "changes-no-training", "a training step raised PluginError: .*: sum has no gradient"),
    (ShrinksWeights, "changes-no-training", "parameters end up different"),
]


@pytest.mark.parametrize(("bad", "clause", "message"), BAD)
def test_a_bad_observer_fails_its_clause_with_a_message(
    bad: Callable[[RunInfo], Any], clause: str, message: str
) -> None:
    before = process()
    assert_fails(SUITE, Plugin(bad), clause, re.compile(message))
    assert process() == before, "the suite left changes of the observer"


@pytest.mark.parametrize(("bad", "clause"), whole_suite_cases(BAD))
def test_a_bad_observer_fails_nothing_else(bad: Callable[[RunInfo], Any], clause: str) -> None:
    assert_fails_only(SUITE, Plugin(bad), clause)


def test_each_clause_has_a_bad_observer() -> None:
    assert_every_clause_is_broken(SUITE, (clause for _, clause, _ in BAD))


OBSERVERS = [
    info.name
    for info in discover()
    if info.value.startswith("sftx_plugins") and "sftx_observer" in hooks_of(info, load_class(info))
]


@pytest.mark.parametrize("name", OBSERVERS)
def test_a_built_in_observer_keeps_the_contract(name: str, capfd: pytest.CaptureFixture[str]) -> None:
    findings = SUITE.findings(built_in(name))
    assert {f.status for f in findings} == {"ok"}, findings
    assert capfd.readouterr() == ("", ""), "what an observer prints is nobody's to read"


def test_the_good_one_is_good_and_a_bad_one_is_told() -> None:
    check_observer(Plugin(Good))
    with pytest.raises(ContractError, match="observer / takes-every-event: "):
        check_observer(Plugin(CannotSave))


RECORDER = """
import json
from dataclasses import dataclass
from sftx import Observer, hookimpl

class Recorder(Observer):
    def __init__(self, run):
        self.told, self.run = [], run

def note(name):
    def event(self, *arguments):
        self.told.append([name, [type(a).__name__ for a in arguments]])
        if name == "close":
            record = {"told": self.told, "config": sorted(self.run.config)}
            (self.run.output_dir / "told.json").write_text(json.dumps(record))
    return event

for name in ("on_start", "on_step", "on_log", "on_evaluate", "on_save", "on_end", "close"):
    setattr(Recorder, name, note(name))

@dataclass(frozen=True, eq=False)
class Plugin:
    @hookimpl
    def sftx_observer(self, run):
        return Recorder(run)
"""


def test_the_events_are_those_of_a_run(plugin_run: Any, install_plugin: Any, tmp_path: Path) -> None:
    install_plugin("recorder-package", RECORDER, {"recorder": "Plugin"})
    result = plugin_run("recorder", "lora", "exact-match", train__save_steps=1, train__eval_steps=1)
    run = run_info(tmp_path)
    told = events(run)
    record = json.loads((result.output_dir / "told.json").read_text())
    assert record["told"] == [[name, [type(a).__name__ for a in arguments]] for name, arguments in told]
    assert record["config"] == sorted(run.config)
    ((_, (summary,)),) = [event for event in told if event[0] == "on_end"]
    real = result.summary
    assert set(summary) == set(real)
    assert set(summary["samples"][0]) == set(real["samples"][0])
    assert {type(value) for value in summary.values()} == {type(value) for value in real.values()}
    ((_, (start,)),) = [event for event in told if event[0] == "on_start"]
    assert {"adapter", "parser", "loss"} <= {provider.stage for provider in start.providers}
