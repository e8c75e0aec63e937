"""A run that is assembled: trains, evaluates, saves, and goes on where an interrupted one stopped."""

from __future__ import annotations

import contextlib
import logging
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from sftx.assembly.registry import Assembly
from sftx.atomic_files import damage, write_json
from sftx.atomic_files import directory as whole_directory
from sftx.checkpoint import checkpoint
from sftx.checkpoint.run_directory import RunDirectory
from sftx.checkpoint.run_state import RunState
from sftx.config.options import RunConfig
from sftx.data.sampler import Plan, StreamPlan
from sftx.distributed.process_group import ProcessGroup
from sftx.distributed.signals import DeferredSignals, Stop
from sftx.errors import (
    ConfigError,
    DataError,
    OutputError,
    SftxError,
    TrainingError,
    did_you_mean,
    is_out_of_memory,
    one_line,
)
from sftx.events import EvalReport, Result, RunInfo, StartReport, StepReport
from sftx.inspection.run_report.run_report import complete_reports
from sftx.trainer.evaluate import Evaluator, write_predictions
from sftx.trainer.evidence import as_evidence
from sftx.trainer.observers import Observers
from sftx.trainer.trainer import Trainer, train

if TYPE_CHECKING:
    from sftx.data.preprocess import Dataset
    from sftx.model.language_model import LanguageModel

log = logging.getLogger(__name__)

_MINUTES: Final = 30.0  # between two checkpoints of a run that does not say


