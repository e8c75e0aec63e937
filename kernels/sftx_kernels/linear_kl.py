"""`linear_kl` computes how far a student's distribution is from a teacher's, from the hidden states of both.

For a row with the student's raw logits a and the teacher's raw logits b, label y, token weight w and temperature t:

    z    = softcap * tanh(logit_scale * a / softcap)          u likewise from b, by the teacher's own numbers
    p    = softmax(z / t)                                     q = softmax(u / t)
    m    = beta * q + (1 - beta) * p
    D    = beta * KL(q || m) + (1 - beta) * KL(p || m)        KL(q || p) for beta = 0, KL(p || q) for beta = 1
    loss = w * ((1 - alpha) * D + alpha * (lse(z) - z_y))

D is the generalised Jensen-Shannon divergence of Agarwal et al. (arXiv:2306.13649, equation 1). By their convention,
which TRL and Liger share, its ends are the forward and the reverse KL divergence. It is not multiplied by t^2, as it is
by Hinton et al. (arXiv:1503.02531); TRL and Liger do not either.

Of a teacher whose k largest log-probabilities of each row were stored, all other classes count as one: D is that of the
k probabilities and their rest, which is at most the D of all classes (the data-processing inequality), and equal to it
for k = V. A rest under 2^-24, which fp32 cannot tell from 0, counts as 2^-24.

The gradient of D by the logits z is, with the means over classes weighted by p:

    (p - q) / t                for beta = 0
    p * (g - mean(g)) / t      else, with g = log(p / q) for beta = 1, and g = (1 - beta) * log(p / m) between

Shape suffixes: N rows (tokens), M rows that are not ignored, C rows of a chunk, S rows of a slice, D hidden, H hidden
of the teacher, V vocabulary, K stored log-probabilities, G classes that are told apart: V, or K and their rest.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Final, NamedTuple

import torch
from torch import Tensor

from sftx_kernels.checks import (
    check_count,
    check_tensor,
    differentiable_once,
    error,
    gemm_dtype,
    is_number,
    without_autocast,
)
from sftx_kernels.cross_entropy import IGNORE_INDEX, check_loss_options, check_token_weights, slice_rows
from sftx_kernels.dispatch import Decision, decide
from sftx_kernels.gemm import accumulator, project
from sftx_kernels.head import HeadGradients, default_chunk_rows, logits_buffer, scaled, scatter, take, valid_rows


class TeacherHead(NamedTuple):
    """The teacher as a model: what its head reads, and its head. Nothing of it gets a gradient.

    Its hidden size may differ from the student's, its vocabulary may not.
    """

    hidden_NH: Tensor
    weight_VH: Tensor
    bias_V: Tensor | None = None
    softcap: float | None = None
    logit_scale: float = 1.0


class TopK(NamedTuple):
    """The teacher as stored numbers: its k largest log-probabilities and their classes, for each row not ignored.

    log_probs_MK: floating, in nats, of its distribution at the temperature of the loss.
    ids_MK: int64, in [0, V), each once in a row; a class outside is refused on CPU.
    """

    log_probs_MK: Tensor
    ids_MK: Tensor


class LinearKLOutput(NamedTuple):
    """This is the result of `linear_kl`. Its floats are fp32, or fp64 for fp64 input.

    loss: 0-d, the sum over rows; the only field that carries a gradient.
    num_tokens: the number of rows that are not ignored, unweighted; an int on the host, so reading it never syncs.
    divergence_N: D of each row in nats, unweighted, 0 at ignored rows.
    nll_N, correct_N: None unless `stats=True`: the negative log-likelihood of the label (at temperature 1) in nats, and
        whether the label is the student's most likely class (bool); 0 and False at ignored rows.
    """

    loss: Tensor
    num_tokens: int
    divergence_N: Tensor
    nll_N: Tensor | None = None
    correct_N: Tensor | None = None


def linear_kl(
    hidden_ND: Tensor,
    weight_VD: Tensor,
    labels_N: Tensor,
    teacher: TeacherHead | TopK,
    *,
    bias_V: Tensor | None = None,
    token_weights_N: Tensor | None = None,
    num_valid: int | None = None,
    beta: float = 0.0,
    temperature: float = 1.0,
    alpha: float = 0.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    ignore_index: int = IGNORE_INDEX,
    chunk_rows: int | None = None,
    workspace_bytes: int | None = None,
    stats: bool = False,
    backend: str | None = None,
) -> LinearKLOutput:
    """Return the divergence of a student from its teacher, holding at most one chunk of the logits of each.

    Rows whose label is `ignore_index` are removed before the heads' products and cost nothing. The forward pass goes
    over the others chunk by chunk and computes the loss and whichever gradients will be asked for; backward only scales
    them. The formula, with its sources, is at the top of this module. Differentiable once, in reverse mode.

    Args:
        hidden_ND, weight_VD, bias_V: of the student, as those of `linear_cross_entropy`.
        labels_N: int64; they say which rows count, and with `alpha` are learnt as well.
        teacher: a `TeacherHead`, whose tensors have the dtype of the student's or, under autocast, any; or a `TopK`.
        token_weights_N: floating; scales the whole loss of a row. Gets no gradient.
        num_valid: how many labels are not `ignore_index`, as for `linear_cross_entropy`.
        beta: 0 is KL(teacher || student), 1 is KL(student || teacher), between them the generalised JSD.
        temperature: divides the logits of both for D; not for the cross-entropy.
        alpha: weight of the cross-entropy on the labels, in [0, 1]; D has the weight 1 - alpha.
        softcap, logit_scale: of the student.
        chunk_rows: as for `linear_cross_entropy`; fewer where the logits of both would not fit `workspace_bytes`.
        stats: return also `nll_N` and `correct_N`, detached.
        backend: of the pass over the logits; see `sftx_kernels.dispatch`. With a `TopK` it is plain torch everywhere.

    A class that only one of the two has at -inf makes an infinite D where that is its value.

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
    _check_teacher(teacher, num_rows, V, hidden_ND, backend)
    check_token_weights(token_weights_N, num_rows, hidden_ND)
    check_loss_options(0.0, 0.0, softcap, logit_scale, ignore_index, "sum")
    _check_options(beta, temperature, alpha)
    check_count("chunk_rows", chunk_rows, 1)
    check_count("num_valid", num_valid, 0, num_rows)
    check_count("workspace_bytes", workspace_bytes, 0)
    dtype = gemm_dtype(hidden_ND)
    row_bytes = V * dtype.itemsize * (2 if isinstance(teacher, TeacherHead) else 1)
    if workspace_bytes is not None and workspace_bytes < row_bytes:
        raise error("workspace_bytes", f"at least {row_bytes}, one row of logits of each model", workspace_bytes)

    rows_M: Tensor | None = valid_rows(labels_N, num_valid, ignore_index, V)
    assert rows_M is not None
    num_tokens = rows_M.shape[0]
    if num_tokens == num_rows:
        rows_M = None
    wide = accumulator(dtype)
    if token_weights_N is not None:
        token_weights_N = take(token_weights_N, rows_M).to(wide)
    wants_grad = [
        torch.is_grad_enabled() and tensor is not None and tensor.requires_grad
        for tensor in (hidden_ND, weight_VD, bias_V)
    ]
    top_MK: tuple[Tensor | None, Tensor | None] = (None, None)
    if isinstance(teacher, TopK):
        _check_top_k(teacher, num_tokens, V, hidden_ND)
        top_MK = teacher.log_probs_MK.to(wide), teacher.ids_MK
        teacher_NH, teacher_VH, teacher_V, teacher_softcap, teacher_scale = None, None, None, None, 1.0
    else:
        teacher_NH, teacher_VH, teacher_V, teacher_softcap, teacher_scale = teacher
    inputs = _Inputs(
        hidden_ND, weight_VD, bias_V, rows_M, take(labels_N, rows_M), token_weights_N, teacher_NH,
        teacher_VH, teacher_V, *top_MK,
    )  # fmt: skip
    options = _Options(
        beta, temperature, alpha, softcap, logit_scale, teacher_softcap, teacher_scale, chunk_rows, workspace_bytes,
        dtype, stats, backend, *wants_grad,
    )  # fmt: skip
    loss, divergence_M, nll_M, correct_M = _op(*inputs, *options)[:4]
    divergence_N = scatter(divergence_M.detach(), rows_M, num_rows)
    if not stats:
        return LinearKLOutput(loss, num_tokens, divergence_N)
    nll_N, correct_N = (scatter(stat.detach(), rows_M, num_rows) for stat in (nll_M, correct_M))
    return LinearKLOutput(loss, num_tokens, divergence_N, nll_N, correct_N)


