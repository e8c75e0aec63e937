"""Direct Preference Optimization for sftx: pairs of answers are parsed, kept together and compared by one plugin.

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
    """Trains an adapter to prefer the chosen answer of a pair to the rejected one, more than the model alone does."""

    beta: Annotated[
        float,
        Field(gt=0, description="How closely the trained model keeps to the reference; lower moves it further."),
    ] = 0.1
    label_smoothing: Annotated[
        float,
        Field(
            ge=0,
            lt=0.5,
            description="Share of the pairs that are taken to be labelled the wrong way round (conservative DPO).",
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