@dataclass
class Session:
    """What a run stands on, and what it does."""

    config: RunConfig
    resolved: Mapping[str, Any]
    """The run file, every default and every plugin's options written out."""
    manifest: Mapping[str, Any]
    """Versions, and hashes of what it reads."""
    assembly: Assembly
    process_group: ProcessGroup
    """Every process of the run has a session. What is written and told is the main one's; what it decides holds."""
    directory: RunDirectory
    choose: Callable[[], RunDirectory]
    """Gives another one when another run took this. Raises OutputError."""
    observers: Observers
    """Of the main process; the others have none."""
    data: Dataset
    held_out: Dataset
    plan: Plan | StreamPlan
    lm: LanguageModel
    trainer: Trainer
    evaluator: Evaluator
    checkpoints: checkpoint.Checkpoints
    checkpoint: Path | None = None
    """What the run goes on from; its weights are in the model already."""
    rows: Sequence[dict[str, Any]] = ()
    """Training examples for the report."""
    state: RunState = field(default_factory=RunState)
    _saved_step: int | None = None
    _saved_at: float = 0.0
    _started: float = 0.0

    def run(self, started: float) -> Result:
        """The whole run. `started`: time.monotonic() when it began. Raises SftxError; Stop when a signal ended it."""
        self._started, self._saved_at = started, time.monotonic()
        try:
            self._claim()
            with DeferredSignals() as patience:
                self.trainer.check_stop = self.evaluator.check_stop = lambda: self._check_stop(patience)
                return Result(self.directory.path, self._run())
        finally:
            self.observers.close()
            self.directory.release()

    def _check_stop(self, patience: DeferredSignals) -> None:
        """Raises Stop in every process when a signal came to one."""
        signum = int(self.process_group.all_reduce_max(patience.pending or 0))
        if signum:
            raise Stop(signum)

    def _run(self) -> dict[str, Any]:
        try:
            self._begin()
            self._train()
            return self._finish()
        except Stop as stop:
            raise self._stopped(stop) from None
        except SftxError as error:
            if not isinstance(error, DataError) and getattr(error, "kind", "") != DataError.__name__:
                self._clean_up()
                raise
            if self.state.step > 0 and self._saved_step != self.state.step:
                self.save()  # a stream whose source is gone: the steps that are done are as good as ever
            self._clean_up()
            raise
        except BaseException:
            self._clean_up()
            raise

    # --- the way --------------------------------------------------------------------------------

    def _claim(self) -> None:
        path = self.process_group.run_on_rank0(self._claimed)
        if self.directory.path != path:
            self.directory = replace(self.directory, path=path)

    def _claimed(self) -> Path:
        while not self.directory.claim():
            taken, self.directory = self.directory.path, self.choose()
            if self.directory.path == taken:
                raise OutputError(f"output_dir {taken}: another process is at work in it")
            self.observers = Observers(self.assembly.observers(RunInfo(self.directory.path, self.resolved)))
        return self.directory.path

    def _begin(self) -> None:
        """Writes what the run is, or takes up the state of what there is; and evaluates that."""
        if self.checkpoint is not None:
            self._restore(self.checkpoint)
        self.process_group.run_on_rank0(self._write_start)
        self.observers.on_start(self.report())
        self._warn_if_best_is_lost()
        if len(self.held_out.examples) and (self.state.before is None or self._is_evaluation_due()):
            self._evaluate(self.state.step)
            if self.checkpoint is not None:
                self.save()  # again, as the interrupted evaluation belongs to it

    def _write_start(self) -> None:
        if self.checkpoint is not None:
            self.directory.complete(self.manifest)
        else:
            self.directory.write_start(self.resolved, self.manifest)
        self._write_ledgers()
        self._write_evidence()

    def _restore(self, saved: Path) -> None:
        self.process_group.all_or_raise(lambda: self._read_state(saved))
        self.trainer.last_saved, self._saved_step = str(saved), self.state.step
        # Of a process too that was killed before it could.
        self.process_group.run_on_rank0(lambda: self.checkpoints.prune(keep=self.state.best_step))

    def _read_state(self, saved: Path) -> None:
        try:
            tensors, values = checkpoint.read_state(saved)
            self.state = RunState.of(values["run"])
            self.plan.load_state_dict(values["plan"])
            self.trainer.load_state_dict(tensors, values["trainer"])
        except SftxError:
            raise
        except Exception as error:  # of JSON, of safetensors, or a value that is not there
            raise OutputError(
                f"{saved}: its state cannot be read: {type(error).__name__}: {one_line(error)}; move it away, and "
                "--resume takes the one before it"
            ) from error

    def _train(self) -> None:
        if not self._is_over():
            train(self.trainer, self.plan, self.state.step, self._after_step)
        self.process_group.run_on_rank0(
            self._write_ledgers
        )  # once more: of a stream, all rows that were read are known now

    def _finish(self) -> dict[str, Any]:
        """Writes the artefact and the summary."""
        options, state = self.config.train, self.state
        if state.step < self.plan.num_steps:
            name = options.best_metric
            log.info("ends after step %d: %s was no better %d times in a row", state.step, name, state.num_worse)
        is_last = state.best_step in (None, state.step)
        if options.load_best_model_at_end and not is_last and not self._warn_if_best_is_lost():
            self._take_best(state.best_step or 0)
        artefact = self.directory.path / ("adapter" if self.lm.adapters else "model")
        self._write_together(artefact, lambda part: checkpoint.write_artefact(self.lm, part, self.process_group))
        self.observers.on_save(state.step, artefact)
        return self.process_group.run_on_rank0(lambda: self._conclude(artefact))

    def _conclude(self, artefact: Path) -> dict[str, Any]:
        """What the main process writes and tells last."""
        write_json(self.directory.file("trainer_state.json"), self._trainer_state())
        summary = self.summary(artefact)
        self.directory.write_summary(summary)
        self.observers.on_end(summary)
        complete_reports(self.directory.path)
        return summary

    def _write_together(self, place: Path, write: Callable[[Path], None], *, checksums: bool = False) -> None:
        """A directory that every process writes to, there whole or not at all."""
        with contextlib.ExitStack() as stack:
            part = self.process_group.run_on_rank0(
                lambda: stack.enter_context(whole_directory(place, checksums=checksums))
            )
            with self.process_group.detect_lost_peers():
                write(part)
            self.process_group.run_on_rank0(stack.close)

    def _take_best(self, step: int) -> None:
        if self._saved_step != self.state.step:
            self.save()  # from here on the weights are no longer those of the last step
        best = self.checkpoints.at(step)
        trusted = self.config.trust_remote_code
        self.process_group.one_rank_at_a_time(lambda: checkpoint.load_weights(self.lm, best, trust_remote_code=trusted))
        log.info("the result is that of step %d, the best %s", step, self.config.train.best_metric)
        self._evaluate(step)

    def _warn_if_best_is_lost(self) -> bool:
        """Whether the checkpoint that was the best so far cannot become the result."""
        step = self.state.best_step
        if step is None or not self.config.train.load_best_model_at_end:
            return False
        place = self.checkpoints.at(step)
        what = self.process_group.run_on_rank0(lambda: damage(place))
        if what is not None:
            log.warning("%s, the best so far, is lost: %s; the result will be another step's", place, what)
        return what is not None

    def _after_step(self, report: StepReport) -> bool:
        """Reports a step, evaluates and saves where the options ask for it; returns whether to go on."""
        options = self.config.train
        is_end = report.step in (1, report.num_steps)
        self.state.add_step(report, logged=is_end or report.step % options.logging_steps == 0)
        self.observers.on_step(report)
        is_best = self._evaluate(report.step) if self._is_evaluation_due() else False
        if is_best or self._is_save_due():
            self.save()
        return not self._is_over()

    def _is_over(self) -> bool:
        patience = self.config.train.early_stopping_patience
        is_stopped_early = patience is not None and self.state.num_worse >= patience
        return is_stopped_early or self.state.step >= self.plan.num_steps

    def _is_evaluation_due(self) -> bool:
        step, every = self.state.step, self.config.train.eval_steps
        is_done = self.state.latest is not None and self.state.latest.step >= step
        return not is_done and ((every is not None and step % every == 0) or step == self.plan.num_steps)

    def _is_save_due(self) -> bool:
        every, minutes = self.config.train.save_steps, self.config.train.save_minutes
        if every is not None and self.state.step % every == 0:
            return True
        minutes = _MINUTES if every is None and minutes is None else minutes
        return minutes is not None and self.process_group.run_on_rank0(
            lambda: time.monotonic() - self._saved_at >= 60 * minutes
        )

    # --- evaluation and saving ------------------------------------------------------------------

    def _evaluate(self, step: int) -> bool:
        """The held-out rows, if there are any; returns whether the model was never better."""
        if not len(self.held_out.examples):
            return False
        report = self.evaluator(self.lm, step)
        if report.samples:
            file = self.directory.file("generated_predictions.jsonl")
            self.process_group.run_on_rank0(lambda: write_predictions(file, report.samples))
        self.observers.on_evaluate(report)
        name = self.config.train.best_metric
        if name is not None and name not in report.metrics:
            hint = did_you_mean(name, report.metrics) or f"; there are {', '.join(report.metrics)}"
            raise ConfigError(f"metric_for_best_model {name!r} is not reported{hint}; other metrics come with --plugin")
        shown = replace(report, samples=report.samples[: self.config.generation.num_samples])
        value = None if name is None else report.metrics[name]
        is_best = self.state.add_evaluation(shown, value, self.config.train)
        self.process_group.run_on_rank0(self._write_evidence)
        return is_best

    def save(self) -> None:
        """A checkpoint of the last step that is done."""
        state, place = self.state, self.checkpoints.at(self.state.step)
        tensors, values = self.trainer.state_dict()
        run = replace(state, wall_seconds=self._wall_seconds()).as_dict()
        all_values = {"run": run, "plan": self.plan.state_dict(state.step), "trainer": values}

        def write(part: Path) -> None:
            checkpoint.write_artefact(self.lm, part, self.process_group, consolidated=False)
            checkpoint.write_state(part, tensors, all_values, self._trainer_state(), self.process_group)

        try:
            self._write_together(place, write, checksums=True)
        except OutputError as error:
            if is_out_of_memory(error):
                raise TrainingError(
                    f"step {state.step}: no memory to gather what is to be saved; last saved: {self.trainer.last_saved}"
                ) from error
            raise
        self._saved_step, self._saved_at, self.trainer.last_saved = state.step, time.monotonic(), str(place)
        self.process_group.run_on_rank0(lambda: self.checkpoints.prune(keep=state.best_step))
        self.observers.on_save(state.step, place)

    def _trainer_state(self) -> dict[str, Any]:
        return self.state.as_trainer_state(self.config.train, self.plan.num_steps, self.checkpoints.directory)

    def _write_ledgers(self) -> None:
        for name, data in (("ledger.jsonl", self.data), ("ledger-held-out.jsonl", self.held_out)):
            if data.ledger.num_rows:
                data.ledger.write(self.directory.file(name))

    def _write_evidence(self) -> None:
        before, after = (None if one is None else one.token_losses for one in (self.state.before, self.state.latest))
        write_json(self.directory.file("evidence.json"), as_evidence(self.rows, before, after))

    # --- how it ends otherwise ------------------------------------------------------------------

    def _stopped(self, stop: Stop) -> Stop:
        """Saves the last step that is done, when a signal came. Returns what is to be told."""
        name, state = stop.signal.name, self.state
        if self._saved_step != state.step and state.step > 0:
            self.save()
        if self._saved_step is None:
            self._clean_up()
            return Stop(stop.signal, f"stopped by {name} before a step was done; nothing was kept")
        return Stop(
            stop.signal,
            f"stopped by {name} after step {state.step} of {self.plan.num_steps}; saved {self.trainer.last_saved}; "
            f"the same command with --resume goes on (output_dir {self.directory.path})",
        )

    def _clean_up(self) -> None:
        if self.process_group.is_rank0 and self.state.step == 0 and not self.directory.resumed:
            shutil.rmtree(self.directory.path, ignore_errors=True)  # nothing in it is worth a refusal of the next try

    # --- what is told ---------------------------------------------------------------------------

    def report(self) -> StartReport:
        """What was derived from options, data and model."""
        data, plan = self.data, self.plan
        parameters = {id(p): p for p in self.lm.parameters()}.values()
        return StartReport(
            providers=self.assembly.table(),
            model=self.config.model,
            device=str(self.lm.device),
            dtype=str(self.trainer.precision),
            num_parameters=sum(p.numel() for p in parameters),
            num_trainable=sum(p.numel() for p in parameters if p.requires_grad),
            num_rows=data.ledger.num_rows,
            num_examples=plan.scope.num_examples,
            num_label_tokens=plan.scope.num_label_tokens,
            num_input_tokens=plan.scope.num_input_tokens,
            num_eval_rows=self.held_out.ledger.num_rows,
            formats=dict(data.formats),
            ledger=(*data.ledger.summary(), *self.held_out.ledger.summary()),
            num_steps=plan.num_steps,
            num_processes=self.process_group.world_size,
            tokens_per_step=plan.scope.num_label_tokens / max(1, plan.scope.num_steps),
            is_stream=self.config.data.streaming,
            resumed_step=None if self.checkpoint is None else self.state.step,
        )

    def summary(self, artefact: Path) -> dict[str, Any]:
        """What summary.json holds: JSON values only."""
        state = self.state
        summary: dict[str, Any] = {
            "num_steps": state.step,
            "loss": {"first": state.first_loss, "last": state.last_loss},
            "num_label_tokens": state.num_label_tokens,
            "tokens_per_second": state.num_input_tokens / state.seconds,
            "peak_bytes": state.peak_bytes,
            "wall_seconds": self._wall_seconds(),
            "artefact": str(artefact),
        }
        if state.best_step is not None:
            summary["best"] = {"step": state.best_step, "value": state.best_value}
        if state.before is not None and state.latest is not None:
            summary["held_out"] = {"before": dict(state.before.metrics), "after": dict(state.latest.metrics)}
            summary["samples"] = _compared(state.before, state.latest)
        return summary

    def _wall_seconds(self) -> float:
        return self.state.wall_seconds + time.monotonic() - self._started


def _compared(before: EvalReport, after: EvalReport) -> list[dict[str, str]]:
    answers = {sample.row_id: sample for sample in after.samples}
    return [
        {
            "row": then.row_id,
            "prompt": then.prompt,
            "reference": then.reference,
            "before": then.prediction,
            "after": now.prediction,
        }
        for then in before.samples
        if (now := answers.get(then.row_id)) is not None
    ]
