"""`linear_cross_entropy` computes the loss and its gradients from hidden states, one chunk of logits at a time.

Shape suffixes: N rows (tokens), M rows that are not ignored, C rows of a chunk, D hidden, V vocabulary. Chunks are
of the M rows; `rows_M` holds their indices among the N.
"""

from __future__ import annotations

from typing import Any, Final, Literal, NamedTuple

import torch
from torch import Tensor

from sftx_kernels.checks import check_count, check_tensor, differentiable_once, error, gemm_dtype, without_autocast
from sftx_kernels.cross_entropy import (
    IGNORE_INDEX,
    Formula,
    LogitRows,
    check_loss_options,
    check_token_weights,
    fill,
    slice_rows,
)
from sftx_kernels.dispatch import decide
from sftx_kernels.gemm import accumulator, project
from sftx_kernels.head import HeadGradients, default_chunk_rows, logits_buffer, scaled, scatter, take, valid_rows


class LinearCrossEntropyOutput(NamedTuple):
    """This is the result of `linear_cross_entropy`. Its floats are fp32, or fp64 for fp64 input.

    loss: 0-d (`reduction="sum"`), or [N] with 0 at ignored rows (`"none"`); the only field that carries a gradient.
    num_tokens: the number of rows that are not ignored, unweighted; an int on the host, so reading it never syncs.
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
    """Return the cross-entropy of `hidden_ND @ weight_VD.T + bias_V`, holding at most one chunk of logits.

    Rows whose label is `ignore_index` are removed before the head's product and cost nothing. The forward
    pass goes over the others chunk by chunk and computes the loss and whichever gradients will be asked for;
    backward only scales them. The formula, with its sources, is at the top of `sftx_kernels.cross_entropy`. Nothing
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
    check_tensor("hidden_ND", hidden_ND, ("N", "D"), hidden_ND, None)
    num_rows, D = hidden_ND.shape
    check_tensor("weight_VD", weight_VD, ("V", D), hidden_ND, hidden_ND.dtype)
    V = weight_VD.shape[0]
    if V == 0:
        raise error("weight_VD", "at least one row", f"shape {list(weight_VD.shape)}")
    check_tensor("labels_N", labels_N, (num_rows,), hidden_ND, torch.int64)
    if bias_V is not None:
        check_tensor("bias_V", bias_V, (V,), hidden_ND, hidden_ND.dtype)
    check_token_weights(token_weights_N, num_rows, hidden_ND)
    check_loss_options(label_smoothing, z_loss, softcap, logit_scale, ignore_index, reduction)
    check_count("chunk_rows", chunk_rows, 1)
    check_count("num_valid", num_valid, 0, num_rows)
    check_count("workspace_bytes", workspace_bytes, 0)
    dtype = gemm_dtype(hidden_ND)
    row_bytes = V * dtype.itemsize
    if workspace_bytes is not None and workspace_bytes < row_bytes:
        raise error("workspace_bytes", f"at least {row_bytes}, one row of logits", workspace_bytes)

    rows_M: Tensor | None = valid_rows(labels_N, num_valid, ignore_index, V)
    assert rows_M is not None
    num_tokens = rows_M.shape[0]
    if num_tokens == num_rows:
        rows_M = None
    if token_weights_N is not None:
        token_weights_N = take(token_weights_N, rows_M).to(accumulator(dtype))
    wants_grad = [
        torch.is_grad_enabled() and tensor is not None and tensor.requires_grad
        for tensor in (hidden_ND, weight_VD, bias_V)
    ]
    inputs = _Inputs(hidden_ND, weight_VD, bias_V, rows_M, take(labels_N, rows_M), token_weights_N)
    options = _Options(
        label_smoothing, z_loss, softcap, logit_scale, chunk_rows, workspace_bytes, dtype, reduction == "none", stats,
        backend, *wants_grad,
    )  # fmt: skip
    loss, *stats_M = _op(*inputs, *options)[:4]
    if reduction == "none":
        loss = scatter(loss, rows_M, num_rows)
    if not stats:
        return LinearCrossEntropyOutput(loss, num_tokens)
    return LinearCrossEntropyOutput(loss, num_tokens, *(scatter(stat.detach(), rows_M, num_rows) for stat in stats_M))


# ---- the workspace


class LinearCrossEntropyWorkspace(NamedTuple):
    """A workspace describes the temporaries of one forward pass of `linear_cross_entropy`."""

    chunk_rows: int  # rows whose logits exist at once
    num_bytes: int  # of a chunk's logits, probabilities and hidden states, and of the weight's copy where it is cast


