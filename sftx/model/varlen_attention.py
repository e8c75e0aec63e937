"""Causal attention within the documents of a packed row: in blocks of queries on a CPU, by torch's kernel on a GPU.

On a CPU the forward of a document is torch's own kernel, but where a window is narrower than the document, and in the
backward of documents that are not long: there a block of queries is multiplied with the keys that it may see, and no
others. Scores and their softmax are fp32, also under autocast; the other products are in the dtype of the values where
the CPU has instructions for it. Backward computes the probabilities again. Torch's own backward takes two to three
times as long in bf16 for documents of some hundred tokens.

It is a custom operation of torch: reading `cu_seqlens` in a plain function would break every compiled graph.

Dimensions: T tokens, H query heads, K key and value heads, G = H / K query heads of a key head, D head dimension,
Q queries of a block, N keys that they see. `cu_seqlens` is int32, [documents + 1]. A window is the number of tokens
that a token attends to, itself included.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import itertools
from collections.abc import Iterator
from typing import Any, Final, cast

import torch
from torch import Tensor
from torch.nn.attention.varlen import varlen_attn

from sftx.types import SharedPrefixes
from sftx_kernels import cpu_multiplies

# The kernels of torch's attention on a CPU, [1, H, T, D], by their names: the rules by which torch chooses one change.
_attend_causally: Final = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_attend_causally_backward: Final = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
_LONG: Final = 1024
"""Tokens of a document from which on torch's backward is faster than ours: 1.5 times at 2,048 tokens, 2 at 8,192."""
# Older versions of torch's kernel need one key head for each query head. Checked here, outside of compiled graphs.
_HAS_GQA: Final = "enable_gqa" in inspect.signature(varlen_attn).parameters


def attend(
    query_THD: Tensor,
    key_TKD: Tensor,
    value_TKD: Tensor,
    cu_seqlens: Tensor,
    max_length: int,
    *,
    scale: float,
    window: int | None = None,
    shared: SharedPrefixes | None = None,
) -> Tensor:
    """Returns causal attention within each document, [T, H, D] in the dtype of `value_TKD`: on a CPU fp32 or bf16.

    With `shared`, `cu_seqlens` delimits pieces, and a branch attends to its prefix too.
    """
    # Under autocast the rotary embedding leaves queries and keys in fp32; torch's own attention would cast them too.
    query_THD, key_TKD = query_THD.to(value_TKD.dtype), key_TKD.to(value_TKD.dtype)
    if query_THD.is_cuda:
        return attend_on_gpu(
            query_THD, key_TKD, value_TKD, cu_seqlens, max_length, scale=scale, window=window, shared=shared
        )
    prefix_P = None if shared is None else shared.prefix_P
    return cast(Tensor, attend_on_cpu(query_THD, key_TKD, value_TKD, cu_seqlens, scale, window, prefix_P)[0])


# --- CPU ----------------------------------------------------------------------------------------


