"""The share of answers that equal the reference, as text or as JSON values."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Annotated

from pydantic import Field

from sftx import Metric, hookimpl
from sftx_plugins.metrics._answers import parse_json


@dataclass(frozen=True, eq=False)
class ExactMatch:
    """1 if the answer equals the reference, apart from white space at both ends; otherwise 0."""

    as_json: Annotated[
        bool,
        Field(description="Compare as JSON values if both are JSON: the order of keys and spacing do not count."),
    ] = False

    @hookimpl
    def sftx_metric(self) -> Metric:
        return self

    def __call__(self, prediction: str, reference: str) -> float:
        if self.as_json:
            prediction, reference = _canonical(prediction), _canonical(reference)
        return float(prediction.strip() == reference.strip())


def _canonical(text: str) -> str:
    """Return one text for all spellings of a JSON value, and other text as it is. `1`, `1.0` and `true` differ."""
    try:
        return json.dumps(parse_json(text), sort_keys=True)
    except ValueError:
        return text
