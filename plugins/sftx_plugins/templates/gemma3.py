"""Gemma 3: the format of Gemma, with a system text as in Gemma 3's own template; text only, no images."""

from __future__ import annotations

from dataclasses import dataclass

from sftx_plugins.templates.gemma import Gemma


@dataclass(frozen=True, eq=False)
class Gemma3(Gemma):
    """Turns of user and model, word for word as in Gemma 3's own template; text only."""
