"""DPO with the built-in collators: pairs are found in `extras`, and the reference is computed once or in each step.

Dimensions: B rows, T tokens, E examples, P pairs.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

from pydantic import Field

from sftx import (
    Batch,
    Conversation,
    Example,
    LanguageModel,
    Location,
    Loss,
    LossSum,
    Message,
    Parser,
    Record,
    hookimpl,
    load_model,
    sum_by_example,
)

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["Reference"]


def rows(num: int, seed: int = 0) -> list[dict[str, str]]:
    """Return records whose prompts and answers have lengths of their own."""
    rng = random.Random(seed)
    words = ["red", "green", "blue", "seven", "please", "count", "of"]
    most = {"ask": 30, "good": 12, "bad": 12}
    return [{name: " ".join(rng.choices(words, k=rng.randint(1, n))) for name, n in most.items()} for _ in range(num)]


class PairParser:
    """Reads `{"ask", "good", "bad"}`."""

    fields: ClassVar[str] = "ask, good, bad"
    samples: ClassVar[Sequence[Record]] = tuple(rows(4))

    def accepts(self, record: Record) -> bool:
        return record.keys() == {"ask", "good", "bad"}

    def parse(self, record: Record, where: Location) -> tuple[Conversation, ...]:
        ask = Message("user", record["ask"], trainable=False)
        return tuple(
            Conversation((ask, Message("assistant", record[side])), extras={"side": side}) for side in ("good", "bad")
        )


class PairLoss:
    """-log sigmoid(beta (r(good) - r(bad))), where r is log p / p_ref of an answer."""

    answers_only = True

    def __init__(self, options: Reference) -> None:
        self._beta = options.beta
        self._reference_model = options.reference_model
        self._model: LanguageModel | None = None
        self.shares_prefixes = options.share
        self.seen: list[str] = []
        if not options.once:
            self.precompute: Any = None

    def prepare(self, examples: Sequence[Example]) -> None:
        self.seen += [example.row_id for example in examples]

    def extras(self, batch: Batch) -> dict[str, Tensor]:
        import torch

        assert {example.row_id for example in batch.examples} <= {*self.seen}
        at = {(example.group, example.extras["side"]): n for n, example in enumerate(batch.examples)}
        groups = dict.fromkeys(example.group for example in batch.examples)
        return {"pair_P2": torch.tensor([[at[group, "good"], at[group, "bad"]] for group in groups])}

    def denominator(self, batch: Batch) -> float:
        return float(len(batch.extras["pair_P2"]))

    def precompute(self, lm: LanguageModel, batch: Batch) -> dict[str, Tensor]:  # type: ignore[no-redef]
        if self._reference_model is None:
            return {"reference_E": log_likelihoods(lm, batch)}
        if self._model is None:
            self._model = load_model(self._reference_model, like=lm)
        return {"reference_E": log_likelihoods(self._model, batch)}

    def __call__(self, lm: LanguageModel, batch: Batch) -> LossSum:
        import torch

        if self.precompute is None:
            with torch.no_grad(), lm.without_adapters():
                reference_E = log_likelihoods(lm, batch)
        else:
            reference_E = batch.extras["reference_E"]
        rewards_E = self._beta * (log_likelihoods(lm, batch) - reference_E)
        good_P, bad_P = rewards_E[batch.extras["pair_P2"]].unbind(1)
        margin = (good_P - bad_P).detach().sum()
        return LossSum(-torch.nn.functional.logsigmoid(good_P - bad_P).sum(), metrics={"margin": margin})


def log_likelihoods(lm: LanguageModel, batch: Batch) -> Tensor:
    """Return the sum of the log-probabilities of each example's label tokens, in nats: [E]."""
    nll_N = lm.cross_entropy(
        lm.hidden(batch).hidden_BTD,
        batch.labels_BT,
        token_weights_BT=batch.token_weights_BT,
        num_valid=batch.num_label_tokens,
        reduction="none",
    ).loss
    return -sum_by_example(batch, nll_N)


@dataclass(frozen=True, eq=False)
class Reference:
    """Prefers the good answer of each pair, relative to a reference."""

    beta: Annotated[float, Field(gt=0, description="How close the model stays to the reference.")] = 0.5
    once: Annotated[bool, Field(description="Compute the reference once, before the first step.")] = True
    share: Annotated[bool, Field(description="Compute the prompt of a pair once.")] = False
    reference_model: Annotated[str | None, Field(description="Another model as the reference.")] = None

    @hookimpl
    def sftx_parser(self) -> Parser:
        return PairParser()

    @hookimpl
    def sftx_loss(self) -> Loss:
        return PairLoss(self)
