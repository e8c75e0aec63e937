"""Cross-entropy from hidden states: the head's product, softmax, loss and gradients, a chunk of rows at a time.

Shape suffixes: N rows (tokens), M rows that are not ignored, C rows of a chunk, D hidden, V vocabulary. Chunks are
of the M rows; `rows_M` says which of N they are.
"""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from sftx_kernels.checks import (
    autocasts,
    check_count,
    check_head,
    check_labels,
    check_loss_options,
    differentiable_once,
    error,
    gemm_dtype,
)
from sftx_kernels.cross_entropy import fill
from sftx_kernels.dispatch import decide
from sftx_kernels.gemm import accumulator, add_weight_gradient_, project, project_back, widens
from sftx_kernels.rows import IGNORE_INDEX, Formula, Rows


class LinearCrossEntropyOutput(NamedTuple):
    """What `linear_cross_entropy` returns. Its floats are fp32, or fp64 for fp64 input.

    loss: 0-d (`reduction="sum"`), or [N] with 0 at ignored rows (`"none"`); all that carries a gradient.
    num_tokens: how many rows were not ignored, unweighted; an int on the host, so reading it never syncs.
    lse_N, entropy_N, correct_N: None unless `stats=True`; see there.
    """

    loss: Tensor
    num_tokens: int
    lse_N: Tensor | None = None
    entropy_N: Tensor | None = None
    correct_N: Tensor | None = None


def linear_cross_entropy(
    hidden_ND: Tensor,
    weight_VD: Tensor,
    labels_N: Tensor,
    *,
    bias_V: Tensor | None = None,
    token_weights_N: Tensor | None = None,
    num_valid: int | None = None,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    ignore_index: int = IGNORE_INDEX,
    chunk_rows: int | None = None,
    workspace_bytes: int | None = None,
    reduction: Literal["sum", "none"] = "sum",
    stats: bool = False,
    backend: str | None = None,
) -> LinearCrossEntropyOutput:
    """Cross-entropy of `hidden_ND @ weight_VD.T + bias_V`, holding the logits of one chunk of rows at most.

    Rows whose label is `ignore_index` are removed before the head's product and cost nothing. The forward
    pass goes over the others chunk by chunk and computes the loss and whichever gradients will be asked for;
    backward only scales them. The formula, with its sources, stands at the top of `sftx_kernels.rows`. Nothing
    is overwritten. Differentiable once, in reverse mode.

    Args:
        hidden_ND, weight_VD, bias_V: of one floating dtype, any strides. GEMMs run in that dtype, softmax and
            loss in fp32 (fp64 for fp64). Under autocast GEMMs run in its dtype, and the three may differ.
            Gradients have each input's own dtype; dW and db are accumulated in fp32 (fp64 for fp64).
        labels_N: int64. A label outside [0, V) is refused on CPU, and anywhere if SFTX_CHECK_LABELS=1;
            otherwise looking would sync.
        token_weights_N: floating; scales the whole loss of a row. Gets no gradient.
        num_valid: how many labels are not `ignore_index`, as the host knows it, which saves an accelerator
            the sync of counting, and torch.compile a graph break. Checked on CPU, trusted elsewhere.
        chunk_rows: by default 256 on CPU (192 where it makes products of this dtype in fp32), elsewhere 2048, or
            4096 if the head trains; fewer where a chunk of logits in the dtype of the GEMMs would not fit
            `workspace_bytes`. A given count wins over that.
        reduction: "sum", or "none" for a loss per row. With "none" and a head that trains, backward makes the
            logits once more, for dW.
        stats: return also, detached and with 0 or False at ignored rows: lse_N of the final logits z;
            entropy_N of their softmax, in nats; correct_N (bool), whether the label is their argmax.
        backend: of softmax, loss and gradient; see `sftx_kernels.dispatch`. GEMMs are torch's.

    Raises:
        ValueError: names the argument, what was expected and what was got.
    """
    check_head(hidden_ND, weight_VD, labels_N, bias_V, token_weights_N)
    check_loss_options(label_smoothing, z_loss, softcap, logit_scale, ignore_index, reduction)
    num_rows, V = labels_N.shape[0], weight_VD.shape[0]
    check_count("chunk_rows", chunk_rows, 1)
    check_count("num_valid", num_valid, 0, num_rows)
    wants = [
        torch.is_grad_enabled() and tensor is not None and tensor.requires_grad
        for tensor in (hidden_ND, weight_VD, bias_V)
    ]
    dtype = gemm_dtype(hidden_ND)
    check_count("workspace_bytes", workspace_bytes, 0)
    row_bytes = V * dtype.itemsize
    if workspace_bytes is not None and workspace_bytes < row_bytes:
        raise error("workspace_bytes", f"at least {row_bytes}, one row of logits", workspace_bytes)

    rows_M: Tensor | None = _trained_rows(labels_N, num_valid, ignore_index, V)
    assert rows_M is not None
    num_tokens = rows_M.shape[0]
    if num_tokens == num_rows:
        rows_M = None
    if token_weights_N is not None:
        token_weights_N = _take(token_weights_N, rows_M).to(accumulator(dtype))
    loss, *per_row = _forward(
        hidden_ND, weight_VD, bias_V, rows_M, _take(labels_N, rows_M), token_weights_N,
        label_smoothing, z_loss, softcap, logit_scale, chunk_rows, workspace_bytes, dtype, reduction == "none", stats,
        backend, *wants,
    )[:4]  # fmt: skip
    if reduction == "none":
        loss = _spread(loss, rows_M, num_rows)
    if not stats:
        return LinearCrossEntropyOutput(loss, num_tokens)
    return LinearCrossEntropyOutput(loss, num_tokens, *(_spread(stat.detach(), rows_M, num_rows) for stat in per_row))


