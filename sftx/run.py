"""A run file and a command line, loaded, become a run directory: the whole way, from top to bottom.

options -> plugins -> tokenizer -> data -> model -> steps -> artefact. What can fail early does: plugins and their
options before torch is imported, data before weights are read; the run directory appears when all of that stands.
"""

from __future__ import annotations

import dataclasses
import importlib.metadata
import itertools
import json
import logging
import platform
import shutil
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, cast

from sftx import run_file
from sftx.config import DataConfig, RunConfig, Source, as_dict
from sftx.data import sources, wanted
from sftx.errors import ConfigError, ModelError, OutputError, one_line
from sftx.loading import Loaded
from sftx.model import names
from sftx.plugins import Assembly, activate
from sftx.reports import EvalReport, RunInfo, StartReport, StepReport
from sftx.types import Example

if TYPE_CHECKING:
    from sftx.data.prepare import Dataset
    from sftx.data.setup import Setup
    from sftx.model.language_model import LanguageModel
    from sftx.training.evaluate import Evaluator
    from sftx.training.loop import Trainer
    from sftx.training.observers import Observers
    from sftx.training.plan import Plan, StreamPlan
    from sftx.training.precision import Precision

log = logging.getLogger(__name__)

_LIBRARIES: Final = (
    "torch",
    "triton",
    "transformers",
    "tokenizers",
    "safetensors",
    "datasets",
    "pluggy",
    "pydantic",
)


@dataclass(frozen=True)
class Result:
    """Where a run lies, and what its summary.json says."""

    output_dir: Path
    summary: Mapping[str, Any]
    """`num_steps`, `num_tokens` (trained), `loss` (`first`, `last`), `tokens_per_second`, `peak_bytes`, `wall_seconds`,
    `artefact` (its directory); with held-out rows `held_out` (`before`, `after`: means by name) and `samples`."""


def run(loaded: Loaded, *, name: str = "run") -> Result:
    """Trains as `loaded` says; `name` begins the name of the default output directory. Raises SftxError."""
    started = time.perf_counter()
    return assemble(loaded, name=name).run(started)


def assemble(loaded: Loaded, *, name: str = "run") -> Session:
    """Everything before the first step: all that can be wrong is found here; nothing is written but the cache."""
    config = loaded.config
    names.check(config.model)
    wanted.check(config)
    output_dir = _output_dir(config.output_dir, name)
    assembly = activate(loaded)

    # From here on torch and transformers are needed: seconds of imports, after everything that is quick to check.
    from sftx.data.setup import set_up
    from sftx.training import precision as precisions
    from sftx.training.evaluate import Evaluator
    from sftx.training.loop import Trainer
    from sftx.training.observers import Observers

    precision = precisions.choose(config.train)
    prepared = set_up(loaded, assembly)
    metrics, loss = assembly.metrics(), assembly.loss()
    data, held_out = prepared.train(), prepared.held_out(questions=bool(metrics))
    if metrics and not held_out.questions:
        raise ConfigError(
            f"the metric {', '.join(metrics)} needs held-out conversations that end with an assistant's turn; "
            "give some with --eval-data, or leave the metric out"
        )
    plan = prepared.plan(data)
    lm = _load(config, prepared, precision, plan.examples)
    _check_fit(config, plan, lm, held_out)
    resolved = as_dict(config) | {"plugins": {active.info.name: active.options for active in assembly.active}}
    return Session(
        name=name,
        config=config,
        resolved=resolved,
        assembly=assembly,
        output_dir=output_dir,
        model_dir=prepared.model,
        data=data,
        held_out=held_out,
        plan=plan,
        lm=lm,
        trainer=Trainer(lm, loss, prepared.collator, config.train, precision, plan.num_steps),
        evaluator=Evaluator(
            held_out,
            collator=prepared.collator,
            loss=loss,
            metrics=metrics,
            precision=precision,
            stop_ids=prepared.encoder.stop_ids,
            batch_size=config.train.per_device_eval_batch_size,
            generation=config.generation,
        ),
        observers=Observers(assembly.observers(RunInfo(output_dir, resolved))),
    )


def _output_dir(wanted: str | None, name: str) -> Path:
    """The directory that this run will make. Raises OutputError when it holds something already."""
    if wanted is None:
        return next(path for n in itertools.count(1) if not (path := Path("runs") / f"{name}-{n}").exists())
    try:
        path = Path(wanted).expanduser()
        taken = path.is_dir() and any(path.iterdir())
        is_file = not path.is_dir() and (path.exists() or path.is_symlink())
    except (OSError, RuntimeError, ValueError) as error:
        raise OutputError(f"output_dir {wanted}: cannot be used: {one_line(error)}") from error
    if is_file:
        raise OutputError(f"output_dir {wanted}: is a file; name a directory that does not exist yet")
    if taken:
        what = "a run" if (path / "run.yaml").exists() else "files"
        raise OutputError(f"output_dir {wanted}: holds {what} already, which is never written over; choose another")
    return path


