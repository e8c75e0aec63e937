"""The operations of sftx_kernels in plain torch: what they compute, on every device and for every dtype.

- `linear_cross_entropy`: hidden rows, the head's weight and labels -> loss; gradients are made on the way.
- `lora_linear`: a linear layer plus its low-rank update.

Shape suffixes: N rows (tokens), M rows that are not ignored (in `lora_linear`: all rows of x), C rows of a
chunk, S rows of a slice of a chunk, D hidden, V vocabulary, K in, O out, R rank. Chunks and slices are of
the M rows; `rows_M` says which of N they are. A function whose name ends in `_` overwrites its first argument.
"""

from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from sftx_kernels.checks import autocasts, check_lora, check_options, check_tensors, error, gemm_dtype

IGNORE_INDEX = -100

# Softmax and loss go over a chunk in slices, so that what bf16 logits are widened to stays small. On CPU 8 MB
# of fp32 was as fast as any from 128 kB to 32 MB (256 x 32000 on 2 cores: 8 ms in fp32, 12 ms in bf16).
_SLICE_ELEMENTS_CPU, _SLICE_ELEMENTS = 1 << 21, 1 << 24
# The bf16 product that is added to the fp32 dW is made this many elements at a time, never [V, D] at once.
_PRODUCT_ELEMENTS = 1 << 22


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


@dataclass(frozen=True)
class _Spec:
    """Everything about one call that is not a tensor."""

    label_smoothing: float
    z_loss: float
    softcap: float | None
    logit_scale: float
    chunk_rows: int
    dtype: torch.dtype  # of the GEMMs
    per_row: bool
    stats: bool
    want_hidden: bool  # which gradients are asked for
    want_weight: bool
    want_bias: bool

    @property
    def want_any(self) -> bool:
        return self.want_hidden or self.want_weight or self.want_bias

    @property
    def accumulator(self) -> torch.dtype:
        return torch.float64 if self.dtype == torch.float64 else torch.float32


class _Problem(NamedTuple):
    hidden_ND: Tensor
    weight_VD: Tensor
    bias_V: Tensor | None
    rows_M: Tensor | None  # None: no row is ignored
    labels_M: Tensor
    token_weights_M: Tensor  # in the accumulator's dtype


