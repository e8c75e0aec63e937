"""The contract of a metric: it scores any answer, and the score depends on that answer and its reference alone."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping
from dataclasses import dataclass

from sftx.assembly.stages import RESERVED_METRICS
from sftx.testing.clauses import ClauseError, Suite, must_not_raise
from sftx.testing.kit import make_stage
from sftx.testing.process import changed_random_states, random_states
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
_PAIRS = list(itertools.product(_TEXTS, _TEXTS))
"""Predictions and references."""


@dataclass
class _Case:
    metric: Metric


SUITE: Suite[_Case] = Suite("metric", lambda kit: _Case(make_stage(kit.plugin, "sftx_metric")))


@SUITE.clause("Any answer gets a score: an empty one, one of 2000 words, one in the wrong format.")
def takes_any_text(case: _Case) -> None:
    for pair in _PAIRS:
        with must_not_raise(_shown(*pair), "a model may answer anything, so return the lowest score instead"):
            case.metric(*pair)


@SUITE.clause("A score is a finite number, or several finite numbers by name.", needs=["takes-any-text"])
def finite_number(case: _Case) -> None:
    for pair in _PAIRS:
        score: object = case.metric(*pair)
        if not _is_finite(score):
            raise ClauseError(
                f"{_shown(*pair)} has the score {score!r}; return a finite float, or a mapping of names to finite "
                "floats, since the mean over the held-out rows is reported"
            )


@SUITE.clause(
    "Several scores have the same names for any answer, and no name is one that sftx reports itself.",
    needs=["finite-number"],
)
def names(case: _Case) -> None:
    expected = _names(case.metric(*_PAIRS[0]))
    if invalid := [name for name in expected if name in RESERVED_METRICS or not isinstance(name, str)]:
        raise ClauseError(f"it reports the score {invalid[0]!r}, which is reserved or no string; choose another name")
    for pair in _PAIRS:
        reported = _names(case.metric(*pair))
        if reported != expected:
            raise ClauseError(
                f"{_shown(*pair)} has the scores {_listed(reported)}, {_shown(*_PAIRS[0])} has {_listed(expected)}; "
                "return the same names for every answer"
            )


@SUITE.clause(
    "A score depends on the answer and the reference alone, and the global random state does not change.",
    needs=["takes-any-text", "finite-number"],
)
def pure(case: _Case) -> None:
    before = random_states()
    scores = [case.metric(*pair) for pair in _PAIRS]
    again = [case.metric(*pair) for pair in reversed(_PAIRS)][::-1]
    for pair, first, second in zip(_PAIRS, scores, again, strict=True):
        if first != second:
            raise ClauseError(
                f"{_shown(*pair)} has the score {first!r}, and {second!r} after others were scored; keep no state "
                "between two calls, and draw no random numbers"
            )
    if changed := changed_random_states(before):
        raise ClauseError(f"it drew from or seeded {changed}, which training uses too; use your own random.Random")


@SUITE.clause(
    "A metric with `corpus` gives any set of answers a score as well, and the same set always the same score.",
    needs=["names", "pure"],
)
def corpus(case: _Case) -> None:
    score_set = getattr(case.metric, "corpus", None)
    if score_set is None:
        return
    scores: list[object] = []
    for pairs in [_PAIRS, *([pair] for pair in _PAIRS[: len(_TEXTS)]), _PAIRS[::-1], _PAIRS]:
        predictions, references = (list(texts) for texts in zip(*pairs, strict=True))
        shown = f"corpus of {len(pairs)} answers, starting with {_shown(*pairs[0])},"
        with must_not_raise(shown, "score any set"):
            scores.append(score_set(predictions, references))
        names = _names(scores[-1])
        if not _is_finite(scores[-1]) or names & RESERVED_METRICS or names != _names(scores[0]):
            raise ClauseError(
                f"{shown} has the score {scores[-1]!r}; return a finite float, or finite floats by the same names each "
                "time, none of them reserved"
            )
    if scores[0] != scores[-1]:
        raise ClauseError(
            f"corpus gives the same {len(_PAIRS)} answers {scores[0]!r} and then {scores[-1]!r}; keep no state between "
            "two calls"
        )


def _shown(prediction: str, reference: str) -> str:
    return f"the answer {prediction[:40]!r} to the reference {reference[:40]!r}"


def _is_finite(score: object) -> bool:
    values = list(score.values()) if isinstance(score, Mapping) else [score]
    return bool(values) and all(isinstance(value, int | float) and math.isfinite(value) for value in values)


def _names(score: object) -> set[object]:
    """Return the names of several scores; a single score has none, and is reported by the plugin's name."""
    return set(score) if isinstance(score, Mapping) else set()


def _listed(names: set[object]) -> str:
    return ", ".join(sorted(map(str, names))) or "without a name"


def check_metric(plugin: object) -> None:
    """Check the plugin's metric. Raises ContractError, which names the broken clauses."""
    SUITE.check(plugin)
