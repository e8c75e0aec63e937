"""The share of answers that are the reference, character by character."""

from __future__ import annotations

from dataclasses import dataclass

from sftx import Metric, hookimpl


@dataclass(frozen=True, eq=False)
class ExactMatch:
    """1 when the answer equals the reference, white space at both ends aside; otherwise 0."""

    @hookimpl
    def sftx_metric(self) -> Metric:
        return self

    def __call__(self, prediction: str, reference: str) -> float:
        return float(prediction.strip() == reference.strip())
