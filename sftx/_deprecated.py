"""What is on its way out, all of it in one place, with the version in which it goes.

An entry is made in the release that deprecates, and deleted together with what it names in `removed_in`.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import Any, Final


class SftxDeprecationWarning(FutureWarning):
    """Something of sftx's public interface goes in a later version. Shown by default."""


@dataclass(frozen=True)
class Deprecated:
    """One thing that still works and warns."""

    instead: str
    """What to use: a public name of sftx for a name, a sentence for the others."""
    since: str
    removed_in: str

    def warn(self, what: str, *, stacklevel: int = 2) -> None:
        message = f"{what} is deprecated since sftx {self.since} and goes in {self.removed_in}; use {self.instead}"
        warnings.warn(message, SftxDeprecationWarning, stacklevel=stacklevel + 1)


NAMES: Final[dict[str, Deprecated]] = {}
"""Former names of public names: `sftx.Old` is `sftx.<instead>`."""

HOOKS: Final[dict[str, Deprecated]] = {}
"""Hooks, `sftx_x`, and arguments of hooks, `sftx_x(argument)`."""


def name(old: str) -> Any:
    """What stands under a former public name, with a warning. Raises AttributeError."""
    import sftx

    if old not in NAMES:
        raise AttributeError(f"module 'sftx' has no attribute {old!r}")
    NAMES[old].warn(f"sftx.{old}", stacklevel=3)
    return getattr(sftx, NAMES[old].instead)


def hook(who: str, hook: str, arguments: list[str]) -> None:
    """Warns when the plugin `who` fills a deprecated hook, or asks for a deprecated argument of one."""
    for what in (hook, *(f"{hook}({argument})" for argument in arguments)):
        if what in HOOKS:
            HOOKS[what].warn(f"{who}: {what}")
