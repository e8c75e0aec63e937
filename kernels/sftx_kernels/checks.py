"""What the public functions of sftx_kernels refuse, and the dtype that autocast gives their products.

Every refusal is a ValueError that names the argument, what was expected and what was got.
"""

import functools
import math
import os
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

# Asked once: torch.compile of torch 2.11 cannot look into the question.
_AUTOCAST_KINDS = tuple(k for k in ("cpu", "cuda", "xpu", "mps", "hpu", "mtia") if torch.amp.is_autocast_available(k))


def autocasts(kind: str) -> bool:
    """Whether autocast is on for a kind of device; False for those without it, such as meta."""
    return kind in _AUTOCAST_KINDS and torch.is_autocast_enabled(kind)


def gemm_dtype(x: Tensor) -> torch.dtype:
    """Autocast's dtype where it applies (never to fp64, as in torch), else the tensor's own."""
    if x.dtype != torch.float64 and autocasts(x.device.type):
        return torch.get_autocast_dtype(x.device.type)
    return x.dtype


def error(argument: str, expected: object, got: object) -> ValueError:
    return ValueError(f"{argument}: expected {expected}, got {got}")


def check_tensor(
    name: str, tensor: Tensor, shape: tuple[int | str, ...], like: Tensor, dtype: torch.dtype | None
) -> None:
    """Refuses another shape (a str stands for any size), device or dtype (None: any floating one).

    A floating dtype may differ where autocast will cast it, which it never does from or to fp64.
    """
    sizes = tensor.shape
    if len(sizes) != len(shape):
        raise error(name, f"shape [{', '.join(map(str, shape))}]", f"shape {list(sizes)}")
    for wanted, size in zip(shape, sizes, strict=True):  # no generators here: this runs for every tensor of a call
        if wanted != size and not isinstance(wanted, str):
            raise error(name, f"shape [{', '.join(map(str, shape))}]", f"shape {list(sizes)}")
    if tensor.device != like.device:
        raise error(name, f"device {like.device}", f"device {tensor.device}")
    if dtype is None:
        if not tensor.is_floating_point():
            raise error(name, "a floating dtype", tensor.dtype)
    elif tensor.dtype != dtype:
        narrow = all(d.is_floating_point and d != torch.float64 for d in (tensor.dtype, dtype))
        if not (narrow and autocasts(like.device.type)):
            raise error(name, f"dtype {dtype}", f"dtype {tensor.dtype}")


def check_token_weights(token_weights_N: Tensor | None, num_rows: int, like: Tensor) -> None:
    if token_weights_N is not None:
        check_tensor("token_weights_N", token_weights_N, (num_rows,), like, None)
        if token_weights_N.requires_grad:
            raise error("token_weights_N", "requires_grad=False", "requires_grad=True")


def check_head(
    hidden_ND: Tensor, weight_VD: Tensor, labels_N: Tensor, bias_V: Tensor | None, token_weights_N: Tensor | None
) -> None:
    check_tensor("hidden_ND", hidden_ND, ("N", "D"), hidden_ND, None)
    (N, D), V, dtype = hidden_ND.shape, weight_VD.shape[0] if weight_VD.dim() else 0, hidden_ND.dtype
    check_tensor("weight_VD", weight_VD, ("V", D), hidden_ND, dtype)
    if V == 0:
        raise error("weight_VD", "at least one row", f"shape {list(weight_VD.shape)}")
    check_tensor("labels_N", labels_N, (N,), hidden_ND, torch.int64)
    if bias_V is not None:
        check_tensor("bias_V", bias_V, (V,), hidden_ND, dtype)
    check_token_weights(token_weights_N, N, hidden_ND)


def is_number(value: object) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)


def check_count(name: str, value: object, low: int, high: float = math.inf) -> None:
    """Refuses what is neither None nor an int from low to high."""
    if value is not None and not (isinstance(value, int) and low <= value <= high):
        raise error(name, f"a count >= {low}" if high == math.inf else f"a count in [{low}, {high}]", repr(value))


def check_loss_options(
    label_smoothing: float, z_loss: float, softcap: float | None, logit_scale: float, ignore_index: int, reduction: str
) -> None:
    if not (is_number(label_smoothing) and 0 <= label_smoothing < 1):
        raise error("label_smoothing", "a number in [0, 1)", label_smoothing)
    if not (is_number(z_loss) and z_loss >= 0):
        raise error("z_loss", "a number >= 0", z_loss)
    if softcap is not None and not (is_number(softcap) and softcap > 0):
        raise error("softcap", "None or a number > 0", softcap)
    if not is_number(logit_scale):
        raise error("logit_scale", "a finite number", logit_scale)
    if not isinstance(ignore_index, int):
        raise error("ignore_index", "an int", repr(ignore_index))
    if reduction not in ("sum", "none"):
        raise error("reduction", "'sum' or 'none'", repr(reduction))


def check_labels(labels_N: Tensor, ignore_index: int, num_classes: int) -> None:
    """Refuses a label outside [0, num_classes) by name; on an accelerator only if SFTX_CHECK_LABELS=1, for it syncs."""
    if not (labels_N.is_cpu or os.environ.get("SFTX_CHECK_LABELS") == "1"):
        return
    wrong_N = (labels_N != ignore_index) & ((labels_N < 0) | (labels_N >= num_classes))
    if wrong_N.any():
        row = int(wrong_N.nonzero()[0])
        raise error("labels_N", f"{ignore_index} or in [0, {num_classes})", f"{int(labels_N[row])} at row {row}")


def check_lora(
    x: Tensor,
    weight: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    bias: Tensor | None,
    dropout_p: float,
    seed: Tensor | None,
) -> None:
    check_tensor("x", x, (*["..."] * (x.dim() - 1), "K"), x, None)
    K = x.shape[-1]
    if K == 0:
        raise error("x", "at least one column", f"shape {list(x.shape)}")
    check_tensor("weight", weight, ("O", K), x, x.dtype)
    check_tensor("lora_A", lora_A, ("R", K), x, None)
    check_tensor("lora_B", lora_B, (weight.shape[0], lora_A.shape[0]), x, lora_A.dtype)
    if lora_A.shape[0] == 0:
        raise error("lora_A", "at least one row", f"shape {list(lora_A.shape)}")
    if bias is not None:
        check_tensor("bias", bias, (weight.shape[0],), x, x.dtype)
    if not (is_number(dropout_p) and 0 <= dropout_p < 1):
        raise error("dropout_p", "a number in [0, 1)", dropout_p)
    if dropout_p > 0 and (not isinstance(seed, Tensor) or seed.dim() or seed.dtype != torch.int64):
        got = f"{seed.dtype} of shape {list(seed.shape)}" if isinstance(seed, Tensor) else repr(seed)
        raise error("seed", f"a 0-d int64 tensor, since dropout_p is {dropout_p}", got)


def differentiable_once(backward: Callable[..., Any]) -> Callable[..., Any]:
    """`once_differentiable`, which notices a second derivative by the upstream gradient alone: here asking for the
    graph of a gradient (create_graph=True) is refused, for it would lack what passes through the inputs."""
    without_graph = once_differentiable(backward)

    @functools.wraps(backward)
    def checked(ctx: Any, *grads: Any) -> Any:
        if torch.is_grad_enabled():
            raise RuntimeError("this operation is differentiable once; create_graph=True asks for a second derivative")
        return without_graph(ctx, *grads)

    return checked
