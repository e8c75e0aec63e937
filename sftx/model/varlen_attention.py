"""Causal attention within the documents of a packed row: one document at a time on a CPU, by torch's kernel on a GPU.

On a CPU aten's flash attention is called for each document, inside a custom operation of torch: reading `cu_seqlens` in
a plain function would break every compiled graph.

Dimensions: T tokens, H query heads, K key and value heads (H a multiple of K), D head dimension. `cu_seqlens` is int32,
[documents + 1]. A window is the number of tokens that a token attends to, itself included.
"""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Callable, Iterator
from typing import Any, Final, cast

import torch
from torch import Tensor
from torch.nn.attention.varlen import varlen_attn

# Older versions of torch's kernel need one key head for each query head. Checked here, outside of compiled graphs.
_HAS_GQA: Final = "enable_gqa" in inspect.signature(varlen_attn).parameters

_flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_flash_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


def attend(
    query_THD: Tensor,
    key_TKD: Tensor,
    value_TKD: Tensor,
    cu_seqlens: Tensor,
    max_length: int,
    *,
    scale: float,
    window: int | None = None,
) -> Tensor:
    """Returns causal attention within each document, [T, H, D] in the dtype of `value_TKD`: on a CPU fp32 or bf16."""
    # Under autocast the rotary embedding leaves queries and keys in fp32; torch's own attention would cast them too.
    query_THD, key_TKD = query_THD.to(value_TKD.dtype), key_TKD.to(value_TKD.dtype)
    if query_THD.is_cuda:
        return attend_on_gpu(query_THD, key_TKD, value_TKD, cu_seqlens, max_length, scale=scale, window=window)
    out_THD: Tensor = attend_on_cpu(query_THD, key_TKD, value_TKD, cu_seqlens, scale, window)[0]
    return out_THD


# --- CPU ----------------------------------------------------------------------------------------


@torch.library.custom_op("sftx::document_attention", mutates_args=(), device_types="cpu")
def attend_on_cpu(
    query_THD: Tensor, key_TKD: Tensor, value_TKD: Tensor, cu_seqlens: Tensor, scale: float, window: int | None
) -> tuple[Tensor, Tensor]:
    """Returns the attention, [T, H, D], and the logsumexp of the scores, fp32 [H, T], which the backward pass needs."""
    out_THD = query_THD.new_empty(query_THD.shape)
    lse_HT = query_THD.new_empty(query_THD.shape[1], query_THD.shape[0], dtype=torch.float32)
    grouped = _grouped_view(query_THD, key_TKD)
    query, key, value, out = grouped(query_THD), grouped(key_TKD), grouped(value_TKD), grouped(out_THD)
    lse = lse_HT.unflatten(0, query.shape[:2])
    for span, is_causal, mask in _documents(cu_seqlens, window, query.dtype):
        out[:, :, span], lse[:, :, span] = _flash(
            query[:, :, span], key[:, :, span], value[:, :, span], 0.0, is_causal, attn_mask=mask, scale=scale
        )
    return out_THD, lse_HT


