"""Int8 weights against bitsandbytes, and a linear layer on a quantised weight against one on the dequantised weight."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from bitsandbytes import functional
from torch import Tensor

from sftx_kernels import (
    Int8Weight,
    QuantizedLinear,
    QuantizedWeight,
    dequantize,
    lora_linear,
    quantize_int8,
    quantize_nf4,
    quantized_linear,
)

KINDS = ("nf4", "nf4-double", "int8")


def make(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def quantize(kind: str, weight_OK: Tensor) -> QuantizedWeight:
    return quantize_int8(weight_OK) if kind == "int8" else quantize_nf4(weight_OK, double=kind == "nf4-double")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_int8_is_that_of_bitsandbytes(dtype: torch.dtype) -> None:
    weight_OK = make(48, 72, dtype=dtype)
    ours = quantize_int8(weight_OK)
    codes, absmax, _ = functional.int8_vectorwise_quant(weight_OK)
    assert ours.codes.equal(codes)
    assert ours.absmax.equal(absmax)
    theirs = functional.int8_vectorwise_dequant(codes, absmax)
    torch.testing.assert_close(dequantize(ours, torch.float32), theirs, rtol=3e-7, atol=0)


def test_a_row_of_zeros_stays_zero() -> None:
    weight_OK = make(2, 8)
    weight_OK[1] = 0
    dense_OK = dequantize(quantize_int8(weight_OK), torch.float32)
    assert not dense_OK[1].any()
    assert dense_OK.isfinite().all()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_is_the_layer_of_the_dequantised_weight(kind: str, dtype: torch.dtype) -> None:
    weight = quantize(kind, make(24, 64, dtype=dtype))
    bias, x, dy = (
        make(24, dtype=dtype, seed=1),
        make(3, 5, 64, dtype=dtype, seed=2),
        make(3, 5, 24, dtype=dtype, seed=3),
    )
    x.requires_grad_()
    layer = QuantizedLinear(weight, bias)
    assert layer.dtype == dtype
    y = layer(x)
    (dx,) = torch.autograd.grad(y, x, dy)
    plain = layer.dequantized()
    expected = plain(x)
    (expected_dx,) = torch.autograd.grad(expected, x, dy)
    tolerance = {"rtol": 1e-5, "atol": 1e-5} if dtype == torch.float32 else {"rtol": 2e-2, "atol": 2e-2}
    torch.testing.assert_close(y, expected, **tolerance)
    torch.testing.assert_close(dx, expected_dx, **tolerance)
    updated = lora_linear(x, weight, make(4, 64, dtype=dtype), torch.zeros(24, 4, dtype=dtype), scaling=1.0, bias=bias)
    assert updated.equal(y)


def test_keeps_the_codes_and_no_dense_weight() -> None:
    weight = quantize_nf4(make(256, 256), double=True)
    kept: list[int] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.nbytes) or t, lambda t: t):
        quantized_linear(make(2, 256).requires_grad_(), weight)
    assert sum(kept) == weight.codes.nbytes + sum(scale.nbytes for scale in weight.scales)
    assert sum(kept) < 256 * 256 * 0.53


@pytest.mark.parametrize("kind", KINDS)
def test_compiles_whole(kind: str) -> None:
    weight, x = quantize(kind, make(24, 64)), make(5, 64, seed=1).requires_grad_()
    layer = QuantizedLinear(weight)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    for one, other in zip(*([y, *torch.autograd.grad(y.sum(), x)] for y in (compiled(x), layer(x))), strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("kind", KINDS)
def test_autocast_chooses_the_dtype_of_the_product(kind: str) -> None:
    weight, x = quantize(kind, make(24, 64)), make(5, 64, seed=1)
    with torch.autocast("cpu", torch.bfloat16):
        y = quantized_linear(x, weight)
    assert y.dtype == torch.bfloat16
    expected = F.linear(x, dequantize(weight, torch.float32))
    torch.testing.assert_close(y.float(), expected, rtol=5e-2, atol=2e-1)


@pytest.mark.parametrize("kind", KINDS)
def test_has_sizes_on_meta(kind: str) -> None:
    real, meta = (QuantizedLinear(quantize(kind, make(24, 64).to(device))) for device in ("cpu", "meta"))
    assert {k: (v.shape, v.dtype) for k, v in real.state_dict().items()} == {
        k: (v.shape, v.dtype) for k, v in meta.state_dict().items()
    }
    assert all(tensor.is_meta for tensor in meta.state_dict().values())


def test_refuses_what_does_not_fit() -> None:
    weight = quantize_int8(make(4, 8))
    with pytest.raises(ValueError, match=r"^x: expected shape \[..., 8\], got shape \[2, 9\]"):
        quantized_linear(make(2, 9), weight)
    with pytest.raises(ValueError, match=r"^weight.absmax: expected torch.float32 of shape \[4\] on cpu"):
        quantized_linear(make(2, 8), Int8Weight(weight.codes, weight.absmax[:3]))
    with pytest.raises(ValueError, match=r"^weight_OK: expected finite numbers"):
        quantize_int8(torch.full((2, 2), torch.nan))