def _check_teacher(teacher: TeacherHead | TopK, num_rows: int, V: int, like: Tensor, backend: str | None) -> None:
    if isinstance(teacher, TeacherHead):
        check_tensor("teacher.hidden_NH", teacher.hidden_NH, (num_rows, "H"), like, like.dtype)
        H = teacher.hidden_NH.shape[1]
        check_tensor("teacher.weight_VH", teacher.weight_VH, (V, H), like, like.dtype)
        if teacher.bias_V is not None:
            check_tensor("teacher.bias_V", teacher.bias_V, (V,), like, like.dtype)
        if teacher.softcap is not None and not (is_number(teacher.softcap) and teacher.softcap > 0):
            raise error("teacher.softcap", "None or a number > 0", teacher.softcap)
        if not is_number(teacher.logit_scale):
            raise error("teacher.logit_scale", "a finite number", teacher.logit_scale)
    elif not isinstance(teacher, TopK):
        raise error("teacher", "a TeacherHead or a TopK", type(teacher).__name__)
    elif backend == "triton":
        raise error("backend", "'torch' for stored log-probabilities, which have no kernel", "'triton'")


def _check_top_k(teacher: TopK, num_tokens: int, V: int, like: Tensor) -> None:
    check_tensor("teacher.log_probs_MK", teacher.log_probs_MK, (num_tokens, "K"), like, None)
    K = teacher.log_probs_MK.shape[1]
    if not 1 <= K <= V:
        raise error("teacher.log_probs_MK", f"1 to {V} columns", f"{K} columns")
    check_tensor("teacher.ids_MK", teacher.ids_MK, (num_tokens, K), like, torch.int64)