@torch.library.custom_op("sftx::trained_rows", mutates_args=())
def _trained_rows(labels_N: Tensor, num_valid: int | None, ignore_index: int, num_classes: int) -> Tensor:
    """rows_M: where the labels other than ignore_index are."""
    check_labels(labels_N, ignore_index, num_classes)
    if num_valid is None or labels_N.is_cpu:
        rows_M = (labels_N != ignore_index).nonzero().squeeze(1)
        if num_valid is not None and num_valid != rows_M.shape[0]:
            raise error("num_valid", f"{rows_M.shape[0]}, the number of labels other than {ignore_index}", num_valid)
        return rows_M
    # Too large a num_valid pads with -1, which index_select refuses loudly on the device.
    return (labels_N != ignore_index).nonzero_static(size=num_valid).squeeze(1)


@_trained_rows.register_fake
def _(labels_N: Tensor, num_valid: int | None, ignore_index: int, num_classes: int) -> Tensor:
    return labels_N.new_empty(torch.library.get_ctx().new_dynamic_size() if num_valid is None else num_valid)


@torch.library.custom_op("sftx::linear_cross_entropy", mutates_args=())
def _forward(
    hidden_ND: Tensor,
    weight_VD: Tensor,
    bias_V: Tensor | None,
    rows_M: Tensor | None,
    labels_M: Tensor,
    token_weights_M: Tensor | None,
    label_smoothing: float,
    z_loss: float,
    softcap: float | None,
    logit_scale: float,
    chunk_rows: int | None,
    workspace_bytes: int | None,
    dtype: torch.dtype,
    per_row: bool,
    stats: bool,
    backend: str | None,
    want_hidden: bool,
    want_weight: bool,
    want_bias: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(loss or loss_M, lse_M, entropy_M, correct_M, dX_MD, dW_VD, db_V); empty what is not wanted.

    The gradients are for an upstream gradient of 1; dW and db in the accumulator's dtype. A loss per row has an
    upstream gradient per row: rows of dX can be scaled by it afterwards, dW and db, which are sums over rows,
    cannot. So with `per_row` these two are left to backward.
    """
    wants = (want_hidden, want_weight and not per_row, want_bias and not per_row)
    outputs = _empty(hidden_ND, weight_VD, labels_M, dtype, stats, *wants)
    loss_M, lse_M, entropy_M, correct_M, dX_MD, dW_VD, db_V = outputs
    decision = decide("cross_entropy", hidden_ND.device, dtype, asked=backend)
    formula = Formula(label_smoothing, z_loss, softcap, logit_scale)
    num_rows = labels_M.shape[0]
    chunk_rows = chunk_rows or choose_chunk(weight_VD, dtype, workspace_bytes, trained=want_weight)
    kind = hidden_ND.device.type
    with torch.autocast(kind, enabled=False) if autocasts(kind) else nullcontext():
        # Cast once, not once a chunk; no copy where the dtype is right already.
        weight_VD = weight_VD.to(dtype)
        bias_V = None if bias_V is None else bias_V.to(dtype)
        buffer_CV = _logits_buffer(weight_VD, min(chunk_rows, num_rows), aligned=decision.backend != "torch")
        for start in range(0, num_rows, chunk_rows):
            chunk = slice(start, min(start + chunk_rows, num_rows))
            x_CD = hidden_ND[chunk] if rows_M is None else hidden_ND.index_select(0, rows_M[chunk])
            x_CD = x_CD.to(dtype)
            logits_CV = project(x_CD, weight_VD, bias_V, out=buffer_CV[: x_CD.shape[0]])
            rows = Rows(
                logits_NV=logits_CV,
                labels_N=labels_M[chunk],
                token_weights_N=None if token_weights_M is None else token_weights_M[chunk],
                loss_N=loss_M[chunk],
                lse_N=lse_M[chunk],
                entropy_N=entropy_M[chunk] if stats else None,
                correct_N=correct_M[chunk] if stats else None,
                grad_NV=logits_CV if any(wants) else None,
                scratch=True,
            )
            fill(rows, formula, decision)
            if want_hidden:
                project_back(logits_CV, weight_VD, out=dX_MD[chunk])
            if wants[1]:
                add_weight_gradient_(dW_VD, logits_CV, x_CD)
            if wants[2]:
                db_V += logits_CV.sum(0, dtype=db_V.dtype)
    return (loss_M if per_row else loss_M.sum(), *outputs[1:])


@_forward.register_fake
def _(
    hidden_ND: Tensor, weight_VD: Tensor, bias_V: Tensor | None, rows_M: Tensor | None, labels_M: Tensor, *rest: Any
) -> tuple[Tensor, ...]:
    dtype, per_row, stats, _, want_hidden, want_weight, want_bias = rest[-7:]
    wants = (want_hidden, want_weight and not per_row, want_bias and not per_row)
    loss_M, *others = _empty(hidden_ND, weight_VD, labels_M, dtype, stats, *wants)
    return (loss_M if per_row else loss_M.new_empty(()), *others)


def _empty(
    hidden_ND: Tensor,
    weight_VD: Tensor,
    labels_M: Tensor,
    dtype: torch.dtype,
    stats: bool,
    want_hidden: bool,
    want_weight: bool,
    want_bias: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Room for what `_forward` returns, with a loss per row; dW and db are sums and begin at 0."""
    num_rows, wide = labels_M.shape[0], accumulator(dtype)
    per_stat = num_rows if stats else 0
    return (
        hidden_ND.new_empty(num_rows, dtype=wide),
        hidden_ND.new_empty(num_rows, dtype=wide),
        hidden_ND.new_empty(per_stat, dtype=wide),
        hidden_ND.new_empty(per_stat, dtype=torch.bool),
        hidden_ND.new_empty((num_rows, hidden_ND.shape[1]) if want_hidden else 0, dtype=dtype),
        weight_VD.new_zeros(weight_VD.shape if want_weight else 0, dtype=wide),
        weight_VD.new_zeros(weight_VD.shape[0] if want_bias else 0, dtype=wide),
    )


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    hidden_ND, weight_VD, bias_V, rows_M, labels_M, token_weights_M, *options = inputs
    *_, per_row, _, _, _, want_weight, want_bias = options
    ctx.options, ctx.num_rows = options, hidden_ND.shape[0]
    ctx.dtypes = (hidden_ND.dtype, weight_VD.dtype, None if bias_V is None else bias_V.dtype)
    ctx.has_rows, ctx.again = rows_M is not None, per_row and (want_weight or want_bias)
    again = (hidden_ND, weight_VD, bias_V, labels_M, token_weights_M) if ctx.again else ()
    ctx.save_for_backward(rows_M, *output[4:], *again)
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)


