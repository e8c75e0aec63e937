"""The contract of a metric: a number for any answer, of that answer alone, or several by name."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping
from dataclasses import dataclass

from sftx.assembly.stages import RESERVED_METRICS, make
from sftx.testing.clauses import ClauseError, Suite
from sftx.testing.process import random_states
from sftx.types import Metric

_TEXTS = (
    "Paris",
    "paris ",
    "",
    " \n\t",
    "5",
    "NaN",
    '{"function": "set_timer", "arguments": {"minutes": 5}}',
    '{"function": ',
    "北京是中国的首都。",
    "🙂 e\u0301 \u200b",
    "<|im_end|>",
    "word " * 2000,
)


@dataclass
class _Case:
    metric: Metric


SUITE: Suite[_Case] = Suite("metric", lambda kit: _Case(make(kit.plugin, "sftx_metric")))


@SUITE.clause("Any answer gets a score: an empty one, one of 2000 words, one that is not the format asked for.")
def takes_any_text(case: _Case) -> None:
    for prediction, reference in itertools.product(_TEXTS, _TEXTS):
        try:
            case.metric(prediction, reference)
        except Exception as error:
            raise ClauseError(
                f"the answer {prediction[:40]!r} to the reference {reference[:40]!r} raised {type(error).__name__}: "
                f"{error}; a model may answer anything, so score it, with the lowest score if nothing else"
            ) from error


@SUITE.clause("A score is a finite number, or several by name.", needs=["takes-any-text"])
def finite_number(case: _Case) -> None:
    for prediction, reference in itertools.product(_TEXTS, _TEXTS):
        score: object = case.metric(prediction, reference)
        if not _is_finite(score):
            raise ClauseError(
                f"the answer {prediction[:40]!r} to the reference {reference[:40]!r} has the score {score!r}; return a "
                "finite float, or a mapping of names to such, since the mean over the held-out rows is reported"
            )


@SUITE.clause(
    "Several scores have the same names for any answer, none of which is one of the engine's.", needs=["finite-number"]
)
def names(case: _Case) -> None:
    first: object = case.metric(_TEXTS[0], _TEXTS[0])
    expected = _names(first)
    if taken := [name for name in expected if name in RESERVED_METRICS or not isinstance(name, str)]:
        raise ClauseError(f"it reports the score {taken[0]!r}, which is the engine's or no text; choose another name")
    for prediction, reference in itertools.product(_TEXTS, _TEXTS):
        found = _names(case.metric(prediction, reference))
        if found != expected:
            raise ClauseError(
                f"the answer {prediction[:40]!r} to the reference {reference[:40]!r} has the scores {_listed(found)}, "
                f"the answer {_TEXTS[0]!r} to itself {_listed(expected)}; give every answer the same ones"
            )


@SUITE.clause(
    "A score depends on the answer and the reference alone, and leaves the global random numbers as they were.",
    needs=["takes-any-text", "finite-number"],
)
def pure(case: _Case) -> None:
    pairs = list(itertools.product(_TEXTS, _TEXTS))
    before = random_states()
    forward = [case.metric(*pair) for pair in pairs]
    backward = [case.metric(*pair) for pair in reversed(pairs)][::-1]
    for (prediction, reference), first, second in zip(pairs, forward, backward, strict=True):
        if first != second:
            raise ClauseError(
                f"the answer {prediction[:40]!r} to the reference {reference[:40]!r} has the score {first!r}, and "
                f"{second!r} after others were scored; keep nothing between two calls, and draw no random numbers"
            )
    if drawn := [name for name, state in random_states().items() if state != before[name]]:
        raise ClauseError(
            f"it drew from or seeded {', '.join(drawn)}, from which training draws too; use a random.Random of its own"
        )


@SUITE.clause(
    "A metric with `corpus` gives any set of answers such a score too, the same whenever it is asked.",
    needs=["names", "pure"],
)
def corpus(case: _Case) -> None:
    of_set = getattr(case.metric, "corpus", None)
    if of_set is None:
        return
    pairs = list(itertools.product(_TEXTS, _TEXTS))
    sets = [pairs, *([pair] for pair in pairs[: len(_TEXTS)]), pairs[::-1], pairs]
    scores: list[object] = []
    for chosen in sets:
        predictions, references = (list(texts) for texts in zip(*chosen, strict=True))
        shown = f"corpus of {len(chosen)} answers, the first {predictions[0][:40]!r} to {references[0][:40]!r},"
        try:
            scores.append(of_set(predictions, references))
        except Exception as error:
            raise ClauseError(f"{shown} raised {type(error).__name__}: {error}; score any set") from error
        if (
            not _is_finite(scores[-1])
            or _names(scores[-1]) & RESERVED_METRICS
            or _names(scores[-1]) != _names(scores[0])
        ):
            raise ClauseError(
                f"{shown} has the score {scores[-1]!r}; return a finite float, or finite floats by the same names each "
                "time, none of them the engine's"
            )
    if scores[0] != scores[-1]:
        raise ClauseError(
            f"corpus gives the same {len(pairs)} answers {scores[0]!r} and then {scores[-1]!r}; keep nothing between "
            "two calls"
        )


def _is_finite(score: object) -> bool:
    values = list(score.values()) if isinstance(score, Mapping) else [score]
    return bool(values) and all(isinstance(value, int | float) and math.isfinite(value) for value in values)


def _names(score: object) -> set[object]:
    """Of several scores; none of a single one, which has the plugin's."""
    return set(score) if isinstance(score, Mapping) else set()


def _listed(found: set[object]) -> str:
    return ", ".join(sorted(map(str, found))) or "of one number"


def check_metric(plugin: object) -> None:
    """Holds the plugin's metric against each clause. Raises ContractError, naming those that it breaks."""
    SUITE.check(plugin)
