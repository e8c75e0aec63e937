"""Tensors come and go; their bytes are counted, by what they are for, and what stood when they were most is kept.

A storage is counted once, from the operation that made it until nothing refers to it: what an allocator has to hold,
without what it wastes. What operations of torch use within themselves is not seen.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, Final, Literal, NamedTuple, TypeAlias

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

Kind: TypeAlias = Literal["weights", "gradients", "optimizer", "activations", "head"]
KINDS: Final[tuple[Kind, ...]] = ("weights", "gradients", "optimizer", "activations", "head")


class Phase(NamedTuple):
    """A part of a step whose own peak is kept."""

    name: Literal["start", "forward", "head", "backward"]
    turn: int = 0
    """Which forward through the model, where a loss has several."""
    layer: int = 0


class Tally(TorchDispatchMode):
    """Within it, every storage that an operation makes is counted, as of the kind that `making` says."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.live: dict[Kind, int] = dict.fromkeys(KINDS, 0)
        """Bytes of what stands now."""
        self.peaks: dict[Phase, dict[Kind, int]] = {}
        """Bytes of what stood when they were most in each phase, since the last `forget`."""
        self._kind: Kind = "activations"
        self._phase = Phase("start")
        self._total = 0
        self._most: dict[Phase, int] = {}
        self._known: dict[int, tuple[int, Kind, weakref.ref[Any]]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        self.see(out)
        return out

    @property
    def peak(self) -> dict[Kind, int]:
        """The largest of all phases."""
        return max(self.peaks.values(), key=lambda kinds: sum(kinds.values()))

    def see(self, out: Any) -> None:
        """Counts whatever tensors an operation gave that were not there before."""
        for value in (out,) if isinstance(out, Tensor) else tree_leaves(out):
            if isinstance(value, Tensor) and value.untyped_storage()._cdata not in self._known:
                self._add(value, self._kind)

    def count(self, tensors: Iterable[Tensor], kind: Kind) -> None:
        """Counts these as of that kind from now on, whatever they were counted as before."""
        for tensor in tensors:
            known = self._known.get(tensor.untyped_storage()._cdata)
            if known is None:
                self._add(tensor, kind)
            else:
                size, before, reference = known
                self._known[tensor.untyped_storage()._cdata] = (size, kind, reference)
                self.live[before] -= size
                self.live[kind] += size

    @contextmanager
    def making(self, kind: Kind) -> Iterator[None]:
        """Within it, what is made is of that kind."""
        before, self._kind = self._kind, kind
        try:
            yield
        finally:
            self._kind = before

    def touch(self, num_bytes: int, kind: Kind) -> None:
        """So many bytes more were there for a moment: what an operation is known to use within itself."""
        self._change(kind, num_bytes)
        self._change(kind, -num_bytes)

    def enter(self, phase: Phase) -> None:
        """What is to come belongs to this phase."""
        self._phase = phase
        self._look()

    def forget(self) -> None:
        """From now on the peaks are those of what is to come."""
        self.peaks, self._most = {}, {}
        self._look()

    def _add(self, tensor: Tensor, kind: Kind) -> None:
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        self._known[key] = (size, kind, weakref.ref(storage, partial(self._drop, key)))
        self._change(kind, size)

    def _drop(self, key: int, _: Any) -> None:
        size, kind, _ = self._known.pop(key)
        self._change(kind, -size)

    def _change(self, kind: Kind, size: int) -> None:
        self.live[kind] += size
        self._total += size
        if size > 0:
            self._look()

    def _look(self) -> None:
        if self._total > self._most.get(self._phase, -1):
            self._most[self._phase] = self._total
            self.peaks[self._phase] = dict(self.live)