def _load(config: RunConfig, prepared: Setup, precision: Precision, examples: Sequence[Example]) -> LanguageModel:
    """The model with its adapters, checked to compute what its own forward computes, packed rows of examples too."""
    import torch

    from sftx.model.language_model import LanguageModel
    from sftx.model.load import load_model, load_spec
    from sftx.model.probe import check_packing
    from sftx.model.tokens import ids_of

    spec = load_spec(prepared.model, trust_remote_code=config.trust_remote_code)
    spec = dataclasses.replace(spec, new_token_ids=ids_of(prepared.added_tokens, prepared.tokenizer))
    adapters = prepared.assembly.adapters(spec)
    dtype = precision.base_dtype(frozen=bool(adapters))
    model = load_model(spec, list(adapters.values()), dtype=dtype, device=precision.device)
    lm = LanguageModel(model, prepared.tokenizer)
    torch.manual_seed(config.train.seed)
    lm.attach(adapters)
    with precision.autocast():
        lm.check()
        check_packing(lm, prepared.collator, examples)
    return lm


def _check_fit(config: RunConfig, plan: Plan | StreamPlan, lm: LanguageModel, held_out: Dataset) -> None:
    """Raises ModelError for token ids without an embedding; notes what is likely a mistake."""
    from sftx.training.schedule import num_warmup_steps

    num_rows = cast(Any, lm.model.get_input_embeddings()).weight.shape[0]
    largest = max(plan.scope.largest_id, held_out.examples.largest_id)
    if largest >= num_rows:
        raise ModelError(
            f"model {config.model}: its tokenizer gives the id {largest}, its embedding has {num_rows} rows; "
            "they do not belong together"
        )
    longest = max(plan.scope.longest, int(held_out.examples.lengths.max(initial=0)))
    limit = getattr(lm.config, "max_position_embeddings", None)
    if limit is not None and longest > limit:
        log.warning("the longest row has %d tokens, the model was made for %d; lower data.max_length", longest, limit)
    warmup = num_warmup_steps(config.train, plan.num_steps)
    if warmup >= plan.num_steps:
        log.warning(
            "all %d steps are warm-up (warmup_steps %d): the peak rate is never reached", plan.num_steps, warmup
        )


