"""The argument of commands that read a run, an adapter or a model: a path, or an address in a store."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from sftx.stores import is_address, refresh


def local_model(model: str, *, result: bool = True) -> str:
    """Return MODEL, or the copy of one that is in a store. `result`: that of a run is needed. Raises ModelError."""
    if not is_address(model):
        return model
    from sftx.checkpoint.remote_runs import local_copy

    refresh()
    return str(local_copy(model, result=result))


class RunPath(click.Path):
    """The type of the argument RUN, which becomes a path of this machine."""

    def __init__(self, *, result: bool = True) -> None:
        """`result`: the result of the run is needed."""
        super().__init__(path_type=Path)
        self._result = result

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """Raises ModelError."""
        return super().convert(local_model(value, result=self._result), param, ctx)
