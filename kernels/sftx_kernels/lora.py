"""`lora_linear`, a linear layer plus its low-rank update, and `lora_linears` for several that share their input."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from sftx_kernels.checks import check_lora, error, gemm_dtype, is_number
from sftx_kernels.lora_autograd import Group, Spec, run
from sftx_kernels.nf4 import NF4Weight, check_nf4


def lora_linear(
    x: Tensor,
    weight: Tensor | NF4Weight,
    lora_A: Tensor,
    lora_B: Tensor,
    *,
    scaling: float,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
    bias: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """A linear layer with a low-rank update, `x W^T + bias + scaling * (drop(x) A^T) B^T`.

    LoRA (arXiv:2106.09685), section 4.1; dropout on the update's input, as in its authors' code and in PEFT.
    Nothing is overwritten; differentiable once.

    Args:
        x, weight, bias: [..., K], [O, K], [O]; of one floating dtype, unless autocast casts them. The weight may be
            an `NF4Weight` instead, which is dequantised in forward and again in backward and gets no gradient.
        lora_A, lora_B: [R, K], [O, R]; of one floating dtype, which may be another than x's: both paths run in
            the dtype of `x W^T`. So fp32 A and B on a bf16 base are cast to bf16, which gives the numbers
            that autocast gives, and their gradients, summed in fp32, come back unrounded.
        dropout_p: in [0, 1). The mask is a function of `seed`, x's shape, the kind of device and the backend, and of
            nothing else. The global generators are neither read nor moved, so that recomputation under
            gradient checkpointing drops the same elements. Triton's kernels round p to a multiple of 2**-16.
        seed: 0-d int64, needed if dropout_p > 0. On the host, or on x's device, where Triton's kernels read it
            without a sync; plain torch reads it on the host, which syncs.
        backend: for `dispatch.decide`: "torch", "triton" or "triton-fused". A Triton one that is asked for
            refuses weights, A and B whose rows have gaps.

    Returns:
        [..., O] in the dtype of `x W^T`: x's own, or autocast's.

    Raises:
        ValueError: names the argument, what was expected and what was got.
    """
    biases = None if bias is None else (bias,)
    return lora_linears(
        x, (weight,), (lora_A,), (lora_B,),
        scaling=scaling, dropout_p=dropout_p, seed=seed, biases=biases, backend=backend,
    )[0]  # fmt: skip


def lora_linears(
    x: Tensor,
    weights: Sequence[Tensor | NF4Weight],
    lora_As: Sequence[Tensor],
    lora_Bs: Sequence[Tensor],
    *,
    scaling: float | Sequence[float],
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
    biases: Sequence[Tensor] | None = None,
    backend: str | None = None,
) -> tuple[Tensor, ...]:
    """`lora_linear` for layers that share x, such as q, k and v: x is read once for all their updates.

    As the separate calls with one seed: all layers see one mask. The weights are all tensors or all `NF4Weight`s;
    ranks and scalings may differ; all layers have a bias, or none has.
    """
    scalings = tuple(scaling) if isinstance(scaling, Sequence) else (scaling,) * len(weights)
    _check_group(x, weights, lora_As, lora_Bs, scalings, biases, dropout_p, seed)
    group = Group(
        x,
        tuple(w.codes if isinstance(w, NF4Weight) else w for w in weights),
        tuple(w.absmax for w in weights if isinstance(w, NF4Weight)),
        tuple(lora_As),
        tuple(lora_Bs),
        tuple(biases or ()),
    )
    return run(group, seed, Spec(tuple(map(float, scalings)), dropout_p, gemm_dtype(x), backend))


def _check_group(
    x: Tensor,
    weights: Sequence[Tensor | NF4Weight],
    lora_As: Sequence[Tensor],
    lora_Bs: Sequence[Tensor],
    scalings: Sequence[float],
    biases: Sequence[Tensor] | None,
    dropout_p: float,
    seed: Tensor | None,
) -> None:
    num = len(weights)
    lists = {
        "lora_As": lora_As,
        "lora_Bs": lora_Bs,
        "scaling": scalings,
        "biases": weights if biases is None else biases,
    }
    for name, given in lists.items():
        if len(given) != num or not num:
            raise error(name, f"one for each of {num} weights" if num else "at least one layer", len(given))
    if len({isinstance(w, NF4Weight) for w in weights}) > 1:
        raise error("weights", "all tensors or all NF4Weight", [type(w).__name__ for w in weights])
    for i, weight in enumerate(weights):
        if not is_number(scalings[i]):
            raise error("scaling", "a finite number", repr(scalings[i]))
        try:
            if isinstance(weight, NF4Weight):
                check_nf4("weight", weight)
                if weight.codes.device != x.device:
                    raise error("weight", f"device {x.device}", f"device {weight.codes.device}")
                weight = x.new_empty(()).expand(weight.shape)  # for its shape
            bias = None if biases is None else biases[i]
            if biases is not None and not isinstance(bias, Tensor):
                raise error("bias", "a tensor for each layer, or no biases", repr(bias))
            check_lora(x, weight, lora_As[i], lora_Bs[i], bias, dropout_p, seed)
        except ValueError as refusal:
            if num == 1:
                raise
            raise ValueError(f"layer {i} of {num}: {refusal}") from None
