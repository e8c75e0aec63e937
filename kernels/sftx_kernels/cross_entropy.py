"""`cross_entropy` is for logits that exist already; `linear_cross_entropy` never materialises them.

For a row of logits a with label y, token weight w and label smoothing s:

    z    = softcap * tanh(logit_scale * a / softcap)            Gemma 2 (arXiv:2408.00118), section 2
    loss = w * ((1 - s) * (lse(z) - z_y) + s * (lse(z) - mean(z)) + z_loss * lse(z)^2)

with the smoothing of Szegedy et al. (arXiv:1512.00567), section 7, as in torch's cross_entropy, and the z-loss of PaLM
(arXiv:2204.02311), section 5. `fill` computes it in plain torch (below) or with `triton.cross_entropy`.

Shape suffixes: N rows (tokens), M rows that are not ignored, S rows of a slice, V vocabulary.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any, Final, Literal, NamedTuple

import torch
from torch import Tensor

from sftx_kernels.checks import check_tensor, differentiable_once, error, is_number
from sftx_kernels.dispatch import Decision, decide
from sftx_kernels.gemm import accumulator

IGNORE_INDEX: Final = -100


class CrossEntropyOutput(NamedTuple):
    """This is the result of `cross_entropy`. Its floats are fp32, or fp64 for fp64 logits.

    loss: 0-d (`reduction="sum"`), or [N] with 0 at ignored rows (`"none"`); the only field that carries a gradient.
    num_tokens: the number of rows that are not ignored, unweighted; 0-d int64 on the device, so that nothing syncs.
    lse_N, entropy_N, correct_N: None unless `stats=True`; see there.
    """

    loss: Tensor
    num_tokens: Tensor
    lse_N: Tensor | None = None
    entropy_N: Tensor | None = None
    correct_N: Tensor | None = None


def cross_entropy(
    logits_NV: Tensor,
    labels_N: Tensor,
    *,
    token_weights_N: Tensor | None = None,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    ignore_index: int = IGNORE_INDEX,
    reduction: Literal["sum", "none"] = "sum",
    stats: bool = False,
    inplace: bool = False,
    backend: str | None = None,
) -> CrossEntropyOutput:
    """Return the cross-entropy of each row; the formula, with its sources, is at the top of this module.

    Forward reads the logits once, backward reads them once and writes the gradient; ignored rows are not read,
    and their gradient is 0. Differentiable once, in reverse mode.

    Args:
        logits_NV: floating, any strides; copied if the stride along V is not 1. Softmax and loss run in fp32
            (fp64 for fp64).
        labels_N: int64. A label outside [0, V) is refused on CPU, and anywhere if SFTX_CHECK_LABELS=1;
            otherwise looking would sync.
        token_weights_N: floating; scales the whole loss of a row. Gets no gradient.
        stats: return also, detached and with 0 or False at ignored rows: lse_N of the final logits z;
            entropy_N of their softmax, in nats; correct_N (bool), whether the label is their argmax.
        inplace: make the gradient in forward, over the logits, whose values are then lost: one reading and one
            writing in all. Backward may run once. Under torch.compile it has no effect.
        backend: see `sftx_kernels.dispatch`.

    Raises:
        ValueError: names the argument, what was expected and what was got.
    """
    check_tensor("logits_NV", logits_NV, ("N", "V"), logits_NV, None)
    num_rows, V = logits_NV.shape
    if V == 0:
        raise error("logits_NV", "at least one column", f"shape {list(logits_NV.shape)}")
    check_tensor("labels_N", labels_N, (num_rows,), logits_NV, torch.int64)
    check_token_weights(token_weights_N, num_rows, logits_NV)
    check_loss_options(label_smoothing, z_loss, softcap, logit_scale, ignore_index, reduction)
    if token_weights_N is not None:
        token_weights_N = token_weights_N.to(accumulator(logits_NV.dtype))
    formula = Formula(label_smoothing, z_loss, softcap, logit_scale, ignore_index)
    arguments = (logits_NV, labels_N, token_weights_N, *formula, stats, backend)
    if inplace and torch.is_grad_enabled() and logits_NV.requires_grad and not torch.compiler.is_compiling():
        across, along = logits_NV.stride()
        if logits_NV.is_leaf:
            raise error("logits_NV", "no leaf, whose values would be lost, where inplace=True", "a leaf")
        if (V > 1 and along != 1) or (num_rows > 1 and across < V):
            raise error("logits_NV", f"strides [>= {V}, 1] where inplace=True", f"strides {[across, along]}")
        loss_N, lse_N, entropy_N, correct_N = _InPlace.apply(*arguments)  # type: ignore[no-untyped-call]
    else:
        loss_N, lse_N, entropy_N, correct_N = _forward(*arguments)
    loss = loss_N if reduction == "none" else loss_N.sum()
    num_tokens = (labels_N != ignore_index).sum()
    if not stats:
        return CrossEntropyOutput(loss, num_tokens)
    return CrossEntropyOutput(loss, num_tokens, lse_N.detach(), entropy_N.detach(), correct_N)


# ---- checks, shared with linear_cross_entropy


def check_token_weights(token_weights_N: Tensor | None, num_rows: int, like: Tensor) -> None:
    if token_weights_N is not None:
        check_tensor("token_weights_N", token_weights_N, (num_rows,), like, None)
        if token_weights_N.requires_grad:
            raise error("token_weights_N", "requires_grad=False", "requires_grad=True")


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
    """Check that labels are in [0, num_classes); on an accelerator only if SFTX_CHECK_LABELS=1, because it syncs."""
    if not (labels_N.is_cpu or os.environ.get("SFTX_CHECK_LABELS") == "1"):
        return
    wrong_N = (labels_N != ignore_index) & ((labels_N < 0) | (labels_N >= num_classes))
    if wrong_N.any():
        row = int(wrong_N.nonzero()[0])
        raise error("labels_N", f"{ignore_index} or in [0, {num_classes})", f"{int(labels_N[row])} at row {row}")


# ---- one call on rows of logits, shared with linear_cross_entropy


class Formula(NamedTuple):
    """A Formula holds the numbers of the loss. With ignore_index None no row is ignored."""

    label_smoothing: float = 0.0
    z_loss: float = 0.0
    softcap: float | None = None
    logit_scale: float = 1.0
    ignore_index: int | None = None


@dataclass(frozen=True)
class LogitRows:
    """LogitRows holds rows of logits and the outputs to fill, on one device; an output that is None is not computed.

    Ignored rows get 0. Without `loss_N` only the gradient is computed, and `lse_N` is an input.
    """

    logits_NV: Tensor  # floating, stride 1 along V
    labels_N: Tensor  # int64
    token_weights_N: Tensor | None  # fp32, or fp64 for fp64 logits, as all floats below
    loss_N: Tensor | None
    lse_N: Tensor
    entropy_N: Tensor | None
    correct_N: Tensor | None  # bool; present exactly if entropy_N is
    grad_NV: Tensor | None  # dtype of the logits; may be the logits themselves


def fill(rows: LogitRows, formula: Formula, decision: Decision) -> None:
    """Compute the outputs of `rows` with the backend of `decision`."""
    if decision.backend == "torch":
        _fill_with_torch(rows, formula)
        return
    from sftx_kernels.triton.cross_entropy import launches
    from sftx_kernels.triton.launch import chip_of

    for launch in launches(
        rows.logits_NV, rows.labels_N, rows.lse_N, chip_of(rows.logits_NV.device),
        token_weights_N=rows.token_weights_N, loss_N=rows.loss_N, entropy_N=rows.entropy_N, correct_N=rows.correct_N,
        grad_NV=rows.grad_NV, **formula._asdict(),
    ):  # fmt: skip
        launch.run()


# ---- autograd


def _empty_rows(
    logits_NV: Tensor, labels_N: Tensor, token_weights_N: Tensor | None, *, stats: bool, grad_NV: Tensor | None = None
) -> LogitRows:
    """Return rows whose outputs are allocated and not yet filled."""
    wide = accumulator(logits_NV.dtype)
    loss_N, lse_N, *stat = (logits_NV.new_empty(labels_N.shape, dtype=wide) for _ in range(2 + stats))
    return LogitRows(
        logits_NV,
        labels_N,
        None if token_weights_N is None else token_weights_N.contiguous(),
        loss_N,
        lse_N,
        entropy_N=stat[0] if stats else None,
        correct_N=logits_NV.new_empty(labels_N.shape, dtype=torch.bool) if stats else None,
        grad_NV=grad_NV,
    )


def _outputs(rows: LogitRows) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return (loss_N, lse_N, entropy_N, correct_N), the last two empty without statistics."""
    assert rows.loss_N is not None
    if rows.entropy_N is None or rows.correct_N is None:
        empty = rows.lse_N.new_empty(0)
        return rows.loss_N, rows.lse_N, empty, empty.to(torch.bool)
    return rows.loss_N, rows.lse_N, rows.entropy_N, rows.correct_N


