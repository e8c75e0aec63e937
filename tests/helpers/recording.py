"""What an operation makes: its matrix products, its tensors, and the memory that it holds at once."""

from typing import Any

import torch
from torch import Tensor
from torch._library.custom_ops import OPDEFS
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode


class Recorder(TorchDispatchMode):
    """What reaches the device: operands of the matrix products, and the size of every tensor that is made."""

    def __init__(self) -> None:
        super().__init__()
        self.products: list[tuple[tuple[int, ...], tuple[int, ...]]] = []
        self.dtypes: set[torch.dtype] = set()
        self.casts: list[tuple[int, ...]] = []
        self.made: list[tuple[int, ...]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        if name in ("mm", "addmm", "addmm_"):
            left, right = args[-2:]
            self.products.append((tuple(left.shape), tuple(right.shape)))
            self.dtypes |= {left.dtype, right.dtype}
        kwargs = kwargs or {}
        if func.namespace == "sftx":
            with self:  # look into our own operations, also those on meta tensors
                return OPDEFS[func.name().partition(".")[0]]._init_fn(*args, **kwargs)
        out = func(*args, **kwargs)
        if name in ("to", "_to_copy") and out is not args[0]:
            self.casts.append(tuple(out.shape))
        inputs = {arg.untyped_storage()._cdata for arg in (*args, *kwargs.values()) if isinstance(arg, Tensor)}
        if isinstance(out, Tensor) and out.untyped_storage()._cdata not in inputs:
            self.made.append(tuple(out.shape))
        return out


def peak_bytes(function: Any) -> int:
    """The most that the CPU allocator held at once, on top of what it held before."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=True) as result:
        function()
    events = [event for event in result.profiler.kineto_results.events() if event.name() == "[memory]"]
    held = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    assert peak > 0
    return peak