@torch.library.custom_op("sftx::document_attention", mutates_args=(), device_types="cpu")
def attend_on_cpu(
    query_THD: Tensor,
    key_TKD: Tensor,
    value_TKD: Tensor,
    cu_seqlens: Tensor,
    scale: float,
    window: int | None,
    prefix_P: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Returns the attention, [T, H, D], and the logsumexp of the scores, [H, T], fp32 at least.

    The latter is for the backward by torch's kernel, and 0 where a window cuts the document. `prefix_P`: that of
    `SharedPrefixes`.
    """
    out_THD = query_THD.new_empty(query_THD.shape)
    products = _Products(query_THD, key_TKD, scale)
    lse_HT = query_THD.new_zeros(query_THD.shape[1], query_THD.shape[0], dtype=products.wide_dtype)
    with torch.autocast("cpu", enabled=False):
        for document, prefix in _pieces(cu_seqlens, prefix_P):
            own_key_TKD, own_value_TKD = (_joined(x, prefix, document) for x in (key_TKD, value_TKD))
            num_queries, num_keys = document.stop - document.start, len(own_key_TKD)
            if not _is_cut(num_keys, window):
                heads = (_heads(x) for x in (query_THD[document], own_key_TKD, own_value_TKD))
                mask = _of_torch(num_queries, num_keys, products.wide_dtype)
                out_1HTD, lse_1HT = _attend_causally(*heads, 0.0, mask is None, attn_mask=mask, scale=scale)
                out_THD[document], lse_HT[:, document] = out_1HTD[0].transpose(0, 1), lse_1HT[0]
                continue
            key_KTD, value_KTD = products.wide(own_key_TKD), products.narrow(own_value_TKD)
            for queries, keys, mask_QN in _blocks(num_queries, num_keys, window, products.block_size):
                query_KRD = products.rows(query_THD[document], queries)
                probabilities_KRN = products.probabilities(query_KRD, key_KTD[:, keys], mask_QN).to(value_KTD.dtype)
                products.write(out_THD[document], queries, torch.bmm(probabilities_KRN, value_KTD[:, keys]))
    return out_THD, lse_HT


@attend_on_cpu.register_fake
def _(
    query_THD: Tensor,
    key_TKD: Tensor,
    value_TKD: Tensor,
    cu_seqlens: Tensor,
    scale: float,
    window: int | None,
    prefix_P: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    wide_dtype = torch.promote_types(query_THD.dtype, torch.float32)
    lse_HT = query_THD.new_empty(query_THD.shape[1], query_THD.shape[0], dtype=wide_dtype)
    return query_THD.new_empty(query_THD.shape), lse_HT


@torch.library.custom_op("sftx::document_attention_backward", mutates_args=(), device_types="cpu")
def attend_on_cpu_backward(
    grad_THD: Tensor,
    query_THD: Tensor,
    key_TKD: Tensor,
    value_TKD: Tensor,
    cu_seqlens: Tensor,
    out_THD: Tensor,
    lse_HT: Tensor,
    scale: float,
    window: int | None,
    prefix_P: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns the gradients of query, key and value, in their shapes and dtypes."""
    products = _Products(query_THD, key_TKD, scale)
    grad_query_THD = query_THD.new_empty(query_THD.shape)
    # Several branches add to the keys and values of a prefix, in fp32 at least.
    dtype = key_TKD.dtype if prefix_P is None else products.wide_dtype
    grad_key_TKD, grad_value_TKD = (x.new_zeros(x.shape, dtype=dtype) for x in (key_TKD, value_TKD))
    with torch.autocast("cpu", enabled=False):
        for document, prefix in _pieces(cu_seqlens, prefix_P):
            own_key_TKD, own_value_TKD = (_joined(x, prefix, document) for x in (key_TKD, value_TKD))
            num_queries, num_keys = document.stop - document.start, len(own_key_TKD)
            if num_queries * num_keys >= _LONG**2 and not _is_cut(num_keys, window):
                own = (grad_THD[document], query_THD[document], own_key_TKD, own_value_TKD, out_THD[document])
                mask = _of_torch(num_queries, num_keys, products.wide_dtype)
                own_lse_1HT = lse_HT[None, :, document]
                found = _attend_causally_backward(
                    *map(_heads, own), own_lse_1HT, 0.0, mask is None, attn_mask=mask, scale=scale
                )
                own_grad_query_THD, own_grad_key_TKD, own_grad_value_TKD = (x[0].transpose(0, 1) for x in found)
                grad_query_THD[document] = own_grad_query_THD
                _add(grad_key_TKD, prefix, document, own_grad_key_TKD)
                _add(grad_value_TKD, prefix, document, own_grad_value_TKD)
                continue
            wide_key_KTD = products.wide(own_key_TKD)
            key_KTD, value_KTD = wide_key_KTD.to(products.dtype), products.narrow(own_value_TKD)
            # Several blocks add to one key, in fp32 at least.
            grad_key_KTD, grad_value_KTD = torch.zeros_like(wide_key_KTD), torch.zeros_like(wide_key_KTD)
            for queries, keys, mask_QN in _blocks(num_queries, num_keys, window, products.block_size):
                query_KRD, grad_KRD = (products.rows(x[document], queries) for x in (query_THD, grad_THD))
                probabilities_KRN = products.probabilities(query_KRD, wide_key_KTD[:, keys], mask_QN)
                grad_value_KTD[:, keys] += torch.bmm(probabilities_KRN.to(key_KTD.dtype).transpose(1, 2), grad_KRD)
                grad_KRN = torch.bmm(grad_KRD, value_KTD[:, keys].transpose(1, 2)).to(probabilities_KRN.dtype)
                # scale p (g - sum(g p))
                scores_KRN = torch._softmax_backward_data(grad_KRN, probabilities_KRN, -1, grad_KRN.dtype)
                scores_KRN = scores_KRN.mul_(scale).to(key_KTD.dtype)
                products.write(grad_query_THD[document], queries, torch.bmm(scores_KRN, key_KTD[:, keys]))
                grad_key_KTD[:, keys] += torch.bmm(scores_KRN.transpose(1, 2), query_KRD)
            _add(grad_key_TKD, prefix, document, grad_key_KTD.transpose(0, 1))
            _add(grad_value_TKD, prefix, document, grad_value_KTD.transpose(0, 1))
    return grad_query_THD, grad_key_TKD.to(key_TKD.dtype), grad_value_TKD.to(value_TKD.dtype)


@attend_on_cpu_backward.register_fake
def _(
    grad_THD: Tensor,
    query_THD: Tensor,
    key_TKD: Tensor,
    value_TKD: Tensor,
    cu_seqlens: Tensor,
    out_THD: Tensor,
    lse_HT: Tensor,
    scale: float,
    window: int | None,
    prefix_P: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    query_grad, key_grad, value_grad = (x.new_empty(x.shape) for x in (query_THD, key_TKD, value_TKD))
    return query_grad, key_grad, value_grad


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    query_THD, key_TKD, value_TKD, cu_seqlens, ctx.scale, ctx.window, prefix_P = inputs
    out_THD, lse_HT = output
    ctx.mark_non_differentiable(lse_HT)
    ctx.save_for_backward(query_THD, key_TKD, value_TKD, cu_seqlens, out_THD, lse_HT, prefix_P)


def _backward(ctx: Any, grad_THD: Tensor, grad_lse_HT: Tensor) -> tuple[Tensor | None, ...]:
    *saved, prefix_P = ctx.saved_tensors
    grads = attend_on_cpu_backward(grad_THD, *saved, ctx.scale, ctx.window, prefix_P)
    return *grads, None, None, None, None


attend_on_cpu.register_autograd(_backward, setup_context=_setup_context)


def _pieces(cu_seqlens: Tensor, prefix_P: Tensor | None) -> Iterator[tuple[slice, slice | None]]:
    """Yields the tokens of each document or piece, and those of its prefix."""
    pieces = [slice(*bounds) for bounds in itertools.pairwise(cu_seqlens.tolist())]
    prefixes = [-1] * len(pieces) if prefix_P is None else prefix_P.tolist()
    for piece, prefix in zip(pieces, prefixes, strict=True):
        yield piece, pieces[prefix] if prefix >= 0 else None


def _joined(x_TKD: Tensor, prefix: slice | None, document: slice) -> Tensor:
    """Returns the keys or values that a piece attends to, its prefix before its own."""
    return x_TKD[document] if prefix is None else torch.cat([x_TKD[prefix], x_TKD[document]])


def _add(grad_TKD: Tensor, prefix: slice | None, document: slice, own_TKD: Tensor) -> None:
    """Adds the gradient of what `_joined` returned."""
    if prefix is not None:
        length = prefix.stop - prefix.start
        grad_TKD[prefix] += own_TKD[:length]
        own_TKD = own_TKD[length:]
    grad_TKD[document] += own_TKD


def _of_torch(num_queries: int, num_keys: int, dtype: torch.dtype) -> Tensor | None:
    """Returns the mask with which torch's kernel aligns queries and keys at their ends; None where it is causal."""
    if num_queries == num_keys:
        return None
    mask_QN = torch.full((num_queries, num_keys), -torch.inf, dtype=dtype)
    return mask_QN.triu_(num_keys - num_queries + 1)


def _is_cut(length: int, window: int | None) -> bool:
    """Returns whether a token of the document does not see all tokens before it."""
    return window is not None and window < length


def _heads(x_THD: Tensor) -> Tensor:
    """Returns a view as torch's kernels take it, [1, H, T, D]."""
    return x_THD.transpose(0, 1)[None]


class _Products:
    """The dtypes and shapes of the matrix products.

    The G query heads of a key head are rows of one matrix, R = Q * G of a block, so that grouped-query attention copies
    no key. Copies are of a block or a document: they stay in the cache.
    """

    def __init__(self, query_THD: Tensor, key_TKD: Tensor, scale: float) -> None:
        self._num_key_heads, self._scale = key_TKD.shape[1], scale
        self.wide_dtype = torch.promote_types(query_THD.dtype, torch.float32)
        is_native = cpu_multiplies(query_THD.dtype)
        self.dtype = query_THD.dtype if is_native else self.wide_dtype
        """Of all products but that of queries and keys, which is at least fp32."""
        self.block_size = 128 if is_native and query_THD.dtype != self.wide_dtype else 64
        """Queries of a block. With more of them more scores above the diagonal are computed in vain."""

    def wide(self, x_TKD: Tensor) -> Tensor:
        """Returns a matrix for each key head, [K, T, D], in fp32 at least."""
        return x_TKD.transpose(0, 1).to(self.wide_dtype, memory_format=torch.contiguous_format)

    def narrow(self, x_TKD: Tensor) -> Tensor:
        """Returns a matrix for each key head, [K, T, D], in `dtype`."""
        return x_TKD.transpose(0, 1).to(self.dtype, memory_format=torch.contiguous_format)

    def rows(self, x_THD: Tensor, queries: slice) -> Tensor:
        """Returns a matrix of these queries for each key head, [K, R, D], in `dtype`."""
        x_KQGD = x_THD[queries].unflatten(1, (self._num_key_heads, -1)).transpose(0, 1)
        x_KRD: Tensor = x_KQGD.reshape(self._num_key_heads, -1, x_THD.shape[2])
        return x_KRD.to(self.dtype)

    def write(self, x_THD: Tensor, queries: slice, rows_KRD: Tensor) -> None:
        """Writes such matrices to their place."""
        x_KQGD = x_THD[queries].unflatten(1, (self._num_key_heads, -1)).transpose(0, 1)
        x_KQGD.copy_(rows_KRD.view(x_KQGD.shape))

    def probabilities(self, query_KRD: Tensor, key_KND: Tensor, mask_QN: Tensor) -> Tensor:
        """Returns the softmax of the queries over the keys, [K, R, N], fp32 at least.

        `mask_QN` is for the last of these keys; those before them are visible to all of the queries.
        """
        # Queries and keys in bf16 lose nothing where the CPU takes fp32 products apart into those of bf16.
        with _products_of_bf16() if query_KRD.dtype == torch.bfloat16 else contextlib.nullcontext():
            scores_KRN = torch.bmm(query_KRD.to(self.wide_dtype), key_KND.transpose(1, 2)).mul_(self._scale)
        num_queries, num_masked = mask_QN.shape
        scores_KRN.unflatten(1, (num_queries, -1))[..., -num_masked:].add_(mask_QN[:, None])
        return torch.softmax(scores_KRN, -1)


@contextlib.contextmanager
def _products_of_bf16() -> Iterator[None]:
    """Returns a context in which oneDNN rounds the factors of fp32 products to bf16, where that is faster."""
    settings = cast(Any, torch.backends.mkldnn).matmul
    before, settings.fp32_precision = settings.fp32_precision, "bf16"
    try:
        yield
    finally:
        settings.fp32_precision = before


def _blocks(
    num_queries: int, num_keys: int, window: int | None, block_size: int
) -> Iterator[tuple[slice, slice, Tensor]]:
    """Yields the queries of each block of a document, the keys that any of them sees, and the mask of the last of these
    keys. The last query is at the last key.
    """
    behind = num_keys - num_queries
    for first in range(0, num_queries, block_size):
        last = min(first + block_size, num_queries)
        end = behind + last
        if window is None or end <= window:
            yield slice(first, last), slice(0, end), _mask(last - first, last - first, None)
        else:
            oldest = max(0, behind + first - window + 1)
            yield slice(first, last), slice(oldest, end), _mask(last - first, end - oldest, window)


@functools.lru_cache(maxsize=256)
def _mask(num_queries: int, num_keys: int, window: int | None) -> Tensor:
    """Returns 0 where a query sees a key and -inf elsewhere, fp32 [Q, N]. The last query is at the last key."""
    behind = num_keys - num_queries
    visible_QN = torch.ones(num_queries, num_keys, dtype=torch.bool).tril(behind)
    if window is not None:
        visible_QN = visible_QN.triu(behind - window + 1)
    return torch.zeros(num_queries, num_keys).masked_fill(~visible_QN, -torch.inf)


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
    shared: SharedPrefixes | None = None,
) -> Tensor:
    """Returns the same as `attend` from torch's kernel, in bf16 or fp16."""
    cu_seqlens_k, max_length_k = cu_seqlens, max_length
    if shared is not None:
        # Not index_select, whose backward adds in an order of its own each time.
        key_TKD, value_TKD = key_TKD[shared.keys_K], value_TKD[shared.keys_K]
        cu_seqlens_k, max_length_k = shared.cu_seqlens_k, shared.max_seqlen_k
    # The kernel counts the tokens to the left and to the right of a token, without itself.
    options: dict[str, Any] = {"scale": scale, "window_size": (-1 if window is None else window - 1, 0)}
    if query_THD.shape[1] != key_TKD.shape[1]:
        if _HAS_GQA:
            options["enable_gqa"] = True
        else:
            size = query_THD.shape[1] // key_TKD.shape[1]
            key_TKD, value_TKD = key_TKD.repeat_interleave(size, 1), value_TKD.repeat_interleave(size, 1)
    # Where a piece has more keys than queries, the kernel aligns them at their ends.
    out = varlen_attn(query_THD, key_TKD, value_TKD, cu_seqlens, cu_seqlens_k, max_length, max_length_k, **options)
    return cast(Tensor, out)
