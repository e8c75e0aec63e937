"""Read a run directory into a `RunRecord`, whether the run is complete, still running or interrupted.

Each file may be missing or damaged: what cannot be read is named in `RunRecord.notes` and left out. The values in the
files are not trusted: every number, mapping and list is checked before use.
"""

from __future__ import annotations

import bisect
import itertools
import json
import math
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, NamedTuple, TypeAlias

from sftx.checkpoint import layout
from sftx.config import run_file
from sftx.errors import ConfigError, counted, kind_of, one_line

Columns: TypeAlias = dict[str, list[float | None]]
"""Lists of equal length by name. A value is None where it is missing or not a finite number."""

EVIDENCE: Final = "evidence.json"
_METRICS: Final = "metrics.jsonl"
_LEDGERS: Final = {"training": "ledger.jsonl", "held-out": "ledger-held-out.jsonl"}
_STEP_VALUES: Final = ("epoch", "loss", "learning_rate", "grad_norm", "tokens_per_second", "peak_bytes")
_ROLLOUT_VALUES: Final = ("reward", "kl", "entropy", "completions/mean_length")
"""What the steps of a run with a rollout report besides `rewards/NAME/mean`, in the order of the page."""
_MAX_ANSWERED: Final = 6
"""Answers are shown of so many windows, spread over the run."""
_CUMULATIVE: Final = ("step", "tokens", "minutes", "epoch", "peak_bytes")
_MAX_NAMED_LINES: Final = 3
_EXPECTED: Final[Mapping[str, Mapping[str, type]]] = {
    layout.MANIFEST: {"libraries": dict, "plugins": list, "data": list, "eval_data": list},
    layout.SUMMARY: {"held_out": dict, "samples": list, "loss": dict, "best": dict},
    EVIDENCE: {"rows": list, "token_losses": dict},
}
"""The kinds of values in each file; any of them may also be missing or null."""


class LedgerCount(NamedTuple):
    """How many rows of a split were dropped or changed for one reason."""

    split: str
    action: str
    reason: str
    num_rows: int
    first: str
    """The place of the first of these rows."""


@dataclass
class RunRecord:
    """The content of one run directory."""

    path: Path
    run_yaml: str | None = None
    """The text of run.yaml; None if it is missing."""
    config: Mapping[str, Any] = field(default_factory=dict)
    manifest: Mapping[str, Any] = field(default_factory=dict)
    summary: Mapping[str, Any] = field(default_factory=dict)
    evidence: Mapping[str, Any] = field(default_factory=dict)
    steps: Columns = field(default_factory=dict)
    """`step`, `tokens` (label tokens so far), `minutes` (spent in steps so far), and the values of each step."""
    evaluations: Columns = field(default_factory=dict)
    """`step`, `tokens` and `minutes` as above, and each held-out metric; step 0 is the model before training."""
    num_steps: int | None = None
    """The planned number of optimizer steps."""
    answered: list[tuple[int, Mapping[str, Any], Mapping[str, Any]]] = field(default_factory=list)
    """For some windows of a run with a rollout, the steps before it, its best and its worst answer by their rewards."""
    ledger: list[LedgerCount] = field(default_factory=list)
    """The most frequent reason comes first."""
    notes: list[str] = field(default_factory=list)
    """Descriptions of what is missing or damaged."""

    @property
    def is_complete(self) -> bool:
        return bool(self.summary)


def read_run(path: Path) -> RunRecord:
    """Read a run directory. Raises ConfigError when there is no run in `path`."""
    if not path.is_dir():
        raise ConfigError(f"{path}: {'is a file' if path.exists() else 'no such directory'}; name that of a run")
    try:
        if not any((path / name).exists() for name in (layout.RUN, layout.MANIFEST, layout.SUMMARY, _METRICS)):
            raise ConfigError(f"{path}: holds no run (no {layout.RUN} there); name the directory that `sftx run` wrote")
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {one_line(error)}") from error
    record = RunRecord(path)
    record.run_yaml = _read_text(record, layout.RUN)
    if record.run_yaml is not None:
        try:
            record.config = run_file.read(path / layout.RUN)[0]
        except ConfigError as error:
            record.notes.append(str(error))
        if not record.run_yaml.strip():
            record.notes.append(f"{layout.RUN} is empty: the options are not known")
    record.manifest = _read_object(record, layout.MANIFEST, "versions and plugins are not known")
    record.summary = layout.with_new_names(
        _read_object(record, layout.SUMMARY, "the run is still running, or was interrupted")
    )
    record.evidence = _read_object(record, EVIDENCE, "training rows and the loss of single tokens are not shown")
    for name, values in (
        (layout.MANIFEST, record.manifest), (layout.SUMMARY, record.summary), (EVIDENCE, record.evidence),
    ):  # fmt: skip
        for key, kind in _EXPECTED[name].items():
            if not isinstance(values.get(key), kind | None):
                record.notes.append(f"{name}: {key} is {kind_of(values[key])} and left out; expected {kind_of(kind())}")
    _read_metrics(record)
    _read_answers(record)
    for split, name in _LEDGERS.items():
        _read_ledger(record, split, name)
    return record