def _check_options(beta: float, temperature: float, alpha: float) -> None:
    for name, value in (("beta", beta), ("alpha", alpha)):
        if not (is_number(value) and 0 <= value <= 1):
            raise error(name, "a number in [0, 1]", value)
    if not (is_number(temperature) and temperature > 0):
        raise error("temperature", "a number > 0", temperature)


# ---- the operation and its autograd


class _Inputs(NamedTuple):
    """_Inputs holds the tensors of a call, with ignored rows removed where the suffix says so."""

    hidden_ND: Tensor
    weight_VD: Tensor
    bias_V: Tensor | None
    rows_M: Tensor | None  # None: no row is ignored
    labels_M: Tensor
    token_weights_M: Tensor | None
    teacher_hidden_NH: Tensor | None  # a TeacherHead has these three, a TopK the last two
    teacher_weight_VH: Tensor | None
    teacher_bias_V: Tensor | None
    log_probs_MK: Tensor | None
    ids_MK: Tensor | None


class _Options(NamedTuple):
    """_Options holds the other arguments of a call. The torch operation takes them flat, after the `_Inputs`."""

    beta: float
    temperature: float
    alpha: float
    softcap: float | None
    logit_scale: float
    teacher_softcap: float | None
    teacher_logit_scale: float
    chunk_rows: int | None
    workspace_bytes: int | None
    dtype: torch.dtype  # of the products
    stats: bool
    backend: str | None
    hidden_grad: bool
    weight_grad: bool
    bias_grad: bool

    @property
    def formula(self) -> Formula:
        return Formula(
            self.beta, self.temperature, self.alpha, self.softcap, self.logit_scale, self.teacher_softcap,
            self.teacher_logit_scale,
        )  # fmt: skip


class _Outputs(NamedTuple):
    """_Outputs holds the results of the operation; those that are not requested are empty.

    The gradients are for an upstream gradient of 1; dW and db have the accumulator's dtype.
    """

    loss: Tensor
    divergence_M: Tensor
    nll_M: Tensor
    correct_M: Tensor
    dX_MD: Tensor
    dW_VD: Tensor
    db_V: Tensor


