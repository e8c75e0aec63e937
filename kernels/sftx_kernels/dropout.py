"""`dropped_mask` makes dropout masks from a seed, 16 random bits an element; `triton.dropout` does so in kernels.

`seeded_dropout` is dropout with such a mask, for an input that several products share.

A probability is rounded to a multiple of 2**-16 and the scale of kept elements uses the rounded value, so that the mean
is exact.
"""

from __future__ import annotations

from typing import Any, Final

import torch
from torch import Tensor

_LEVELS: Final = 1 << 16


def threshold_of(dropout_p: float) -> int:
    """Return the threshold below which an element's 16 bits drop it. Some are always kept, since dropout_p < 1."""
    return min(round(dropout_p * _LEVELS), _LEVELS - 1)


def keep_scale(threshold: int) -> float:
    """Return the factor of the kept elements: 1 / (1 - p), with p as rounded."""
    return _LEVELS / (_LEVELS - threshold)


def dropped_mask(shape: torch.Size, threshold: int, seed: int, device: torch.device) -> Tensor:
    """Return a bool tensor that is True where an element is dropped. It does not depend on the global generators.

    Four elements share a draw of 64 bits: 2.9 ms for 1.2 M elements on one core, where bernoulli_ takes 10.8.
    """
    generator = torch.Generator(device).manual_seed(seed)
    num_elements = shape.numel()
    draws = torch.empty(-(-num_elements // 4), dtype=torch.int64, device=device)
    draws.random_(-(1 << 63), None, generator=generator)
    return draws.view(torch.int16)[:num_elements].view(shape) < threshold - _LEVELS // 2


def seeded_dropout(x: Tensor, dropout_p: float, seed: Tensor) -> Tensor:
    """Return x with dropped elements set to 0 and the others divided by their probability, in x's dtype.

    The mask is that of `lora_linear` with the same arguments in plain torch: a function of x's shape, the seed (0-d
    int64) and the kind of device. It is made again in backward, so x itself is not kept.
    """
    threshold = threshold_of(dropout_p)
    return x if threshold == 0 else _drop(x, threshold, seed)


@torch.library.custom_op("sftx::dropout", mutates_args=())
def _drop(x: Tensor, threshold: int, seed: Tensor) -> Tensor:
    dropped = dropped_mask(x.shape, threshold, int(seed), x.device)
    return (x * keep_scale(threshold)).masked_fill_(dropped, 0)


@_drop.register_fake
def _(x, threshold, seed):  # type: ignore[no-untyped-def]
    return torch.empty_like(x)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, ctx.threshold, seed = inputs
    ctx.save_for_backward(seed)


def _differentiate(ctx: Any, dy: Tensor) -> tuple[Tensor, None, None]:
    (seed,) = ctx.saved_tensors
    return _drop(dy, ctx.threshold, seed), None, None


_drop.register_autograd(_differentiate, setup_context=_setup)
