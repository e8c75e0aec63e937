"""Cross-entropy of logits that are there already. Where they are not, `linear_cross_entropy` never makes them whole.

Shape suffixes: N rows (tokens), V vocabulary.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from sftx_kernels.checks import (
    check_labels,
    check_loss_options,
    check_tensor,
    check_token_weights,
    differentiable_once,
    error,
)
from sftx_kernels.dispatch import Decision, decide
from sftx_kernels.gemm import accumulator
from sftx_kernels.rows import IGNORE_INDEX, Formula, Rows, fill_with_torch


class CrossEntropyOutput(NamedTuple):
    """What `cross_entropy` returns. Its floats are fp32, or fp64 for fp64 logits.

    loss: 0-d (`reduction="sum"`), or [N] with 0 at ignored rows (`"none"`); all that carries a gradient.
    num_tokens: how many rows were not ignored, unweighted; 0-d int64 on the device, so that nothing waits for it.
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
    """Cross-entropy of each row; the formula, with its sources, stands at the top of `sftx_kernels.rows`.

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
        inplace: make the gradient in forward, over the logits, which are then rubbish to everyone else: one
            reading and one writing in all. Backward may run once. Under torch.compile it has no effect.
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
    numbers = (label_smoothing, z_loss, softcap, logit_scale, ignore_index)
    arguments = (logits_NV, labels_N, token_weights_N, *numbers, stats, backend)
    if inplace and torch.is_grad_enabled() and logits_NV.requires_grad and not torch.compiler.is_compiling():
        _check_overwritable(logits_NV)
        loss_N, lse_N, entropy_N, correct_N = _InPlace.apply(*arguments)  # type: ignore[no-untyped-call]
    else:
        loss_N, lse_N, entropy_N, correct_N = _forward(*arguments)
    loss = loss_N if reduction == "none" else loss_N.sum()
    num_tokens = (labels_N != ignore_index).sum()
    if not stats:
        return CrossEntropyOutput(loss, num_tokens)
    return CrossEntropyOutput(loss, num_tokens, lse_N.detach(), entropy_N.detach(), correct_N)


def fill(rows: Rows, formula: Formula, decision: Decision) -> None:
    """Writes what `rows` asks for, in the implementation that was decided on."""
    if decision.backend == "torch":
        fill_with_torch(rows, formula)
        return
    from sftx_kernels.gpu.cross_entropy import launches
    from sftx_kernels.gpu.launch import chip_of

    for launch in launches(rows, formula, chip_of(rows.logits_NV.device)):
        launch.run()


def _check_overwritable(logits_NV: Tensor) -> None:
    (num_rows, V), (across, along) = logits_NV.shape, logits_NV.stride()
    if logits_NV.is_leaf:
        raise error("logits_NV", "no leaf, whose values would be lost, where inplace=True", "a leaf")
    if (V > 1 and along != 1) or (num_rows > 1 and across < V):
        raise error("logits_NV", f"strides [>= {V}, 1] where inplace=True", f"strides {[across, along]}")


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
    """(loss_N, lse_N, entropy_N, correct_N), the last two empty unless stats."""
    rows, decision = _rows(logits_NV, labels_N, token_weights_N, stats, ignore_index, backend, gradient=False)
    fill(rows, Formula(label_smoothing, z_loss, softcap, logit_scale, ignore_index), decision)
    return _outputs(rows)


@_forward.register_fake
def _(logits_NV: Tensor, labels_N: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    stats = rest[-2]
    return _outputs(_empty_rows(logits_NV, labels_N, None, stats))


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
    """The gradient of the logits; grad_N is that of the losses, times the token weights."""
    decision = decide("cross_entropy", logits_NV.device, logits_NV.dtype, asked=backend)
    grad_NV = torch.empty_like(logits_NV, memory_format=torch.contiguous_format)
    rows = Rows(_dense(logits_NV), labels_N.contiguous(), grad_N, None, lse_N, None, None, grad_NV)
    fill(rows, Formula(label_smoothing, z_loss, softcap, logit_scale, ignore_index), decision)
    return grad_NV


@_backward.register_fake
def _(logits_NV: Tensor, *_: Any) -> Tensor:
    return torch.empty_like(logits_NV, memory_format=torch.contiguous_format)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    logits_NV, labels_N, token_weights_N, *numbers, _, backend = inputs
    ctx.save_for_backward(logits_NV, labels_N, token_weights_N, output[1])
    ctx.numbers, ctx.backend = numbers, backend
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)


@differentiable_once
def _differentiate(ctx: Any, grad_loss_N: Tensor | None, *_: Any) -> Any:
    logits_NV, labels_N, token_weights_N, lse_N = ctx.saved_tensors
    grad_NV = None
    if grad_loss_N is not None:
        grad_N = grad_loss_N.contiguous() if token_weights_N is None else grad_loss_N * token_weights_N
        grad_NV = _backward(logits_NV, labels_N, lse_N, grad_N, *ctx.numbers, ctx.backend)
    return grad_NV, *(None,) * 9


_forward.register_autograd(_differentiate, setup_context=_save)


class _InPlace(torch.autograd.Function):
    """The gradient over the logits, in forward; backward multiplies it with what comes from above."""

    @staticmethod
    def forward(ctx: Any, logits_NV: Tensor, labels_N: Tensor, token_weights_N: Any, *rest: Any) -> Any:
        *numbers, stats, backend = rest
        rows, decision = _rows(logits_NV, labels_N, token_weights_N, stats, numbers[-1], backend, gradient=True)
        fill(rows, Formula(*numbers), decision)
        # Whoever saved the logits for a backward of their own learns of it.
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
            from sftx_kernels.gpu.cross_entropy import scale_launch

            scale_launch(grad_NV, grad_loss_N).run()
        elif not (grad_loss_N == 1).all():
            grad_NV.mul_(grad_loss_N[:, None])
        return grad_NV, *(None,) * 9


def _rows(
    logits_NV: Tensor,
    labels_N: Tensor,
    token_weights_N: Tensor | None,
    stats: bool,
    ignore_index: int,
    backend: str | None,
    *,
    gradient: bool,
) -> tuple[Rows, Decision]:
    check_labels(labels_N, ignore_index, logits_NV.shape[1])
    decision = decide("cross_entropy", logits_NV.device, logits_NV.dtype, asked=backend)
    logits_NV = logits_NV.detach() if gradient else _dense(logits_NV)
    rows = _empty_rows(logits_NV, labels_N.contiguous(), token_weights_N, stats)
    return (replace(rows, grad_NV=logits_NV) if gradient else rows), decision


def _empty_rows(logits_NV: Tensor, labels_N: Tensor, token_weights_N: Tensor | None, stats: bool) -> Rows:
    def empty(dtype: torch.dtype) -> Tensor:
        return logits_NV.new_empty(labels_N.shape, dtype=dtype)

    wide = accumulator(logits_NV.dtype)
    return Rows(
        logits_NV=logits_NV,
        labels_N=labels_N,
        token_weights_N=None if token_weights_N is None else token_weights_N.contiguous(),
        loss_N=empty(wide),
        lse_N=empty(wide),
        entropy_N=empty(wide) if stats else None,
        correct_N=empty(torch.bool) if stats else None,
        grad_NV=None,
    )


def _outputs(rows: Rows) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    assert rows.loss_N is not None
    if rows.entropy_N is None or rows.correct_N is None:
        none = rows.lse_N.new_empty(0)
        return rows.loss_N, rows.lse_N, none, none.to(torch.bool)
    return rows.loss_N, rows.lse_N, rows.entropy_N, rows.correct_N


def _dense(logits_NV: Tensor) -> Tensor:
    """Whose stride along V is 1, as both implementations need it."""
    return logits_NV if logits_NV.stride(1) == 1 or logits_NV.shape[1] == 1 else logits_NV.contiguous()
