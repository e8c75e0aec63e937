"""Write the files of a run directory other than checkpoints, and the summary of a run. Used on rank 0 only."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sftx.atomic_files import write_json, write_text
from sftx.checkpoint.layout import ROLLOUTS
from sftx.checkpoint.run_directory import RunDirectory
from sftx.checkpoint.run_state import RunState
from sftx.events import EvalReport, Sample
from sftx.phases import PhaseTimes
from sftx.trainer.evaluate import write_predictions
from sftx.trainer.evidence import as_evidence
from sftx.types import Answer, Rollouts

if TYPE_CHECKING:
    from sftx.data.dataset import Dataset


class RunWriter:
    """The files of one run directory."""

    def __init__(
        self,
        directory: RunDirectory,
        resolved: Mapping[str, Any],
        manifest: Mapping[str, Any],
        datasets: Mapping[str, Dataset],
        shown_rows: Sequence[dict[str, Any]],
        times: PhaseTimes,
    ) -> None:
        """`resolved`: the run file with every default written out; `datasets` by the name of their ledger's file;
        `shown_rows`: training examples for the report; `times`: those of this process since it began the run."""
        self.directory = directory
        self._resolved, self._manifest = resolved, manifest
        self._datasets, self._shown_rows = datasets, shown_rows
        self._times = times

    def write_start(self, state: RunState) -> None:
        """Write what the run is, unless it continues one that has written it."""
        self._drop_rollouts(state.step)
        if state.step > 0:
            self.directory.complete(self._manifest, state.step)
            if self.directory.has_new_length:
                self.directory.continue_with(self._resolved, state.step)
        else:
            self.directory.write_start(self._resolved, self._manifest)
        self.write_ledgers()
        self.write_evidence(state)

    def write_ledgers(self) -> None:
        """Write the ledgers; those of a stream grow while the run trains."""
        for name, data in self._datasets.items():
            if data.ledger.num_rows:
                data.ledger.write(self.directory.file(name))

    def write_evidence(self, state: RunState) -> None:
        """Write the examples and token losses that the report shows."""
        before, after = (None if one is None else one.token_losses for one in (state.before, state.latest))
        write_json(self.directory.file("evidence.json"), as_evidence(self._shown_rows, before, after))

    def write_predictions(self, samples: Sequence[Sample]) -> None:
        write_predictions(self.directory.file("generated_predictions.jsonl"), samples)

    def write_rollouts(self, step: int, made: Rollouts) -> None:
        """Append the answers of a window that is made after `step` steps, one JSON object a line."""
        lines = [json.dumps({"step": step, **_as_line(answer)}, ensure_ascii=False) for answer in made.answers]
        with self.directory.file(ROLLOUTS).open("a", encoding="utf-8", errors="backslashreplace") as file:
            file.writelines(f"{line}\n" for line in lines)

    def _drop_rollouts(self, step: int) -> None:
        """Remove the answers of windows that are made again, and a line that was not finished."""
        path = self.directory.file(ROLLOUTS)
        if path.exists():
            text = path.read_text(encoding="utf-8")
            whole = text[: text.rfind("\n") + 1].splitlines(keepends=True)
            kept = [line for line in whole if json.loads(line)["step"] < step]
            write_text(path, "".join(kept))

    def write_end(self, state: RunState, artefact: Path, trainer_state: Mapping[str, Any]) -> dict[str, Any]:
        """Write trainer_state.json and summary.json, and return the summary: JSON values only."""
        write_json(self.directory.file("trainer_state.json"), trainer_state)
        summary: dict[str, Any] = {
            "num_steps": state.step,
            "loss": {"first": state.first_loss, "last": state.last_loss},
            "num_label_tokens": state.num_label_tokens,
            "tokens_per_second": state.num_input_tokens / state.seconds,
            "peak_bytes": state.peak_bytes,
            "wall_seconds": sum((seconds := self.seconds(state)).values()),
            "seconds": seconds,
            "artefact": str(artefact),
        }
        if state.best_step is not None:
            summary["best"] = {"step": state.best_step, "value": state.best_value}
        if state.before is not None and state.latest is not None:
            summary["held_out"] = {"before": dict(state.before.metrics), "after": dict(state.latest.metrics)}
            summary["samples"] = _compared(state.before, state.latest)
        self.directory.write_summary(summary)
        return summary

    def seconds(self, state: RunState) -> dict[str, float]:
        """Return the wall time of the run so far by phase, earlier processes of it included."""
        seconds = Counter(state.phase_seconds)
        seconds.update(self._times.seconds())
        return dict(seconds)

    def remove_empty_run(self, state: RunState) -> None:
        """Remove the directory of a run that failed before its first step: it must not refuse the next attempt."""
        if state.step == 0 and not self.directory.resumed:
            shutil.rmtree(self.directory.path, ignore_errors=True)


def _as_line(answer: Answer) -> dict[str, Any]:
    """Return what is kept of an answer."""
    return {
        "row": answer.question.row_id,
        "number": answer.number,
        "prompt": answer.question.prompt,
        "reference": answer.question.reference,
        "answer": answer.text,
        "num_tokens": len(answer.token_ids),
        "finish_reason": answer.finish_reason,
        "rewards": dict(answer.rewards),
        "reward": answer.reward,
    }


def _compared(before: EvalReport, after: EvalReport) -> list[dict[str, str]]:
    """Return the answers to the same questions before and after training."""
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
