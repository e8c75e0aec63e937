"""The reference of a preference loss: the model before training, or another one.

Its log-probabilities come from a second forward of each step without the adapters, or are computed once.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any, Final, Literal

from sftx import ConfigError, RunInfo

if TYPE_CHECKING:
    from sftx import LanguageModel

Kind = Literal["adapters", "precompute"]

_ADAPTERS: Final = ("lora", "qlora", "vera")


class Reference:
    """Knows where the reference comes from, and holds another model while its log-probabilities are computed."""

    def __init__(self, kind: Kind, model: str | None) -> None:
        """`model`: the directory or name of another model; None is the model as it was before training."""
        self.kind = kind
        self._model = model
        self._loaded: LanguageModel | None = None

    @property
    def is_precomputed(self) -> bool:
        return self.kind == "precompute"

    @contextlib.contextmanager
    def computing(self, lm: LanguageModel) -> Iterator[LanguageModel]:
        """Return a context with the model that is the reference, in which no gradient is computed."""
        import torch

        with torch.no_grad():
            if self._model is None:
                with lm.without_adapters():
                    yield lm
            else:
                if self._loaded is None:
                    from sftx import load_model

                    self._loaded = load_model(self._model, like=lm)
                yield self._loaded

    def release(self) -> None:
        """Free the other model: nothing is computed with it once training has begun."""
        self._loaded = None


def reference_of(kind: Kind | None, model: str | None, run: RunInfo) -> Reference:
    """Return the reference that the options name. By default it is computed by the adapters, where the run has some."""
    if kind is None:
        plugins: Mapping[str, Any] = run.config.get("plugins", {})
        has_adapters = any(name in plugins for name in _ADAPTERS)
        kind = "adapters" if has_adapters and model is None else "precompute"
    return Reference(kind, model)


def check_reference(kind: Kind | None, model: str | None) -> None:
    """Raise ConfigError for options that contradict each other."""
    if kind == "adapters" and model is not None:
        raise ConfigError(
            f"reference_model={model!r} is another model, whose log-probabilities are computed once; leave reference "
            "out, or set it to precompute"
        )
