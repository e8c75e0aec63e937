"""1 for an answer that equals the reference, as text or as JSON value; the metric `exact-match` as a reward."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated

from pydantic import Field

from sftx import Answer, Reward, hookimpl
from sftx_plugins.metrics.exact_match import ExactMatch


@dataclass(frozen=True, eq=False)
class RewardExactMatch:
    """1 if the answer equals the reference, apart from white space at both ends; otherwise 0.

    It declines answers to a prompt that has no reference.
    """

    as_json: Annotated[
        bool,
        Field(description="Compare as JSON values if both are JSON: the order of keys and spacing do not count."),
    ] = False

    @hookimpl
    def sftx_reward(self) -> Reward:
        return self

    def __call__(self, answers: Sequence[Answer]) -> list[float | None]:
        score = ExactMatch(as_json=self.as_json)
        return [
            score(answer.text, answer.question.reference) if answer.question.reference else None for answer in answers
        ]
