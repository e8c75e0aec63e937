"""MiniMind: ChatML with a short system text where a conversation has none; with tools it has none.

The form of MiniMind's tokenizer since its second version, whose control tokens are <|im_start|> and <|im_end|>.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from pydantic import Field

from sftx_plugins.templates.chatml import ROLES, ChatML


@dataclass(frozen=True, eq=False)
class MiniMind(ChatML):
    """ChatML as MiniMind's own template writes it."""

    default_system: Annotated[
        str | None,
        Field(description="System text of conversations that begin with neither one nor tools; null adds none."),
    ] = "You are a helpful assistant"

    roles = ROLES
    default_with_tools = False
