"""Attention within the documents of a packed row, as operations for torch: per document on CPU, by a kernel on a GPU.

On CPU aten's flash attention is called document by document, inside an operation that torch knows as a whole: reading
the borders in a plain function would break every compiled graph.

Dimensions: T tokens, H query heads, K key and value heads (H a multiple of K), D head dimension. Borders are
`cu_seqlens`, int32 [documents + 1]. A window is how many tokens one sees, itself included.
"""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Callable, Iterator
from typing import Any, Final, cast

import torch
from torch import Tensor
from torch.nn.attention.varlen import varlen_attn

# The first versions of the kernel for a GPU take a key for each query head; asked here, not inside a compiled graph.
_GROUPED: Final = "enable_gqa" in inspect.signature(varlen_attn).parameters

_flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_flash_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


def attend(
    query_THD: Tensor,
    key_TKD: Tensor,
    value_TKD: Tensor,
    borders: Tensor,
    max_length: int,
    *,
    scale: float,
    window: int | None = None,
) -> Tensor:
    """Causal attention within each document; [T, H, D] in the dtype of `value_TKD`, fp32 or bf16 on CPU."""
    # Under autocast the rotation of queries and keys leaves them in fp32; torch's own attention would cast them too.
    query_THD, key_TKD = query_THD.to(value_TKD.dtype), key_TKD.to(value_TKD.dtype)
    if query_THD.is_cuda:
        return attend_on_gpu(query_THD, key_TKD, value_TKD, borders, max_length, scale=scale, window=window)
    out_THD: Tensor = attend_on_cpu(query_THD, key_TKD, value_TKD, borders, scale, window)[0]
    return out_THD


# --- CPU ----------------------------------------------------------------------------------------


@torch.library.custom_op("sftx::document_attention", mutates_args=(), device_types="cpu")
def attend_on_cpu(
    query_THD: Tensor, key_TKD: Tensor, value_TKD: Tensor, borders: Tensor, scale: float, window: int | None
) -> tuple[Tensor, Tensor]:
    """The attention, [T, H, D], and the logarithm of each softmax's denominator, fp32 [H, T]."""
    out_THD = query_THD.new_empty(query_THD.shape)
    lse_HT = query_THD.new_empty(query_THD.shape[1], query_THD.shape[0], dtype=torch.float32)
    groups = _groups(query_THD, key_TKD)
    query, key, value, out = groups(query_THD), groups(key_TKD), groups(value_TKD), groups(out_THD)
    lse = lse_HT.unflatten(0, query.shape[:2])
    for at, is_causal, mask in _documents(borders, window, query.dtype):
        out[:, :, at], lse[:, :, at] = _flash(
            query[:, :, at], key[:, :, at], value[:, :, at], 0.0, is_causal, attn_mask=mask, scale=scale
        )
    return out_THD, lse_HT


@attend_on_cpu.register_fake
def _(
    query_THD: Tensor, key_TKD: Tensor, value_TKD: Tensor, borders: Tensor, scale: float, window: int | None
) -> tuple[Tensor, Tensor]:
    lse_HT = query_THD.new_empty(query_THD.shape[1], query_THD.shape[0], dtype=torch.float32)
    return query_THD.new_empty(query_THD.shape), lse_HT


