"""The contract of an observer: it hears everything, and the run is the same without it."""

from __future__ import annotations

from collections.abc import Mapping
from copy import deepcopy
from typing import Final

import torch
from torch import Tensor

from sftx.assembly.stages import CollatorStage, LossStage, make
from sftx.config.options import TrainConfig
from sftx.data.sampler import EpochSampler
from sftx.errors import one_line
from sftx.events import RunInfo
from sftx.testing.clauses import ClauseError, Suite
from sftx.testing.kit import Kit, built_in
from sftx.testing.observer_case import (
    NUM_STEPS,
    Case,
    Event,
    engine_files,
    events,
    files,
    run_info,
    tell,
    workplace,
)
from sftx.testing.process import TERMINAL, process
from sftx.trainer.precision import choose
from sftx.trainer.trainer import Trainer
from sftx.types import Observer


def _case(kit: Kit) -> Case:
    case = Case(kit.plugin)
    with workplace() as place:
        case.observer(run_info(place))
    return case


SUITE: Suite[Case] = Suite("observer", _case)


@SUITE.clause("No event of a run raises.")
def takes_every_event(case: Case) -> None:
    if not case.first_run:
        raise ClauseError("the run directory is empty afterwards; delete nothing in it")


@SUITE.clause(
    "A second run in the same process goes as the first one did, and leaves its files alone.",
    needs=["takes-every-event"],
)
def repeats(case: Case) -> None:
    with workplace() as place:
        earlier, later = run_info(place, 1), run_info(place, 2)
        try:
            before = case.play(earlier)
            again = case.play(later)
        except ClauseError as broken:
            raise ClauseError(f"after another run in this process {broken}; {_ANEW}") from broken
        after = files(earlier.output_dir)
    for path in sorted(before.keys() | after.keys()):
        if before.get(path) != after.get(path):
            raise ClauseError(f"a later run changed {path} of the one before; {_ANEW}")
    once = case.first_run
    if len(once) != len(again):
        raise ClauseError(f"the first run has {len(once)} files, one of the same events after it {len(again)}; {_ANEW}")
    for path in sorted(once.keys() & again.keys()):
        lines, then = once[path].count(b"\n"), again[path].count(b"\n")  # the contents may name a time
        if lines != then:
            raise ClauseError(f"{path} has {lines} lines in the first run, {then} after the same events later; {_ANEW}")


_ANEW: Final = "keep nothing in the class or the module: the hook makes an observer for each run"


_HEARS: Final = ["takes-every-event", "repeats"]


@SUITE.clause(
    "It takes a run without held-out rows, and one whose output goes into a file instead of a terminal.", needs=_HEARS
)
def takes_any_run(case: Case) -> None:
    for terminal, held_out, which in (
        (True, False, "in a run without held-out rows"),
        (False, True, "in a run whose output is no terminal"),
    ):
        with workplace(terminal=terminal) as place:
            try:
                case.play(run_info(place), held_out=held_out)
            except ClauseError as broken:
                raise ClauseError(f"{which} {broken}") from broken


@SUITE.clause(
    "A run that fails is closed like any other: before it started, after the start, after a step.", needs=_HEARS
)
def closes_early(case: Case) -> None:
    for last, when in ((None, "before it started"), ("on_start", "after its start"), ("on_step", "after a step")):
        with workplace() as place:
            run = run_info(place)
            observer = case.observer(run)
            try:
                for event in _interrupted(run, last):
                    tell(observer, event, run)
            except ClauseError as broken:
                raise ClauseError(f"in a run that failed {when} {broken}; close is called then too") from broken


def _interrupted(run: RunInfo, last: str | None) -> list[Event]:
    """The events of a run that failed after `last`, or before it started."""
    told = events(run)
    names = [name for name, _ in told]
    return [*told[: 0 if last is None else names.index(last) + 1], told[-1]]


@SUITE.clause("Reports, the summary and the run file are as they were after it has seen them.", needs=_HEARS)
def reports_stay(case: Case) -> None:
    with workplace() as place:
        run = run_info(place)
        told = events(run)
        config, before = deepcopy(run.config), deepcopy(told)
        observer = case.observer(run)
        _stays(run.config, config, "the hook changed the config of its RunInfo")
        for event, (name, arguments) in zip(told, before, strict=True):
            tell(observer, event, run)
            _stays(event[1], arguments, f"{name} changed what it was told")
            _stays(run.config, config, f"{name} changed the config of the RunInfo")