_SCHEMA: Final = (
    "(Tensor hidden_ND, Tensor weight_VD, Tensor? bias_V, Tensor? rows_M, Tensor labels_M, Tensor? token_weights_M, "
    "Tensor? teacher_hidden_NH, Tensor? teacher_weight_VH, Tensor? teacher_bias_V, Tensor? log_probs_MK, "
    "Tensor? ids_MK, float beta, float temperature, float alpha, float? softcap, float logit_scale, "
    "float? teacher_softcap, float teacher_logit_scale, SymInt? chunk_rows, SymInt? workspace_bytes, "
    "ScalarType dtype, bool stats, str? backend, bool hidden_grad, bool weight_grad, bool bias_grad) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)"
)


def _unflatten(arguments: tuple[Any, ...]) -> tuple[_Inputs, _Options]:
    num_inputs = len(_Inputs._fields)
    return _Inputs(*arguments[:num_inputs]), _Options(*arguments[num_inputs:])


@torch.library.custom_op("sftx::linear_kl", mutates_args=(), schema=_SCHEMA)
def _op(*arguments: Any) -> tuple[Tensor, ...]:
    return tuple(_forward(*_unflatten(arguments)))


@_op.register_fake
def _(*arguments: Any) -> tuple[Tensor, ...]:
    return tuple(_empty_outputs(*_unflatten(arguments)))


def _empty_outputs(inputs: _Inputs, options: _Options) -> _Outputs:
    """Allocate the outputs; dW and db are sums and start at 0."""
    hidden_ND, weight_VD = inputs.hidden_ND, inputs.weight_VD
    num_rows, wide = inputs.labels_M.shape[0], accumulator(options.dtype)
    return _Outputs(
        hidden_ND.new_empty((), dtype=wide),
        hidden_ND.new_empty(num_rows, dtype=wide),
        hidden_ND.new_empty(num_rows if options.stats or options.alpha else 0, dtype=wide),
        hidden_ND.new_empty(num_rows if options.stats else 0, dtype=torch.bool),
        hidden_ND.new_empty((num_rows, hidden_ND.shape[1]) if options.hidden_grad else 0, dtype=options.dtype),
        weight_VD.new_zeros(weight_VD.shape if options.weight_grad else 0, dtype=wide),
        weight_VD.new_zeros(weight_VD.shape[0] if options.bias_grad else 0, dtype=wide),
    )


