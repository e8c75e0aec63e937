"""The run in TensorBoard: curves, answers as text, and the run file under hyperparameters."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field

from sftx import Observer, RunInfo, Sample, StartReport, hookimpl
from sftx_plugins.observers._tracking import Ending, Scalar, Tracker, assembled, clean, derived, flat, library

_EXTRA = "tensorboard"


@dataclass(frozen=True, eq=False)
class TensorBoard:
    """Writes event files: losses and rates by step, evaluations, answers, the run file and the result."""

    log_dir: Annotated[
        str | None,
        Field(
            min_length=1,
            description="Directory in which each run has one of its own, by the name of its run directory; by default "
            "the files lie in `tensorboard` in the run directory.",
        ),
    ] = None

    @hookimpl
    def sftx_observer(self, run: RunInfo) -> Observer:
        place = run.output_dir / "tensorboard"
        if self.log_dir is not None:
            place = Path(self.log_dir).expanduser() / run.output_dir.name
        return _Events(run, place, library("torch.utils.tensorboard", _EXTRA))


class _Events(Tracker):
    def __init__(self, run: RunInfo, place: Path, tensorboard: Any) -> None:
        super().__init__(run)
        self._place = place
        self._tensorboard = tensorboard
        self._writer: Any = None

    def begin(self, report: StartReport) -> None:
        # What an interrupted process told of later steps is void; the reader leaves it out from here on.
        first = 0 if report.resumed_step is None else report.resumed_step + 1
        self._writer = self._tensorboard.SummaryWriter(str(self._place), purge_step=first)
        step = report.resumed_step or 0
        if report.resumed_step is None:
            self._hyperparameters(flat(self.run.config))
        self._text("run/assembled", _blocks(assembled(report.providers)), step)
        self._text("run/derived", _block(_lines(derived(report))), step)
        self._writer.flush()

    def points(self, values: Mapping[str, float], step: int) -> None:
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)
        self._writer.flush()  # at each step, so that a run that is killed has written all that it reported

    def samples(self, samples: Sequence[Sample], step: int) -> None:
        rows = [
            {"row": s.row_id, "prompt": s.prompt, "reference": s.reference, "prediction": s.prediction} for s in samples
        ]
        self._text("eval/samples", _blocks(rows), step)
        self._writer.flush()

    def figures(self, figures: Mapping[str, Scalar], step: int) -> None:
        self._text("run/summary", _block(_lines(figures)), step)
        self._writer.flush()

    def finish(self, ending: Ending) -> None:
        self._writer.close()

    def _hyperparameters(self, options: Mapping[str, Scalar]) -> None:
        # Not add_hparams, which puts them into a second run in a directory of its own.
        from torch.utils.tensorboard.summary import hparams

        for summary in hparams(dict(options), {"train/loss": None, "eval/loss": None})[:2]:
            self._writer.file_writer.add_summary(summary)

    def _text(self, name: str, text: str, step: int) -> None:
        self._writer.add_text(name, text, step)


def _lines(values: Mapping[str, Scalar]) -> str:
    return "\n".join(f"{name}: {value}" for name, value in values.items())


def _blocks(rows: Sequence[Mapping[str, str]]) -> str:
    return "\n\n---\n\n".join("\n\n".join(f"{name}:\n\n{_block(text)}" for name, text in row.items()) for row in rows)


def _block(text: str) -> str:
    """Text as it stands: TensorBoard reads Markdown, in which indented lines are code and nothing in them counts."""
    return "\n".join(f"    {line}" for line in clean(text).splitlines() or [""])
