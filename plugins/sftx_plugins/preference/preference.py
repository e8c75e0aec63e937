"""The parser of preference records as a plugin of its own, for losses of other packages."""

from __future__ import annotations

from dataclasses import dataclass

from sftx import Parser, hookimpl
from sftx_plugins.preference.records import PreferenceParser


@dataclass(frozen=True, eq=False)
class Preference:
    """Pairs of a better and a worse answer, and answers that are labelled as good or bad.

    dpo, kto, orpo and simpo read the same records without it. Each example's `extras["preference"]` is "chosen" or
    "rejected"; the two of a pair are one group. A run whose loss does not compare answers is refused, since it would
    train the model to give the rejected ones.
    """

    @hookimpl
    def sftx_parser(self) -> Parser:
        return PreferenceParser(labelled=True)
