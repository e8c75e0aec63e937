"""Record what a GPU would run: each operation of a step on the fake tensors of `fake_gpu`, with its launches and bytes.

What an operation costs is counted from its arguments. It launches one kernel, but for views, allocations and the few of
`_LAUNCHES`; a Triton kernel of ours is what it launches, and a custom operation is what its own code runs. A tensor
counts the bytes that its elements have in memory: an expanded one once, and of a table the rows that are looked up. The
time of an operation is that of its bytes or that of its products, whichever is longer, at the rates of a data sheet: a
roofline, which no kernel reaches.

The least that a step needs is what its matrix products, its attention, its lookups and its update need: each of their
operands and results moves once, however many of them use it, and all that stands between two of them is computed as it
is loaded or stored.
"""

from __future__ import annotations

import functools
import itertools
import math
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from types import FrameType
from typing import Any, Final, NamedTuple

import torch
from torch import Tensor
from torch._library.custom_ops import OPDEFS
from torch.autograd.graph import _engine_run_backward
from torch.utils._pytree import tree_leaves

from sftx.inspection.memory_plan.memory_tracker import MemoryTracker, Phase
from sftx_kernels.triton.launch import Launch

_aten: Final = torch.ops.aten


class Rates(NamedTuple):
    """What a GPU does in a second by its maker's data sheet, without sparsity."""

    name: str
    bf16_flops: float
    fp32_flops: float
    """Without tensor cores, as products of fp32 matrices are computed."""
    bandwidth: float
    """Bytes of its memory."""


H100: Final = Rates("H100 SXM", 989e12, 67e12, 3.35e12)
B200: Final = Rates("B200", 2250e12, 75e12, 8e12)


class Op(NamedTuple):
    """One operation as it is executed. Sizes are in bytes."""

    name: str
    phase: Phase
    site: str
    """The line of code that calls it, or the node of the backward graph."""
    launches: int
    read: int
    written: int
    flops: int = 0
    """Those of products; operations element by element hide behind their bytes."""
    is_wide: bool = False
    """Whether its products are of fp32 matrices."""
    needed: tuple[tuple[int, int, bool], ...] = ()
    """Of what every implementation has to do: each tensor's number, its size, and whether it is a result."""

    @property
    def num_bytes(self) -> int:
        return self.read + self.written

    def seconds(self, rates: Rates) -> float:
        return max(self.num_bytes / rates.bandwidth, self.product_seconds(rates))

    def product_seconds(self, rates: Rates) -> float:
        return self.flops / (rates.fp32_flops if self.is_wide else rates.bf16_flops)


def least(ops: Iterable[Op], rates: Rates) -> tuple[int, float]:
    """Return the least bytes and seconds of what these operations compute (see the top of this module)."""
    seen: set[tuple[int, bool]] = set()
    num_bytes, seconds = 0, 0.0
    for op in ops:
        sizes = {(number, is_result): size for number, size, is_result in op.needed}
        new = sum(size for key, size in sizes.items() if key not in seen)
        seen |= sizes.keys()
        num_bytes += new
        seconds += max(new / rates.bandwidth, op.product_seconds(rates)) if op.needed else 0.0
    return num_bytes, seconds


# --- what operations cost -----------------------------------------------------------------------