@dataclass
class Session:
    """A run that is assembled: what it stands on, and what it does."""

    name: str
    config: RunConfig
    resolved: Mapping[str, Any]
    """The run file, every default and every plugin's options written out."""
    assembly: Assembly
    output_dir: Path
    model_dir: str
    data: Dataset
    held_out: Dataset
    plan: Plan | StreamPlan
    lm: LanguageModel
    trainer: Trainer
    evaluator: Evaluator
    observers: Observers
    _steps: list[StepReport] = field(default_factory=list)

    def run(self, started: float) -> Result:
        """Trains, evaluates and saves. `started`: time.perf_counter() when the run began. Raises SftxError."""
        from sftx.training.loop import train

        self._claim()
        try:
            self._write_start()
            self.observers.on_start(self.report())
            before = self.evaluate(0)
            train(self.trainer, self.plan, self.after_step)
            self._write_ledgers()  # once more: of a stream, all rows that were read are known now
            after = self.evaluate(self.plan.num_steps)
            artefact = self.output_dir / ("adapter" if self.lm.adapters else "model")
            self.save(artefact, self.plan.num_steps)
            summary = self.summary(before, after, artefact, time.perf_counter() - started)
            _write_json(self.output_dir / "summary.json", summary)
            self.observers.on_end(summary)
        except BaseException:
            if not self._steps and self.trainer.last_saved == "none":
                shutil.rmtree(self.output_dir, ignore_errors=True)  # nothing in it is worth a refusal of the next try
            raise
        finally:
            self.observers.close()
        return Result(self.output_dir, summary)

    def after_step(self, report: StepReport) -> None:
        """Reports a step, and saves and evaluates where the options ask for it."""
        from sftx.training import checkpoint

        self._steps.append(report)
        self.observers.on_step(report)
        options, is_last = self.config.train, report.step == report.num_steps
        if options.save_steps and report.step % options.save_steps == 0:
            checkpoints = self.output_dir / "checkpoints"
            self.save(checkpoints / f"step-{report.step}", report.step)
            checkpoint.prune(checkpoints, options.save_total_limit)
        if options.eval_steps and report.step % options.eval_steps == 0 and not is_last:
            self.evaluate(report.step)

    def evaluate(self, step: int) -> EvalReport | None:
        """The held-out rows, if there are any."""
        if not len(self.held_out.examples):
            return None
        report = self.evaluator(self.lm, step)
        self.observers.on_evaluate(report)
        return report

    def save(self, directory: Path, step: int) -> None:
        from sftx.training import checkpoint

        checkpoint.save(self.lm, directory)
        self.trainer.last_saved = str(directory)
        self.observers.on_save(step, directory)

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
            num_tokens=plan.scope.num_tokens,
            num_real_tokens=plan.scope.num_real_tokens,
            num_eval_rows=self.held_out.ledger.num_rows,
            formats=dict(data.formats),
            ledger=(*data.ledger.summary(), *self.held_out.ledger.summary()),
            num_steps=plan.num_steps,
            tokens_per_step=plan.scope.num_tokens / max(1, plan.scope.num_steps),
            is_stream=self.config.data.streaming,
        )

    def summary(
        self, before: EvalReport | None, after: EvalReport | None, artefact: Path, wall_seconds: float
    ) -> dict[str, Any]:
        """What summary.json holds: JSON values only."""
        steps = self._steps
        summary: dict[str, Any] = {
            "num_steps": len(steps),
            "loss": {"first": steps[0].loss, "last": steps[-1].loss},
            "num_tokens": sum(step.num_tokens for step in steps),
            "tokens_per_second": sum(s.num_real_tokens for s in steps) / sum(s.seconds for s in steps),
            "peak_bytes": steps[-1].peak_bytes,
            "wall_seconds": wall_seconds,
            "artefact": str(artefact),
        }
        if before is not None and after is not None:
            summary["held_out"] = {"before": dict(before.metrics), "after": dict(after.metrics)}
            pairs = zip(before.samples, after.samples, strict=True)
            shown = itertools.islice(pairs, self.config.generation.num_samples)
            summary["samples"] = [
                {
                    "row": then.row_id,
                    "prompt": then.prompt,
                    "reference": then.reference,
                    "before": then.prediction,
                    "after": now.prediction,
                }
                for then, now in shown
            ]
        return summary

    def _claim(self) -> None:
        """Makes the run directory, which another run may have taken since it was chosen. Raises OutputError."""
        from sftx.training.observers import Observers

        while True:
            try:
                self.output_dir.mkdir(parents=True)
                return
            except FileExistsError:
                again = _output_dir(self.config.output_dir, self.name)  # refuses one that is not empty
                if again == self.output_dir:
                    return
                self.output_dir = again
                self.observers = Observers(self.assembly.observers(RunInfo(again, self.resolved)))
            except OSError as error:
                raise OutputError(f"output_dir {self.output_dir}: cannot be written: {one_line(error)}") from error

    def _write_start(self) -> None:
        """Writes all that is known before the first step. Raises OutputError."""
        manifest = self._manifest()
        try:
            self._write_ledgers()
            run_file.write(dict(self.resolved), self.output_dir / "run.yaml")
            _write_json(self.output_dir / "manifest.json", manifest)
        except (OSError, OutputError) as error:
            raise OutputError(f"output_dir {self.output_dir}: cannot be written: {one_line(error)}") from error

    def _write_ledgers(self) -> None:
        for name, data in (("ledger.jsonl", self.data), ("ledger-held-out.jsonl", self.held_out)):
            if data.ledger.num_rows:
                data.ledger.write(self.output_dir / name)

    def _manifest(self) -> dict[str, Any]:
        from sftx import __version__
        from sftx.model.load import fingerprint

        return {
            "sftx": __version__,
            "python": platform.python_version(),
            "platform": platform.platform(),
            "libraries": {name: _version(name) for name in _LIBRARIES},
            "device": str(self.lm.device),
            "dtype": str(self.trainer.precision),
            "plugins": [dataclasses.asdict(provider) for provider in self.assembly.table()],
            "model": {
                "name": self.config.model,
                "files": self.model_dir,
                "sha256": fingerprint(self.model_dir),
                "revision": getattr(self.lm.model.config, "_commit_hash", None),
            },
            "data": [_described(source, self.config.data) for source in self.config.data.train],
            "eval_data": [_described(source, self.config.data) for source in self.config.data.eval],
        }


def _described(source: Source, config: DataConfig) -> dict[str, Any]:
    """A source and what its content was; a stream is not read twice over only to say that."""
    content = None if config.streaming else sources.fingerprint(source)
    return {"path": source.path, "subset": source.subset, "split": source.split, "fingerprint": content}


def _version(library: str) -> str | None:
    try:
        return importlib.metadata.version(library)
    except importlib.metadata.PackageNotFoundError:
        return None


def _write_json(path: Path, values: Mapping[str, Any]) -> None:
    try:
        path.write_text(json.dumps(values, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    except OSError as error:
        raise OutputError(f"{path}: cannot be written: {one_line(error)}") from error