@differentiable_once
def _differentiate(ctx: Any, grad_loss: Tensor | None, *_: Any) -> Any:
    *_, per_row, _, backend, want_hidden, want_weight, want_bias = ctx.options
    rows_M, dX_MD, dW_VD, db_V, *again = ctx.saved_tensors
    none = (None,) * (len(ctx.options) + 3)
    if grad_loss is None:
        return None, None, None, *none
    if ctx.again:
        hidden_ND, weight_VD, bias_V, labels_M, token_weights_M = again
        weights_M = grad_loss if token_weights_M is None else grad_loss * token_weights_M
        options = (*ctx.options[:-6], False, False, backend, False, want_weight, want_bias)
        *_, dW_VD, db_V = _forward(hidden_ND, weight_VD, bias_V, rows_M, labels_M, weights_M, *options)
    hidden_dtype, weight_dtype, bias_dtype = ctx.dtypes
    # A factor has as many dimensions as what it scales: then torch multiplies in fp32 and rounds once, where it
    # may first round a 0-d factor to bf16.
    factor = grad_loss[:, None] if per_row else grad_loss.view(1, 1)
    of_sums = factor.new_ones(1, 1) if per_row else factor
    return (
        _spread(_scaled(dX_MD, factor, hidden_dtype), rows_M, ctx.num_rows) if want_hidden else None,
        _scaled(dW_VD, of_sums, weight_dtype) if want_weight else None,
        _scaled(db_V, of_sums.view(1), bias_dtype) if want_bias else None,
        *none,
    )