_PRODUCTS: Final = {
    _aten.mm: 0, _aten.bmm: 0, _aten._grouped_mm: 0,
    _aten.addmm: 1, _aten.addmm_: 1, _aten.baddbmm: 1, _aten.baddbmm_: 1,
}  # fmt: skip
"""The place of the two matrices among the arguments."""
_ATTENTION: Final = {
    _aten._flash_attention_forward: 4,
    _aten._flash_attention_backward: 10,
    _aten._scaled_dot_product_flash_attention: 4,
    _aten._scaled_dot_product_flash_attention_backward: 10,
    _aten._scaled_dot_product_efficient_attention: 4,
    _aten._scaled_dot_product_efficient_attention_backward: 10,
}
"""The FLOP of a query and a key, for each element of a head: two products, and five in backward."""
_LOOKUPS: Final = {_aten.embedding, _aten.index_select, _aten.gather, _aten.index}
"""These read of their first argument what they return."""
_OVERWRITE: Final = {_aten.copy_, _aten.fill_, _aten.zero_, _aten.normal_, _aten.uniform_, _aten.random_}
"""These do not read what they write to."""
_LIKE: Final = {
    _aten.zeros_like, _aten.ones_like, _aten.full_like, _aten.new_zeros, _aten.new_ones, _aten.new_full,
}  # fmt: skip
"""These take the shape of their argument, and not what is in it."""
_ALLOCATE: Final = {
    _aten.empty, _aten.empty_like, _aten.empty_strided, _aten.new_empty, _aten.new_empty_strided, _aten.set_,
}  # fmt: skip
_ZEROS_AND_COPY: Final = {_aten.select_backward, _aten.slice_backward}
_LAUNCHES: Final = {
    **dict.fromkeys(_ZEROS_AND_COPY, 2),
    # The sums of dO * O, the kernel itself, and its fp32 sum of dQ, rounded.
    _aten._flash_attention_backward: 3,
    _aten._scaled_dot_product_flash_attention_backward: 3,
    _aten._scaled_dot_product_efficient_attention_backward: 2,
    _aten.sort: 4,  # a radix sort of keys and places
    _aten.embedding_dense_backward: 6,  # sorts the ids and adds the rows of each
    _aten.nonzero_static: 3,  # a count, a scan, and the write
    _aten.index_put_: 4,  # sorts the places where it accumulates
}
"""Launches of operations that are more than one kernel, as read in torch 2.13."""
_TENSORS_A_LAUNCH: Final = 30
"""About how many tensors one launch of a foreach or fused operation takes, which has three or four lists of them."""
_WAIT: Final = {
    _aten.nonzero, _aten.masked_select, _aten._unique2, _aten.unique_dim, _aten.unique_consecutive, _aten.equal,
    _aten.is_nonzero, _aten.bincount, _aten.repeat_interleave,
}  # fmt: skip
"""The host cannot go on before the device has computed these."""
_OUTER: Final = 8
"""A product with a smaller inner dimension is an outer one, such as that of positions and frequencies."""


def touched_bytes(tensor: Tensor) -> int:
    """Return the bytes that the elements of a tensor have in memory."""
    if not tensor.numel():
        return 0
    return tensor.itemsize * math.prod(s for s, stride in zip(tensor.shape, tensor.stride(), strict=True) if stride)


def _looped_products(left: Tensor, right: Tensor, ends_E: Tensor) -> Tensor:
    """Return the result of torch's grouped product, of which fake tensors know bf16 alone."""
    groups = ends_E.shape if left.ndim == right.ndim == 2 else ()
    return left.new_empty((*groups, left.shape[-2], right.shape[-1]))


def _factors(packet: Any, args: Sequence[Any], tensors: Sequence[Tensor]) -> Sequence[Tensor]:
    """Return the two matrices of a product, or the queries, keys and values of attention."""
    if packet in _PRODUCTS:
        return list(args[_PRODUCTS[packet] :][:2])
    if packet in _ATTENTION:  # in backward the gradient of the result is the first argument
        return tensors[:3] if _ATTENTION[packet] == 4 else tensors[1:4]
    return ()


def _flops(packet: Any, args: Sequence[Any], factors: Sequence[Tensor]) -> int:
    if packet in _PRODUCTS:
        return 2 * int(factors[0].numel()) * int(factors[1].shape[-1])
    if packet not in _ATTENTION:
        return 0
    query, key, _ = factors
    if query.ndim == 3:  # packed documents, counted as if they were all as long as the longest
        num_keys, is_causal = next(value for value in args if type(value) is int), True
    else:  # with a mask, all scores are computed
        num_keys, is_causal = key.shape[-2], "flash" in packet.__name__
    return _ATTENTION[packet] * query.numel() * num_keys // (2 if is_causal else 1)