def _stays(now: object, before: object, what: str) -> None:
    if now != before:
        raise ClauseError(f"{what}, which others are shown too; work on a copy (`dict(...)`, `copy.deepcopy`)")


@SUITE.clause(
    "It writes in the run directory alone, from on_start on, and changes no file of the run's own.", needs=_HEARS
)
def writes_only_in_the_run(case: Case) -> None:
    with workplace() as place:
        run = run_info(place)
        observer = case.observer(run)
        if early := sorted(path.relative_to(place) for path in place.rglob("*")):
            raise ClauseError(
                f"the hook made {early[0]}; a run writes nothing before all is checked, so begin in on_start, when "
                "run.output_dir is there"
            )
        for event in events(run):
            tell(observer, event, run)
        everything, written = files(place), files(run.output_dir)
        inside = run.output_dir.relative_to(place)
    outside = [path for path in everything if not path.is_relative_to(inside)]
    if outside:
        raise ClauseError(f"it wrote {outside[0]} beside the run directory; write below run.output_dir")
    changed = [path for path, content in engine_files().items() if written.get(path) != content]
    if changed:
        raise ClauseError(f"it changed {changed[0]}, which the run wrote; write files of its own, under other names")


@SUITE.clause(
    "Random numbers, torch's modes, signal handlers and output streams are the process's own, and stay as they are.",
    needs=[*_HEARS, "closes-early"],
)
def leaves_the_state(case: Case) -> None:
    for last in ("on_end", "on_step"):
        with workplace() as place:
            run = run_info(place)
            before = process()
            observer = case.observer(run)
            _is_left(before, "the hook", drawing=True)
            for event in _interrupted(run, last):
                tell(observer, event, run)
                _is_left(before, event[0], drawing=event[0] != "close")


def _is_left(before: Mapping[str, object], who: str, *, drawing: bool) -> None:
    """Raises ClauseError when the state of the process is another. `drawing`: a live display may hold the streams."""
    now = process()
    for name, value in before.items():
        if value is None or (drawing and name in TERMINAL):
            continue
        if now[name] != value:
            raise ClauseError(
                f"{who} changed {name}; they are shared with the training: draw from a generator of your own, set "
                "nothing for the whole process, and put back in close what a display has taken"
            )


@SUITE.clause(
    "Training with it gives the same parameters as without it, bit for bit.", needs=[*_HEARS, "leaves-the-state"]
)
def changes_no_training(case: Case) -> None:
    kit = Kit(built_in("lora", lora_dropout=0.2))
    with workplace() as place:
        alone = _train(kit, run_info(place), None)
    with workplace() as place:
        run = run_info(place)
        observer = case.observer(run)
        try:
            watched = _train(kit, run, observer)
        except ClauseError:
            raise
        except Exception as error:
            observer.close()
            raise ClauseError(
                f"with it a training step raised {type(error).__name__}: {one_line(error)}; {_NO_HANDS}"
            ) from error
    changed = [name for name, value in alone.items() if name not in watched or not torch.equal(watched[name], value)]
    if changed:
        raise ClauseError(f"with it {len(changed)} parameters end up different (first: {changed[0]}); {_NO_HANDS}")


_NO_HANDS: Final = "look at the reports alone, and put no hook on modules or tensors"


def _train(kit: Kit, run: RunInfo, observer: Observer | None) -> dict[str, Tensor]:
    """What a short LoRA training with dropout ends with; an observer is told of it."""
    lm = kit.language_model({"lora": make(kit.plugin, "sftx_adapter", spec=kit.spec)})
    config = TrainConfig(max_steps=NUM_STEPS, per_device_train_batch_size=2, learning_rate=1e-2, use_cpu=True)
    collator, loss = CollatorStage("the collator", kit.collator), LossStage("the loss", kit.loss)
    steps = iter(EpochSampler(kit.examples, collator, config))
    trainer = Trainer(lm, loss, collator, config, choose(config), NUM_STEPS)
    for name, arguments in events(run):
        if name == "on_step":
            planned = next(steps)
            report = trainer.train_step(arguments[0].step, planned.epoch, trainer.micro_batches(planned))
            arguments = (report,)
        if observer is not None:
            tell(observer, (name, arguments), run)
    return {name: parameter.detach() for name, parameter in lm.named_parameters()}


def check_observer(plugin: object) -> None:
    """Holds the plugin's observer against each clause. Raises ContractError, naming those that it breaks."""
    SUITE.check(plugin)