@torch.library.custom_op("sftx::document_attention_backward", mutates_args=(), device_types="cpu")
def attend_on_cpu_backward(
    grad_THD: Tensor,
    query_THD: Tensor,
    key_TKD: Tensor,
    value_TKD: Tensor,
    out_THD: Tensor,
    lse_HT: Tensor,
    borders: Tensor,
    scale: float,
    window: int | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of query, key and value, in their shapes and dtype."""
    dtype = query_THD.dtype
    # In fp32 whatever the dtype: aten's backward in bf16 takes 3.5 times as long (95 ms against 27 for 1,800 tokens
    # in 7 documents, 9 heads of 64), and is the less exact one.
    groups = _groups(query_THD, key_TKD)
    grad, query, key, value, out = (groups(x.float()) for x in (grad_THD, query_THD, key_TKD, value_TKD, out_THD))
    lse = lse_HT.unflatten(0, query.shape[:2])
    grads = [torch.empty(x.shape, dtype=torch.float32) for x in (query_THD, key_TKD, value_TKD)]
    grad_query = groups(grads[0])
    grad_key, grad_value = (x.transpose(0, 1) for x in grads[1:])
    for at, is_causal, mask in _documents(borders, window, torch.float32):
        inputs = [x[:, :, at] for x in (grad, query, key, value, out, lse)]
        grad_query[:, :, at], for_key, for_value = _flash_backward(*inputs, 0.0, is_causal, attn_mask=mask, scale=scale)
        grad_key[:, at], grad_value[:, at] = for_key.sum(1), for_value.sum(1)
    query_grad, key_grad, value_grad = (x.to(dtype) for x in grads)
    return query_grad, key_grad, value_grad


@attend_on_cpu_backward.register_fake
def _(
    grad_THD: Tensor,
    query_THD: Tensor,
    key_TKD: Tensor,
    value_TKD: Tensor,
    out_THD: Tensor,
    lse_HT: Tensor,
    borders: Tensor,
    scale: float,
    window: int | None,
) -> tuple[Tensor, Tensor, Tensor]:
    query_grad, key_grad, value_grad = (x.new_empty(x.shape) for x in (query_THD, key_TKD, value_TKD))
    return query_grad, key_grad, value_grad


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    query_THD, key_TKD, value_TKD, borders, ctx.scale, ctx.window = inputs
    ctx.save_for_backward(query_THD, key_TKD, value_TKD, *output, borders)
    ctx.mark_non_differentiable(output[1])


def _backward(ctx: Any, grad_THD: Tensor, _: Tensor | None) -> tuple[Tensor | None, ...]:
    grads = attend_on_cpu_backward(grad_THD, *ctx.saved_tensors, ctx.scale, ctx.window)
    return *grads, None, None, None


attend_on_cpu.register_autograd(_backward, setup_context=_keep)


def _groups(query_THD: Tensor, key_TKD: Tensor) -> Callable[[Tensor], Tensor]:
    """A view of any of these tensors as [K, H/K, T, D]: aten takes the heads of a group from strides, without a copy.

    Keys and values are expanded over the group.
    """
    num_groups, size = key_TKD.shape[1], query_THD.shape[1] // key_TKD.shape[1]

    def view(x: Tensor) -> Tensor:
        each = x.shape[1] // num_groups
        grouped: Tensor = x.unflatten(1, (num_groups, each)).permute(1, 2, 0, 3)
        return grouped.expand(-1, size, -1, -1)

    return view


def _documents(borders: Tensor, window: int | None, dtype: torch.dtype) -> Iterator[tuple[slice, bool, Tensor | None]]:
    """Where each document stands, whether plain causal attention is right for it, and else its mask."""
    for start, end in itertools.pairwise(borders.tolist()):
        length = end - start
        if length == 0:
            continue
        if window is None or length <= window:
            yield slice(start, end), True, None
        else:
            seen = torch.ones(length, length, dtype=torch.bool).tril().triu(1 - window)
            yield slice(start, end), False, torch.zeros(length, length, dtype=dtype).masked_fill(~seen, -torch.inf)


# --- GPU ----------------------------------------------------------------------------------------


def why_not(device: torch.device, dtype: torch.dtype, head_dim: int) -> str | None:
    """Why attention within documents cannot be had for such tensors; None when it can."""
    if device.type == "cpu":
        return None
    if device.type != "cuda":
        return f"there is none for the device {device.type}"
    if dtype not in (torch.bfloat16, torch.float16):
        return f"on a GPU it computes in bf16 and fp16, not in {str(dtype).removeprefix('torch.')}"
    if head_dim > 256 or head_dim % 8:
        return f"on a GPU it takes heads of up to 256 numbers in steps of 8, and these have {head_dim}"
    if torch.version.hip is None and torch.cuda.get_device_capability(device) < (8, 0):
        return "it needs a GPU of compute capability 8.0"
    return None


def attend_on_gpu(
    query_THD: Tensor,
    key_TKD: Tensor,
    value_TKD: Tensor,
    borders: Tensor,
    max_length: int,
    *,
    scale: float,
    window: int | None,
) -> Tensor:
    """The same by torch's kernel, in bf16 or fp16."""
    # It counts the tokens before one's own, and those after it: none.
    options: dict[str, Any] = {"scale": scale, "window_size": (-1 if window is None else window - 1, 0)}
    if query_THD.shape[1] != key_TKD.shape[1]:
        if _GROUPED:
            options["enable_gqa"] = True
        else:
            size = query_THD.shape[1] // key_TKD.shape[1]
            key_TKD, value_TKD = key_TKD.repeat_interleave(size, 1), value_TKD.repeat_interleave(size, 1)
    out = varlen_attn(query_THD, key_TKD, value_TKD, borders, borders, max_length, max_length, **options)
    return cast(Tensor, out)