class _Result(NamedTuple):
    loss_M: Tensor
    lse_M: Tensor
    entropy_M: Tensor | None
    correct_M: Tensor | None
    dX_MD: Tensor | None  # in hidden's dtype
    dW_VD: Tensor | None  # in the accumulator's dtype, as is db_V
    db_V: Tensor | None


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
) -> LinearCrossEntropyOutput:
    """Cross-entropy of `hidden_ND @ weight_VD.T + bias_V`, holding the logits of one chunk of rows at most.

    Rows whose label is `ignore_index` are removed before the head's product and cost nothing. The forward
    pass goes over the others chunk by chunk and computes the loss and whichever gradients will be asked for;
    backward only scales them. Per row, with h the hidden state, y the label, w the token weight:

        z    = softcap * tanh(logit_scale * (W h + b) / softcap)      Gemma 2 (arXiv:2408.00118), section 2
        loss = w * ((1 - s) * (lse(z) - z_y) + s * (lse(z) - mean(z)) + z_loss * lse(z)^2)

    with the smoothing s of Szegedy et al. (arXiv:1512.00567), section 7, as torch's cross_entropy has it, and
    the z-loss of PaLM (arXiv:2204.02311), section 5. Nothing is overwritten. Differentiable once.

    Args:
        hidden_ND, weight_VD, bias_V: of one floating dtype, any strides. GEMMs run in that dtype, softmax and
            loss in fp32 (fp64 for fp64). Under autocast GEMMs run in its dtype, and the three may differ.
            Gradients have each input's own dtype; dW and db are accumulated in fp32 (fp64 for fp64).
        labels_N: int64. On CPU a label outside [0, V) is refused; elsewhere looking would sync.
        token_weights_N: floating; scales the whole loss of a row. Gets no gradient.
        num_valid: how many labels are not `ignore_index`, as the host knows it, which saves an accelerator
            the sync of counting. Checked on CPU, trusted elsewhere.
        chunk_rows: by default 256 on CPU, elsewhere 2048, or 4096 if the head trains; fewer where a chunk of
            logits in the dtype of the GEMMs would not fit `workspace_bytes`. A given count wins over that.
        reduction: "sum", or "none" for a loss per row. With "none" and a head that trains, backward makes the
            logits once more, for dW.
        stats: return also, detached and with 0 or False at ignored rows: lse_N of the final logits z;
            entropy_N of their softmax, in nats; correct_N (bool), whether the label is their argmax.

    Raises:
        ValueError: names the argument, what was expected and what was got.
    """
    check_tensors(hidden_ND, weight_VD, labels_N, bias_V, token_weights_N)
    check_options(label_smoothing, z_loss, softcap, chunk_rows, reduction)
    rows_M, labels_M = _compact(labels_N, ignore_index, num_valid, weight_VD.shape[0])
    wants = [
        torch.is_grad_enabled() and tensor is not None and tensor.requires_grad
        for tensor in (hidden_ND, weight_VD, bias_V)
    ]
    dtype = gemm_dtype(hidden_ND)
    chunk = chunk_rows or _choose_chunk(weight_VD, dtype, workspace_bytes, trained=wants[1])
    spec = _Spec(label_smoothing, z_loss, softcap, logit_scale, chunk, dtype, reduction == "none", stats, *wants)
    if token_weights_N is None:
        token_weights_M = torch.ones(labels_M.shape, dtype=spec.accumulator, device=labels_M.device)
    else:
        token_weights_M = _take(token_weights_N.detach(), rows_M).to(spec.accumulator)
    tensors = (hidden_ND, weight_VD, bias_V, rows_M, labels_M, token_weights_M)
    if spec.want_any:
        loss, *per_row = _LinearCrossEntropy.apply(spec, *tensors)  # type: ignore[no-untyped-call]
    else:
        with torch.no_grad():
            loss, *per_row = _reduce(_run(_Problem(*tensors), spec), rows_M, hidden_ND.shape[0], spec)
    return LinearCrossEntropyOutput(loss, labels_M.shape[0], *per_row)


class _LinearCrossEntropy(torch.autograd.Function):
    """Gradients in forward, for an upstream gradient of 1; backward scales them."""

    @staticmethod
    def forward(ctx: Any, spec: _Spec, *tensors: Any) -> Any:
        problem = _Problem(*tensors)
        # A loss per row has an upstream gradient per row. The rows of dX can be scaled by it afterwards;
        # dW and db, which are sums over rows, cannot, and are left to backward.
        now = replace(spec, want_weight=False, want_bias=False) if spec.per_row else spec
        result = _run(problem, now)
        again = spec.per_row and (spec.want_weight or spec.want_bias)
        ctx.spec, ctx.num_rows = spec, problem.hidden_ND.shape[0]
        ctx.weight_dtype = problem.weight_VD.dtype
        ctx.bias_dtype = None if problem.bias_V is None else problem.bias_V.dtype
        ctx.save_for_backward(problem.rows_M, result.dX_MD, result.dW_VD, result.db_V, *(problem if again else ()))
        outputs = _reduce(result, problem.rows_M, ctx.num_rows, spec)
        ctx.mark_non_differentiable(*(output for output in outputs[1:] if output is not None))
        return outputs

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_loss: Tensor, *_: Any) -> Any:
        spec: _Spec = ctx.spec
        rows_M, dX_MD, dW_VD, db_V, *saved = ctx.saved_tensors
        # A factor has as many dimensions as what it scales: then torch multiplies in fp32 and rounds once,
        # where it may first round a 0-d factor to bf16.
        if spec.per_row:
            factor_M = _take(grad_loss, rows_M)
            dX_MD = None if dX_MD is None else _scale(dX_MD, factor_M[:, None], dX_MD.dtype)
            if saved:
                problem = _Problem(*saved)
                problem = problem._replace(token_weights_M=problem.token_weights_M * factor_M)
                result = _run(problem, replace(spec, want_hidden=False, stats=False))
                dW_VD = None if result.dW_VD is None else result.dW_VD.to(ctx.weight_dtype)
                db_V = None if result.db_V is None else result.db_V.to(ctx.bias_dtype)
        else:
            dX_MD = None if dX_MD is None else _scale(dX_MD, grad_loss.view(1, 1), dX_MD.dtype)
            dW_VD = None if dW_VD is None else _scale(dW_VD, grad_loss.view(1, 1), ctx.weight_dtype)
            db_V = None if db_V is None else _scale(db_V, grad_loss.view(1), ctx.bias_dtype)
        dX_ND = None if dX_MD is None else _spread(dX_MD, rows_M, ctx.num_rows)
        return None, dX_ND, dW_VD, db_V, None, None, None


