"""lora_linear in plain torch."""

import torch
import torch.nn.functional as F
from torch import Tensor

from sftx_kernels.checks import check_lora, gemm_dtype


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
