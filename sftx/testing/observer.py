"""The contract of an observer: it handles every event, and a run with it is the same as without it."""

from __future__ import annotations

from collections.abc import Mapping
from copy import deepcopy
from typing import Final

import torch
from torch import Tensor

from sftx.assembly.stages.data_stages import CollatorStage
from sftx.assembly.stages.loss_stage import LossStage
from sftx.assembly.stages.optimizer_stages import OptimizerStage, ScheduleStage
from sftx.config.options import TrainConfig
from sftx.data.collate import groups_of
from sftx.data.sampler import EpochSampler
from sftx.events import RunInfo
from sftx.testing.batches import precomputed
from sftx.testing.clauses import ClauseError, Suite, must_not_raise
from sftx.testing.kit import Kit, built_in, make_stage, run_info
from sftx.testing.observer_case import (
    NUM_STEPS,
    Case,
    engine_files,
    events,
    files,
    interrupted,
    send,
    workplace,
)
from sftx.testing.process import TERMINAL, process
from sftx.trainer.precision import choose
from sftx.trainer.trainer import Trainer
from sftx.types import Observer


def _case(kit: Kit) -> Case:
    case = Case(kit.plugin)
    with workplace() as directory:
        case.observer(run_info(directory))
    return case


SUITE: Suite[Case] = Suite("observer", _case)


@SUITE.clause("No event of a run raises.")
def takes_every_event(case: Case) -> None:
    if not case.first_run:
        raise ClauseError("the run directory is empty afterwards; delete nothing in it")


@SUITE.clause(
    "A second run in the same process behaves like the first one, and leaves its files alone.",
    needs=["takes-every-event"],
)
def repeats(case: Case) -> None:
    advice = "keep no state in the class or the module: the hook makes an observer for each run"
    with workplace() as directory:
        earlier, later = run_info(directory, 1), run_info(directory, 2)
        try:
            before = case.play(earlier)
            again = case.play(later)
        except ClauseError as error:
            raise ClauseError(f"after another run in this process {error}; {advice}") from error
        after = files(earlier.output_dir)
    for path in sorted(before.keys() | after.keys()):
        if before.get(path) != after.get(path):
            raise ClauseError(f"a later run changed {path} of the one before; {advice}")
    first = case.first_run
    if len(first) != len(again):
        raise ClauseError(f"the first run has {len(first)} files, a second one has {len(again)}; {advice}")
    for path in sorted(first.keys() & again.keys()):
        lines, lines_again = first[path].count(b"\n"), again[path].count(b"\n")  # contents may include a time
        if lines != lines_again:
            raise ClauseError(f"{path} has {lines} lines in the first run, {lines_again} in a second one; {advice}")


_HANDLES_RUNS: Final = ["takes-every-event", "repeats"]


@SUITE.clause("It handles a run without held-out rows, and one whose output is not a terminal.", needs=_HANDLES_RUNS)
def takes_any_run(case: Case) -> None:
    for terminal, held_out, description in (
        (True, False, "in a run without held-out rows"),
        (False, True, "in a run whose output is no terminal"),
    ):
        with workplace(terminal=terminal) as directory:
            try:
                case.play(run_info(directory), held_out=held_out)
            except ClauseError as error:
                raise ClauseError(f"{description} {error}") from error


@SUITE.clause(
    "close() works in a run that failed: before it started, after the start, after a step.", needs=_HANDLES_RUNS
)
def closes_early(case: Case) -> None:
    for last, when in ((None, "before it started"), ("on_start", "after its start"), ("on_step", "after a step")):
        with workplace() as directory:
            run = run_info(directory)
            observer = case.observer(run)
            try:
                for event in interrupted(run, last):
                    send(observer, event, run)
            except ClauseError as error:
                raise ClauseError(f"in a run that failed {when} {error}; on_fail and close are called then") from error


@SUITE.clause("It does not change reports, the summary or the run file.", needs=_HANDLES_RUNS)
def reports_stay(case: Case) -> None:
    def check(actual: object, original: object, problem: str) -> None:
        if actual != original:
            raise ClauseError(f"{problem}, which other observers get too; work on a copy (`copy.deepcopy`)")

    with workplace() as directory:
        run = run_info(directory)
        all_events = events(run)
        config, originals = deepcopy(run.config), deepcopy(all_events)
        observer = case.observer(run)
        check(run.config, config, "the hook changed the config of its RunInfo")
        for event, (name, arguments) in zip(all_events, originals, strict=True):
            send(observer, event, run)
            check(event[1], arguments, f"{name} changed its arguments")
            check(run.config, config, f"{name} changed the config of the RunInfo")


