"""Full fine-tuning, which is what a run without an adapter does, named in the run file."""

from __future__ import annotations

from collections.abc import Set
from dataclasses import dataclass

from sftx import ModelSpec, hookimpl


@dataclass(frozen=True, eq=False)
class Full:
    """Trains the whole model, as a run without an adapter does; no adapter can be named beside it."""

    @hookimpl
    def sftx_trainable(self, spec: ModelSpec) -> Set[str]:
        return frozenset(spec.parameter_names)