def _run(problem: _Problem, spec: _Spec) -> _Result:
    """Goes over the compacted rows chunk by chunk; one buffer of logits serves all of them."""
    hidden_ND, weight_VD, bias_V, rows_M, labels_M, token_weights_M = problem
    num_rows, V, wide = labels_M.shape[0], weight_VD.shape[0], spec.accumulator
    result = _Result(
        loss_M=hidden_ND.new_empty(num_rows, dtype=wide),
        lse_M=hidden_ND.new_empty(num_rows, dtype=wide),
        entropy_M=hidden_ND.new_empty(num_rows, dtype=wide) if spec.stats else None,
        correct_M=hidden_ND.new_empty(num_rows, dtype=torch.bool) if spec.stats else None,
        dX_MD=hidden_ND.new_empty(num_rows, hidden_ND.shape[1]) if spec.want_hidden else None,
        dW_VD=weight_VD.new_zeros(weight_VD.shape, dtype=wide) if spec.want_weight else None,
        db_V=weight_VD.new_zeros(V, dtype=wide) if spec.want_bias else None,
    )
    kind = hidden_ND.device.type
    with torch.autocast(kind, enabled=False) if autocasts(kind) else nullcontext():
        # Cast once, not once a chunk; no copy where the dtype is right already.
        weight_VD = weight_VD.to(spec.dtype)
        bias_V = None if bias_V is None else bias_V.to(spec.dtype)
        buffer_CV = weight_VD.new_empty(min(spec.chunk_rows, num_rows), V)
        for start in range(0, num_rows, spec.chunk_rows):
            chunk = slice(start, min(start + spec.chunk_rows, num_rows))
            x_CD = hidden_ND[chunk] if rows_M is None else hidden_ND.index_select(0, rows_M[chunk])
            x_CD = x_CD.to(spec.dtype)
            logits_CV = buffer_CV[: x_CD.shape[0]]
            if bias_V is None:
                torch.mm(x_CD, weight_VD.T, out=logits_CV)
            else:
                torch.addmm(bias_V, x_CD, weight_VD.T, out=logits_CV)
            _fill_chunk_(logits_CV, chunk, labels_M, token_weights_M, result, spec)
            if result.dX_MD is not None:
                result.dX_MD[chunk] = logits_CV @ weight_VD
            if result.dW_VD is not None:
                _add_product_(result.dW_VD, logits_CV, x_CD)
    return result


