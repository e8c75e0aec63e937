"""NF4 against its definition: levels from the quantiles, the nearest level by brute force, and both backends.

On a GPU where there is one; else under Triton's interpreter, which does not round to bf16, so without that.
"""

from __future__ import annotations

from statistics import NormalDist
from typing import Any

import pytest
import torch
from bitsandbytes import functional
from torch import Tensor

from sftx_kernels.nf4 import LEVELS, NESTED_BLOCK_SIZE, NF4Weight, dequantize_nf4, nested_levels, quantize_nf4

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
RUNS = [(dtype, backend) for dtype in DTYPES for backend in ("torch", "triton")]
if DEVICE == "cpu":
    RUNS.remove((torch.bfloat16, "triton"))


def make(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    values = torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return values.to(DEVICE, dtype)


def unpack(weight: NF4Weight) -> Tensor:
    """The number of each element's level, [O, K]."""
    return torch.stack((weight.codes >> 4, weight.codes & 15), -1).long().view(weight.shape)


def test_levels_are_the_quantiles_of_appendix_e() -> None:
    """8 quantiles above 0 and 7 below, evenly spaced in probability from the offset to a half, and 0 itself."""
    offset = (1 - 1 / 32 + 1 - 1 / 30) / 2
    assert round(offset, 7) == 0.9677083

    def quantiles(count: int) -> list[float]:
        return [NormalDist().inv_cdf(offset + (0.5 - offset) * i / count) for i in range(count)]

    values = sorted([*quantiles(8), 0.0, *(-q for q in quantiles(7))])
    torch.testing.assert_close(
        torch.tensor(LEVELS, dtype=torch.float64),
        torch.tensor(values, dtype=torch.float64) / max(values),
        rtol=1e-6,
        atol=1e-7,
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("block_size", [2, 16, 64, 96])
def test_every_code_is_that_of_the_nearest_level(block_size: int, dtype: torch.dtype) -> None:
    weight_OK = make(24, 32, dtype=dtype)
    quantized = quantize_nf4(weight_OK, block_size)
    assert (quantized.codes.dtype, quantized.absmax.dtype) == (torch.uint8, torch.float32)
    assert quantized.shape == (24, 32)
    assert quantized.block_size == block_size
    blocks = weight_OK.double().reshape(-1, block_size)
    assert quantized.absmax.double().equal(blocks.abs().amax(1))
    scaled = (blocks / blocks.abs().amax(1, keepdim=True)).view(24, 32, 1)
    distances = (scaled - torch.tensor(LEVELS, dtype=torch.float64, device=DEVICE)).abs()
    chosen = distances.gather(2, unpack(quantized)[..., None])
    assert (chosen <= distances.amin(2, keepdim=True) + 1e-6).all()


@pytest.mark.parametrize(("dtype", "backend"), RUNS)
@pytest.mark.parametrize("shape", [(1, 2), (5, 12), (64, 96), (130, 66), (0, 64)])
def test_dequantized_is_level_times_absmax(shape: tuple[int, int], dtype: torch.dtype, backend: str) -> None:
    block_size = next(size for size in (64, 12, 2) if shape[0] * shape[1] % size == 0)
    quantized = quantize_nf4(make(*shape), block_size)
    levels = torch.tensor(LEVELS, device=DEVICE)[unpack(quantized)].view(-1, block_size)
    expected = (levels * quantized.absmax[:, None]).to(dtype).view(shape)
    assert dequantize_nf4(quantized, dtype, backend=backend).equal(expected)
    out = torch.empty(shape, dtype=dtype, device=DEVICE)
    assert dequantize_nf4(quantized, dtype, out=out, backend=backend) is out
    assert out.equal(expected)


@pytest.mark.parametrize(("dtype", "backend"), RUNS)
@pytest.mark.parametrize("shape", [(2, 64), (130, 66), (96, 512), (0, 64)])
def test_double_quantised_absmax_is_level_times_nested_absmax_plus_offset(
    shape: tuple[int, int], dtype: torch.dtype, backend: str
) -> None:
    block_size = 64 if shape[0] * shape[1] % 64 == 0 else 2
    once, twice = quantize_nf4(make(*shape), block_size), quantize_nf4(make(*shape), block_size, double=True)
    assert twice.codes.equal(once.codes)
    assert twice.nested_absmax is not None
    assert twice.offset is not None
    blocks_of_absmax = twice.nested_absmax.repeat_interleave(NESTED_BLOCK_SIZE)[: once.absmax.numel()]
    absmax = nested_levels(twice.codes.device)[twice.absmax.long()] * blocks_of_absmax + twice.offset
    expected = dequantize_nf4(once._replace(absmax=absmax), dtype, backend=backend)
    assert dequantize_nf4(twice, dtype, backend=backend).equal(expected)
    if absmax.numel():  # half of the largest gap between levels, 0.0071, times the largest difference to the mean
        assert (absmax - once.absmax).abs().max() <= 0.0072 * twice.nested_absmax.max()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_codes_and_absmax_are_those_of_bitsandbytes(dtype: torch.dtype) -> None:
    """bitsandbytes' 8-bit quantiser of a CPU takes the nearest level from a table for inputs of 16 bits, so a few
    absmax between two levels get the other one. In fp64 it compares distances, as its CUDA kernels and this one do."""
    for seed in range(5):
        weight_OK = (torch.randn(96 + seed, 1024, generator=torch.Generator().manual_seed(seed)) * 0.02).to(dtype)
        weight_OK[3] = 0
        codes, state = functional.quantize_4bit(weight_OK, quant_type="nf4")
        once, twice = quantize_nf4(weight_OK), quantize_nf4(weight_OK, double=True)
        assert once.codes.equal(codes.flatten())
        assert once.absmax.equal(state.absmax)
        _, nested = functional.quantize_4bit(weight_OK, quant_type="nf4", compress_statistics=True)
        assert twice.offset is not None
        assert twice.nested_absmax is not None
        assert twice.offset.equal(nested.offset)
        assert twice.nested_absmax.equal(nested.state2.absmax)
        assert nested_levels(torch.device("cpu")).equal(nested.state2.code)
        levels, difference = nested.state2.code, state.absmax - nested.offset
        exact, _ = torch.ops.bitsandbytes.quantize_blockwise.default(difference.double(), levels, NESTED_BLOCK_SIZE)
        assert twice.absmax.equal(exact)
        theirs = functional.dequantize_4bit(codes, state)
        assert dequantize_nf4(once, dtype).equal(theirs)
        same = twice._replace(absmax=nested.absmax)
        assert dequantize_nf4(same, dtype).equal(functional.dequantize_4bit(codes, nested))
        assert (twice.absmax != nested.absmax).float().mean() < 0.01
        assert (twice.absmax.int() - nested.absmax.int()).abs().max() <= 2


def test_a_block_of_zeros_stays_zero() -> None:
    weight_OK = make(2, 64)
    weight_OK[1] = 0
    dense = dequantize_nf4(quantize_nf4(weight_OK), torch.float32)
    assert not dense[1].any()
    assert dense.isfinite().all()


def test_quantizing_again_changes_nothing() -> None:
    once = quantize_nf4(make(16, 64))
    again = quantize_nf4(dequantize_nf4(once, torch.float32))
    assert once.codes.equal(again.codes)
    assert once.absmax.equal(again.absmax)


def test_high_nibble_is_the_first_element() -> None:
    assert quantize_nf4(torch.tensor([[1.0, -1.0]]), 2).codes.tolist() == [0xF0]


def test_op_and_compile() -> None:
    quantized = quantize_nf4(make(8, 64))
    arguments = (quantized.codes, list(quantized.scales), [8, 64], torch.float16, "torch")
    torch.library.opcheck(torch.ops.sftx.dequantize_nf4, arguments)
    expected = dequantize_nf4(quantized, torch.float16)
    compiled = torch.compile(dequantize_nf4, fullgraph=True, backend="aot_eager")
    assert compiled(quantized, torch.float16).equal(expected)
    out = torch.empty_like(expected)
    assert compiled(quantized, torch.float16, out=out).equal(expected)
    assert out.equal(expected)


@pytest.mark.parametrize(
    ("weight", "block_size", "message"),
    [
        (torch.zeros(3, 10), 64, r"block_size: expected an even divisor of 30 \(3x10\), got 64"),
        (torch.zeros(3, 5), 5, r"block_size: expected an even divisor of 15 \(3x5\), got 5"),
        (torch.zeros(3, 10), 0, r"block_size: expected an even divisor"),
        (torch.zeros(64), 64, r"weight_OK: expected a floating \[O, K\], got torch.float32 of shape \[64\]"),
        (torch.zeros(8, 8).int(), 64, r"weight_OK: expected a floating \[O, K\], got torch.int32"),
        (torch.full((8, 8), torch.inf), 64, r"weight_OK: expected finite numbers, got inf or nan"),
    ],
)
def test_quantize_refuses(weight: Tensor, block_size: int, message: str) -> None:
    with pytest.raises(ValueError, match=f"^{message}"):
        quantize_nf4(weight, block_size)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"codes": torch.zeros(128).int()},
            r"weight.codes: expected torch.uint8 of shape \[4 \* 64 / 2\], got torch.int32",
        ),
        (
            {"codes": torch.zeros(127).byte()},
            r"weight.codes: expected torch.uint8 of shape .*, got torch.uint8 of \[127\]",
        ),
        ({"absmax": torch.zeros(4).half()}, r"weight.absmax: expected torch.float32 on cpu, got torch.float16"),
        ({"absmax": torch.zeros(3)}, r"weight.absmax: expected one number for each of equal blocks .* shape \[3\]"),
        ({"absmax": torch.zeros(0)}, r"weight.absmax: expected one number for each of equal blocks .* shape \[0\]"),
        (
            {"absmax": torch.zeros(4).byte(), "nested_absmax": torch.zeros(2), "offset": torch.tensor(0.0)},
            r"weight.nested_absmax: expected torch.float32 of shape \[1\] on cpu, got torch.float32 of shape \[2\]",
        ),
        ({"offset": torch.tensor(0.0)}, r"weight: expected nested_absmax and offset, or neither, got one of them"),
        ({"codes": torch.zeros(256).byte()[::2]}, r"weight: expected contiguous codes and absmax, got strides \(2,\)"),
    ],
)
def test_dequantize_refuses(change: dict[str, Any], message: str) -> None:
    good = NF4Weight(torch.zeros(128, dtype=torch.uint8), torch.zeros(4), (4, 64))
    dequantize_nf4(good, torch.float32)
    with pytest.raises(ValueError, match=f"^{message}"):
        dequantize_nf4(good._replace(**change), torch.float32)


def test_dequantizes_to_floats_alone() -> None:
    with pytest.raises(ValueError, match=r"^dtype: expected a floating dtype, got torch.int32"):
        dequantize_nf4(quantize_nf4(make(8, 64)), torch.int32)


def test_out_must_fit() -> None:
    quantized = quantize_nf4(make(8, 64))
    for out in (torch.empty(8, 64).half(), torch.empty(64, 8), torch.empty(64, 8).T):
        with pytest.raises(ValueError, match=r"^out: expected a contiguous torch.float32 of shape \[8, 64\]"):
            dequantize_nf4(quantized, torch.float32, out=out)
