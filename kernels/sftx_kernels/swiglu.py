"""`swiglu` is the gated activation of a feed-forward layer (Shazeer, arXiv:2002.05202): act(gate) * up.

    y = a(g) u        dg = dy u a'(g)        du = dy a(g)

a is silu (SwiGLU) or the tanh form of gelu (GeGLU, in Gemma). Backward keeps gate and up and computes a(g) again, where
eager torch keeps it too, as wide as they.

In eager mode the operation is a torch.autograd.Function; under torch.compile it is the custom op `sftx::swiglu`, as
`lora` explains.

Shape suffixes: N rows, C rows of a chunk, D columns.
"""

from __future__ import annotations

from typing import Any, Final, Literal

import torch
from torch import Tensor
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

from sftx_kernels.checks import check_tensor, differentiable_once, error
from sftx_kernels.chunks import chunk_rows, row_chunks
from sftx_kernels.dispatch import decide

ACTIVATIONS: Final = ("silu", "gelu_tanh")


def swiglu(
    gate: Tensor,
    up: Tensor,
    *,
    activation: Literal["silu", "gelu_tanh"] = "silu",
    backend: str | None = None,
) -> Tensor:
    """Return act(gate) * up, of their shape and dtype; the formula is at the top of this module.

    Plain torch gives the bits of `F.silu(gate) * up`, or of `F.gelu(gate, approximate="tanh") * up`, the eager modules
    of transformers: a(g) is rounded before the product. Triton's kernels round once. Differentiable once.

    Args:
        gate, up: [..., D], of one floating dtype. Rows may have gaps, as those of a product that computes both.
        activation: "silu", or "gelu_tanh".
        backend: for `dispatch.decide`: "torch" or "triton".

    Raises:
        ValueError: names the argument, what was expected and what was got.
    """
    if gate.dim() == 0:
        raise error("gate", "shape [..., D]", "shape []")
    check_tensor("gate", gate, tuple(gate.shape), gate, None)
    check_tensor("up", up, tuple(gate.shape), gate, None)
    if up.dtype != gate.dtype:
        raise error("up", f"dtype {gate.dtype}, as gate", f"dtype {up.dtype}")
    if activation not in ACTIVATIONS:
        raise error("activation", f"one of {', '.join(ACTIVATIONS)}", repr(activation))
    if torch.compiler.is_compiling() or is_in_torch_dispatch_mode():  # see lora_linears
        y: Tensor = _op(gate, up, activation, backend)
    elif torch.is_grad_enabled() and (gate.requires_grad or up.requires_grad):
        y = _Swiglu.apply(gate, up, activation, backend)  # type: ignore[no-untyped-call]
    else:
        y = _forward(gate, up, activation, backend)
    return y


# ---- forward and backward, with the backend that `decide` chooses


def _forward(gate: Tensor, up: Tensor, activation: str, backend: str | None) -> Tensor:
    y = gate.new_empty(gate.shape)
    gate_ND, up_ND, y_ND = _rows(gate), _rows(up), _rows(y)
    if decide("swiglu", gate.device, gate.dtype, requested=backend).backend == "torch":
        _forward_with_torch(gate_ND, up_ND, y_ND, activation)
    else:
        from sftx_kernels.triton.swiglu import forward_launch

        forward_launch(_dense(gate_ND), _dense(up_ND), y_ND, gelu=activation == "gelu_tanh").run()
    return y


def _backward(dy: Tensor, gate: Tensor, up: Tensor, activation: str, backend: str | None) -> tuple[Tensor, Tensor]:
    """Return the gradients of gate and up."""
    d_gate, d_up = gate.new_empty(gate.shape), gate.new_empty(gate.shape)
    dy_ND, gate_ND, up_ND, d_gate_ND, d_up_ND = map(_rows, (dy, gate, up, d_gate, d_up))
    if decide("swiglu", gate.device, gate.dtype, requested=backend).backend == "torch":
        _backward_with_torch(dy_ND, gate_ND, up_ND, d_gate_ND, d_up_ND, activation)
    else:
        from sftx_kernels.triton.swiglu import backward_launch

        dy_ND, gate_ND, up_ND = map(_dense, (dy_ND, gate_ND, up_ND))
        backward_launch(dy_ND, gate_ND, up_ND, d_gate_ND, d_up_ND, gelu=activation == "gelu_tanh").run()
    return d_gate, d_up


