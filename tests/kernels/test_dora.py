"""The norms of W + s B A against the matrix itself in fp64, in chunks, for NF4 too; and dropout from a seed."""

from __future__ import annotations

import pytest
import torch

from sftx_kernels import dora, lora_linear, quantize_nf4, seeded_dropout, squared_row_norms, updated_row_norms
from sftx_kernels.nf4 import dequantize_nf4


def matrices(dtype: torch.dtype, size: float = 0.1) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    weight, A, B = (torch.randn(shape, generator=generator) for shape in ((96, 64), (4, 64), (96, 4)))
    return weight.to(dtype), size * A, size * B


@pytest.mark.parametrize("chunk", [1 << 22, 64 * 7])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_norms_of_an_updated_weight(dtype: torch.dtype, chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dora, "_CHUNK_ELEMENTS", chunk)
    weight, A, B = matrices(dtype)
    norms = updated_row_norms(weight, squared_row_norms(weight), A, B, scaling=2.0)
    expected = (weight.double() + 2.0 * B.double() @ A.double()).norm(dim=1)
    torch.testing.assert_close(norms.double(), expected, rtol=1e-12 if dtype == torch.float64 else 1e-6, atol=0)
    transposed = weight.T.contiguous().T  # as transformers' Conv1D keeps it
    again = updated_row_norms(transposed, squared_row_norms(transposed), A, B, scaling=2.0)
    torch.testing.assert_close(again, norms)


def test_norms_of_an_nf4_weight(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dora, "_CHUNK_ELEMENTS", 64 * 7)
    weight, A, B = matrices(torch.float32)
    quantised = quantize_nf4(weight)
    dense = dequantize_nf4(quantised, torch.float32)
    norms = updated_row_norms(quantised, squared_row_norms(quantised), A, B, scaling=2.0)
    torch.testing.assert_close(norms, (dense + 2.0 * B @ A).norm(dim=1), rtol=1e-5, atol=0)


def test_an_update_that_cancels_a_row_leaves_a_positive_norm() -> None:
    weight, A, B = matrices(torch.float32)
    weight[0] = -(2.0 * B[:1] @ A)[0]
    norms = updated_row_norms(weight, squared_row_norms(weight), A, B, scaling=2.0)
    assert norms.isfinite().all()
    assert norms.min() >= 0.99e-3 * weight[0].norm()


@pytest.mark.parametrize("compiled", [False, True])
def test_dropout_from_a_seed_is_that_of_lora_linear(compiled: bool) -> None:
    x = torch.randn(5, 64, requires_grad=True)
    weight, A, B = matrices(torch.float32)
    seed = torch.tensor(3)
    function = torch.compile(seeded_dropout, backend="aot_eager") if compiled else seeded_dropout
    dropped = function(x, 0.3, seed)
    expected = lora_linear(x, weight, A, B, scaling=2.0, dropout_p=0.3, seed=seed)
    torch.testing.assert_close(x @ weight.T + 2.0 * dropped @ A.T @ B.T, expected, rtol=1e-5, atol=1e-4)
    (gradient,) = torch.autograd.grad(dropped.sum(), x)
    assert torch.equal(gradient == 0, dropped == 0)
    assert 0.1 < (dropped == 0).float().mean() < 0.5