def _fill_chunk_(
    logits_CV: Tensor, chunk: slice, labels_M: Tensor, token_weights_M: Tensor, result: _Result, spec: _Spec
) -> None:
    """Fills the chunk's rows of `result`; where a gradient is wanted, leaves it in place of the logits."""
    num_rows, V = logits_CV.shape
    step = max(1, (_SLICE_ELEMENTS_CPU if logits_CV.is_cpu else _SLICE_ELEMENTS) // V)
    for start in range(0, num_rows, step):
        narrow_SV = logits_CV[start : start + step]
        wide_SV = narrow_SV.to(spec.accumulator)  # the same tensor for fp32 and fp64
        at = slice(chunk.start + start, chunk.start + start + narrow_SV.shape[0])
        rows = _differentiate_(wide_SV, labels_M[at], token_weights_M[at], spec)
        for whole_M, part_S in zip(result[:4], rows, strict=True):
            if whole_M is not None and part_S is not None:
                whole_M[at] = part_S
        if result.db_V is not None:
            result.db_V.add_(wide_SV.sum(0))
        if spec.want_any:
            narrow_SV.copy_(wide_SV)


def _differentiate_(
    logits_SV: Tensor, labels_S: Tensor, token_weights_S: Tensor, spec: _Spec
) -> tuple[Tensor | None, ...]:
    """(loss_S, lse_S, entropy_S, correct_S); the logits become their gradient, or rubbish if none is wanted.

    Everything is computed from z - max(z), so that a small loss keeps its digits beside large logits.
    """
    eps, V = spec.label_smoothing, logits_SV.shape[1]
    labels_S1 = labels_S[:, None]
    if spec.logit_scale != 1.0:
        logits_SV.mul_(spec.logit_scale)
    slope_SV = None
    if spec.softcap is not None:
        logits_SV.div_(spec.softcap).tanh_()
        slope_SV = logits_SV.square().neg_().add_(1) if spec.want_any else None
        logits_SV.mul_(spec.softcap)
    correct_S = logits_SV.argmax(1) == labels_S if spec.stats else None
    max_S = logits_SV.amax(1)
    logits_SV.sub_(max_S[:, None])
    loss_S = logits_SV.gather(1, labels_S1).squeeze(1).mul_(eps - 1)
    if eps:
        loss_S.sub_(logits_SV.mean(1), alpha=eps)
    sum_S = logits_SV.exp_().sum(1)
    log_sum_S = sum_S.log()
    lse_S = log_sum_S + max_S
    loss_S.add_(log_sum_S).add_(lse_S.square(), alpha=spec.z_loss).mul_(token_weights_S)
    # entr(e) = -e log e, which is 0 at e = 0, and log e = z - max
    entropy_S = log_sum_S + torch.special.entr(logits_SV).sum(1) / sum_S if spec.stats else None
    if spec.want_any:
        factor_S = token_weights_S * spec.logit_scale
        logits_SV.mul_(((1 + 2 * spec.z_loss * lse_S) * factor_S / sum_S)[:, None])
        if eps:
            logits_SV.sub_((factor_S * (eps / V))[:, None])
        logits_SV.scatter_add_(1, labels_S1, (factor_S * (eps - 1))[:, None])
        if slope_SV is not None:
            logits_SV.mul_(slope_SV)
    return loss_S, lse_S, entropy_S, correct_S


def _add_product_(sum_VD: Tensor, grad_CV: Tensor, x_CD: Tensor) -> None:
    """sum_VD += grad_CV.T @ x_CD, with the sum in its own, perhaps wider dtype."""
    if sum_VD.dtype == x_CD.dtype:
        sum_VD.addmm_(grad_CV.T, x_CD)
        return
    step = max(1, _PRODUCT_ELEMENTS // max(1, x_CD.shape[1]))
    for start in range(0, sum_VD.shape[0], step):
        sum_VD[start : start + step].add_(grad_CV[:, start : start + step].T @ x_CD)


def _scale(tensor: Tensor, factor: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.mul(tensor, factor, out=torch.empty_like(tensor, dtype=dtype))


def _take(values_N: Tensor, rows_M: Tensor | None) -> Tensor:
    return values_N if rows_M is None else values_N.index_select(0, rows_M)


def _spread(values_M: Tensor, rows_M: Tensor | None, num_rows: int) -> Tensor:
    """The inverse of `_take`, with 0 at ignored rows."""
    if rows_M is None:
        return values_M
    return values_M.new_zeros(num_rows, *values_M.shape[1:]).index_copy_(0, rows_M, values_M)


def _reduce(result: _Result, rows_M: Tensor | None, num_rows: int, spec: _Spec) -> tuple[Tensor | None, ...]:
    """(loss, lse_N, entropy_N, correct_N) as the caller sees them."""
    loss = _spread(result.loss_M, rows_M, num_rows) if spec.per_row else result.loss_M.sum()
    if not spec.stats:
        return loss, None, None, None
    stats = (result.lse_M, result.entropy_M, result.correct_M)
    return loss, *(None if stat is None else _spread(stat, rows_M, num_rows) for stat in stats)


def _compact(
    labels_N: Tensor, ignore_index: int, num_valid: int | None, num_classes: int
) -> tuple[Tensor | None, Tensor]:
    """(rows_M, labels_M): where the labels to train on are, None if everywhere, and what they are."""
    labels_N, num_rows = labels_N.detach(), labels_N.shape[0]
    on_cpu = labels_N.device.type == "cpu"
    if num_valid is not None and not 0 <= num_valid <= num_rows:
        raise error("num_valid", f"a count in [0, {num_rows}]", num_valid)
    if on_cpu or num_valid is None:
        rows_M = (labels_N != ignore_index).nonzero().squeeze(1)
    elif num_valid == num_rows:
        return None, labels_N
    else:
        # Too large a num_valid pads with -1, which index_select refuses loudly on the device.
        rows_M = (labels_N != ignore_index).nonzero_static(size=num_valid).squeeze(1)
    count = rows_M.shape[0]
    if num_valid is not None and num_valid != count:
        raise error("num_valid", f"{count}, the number of labels other than {ignore_index}", num_valid)
    labels_M = labels_N.index_select(0, rows_M)
    if on_cpu and count:
        low, high = int(labels_M.min()), int(labels_M.max())
        if low < 0 or high >= num_classes:
            wrong = low if low < 0 else high
            row = int(rows_M[labels_M == wrong][0])
            raise error("labels_N", f"{ignore_index} or in [0, {num_classes})", f"{wrong} at row {row}")
    return (None if count == num_rows else rows_M), labels_M


def _choose_chunk(weight_VD: Tensor, dtype: torch.dtype, workspace_bytes: int | None, *, trained: bool) -> int:
    """Small chunks read the head's weight again and again, so the size follows from neither V nor D."""
    rows = 256 if weight_VD.device.type == "cpu" else 4096 if trained else 2048
    if workspace_bytes is None:
        return rows
    row_bytes = weight_VD.shape[0] * dtype.itemsize
    if workspace_bytes < row_bytes:
        raise error("workspace_bytes", f"at least {row_bytes}, one row of logits", workspace_bytes)
    return min(rows, workspace_bytes // row_bytes)


def lora_linear(
    x: Tensor,
    weight: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    *,
    scaling: float,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
    bias: Tensor | None = None,
) -> Tensor:
    """A linear layer with a low-rank update, `x W^T + bias + scaling * (drop(x) A^T) B^T`.

    LoRA (arXiv:2106.09685), section 4.1; dropout on the update's input, as in its authors' code and in PEFT.
    Plain autograd; nothing is overwritten.

    Args:
        x, weight, bias: [..., K], [O, K], [O]; of one floating dtype, unless autocast casts them.
        lora_A, lora_B: [R, K], [O, R]; of one floating dtype, which may be another than x's: both paths run in
            the dtype of `x W^T`. So fp32 A and B on a bf16 base are cast to bf16, which gives the numbers
            that autocast gives, and their gradients come back in fp32.
        dropout_p: in [0, 1). The mask is a function of `seed`, x's shape and the kind of device, and of
            nothing else. The global generators are neither read nor moved, so that recomputation under
            gradient checkpointing drops the same elements.
        seed: 0-d int64, needed if dropout_p > 0. Keep it on the host: reading it from a device syncs.

    Returns:
        [..., O] in the dtype of `x W^T`: x's own, or autocast's.

    Raises:
        ValueError: names the argument, what was expected and what was got.
    """
    check_lora(x, weight, lora_A, lora_B, bias, dropout_p, seed)
    dtype = gemm_dtype(x)
    x_MK = x.reshape(-1, x.shape[-1]).to(dtype)
    y_MO = F.linear(x_MK, weight, bias)
    if dropout_p > 0:
        assert seed is not None
        generator = torch.Generator(x.device).manual_seed(int(seed))
        dropped_MK = torch.empty(x_MK.shape, dtype=torch.bool, device=x.device)
        x_MK = x_MK.masked_fill(dropped_MK.bernoulli_(dropout_p, generator=generator), 0)
    s_MR = x_MK @ lora_A.to(dtype).T
    # In place on the base's fresh output: no second [M, O], and one rounding of the sum.
    y_MO.addmm_(s_MR, lora_B.to(dtype).T, alpha=scaling / (1 - dropout_p))
    return y_MO.view(*x.shape[:-1], weight.shape[0])
