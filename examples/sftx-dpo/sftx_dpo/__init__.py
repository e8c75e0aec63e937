"""Direct Preference Optimization (DPO) for sftx: one plugin that parses pairs of answers, batches and compares them.

@inproceedings{rafailov2023direct,
    title = {Direct Preference Optimization: Your Language Model is Secretly a Reward Model},
    author = {Rafailov, Sharma, Mitchell, Ermon, Manning and Finn}, year = 2023,
    url = {https://arxiv.org/abs/2305.18290}}
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from pydantic import Field
from sftx import Collator, Loss, Parser, hookimpl

from sftx_dpo.collator import PairCollator
from sftx_dpo.loss import DPOLoss
from sftx_dpo.parser import PairParser

__all__ = ["DPO"]


@dataclass(frozen=True, eq=False)
class DPO:
    """Trains an adapter to prefer the chosen answer of a pair over the rejected one, more than the base model does."""

    beta: Annotated[
        float,
        Field(gt=0, description="How close the trained model stays to the reference; lower lets it move further."),
    ] = 0.1
    label_smoothing: Annotated[
        float,
        Field(
            ge=0,
            lt=0.5,
            description="Assumed share of pairs with swapped labels (conservative DPO).",
        ),
    ] = 0.0

    @hookimpl
    def sftx_parser(self) -> Parser:
        return PairParser()

    @hookimpl
    def sftx_collator(self) -> Collator:
        return PairCollator()

    @hookimpl
    def sftx_loss(self) -> Loss:
        return DPOLoss(self.beta, self.label_smoothing)