# --- files --------------------------------------------------------------------------------------


def _read_text(record: RunRecord, name: str, consequence: str = "") -> str | None:
    """Return the text of a file, or None with a note."""
    try:
        return (record.path / name).read_bytes().decode("utf-8", errors="replace")
    except FileNotFoundError:
        record.notes.append(f"{name} is missing" + (f": {consequence}" if consequence else ""))
    except OSError as error:
        record.notes.append(f"{name} cannot be read: {one_line(error)}")
    return None


def _read_object(record: RunRecord, name: str, consequence: str) -> dict[str, Any]:
    """Return the JSON object in a file, or an empty one with a note."""
    text = _read_text(record, name, consequence)
    if text is None:
        return {}
    try:
        values = json.loads(text)
    except (ValueError, RecursionError) as error:
        record.notes.append(f"{name} is damaged: {one_line(error)}")
        return {}
    if not isinstance(values, dict):
        record.notes.append(f"{name} is damaged: it is not a JSON object")
        return {}
    return values


def _json_lines(record: RunRecord, name: str, text: str) -> Iterator[dict[str, Any]]:
    """Yield the objects of a JSON Lines file; other lines are noted and left out."""
    lines = text.split("\n")
    damaged: list[int] = []
    is_any_read = False
    for line_number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            values = json.loads(line)
        except (ValueError, RecursionError):
            values = None
        if isinstance(values, dict):
            is_any_read = True
            yield values
        elif line_number == len(lines) and (is_any_read or not damaged):
            record.notes.append(f"{name}: the last line is incomplete, as after a killed run")
        else:
            damaged.append(line_number)
    if damaged and not is_any_read:
        record.notes.append(f"{name} is damaged: none of its lines is a JSON object")
    elif damaged:
        numbers = ", ".join(map(str, damaged[:_MAX_NAMED_LINES])) + (" ..." if len(damaged) > _MAX_NAMED_LINES else "")
        count = counted(len(damaged), "line is", "lines are")
        record.notes.append(f"{name}: {count} damaged and left out: line {numbers}")


def _read_ledger(record: RunRecord, split: str, name: str) -> None:
    if not (record.path / name).exists():
        return  # the run has no such rows
    first: dict[tuple[str, str], str] = {}
    counts: Counter[tuple[str, str]] = Counter()
    for values in _json_lines(record, name, _read_text(record, name) or ""):
        reason = str(values.get("action")), str(values.get("reason"))
        counts[reason] += 1
        first.setdefault(reason, str(values.get("where")))
    record.ledger += [LedgerCount(split, *reason, count, first[reason]) for reason, count in counts.most_common()]


