"""MiniMind: ChatML with a short default system text in conversations that have neither a system turn nor tools.

This is the format of MiniMind's tokenizer since its second version, with the control tokens <|im_start|> and
<|im_end|>.
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
        Field(description="System text of conversations without a system turn and without tools; null adds none."),
    ] = "You are a helpful assistant"

    roles = ROLES
    default_with_tools = False
