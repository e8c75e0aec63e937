"""Metrics and evaluators as stages."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from typing import Any

from sftx.assembly.stages.stage import Stage, arguments_of
from sftx.errors import PluginError
from sftx.types import Evaluation, Evaluator, Metric, Question

log = logging.getLogger(__name__)


class MetricStage(Stage):
    """Scores answers, and checks that every score is a finite number with a name."""

    def __init__(self, plugin: str, metric: Metric, name: str) -> None:
        """`name`: the plugin's own name, under which a score without a name is reported."""
        super().__init__(plugin)
        self._metric = metric
        self._name = name
        self._has_said_declined = False

    def scores(self, predictions: Sequence[str], rows: Sequence[Question]) -> dict[str, float]:
        """Score a whole set of answers: means over the rows, or what `corpus` returns where the metric has one.

        Rows that the metric declines do not count; without any other row there is no score.
        """
        corpus: Any = getattr(self._metric, "corpus", None)
        if corpus is not None:
            extra: dict[str, Any] = {"rows": rows} if "rows" in arguments_of(corpus) else {}
            with self._attribute("corpus"):
                score = corpus(predictions, [row.reference for row in rows], **extra)
            return self._say_declined(len(rows)) if score is None else self._named("corpus", score, f"{len(rows)} rows")
        takes_row = "row" in arguments_of(self._metric)
        scored: list[tuple[str, dict[str, float]]] = []
        for prediction, row in zip(predictions, rows, strict=True):
            given = {"row": row} if takes_row else {}
            with self._attribute("metric"):
                score = self._metric(prediction, row.reference, **given)
            if score is not None:
                scored.append((row.row_id, self._named("metric", score, row.row_id)))
        if not scored:
            return self._say_declined(len(rows))
        first_id, first = scored[0]
        for row_id, scores in scored:
            if scores.keys() != first.keys():
                raise self._refuse(
                    f"the scores of {row_id} are {', '.join(scores)}, those of {first_id} {', '.join(first)}; give "
                    "every answer the same ones, whose means are reported"
                )
        return {name: sum(scores[name] for _, scores in scored) / len(scored) for name in first}

    def _say_declined(self, num_rows: int) -> dict[str, float]:
        if not self._has_said_declined:
            self._has_said_declined = True
            log.warning("%s: it declined all %d held-out rows, so it reports nothing", self, num_rows)
        return {}

    def _named(self, what: str, score: Any, of: str) -> dict[str, float]:
        if not isinstance(score, Mapping | int | float):
            raise self._refuse(f"{what} returned {type(score).__name__}, expected a float")
        try:
            return named_scores(self._name, score, of)
        except PluginError as error:
            raise self._refuse(str(error)) from None


class EvaluatorStage(Stage):
    """Scores the model, and checks that every score is a finite number with a name."""

    def __init__(self, plugin: str, evaluator: Evaluator) -> None:
        super().__init__(plugin)
        self._evaluator = evaluator

    def evaluate(self, evaluation: Evaluation) -> object:
        """Return what the plugin returns; `named` checks it."""
        with self._attribute("evaluate"):
            return self._evaluator.evaluate(evaluation)

    def named(self, scores: object) -> dict[str, float]:
        """Return the plugin's scores as finite numbers by name. Raises PluginError."""
        if not isinstance(scores, Mapping):
            raise self._refuse(f"evaluate returned {type(scores).__name__}, expected a mapping of names to numbers")
        try:
            return named_scores("", scores, "the model")
        except PluginError as error:
            raise self._refuse(str(error)) from None


def named_scores(plugin: str, score: float | Mapping[str, float], of: str) -> dict[str, float]:
    """Return a score as finite numbers by name; a single number gets the plugin's name. Raises PluginError."""
    values: Mapping[str, Any] = score if isinstance(score, Mapping) else {plugin: score}
    if not values or not all(isinstance(name, str) for name in values):
        raise PluginError(f"the score of {of} has the names {list(values)!r:.60}, expected some text")
    numbers = {}
    for name, value in values.items():
        try:
            number = float(value) if isinstance(value, int | float) else math.nan
        except OverflowError:
            number = math.inf
        if not math.isfinite(number):
            which = "the score" if name == plugin else f"the score {name!r}"
            raise PluginError(f"{which} of {of} is {value!r:.60}, expected a finite number")
        numbers[name] = number
    return numbers