def _read_answers(record: RunRecord) -> None:
    if not (record.path / layout.ROLLOUTS).exists():
        return  # the run has no rollout
    windows: dict[int, tuple[Mapping[str, Any], Mapping[str, Any]]] = {}
    for line in _json_lines(record, layout.ROLLOUTS, _read_text(record, layout.ROLLOUTS) or ""):
        step, reward = _as_count(line.get("step")), as_number(line.get("reward"))
        if step is None or reward is None:
            continue
        best, worst = windows.get(step, (line, line))
        windows[step] = (
            line if reward > (as_number(best["reward"]) or 0.0) else best,
            line if reward < (as_number(worst["reward"]) or 0.0) else worst,
        )
    steps = sorted(windows)
    shown = min(len(steps), _MAX_ANSWERED)
    chosen = [steps[at * (len(steps) - 1) // max(1, shown - 1)] for at in range(shown)]
    record.answered = [(step, *windows[step]) for step in chosen]


# --- untrusted values ---------------------------------------------------------------------------


def as_number(value: Any) -> float | None:
    """Return `value` if it is a finite number, else None."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    try:
        result = float(value)
    except OverflowError:
        return None
    return result if math.isfinite(result) else None


def as_mapping(value: Any) -> Mapping[str, Any]:
    """Return `value` if it is a JSON object, else an empty mapping."""
    return {str(name): inner for name, inner in value.items()} if isinstance(value, dict) else {}


def as_mappings(value: Any) -> list[Mapping[str, Any]]:
    """Return the JSON objects in a list; empty when `value` is not a list."""
    return [as_mapping(item) for item in value if isinstance(item, dict)] if isinstance(value, list) else []


def _as_count(value: Any) -> int | None:
    result = as_number(value)
    return int(result) if result is not None and result >= 0 else None


# --- curves -------------------------------------------------------------------------------------


def _read_metrics(record: RunRecord) -> None:
    """Read steps and evaluations from metrics.jsonl, or from transformers' `log_history` if that is missing."""
    steps: dict[int, Mapping[str, Any]] = {}
    evaluations: dict[int, Mapping[str, Any]] = {}
    num_unknown = 0
    text = _read_text(record, _METRICS)
    for line in _log_history(record) if text is None else _json_lines(record, _METRICS, text):
        values = layout.with_new_names(line)
        step = _as_count(values.get("step"))
        # A step that was repeated after an interruption has several lines; the last one counts.
        if step is not None and values.get("event") == "step":
            steps[step] = values
            record.num_steps = _as_count(values.get("num_steps")) or record.num_steps
        elif step is not None and values.get("event") == "evaluate":
            evaluations[step] = values
        else:
            num_unknown += 1
    if num_unknown:
        count = counted(num_unknown, "line is", "lines are")
        record.notes.append(f"{_METRICS}: {count} neither a step nor an evaluation, and left out")
    for name in ("loss", "grad_norm"):
        wrong = sorted(step for step, values in steps.items() if name in values and as_number(values[name]) is None)
        if wrong:
            record.notes.append(
                f"{name} is not a finite number in {counted(len(wrong), 'step')}, a gap in the curve "
                f"(first: step {wrong[0]})"
            )
    record.steps = _step_columns(steps)
    record.evaluations = _evaluation_columns(evaluations, record.steps)


def _log_history(record: RunRecord) -> Iterator[dict[str, Any]]:
    """Yield steps and evaluations from trainer_state.json, or from that of the last checkpoint of an unfinished run."""
    checkpoints = layout.find_checkpoints(record.path / layout.CHECKPOINTS).values()
    files = [directory / layout.TRAINER_STATE for directory in (record.path, *reversed(checkpoints))]
    file = next((file for file in files if file.exists()), files[0])
    values = _read_object(record, str(file.relative_to(record.path)), "there are no curves")
    record.num_steps = _as_count(values.get("max_steps"))
    history = values.get("log_history")
    for line in history if isinstance(history, list) else ():
        if isinstance(line, dict) and "loss" in line:
            yield {**line, "event": "step"}
        elif isinstance(line, dict):
            metrics = {name[5:]: value for name, value in line.items() if str(name).startswith("eval_")}
            metrics.pop("runtime", None)
            yield {**metrics, "step": line.get("step"), "event": "evaluate"}


def _step_columns(steps: Mapping[int, Mapping[str, Any]]) -> Columns:
    order = sorted(steps)
    columns: Columns = {"step": [float(step) for step in order]}
    for name, source, unit in (("tokens", "num_label_tokens", 1.0), ("minutes", "seconds", 60.0)):
        values = [as_number(steps[step].get(source)) for step in order]
        is_known = all(value is not None for value in values)
        sums = itertools.accumulate(value or 0.0 for value in values)
        columns[name] = [total / unit if is_known else None for total in sums]
    for name in _STEP_VALUES:
        columns[name] = [as_number(steps[step].get(name)) for step in order]
    reported = dict.fromkeys(name for step in order for name in steps[step])
    rewards = [name for name in reported if str(name).startswith("rewards/") and str(name).endswith("/mean")]
    for name in (*(name for name in _ROLLOUT_VALUES if "reward" in reported), *rewards):
        values = [as_number(steps[step].get(name)) for step in order]
        if any(value is not None for value in values):
            columns[name] = values
    return columns


def _evaluation_columns(evaluations: Mapping[int, Mapping[str, Any]], steps: Columns) -> Columns:
    """Return the metrics of each evaluation, with tokens and minutes as of the last step before it."""
    order = sorted(evaluations)
    columns: Columns = {"step": [float(step) for step in order]}
    step_numbers = [step or 0.0 for step in steps["step"]]
    for axis in ("tokens", "minutes"):
        num_before = [bisect.bisect_right(step_numbers, step) for step in order]
        columns[axis] = [
            steps[axis][num - 1] if num else (None if step else 0.0)
            for num, step in zip(num_before, order, strict=True)
        ]
    names = dict.fromkeys(name for values in evaluations.values() for name in values)
    for name in names:
        values = [as_number(evaluations[step].get(name)) for step in order]
        if name not in ("event", "step", "seconds") and any(value is not None for value in values):
            columns[name] = values
    return columns


def thin_out(columns: Columns, max_points: int) -> tuple[Columns, int]:
    """Reduce columns to at most `max_points` points; return also how many steps each point stands for.

    A point has the last value of the axes and of `peak_bytes`, which only grow, and the mean of the finite values of
    every other column.
    """
    length = len(columns["step"])
    size = max(1, -(-length // max_points))
    if size == 1:
        return columns, 1
    parts = [slice(begin, begin + size) for begin in range(0, length, size)]
    return {
        name: [values[part][-1] if name in _CUMULATIVE else mean(values[part]) for part in parts]
        for name, values in columns.items()
    }, size


def mean(values: list[float | None]) -> float | None:
    """Return the mean of the known values; None when there are none."""
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None