def _forward(inputs: _Inputs, options: _Options) -> _Outputs:
    outputs = _empty_outputs(inputs, options)
    dtype, num_rows, V = options.dtype, inputs.labels_M.shape[0], inputs.weight_VD.shape[0]
    device, has_head = inputs.hidden_ND.device, inputs.teacher_hidden_NH is not None
    if (ids_MK := inputs.ids_MK) is not None and ids_MK.is_cpu and ((ids_MK < 0) | (ids_MK >= V)).any():
        raise error("teacher.ids_MK", f"classes in [0, {V})", int(ids_MK[(ids_MK < 0) | (ids_MK >= V)][0]))
    decision = decide("linear_kl", device, dtype, requested=options.backend if has_head else "torch")
    workspace_bytes = options.workspace_bytes
    if workspace_bytes is not None and has_head:
        workspace_bytes //= 2
    chunk_rows = options.chunk_rows or default_chunk_rows(
        V, dtype, device.type, workspace_bytes, head_trains=options.weight_grad
    )
    gradients = HeadGradients(
        outputs.dX_MD if options.hidden_grad else None,
        outputs.dW_VD if options.weight_grad else None,
        outputs.db_V if options.bias_grad else None,
    )

    def cast(tensor: Tensor | None) -> Tensor | None:
        return None if tensor is None else tensor.to(dtype)

    def part(tensor_M: Tensor | None, chunk: slice) -> Tensor | None:
        return None if tensor_M is None else tensor_M[chunk]

    def rows_of(tensor_ND: Tensor, chunk: slice) -> Tensor:
        rows_M = inputs.rows_M
        return (tensor_ND[chunk] if rows_M is None else tensor_ND.index_select(0, rows_M[chunk])).to(dtype)

    with without_autocast(device.type):
        # Cast once, not once a chunk; no copy where the dtype is right already.
        weight_VD, bias_V = inputs.weight_VD.to(dtype), cast(inputs.bias_V)
        teacher_weight_VH, teacher_bias_V = cast(inputs.teacher_weight_VH), cast(inputs.teacher_bias_V)
        buffers = [
            logits_buffer(min(chunk_rows, num_rows), V, weight_VD, aligned=decision.backend != "torch")
            for _ in range(1 + has_head)
        ]
        for start in range(0, num_rows, chunk_rows):
            chunk = slice(start, min(start + chunk_rows, num_rows))
            x_CD = rows_of(inputs.hidden_ND, chunk)
            logits_CV = project(x_CD, weight_VD, bias_V, out=buffers[0][: x_CD.shape[0]])
            teacher_CV = None
            if inputs.teacher_hidden_NH is not None and teacher_weight_VH is not None:
                teacher_CH = rows_of(inputs.teacher_hidden_NH, chunk)
                teacher_CV = project(teacher_CH, teacher_weight_VH, teacher_bias_V, out=buffers[1][: x_CD.shape[0]])
            rows = LogitRows(
                logits_NV=logits_CV,
                teacher_NV=teacher_CV,
                log_probs_NK=part(inputs.log_probs_MK, chunk),
                ids_NK=part(inputs.ids_MK, chunk),
                labels_N=inputs.labels_M[chunk],
                token_weights_N=part(inputs.token_weights_M, chunk),
                divergence_N=outputs.divergence_M[chunk],
                nll_N=outputs.nll_M[chunk] if options.stats or options.alpha else None,
                correct_N=outputs.correct_M[chunk] if options.stats else None,
                wants_gradient=gradients.any_wanted,
                has_barred=bias_V is not None or teacher_bias_V is not None,
            )
            fill(rows, options.formula, decision)
            gradients.add_(chunk, logits_CV, x_CD, weight_VD)
    loss_M = outputs.divergence_M * (1 - options.alpha)
    if options.alpha:
        loss_M.add_(outputs.nll_M, alpha=options.alpha)
    if inputs.token_weights_M is not None:
        loss_M.mul_(inputs.token_weights_M)
    return outputs._replace(loss=loss_M.sum())


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    tensors, options = _unflatten(inputs)
    ctx.options, ctx.num_rows = options, tensors.hidden_ND.shape[0]
    ctx.dtypes = (
        tensors.hidden_ND.dtype, tensors.weight_VD.dtype, None if tensors.bias_V is None else tensors.bias_V.dtype
    )  # fmt: skip
    ctx.save_for_backward(tensors.rows_M, *output[4:])
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)


@differentiable_once
def _differentiate(ctx: Any, grad_loss: Tensor | None, *_: Any) -> Any:
    options: _Options = ctx.options
    rows_M, dX_MD, dW_VD, db_V = ctx.saved_tensors
    no_grads = (None,) * (len(_Inputs._fields) - 3 + len(options))
    if grad_loss is None:
        return None, None, None, *no_grads
    hidden_dtype, weight_dtype, bias_dtype = ctx.dtypes
    factor = grad_loss.view(1, 1)
    return (
        scatter(scaled(dX_MD, factor, hidden_dtype), rows_M, ctx.num_rows) if options.hidden_grad else None,
        scaled(dW_VD, factor, weight_dtype) if options.weight_grad else None,
        scaled(db_V, factor.view(1), bias_dtype) if options.bias_grad else None,
        *no_grads,
    )


_op.register_autograd(_differentiate, setup_context=_save)


# ---- one call on rows of logits


class Formula(NamedTuple):
    """A Formula holds the numbers of the loss."""

    beta: float = 0.0
    temperature: float = 1.0
    alpha: float = 0.0
    softcap: float | None = None
    logit_scale: float = 1.0
    teacher_softcap: float | None = None
    teacher_logit_scale: float = 1.0


@dataclass(frozen=True)
class LogitRows:
    """LogitRows holds rows of logits and the outputs to fill, on one device; an output that is None is not computed."""

    logits_NV: Tensor  # floating, stride 1 along V; become the gradient of the loss if `wants_gradient`
    teacher_NV: Tensor | None  # as the logits; None where log-probabilities were stored
    log_probs_NK: Tensor | None  # fp32, or fp64 for fp64 logits, as all floats below
    ids_NK: Tensor | None
    labels_N: Tensor  # int64
    token_weights_N: Tensor | None
    divergence_N: Tensor
    nll_N: Tensor | None
    correct_N: Tensor | None  # bool; only with nll_N
    wants_gradient: bool
    has_barred: bool  # a logit may be -inf


