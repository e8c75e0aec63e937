"""The contract of a metric: a number for any answer, of that answer alone."""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass

from sftx.stage import make
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


@SUITE.clause("A score is a finite number.", needs=["takes-any-text"])
def finite_number(case: _Case) -> None:
    for prediction, reference in itertools.product(_TEXTS, _TEXTS):
        score: object = case.metric(prediction, reference)
        if not isinstance(score, int | float) or not math.isfinite(score):
            raise ClauseError(
                f"the answer {prediction[:40]!r} to the reference {reference[:40]!r} has the score {score!r}; return a "
                "finite float, since the mean over the held-out rows is reported"
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


def check_metric(plugin: object) -> None:
    """Holds the plugin's metric against each clause. Raises ContractError, naming those that it breaks."""
    SUITE.check(plugin)
