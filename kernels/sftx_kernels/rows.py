"""Rows of logits -> the loss of each, and in place of the logits or beside them their gradient.

What `cross_entropy` and `linear_cross_entropy` have in common, in two implementations with one interface: plain
torch, here, and `gpu.cross_entropy`. Per row, with a the logits, y the label, w the token weight, s the smoothing:

    z    = softcap * tanh(logit_scale * a / softcap)            Gemma 2 (arXiv:2408.00118), section 2
    loss = w * ((1 - s) * (lse(z) - z_y) + s * (lse(z) - mean(z)) + z_loss * lse(z)^2)

with the smoothing of Szegedy et al. (arXiv:1512.00567), section 7, as torch's cross_entropy has it, and the z-loss
of PaLM (arXiv:2204.02311), section 5.

Shape suffixes: N rows, M rows that are not ignored, S rows of a slice, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor

from sftx_kernels.gemm import accumulator

IGNORE_INDEX: Final = -100

# Plain torch goes over the rows in slices, so that what bf16 logits are widened to stays small. On CPU 1 MB of
# fp32 was as fast as any from 128 kB to 32 MB (256 x 32000 on 2 cores: 8 ms in fp32, 12 ms in bf16).
_SLICE_ELEMENTS_CPU, _SLICE_ELEMENTS = 1 << 18, 1 << 24


@dataclass(frozen=True)
class Formula:
    """The numbers of the loss. ignore_index None: no row is ignored."""

    label_smoothing: float = 0.0
    z_loss: float = 0.0
    softcap: float | None = None
    logit_scale: float = 1.0
    ignore_index: int | None = None


@dataclass(frozen=True)
class Rows:
    """Rows of logits and what is written of them; on one device, absent ones None. At ignored rows 0 is written."""

    logits_NV: Tensor  # floating, stride 1 along V
    labels_N: Tensor  # int64
    token_weights_N: Tensor | None  # fp32, or fp64 for fp64 logits, as all floats below
    loss_N: Tensor | None  # None: only the gradient is wanted, and lse_N is given
    lse_N: Tensor
    entropy_N: Tensor | None
    correct_N: Tensor | None  # bool; wanted together with entropy_N or not at all
    grad_NV: Tensor | None  # dtype of the logits; may be the logits themselves
    scratch: bool = False  # the logits are nobody else's: without a gradient too they may be overwritten


def fill_with_torch(rows: Rows, formula: Formula) -> None:
    """Writes what `rows` asks for."""
    num_rows, V = rows.logits_NV.shape
    at_M = None
    ignored_N = None if formula.ignore_index is None else rows.labels_N == formula.ignore_index
    if ignored_N is not None and ignored_N.any():  # where none is, slices are views, and nothing is gathered
        ignored, at_M = ignored_N.nonzero().squeeze(1), (~ignored_N).nonzero().squeeze(1)
        lse_N = None if rows.loss_N is None else rows.lse_N
        for output in (rows.loss_N, lse_N, rows.entropy_N, rows.correct_N, rows.grad_NV):
            if output is not None:
                output.index_fill_(0, ignored, 0)
        num_rows = at_M.shape[0]
    step = max(1, (_SLICE_ELEMENTS_CPU if rows.logits_NV.is_cpu else _SLICE_ELEMENTS) // V)
    for start in range(0, num_rows, step):
        _fill_slice(rows, slice(start, start + step) if at_M is None else at_M[start : start + step], formula)


def _fill_slice(rows: Rows, at: slice | Tensor, formula: Formula) -> None:
    """Everything is computed from z - max(z), so that a small loss keeps its digits beside large logits."""
    logits_SV, labels_S = rows.logits_NV[at], rows.labels_N[at]
    wide = accumulator(logits_SV.dtype)
    in_place = isinstance(at, slice) and (rows.scratch or rows.grad_NV is rows.logits_NV)
    z_SV = logits_SV.to(wide, copy=not in_place)
    slope_SV = _score_(z_SV, formula, want_slope=rows.grad_NV is not None)
    if rows.loss_N is None:
        lse_S, total_S = rows.lse_N[at], z_SV.new_ones(())
        z_SV.sub_(lse_S[:, None]).exp_()
    else:
        lse_S, total_S = _conclude_(z_SV, labels_S, at, rows, formula)
    if rows.grad_NV is None:
        return
    factor_S = torch.full_like(lse_S, formula.logit_scale)
    if rows.token_weights_N is not None:
        factor_S *= rows.token_weights_N[at]
    share, lse_slope_S = formula.label_smoothing / z_SV.shape[1], 2 * formula.z_loss * lse_S
    # At the label numbers close to 1 cancel, so that one is put together apart, the small part last.
    p_S = z_SV.gather(1, labels_S[:, None]).squeeze(1) / total_S
    at_label_S = factor_S * ((p_S - share) - (1 - formula.label_smoothing) + lse_slope_S * p_S)
    z_SV.mul_((factor_S * (1 + lse_slope_S) / total_S)[:, None])
    if share:
        z_SV.sub_((factor_S * share)[:, None])
    z_SV.scatter_(1, labels_S[:, None], at_label_S[:, None])
    if slope_SV is not None:
        z_SV.mul_(slope_SV)
    if not (in_place and z_SV.dtype == logits_SV.dtype):
        rows.grad_NV[at] = z_SV.to(logits_SV.dtype)


def _score_(logits_SV: Tensor, formula: Formula, *, want_slope: bool) -> Tensor | None:
    """Makes z of the logits, in place; returns the slope of the soft cap if it is needed."""
    if formula.logit_scale != 1.0:
        logits_SV.mul_(formula.logit_scale)
    if formula.softcap is None:
        return None
    logits_SV.div_(formula.softcap).tanh_()
    slope_SV = logits_SV.square().neg_().add_(1) if want_slope else None
    logits_SV.mul_(formula.softcap)
    return slope_SV


def _conclude_(
    z_SV: Tensor, labels_S: Tensor, at: slice | Tensor, rows: Rows, formula: Formula
) -> tuple[Tensor, Tensor]:
    """Writes loss and statistics; z becomes exp(z - max). Returns (lse_S, sum of these)."""
    assert rows.loss_N is not None
    eps = formula.label_smoothing
    if rows.correct_N is not None:
        rows.correct_N[at] = z_SV.argmax(1) == labels_S
    top_S = z_SV.amax(1)
    z_SV.sub_(top_S[:, None])
    loss_S = z_SV.gather(1, labels_S[:, None]).squeeze(1).mul_(eps - 1)
    if eps:
        loss_S.sub_(z_SV.mean(1), alpha=eps)
    total_S = z_SV.exp_().sum(1)
    log_total_S = total_S.log()
    lse_S = log_total_S + top_S
    loss_S.add_(log_total_S).add_(lse_S.square(), alpha=formula.z_loss)
    if rows.token_weights_N is not None:
        loss_S.mul_(rows.token_weights_N[at])
    rows.loss_N[at], rows.lse_N[at] = loss_S, lse_S
    if rows.entropy_N is not None:
        # entr(e) = -e log e, which is 0 at e = 0, and log e = z - max
        rows.entropy_N[at] = log_total_S + torch.special.entr(z_SV).sum(1) / total_S
    return lse_S, total_S