def linear_cross_entropy_workspace(
    num_tokens: int,
    hidden_size: int,
    vocab_size: int,
    *,
    dtype: torch.dtype,
    device_type: str,
    weight_dtype: torch.dtype | None = None,
    head_trains: bool = False,
    chunk_rows: int | None = None,
    workspace_bytes: int | None = None,
) -> LinearCrossEntropyWorkspace:
    """Return the chunk that `linear_cross_entropy` would use, and the memory that it needs besides inputs and outputs.

    The answer is arithmetic: no tensor is made, and the device need not exist in this process. Not counted are the
    returned losses and gradients, the plain-torch softmax of a slice of a chunk on a GPU, soft cap, bias and token
    weights.

    Args:
        num_tokens: rows whose label is not `ignore_index` (M).
        hidden_size, vocab_size: D and V of the head's weight [V, D].
        dtype: of the head's products: that of the hidden states, or autocast's.
        device_type: "cpu", "cuda", ...; every type but "cpu" is treated as a GPU.
        weight_dtype: of the head's weight; None if it is `dtype`, so that no copy is needed.
        head_trains: the head's weight gets a gradient.
        chunk_rows, workspace_bytes: as passed to `linear_cross_entropy`.
    """
    if chunk_rows is None:
        chunk_rows = default_chunk_rows(vocab_size, dtype, device_type, workspace_bytes, head_trains=head_trains)
    chunk_rows = min(chunk_rows, num_tokens)
    num_elements = chunk_rows * (vocab_size + hidden_size)
    if weight_dtype is not None and weight_dtype != dtype:
        num_elements += vocab_size * hidden_size
    num_bytes = num_elements * dtype.itemsize
    if device_type == "cpu":
        num_bytes += slice_rows(device_type, chunk_rows, vocab_size) * vocab_size * accumulator(dtype).itemsize
    return LinearCrossEntropyWorkspace(chunk_rows, num_bytes)


# ---- the operation and its autograd


class _Inputs(NamedTuple):
    """_Inputs holds the tensors of a call, with ignored rows removed from labels and token weights."""

    hidden_ND: Tensor
    weight_VD: Tensor
    bias_V: Tensor | None
    rows_M: Tensor | None  # None: no row is ignored
    labels_M: Tensor
    token_weights_M: Tensor | None


class _Options(NamedTuple):
    """_Options holds the other arguments of a call. The torch operation takes them flat, after the `_Inputs`."""

    label_smoothing: float
    z_loss: float
    softcap: float | None
    logit_scale: float
    chunk_rows: int | None
    workspace_bytes: int | None
    dtype: torch.dtype  # of the products
    per_row: bool
    stats: bool
    backend: str | None
    hidden_grad: bool
    weight_grad: bool
    bias_grad: bool


class _Outputs(NamedTuple):
    """_Outputs holds the results of the operation; those that are not requested are empty.

    The gradients are for an upstream gradient of 1; dW and db have the accumulator's dtype.
    """

    loss: Tensor  # 0-d, or loss_M with `per_row`
    lse_M: Tensor
    entropy_M: Tensor
    correct_M: Tensor
    dX_MD: Tensor
    dW_VD: Tensor
    db_V: Tensor


_SCHEMA: Final = (
    "(Tensor hidden_ND, Tensor weight_VD, Tensor? bias_V, Tensor? rows_M, Tensor labels_M, Tensor? token_weights_M, "
    "float label_smoothing, float z_loss, float? softcap, float logit_scale, SymInt? chunk_rows, "
    "SymInt? workspace_bytes, ScalarType dtype, bool per_row, bool stats, str? backend, bool hidden_grad, "
    "bool weight_grad, bool bias_grad) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)"
)


def _unflatten(arguments: tuple[Any, ...]) -> tuple[_Inputs, _Options]:
    num_inputs = len(_Inputs._fields)
    return _Inputs(*arguments[:num_inputs]), _Options(*arguments[num_inputs:])


@torch.library.custom_op("sftx::linear_cross_entropy", mutates_args=(), schema=_SCHEMA)
def _op(*arguments: Any) -> tuple[Tensor, ...]:
    return tuple(_forward(*_unflatten(arguments)))


@_op.register_fake
def _(*arguments: Any) -> tuple[Tensor, ...]:
    inputs, options = _unflatten(arguments)
    outputs = _empty_outputs(inputs, options)
    return tuple(outputs if options.per_row else outputs._replace(loss=outputs.loss.new_empty(())))


def _empty_outputs(inputs: _Inputs, options: _Options) -> _Outputs:
    """Allocate the outputs, with a loss per row; dW and db are sums and start at 0.

    A loss per row has an upstream gradient per row. Rows of dX can be scaled by it afterwards; dW and db, which are
    sums over rows, cannot, so with `per_row` backward computes these two.
    """
    hidden_ND, weight_VD = inputs.hidden_ND, inputs.weight_VD
    num_rows, wide = inputs.labels_M.shape[0], accumulator(options.dtype)
    num_stats = num_rows if options.stats else 0
    sums = not options.per_row
    return _Outputs(
        hidden_ND.new_empty(num_rows, dtype=wide),
        hidden_ND.new_empty(num_rows, dtype=wide),
        hidden_ND.new_empty(num_stats, dtype=wide),
        hidden_ND.new_empty(num_stats, dtype=torch.bool),
        hidden_ND.new_empty((num_rows, hidden_ND.shape[1]) if options.hidden_grad else 0, dtype=options.dtype),
        weight_VD.new_zeros(weight_VD.shape if options.weight_grad and sums else 0, dtype=wide),
        weight_VD.new_zeros(weight_VD.shape[0] if options.bias_grad and sums else 0, dtype=wide),
    )


