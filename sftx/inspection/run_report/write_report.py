"""Write `report.html` and `loss.png` for one run in full, or for several runs side by side.

The page is complete in one file and fetches nothing; its template `run_page.html` draws it.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from sftx import atomic_files
from sftx.errors import one_line
from sftx.inspection.html_page import fill_template
from sftx.inspection.run_report import compare
from sftx.inspection.run_report.compare import as_text
from sftx.inspection.run_report.plot import Curves, write_plot
from sftx.inspection.run_report.run_record import (
    EVIDENCE,
    Columns,
    RunRecord,
    as_mapping,
    as_mappings,
    as_number,
    mean,
    read_run,
    thin_out,
)

log = logging.getLogger(__name__)

PAGE, PICTURE = "report.html", "loss.png"

_TEMPLATE: Final = Path(__file__).with_name("run_page.html")
_MAX_POINTS: Final = 2000
"""A curve has at most so many points; the page says how many steps each stands for."""
_LEAST_SHARE: Final = 0.005
"""Phases that took less of the time are shown together; so are those after the first `_MAX_PHASES`."""
_MAX_PHASES: Final = 6
_MAX_REASONS: Final = 50
"""At most so many reasons of the ledger are listed."""


def write_reports(run_dir: Path) -> None:
    """Write `report.html`, and `loss.png` if matplotlib is installed, into a run directory.

    Raises OutputError when they cannot be written, ConfigError when there is no run.
    """
    write([read_run(run_dir)], run_dir / PAGE, run_dir / PICTURE)


def complete_reports(run_dir: Path, *, again: bool = True) -> None:
    """Write the reports of a finished run; log a failure instead of raising, since the run itself is complete.

    Without `again`, an existing page is kept.
    """
    if not again and (run_dir / PAGE).exists():
        return
    try:
        write_reports(run_dir)
    except Exception as error:
        log.warning("the report of %s could not be written: %s: %s", run_dir, type(error).__name__, one_line(error))


def write(records: Sequence[RunRecord], page: Path, picture: Path) -> list[Path]:
    """Write picture and page atomically; return the files that were written. Raises OutputError."""
    names = compare.short_names([record.path for record in records])
    curves = [Curves(name, record.steps, record.evaluations) for name, record in zip(names, records, strict=True)]
    is_drawn = write_plot(picture, curves)
    atomic_files.write_text(page, fill_template(_TEMPLATE, page_data(records)))
    return [page, picture] if is_drawn else [page]


def page_data(records: Sequence[RunRecord]) -> dict[str, Any]:
    """Return the page's JSON values; every number in it is finite."""
    names = compare.short_names([record.path for record in records])
    figures = [key_figures(record) for record in records]
    labels = list(dict.fromkeys(label for values in figures for label in values))
    is_comparison = len(records) > 1
    return {
        "runs": [_curves(name, record) for name, record in zip(names, records, strict=True)],
        "figures": {"labels": labels, "values": [[values.get(label, "") for label in labels] for values in figures]},
        "notes": [list(note) for note in notes(records)],
        "options": compare.differing_options(records) if is_comparison else [],
        "versions": compare.differing_versions(records) if is_comparison else [],
        "details": None if is_comparison else _details(records[0]),
    }


def notes(records: Sequence[RunRecord]) -> list[tuple[int, str]]:
    """Return what is missing or damaged, each with the index of its run.

    A comparison of several runs does not show `evidence.json`, so notes about that are left out.
    """
    return [
        (number, note)
        for number, record in enumerate(records)
        for note in record.notes
        if len(records) == 1 or not note.startswith(EVIDENCE)
    ]


# --- key figures --------------------------------------------------------------------------------


