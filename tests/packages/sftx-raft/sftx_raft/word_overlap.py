"""The reward `word-overlap`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated

from pydantic import Field
from sftx import Answer, Reward, hookimpl


@dataclass(frozen=True, eq=False)
class WordOverlap:
    """Scores the share of the reference's words that an answer has, less a share for words that it repeats."""

    repetition: Annotated[
        float, Field(ge=0, le=1, description="What an answer loses of which every word stands before.")
    ] = 0.5

    @hookimpl
    def sftx_reward(self) -> Reward:
        return self

    def __call__(self, answers: Sequence[Answer]) -> list[float | None]:
        return [self._score(answer) for answer in answers]

    def _score(self, answer: Answer) -> float | None:
        expected = set(answer.question.reference.casefold().split())
        if not expected:
            return None
        words = answer.text.casefold().split()
        repeated = 1 - len(set(words)) / len(words) if words else 0.0
        return len(expected.intersection(words)) / len(expected) - self.repetition * repeated