def fill(rows: LogitRows, formula: Formula, decision: Decision) -> None:
    """Compute the outputs of `rows` with the backend of `decision`."""
    if decision.backend == "torch" or rows.teacher_NV is None:
        num_rows, V = rows.logits_NV.shape
        step = max(1, slice_rows(rows.logits_NV.device.type, num_rows, V) // 2)
        for start in range(0, num_rows, step):
            _fill_slice(rows, slice(start, start + step), formula)
        return
    from sftx_kernels.triton.launch import chip_of
    from sftx_kernels.triton.linear_kl import launch

    launch(
        rows.logits_NV, rows.teacher_NV, rows.labels_N, rows.divergence_N, chip_of(rows.logits_NV.device),
        token_weights_N=rows.token_weights_N, nll_N=rows.nll_N, correct_N=rows.correct_N,
        wants_gradient=rows.wants_gradient, has_barred=rows.has_barred, **formula._asdict(),
    ).run()  # fmt: skip


# ---- the plain-torch implementation


def _fill_slice(rows: LogitRows, chosen: slice, formula: Formula) -> None:
    """Fill the outputs of the `chosen` rows."""
    wide, temperature, alpha = rows.divergence_N.dtype, formula.temperature, formula.alpha
    z_SV, softcap_slope_SV = _final_logits(rows.logits_NV[chosen], formula.logit_scale, formula.softcap, wide)
    log_p_SV = torch.log_softmax(z_SV if temperature == 1 else z_SV / temperature, 1, dtype=wide)
    labels_S = rows.labels_N[chosen]
    plain_SV = None  # log-probabilities at temperature 1
    if rows.nll_N is not None:
        if rows.correct_N is not None:
            rows.correct_N[chosen] = z_SV.argmax(1) == labels_S
        plain_SV = log_p_SV.clone() if temperature == 1 else torch.log_softmax(z_SV, 1, dtype=wide)
        rows.nll_N[chosen] = -plain_SV.gather(1, labels_S[:, None]).squeeze(1)
    del z_SV
    if rows.teacher_NV is not None:
        u_SV, _ = _final_logits(rows.teacher_NV[chosen], formula.teacher_logit_scale, formula.teacher_softcap, wide)
        log_q_SV = torch.log_softmax(u_SV if temperature == 1 else u_SV / temperature, 1, dtype=wide)
        del u_SV
        divergence_S, grad_SV = _divergence(log_p_SV, log_q_SV, formula.beta, has_barred=rows.has_barred)
    else:
        assert rows.log_probs_NK is not None and rows.ids_NK is not None  # noqa: PT018
        divergence_S, grad_SV = _top_k_divergence(
            log_p_SV, rows.log_probs_NK[chosen], rows.ids_NK[chosen], formula.beta
        )
    rows.divergence_N[chosen] = divergence_S
    if not rows.wants_gradient:
        return
    grad_SV.mul_((1 - alpha) / temperature)
    if alpha:
        assert plain_SV is not None
        log_p_S1 = plain_SV.gather(1, labels_S[:, None])
        # At the label, p - 1 keeps its digits where p is close to 1.
        label_grad_S1 = grad_SV.gather(1, labels_S[:, None]).add_(torch.expm1(log_p_S1), alpha=alpha)
        grad_SV.add_(plain_SV.exp_(), alpha=alpha).scatter_(1, labels_S[:, None], label_grad_S1)
    if rows.token_weights_N is not None:
        grad_SV.mul_((rows.token_weights_N[chosen] * formula.logit_scale)[:, None])
    elif formula.logit_scale != 1:
        grad_SV.mul_(formula.logit_scale)
    if softcap_slope_SV is not None:
        grad_SV.mul_(softcap_slope_SV)
    rows.logits_NV[chosen] = grad_SV.to(rows.logits_NV.dtype)


def _final_logits(
    raw_SV: Tensor, logit_scale: float, softcap: float | None, wide: torch.dtype
) -> tuple[Tensor, Tensor | None]:
    """Return the logits with scale and soft cap, and the slope of the cap, if there is one. `raw_SV` is kept."""
    if logit_scale != 1:
        raw_SV = raw_SV.to(wide) * logit_scale
    if softcap is None:
        return raw_SV, None
    t_SV = (raw_SV.to(wide) / softcap).tanh_()
    slope_SV = t_SV.square().neg_().add_(1)
    return t_SV.mul_(softcap), slope_SV


def _divergence(log_p_SG: Tensor, log_q_SG: Tensor, beta: float, *, has_barred: bool) -> tuple[Tensor, Tensor]:
    """Return D of each row and its gradient by the logits of p, [S, G]. Both arguments are overwritten.

    A class of probability 0 adds nothing, which `has_barred` makes true where its logarithm is -inf.
    """
    if beta == 0:
        q_SG = log_q_SG.exp()
        log_ratio_SG = log_q_SG.sub_(log_p_SG)
        if has_barred:
            log_ratio_SG.nan_to_num_(nan=0, posinf=math.inf, neginf=0)
        return log_ratio_SG.mul_(q_SG).sum(1), log_p_SG.exp_().sub_(q_SG)
    p_SG = log_p_SG.exp()
    if beta == 1:
        log_ratio_SG = log_p_SG.sub_(log_q_SG)
        if has_barred:
            log_ratio_SG.nan_to_num_(nan=0, posinf=math.inf, neginf=0)
        divergence_S = (p_SG * log_ratio_SG).sum(1)
        return divergence_S, log_ratio_SG.sub_(divergence_S[:, None]).mul_(p_SG)
    q_SG = log_q_SG.exp()
    log_ratio_SG = log_q_SG.sub_(log_p_SG)
    if has_barred:
        log_ratio_SG.nan_to_num_(nan=0)
    # Beyond this, one of the two probabilities is so much smaller that its share is 0 in this dtype.
    limit = 700 if p_SG.dtype == torch.float64 else 80
    log_ratio_SG.clamp_(-limit, limit)
    log_m_over_p_SG = torch.expm1(log_ratio_SG, out=log_p_SG).mul_(beta).log1p_()
    mean_S = (p_SG * log_m_over_p_SG).sum(1)
    log_q_over_m_SG = log_ratio_SG.sub_(log_m_over_p_SG)
    divergence_S = beta * log_q_over_m_SG.mul_(q_SG).sum(1) - (1 - beta) * mean_S
    return divergence_S, log_m_over_p_SG.sub_(mean_S[:, None]).mul_(beta - 1).mul_(p_SG)


def _top_k_divergence(log_p_SV: Tensor, log_q_SK: Tensor, ids_SK: Tensor, beta: float) -> tuple[Tensor, Tensor]:
    """Return D of stored classes and their rest, and its gradient by all logits, [S, V]. `log_p_SV` is overwritten."""
    log_p_SG, log_q_SG = log_p_SV.gather(1, ids_SK), log_q_SK
    if ids_SK.shape[1] == log_p_SV.shape[1]:
        divergence_S, grad_SG = _divergence(log_p_SG, log_q_SG.clone(), beta, has_barred=True)
        return divergence_S, log_p_SV.scatter_(1, ids_SK, grad_SG)
    others_SV = log_p_SV.scatter_(1, ids_SK, -math.inf)
    log_p_rest_S1 = others_SV.logsumexp(1, keepdim=True)
    rest_S1 = (1 - log_q_SK.exp().sum(1, keepdim=True)).clamp_(min=2**-24)
    log_p_SG, log_q_SG = torch.cat((log_p_SG, log_p_rest_S1), 1), torch.cat((log_q_SK, rest_S1.log_()), 1)
    divergence_S, grad_SG = _divergence(log_p_SG, log_q_SG, beta, has_barred=True)
    # A class of the rest gets its share of the rest's gradient.
    grad_SV = others_SV.sub_(log_p_rest_S1).exp_().mul_(grad_SG[:, -1:])
    return divergence_S, grad_SV.scatter_(1, ids_SK, grad_SG[:, :-1])