@SUITE.clause(
    "It writes only into the run directory, not before on_start, and changes no file that the run wrote.",
    needs=_HANDLES_RUNS,
)
def writes_only_in_the_run(case: Case) -> None:
    with workplace() as directory:
        run = run_info(directory)
        observer = case.observer(run)
        if early := sorted(path.relative_to(directory) for path in directory.rglob("*")):
            raise ClauseError(
                f"the hook made {early[0]}; a run writes nothing before everything is checked, so write from on_start "
                "on, when run.output_dir exists"
            )
        for event in events(run):
            send(observer, event, run)
        everything, written = files(directory), files(run.output_dir)
        inside = run.output_dir.relative_to(directory)
    if outside := [path for path in everything if not path.is_relative_to(inside)]:
        raise ClauseError(f"it wrote {outside[0]} beside the run directory; write below run.output_dir")
    if changed := [path for path, content in engine_files().items() if written.get(path) != content]:
        raise ClauseError(f"it changed {changed[0]}, which the run wrote; write files under other names")


@SUITE.clause(
    "It does not change random state, torch's modes, signal handlers or other state of the process.",
    needs=[*_HANDLES_RUNS, "closes-early"],
)
def leaves_the_state(case: Case) -> None:
    for last in ("on_end", "on_step"):
        with workplace() as directory:
            run = run_info(directory)
            before = process()
            observer = case.observer(run)
            _check_state(before, "the hook", is_drawing=True)
            for event in interrupted(run, last):
                send(observer, event, run)
                _check_state(before, event[0], is_drawing=event[0] != "close")


def _check_state(before: Mapping[str, object], caller: str, *, is_drawing: bool) -> None:
    """Raise ClauseError when the state of the process changed. While it draws, an observer may replace the streams."""
    now = process()
    for name, value in before.items():
        if value is not None and now[name] != value and not (is_drawing and name in TERMINAL):
            raise ClauseError(
                f"{caller} changed {name}, which the training shares: draw from a generator of your own, set nothing "
                "for the whole process, and restore in close what a display has replaced"
            )


@SUITE.clause(
    "Training with it gives the same parameters as without it, bit for bit.", needs=[*_HANDLES_RUNS, "leaves-the-state"]
)
def changes_no_training(case: Case) -> None:
    advice = "only read the reports, and put no hook on modules or tensors"
    kit = Kit(built_in("lora", lora_dropout=0.2))
    with workplace() as directory:
        expected = _train(kit, run_info(directory), None)
    with workplace() as directory:
        run = run_info(directory)
        observer = case.observer(run)
        try:
            with must_not_raise("with it a training step", advice):
                parameters = _train(kit, run, observer)
        except ClauseError:
            observer.close()
            raise
    changed = [n for n, value in expected.items() if n not in parameters or not torch.equal(parameters[n], value)]
    if changed:
        raise ClauseError(f"with it {len(changed)} parameters end up different (first: {changed[0]}); {advice}")


def _train(kit: Kit, run: RunInfo, observer: Observer | None) -> dict[str, Tensor]:
    """Train a LoRA with dropout for a few steps, sending the observer the events, and return the parameters."""
    lm = kit.language_model({"lora": make_stage(kit.plugin, "sftx_adapter", spec=kit.spec)})
    config = TrainConfig(max_steps=NUM_STEPS, per_device_train_batch_size=2, learning_rate=1e-2, use_cpu=True)
    collator, loss = CollatorStage("the collator", kit.collator), LossStage("the loss", kit.loss)
    loss.prepare(kit.examples)
    steps = iter(EpochSampler(kit.examples, collator, config))
    optimizer = OptimizerStage("the optimizer", kit.optimizer, "optimizer")
    schedule = ScheduleStage("the schedule", kit.schedule(NUM_STEPS))
    trainer = Trainer(lm, loss, collator, optimizer, schedule, config, choose(config), NUM_STEPS)
    trainer.precomputed = precomputed(loss, collator, lm, groups_of(kit.examples))
    for name, arguments in events(run):
        if name == "on_step":
            planned = next(steps)
            report = trainer.train_step(arguments[0].step, planned.epoch, trainer.micro_batches(planned))
            arguments = (report,)
        if observer is not None:
            send(observer, (name, arguments), run)
    return {name: parameter.detach() for name, parameter in lm.named_parameters()}


def check_observer(plugin: object) -> None:
    """Check the plugin's observer. Raises ContractError, which names the broken clauses."""
    SUITE.check(plugin)