def key_figures(record: RunRecord) -> dict[str, str]:
    """Return the figures at the top of the page by their labels: final values, or those so far."""
    summary, steps = record.summary, record.steps
    num_done = as_number(summary.get("num_steps")) or _last(steps, "step") or 0
    num_planned = max(num_done, record.num_steps or 0)
    loss = as_mapping(summary.get("loss"))
    figures = {
        "steps": f"{num_done:,.0f}" + (f" of {num_planned:,.0f}" if num_planned > num_done else ""),
        "training loss": _change(
            as_number(loss.get("first")) or _first(steps, "loss"), as_number(loss.get("last")) or _last(steps, "loss")
        ),
    }
    if "reward" in steps:
        figures["reward"] = _change(_first(steps, "reward"), _last(steps, "reward"))
    for name, (before, after) in _held_out_metrics(record).items():
        figures[f"held-out {name.replace('_', ' ')}"] = _change(before, after)
    tokens = as_number(summary.get("num_label_tokens")) or _last(steps, "tokens")
    speed = as_number(summary.get("tokens_per_second")) or mean(steps.get("tokens_per_second", []))
    peak = as_number(summary.get("peak_bytes")) or _last(steps, "peak_bytes")
    seconds = as_number(summary.get("wall_seconds"))
    best = as_mapping(summary.get("best"))
    figures |= {
        "best step": "" if not best else f"{as_text(best.get('step'))} ({_short(as_number(best.get('value')))})",
        "label tokens": "" if tokens is None else f"{tokens:,.0f}",
        "speed": "" if speed is None else f"{speed:,.0f} tokens/s",
        "peak memory": "" if peak is None else f"{peak / 1e9:.2f} GB",
        "wall time": "" if seconds is None else _duration(seconds),
    }
    return {label: text for label, text in figures.items() if text}


def _held_out_metrics(record: RunRecord) -> dict[str, tuple[float | None, float | None]]:
    """Return each held-out metric before training and after it, or at the last evaluation so far."""
    held_out = as_mapping(record.summary.get("held_out"))
    before, after = as_mapping(held_out.get("before")), as_mapping(held_out.get("after"))
    if before or after:
        return {name: (as_number(before.get(name)), as_number(after.get(name))) for name in {**before, **after}}
    names = [name for name in record.evaluations if name not in ("step", "tokens", "minutes")]
    return {name: (_first(record.evaluations, name), _last(record.evaluations, name)) for name in names}


def _first(columns: Columns, name: str) -> float | None:
    return next((value for value in columns.get(name, ()) if value is not None), None)


def _last(columns: Columns, name: str) -> float | None:
    return next((value for value in reversed(columns.get(name, ())) if value is not None), None)


def _change(before: float | None, after: float | None) -> str:
    return " → ".join(_short(value) for value in (before, after) if value is not None)


def _short(value: float | None) -> str:
    return compare.NOT_SET if value is None else f"{value:.4g}"


def _duration(seconds: float) -> str:
    hours, rest = divmod(round(seconds), 3600)
    minutes, rest = divmod(rest, 60)
    parts = [f"{hours} h"] * (hours > 0) + [f"{minutes} min"] * (minutes > 0) + [f"{rest} s"] * (hours == 0)
    return " ".join(parts)


# --- the parts of the page ----------------------------------------------------------------------


def _curves(name: str, record: RunRecord) -> dict[str, Any]:
    steps, steps_per_point = thin_out(record.steps, _MAX_POINTS)
    evaluations, _ = thin_out(record.evaluations, _MAX_POINTS)
    return {
        "name": name,
        "model": as_text(record.config.get("model", "")),
        "is_complete": record.is_complete,
        "steps": steps,
        "evaluations": evaluations,
        "steps_per_point": steps_per_point,
    }


