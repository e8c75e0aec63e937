"""A run directory becomes a `RunRecord`: of a run that is over, still under way, or was interrupted.

Each file may be missing or damaged. What cannot be read is named in `notes` and left out; nothing here raises but for a
directory that holds no run. What files hold is foreign: a number is a number only once it was looked at.
"""

from __future__ import annotations

import bisect
import itertools
import json
import math
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, TypeAlias

from sftx.config import run_file
from sftx.errors import ConfigError, one_line
from sftx.trainer.evidence import FILE as EVIDENCE

Columns: TypeAlias = dict[str, list[float | None]]
"""By name, the values at each point; None where there is none, or none that is a finite number."""

_RUN, _MANIFEST, _SUMMARY, _METRICS = "run.yaml", "manifest.json", "summary.json", "metrics.jsonl"
_LEDGERS: Final = {"training": "ledger.jsonl", "held-out": "ledger-held-out.jsonl"}
_STATE: Final = "trainer_state.json"
_OF_STEPS: Final = ("epoch", "loss", "learning_rate", "grad_norm", "tokens_per_second", "peak_bytes")
_MOST_NAMED: Final = 3


@dataclass
class RunRecord:
    """What one run directory holds."""

    path: Path
    run_yaml: str | None = None
    """As it was written."""
    config: Mapping[str, Any] = field(default_factory=dict)
    manifest: Mapping[str, Any] = field(default_factory=dict)
    summary: Mapping[str, Any] = field(default_factory=dict)
    evidence: Mapping[str, Any] = field(default_factory=dict)
    steps: Columns = field(default_factory=dict)
    """`step`, `tokens` (trained, so far), `minutes` (in steps, so far), and what each step reported."""
    evaluations: Columns = field(default_factory=dict)
    """The same three, and each held-out metric; step 0 is the model before training."""
    num_steps: int | None = None
    """That the run is to have."""
    ledger: list[tuple[str, str, str, int, str]] = field(default_factory=list)
    """Split, action, reason, number of rows, where the first of them stands; the most frequent first."""
    notes: list[str] = field(default_factory=list)
    """What is missing or damaged."""

    @property
    def is_complete(self) -> bool:
        return bool(self.summary)


def read(path: Path) -> RunRecord:
    """Raises ConfigError when there is no run in `path`."""
    if not path.is_dir():
        raise ConfigError(f"{path}: {'is a file' if path.exists() else 'no such directory'}; name that of a run")
    try:
        if not any((path / name).exists() for name in (_RUN, _MANIFEST, _SUMMARY, _METRICS)):
            raise ConfigError(f"{path}: holds no run (no {_RUN} there); name the directory that `sftx run` wrote")
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {one_line(error)}") from error
    record = RunRecord(path)
    text = _text(record, _RUN)
    record.run_yaml = text
    if text is not None:
        try:
            record.config = run_file.read(path / _RUN)[0]
        except ConfigError as error:
            record.notes.append(str(error))
    record.manifest, record.summary, record.evidence = (
        _object(record, name, why)
        for name, why in (
            (_MANIFEST, "versions and plugins are not known"),
            (_SUMMARY, "the run is still under way, or was interrupted"),
            (EVIDENCE, "training rows and the loss of single tokens are not shown"),
        )
    )
    _read_metrics(record)
    _read_ledgers(record)
    return record


# --- files --------------------------------------------------------------------------------------


def _text(record: RunRecord, name: str, why: str = "") -> str | None:
    try:
        return (record.path / name).read_bytes().decode("utf-8", errors="replace")
    except FileNotFoundError:
        record.notes.append(f"{name} is missing" + (f": {why}" if why else ""))
    except OSError as error:
        record.notes.append(f"{name} cannot be read: {one_line(error)}")
    return None


def _object(record: RunRecord, name: str, why: str) -> dict[str, Any]:
    text = _text(record, name, why)
    if text is None:
        return {}
    try:
        values = json.loads(text)
    except (ValueError, RecursionError) as error:
        record.notes.append(f"{name} is damaged: {one_line(error)}")
        return {}
    if not isinstance(values, dict):
        record.notes.append(f"{name} is damaged: it is no JSON object")
        return {}
    return values


def _lines(record: RunRecord, name: str, text: str) -> Iterator[dict[str, Any]]:
    """The objects of a file of JSON lines; what is none is named, and left out."""
    lines = text.split("\n")
    bad: list[int] = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            values = json.loads(line)
        except (ValueError, RecursionError):
            values = None
        if isinstance(values, dict):
            yield values
        elif number == len(lines):
            record.notes.append(f"{name}: the last line was cut off, as when a run is killed")
        else:
            bad.append(number)
    if bad:
        named = ", ".join(map(str, bad[:_MOST_NAMED])) + (" ..." if len(bad) > _MOST_NAMED else "")
        record.notes.append(f"{name}: {_counted(len(bad), 'line is', 'lines are')} damaged and left out: line {named}")


def _counted(number: int, one: str, many: str) -> str:
    return f"{number:,} {one if number == 1 else many}"


# --- numbers ------------------------------------------------------------------------------------