def _with_unit_stride(logits_NV: Tensor) -> Tensor:
    """Return logits whose stride along V is 1, as both implementations need it."""
    return logits_NV if logits_NV.stride(1) == 1 or logits_NV.shape[1] == 1 else logits_NV.contiguous()


@torch.library.custom_op("sftx::cross_entropy", mutates_args=())
def _forward(
    logits_NV: Tensor,
    labels_N: Tensor,
    token_weights_N: Tensor | None,
    label_smoothing: float,
    z_loss: float,
    softcap: float | None,
    logit_scale: float,
    ignore_index: int,
    stats: bool,
    backend: str | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    check_labels(labels_N, ignore_index, logits_NV.shape[1])
    decision = decide("cross_entropy", logits_NV.device, logits_NV.dtype, requested=backend)
    rows = _empty_rows(_with_unit_stride(logits_NV), labels_N.contiguous(), token_weights_N, stats=stats)
    fill(rows, Formula(label_smoothing, z_loss, softcap, logit_scale, ignore_index), decision)
    return _outputs(rows)


@_forward.register_fake
def _(logits_NV: Tensor, labels_N: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    *_, stats, _backend = rest
    return _outputs(_empty_rows(logits_NV, labels_N, None, stats=stats))


@torch.library.custom_op("sftx::cross_entropy_backward", mutates_args=())
def _backward(
    logits_NV: Tensor,
    labels_N: Tensor,
    lse_N: Tensor,
    grad_N: Tensor,
    label_smoothing: float,
    z_loss: float,
    softcap: float | None,
    logit_scale: float,
    ignore_index: int,
    backend: str | None,
) -> Tensor:
    """Return the gradient of the logits; grad_N is the gradient of the losses, times the token weights."""
    decision = decide("cross_entropy", logits_NV.device, logits_NV.dtype, requested=backend)
    grad_NV = torch.empty_like(logits_NV, memory_format=torch.contiguous_format)
    logits_NV = _with_unit_stride(logits_NV)
    rows = LogitRows(logits_NV, labels_N.contiguous(), grad_N, None, lse_N, None, None, grad_NV)
    fill(rows, Formula(label_smoothing, z_loss, softcap, logit_scale, ignore_index), decision)
    return grad_NV


@_backward.register_fake
def _(logits_NV: Tensor, *_: Any) -> Tensor:
    return torch.empty_like(logits_NV, memory_format=torch.contiguous_format)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    logits_NV, labels_N, token_weights_N, *formula, _stats, backend = inputs
    ctx.save_for_backward(logits_NV, labels_N, token_weights_N, output[1])
    ctx.formula, ctx.backend = formula, backend
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)


@differentiable_once
def _differentiate(ctx: Any, grad_loss_N: Tensor | None, *_: Any) -> Any:
    logits_NV, labels_N, token_weights_N, lse_N = ctx.saved_tensors
    grad_NV = None
    if grad_loss_N is not None:
        grad_N = grad_loss_N.contiguous() if token_weights_N is None else grad_loss_N * token_weights_N
        grad_NV = _backward(logits_NV, labels_N, lse_N, grad_N, *ctx.formula, ctx.backend)
    return grad_NV, *(None,) * 9


_forward.register_autograd(_differentiate, setup_context=_save)


class _InPlace(torch.autograd.Function):
    """Computes the gradient in forward, over the logits; backward multiplies it with the upstream gradient."""

    @staticmethod
    def forward(ctx: Any, logits_NV: Tensor, labels_N: Tensor, token_weights_N: Tensor | None, *rest: Any) -> Any:
        formula, (stats, backend) = Formula(*rest[:-2]), rest[-2:]
        check_labels(labels_N, rest[4], logits_NV.shape[1])
        decision = decide("cross_entropy", logits_NV.device, logits_NV.dtype, requested=backend)
        grad_NV = logits_NV.detach()
        rows = _empty_rows(grad_NV, labels_N.contiguous(), token_weights_N, stats=stats, grad_NV=grad_NV)
        fill(rows, formula, decision)
        # An operation that saved the logits for its own backward then raises instead of reading overwritten values.
        torch.autograd.graph.increment_version(logits_NV)
        ctx.grad_NV = logits_NV.detach()
        outputs = _outputs(rows)
        ctx.mark_non_differentiable(*outputs[1:])
        return outputs

    @staticmethod
    @differentiable_once
    def backward(ctx: Any, grad_loss_N: Tensor, *_: Any) -> Any:
        if ctx.grad_NV is None:
            raise RuntimeError("cross_entropy(inplace=True): backward ran already, and its gradient is spent")
        grad_NV, ctx.grad_NV = ctx.grad_NV, None
        if grad_NV.is_cuda:
            from sftx_kernels.triton.cross_entropy import scale_launch

            scale_launch(grad_NV, grad_loss_N).run()
        elif not (grad_loss_N == 1).all():
            grad_NV.mul_(grad_loss_N[:, None])
        return grad_NV, *(None,) * 9


# ---- the plain-torch implementation

# Rows are processed in slices, whose fp32 probabilities stay in a cache. On one and on two cores of an EPYC 4 MB
# took 15 and 9 ms (256 x 49152, bf16); 1 MB, which leaves too few rows to share among threads, 13 and 14 ms.
_SLICE_ELEMENTS_CPU, _SLICE_ELEMENTS = 1 << 20, 1 << 24


def _fill_with_torch(rows: LogitRows, formula: Formula) -> None:
    num_rows, V = rows.logits_NV.shape
    valid_M = None
    ignored_N = None if formula.ignore_index is None else rows.labels_N == formula.ignore_index
    if ignored_N is not None and ignored_N.any():  # with no ignored row, slices are views and nothing is gathered
        ignored, valid_M = ignored_N.nonzero().squeeze(1), (~ignored_N).nonzero().squeeze(1)
        lse_N = None if rows.loss_N is None else rows.lse_N
        for output in (rows.loss_N, lse_N, rows.entropy_N, rows.correct_N, rows.grad_NV):
            if output is not None:
                output.index_fill_(0, ignored, 0)
        num_rows = valid_M.shape[0]
    step = slice_rows(rows.logits_NV.device.type, num_rows, V)
    buffer_SV = rows.logits_NV.new_empty(step, V, dtype=accumulator(rows.logits_NV.dtype))
    for start in range(0, num_rows, step):
        chosen = slice(start, start + step) if valid_M is None else valid_M[start : start + step]
        _fill_slice(rows, chosen, formula, buffer_SV[: num_rows - start])


def slice_rows(device_type: str, num_rows: int, vocab_size: int) -> int:
    """Return how many of these rows plain torch computes at once."""
    num_elements = _SLICE_ELEMENTS_CPU if device_type == "cpu" else _SLICE_ELEMENTS
    return max(1, min(num_rows, num_elements // vocab_size))


def _fill_slice(rows: LogitRows, chosen: slice | Tensor, formula: Formula, p_SV: Tensor) -> None:
    """Fill the outputs of the `chosen` rows, and `p_SV` with their probabilities."""
    z_SV, labels_S = rows.logits_NV[chosen], rows.labels_N[chosen]
    softcap_slope_SV = None
    if formula.logit_scale != 1.0:
        z_SV = z_SV.to(p_SV.dtype) * formula.logit_scale
    if formula.softcap is not None:
        z_SV = (z_SV.to(p_SV.dtype) / formula.softcap).tanh_()
        softcap_slope_SV = z_SV.square().neg_().add_(1) if rows.grad_NV is not None else None
        z_SV.mul_(formula.softcap)
    if rows.loss_N is None:
        lse_S = rows.lse_N[chosen]
        torch.sub(z_SV, lse_S[:, None], out=p_SV).exp_()
    else:
        torch.softmax(z_SV, 1, dtype=p_SV.dtype, out=p_SV)
        lse_S = _write_loss(z_SV, p_SV, labels_S, chosen, rows, formula)
    if rows.grad_NV is None:
        return
    factor_S = torch.full_like(lse_S, formula.logit_scale)
    if rows.token_weights_N is not None:
        factor_S *= rows.token_weights_N[chosen]
    smoothing_share, lse_slope_S = formula.label_smoothing / p_SV.shape[1], 2 * formula.z_loss * lse_S
    # At the label, numbers close to 1 cancel, so its gradient is computed separately, the small part added last.
    p_S = p_SV.gather(1, labels_S[:, None]).squeeze(1)
    label_grad_S = factor_S * ((p_S - smoothing_share) - (1 - formula.label_smoothing) + lse_slope_S * p_S)
    slope_S = factor_S * (1 + lse_slope_S)
    if smoothing_share or softcap_slope_SV is not None or isinstance(chosen, Tensor):
        p_SV.mul_(slope_S[:, None])
        if smoothing_share:
            p_SV.sub_((factor_S * smoothing_share)[:, None])
        p_SV.scatter_(1, labels_S[:, None], label_grad_S[:, None])
        if softcap_slope_SV is not None:
            p_SV.mul_(softcap_slope_SV)
        rows.grad_NV[chosen] = p_SV.to(rows.grad_NV.dtype)
    else:  # one pass
        grad_SV = torch.mul(p_SV, slope_S[:, None], out=rows.grad_NV[chosen])
        grad_SV.scatter_(1, labels_S[:, None], label_grad_S[:, None].to(grad_SV.dtype))


def _write_loss(
    z_SV: Tensor, p_SV: Tensor, labels_S: Tensor, chosen: slice | Tensor, rows: LogitRows, formula: Formula
) -> Tensor:
    """Write loss and statistics of rows with the logits z and the probabilities p, and return lse_S.

    The loss uses z - max(z): a small loss keeps its digits beside large logits.
    """
    assert rows.loss_N is not None
    smoothing = formula.label_smoothing
    top_S = z_SV.amax(1).to(p_SV.dtype)
    log_total_S = p_SV.amax(1).log().neg_()  # of sum(exp(z - max)), whose largest summand is 1
    lse_S = log_total_S + top_S
    label_S = z_SV.gather(1, labels_S[:, None]).squeeze(1).to(p_SV.dtype)
    loss_S = (label_S - top_S).mul_(smoothing - 1)
    if smoothing:
        loss_S.sub_(z_SV.mean(1, dtype=p_SV.dtype) - top_S, alpha=smoothing)
    loss_S.add_(log_total_S).add_(lse_S.square(), alpha=formula.z_loss)
    if rows.token_weights_N is not None:
        loss_S.mul_(rows.token_weights_N[chosen])
    rows.loss_N[chosen], rows.lse_N[chosen] = loss_S, lse_S
    if rows.entropy_N is not None and rows.correct_N is not None:
        rows.correct_N[chosen] = z_SV.argmax(1) == labels_S
        rows.entropy_N[chosen] = torch.special.entr(p_SV).sum(1)  # -p log p, which is 0 at p = 0
    return lse_S
