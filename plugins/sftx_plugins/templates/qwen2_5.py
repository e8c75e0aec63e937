"""Qwen2.5: ChatML with Qwen's own system text in conversations without one, and tools in the format of Hermes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from pydantic import Field

from sftx_plugins.templates.chatml import CALL, END, RESPONSE, ROLES, START, ChatML
from sftx_plugins.templates.native import THINK


@dataclass(frozen=True, eq=False)
class Qwen25(ChatML):
    """ChatML as Qwen2.5's own template writes it, with its default system text and its tools."""

    default_system: Annotated[
        str | None, Field(description="System text of conversations that begin without one; null adds none.")
    ] = "You are Qwen, created by Alibaba Cloud. You are a helpful assistant."

    controls = frozenset({START, END}) | CALL
    optional_controls = THINK | RESPONSE
    roles = ROLES
