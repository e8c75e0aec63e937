"""TensorBoard: losses as curves, answers as text, and the run file under hyperparameters."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field

from sftx import Observer, RunInfo, Sample, StartReport, hookimpl
from sftx_plugins.observers._tracking import (
    ExitStatus,
    Scalar,
    Tracker,
    assembled_table,
    flatten,
    import_library,
    replace_surrogates,
    sample_rows,
    start_values,
)


@dataclass(frozen=True, eq=False)
class TensorBoard:
    """Writes event files: losses and rates by step, evaluations, answers, the run file and the result."""

    log_dir: Annotated[
        str | None,
        Field(
            min_length=1,
            description="Directory in which each run has a directory with the name of its run directory; by default "
            "`tensorboard` in the run directory.",
        ),
    ] = None

    @hookimpl
    def sftx_observer(self, run: RunInfo) -> Observer:
        directory = run.output_dir / "tensorboard"
        if self.log_dir is not None:
            directory = Path(self.log_dir).expanduser() / run.output_dir.name
        return _EventFiles(run, directory, import_library("torch.utils.tensorboard", "tensorboard"))


class _EventFiles(Tracker):
    def __init__(self, run: RunInfo, directory: Path, tensorboard: Any) -> None:
        super().__init__(run)
        self._directory = directory
        self._tensorboard = tensorboard
        self._writer: Any = None

    def begin(self, report: StartReport) -> None:
        # The reader drops what an interrupted process wrote for later steps.
        purge_step = 0 if report.resumed_step is None else report.resumed_step + 1
        self._writer = self._tensorboard.SummaryWriter(str(self._directory), purge_step=purge_step)
        step = report.resumed_step or 0
        if report.resumed_step is None:
            # SummaryWriter.add_hparams would put them into a second run in a directory of its own.
            from torch.utils.tensorboard.summary import hparams

            for summary in hparams(dict(flatten(self.run.config)), {"train/loss": None, "eval/loss": None})[:2]:
                self._writer.file_writer.add_summary(summary)
        self._writer.add_text("run/assembled", _blocks(assembled_table(report.providers)), step)
        self._writer.add_text("run/derived", _lines(start_values(report)), step)
        self._writer.flush()

    def log_values(self, values: Mapping[str, float], step: int) -> None:
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)
        self._writer.flush()  # at each step, so that a killed run has written all that it reported

    def log_samples(self, samples: Sequence[Sample], step: int) -> None:
        self._writer.add_text("eval/samples", _blocks(sample_rows(samples)), step)
        self._writer.flush()

    def log_summary(self, summary: Mapping[str, Scalar], step: int) -> None:
        self._writer.add_text("run/summary", _lines(summary), step)
        self._writer.flush()

    def finish(self, status: ExitStatus) -> None:
        self._writer.close()


def _lines(values: Mapping[str, Scalar]) -> str:
    return _verbatim("\n".join(f"{name}: {value}" for name, value in values.items()))


def _blocks(rows: Sequence[Mapping[str, str]]) -> str:
    blocks = ("\n\n".join(f"{name}:\n\n{_verbatim(text)}" for name, text in row.items()) for row in rows)
    return "\n\n---\n\n".join(blocks)


def _verbatim(text: str) -> str:
    """Return text as a code block in Markdown, which is how TensorBoard reads it, so that nothing in it is markup."""
    return "\n".join(f"    {line}" for line in replace_surrogates(text).splitlines() or [""])
