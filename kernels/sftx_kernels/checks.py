"""These are the argument checks that several operations share, and the dtype that autocast gives their products.

Every rejected argument raises a ValueError with the argument's name, what was expected and what was passed.
"""

import functools
import math
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, cast

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

# Evaluated once at import: torch.compile of torch 2.11 cannot trace is_autocast_available.
_AUTOCAST_DEVICES = tuple(k for k in ("cpu", "cuda", "xpu", "mps", "hpu", "mtia") if torch.amp.is_autocast_available(k))


def is_autocast_on(device_type: str) -> bool:
    """Return True if autocast is enabled for a device type; False for types without autocast, such as meta."""
    return device_type in _AUTOCAST_DEVICES and torch.is_autocast_enabled(device_type)


def without_autocast(device_type: str) -> AbstractContextManager[Any]:
    """Disable autocast: an operation has chosen its dtypes already, and autocast would cast fp32 operands."""
    return torch.autocast(device_type, enabled=False) if is_autocast_on(device_type) else nullcontext()


def gemm_dtype(x: Tensor) -> torch.dtype:
    """Return autocast's dtype where autocast applies (never to fp64, as in torch), else the tensor's own dtype."""
    if x.dtype != torch.float64 and is_autocast_on(x.device.type):
        return torch.get_autocast_dtype(x.device.type)
    return x.dtype


def error(argument: str, expected: object, actual: object) -> ValueError:
    return ValueError(f"{argument}: expected {expected}, got {actual}")


def check_tensor(
    name: str, tensor: Tensor, shape: tuple[int | str, ...], like: Tensor, dtype: torch.dtype | None
) -> None:
    """Check shape (a str matches any size), device (that of `like`) and dtype (None matches any floating dtype).

    A floating dtype may differ from `dtype` under autocast, which casts it, unless one of the two is fp64.
    """
    sizes = tensor.shape
    if len(sizes) != len(shape):
        raise error(name, f"shape [{', '.join(map(str, shape))}]", f"shape {list(sizes)}")
    for expected, size in zip(shape, sizes, strict=True):  # a loop, not a generator: it runs for every tensor of a call
        if expected != size and not isinstance(expected, str):
            raise error(name, f"shape [{', '.join(map(str, shape))}]", f"shape {list(sizes)}")
    if tensor.device != like.device:
        raise error(name, f"device {like.device}", f"device {tensor.device}")
    if dtype is None:
        if not tensor.is_floating_point():
            raise error(name, "a floating dtype", tensor.dtype)
    elif tensor.dtype != dtype:
        can_cast = all(d.is_floating_point and d != torch.float64 for d in (tensor.dtype, dtype))
        if not (can_cast and is_autocast_on(like.device.type)):
            raise error(name, f"dtype {dtype}", f"dtype {tensor.dtype}")


def check_dropout(dropout_p: object, seed: object) -> None:
    """Check a dropout probability and the seed that it needs."""
    if not (is_number(dropout_p) and 0 <= cast(float, dropout_p) < 1):
        raise error("dropout_p", "a number in [0, 1)", dropout_p)
    if dropout_p and (not isinstance(seed, Tensor) or seed.dim() or seed.dtype != torch.int64):
        actual = f"{seed.dtype} of shape {list(seed.shape)}" if isinstance(seed, Tensor) else repr(seed)
        raise error("seed", f"a 0-d int64 tensor, since dropout_p is {dropout_p}", actual)


def is_number(value: object) -> bool:
    # The compiler may take a float for a symbol, of which it cannot ask this.
    return isinstance(value, int | float) and (torch.compiler.is_compiling() or math.isfinite(value))


def check_count(name: str, value: object, low: int, high: float = math.inf) -> None:
    """Accept None, and an int from `low` to `high`."""
    if value is not None and not (isinstance(value, int) and low <= value <= high):
        raise error(name, f"a count >= {low}" if high == math.inf else f"a count in [{low}, {high}]", repr(value))


def differentiable_once(backward: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap a backward so that it raises RuntimeError under create_graph=True.

    `once_differentiable` alone reports a second derivative only through the upstream gradient; the graph of such a
    gradient would silently lack what passes through the inputs.
    """
    without_graph = once_differentiable(backward)

    @functools.wraps(backward)
    def checked(ctx: Any, *grads: Any) -> Any:
        if torch.is_grad_enabled():
            raise RuntimeError("this operation is differentiable once; create_graph=True asks for a second derivative")
        return without_graph(ctx, *grads)

    return checked
