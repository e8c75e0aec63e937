"""Layers that are quantised while a model is read, and models that arrive quantised."""

from __future__ import annotations

import json
import shutil
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    BitsAndBytesConfig,
    GptOssConfig,
    GptOssForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

from sftx.errors import ModelError
from sftx.model.load import load_model, load_spec
from sftx.types import Adapter
from sftx_kernels import NF4Weight, QuantizedLinear, dequantize, quantize_nf4
from sftx_plugins.adapters.lora import Lora
from sftx_plugins.adapters.qlora import QLora

CPU = torch.device("cpu")
SIZES: dict[str, Any] = {
    "vocab_size": 96, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "tie_word_embeddings": False, "max_position_embeddings": 64,
}  # fmt: skip
IDS = torch.arange(32).view(2, 16)


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama with biases, in several files."""
    directory = tmp_path_factory.mktemp("llama")
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**SIZES, attention_bias=True))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_(std=0.02)
    model.save_pretrained(directory, max_shard_size="100KB")
    return directory


def copy_with(
    source: Path, target: Path, change: Callable[[dict[str, Tensor]], dict[str, Tensor]], **config: Any
) -> Path:
    """Copy a model with other tensors, in one file, and with these entries in its config.json."""
    target.mkdir(exist_ok=True)
    tensors: dict[str, Tensor] = {}
    for file in source.glob("*.safetensors"):
        tensors |= load_file(file)
    save_file(change(tensors), target / "model.safetensors", metadata={"format": "pt"})
    values = json.loads((source / "config.json").read_text()) | config
    (target / "config.json").write_text(json.dumps(values))
    return target


def load(directory: Path, plugin: Any = None, dtype: torch.dtype = torch.float32, watch: Any = None) -> Any:
    spec = load_spec(str(directory))
    adapters: list[Adapter] = [] if plugin is None else [plugin.sftx_adapter(spec)]
    if watch is not None:
        adapters = [watch(adapters[0])]
    return load_model(spec, adapters, dtype=dtype, device=CPU)


class Watching(Adapter):
    """Passes `quantize` on, and notes which of the weights that it saw are still in memory at the next call."""

    def __init__(self, adapter: Adapter) -> None:
        self.adapter = adapter
        self.seen: dict[str, weakref.ref[Tensor]] = {}

    def quantize(self, name: str, module: nn.Module) -> nn.Module | None:
        if isinstance(module, nn.Linear) and not module.weight.is_meta:
            assert [path for path, weight in self.seen.items() if weight() is not None] == []
            self.seen[name] = weakref.ref(module.weight)
        return self.adapter.quantize(name, module)

    def attach(self, lm: Any) -> None: ...
    def disabled(self) -> Any: ...
    def save(self, directory: Path) -> None: ...
    def load(self, directory: Path) -> None: ...
    def merge(self, lm: Any) -> None: ...


# --- while it is read -----------------------------------------------------------------------------


def test_each_layer_is_quantised_before_the_next_one_is_read(llama: Path) -> None:
    watching: list[Watching] = []

    def watch(adapter: Adapter) -> Adapter:
        watching.append(Watching(adapter))
        return watching[0]

    model, plain = load(llama, QLora(r=4), watch=watch), load(llama)
    assert len(watching[0].seen) == 2 * 7
    for name, linear in plain.named_modules():
        if isinstance(linear, nn.Linear) and name != "lm_head":
            layer = model.get_submodule(name)
            assert isinstance(layer, QuantizedLinear)
            expected, got = quantize_nf4(linear.weight, double=True), layer.quantized
            assert isinstance(got, NF4Weight)
            assert got.codes.equal(expected.codes)
            assert all(one.equal(two) for one, two in zip(got.scales, expected.scales, strict=True))
            if linear.bias is None:
                assert layer.bias is None
            else:
                assert layer.bias is not None
                assert layer.bias.equal(linear.bias)
    assert model.lm_head.weight.equal(plain.lm_head.weight)
    assert model.model.norm.weight.equal(plain.model.norm.weight)
    with torch.no_grad():
        difference = (model(IDS).logits - plain(IDS).logits).abs().max()
    assert 0 < difference < 0.2 * plain(IDS).logits.abs().max()


def test_transformers_knows_nothing_of_it_afterwards(llama: Path, tmp_path: Path) -> None:
    model = load(llama, QLora(r=4))
    assert not hasattr(model.config, "quantization_config")
    assert not hasattr(model, "hf_quantizer")
    assert not model.is_quantized
    model.to("meta")


def test_keys_that_transformers_merges_are_merged(tmp_path: Path) -> None:
    torch.manual_seed(0)
    more = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "head_dim": 16}
    Qwen3MoeForCausalLM(Qwen3MoeConfig(**SIZES, **more)).save_pretrained(tmp_path)
    assert any(".experts.0." in name for name in load_file(tmp_path / "model.safetensors"))
    model, plain = load(tmp_path, QLora(r=4, allow_low_coverage=True)), load(tmp_path)
    assert isinstance(model.model.layers[0].self_attn.q_proj, QuantizedLinear)
    stack = model.model.layers[0].mlp.experts.stack("gate_up_proj")
    for number, weight_OK in enumerate(plain.model.layers[0].mlp.experts.gate_up_proj):
        assert torch.equal(stack.matrix(number).codes, quantize_nf4(weight_OK, double=True).codes)


NAME = "model.layers.1.self_attn.q_proj.weight"


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda t: {n: v for n, v in t.items() if n != NAME}, f"1 tensors are missing .* {NAME}"),
        (
            lambda t: t | {NAME: t[NAME][:32].clone()},
            rf"1 have another shape .*{NAME} is \[32, 64\], expected \[64, 64\]",
        ),
        (
            lambda t: t | {NAME: t[NAME] * torch.inf},
            "cannot load its weights: weight_OK: expected finite numbers, got inf",
        ),
    ],
)
def test_files_that_do_not_fit_are_said_so(llama: Path, tmp_path: Path, change: Any, said: str) -> None:
    directory = copy_with(llama, tmp_path / "model", change)
    with pytest.raises(ModelError, match=f"^model {directory}: .*{said}"):
        load(directory, QLora(r=4))


# --- models that arrive quantised -----------------------------------------------------------------

BNB: dict[str, dict[str, Any]] = {
    "nf4": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": torch.float32},
    "int8": {"load_in_8bit": True},
}
BNB["nf4-double"] = BNB["nf4"] | {"bnb_4bit_use_double_quant": True}


@pytest.mark.parametrize("kind", BNB)
def test_layers_of_bitsandbytes_are_taken_as_they_are(llama: Path, tmp_path: Path, kind: str) -> None:
    theirs = AutoModelForCausalLM.from_pretrained(
        llama, quantization_config=BitsAndBytesConfig(**BNB[kind]), dtype=torch.float32
    )
    theirs.save_pretrained(tmp_path)
    stored = load_file(tmp_path / "model.safetensors")
    for plugin in (Lora(r=4), QLora(r=4)):
        model = load(tmp_path, plugin)
        layers = {n: m for n, m in model.named_modules() if isinstance(m, QuantizedLinear)}
        assert len(layers) == 2 * 7
        for name, layer in layers.items():
            assert layer.codes.flatten().equal(stored[f"{name}.weight"].flatten())
            dense = dequantize(layer.quantized, torch.float32)
            if kind == "int8":
                expected = stored[f"{name}.weight"] * stored[f"{name}.SCB"][:, None] / 127
                torch.testing.assert_close(dense, expected, rtol=3e-7, atol=0)
            else:
                from bitsandbytes.functional import dequantize_4bit

                weight = theirs.get_submodule(name).weight
                assert dense.equal(dequantize_4bit(weight.data, weight.quant_state))
    if kind != "int8":  # whose inputs bitsandbytes quantises as well
        ours, theirs = model.train(), theirs.train()  # in evaluation bitsandbytes multiplies in bf16 on this CPU
        with torch.no_grad():
            torch.testing.assert_close(ours(IDS).logits, theirs(IDS).logits, rtol=1e-5, atol=1e-5)


def test_only_an_adapter_trains_on_layers_of_bitsandbytes(llama: Path, tmp_path: Path) -> None:
    quantization = {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
    directory = copy_with(llama, tmp_path / "m", lambda t: t, quantization_config=quantization)
    with pytest.raises(ModelError, match=r"cannot be trained themselves; train an adapter \(--plugin lora\)"):
        load(directory)


def test_fp8_in_blocks_is_read_as_dense_weights(llama: Path, tmp_path: Path) -> None:
    dense: dict[str, Tensor] = {}

    def in_fp8(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        stored = {}
        for name, tensor in tensors.items():
            stored[name] = dense[name] = tensor
            if name.endswith("proj.weight"):
                rows, columns = (size // 32 for size in tensor.shape)
                blocks = tensor.view(rows, 32, columns, 32)
                scale = blocks.abs().amax((1, 3)) / 448
                codes = (blocks / scale[:, None, :, None]).to(torch.float8_e4m3fn)
                stored[name], stored[f"{name}_scale_inv"] = codes.view(tensor.shape), scale
                dense[name] = (codes.float() * scale[:, None, :, None]).view(tensor.shape)
        return stored

    quantization = {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [32, 32]}
    directory = copy_with(llama, tmp_path / "m", in_fp8, quantization_config=quantization)
    model = load(directory)
    assert all(tensor.equal(dense[name]) for name, tensor in model.state_dict().items())
    assert not hasattr(model.config, "quantization_config")
    layer = load(directory, QLora(r=4)).model.layers[1].mlp.up_proj
    assert layer.codes.equal(quantize_nf4(dense["model.layers.1.mlp.up_proj.weight"]).codes)


def test_mxfp4_of_gpt_oss_is_read_as_dense_weights(tmp_path: Path) -> None:
    levels = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6])
    levels = torch.cat([levels, -levels])
    dense: dict[str, Tensor] = {}

    def in_mxfp4(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        stored = {}
        for name, tensor in tensors.items():
            if name.endswith("_proj") and tensor.ndim == 3:  # [E, K, O], stored as [E, O, K] in blocks of 32
                blocks = tensor.transpose(1, 2).unflatten(2, (-1, 32))
                exponent = (blocks.abs().amax(3, keepdim=True) / 4).log2().floor()
                codes = (blocks / 2**exponent)[..., None].sub(levels).abs().argmin(-1)
                dense[name] = (levels[codes] * 2**exponent).flatten(2).transpose(1, 2)
                stored[f"{name}_blocks"] = (codes[..., ::2] | codes[..., 1::2] << 4).to(torch.uint8)
                stored[f"{name}_scales"] = (exponent[..., 0] + 127).to(torch.uint8)
            else:
                stored[name] = dense[name] = tensor
        return stored

    torch.manual_seed(0)
    more = {"num_local_experts": 4, "num_experts_per_tok": 2, "head_dim": 16, "sliding_window": 8}
    config = GptOssConfig(**SIZES, **more, layer_types=["sliding_attention", "full_attention"])
    GptOssForCausalLM(config).save_pretrained(tmp_path / "plain")
    quantization = {"quant_method": "mxfp4", "modules_to_not_convert": ["model.layers.*.self_attn", "lm_head"]}
    directory = copy_with(tmp_path / "plain", tmp_path / "m", in_mxfp4, quantization_config=quantization)
    shutil.rmtree(tmp_path / "plain")
    model = load(directory)
    assert all(tensor.equal(dense[name]) for name, tensor in model.state_dict().items())
