"""One run in progress: restore, train, evaluate, save, finish, or stop where nothing is lost."""

from __future__ import annotations

import contextlib
import logging
import shutil
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from sftx.assembly.stages.control_stage import ControlStage
from sftx.atomic_files import atomic_directory, find_damage, remove
from sftx.checkpoint import checkpoint, model_files
from sftx.checkpoint.run_directory import RunDirectory
from sftx.checkpoint.run_state import RunState
from sftx.checkpoint.uploading import Uploader
from sftx.config.options import RunConfig
from sftx.data.dataset import Dataset
from sftx.data.sampler import Sampler
from sftx.distributed.process_group import ProcessGroup
from sftx.distributed.signals import DeferredSignals, Stop
from sftx.errors import (
    ConfigError,
    DataError,
    OutputError,
    PluginError,
    SftxError,
    TrainingError,
    did_you_mean,
    is_out_of_memory,
    one_line,
)
from sftx.events import Decision, Result, StartReport, StepReport
from sftx.model.language_model import CausalLM
from sftx.phases import phase
from sftx.trainer.control import TrainerControl
from sftx.trainer.evaluate import ModelEvaluator
from sftx.trainer.observers import Observers
from sftx.trainer.precompute import Precomputation, file_in
from sftx.trainer.rollout import RolloutMaker
from sftx.trainer.run_writer import RunWriter
from sftx.trainer.trainer import Trainer

log = logging.getLogger(__name__)


