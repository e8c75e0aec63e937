"""Tests of the metric contract: good metrics, and bad ones that break one clause each."""

from __future__ import annotations

import itertools
import json
import random
from collections.abc import Iterator
from typing import Any, ClassVar

import pytest

from contracts import assert_every_clause_is_broken, assert_fails, assert_fails_only, assert_passes, whole_suite_cases
from sftx import Question, hookimpl
from sftx.testing import ContractError, check_metric
from sftx.testing.kit import built_in
from sftx.testing.metric import SUITE


class Overlap:
    """Scores the share of the reference's words that the answer contains."""

    @hookimpl
    def sftx_metric(self) -> Any:
        return self

    def __call__(self, prediction: str, reference: str) -> Any:
        words = set(reference.split())
        return len(words & set(prediction.split())) / max(1, len(words))


class Whole(Overlap):
    """Returns a bool, which is a valid score."""

    def __call__(self, prediction: str, reference: str) -> Any:
        return prediction == reference


class Both(Overlap):
    """Returns two scores of an answer, and two scores of a set that are not means."""

    def __call__(self, prediction: str, reference: str) -> Any:
        return {"overlap": super().__call__(prediction, reference), "empty": prediction == ""}

    def corpus(self, predictions: list[str], references: list[str]) -> Any:
        scores = [super(Both, self).__call__(*pair) for pair in zip(predictions, references, strict=True)]
        return {"highest": max(scores), "lowest": min(scores)}


class OfNumbers(Overlap):
    """Declines rows whose reference has no digit."""

    def __call__(self, prediction: str, reference: str) -> Any:
        return float(prediction == reference) if any(map(str.isdigit, reference)) else None


class OfItsFormat(Overlap):
    """Declines rows without the field that it compares with, of whole sets too."""

    def __call__(self, prediction: str, reference: str, row: Question) -> Any:
        return float(row.extras["unit"] in prediction) if "unit" in row.extras else None

    def corpus(self, predictions: list[str], references: list[str], rows: list[Question]) -> Any:
        return len(rows) if all(row.extras for row in rows) else None


GOOD = [built_in("exact-match"), built_in("json-valid"), Overlap(), Whole(), Both(), OfNumbers(), OfItsFormat()]


@pytest.mark.parametrize("plugin", GOOD, ids=lambda p: type(p).__name__)
def test_good_metrics_keep_every_clause(plugin: object) -> None:
    assert_passes(SUITE, plugin)


class GivesNumber(Overlap):
    @hookimpl
    def sftx_metric(self) -> Any:
        return 3


class WantsJson(Overlap):
    def __call__(self, prediction: str, reference: str) -> Any:
        return float(json.loads(prediction) == json.loads(reference))


class WantsWords(Overlap):
    def __call__(self, prediction: str, reference: str) -> Any:
        return len(set(prediction.split()) & set(reference.split())) / len(reference.split())


class GivesNothing(Overlap):
    def __call__(self, prediction: str, reference: str) -> Any:
        return super().__call__(prediction, reference) or None


class ForgetsReturn(Overlap):
    def __call__(self, prediction: str, reference: str) -> Any:
        super().__call__(prediction, reference)


class NeedsItsFormat(Overlap):
    def __call__(self, prediction: str, reference: str, row: Question) -> Any:
        return float(row.extras["unit"] in prediction)


class NamesRowOtherwise(Overlap):
    def __call__(self, prediction: str, reference: str, question: Any) -> Any:
        return 1.0


class GivesNaN(Overlap):
    def __call__(self, prediction: str, reference: str) -> Any:
        return super().__call__(prediction, reference) if reference.split() else float("nan")


class GivesText(Overlap):
    def __call__(self, prediction: str, reference: str) -> Any:
        return f"{super().__call__(prediction, reference):.2f}"


class GivesNone(Overlap):
    def __call__(self, prediction: str, reference: str) -> Any:
        return {}


class OneIsNaN(Both):
    def __call__(self, prediction: str, reference: str) -> Any:
        return super().__call__(prediction, reference) | ({} if prediction else {"overlap": float("nan")})


class LeavesOneOut(Both):
    def __call__(self, prediction: str, reference: str) -> Any:
        scores = super().__call__(prediction, reference)
        return scores if prediction else {"empty": 1.0}


class NumberOrNames(Both):
    def __call__(self, prediction: str, reference: str) -> Any:
        return super().__call__(prediction, reference) if prediction else 0.0