def number(value: Any) -> float | None:
    """`value` where it is a finite number."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    try:
        found = float(value)
    except OverflowError:
        return None
    return found if math.isfinite(found) else None


def _step(values: Mapping[str, Any], name: str = "step") -> int | None:
    found = number(values.get(name))
    return int(found) if found is not None and found >= 0 else None


def _read_metrics(record: RunRecord) -> None:
    """Steps and evaluations from metrics.jsonl; without it, those of transformers' `log_history`."""
    steps: dict[int, Mapping[str, Any]] = {}
    evaluations: dict[int, Mapping[str, Any]] = {}
    text = _text(record, _METRICS)
    for values in _history(record) if text is None else _lines(record, _METRICS, text):
        step = _step(values)
        # Of a step that was done anew after an interruption the later line counts.
        if step is not None and values.get("event") == "step":
            steps[step] = values
            record.num_steps = _step(values, "num_steps") or record.num_steps
        elif step is not None and values.get("event") == "evaluate":
            evaluations[step] = values
    _note_what_is_no_number(record, steps)
    record.steps = _step_columns(steps)
    names = dict.fromkeys(name for values in evaluations.values() for name in values)
    wanted = [name for name in names if name not in ("event", "step", "seconds")]
    order = sorted(evaluations)
    columns: Columns = {name: [number(evaluations[step].get(name)) for step in order] for name in wanted}
    columns = {name: values for name, values in columns.items() if any(value is not None for value in values)}
    record.evaluations = {**_places(record.steps, order), **columns}


def _history(record: RunRecord) -> Iterator[dict[str, Any]]:
    """What trainer_state.json has of steps and evaluations, that of the last checkpoint where the run is not over."""
    by_step = {
        int(match[1]): file
        for file in record.path.glob(f"checkpoints/step-*/{_STATE}")
        if (match := re.fullmatch(r"step-(\d{1,12})", file.parent.name))
    }
    file = record.path / _STATE
    if not file.exists() and by_step:
        file = by_step[max(by_step)]
    values = _object(record, str(file.relative_to(record.path)), "there are no curves")
    record.num_steps = _step(values, "max_steps")
    history = values.get("log_history")
    for line in history if isinstance(history, list) else ():
        if isinstance(line, dict) and "loss" in line:
            yield {**line, "event": "step"}
        elif isinstance(line, dict):
            found = {name[5:]: value for name, value in line.items() if str(name).startswith("eval_")}
            found.pop("runtime", None)
            yield {**found, "step": line.get("step"), "event": "evaluate"}


def _note_what_is_no_number(record: RunRecord, steps: Mapping[int, Mapping[str, Any]]) -> None:
    for name in ("loss", "grad_norm"):
        wrong = sorted(step for step, values in steps.items() if name in values and number(values[name]) is None)
        if wrong:
            of = _counted(len(wrong), "step is", "steps are")
            record.notes.append(f"{name} of {of} no finite number, a gap in the curve (first: step {wrong[0]})")


def _step_columns(steps: Mapping[int, Mapping[str, Any]]) -> Columns:
    order = sorted(steps)
    columns: Columns = {"step": [float(step) for step in order]}
    for name, source, unit in (("tokens", "num_label_tokens", 1.0), ("minutes", "seconds", 60.0)):
        parts = [number(steps[step].get(source)) for step in order]
        is_known = all(part is not None for part in parts)
        sums = itertools.accumulate(part or 0.0 for part in parts)
        columns[name] = [total / unit if is_known else None for total in sums]
    for name in _OF_STEPS:
        columns[name] = [number(steps[step].get(name)) for step in order]
    return columns


def _places(steps: Columns, wanted: list[int]) -> Columns:
    """Where on each axis the evaluations after those steps lie."""
    columns: Columns = {"step": [float(step) for step in wanted]}
    known = [step or 0.0 for step in steps["step"]]
    for name in ("tokens", "minutes"):
        columns[name] = [
            steps[name][at - 1] if (at := bisect.bisect_right(known, step)) else (None if step else 0.0)
            for step in wanted
        ]
    return columns


# --- the ledger ---------------------------------------------------------------------------------


def _read_ledgers(record: RunRecord) -> None:
    for split, name in _LEDGERS.items():
        if not (record.path / name).exists():
            continue  # no such rows; or none that was counted
        first: dict[tuple[str, str], str] = {}
        kinds: Counter[tuple[str, str]] = Counter()
        for values in _lines(record, name, _text(record, name) or ""):
            kind = str(values.get("action")), str(values.get("reason"))
            kinds[kind] += 1
            first.setdefault(kind, str(values.get("where")))
        record.ledger += [(split, *kind, count, first[kind]) for kind, count in kinds.most_common()]


def thinned(columns: Columns, most: int) -> tuple[Columns, int]:
    """The columns at `most` points or fewer, and how many steps each point then stands for.

    The axes and `peak_bytes`, which only grow, have a point's last value; the others the mean of its finite ones.
    """
    length = len(columns["step"])
    size = max(1, -(-length // most))
    if size == 1:
        return columns, 1
    parts = [slice(begin, begin + size) for begin in range(0, length, size)]
    growing = ("step", "tokens", "minutes", "epoch", "peak_bytes")
    return {
        name: [values[part][-1] if name in growing else _mean(values[part]) for part in parts]
        for name, values in columns.items()
    }, size


def _mean(values: list[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None