@functools.cache
def _is_composite(name: str) -> bool:
    has_kernel = functools.partial(torch._C._dispatch_has_kernel_for_dispatch_key, name)
    return has_kernel("CompositeImplicitAutograd") and not has_kernel("CUDA")


def _launches(packet: Any, args: Sequence[Any]) -> int:
    if packet.__name__.startswith(("_foreach_", "_fused_")):
        return -(-max(len(value) for value in args if isinstance(value, list | tuple)) // _TENSORS_A_LAUNCH)
    return _LAUNCHES.get(packet, 1)


def _results(func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> list[Tensor]:
    """Return the arguments that an operation writes to."""
    if not func._schema.is_mutable:
        return []
    places = enumerate(func._schema.arguments)
    if func.overloadpacket.__name__.startswith("_fused_"):  # gradients are written to only where a loss is scaled
        places = ((place, argument) for place, argument in places if argument.name != "grads")
    written = [
        args[place] if place < len(args) else kwargs.get(argument.name)
        for place, argument in places
        if argument.alias_info is not None and argument.alias_info.is_write
    ]
    return _tensors(written)


def _tensors(values: Any) -> list[Tensor]:
    return [value for value in tree_leaves(values) if isinstance(value, Tensor)]


# --- the recorder -------------------------------------------------------------------------------


class StepRecord(MemoryTracker):
    """While active, records every operation on the fake GPU, and its memory by kind as `sftx plan` counts it."""

    def __init__(self, dtype: torch.dtype = torch.bfloat16) -> None:
        """`dtype`: that of the run's matrix products."""
        super().__init__()
        self.dtype = dtype
        self.ops: list[Op] = []
        self.waits: list[str] = []
        """What the host waits for, and where, in order."""
        self.faults: list[str] = []
        """Computation on the host, products wider than `dtype`, and wider copies of weights, each with its place."""
        self._numbers: dict[int, int] = {}
        """A number of each storage by its address, which a later storage may have again."""
        self._counter = itertools.count()
        self._filled: set[int] = set()
        """The storages that something was written to, by number."""
        self._pinned: set[int] = set()
        """Those in pinned memory of the host."""
        self._tolist: FrameType | None = None

    @classmethod
    def is_infra_mode(cls) -> bool:
        return True  # the compiler refuses other modes

    def reset(self) -> None:
        """Forget what was recorded, and keep what is allocated."""
        self.ops, self.waits, self.faults = [], [], []
        self.reset_peaks()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is torch.ops.prim.device.default:
            # For the autograd engine tensors are on `meta`, for which it needs no stream of an accelerator.
            return torch.device("meta") if _is_engine(sys._getframe(1)) else func(*args)
        packet = func.overloadpacket
        if (custom := OPDEFS.get(f"{func.namespace}::{packet.__name__}")) is not None:
            with self:
                return custom._init_fn(*args, **kwargs)
        if _is_composite(func.name()):  # inside of a custom operation, autograd has not taken it apart
            with self:
                return func.decompose(*args, **kwargs)
        tensors = _tensors((args, kwargs))
        if packet is _aten._local_scalar_dense:
            return self._value(tensors[0])
        if packet is _aten.is_pinned:
            return self._number(tensors[0]) in self._pinned
        if packet is _aten._pin_memory:
            out = torch.empty_like(tensors[0])
            self._pinned.add(self._number(out))
            return out
        mask = self._check_waits(packet, args, tensors)
        if packet is _aten.index and mask is not None:  # as if the mask selected everything
            out = args[0].new_empty((mask.numel(), *args[0].shape[mask.ndim :]))
        elif packet is _aten.nonzero and tensors[0].is_cuda:  # as if nothing was zero
            out = tensors[0].new_empty((tensors[0].numel(), tensors[0].ndim), dtype=torch.int64)
        elif packet is _aten._grouped_mm and args[0].dtype != torch.bfloat16:
            self.waits.append(f"torch's loop over the groups, for it has no kernel for {args[0].dtype}: {_site()}")
            out = _looped_products(*args[:3])
        else:
            out = func(*args, **kwargs)
        self.track_outputs(out)
        if packet not in _ALLOCATE:
            self._record(func, args, kwargs, tensors, _tensors(out))
        return out

    def on_launch(self, launched: Launch) -> None:
        """Record the launch of a Triton kernel, with what its arguments have in memory."""
        if not launched.grid:
            return
        needed: list[tuple[int, int, bool]] = []
        seen: set[int] = set()
        for tensor in _tensors(list(launched.arguments.values())):
            number = self._number(tensor)
            # What nothing was written to yet is a result; what is passed a second time is overwritten.
            needed.append((number, touched_bytes(tensor), number not in self._filled or number in seen))
            seen.add(number)
            if tensor.device.type != "cuda":
                self.faults.append(f"{launched.kernel.__name__} gets a tensor on {tensor.device}: {_site()}")
        self._filled |= seen
        self._add_op(
            launched.kernel.__name__, 1, needed, launched.work.flops if launched.uses_dot else 0,
            is_needed=launched.uses_dot,
        )  # fmt: skip

    # --- one operation --------------------------------------------------------------------------

    def _record(
        self, func: Any, args: Sequence[Any], kwargs: Mapping[str, Any], tensors: list[Tensor], outputs: list[Tensor]
    ) -> None:
        packet, known = func.overloadpacket, {self._number(tensor) for tensor in tensors}
        mutated = _results(func, args, kwargs)
        results = mutated or [tensor for tensor in outputs if self._number(tensor) not in known]
        if not results:
            return  # a view
        self._filled |= {self._number(tensor) for tensor in results}
        if all(tensor.device.type == "cpu" for tensor in (*tensors, *outputs)):
            if any(tensor.numel() > 1 for tensor in results):
                self.faults.append(f"{func} computes on the host: {_site()}")
            return
        if packet in (_aten._to_copy, _aten.copy_):
            self._check_copy(args, kwargs, results[0])
        first = 1 if packet in _OVERWRITE or packet in _LIKE else 0
        is_read = _tensors((args[first:], {name: value for name, value in kwargs.items() if name != "out"}))
        sizes = [(self._number(t), touched_bytes(t), False) for t in is_read if t.device.type == "cuda"]
        if packet in _LOOKUPS:
            sizes[0] = (sizes[0][0], sum(map(touched_bytes, outputs)), False)
        sizes += [(self._number(t), touched_bytes(t), True) for t in results]
        if packet in _ZEROS_AND_COPY:
            sizes.append((*sizes[0][:2], True))
        factors = _factors(packet, args, tensors)
        flops = _flops(packet, args, factors)
        is_wide = any(factor.dtype == torch.float32 for factor in factors)
        is_outer = packet in _PRODUCTS and factors[0].shape[-1] < _OUTER
        if is_wide and not is_outer and self.dtype != torch.float32:
            self.faults.append(f"{func} multiplies in fp32: {_site()}")
        is_needed = bool(flops) or packet is _aten.embedding or packet.__name__.startswith("_fused_adamw")
        name = str(func).removeprefix("aten.").removesuffix(".default")
        self._add_op(name, _launches(packet, args), sizes, flops, is_wide=is_wide, is_needed=is_needed)

    def _add_op(
        self, name: str, launches: int, sizes: Sequence[tuple[int, int, bool]], flops: int, *, is_wide: bool = False,
        is_needed: bool,
    ) -> None:  # fmt: skip
        read, written = (sum(size for _, size, is_result in sizes if is_result is which) for which in (False, True))
        updated = {number for number, _, is_result in sizes if is_result}  # what is added to a result belongs to it
        needed = tuple(one for one in sizes if one[2] or one[0] not in updated) if is_needed else ()
        self.ops.append(Op(name, self._phase, _site(), launches, read, written, flops, is_wide, needed))

    # --- what must not happen -------------------------------------------------------------------

    def _value(self, tensor: Tensor) -> bool | float | int:
        """Return a value in place of the one that is not known; on the GPU the host waits for it."""
        # `tolist` of a fake tensor asks for one value after the other, that of a real one for all at once.
        frame: FrameType | None = sys._getframe(2)
        while frame is not None and frame.f_code.co_name != "tolist":
            frame = frame.f_back
        if tensor.device.type == "cuda" and (frame is None or frame is not self._tolist):
            self.waits.append(f"the value of a tensor: {_site()}")
        self._tolist = frame
        if tensor.dtype == torch.bool:  # as if no check had found anything
            return False
        return 1.0 if tensor.is_floating_point() else 1

    def _check_waits(self, packet: Any, args: Sequence[Any], tensors: Sequence[Tensor]) -> Tensor | None:
        """Record that the host waits for the values of a tensor on the GPU; return a mask that selects elements."""
        if not any(tensor.device.type == "cuda" for tensor in tensors):
            return None
        if packet in _WAIT:
            self.waits.append(f"{packet.__name__}, which depends on values: {_site()}")
        indices = args[1] if packet in (_aten.index, _aten.index_put, _aten.index_put_) else ()
        mask = next((i for i in indices if isinstance(i, Tensor) and i.dtype == torch.bool), None)
        if mask is not None:
            self.waits.append(f"the number of elements that a mask selects: {_site()}")
        return mask

    def _check_copy(self, args: Sequence[Any], kwargs: Mapping[str, Any], target: Tensor) -> None:
        source = args[1] if args[0] is target else args[0]
        is_async = bool(kwargs.get("non_blocking") or (args[0] is target and args[2:] and args[2]))
        if target.device.type == "cpu":
            self.waits.append(f"a copy to the host: {_site()}")
        elif source.device.type == "cpu" and not (is_async and self._number(source) in self._pinned):
            self.waits.append(f"a copy of memory of the host that is not pinned: {_site()}")
        kind = self._storages[source.untyped_storage()._cdata][1]
        if kind == "weights" and source.ndim > 1 and source.is_floating_point() and target.itemsize > source.itemsize:
            shape, dtype = list(source.shape), str(target.dtype).removeprefix("torch.")
            self.faults.append(f"a weight of shape {shape} is copied to {dtype}: {_site()}")

    # --- storages -------------------------------------------------------------------------------

    def size_of(self, tensor: Tensor) -> int:
        return super().size_of(tensor) if tensor.device.type == "cuda" else 0  # the host's memory is not the GPU's

    def _number(self, tensor: Tensor) -> int:
        key = tensor.untyped_storage()._cdata
        if key not in self._storages:
            self._add(tensor, self._kind)
            self._filled.add(self._numbers[key])  # it is from before
        return self._numbers[key]

    def _add(self, tensor: Tensor, kind: Any) -> None:
        super()._add(tensor, kind)
        self._numbers[tensor.untyped_storage()._cdata] = next(self._counter)

    def _remove(self, key: int, reference: Any) -> None:
        super()._remove(key, reference)
        del self._numbers[key]


# --- where an operation comes from --------------------------------------------------------------

_ROOT: Final = Path(__file__).resolve().parents[2]
_TORCH: Final = str(Path(torch.__file__).parent)
_OURSELVES: Final = (__file__, str(Path(__file__).with_name("fake_gpu.py")))


def _frames(frame: FrameType | None) -> Iterator[FrameType]:
    while frame is not None:
        yield frame
        frame = frame.f_back


def _is_engine(caller: FrameType) -> bool:
    """Return whether the autograd engine itself calls, and no Python code that it runs."""
    wrappers = ("_compile.py", "eval_frame.py")  # of every __torch_dispatch__
    own = next(frame for frame in _frames(caller) if not frame.f_code.co_filename.endswith(wrappers))
    return own.f_code is _engine_run_backward.__code__


def _site() -> str:
    for frame in _frames(sys._getframe(1)):
        path = frame.f_code.co_filename
        if frame.f_code is _engine_run_backward.__code__:
            return _node_name()
        if path not in _OURSELVES and not path.startswith(_TORCH) and "unittest" not in path:
            return f"{path.removeprefix(f'{_ROOT}/').rpartition('site-packages/')[2]}:{frame.f_lineno}"
    return ""


def _node_name() -> str:
    node = torch._C._current_autograd_node()
    return "" if node is None else str(node.name())
