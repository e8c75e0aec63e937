"""Run directories become `report.html` and `loss.png`: one run in full, or several side by side.

The page fetches nothing and is complete in one file; `run_page.html` is its template and draws it. Nothing here imports
torch.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from sftx import atomic_files
from sftx.errors import one_line
from sftx.inspection.html_page import filled
from sftx.inspection.run_report import compare, plot
from sftx.inspection.run_report.compare import mapping, mappings, shown
from sftx.inspection.run_report.run_record import Columns, RunRecord, number, read, thinned
from sftx.trainer.evidence import FILE as EVIDENCE

log = logging.getLogger(__name__)

PAGE, PICTURE = "report.html", "loss.png"

_TEMPLATE: Final = Path(__file__).with_name("run_page.html")
_MOST_POINTS: Final = 2000
"""Of a curve; the page says how many steps each stands for where there are more."""
_MOST_KINDS: Final = 50
_ARROW: Final = " → "


def write_reports(run_dir: Path) -> None:
    """Puts `report.html`, and `loss.png` where matplotlib is installed, into a run directory.

    Raises OutputError when it cannot be written, ConfigError when there is no run.
    """
    write([read(run_dir)], run_dir / PAGE, run_dir / PICTURE)


def complete_reports(run_dir: Path, *, again: bool = True) -> None:
    """The same for a run that is through, which is none the worse when it cannot be done: the reason is told.

    `again`: also where there is a page, of the run while it was under way.
    """
    if not again and (run_dir / PAGE).exists():
        return
    try:
        write_reports(run_dir)
    except Exception as error:
        log.warning("the report of %s could not be written: %s: %s", run_dir, type(error).__name__, one_line(error))


def write(records: Sequence[RunRecord], page: Path, picture: Path) -> list[Path]:
    """Writes both, each whole, the page last; returns what was written. Raises OutputError."""
    names = compare.names([record.path for record in records])
    curves = [(name, record.steps, record.evaluations) for name, record in zip(names, records, strict=True)]
    is_drawn = plot.write(picture, curves)
    atomic_files.write_text(page, filled(_TEMPLATE, page_data(records)))
    return [page, picture] if is_drawn else [page]


def page_data(records: Sequence[RunRecord]) -> dict[str, Any]:
    """What the page shows, as JSON values; every number in it is finite, every text just text."""
    names = compare.names([record.path for record in records])
    figures = [figures_of(record) for record in records]
    labels = list(dict.fromkeys(label for one in figures for label in one))
    several = len(records) > 1
    return {
        "runs": [_run(name, record) for name, record in zip(names, records, strict=True)],
        "figures": {"labels": labels, "values": [[one.get(label, "") for label in labels] for one in figures]},
        "notes": [list(note) for note in notes(records)],
        "options": compare.options(records) if several else [],
        "versions": compare.versions(records) if several else [],
        "details": None if several else _details(records[0]),
    }


def notes(records: Sequence[RunRecord]) -> list[tuple[int, str]]:
    """What is missing or damaged, with the number of the run; of several, without what their page does not show."""
    several = len(records) > 1
    return [
        (n, note)
        for n, record in enumerate(records)
        for note in record.notes
        if not (several and note.startswith(EVIDENCE))
    ]


# --- figures ------------------------------------------------------------------------------------


def figures_of(record: RunRecord) -> dict[str, str]:
    """The figures at the top, by their labels: what the run came to, or has come to so far."""
    summary, steps = record.summary, record.steps
    done = number(summary.get("num_steps")) or _last(steps, "step") or 0
    planned = max(done, record.num_steps or 0)
    loss = mapping(summary.get("loss"))
    found = {
        "steps": f"{done:,.0f}" + (f" of {planned:,.0f}" if planned > done else ""),
        "training loss": _change(
            number(loss.get("first")) or _first(steps, "loss"), number(loss.get("last")) or _last(steps, "loss")
        ),
    }
    for name, values in _held_out(record).items():
        found[f"held-out {name.replace('_', ' ')}"] = _change(*values)
    tokens = number(summary.get("num_label_tokens")) or _last(steps, "tokens")
    speed = number(summary.get("tokens_per_second")) or _mean_speed(steps)
    peak = number(summary.get("peak_bytes")) or _last(steps, "peak_bytes")
    seconds = number(summary.get("wall_seconds"))
    best = mapping(summary.get("best"))
    found |= {
        "best step": "" if not best else f"{shown(best.get('step'))} ({_short(number(best.get('value')))})",
        "trained tokens": "" if tokens is None else f"{tokens:,.0f}",
        "speed": "" if speed is None else f"{speed:,.0f} tokens/s",
        "peak memory": "" if peak is None else f"{peak / 1e9:.2f} GB",
        "wall time": "" if seconds is None else _duration(seconds),
    }
    return {label: text for label, text in found.items() if text}


def _held_out(record: RunRecord) -> dict[str, tuple[float | None, float | None]]:
    held_out = mapping(record.summary.get("held_out"))
    before, after = mapping(held_out.get("before")), mapping(held_out.get("after"))
    if before or after:
        return {name: (number(before.get(name)), number(after.get(name))) for name in {**before, **after}}
    names = [name for name in record.evaluations if name not in ("step", "tokens", "minutes")]
    return {name: (_first(record.evaluations, name), _last(record.evaluations, name)) for name in names}


def _first(columns: Columns, name: str) -> float | None:
    return next((value for value in columns.get(name, ()) if value is not None), None)


def _last(columns: Columns, name: str) -> float | None:
    return next((value for value in reversed(columns.get(name, ())) if value is not None), None)


def _mean_speed(steps: Columns) -> float | None:
    known = [value for value in steps.get("tokens_per_second", ()) if value is not None]
    return sum(known) / len(known) if known else None


def _change(before: float | None, after: float | None) -> str:
    texts = [_short(value) for value in (before, after) if value is not None]
    return _ARROW.join(texts)


def _short(value: float | None) -> str:
    return compare.NOT_SET if value is None else f"{value:.4g}"


def _duration(seconds: float) -> str:
    hours, rest = divmod(round(seconds), 3600)
    minutes, rest = divmod(rest, 60)
    parts = [f"{hours} h"] * (hours > 0) + [f"{minutes} min"] * (minutes > 0) + [f"{rest} s"] * (hours == 0)
    return " ".join(parts)


# --- one run ------------------------------------------------------------------------------------


def _run(name: str, record: RunRecord) -> dict[str, Any]:
    steps, per_point = thinned(record.steps, _MOST_POINTS)
    evaluations, _ = thinned(record.evaluations, _MOST_POINTS)
    return {
        "name": name,
        "model": shown(record.config.get("model", "")),
        "is_complete": record.is_complete,
        "steps": steps,
        "evaluations": evaluations,
        "steps_per_point": per_point,
    }


def _details(record: RunRecord) -> dict[str, Any]:
    """What only the page of a single run has."""
    plugins = mappings(record.manifest.get("plugins"))
    return {
        "token_losses": _token_losses(mapping(record.evidence.get("token_losses"))),
        "samples": [
            {key: str(one.get(key, "")) for key in ("row", "prompt", "reference", "before", "after")}
            for one in mappings(record.summary.get("samples"))
        ],
        "rows": [_row(one) for one in mappings(record.evidence.get("rows"))],
        "plugins": [[*(shown(one.get(key, "")) for key in _OF_PLUGIN), _options(one)] for one in plugins],
        "versions": [
            [name, shown(value)] for name, value in compare.facts(record.manifest) if not name.startswith("plugin ")
        ],
        "ledger": [
            [split, action, reason, f"{count:,}", where] for split, action, reason, count, where in _kinds(record)
        ],
        "run_yaml": record.run_yaml or "",
    }


_OF_PLUGIN: Final = ("stage", "plugin", "distribution", "version")


def _options(provider: Mapping[str, Any]) -> str:
    return ", ".join(f"{name}={shown(value)}" for name, value in mapping(provider.get("options")).items())


def _kinds(record: RunRecord) -> list[tuple[str, str, str, int, str]]:
    kinds, rest = record.ledger[:_MOST_KINDS], record.ledger[_MOST_KINDS:]
    if rest:
        kinds.append(("", "", f"{len(rest):,} more reasons: see the ledger", sum(kind[3] for kind in rest), ""))
    return kinds


def _row(values: Mapping[str, Any]) -> dict[str, Any]:
    tokens, left_out = values.get("tokens"), values.get("left_out")
    pairs = [one for one in tokens if isinstance(one, list) and len(one) == 2] if isinstance(tokens, list) else []
    ends = [int(number(one) or 0) for one in left_out] if isinstance(left_out, list) else []
    return {
        "row": str(values.get("row", "")),
        "tokens": [[str(text), int(bool(trained))] for text, trained in pairs],
        "left_out": ends if len(ends) == 2 else [0, 0],
    }


def _token_losses(values: Mapping[str, Any]) -> dict[str, Any] | None:
    """Columns of one length; None where there are none."""
    tokens, trained, before, after = (values.get(name) for name in ("tokens", "trained", "before", "after"))
    if not (isinstance(tokens, list) and isinstance(trained, list) and isinstance(before, list)):
        return None
    if not len(tokens) == len(trained) == len(before):
        return None
    is_known = isinstance(after, list) and len(after) == len(tokens)
    return {
        "row": str(values.get("row", "")),
        "tokens": [str(text) for text in tokens],
        "trained": [int(bool(one)) for one in trained],
        "before": [number(one) for one in before],
        "after": [number(one) for one in after] if is_known and isinstance(after, list) else None,
    }