def _details(record: RunRecord) -> dict[str, Any]:
    """Return the parts that only the page of a single run has."""
    plugins = []
    for line in as_mappings(record.manifest.get("plugins")):
        options = ", ".join(f"{name}={as_text(value)}" for name, value in as_mapping(line.get("options")).items())
        if line.get("since_step") is not None:  # it was added when the run was resumed
            options = f"from step {as_text(line['since_step'])} on{f', {options}' if options else ''}"
        plugins.append(
            [*(as_text(line.get(key, "")) for key in ("stage", "plugin", "distribution", "version")), options]
        )
    ledger = [[*reason[:3], f"{reason.num_rows:,}", reason.first] for reason in record.ledger[:_MAX_REASONS]]
    if rest := record.ledger[_MAX_REASONS:]:
        num_rows = sum(reason.num_rows for reason in rest)
        ledger.append(["", "", f"{len(rest):,} more reasons: see the ledger", f"{num_rows:,}", ""])
    versions = compare.versions(record.manifest)
    return {
        "token_losses": _token_losses(as_mapping(record.evidence.get("token_losses"))),
        "samples": [
            {key: str(sample.get(key, "")) for key in ("row", "prompt", "reference", "before", "after")}
            for sample in as_mappings(record.summary.get("samples"))
        ],
        "answered": [
            {"step": step, "best": _answer(best), "worst": _answer(worst)} for step, best, worst in record.answered
        ],
        "rows": [_training_row(row) for row in as_mappings(record.evidence.get("rows"))],
        "seconds": _seconds(as_mapping(record.summary.get("seconds"))),
        "plugins": plugins,
        "versions": [[name, as_text(value)] for name, value in versions if not name.startswith("plugin ")],
        "ledger": ledger,
        "run_yaml": record.run_yaml or "",
    }


def _answer(line: Mapping[str, Any]) -> dict[str, str]:
    """Return what the page shows of an answer of the policy."""
    rewards = ", ".join(f"{name} {_short(as_number(value))}" for name, value in as_mapping(line.get("rewards")).items())
    shown = {key: str(line.get(key, "")) for key in ("row", "prompt", "reference", "answer")}
    return shown | {"reward": _short(as_number(line.get("reward"))), "rewards": rewards}


def _seconds(by_phase: Mapping[str, Any]) -> list[tuple[str, float, str]]:
    """Return phases with their seconds and the text of these, the longest first; what is short is `other`, the last."""
    known = {name: seconds for name, value in by_phase.items() if (seconds := as_number(value)) and seconds > 0}
    total = sum(known.values())
    long = [(name, n) for name, n in known.items() if name != "other" and n >= _LEAST_SHARE * total]
    shown = sorted(long, key=lambda pair: -pair[1])[:_MAX_PHASES]
    if (rest := total - sum(seconds for _, seconds in shown)) >= 0.05:
        shown.append(("other", rest))
    return [(name, seconds, _duration(seconds) if seconds >= 10 else f"{seconds:.1f} s") for name, seconds in shown]


def _training_row(values: Mapping[str, Any]) -> dict[str, Any]:
    tokens, left_out = values.get("tokens"), values.get("left_out")
    pairs = [pair for pair in tokens if isinstance(pair, list) and len(pair) == 2] if isinstance(tokens, list) else []
    counts = [int(as_number(count) or 0) for count in left_out] if isinstance(left_out, list) else []
    return {
        "row": str(values.get("row", "")),
        "tokens": [[str(text), int(bool(is_label))] for text, is_label in pairs],
        "left_out": counts if len(counts) == 2 else [0, 0],
    }


def _token_losses(values: Mapping[str, Any]) -> dict[str, Any] | None:
    """Return columns of equal length; None when they are missing or of different lengths."""
    tokens, trained, before, after = (values.get(name) for name in ("tokens", "trained", "before", "after"))
    if not (isinstance(tokens, list) and isinstance(trained, list) and isinstance(before, list)):
        return None
    if not len(tokens) == len(trained) == len(before):
        return None
    has_after = isinstance(after, list) and len(after) == len(tokens)
    return {
        "row": str(values.get("row", "")),
        "tokens": [str(text) for text in tokens],
        "trained": [int(bool(is_label)) for is_label in trained],
        "before": [as_number(loss) for loss in before],
        "after": [as_number(loss) for loss in after] if has_after and isinstance(after, list) else None,
    }