def _forward(inputs: _Inputs, options: _Options) -> _Outputs:
    outputs = _empty_outputs(inputs, options)
    hidden_ND, weight_VD, bias_V, rows_M, labels_M, token_weights_M = inputs
    dtype, num_rows, V = options.dtype, labels_M.shape[0], weight_VD.shape[0]
    decision = decide("cross_entropy", hidden_ND.device, dtype, requested=options.backend)
    formula = Formula(options.label_smoothing, options.z_loss, options.softcap, options.logit_scale)
    chunk_rows = options.chunk_rows or default_chunk_rows(
        V, dtype, hidden_ND.device.type, options.workspace_bytes, head_trains=options.weight_grad
    )
    gradients = HeadGradients(
        outputs.dX_MD if options.hidden_grad else None,
        outputs.dW_VD if options.weight_grad and not options.per_row else None,
        outputs.db_V if options.bias_grad and not options.per_row else None,
    )
    with without_autocast(hidden_ND.device.type):
        # Cast once, not once a chunk; no copy where the dtype is right already.
        weight_VD = weight_VD.to(dtype)
        bias_V = None if bias_V is None else bias_V.to(dtype)
        buffer_CV = logits_buffer(min(chunk_rows, num_rows), V, weight_VD, aligned=decision.backend != "torch")
        for start in range(0, num_rows, chunk_rows):
            chunk = slice(start, min(start + chunk_rows, num_rows))
            x_CD = hidden_ND[chunk] if rows_M is None else hidden_ND.index_select(0, rows_M[chunk])
            x_CD = x_CD.to(dtype)
            logits_CV = project(x_CD, weight_VD, bias_V, out=buffer_CV[: x_CD.shape[0]])
            rows = LogitRows(
                logits_NV=logits_CV,
                labels_N=labels_M[chunk],
                token_weights_N=None if token_weights_M is None else token_weights_M[chunk],
                loss_N=outputs.loss[chunk],
                lse_N=outputs.lse_M[chunk],
                entropy_N=outputs.entropy_M[chunk] if options.stats else None,
                correct_N=outputs.correct_M[chunk] if options.stats else None,
                grad_NV=logits_CV if gradients.any_wanted else None,
            )
            fill(rows, formula, decision)
            gradients.add_(chunk, logits_CV, x_CD, weight_VD)
    return outputs if options.per_row else outputs._replace(loss=outputs.loss.sum())


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    tensors, options = _unflatten(inputs)
    hidden_ND, weight_VD, bias_V, rows_M, labels_M, token_weights_M = tensors
    ctx.options, ctx.num_rows = options, hidden_ND.shape[0]
    ctx.dtypes = (hidden_ND.dtype, weight_VD.dtype, None if bias_V is None else bias_V.dtype)
    ctx.recomputes = options.per_row and (options.weight_grad or options.bias_grad)
    recomputed = (hidden_ND, weight_VD, bias_V, labels_M, token_weights_M) if ctx.recomputes else ()
    ctx.save_for_backward(rows_M, *output[4:], *recomputed)
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)


@differentiable_once
def _differentiate(ctx: Any, grad_loss: Tensor | None, *_: Any) -> Any:
    options: _Options = ctx.options
    rows_M, dX_MD, dW_VD, db_V, *recomputed = ctx.saved_tensors
    no_grads = (None,) * (len(options) + 3)
    if grad_loss is None:
        return None, None, None, *no_grads
    if ctx.recomputes:
        hidden_ND, weight_VD, bias_V, labels_M, token_weights_M = recomputed
        weights_M = grad_loss if token_weights_M is None else grad_loss * token_weights_M
        sums_only = options._replace(per_row=False, stats=False, hidden_grad=False)
        *_, dW_VD, db_V = _op(hidden_ND, weight_VD, bias_V, rows_M, labels_M, weights_M, *sums_only)
    hidden_dtype, weight_dtype, bias_dtype = ctx.dtypes
    factor = grad_loss[:, None] if options.per_row else grad_loss.view(1, 1)
    sum_factor = factor.new_ones(1, 1) if options.per_row else factor
    return (
        scatter(scaled(dX_MD, factor, hidden_dtype), rows_M, ctx.num_rows) if options.hidden_grad else None,
        scaled(dW_VD, sum_factor, weight_dtype) if options.weight_grad else None,
        scaled(db_V, sum_factor.view(1), bias_dtype) if options.bias_grad else None,
        *no_grads,
    )


_op.register_autograd(_differentiate, setup_context=_save)