@attend_on_cpu.register_fake
def _(
    query_THD: Tensor, key_TKD: Tensor, value_TKD: Tensor, cu_seqlens: Tensor, scale: float, window: int | None
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
    cu_seqlens: Tensor,
    scale: float,
    window: int | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns the gradients of query, key and value, in their shapes and dtypes."""
    dtype = query_THD.dtype
    # Computed in fp32 for every dtype: aten's backward in bf16 takes 3.5 times as long (95 ms against 27 ms for 1,800
    # tokens in 7 documents, 9 heads of 64) and is less accurate.
    grouped = _grouped_view(query_THD, key_TKD)
    grad, query, key, value, out = (grouped(x.float()) for x in (grad_THD, query_THD, key_TKD, value_TKD, out_THD))
    lse = lse_HT.unflatten(0, query.shape[:2])
    grads = [torch.empty(x.shape, dtype=torch.float32) for x in (query_THD, key_TKD, value_TKD)]
    grad_query = grouped(grads[0])
    grad_key, grad_value = (x.transpose(0, 1) for x in grads[1:])
    for span, is_causal, mask in _documents(cu_seqlens, window, torch.float32):
        inputs = [x[:, :, span] for x in (grad, query, key, value, out, lse)]
        grad_query[:, :, span], for_key, for_value = _flash_backward(
            *inputs, 0.0, is_causal, attn_mask=mask, scale=scale
        )
        grad_key[:, span], grad_value[:, span] = for_key.sum(1), for_value.sum(1)
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
    cu_seqlens: Tensor,
    scale: float,
    window: int | None,
) -> tuple[Tensor, Tensor, Tensor]:
    query_grad, key_grad, value_grad = (x.new_empty(x.shape) for x in (query_THD, key_TKD, value_TKD))
    return query_grad, key_grad, value_grad


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    query_THD, key_TKD, value_TKD, cu_seqlens, ctx.scale, ctx.window = inputs
    ctx.save_for_backward(query_THD, key_TKD, value_TKD, *output, cu_seqlens)
    ctx.mark_non_differentiable(output[1])


def _backward(ctx: Any, grad_THD: Tensor, _: Tensor | None) -> tuple[Tensor | None, ...]:
    grads = attend_on_cpu_backward(grad_THD, *ctx.saved_tensors, ctx.scale, ctx.window)
    return *grads, None, None, None


attend_on_cpu.register_autograd(_backward, setup_context=_setup_context)


def _grouped_view(query_THD: Tensor, key_TKD: Tensor) -> Callable[[Tensor], Tensor]:
    """Returns a function that views any of these tensors as [K, H/K, T, D], for grouped-query attention without a copy.

    Keys and values are expanded (stride 0) over the query heads of their group.
    """
    num_groups, group_size = key_TKD.shape[1], query_THD.shape[1] // key_TKD.shape[1]

    def view(x: Tensor) -> Tensor:
        heads_per_group = x.shape[1] // num_groups
        grouped: Tensor = x.unflatten(1, (num_groups, heads_per_group)).permute(1, 2, 0, 3)
        return grouped.expand(-1, group_size, -1, -1)

    return view


def _documents(
    cu_seqlens: Tensor, window: int | None, dtype: torch.dtype
) -> Iterator[tuple[slice, bool, Tensor | None]]:
    """Yields each document's slice of T, whether plain causal attention is right for it, and otherwise its mask."""
    for start, end in itertools.pairwise(cu_seqlens.tolist()):
        length = end - start
        if length == 0:
            continue
        if window is None or length <= window:
            yield slice(start, end), True, None
        else:
            visible = torch.ones(length, length, dtype=torch.bool).tril().triu(1 - window)
            yield slice(start, end), False, torch.zeros(length, length, dtype=dtype).masked_fill(~visible, -torch.inf)


# --- GPU ----------------------------------------------------------------------------------------


def reason_against(device: torch.device, dtype: torch.dtype, head_dim: int) -> str | None:
    """Returns why attention within documents is not available for such tensors; None when it is."""
    if device.type == "cpu":
        return None
    if device.type != "cuda":
        return f"it is not available on the device {device.type}"
    if dtype not in (torch.bfloat16, torch.float16):
        return f"on a GPU it computes in bf16 and fp16, not in {str(dtype).removeprefix('torch.')}"
    if head_dim > 256 or head_dim % 8:
        return f"on a GPU the head dimension must be a multiple of 8 up to 256, and it is {head_dim}"
    if torch.version.hip is None and torch.cuda.get_device_capability(device) < (8, 0):
        return "it needs a GPU of compute capability 8.0"
    return None


def attend_on_gpu(
    query_THD: Tensor,
    key_TKD: Tensor,
    value_TKD: Tensor,
    cu_seqlens: Tensor,
    max_length: int,
    *,
    scale: float,
    window: int | None,
) -> Tensor:
    """Returns the same as `attend` from torch's kernel, in bf16 or fp16."""
    # The kernel counts the tokens to the left and to the right of a token, without itself.
    options: dict[str, Any] = {"scale": scale, "window_size": (-1 if window is None else window - 1, 0)}
    if query_THD.shape[1] != key_TKD.shape[1]:
        if _HAS_GQA:
            options["enable_gqa"] = True
        else:
            size = query_THD.shape[1] // key_TKD.shape[1]
            key_TKD, value_TKD = key_TKD.repeat_interleave(size, 1), value_TKD.repeat_interleave(size, 1)
    out = varlen_attn(query_THD, key_TKD, value_TKD, cu_seqlens, cu_seqlens, max_length, max_length, **options)
    return cast(Tensor, out)