_forward.register_autograd(_differentiate, setup_context=_save)


def _scaled(tensor: Tensor, factor: Tensor, dtype: torch.dtype) -> Tensor:
    """Without the wider product in between, which for dW of a large head is gigabytes."""
    return torch.mul(tensor, factor, out=torch.empty_like(tensor, dtype=dtype))


def _take(values_N: Tensor, rows_M: Tensor | None) -> Tensor:
    return values_N if rows_M is None else values_N.index_select(0, rows_M)


def _spread(values_M: Tensor, rows_M: Tensor | None, num_rows: int) -> Tensor:
    """The inverse of `_take`, with 0 at ignored rows."""
    if rows_M is None:
        return values_M
    return values_M.new_zeros(num_rows, *values_M.shape[1:]).index_copy_(0, rows_M, values_M)


def _logits_buffer(weight_VD: Tensor, num_rows: int, *, aligned: bool) -> Tensor:
    """[num_rows, V]; `aligned` begins each row at a multiple of 16 elements, which the Triton kernel loads wide."""
    V = weight_VD.shape[0]
    stride = -(-V // 16) * 16 if aligned else V
    return weight_VD.new_empty(num_rows, stride)[:, :V]


def choose_chunk(weight_VD: Tensor, dtype: torch.dtype, workspace_bytes: int | None, *, trained: bool) -> int:
    """How many rows have their logits made at once, when no count is given.

    Small chunks read the head's weight again and again, so it follows from neither V nor D, but from the device: any
    other than the CPU is taken for a GPU. `dtype` of the products; `trained`: the head's gradient is wanted too.
    """
    on_cpu = 192 if widens(weight_VD, dtype) else 256
    rows = on_cpu if weight_VD.is_cpu else 4096 if trained else 2048
    return rows if workspace_bytes is None else min(rows, workspace_bytes // (weight_VD.shape[0] * dtype.itemsize))
