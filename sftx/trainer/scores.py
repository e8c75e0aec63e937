"""Answers and references become the numbers that metrics report, refused when they would mislead."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence

from sftx.assembly.training_checks import OURS
from sftx.errors import PluginError
from sftx.events import Sample
from sftx.types import Metric


def scores(metrics: Mapping[str, Metric], samples: Sequence[Sample], taken: Collection[str]) -> dict[str, float]:
    """What each metric reports of the whole set, by the names under which it is reported.

    Raises PluginError for a name that is `taken`, the engine's or another metric's, and for what is no finite number.
    """
    reported: dict[str, float] = {}
    for plugin, metric in metrics.items():
        for name, value in _of_set(metric, plugin, samples).items():
            if name in taken or name in reported or name in OURS:
                advice = "rename the plugin" if name == plugin else "rename one of them"
                raise PluginError(f"{metric}: something else is reported as {name!r} already; {advice}")
            reported[name] = value
    return reported


def _of_set(metric: Metric, plugin: str, samples: Sequence[Sample]) -> dict[str, float]:
    corpus = getattr(metric, "corpus", None)
    if corpus is not None:
        score = corpus([sample.prediction for sample in samples], [sample.reference for sample in samples])
        return named(metric, plugin, score, f"{len(samples)} rows")
    rows = [named(metric, plugin, metric(s.prediction, s.reference), s.row_id) for s in samples]
    for sample, row in zip(samples, rows, strict=True):
        if row.keys() != rows[0].keys():
            raise PluginError(
                f"{metric}: the scores of {sample.row_id} are {', '.join(row)}, those of {samples[0].row_id} "
                f"{', '.join(rows[0])}; give every answer the same ones, whose means are reported"
            )
    return {name: sum(row[name] for row in rows) / len(rows) for name in rows[0]}


def named(metric: object, plugin: str, score: float | Mapping[str, float], what: str) -> dict[str, float]:
    """A score as finite numbers by name: its own names, or the plugin's of a single number. Raises PluginError."""
    values: Mapping[str, float] = score if isinstance(score, Mapping) else {plugin: score}
    if not values or not all(isinstance(name, str) for name in values):
        raise PluginError(f"{metric}: the score of {what} has the names {list(values)!r:.60}, expected some text")
    found = {name: _number(value) for name, value in values.items()}
    for name, number in found.items():
        if not math.isfinite(number):
            of = "the score" if name == plugin else f"the score {name!r}"
            raise PluginError(f"{metric}: {of} of {what} is {values[name]!r:.60}, expected a finite number")
    return found


def _number(value: object) -> float:
    """NaN for what is no number."""
    if not isinstance(value, int | float):
        return math.nan
    try:
        return float(value)
    except OverflowError:
        return math.inf
