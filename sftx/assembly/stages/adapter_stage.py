"""An adapter as a stage, and the check of what `sftx_trainable` names."""

from __future__ import annotations

import math
from collections.abc import Callable, Set
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sftx.assembly.stages.stage import Stage
from sftx.errors import PluginError, counted
from sftx.types import Adapter, Batch, LanguageModel, ModelSpec

if TYPE_CHECKING:
    from torch import Tensor, nn


class AdapterStage(Stage, Adapter):
    """Attaches, saves, loads and merges a plugin's adapter."""

    def __init__(self, plugin: str, adapter: Adapter) -> None:
        super().__init__(plugin)
        self._adapter = adapter

    def quantize(self, name: str, module: nn.Module) -> nn.Module | None:
        with self._attribute("quantize"):
            return self._adapter.quantize(name, module)

    def attach(self, lm: LanguageModel) -> None:
        with self._attribute("attach"):
            self._adapter.attach(lm)

    @property
    def embed(self) -> Callable[[Batch, Tensor], Tensor]:
        """The adapter's own `embed`, whose result is checked; AttributeError where it has none."""
        own: Callable[[Batch, Tensor], Tensor] = self._adapter.embed  # type: ignore[attr-defined]

        def checked(batch: Batch, embeds_BTD: Tensor) -> Tensor:
            shape, dtype = embeds_BTD.shape, embeds_BTD.dtype
            with self._attribute("embed"):
                try:
                    made: Any = own(batch, embeds_BTD)
                except KeyError as error:
                    name = error.args[0] if error.args else None
                    if not isinstance(name, str) or name in batch.extras:
                        raise
                    raise self._refuse(
                        f"embed reads batch.extras[{name!r}], and the collator of this run makes "
                        f"{', '.join(sorted(batch.extras)) or 'no extras'}; name a collator that makes it"
                    ) from error
            expected = f"{dtype} {list(shape)}"
            found = f"{made.dtype} {list(made.shape)}" if hasattr(made, "dtype") else type(made).__name__
            if found != expected:
                raise self._refuse(f"embed returned {found}, expected {expected}, as it was given")
            return made  # type: ignore[no-any-return]

        return checked

    def rate_scale(self, name: str) -> float:
        with self._attribute("rate_scale"):
            scale: Any = self._adapter.rate_scale(name)
        if not (isinstance(scale, int | float) and math.isfinite(scale) and scale > 0):
            raise self._refuse(f"rate_scale of {name} is {scale!r}, expected a number above 0")
        return scale

    def disabled(self) -> AbstractContextManager[None]:
        with self._attribute("disabled"):
            return self._adapter.disabled()

    def save(self, directory: Path) -> None:
        with self._attribute("save"):
            self._adapter.save(directory)

    def load(self, directory: Path) -> None:
        with self._attribute("load"):
            self._adapter.load(directory)

    def merge(self, lm: LanguageModel) -> None:
        with self._attribute("merge"):
            self._adapter.merge(lm)

    def _explains_itself(self, error: BaseException, what: str) -> bool:
        is_disk = isinstance(error, OSError) or type(error).__name__ == "SafetensorError"
        return what == "save" and is_disk


def check_trainable(names: Set[Any], spec: ModelSpec) -> frozenset[str]:
    """Return the names that a plugin chose. Raises PluginError unless all are parameters of the language model."""
    if not names:
        raise PluginError("sftx_trainable returned no name, so nothing would train")
    if unknown := sorted(map(str, names - {*spec.parameter_names})):
        raise PluginError(
            f"sftx_trainable returned {counted(len(unknown), 'name')} that no parameter of the language model has "
            f"(first: {unknown[0]!r}); the names are those of spec.parameter_names"
        )
    return frozenset(names)