@dataclass
class Session:
    """A run that is assembled. Every rank has a session; rank 0 writes and prints, and its decisions are broadcast."""

    config: RunConfig
    process_group: ProcessGroup
    data: Dataset
    eval_data: Dataset
    sampler: Sampler
    lm: CausalLM
    trainer: Trainer
    evaluator: ModelEvaluator
    observers: Observers
    """Those of rank 0; the other ranks have none."""
    controls: Mapping[str, ControlStage]
    """The control plugins of rank 0; the other ranks have none."""
    make_observers: Callable[[Path], Observers]
    """Makes those of another run directory, when the chosen one was taken."""
    choose_directory: Callable[[], RunDirectory]
    """Chooses another run directory. Raises OutputError."""
    writer: RunWriter
    checkpoints: checkpoint.Checkpoints
    checkpoint: Path | None
    """The checkpoint that the run resumes from; its weights are in the model already."""
    precomputation: Precomputation | None
    """None when the loss computes nothing before the first step."""
    start_report: StartReport
    rollout: RolloutMaker | None
    """What makes the examples of a run with a rollout."""
    save_dtype: torch.dtype | None
    """Of the parameters of a full model in the result; None: as they are trained. Checkpoints are always exact."""
    uploader: Uploader | None = None
    """What copies the run directory to a store; None on ranks other than 0, and where it stays on this machine."""
    state: RunState = field(default_factory=RunState)
    _saved_step: int | None = None

    def __post_init__(self) -> None:
        self.trainer.rate_factors = self.state.rate_factors
        self.control = TrainerControl(
            self.config.train,
            self.sampler.num_steps,
            self.process_group,
            self.controls,
            has_controls=self.process_group.all_reduce_max(len(self.controls)) > 0,
        )

    def run(self) -> Result:
        """Run to the end. Raises SftxError; Stop when a signal ended the run."""
        try:
            self._claim_directory()
            with DeferredSignals() as signals:
                return Result(self.writer.directory.path, self._run(signals))
        except BaseException as error:
            self.observers.on_fail(error)
            raise
        finally:
            self.observers.close()
            self.writer.directory.release()

    def _claim_directory(self) -> None:
        """Create and lock the run directory, or the next one when another run has taken it meanwhile."""
        writer = self.writer

        def claim() -> Path:
            while not writer.directory.claim():
                taken, writer.directory = writer.directory.path, self.choose_directory()
                if writer.directory.path == taken:
                    raise OutputError(f"output_dir {taken}: another process is at work in it")
                self.observers = self.make_observers(writer.directory.path)
            return writer.directory.path

        path = self.process_group.run_on_rank0(claim)
        if writer.directory.path != path:  # on a rank other than 0
            writer.directory = replace(writer.directory, path=path)
        self.checkpoints = replace(self.checkpoints, directory=writer.directory.file("checkpoints"))

    def _run(self, signals: DeferredSignals) -> dict[str, Any]:
        def check_stop() -> None:
            """Raise Stop on every rank when a signal came to one."""
            if signum := int(self.process_group.all_reduce_max(signals.pending or 0)):
                raise Stop(signum)

        self.trainer.check_stop = self.evaluator.check_stop = check_stop
        if self.rollout is not None:
            self.rollout.check_stop, self.rollout.write = check_stop, self.writer.write_rollouts
        try:
            self._start()
            if not self.control.should_stop(self.state):
                num_steps, done = self.sampler.num_steps, self.state.step
                with phase("training", total=num_steps, unit="steps", done=done) as self._training:
                    self.trainer.train(self.sampler, done, self._after_step)
            self.process_group.run_on_rank0(self.writer.write_ledgers)  # of a stream, all rows are known only now
            return self._finish()
        except Stop as stop:
            raise self._stopped(stop) from None
        except BaseException as error:
            is_data = isinstance(error, DataError) or getattr(error, "kind", "") == DataError.__name__
            # One rank alone may have met the error of a plugin, and cannot save without the others.
            is_plugin = isinstance(error, PluginError) and self.process_group.world_size == 1
            if (is_data or is_plugin) and self.state.step > 0 and self._saved_step != self.state.step:
                self.save()  # the steps that are done are as good as before
                log.info("saved %s; --resume goes on from it when the cause is mended", self.trainer.last_saved)
            if self.process_group.is_rank0:
                self.writer.remove_empty_run(self.state)
            raise

    # --- start, steps, end ----------------------------------------------------------------------

    def _start(self) -> None:
        """Restore the state of a resumed run, write the first files, and evaluate the model before training."""
        if self.checkpoint is not None:
            self._restore(self.checkpoint)
            self._check_length()
        self.process_group.run_on_rank0(lambda: self.writer.write_start(self.state))
        self.process_group.run_on_rank0(self._check_saving)
        resumed_step = None if self.checkpoint is None else self.state.step
        self.observers.on_start(replace(self.start_report, resumed_step=resumed_step))
        self._is_best_lost()  # warns
        self._precompute()
        if self.evaluator.has_work and (self.state.before is None or self.control.should_evaluate(self.state)):
            self._evaluate(self.state.step)
            self._decide_after_evaluation()
            if self.checkpoint is not None:
                self.save()  # again: the evaluation that was interrupted belongs to this checkpoint

    def _precompute(self) -> None:
        """Give trainer and evaluator what the loss computes of every example before the first step."""
        if (precomputation := self.precomputation) is None:
            return
        precomputation.check_stop = self.trainer.check_stop
        file = file_in(self.writer.directory.path)
        values = precomputation(file, is_trained=self.state.step > 0, model=self.config.model)
        self.trainer.precomputed, self.evaluator.precomputed = values.get("training"), values.get("held-out")

    def _check_saving(self) -> None:
        """Write what accompanies weights, and remove it again. Raises ModelError and OutputError.

        What cannot be saved is found before the first step, and so is a disk that has no room for the result.
        """
        at = self.checkpoints.directory if self.checkpoints.directory.is_dir() else self.writer.directory.path
        with atomic_directory(at / "check") as part:
            model_files.check(self.lm, part, self.config.model, trust_remote_code=self.config.trust_remote_code)
        remove(at / "check")
        needed, free = checkpoint.num_bytes(self.lm, self.save_dtype), shutil.disk_usage(at).free
        if free < needed:
            raise OutputError(
                f"{at}: the result takes {needed / 1e6:,.0f} MB, {free / 1e6:,.0f} MB are free; make room, or choose "
                "another place with --output-dir"
            )

    def _restore(self, saved: Path) -> None:
        def read_state() -> None:
            try:
                tensors, values = checkpoint.read_state(saved)
                self.state = RunState.from_dict(values["run"])
                self.sampler.load_state_dict(values["plan"])
                self.trainer.load_state_dict(tensors, values["trainer"])
                self.trainer.rate_factors = self.state.rate_factors
                self.control.restore(self.state)
            except SftxError:
                raise
            except Exception as error:  # an error of JSON or safetensors, or a value that is missing
                raise OutputError(
                    f"{saved}: its state cannot be read: {type(error).__name__}: {one_line(error)}; move it away, and "
                    "--resume takes the one before it"
                ) from error

        self.process_group.all_or_raise(read_state)
        self.trainer.last_saved, self._saved_step = str(saved), self.state.step
        # The process before may have been killed before it could do so.
        self.prune()

    def _check_length(self) -> None:
        """Raise ConfigError when a run is to end where it is already, or before; start a stopped one again."""
        state, directory = self.state, self.writer.directory
        if not self.process_group.run_on_rank0(lambda: directory.has_new_length):
            return
        if state.step >= self.sampler.num_steps:
            raise ConfigError(
                f"--resume: {directory.path} has done {state.step} steps, and would end after "
                f"{self.sampler.num_steps}; ask for more steps or epochs, or begin another run"
            )
        if state.stopped:
            log.info("the run was stopped (%s), and goes on", state.stopped)
            state.stopped = ""

    def _after_step(self, report: StepReport) -> bool:
        """Report a step, evaluate and save where they are due; return whether to continue."""
        self._training.update(note=f"loss {report.loss:.4f}")
        self.state.add_step(report)
        self.observers.on_step(report)
        if self.uploader is not None and not self.uploader.has_begun:
            self.ask_for_upload()
        if report.step in (1, report.num_steps) or report.step % self.config.train.logging_steps == 0:
            self.observers.on_log(self.state.log_steps())
        decision = self.control.decide(self.state, lambda control: control.after_step(report))
        is_best = False
        if self.control.should_evaluate(self.state) or decision.evaluate:
            is_best = self._evaluate(report.step)
            after = self._decide_after_evaluation()
            decision = replace(decision, save=decision.save or after.save)
        if is_best or decision.save or self.control.should_save(self.state):
            self.save()
        return not self.control.should_stop(self.state)

    def _finish(self) -> dict[str, Any]:
        """Take the best checkpoint where asked for, write the artefact and the summary."""
        options, state = self.config.train, self.state
        if state.step < self.sampler.num_steps:
            log.info("ends after step %d (%s)", state.step, state.stopped)
        is_last = state.best_step in (None, state.step)
        if options.load_best_model_at_end and not is_last and not self._is_best_lost():
            self._load_best(state.best_step or 0)
        artefact = self.writer.directory.path / ("adapter" if self.lm.adapters else "model")

        def write(part: Path) -> None:
            checkpoint.write_artefact(self.lm, part, self.process_group, dtype=self.save_dtype)

        self._write_atomically(artefact, write)
        if self.save_dtype is not None:
            log.info("the result is saved in %s (option save_dtype)", str(self.save_dtype).removeprefix("torch."))
        self.observers.on_save(state.step, artefact)
        if self.lm.adapters and self._saved_step != state.step:
            self.save()  # it is small, and the run can be extended from it

        def conclude() -> dict[str, Any]:
            summary = self.writer.write_end(state, artefact, self._trainer_state())
            self.observers.on_end(summary)
            return summary

        return self.process_group.run_on_rank0(conclude)

    def _stopped(self, stop: Stop) -> Stop:
        """Save the last step that is done, and return the exception with the message for the user."""
        name, state = stop.signal.name, self.state
        if self._saved_step != state.step and state.step > 0:
            self.save()
        if self._saved_step is None:
            if self.process_group.is_rank0:
                self.writer.remove_empty_run(state)
            return Stop(stop.signal, f"stopped by {name} before a step was done; nothing was kept")
        return Stop(
            stop.signal,
            f"stopped by {name} after step {state.step} of {self.sampler.num_steps}; saved {self.trainer.last_saved}; "
            f"the same command with --resume continues (output_dir {self.writer.directory.path})",
        )

    # --- evaluation and the best checkpoint -----------------------------------------------------

    def _evaluate(self, step: int) -> bool:
        """Evaluate the model, if there is something to evaluate; return whether this is the best value so far."""
        if not self.evaluator.has_work:
            return False
        report = self.evaluator(self.lm, step)
        if report.samples:
            self.process_group.run_on_rank0(lambda: self.writer.write_predictions(report.samples))
        self.observers.on_evaluate(report)
        name = self.config.train.best_metric
        if name is not None and name not in report.metrics:
            hint = did_you_mean(name, report.metrics) or f"; there are {', '.join(report.metrics)}"
            raise ConfigError(f"metric_for_best_model {name!r} is not reported{hint}; other scores come with --plugin")
        kept = replace(report, samples=report.samples[: self.config.generation.num_samples])
        value = None if name is None else report.metrics[name]
        is_best = self.state.add_evaluation(kept, value, self.config.train)
        self.process_group.run_on_rank0(lambda: self.writer.write_evidence(self.state))
        return is_best

    def _decide_after_evaluation(self) -> Decision:
        latest = self.state.latest
        return Decision() if latest is None else self.control.decide(self.state, lambda c: c.after_evaluate(latest))

    def _is_best_lost(self) -> bool:
        """Return, with a warning, whether the best checkpoint so far is damaged and cannot become the result."""
        step = self.state.best_step
        if step is None or not self.config.train.load_best_model_at_end:
            return False
        place = self.checkpoints.at(step)
        damage = self.process_group.run_on_rank0(lambda: find_damage(place))
        if damage is not None:
            log.warning("%s, the best so far, is lost: %s; the result will be another step's", place, damage)
        return damage is not None

    def _load_best(self, step: int) -> None:
        if self._saved_step != self.state.step:
            self.save()  # from here on the weights are no longer those of the last step
        best, trusted = self.checkpoints.at(step), self.config.trust_remote_code
        self.process_group.one_rank_at_a_time(lambda: checkpoint.load_weights(self.lm, best, trust_remote_code=trusted))
        log.info("the result is that of step %d, the best %s", step, self.config.train.best_metric)
        self._evaluate(step)

    # --- saving ---------------------------------------------------------------------------------

    def save(self) -> None:
        """Write a checkpoint of the last step that is done. Raises OutputError, TrainingError."""
        state, place = self.state, self.checkpoints.at(self.state.step)
        self.control.record(state)
        tensors, trainer = self.trainer.state_dict()
        run = replace(state, phase_seconds=self.writer.seconds(state)).as_dict()
        values = {"run": run, "plan": self.sampler.state_dict(state.step), "trainer": trainer}

        def write(part: Path) -> None:
            checkpoint.write_artefact(self.lm, part, self.process_group, consolidated=False)
            checkpoint.write_state(part, tensors, values, self._trainer_state(), self.process_group)

        try:
            self._write_atomically(place, write, checksums=True)
        except OutputError as error:
            if is_out_of_memory(error):
                raise TrainingError(
                    f"step {state.step}: no memory to gather what is to be saved; last saved: {self.trainer.last_saved}"
                ) from error
            raise
        self._saved_step, self.control.saved_at, self.trainer.last_saved = state.step, time.monotonic(), str(place)
        self.prune()
        self.ask_for_upload()
        self.observers.on_save(state.step, place)

    def prune(self) -> None:
        """Remove surplus checkpoints, but not one that is being uploaded."""
        best, uploader = self.state.best_step, self.uploader
        self.process_group.run_on_rank0(
            lambda: self.checkpoints.prune(keep=(best, None if uploader is None else uploader.busy))
        )

    def ask_for_upload(self) -> None:
        """Let the store be made like the run directory, where there is one. Returns at once."""
        if self.uploader is not None and self.state.step > 0:  # a run that fails before its first step leaves nothing
            self.uploader.changed(self.writer.directory.path, self.state.best_step)

    def _write_atomically(self, place: Path, write: Callable[[Path], None], *, checksums: bool = False) -> None:
        """Write a directory that every rank writes to, and that appears complete or not at all."""
        with phase("saving", place.name), contextlib.ExitStack() as stack:
            part = self.process_group.run_on_rank0(
                lambda: stack.enter_context(atomic_directory(place, checksums=checksums))
            )
            with self.process_group.detect_lost_peers():
                write(part)
            self.process_group.run_on_rank0(stack.close)

    def _trainer_state(self) -> dict[str, Any]:
        return self.state.as_trainer_state(self.config.train, self.sampler.num_steps, self.checkpoints.directory)