def _rows(x: Tensor) -> Tensor:
    """Return [N, D]: a view, but of a tensor whose rows do not lie at equal distances."""
    return x.reshape(x.shape[:-1].numel(), x.shape[-1])


def _dense(x: Tensor) -> Tensor:
    """Return a tensor whose stride along the last dimension is 1, as the Triton kernels need it."""
    return x if x.stride(-1) == 1 else x.contiguous()


# ---- plain torch


def _forward_with_torch(gate_ND: Tensor, up_ND: Tensor, y_ND: Tensor, activation: str) -> None:
    num_rows, D = gate_ND.shape
    for chunk in row_chunks(num_rows, D, gate_ND.device):
        _activate(gate_ND[chunk], activation, y_ND[chunk]).mul_(up_ND[chunk])


def _backward_with_torch(
    dy_ND: Tensor, gate_ND: Tensor, up_ND: Tensor, d_gate_ND: Tensor, d_up_ND: Tensor, activation: str
) -> None:
    num_rows, D = gate_ND.shape
    scratch_CD = gate_ND.new_empty(chunk_rows(num_rows, D, gate_ND.device), D)
    for chunk in row_chunks(num_rows, D, gate_ND.device):
        dy_CD, gate_CD, d_gate_CD = dy_ND[chunk], gate_ND[chunk], d_gate_ND[chunk]
        _activate(gate_CD, activation, d_up_ND[chunk]).mul_(dy_CD)
        d_active_CD = torch.mul(dy_CD, up_ND[chunk], out=scratch_CD[: len(dy_CD)])
        if activation == "silu":
            torch.ops.aten.silu_backward.grad_input(d_active_CD, gate_CD, grad_input=d_gate_CD)
        else:
            torch.ops.aten.gelu_backward.grad_input(d_active_CD, gate_CD, approximate="tanh", grad_input=d_gate_CD)


def _activate(gate_CD: Tensor, activation: str, out: Tensor) -> Tensor:
    if activation == "silu":
        torch.ops.aten.silu.out(gate_CD, out=out)
    else:
        torch.ops.aten.gelu.out(gate_CD, approximate="tanh", out=out)
    return out


# ---- autograd


class _Swiglu(torch.autograd.Function):
    """_Swiglu is the operation in eager mode."""

    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor, activation: str, backend: str | None) -> Tensor:
        _setup_context(ctx, (gate, up, activation, backend), None)
        return _forward(gate, up, activation, backend)

    @staticmethod
    @differentiable_once
    def backward(ctx: Any, dy: Tensor) -> Any:
        return *_backward(dy, *ctx.saved_tensors, *ctx.options), None, None


@torch.library.custom_op("sftx::swiglu", mutates_args=())
def _op(gate: Tensor, up: Tensor, activation: str, backend: str | None) -> Tensor:
    return _forward(gate, up, activation, backend)


@_op.register_fake
def _(gate, up, activation, backend):  # type: ignore[no-untyped-def]
    return gate.new_empty(gate.shape)


@torch.library.custom_op("sftx::swiglu_backward", mutates_args=())
def _backward_op(dy: Tensor, gate: Tensor, up: Tensor, activation: str, backend: str | None) -> tuple[Tensor, Tensor]:
    return _backward(dy, gate, up, activation, backend)


@_backward_op.register_fake
def _(dy, gate, up, activation, backend):  # type: ignore[no-untyped-def]
    return gate.new_empty(gate.shape), gate.new_empty(gate.shape)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    gate, up, *ctx.options = inputs
    ctx.save_for_backward(gate, up)


@differentiable_once
def _differentiate(ctx: Any, dy: Tensor) -> Any:
    return *_backward_op(dy, *ctx.saved_tensors, *ctx.options), None, None


_op.register_autograd(_differentiate, setup_context=_setup_context)
