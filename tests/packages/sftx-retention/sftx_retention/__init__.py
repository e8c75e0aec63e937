"""The evaluator `retention`: how well a model still knows texts that it is not trained on."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated

from pydantic import Field

from sftx import Conversation, Evaluation, Evaluator, Message, hookimpl


@dataclass(frozen=True, eq=False)
class Retention:
    """Scores what the model still knows, and how varied its answers are."""

    texts: Annotated[tuple[str, ...], Field(min_length=1, description="Texts that are not trained on.")] = (
        "Water boils at one hundred degrees.",
        "The sun rises in the east and sets in the west.",
        "Two and two are four.",
    )
    max_new_tokens: Annotated[int, Field(ge=1, description="Largest length of an answer, in tokens.")] = 6

    @hookimpl
    def sftx_evaluator(self) -> Evaluator:
        return self

    def evaluate(self, evaluation: Evaluation) -> Mapping[str, float]:
        pairs = [evaluation.encode(text[:1], text[1:]) for text in self.texts]
        likelihoods = evaluation.log_likelihoods(pairs)
        asked = [Conversation((Message("user", text),)) for text in self.texts]
        words = " ".join(evaluation.generate(asked, max_new_tokens=self.max_new_tokens)).split()
        return {
            "retention": sum(total for total, _ in likelihoods) / sum(len(continuation) for _, continuation in pairs),
            "fluency": len(set(words)) / max(1, len(words)),
        }
