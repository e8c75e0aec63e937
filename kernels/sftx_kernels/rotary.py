"""`rotary` turns queries and keys by their positions (Su et al., arXiv:2104.09864), in the layout of transformers.

A head's first R dimensions are pairs (x_i, x_(i + R/2)), i < R/2, which are rotated by the angle of their position:

    y_i = x_i cos_i - x_(i + R/2) sin_i        y_(i + R/2) = x_(i + R/2) cos_i + x_i sin_i

Backward is the rotation by the opposite angle, so nothing but cos and sin is kept. Triton's kernel computes in fp32 and
rounds once. So does plain torch with fp32 cos and sin; where these have the dtype of a half-precision q, it rounds the
product with cos before it adds the other in fp32, which takes half the time on a CPU.

In eager mode the operation is a torch.autograd.Function; under torch.compile it is the custom op `sftx::rotary`, as
`lora` explains.

Shape suffixes: B rows, H heads of queries or keys, T tokens, C tokens of a chunk, D dimensions of a head, R of them
rotated.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

from sftx_kernels.checks import check_tensor, differentiable_once, error
from sftx_kernels.chunks import chunk_rows
from sftx_kernels.dispatch import decide


def rotary(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, *, backend: str | None = None) -> tuple[Tensor, Tensor]:
    """Return q and k rotated, as `apply_rotary_pos_emb` of transformers does; the formula is at the top of this module.

    It differs from transformers in two ways. That rounds both products and their sum to the dtype of q, this fewer of
    them (see there). And with bf16 q and fp32 cos, as under autocast, that returns fp32, this the dtype of q.
    Differentiable once in q and k; cos and sin get no gradient.

    Args:
        q: [B, H, T, D], floating; any strides, such as those of a transposed [B, T, H, D].
        k: [B, H', T, D], of q's dtype.
        cos, sin: [B or 1, T, R], floating, R even and at most D; of the dimensions from R on nothing changes. The two
            halves of R are alike, as transformers' rotary embeddings make them: only the first is read.
        backend: for `dispatch.decide`: "torch" or "triton".

    Returns:
        q and k rotated, in their dtype, with the strides of `torch.empty_like(q)` and `torch.empty_like(k)`.

    Raises:
        ValueError: names the argument, what was expected and what was got.
    """
    _check(q, k, cos, sin)
    if torch.compiler.is_compiling() or is_in_torch_dispatch_mode():  # see lora_linears
        rotated: tuple[Tensor, Tensor] = _op(q, k, cos, sin, False, backend)
    elif torch.is_grad_enabled() and (q.requires_grad or k.requires_grad):
        rotated = _Rotary.apply(q, k, cos, sin, backend)  # type: ignore[no-untyped-call]
    else:
        rotated = _rotate(q, k, cos, sin, False, backend)
    return rotated


def _check(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> None:
    check_tensor("q", q, ("B", "H", "T", "D"), q, None)
    B, _, T, D = q.shape
    check_tensor("k", k, (B, "H'", T, D), q, None)
    if k.dtype != q.dtype:
        raise error("k", f"dtype {q.dtype}, as q", f"dtype {k.dtype}")
    check_tensor("cos", cos, ("B or 1", T, "R"), q, None)
    R = cos.shape[2]
    if cos.shape[0] not in (1, B) or R % 2 or not 0 < R <= D:
        raise error("cos", f"shape [{B} or 1, {T}, R], R even and in [2, {D}]", f"shape {list(cos.shape)}")
    check_tensor("sin", sin, tuple(cos.shape), q, None)
    if sin.dtype != cos.dtype:
        raise error("sin", f"dtype {cos.dtype}, as cos", f"dtype {sin.dtype}")


def _rotate(
    q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, inverse: bool, backend: str | None
) -> tuple[Tensor, Tensor]:
    """Return q and k rotated, or rotated back; with the backend that `decide` chooses."""
    if decide("rotary", q.device, q.dtype, requested=backend).backend != "torch":
        from sftx_kernels.triton.rotary import launch

        # the kernel reads and writes heads whose last dimension has stride 1
        q, k, cos, sin = (t if t.stride(-1) == 1 else t.contiguous() for t in (q, k, cos, sin))
        sin = sin if sin.stride() == cos.stride() else sin.contiguous()
        cos = cos if sin.stride() == cos.stride() else cos.contiguous()
        q_out, k_out = torch.empty_like(q), torch.empty_like(k)
        launch(q, k, cos, sin, q_out, k_out, inverse=inverse).run()
        return q_out, k_out
    q_out, k_out = torch.empty_like(q), torch.empty_like(k)
    half = cos.shape[2] // 2
    dtype = torch.promote_types(q.dtype, cos.dtype)
    cos_BTr, sin_BTr = cos[..., :half].to(dtype), sin[..., :half].to(dtype)
    if inverse:
        sin_BTr = -sin_BTr
    for x, out in ((q, q_out), (k, k_out)):
        _rotate_with_torch(x, out, cos_BTr, sin_BTr)
    return q_out, k_out


def _rotate_with_torch(x: Tensor, out: Tensor, cos_BTr: Tensor, sin_BTr: Tensor) -> None:
    """Rotate x by the angles whose cos and sin are given, [B or 1, T, R/2] in x's dtype or a wider one."""
    B, H, T, _ = x.shape
    half = cos_BTr.shape[2]
    R = 2 * half
    x_BTHD, out_BTHD = x.transpose(1, 2), out.transpose(1, 2)
    if x.shape[3] > R:
        out_BTHD[..., R:].copy_(x_BTHD[..., R:])
        x_BTHD, out_BTHD = x_BTHD[..., :R], out_BTHD[..., :R]
    is_wide = cos_BTr.dtype == x.dtype
    # Chunks of twice the size: their operations are many and small, and 2**18 elements were faster than 2**17.
    step = 2 * chunk_rows(T, B * H * R, x.device)
    wide_SBCHR = x.new_empty(0 if is_wide else 2, B, min(step, T), H, R, dtype=cos_BTr.dtype)
    for start in range(0, T, step):
        chunk = slice(start, start + step)
        x_BCHR, out_BCHR = x_BTHD[:, chunk], out_BTHD[:, chunk]
        source, target = (x_BCHR, out_BCHR) if is_wide else wide_SBCHR[:, :, : x_BCHR.shape[1]]
        if not is_wide:
            source.copy_(x_BCHR)
        cos_BC1r, sin_BC1r = cos_BTr[:, chunk, None], sin_BTr[:, chunk, None]
        one, two = source[..., :half], source[..., half:]
        torch.mul(one, cos_BC1r, out=target[..., :half]).addcmul_(two, sin_BC1r, value=-1)
        torch.mul(two, cos_BC1r, out=target[..., half:]).addcmul_(one, sin_BC1r)
        if not is_wide:
            out_BCHR.copy_(target)


# ---- autograd


class _Rotary(torch.autograd.Function):
    """_Rotary is the operation in eager mode."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, backend: str | None) -> Any:
        _setup_context(ctx, (q, k, cos, sin, False, backend), None)
        return _rotate(q, k, cos, sin, False, backend)

    @staticmethod
    @differentiable_once
    def backward(ctx: Any, dq: Tensor, dk: Tensor) -> Any:
        cos, sin = ctx.saved_tensors
        return *_rotate(dq, dk, cos, sin, True, ctx.backend), None, None, None


@torch.library.custom_op("sftx::rotary", mutates_args=())
def _op(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, inverse: bool, backend: str | None) -> tuple[Tensor, Tensor]:
    return _rotate(q, k, cos, sin, inverse, backend)


@_op.register_fake
def _(q, k, cos, sin, inverse, backend):  # type: ignore[no-untyped-def]
    return torch.empty_like(q), torch.empty_like(k)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    _, _, cos, sin, ctx.inverse, ctx.backend = inputs
    ctx.save_for_backward(cos, sin)


@differentiable_once
def _differentiate(ctx: Any, dq: Tensor, dk: Tensor) -> Any:
    return *_op(dq, dk, *ctx.saved_tensors, not ctx.inverse, ctx.backend), None, None, None, None


_op.register_autograd(_differentiate, setup_context=_setup_context)
