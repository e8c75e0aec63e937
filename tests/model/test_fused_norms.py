"""The RMSNorm modules of transformers give the same values and gradients by our operation."""

from __future__ import annotations

import copy
import importlib

import pytest
import torch
from torch import nn

from sftx.model.fused_norms import use_fused_norms

CLASSES = [
    ("llama", "LlamaRMSNorm"),
    ("qwen3", "Qwen3RMSNorm"),
    ("gemma", "GemmaRMSNorm"),
    ("gemma3", "Gemma3RMSNorm"),
    ("gemma3n", "Gemma3nRMSNorm"),
    ("olmo2", "Olmo2RMSNorm"),
    ("gpt_oss", "GptOssRMSNorm"),
    ("llama4", "Llama4TextRMSNorm"),
]


def class_of(architecture: str, name: str) -> type[nn.Module]:
    kind: type[nn.Module] = getattr(
        importlib.import_module(f"transformers.models.{architecture}.modeling_{architecture}"), name
    )
    return kind


@pytest.mark.parametrize(("architecture", "name"), CLASSES)
@pytest.mark.parametrize("weight_dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_values_and_gradients_are_those_of_the_module(
    architecture: str, name: str, dtype: torch.dtype, weight_dtype: torch.dtype
) -> None:
    torch.manual_seed(0)
    module = class_of(architecture, name)(48, eps=0.1).to(weight_dtype)
    nn.init.normal_(module.weight)
    fused = copy.deepcopy(module)
    assert use_fused_norms(fused) == 1
    x, grad = torch.randn(2, 5, 48).to(dtype), torch.randn(2, 5, 48).to(dtype)
    results = []
    for one, leaf in ((fused, x.clone()), (module, x.clone()), (copy.deepcopy(module).double(), x.double())):
        y = one(leaf.requires_grad_())
        y.backward(grad.to(y.dtype))
        results.append((y, leaf.grad, one.weight.grad))
    for ours, theirs, exact in zip(*results, strict=True):
        assert ours.dtype == theirs.dtype
        # The module in fp64 is fp32 inside, which the last term allows for.
        assert (ours - exact).norm() <= 1.1 * (theirs - exact).norm() + 1e-6 * exact.norm()


def test_a_copy_computes_with_its_own_weight() -> None:
    module = class_of("llama", "LlamaRMSNorm")(8)
    use_fused_norms(module)
    assert use_fused_norms(module) == 0
    other = copy.deepcopy(module)
    nn.init.constant_(other.weight, 2.0)
    x = torch.randn(3, 8)
    torch.testing.assert_close(other(x), 2 * module(x))


def test_other_formulas_stay_as_they_are() -> None:
    gated = class_of("qwen3_next", "Qwen3NextRMSNormGated")(8)
    assert use_fused_norms(gated) == 0

    class CubedRMSNorm(nn.Module):
        def __init__(self, size: int, eps: float = 1e-6) -> None:
            super().__init__()
            self.weight, self.eps = nn.Parameter(torch.ones(size)), eps

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x**3 * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.eps) * self.weight

    assert use_fused_norms(CubedRMSNorm(8)) == 0
