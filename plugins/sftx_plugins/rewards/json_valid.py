"""1 for an answer that is JSON and has what is asked for; the metric `json-valid` as a reward."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any

from pydantic import Field

from sftx import Reward, hookimpl
from sftx_plugins.metrics.json_valid import JsonCheck


@dataclass(frozen=True, eq=False)
class RewardJson:
    """1 if the whole answer is one JSON value with the required keys that conforms to the schema; otherwise 0."""

    required_keys: Annotated[
        tuple[Annotated[str, Field(min_length=1)], ...],
        Field(description="Keys that the answer, which is an object then, must have."),
    ] = ()
    schema: Annotated[
        str | None,
        Field(min_length=1, description="File with a JSON schema for the answers; needs jsonschema."),
    ] = None
    nonconforming: Annotated[
        float,
        Field(
            ge=-1,
            le=1,
            allow_inf_nan=False,
            description="Reward of an answer that is JSON, but has not these keys or does not conform to the schema.",
        ),
    ] = 0.0

    @hookimpl
    def sftx_reward(self) -> Reward:
        check = JsonCheck.of(self.schema)

        def score(text: str) -> float:
            value, conforms = check(text)
            if conforms is None:
                return 0.0
            return 1.0 if conforms and self._has_keys(value) else self.nonconforming

        return lambda answers: [score(answer.text) for answer in answers]

    def _has_keys(self, value: Any) -> bool:
        return not self.required_keys or (isinstance(value, dict) and value.keys() >= set(self.required_keys))
