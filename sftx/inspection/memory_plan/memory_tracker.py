"""Count the bytes of all tensor storages by what they are for, and keep the peak of each phase of a step.

A storage counts once, from the operation that allocates it until its last reference is gone: that is what an allocator
has to provide, without fragmentation. Temporaries inside torch's own operations are not seen.

torch.distributed._tools.MemTracker is not used: it is private, and has no way to add the temporaries inside a custom
operation, such as the chunk of logits of the head's loss.
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

MemorySnapshot: TypeAlias = dict[Kind, int]
"""Allocated bytes by kind at one moment, usually that of a peak."""


class Phase(NamedTuple):
    """A part of a step whose peak is kept separately."""

    name: Literal["start", "forward", "head", "backward"]
    model_call: int = 0
    """The number of the forward pass through the model, when a loss makes several."""
    layer: int = 0


class MemoryTracker(TorchDispatchMode):
    """While active, counts every storage that an operation allocates, as the kind that `allocating` sets."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.current: MemorySnapshot = dict.fromkeys(KINDS, 0)
        """Bytes that are allocated now."""
        self.peaks: dict[Phase, MemorySnapshot] = {}
        """The snapshot with the largest total in each phase, since the last `reset_peaks`."""
        self._kind: Kind = "activations"
        self._phase = Phase("start")
        self._total = 0
        self._peak_totals: dict[Phase, int] = {}
        self._storages: dict[int, tuple[int, Kind, weakref.ref[Any]]] = {}
        """Size, kind and reference of each storage, by its address."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        self.track_outputs(out)
        return out

    @property
    def peak(self) -> MemorySnapshot:
        """The snapshot with the largest total of all phases."""
        return max(self.peaks.values(), key=lambda snapshot: sum(snapshot.values()))

    def track_outputs(self, out: Any) -> None:
        """Count the storages among an operation's outputs that are new."""
        for value in (out,) if isinstance(out, Tensor) else tree_leaves(out):
            if isinstance(value, Tensor) and value.untyped_storage()._cdata not in self._storages:
                self._add(value, self._kind)

    def track(self, tensors: Iterable[Tensor], kind: Kind) -> None:
        """Count these tensors as `kind` from now on, also if they were counted as another kind before."""
        for tensor in tensors:
            key = tensor.untyped_storage()._cdata
            if key not in self._storages:
                self._add(tensor, kind)
                continue
            size, old_kind, reference = self._storages[key]
            self._storages[key] = (size, kind, reference)
            self.current[old_kind] -= size
            self.current[kind] += size

    @contextmanager
    def allocating(self, kind: Kind) -> Iterator[None]:
        """Count storages that are allocated within this context as `kind`."""
        before, self._kind = self._kind, kind
        try:
            yield
        finally:
            self._kind = before

    def add_transient(self, num_bytes: int, kind: Kind) -> None:
        """Count an allocation that exists only inside an operation: it raises the peak and is freed at once."""
        self._change(kind, num_bytes)
        self._change(kind, -num_bytes)

    def enter_phase(self, phase: Phase) -> None:
        self._phase = phase
        self._update_peak()

    def reset_peaks(self) -> None:
        self.peaks, self._peak_totals = {}, {}
        self._update_peak()

    def size_of(self, tensor: Tensor) -> int:
        """Return the bytes that a tensor's storage counts for."""
        return tensor.untyped_storage().nbytes()

    def _add(self, tensor: Tensor, kind: Kind) -> None:
        storage = tensor.untyped_storage()
        key, size = storage._cdata, self.size_of(tensor)
        self._storages[key] = (size, kind, weakref.ref(storage, partial(self._remove, key)))
        self._change(kind, size)

    def _remove(self, key: int, _: Any) -> None:
        size, kind, _ = self._storages.pop(key)
        self._change(kind, -size)

    def _change(self, kind: Kind, size: int) -> None:
        self.current[kind] += size
        self._total += size
        if size > 0:
            self._update_peak()

    def _update_peak(self) -> None:
        if self._total > self._peak_totals.get(self._phase, -1):
            self._peak_totals[self._phase] = self._total
            self.peaks[self._phase] = dict(self.current)