class ReportsLoss(Overlap):
    def __call__(self, prediction: str, reference: str) -> Any:
        return {"loss": 1 - super().__call__(prediction, reference)}


class CountsNames(Overlap):
    def __call__(self, prediction: str, reference: str) -> Any:
        return {1: super().__call__(prediction, reference)}


class SetIsNaN(Both):
    def corpus(self, predictions: list[str], references: list[str]) -> Any:
        return float("nan")


class SetReportsLoss(Both):
    def corpus(self, predictions: list[str], references: list[str]) -> Any:
        return {"loss": 1.0}


class SetNamesVary(Both):
    def corpus(self, predictions: list[str], references: list[str]) -> Any:
        return {f"of {len(predictions)}": 1.0}


class SetOfTwo(Both):
    """Divides by the number of rows minus one."""

    def corpus(self, predictions: list[str], references: list[str]) -> Any:
        return sum(map(len, predictions)) / (len(predictions) - 1)


class SetRemembers(Both):
    calls: ClassVar[Iterator[int]] = itertools.count()

    def corpus(self, predictions: list[str], references: list[str]) -> Any:
        return next(self.calls)


class Remembers(Overlap):
    """Adds the number of calls so far to the score."""

    calls: ClassVar[Iterator[int]] = itertools.count()

    def __call__(self, prediction: str, reference: str) -> Any:
        return super().__call__(prediction, reference) + next(self.calls)


class DrawsFromTheGlobalOnes(Overlap):
    def __call__(self, prediction: str, reference: str) -> Any:
        random.random()
        return super().__call__(prediction, reference)


BAD = [
    (DrawsFromTheGlobalOnes, "pure", "it drew from or seeded Python's random numbers"),
    (GivesNumber, "made", "returned int, expected a Metric"),
    (WantsJson, "takes-any-text", "the answer 'Paris' to the reference 'Paris' raised JSONDecodeError"),
    (WantsWords, "takes-any-text", "to the reference '' raised ZeroDivisionError: division by zero"),
    (GivesNothing, "finite-number", "has the score None; return a finite float"),
    (ForgetsReturn, "finite-number", "has the score None; return a finite float"),
    (NeedsItsFormat, "takes-any-text", "raised KeyError: 'unit'; a model may answer anything, so return the lowest"),
    (NamesRowOtherwise, "takes-any-text", "missing 1 required positional argument: 'question'"),
    (GivesNaN, "finite-number", "to the reference '' has the score nan; return a finite float"),
    (GivesText, "finite-number", "has the score '1.00'; return a finite float"),
    (GivesNone, "finite-number", "has the score {}; return a finite float"),
    (OneIsNaN, "finite-number", "has the score {'overlap': nan"),
    (LeavesOneOut, "names", "has the scores empty, the answer 'Paris' to the reference 'Paris' has empty, overlap"),
    (
        NumberOrNames,
        "names",
        "has the scores without a name, the answer",
    ),
    (ReportsLoss, "names", "it reports the score 'loss'"),
    (CountsNames, "names", "it reports the score 1,"),
    (SetIsNaN, "corpus", "has the score nan; return a finite float"),
    (SetReportsLoss, "corpus", "has the score {'loss': 1.0}; return a finite float, or finite floats by the same"),
    (
        SetNamesVary,
        "corpus",
        "to the reference 'Paris', has the score {'of 1': 1.0}",
    ),
    (
        SetOfTwo,
        "corpus",
        "to the reference 'Paris', raised ZeroDivisionError",
    ),
    (SetRemembers, "corpus", "corpus gives the same 144 answers 0 and then"),
    (Remembers, "pure", "after others were scored"),
]


@pytest.mark.parametrize(("bad", "clause", "message"), BAD)
def test_a_bad_metric_fails_its_clause_with_a_message(bad: type, clause: str, message: str) -> None:
    assert_fails(SUITE, bad(), clause, message)


@pytest.mark.parametrize(("bad", "clause"), whole_suite_cases(BAD))
def test_a_bad_metric_fails_nothing_else(bad: type, clause: str) -> None:
    assert_fails_only(SUITE, bad(), clause)


def test_every_clause_of_the_metric_has_a_bad_one() -> None:
    assert_every_clause_is_broken(SUITE, (clause for _, clause, _ in BAD))


def test_check_metric_raises_with_the_clause_and_its_rule() -> None:
    check_metric(Overlap())
    with pytest.raises(ContractError, match="metric / finite-number: "):
        check_metric(GivesNaN())
