"""The contract of a metric: it scores any answer, and the score depends on that answer and its row alone."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from sftx.assembly.stages.loss_stage import RESERVED_METRICS
from sftx.assembly.stages.stage import arguments_of
from sftx.testing.clauses import ClauseError, Suite, must_not_raise
from sftx.testing.kit import Kit, make_stage
from sftx.testing.process import changed_random_states, random_states
from sftx.types import Message, Metric, Question

TEXTS = (
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
_PAIRS = list(itertools.product(TEXTS, TEXTS))


class _Case:
    def __init__(self, kit: Kit) -> None:
        self.metric: Metric = make_stage(kit.plugin, "sftx_metric")
        self.takes_row = "row" in arguments_of(self.metric)
        # Rows of its own parser, where it has one: a metric may decline all others.
        self.own = kit.held_out_rows if hasattr(kit.plugin, "sftx_parser") else []
        self.pairs = _PAIRS + [(prediction, row.reference) for row in self.own for prediction in TEXTS]
        """Predictions and references."""
        self.rows = [row_of(reference) for _, reference in _PAIRS] + [row for row in self.own for _ in TEXTS]

    def score(self, number: int) -> object:
        """Return the score of a pair, by its number."""
        row: dict[str, Any] = {"row": self.rows[number]} if self.takes_row else {}
        return self.metric(*self.pairs[number], **row)

    def scores(self, numbers: Iterable[int] | None = None) -> Iterator[tuple[tuple[str, str], object]]:
        """Yield the pairs that are not declined, with their scores."""
        for number in range(len(self.pairs)) if numbers is None else numbers:
            if (score := self.score(number)) is not None:
                yield self.pairs[number], score


def row_of(reference: str) -> Question:
    """Return a held-out row of a format that has no extras."""
    return Question("samples:1", "Hello?", [1], reference, "messages", (Message("user", "Hello?"),))


SUITE: Suite[_Case] = Suite("metric", _Case)


@SUITE.clause(
    "Any answer to a row of any format gets a score, or None: an empty one, one of 2000 words, one in the wrong format."
)
def takes_any_text(case: _Case) -> None:
    for number, pair in enumerate(case.pairs):
        advice = "a model may answer anything, so return the lowest score instead, or None for a row of another format"
        with must_not_raise(_shown(*pair), advice):
            case.score(number)


@SUITE.clause(
    "A score is a finite number, or several finite numbers by name; None is for any answer to a row, or for none.",
    needs=["takes-any-text"],
)
def finite_number(case: _Case) -> None:
    scored_rows = {
        (row.row_id, row.reference) for number, row in enumerate(case.rows) if case.score(number) is not None
    }
    may_decline_all = case.takes_row and not case.own  # rows of a format that is not known here
    for number, (pair, row) in enumerate(zip(case.pairs, case.rows, strict=True)):
        score = case.score(number)
        if score is None and (scored_rows or may_decline_all) and (row.row_id, row.reference) not in scored_rows:
            continue
        if not _is_finite(score):
            raise ClauseError(
                f"{_shown(*pair)} has the score {score!r}; return a finite float, or a mapping of names to finite "
                "floats, since the mean over the held-out rows is reported; a row is declined by None for any answer"
            )


@SUITE.clause(
    "Several scores have the same names for any answer, and no name is one that sftx reports itself.",
    needs=["finite-number"],
)
def names(case: _Case) -> None:
    scored = list(case.scores())
    if not scored:
        return
    first, expected = scored[0][0], _names(scored[0][1])
    if invalid := [name for name in expected if name in RESERVED_METRICS or not isinstance(name, str)]:
        raise ClauseError(f"it reports the score {invalid[0]!r}, which is reserved or no string; choose another name")
    for pair, score in scored:
        reported = _names(score)
        if reported != expected:
            raise ClauseError(
                f"{_shown(*pair)} has the scores {_listed(reported)}, {_shown(*first)} has {_listed(expected)}; "
                "return the same names for every answer"
            )


@SUITE.clause(
    "A score depends on the answer and the row alone, and the global random state does not change.",
    needs=["takes-any-text", "finite-number"],
)
def pure(case: _Case) -> None:
    before = random_states()
    numbers = range(len(case.pairs))
    scores = [case.score(number) for number in numbers]
    again = [case.score(number) for number in reversed(numbers)][::-1]
    for pair, first, second in zip(case.pairs, scores, again, strict=True):
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
    takes_rows = "rows" in arguments_of(score_set)
    scores: list[object] = []
    everything = list(range(len(case.pairs)))
    for numbers in [everything, *([number] for number in everything[: len(TEXTS)]), everything[::-1], everything]:
        predictions, references = (list(texts) for texts in zip(*(case.pairs[n] for n in numbers), strict=True))
        rows = {"rows": [case.rows[number] for number in numbers]} if takes_rows else {}
        shown = f"corpus of {len(numbers)} answers, starting with {_shown(*case.pairs[numbers[0]])},"
        with must_not_raise(shown, "score any set"):
            score = score_set(predictions, references, **rows)
        if score is None:
            continue
        scores.append(score)
        names = _names(scores[-1])
        if not _is_finite(scores[-1]) or names & RESERVED_METRICS or names != _names(scores[0]):
            raise ClauseError(
                f"{shown} has the score {scores[-1]!r}; return a finite float, or finite floats by the same names each "
                "time, none of them reserved"
            )
    if scores and scores[0] != scores[-1]:
        raise ClauseError(
            f"corpus gives the same {len(case.pairs)} answers {scores[0]!r} and then {scores[-1]!r}; keep no state "
            "between two calls"
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
