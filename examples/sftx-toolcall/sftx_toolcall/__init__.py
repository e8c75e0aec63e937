"""Function calls for sftx: a plain-text template for conversations whose answers are a call in JSON, and a metric."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated

from pydantic import Field
from sftx import Metric, Template, hookimpl

from sftx_toolcall.score import CallScore
from sftx_toolcall.template import HeadedText

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["ToolCall"]


@dataclass(frozen=True, eq=False)
class ToolCall:
    """Writes turns under headings and a call as one line of JSON; scores function and arguments of the call."""

    partial: Annotated[
        float, Field(ge=0, le=1, description="Score of a call to the right function with wrong arguments.")
    ] = 0.5

    @hookimpl
    def sftx_template(self, tokenizer: PreTrainedTokenizerBase) -> Template:
        return HeadedText(tokenizer)

    @hookimpl
    def sftx_metric(self) -> Metric:
        return CallScore(self.partial)
