"""Modules of transformers give the same values and gradients by our operations."""

from __future__ import annotations

import copy
import importlib

import pytest
import torch
from torch import nn

from sftx.model import fused_modules
from sftx.model.fused_modules import use_fused_modules
from sftx_kernels import rotary

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
    assert use_fused_modules(fused) == 1
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
    use_fused_modules(module)
    assert use_fused_modules(module) == 0
    other = copy.deepcopy(module)
    nn.init.constant_(other.weight, 2.0)
    x = torch.randn(3, 8)
    torch.testing.assert_close(other(x), 2 * module(x))


def test_other_formulas_stay_as_they_are() -> None:
    gated = class_of("qwen3_next", "Qwen3NextRMSNormGated")(8)
    assert use_fused_modules(gated) == 0

    class CubedRMSNorm(nn.Module):
        def __init__(self, size: int, eps: float = 1e-6) -> None:
            super().__init__()
            self.weight, self.eps = nn.Parameter(torch.ones(size)), eps

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x**3 * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.eps) * self.weight

    assert use_fused_modules(CubedRMSNorm(8)) == 0


MODELS = ["llama", "qwen3", "gemma3_text", "mistral", "phi3", "olmo2", "gpt_neox", "gpt_oss", "cohere"]


def small_model(model_type: str) -> nn.Module:
    from transformers import AutoConfig, AutoModelForCausalLM

    sizes = {
        "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "head_dim": 8, "pad_token_id": 0, "eos_token_id": 1, "bos_token_id": 2,
    }  # fmt: skip
    torch.manual_seed(0)
    model: nn.Module = AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **sizes))
    return model


@pytest.mark.parametrize("model_type", MODELS)
def test_a_model_computes_the_same(model_type: str) -> None:
    model = small_model(model_type)
    fused = copy.deepcopy(model)
    assert use_fused_modules(fused) > 0
    ids = torch.randint(3, 64, (2, 9))
    results = []
    for one in (fused, model):
        out = one(ids, labels=ids)
        out.loss.backward()
        results.append([out.logits, *(parameter.grad for parameter in one.parameters())])
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)


def test_another_model_of_the_architecture_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    monkeypatch.setattr(fused_modules, "rotary", lambda *args: calls.append(1) or rotary(*args))
    model, other = small_model("llama"), small_model("llama")
    use_fused_modules(model)
    ids = torch.randint(3, 64, (1, 5))
    other(ids)
    assert not calls
    model(ids)
    assert len(calls) == 2  # one for each layer


@pytest.mark.parametrize(
    ("model_type", "activation"), [("llama", "silu"), ("gemma3_text", "gelu_tanh"), ("phi3", None)]
)
def test_gated_mlps_are_known_by_what_they_compute(model_type: str, activation: str | None) -> None:
    found = {fused_modules._activation_of(module) for module in small_model(model_type).modules()}
    assert found == {None, activation}
