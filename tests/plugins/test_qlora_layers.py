"""QLoRA on stacked experts and on Conv1D: codes are bitsandbytes' for each matrix, numbers LoRA's on their values."""

from __future__ import annotations

import json
import re
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from peft import PeftModel
from torch import Tensor
from transformers import AutoModelForCausalLM
from transformers.pytorch_utils import Conv1D

import sftx
from architectures import MIXTURES, write_model
from sessions import session_of
from sftx.trainer.session import Session
from sftx_kernels import QuantizedLinear, dequantize
from sftx_plugins.adapters.lora_experts import GroupedExperts
from sftx_plugins.adapters.lora_layers import LoraQuantizedConv1D, QuantizedConv1D
from trainers import denominator, planned

WIDE = {"hidden_size": 64, "intermediate_size": 64, "moe_intermediate_size": 64}
NAMES = ["gpt2", "mixtral", "gpt-oss", "olmoe", "qwen3-moe", "deepseek-v3"]
FIRST_TIER = ("gpt2", "mixtral", "gpt-oss")
CASES = [pytest.param(name, marks=() if name in FIRST_TIER else pytest.mark.slow) for name in NAMES]


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("experts") / "rows.jsonl"
    rows = [{"prompt": f"what is {n} plus one", "completion": f"{n + 1} " * (n % 5 + 1)} for n in range(8)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Any:
    written: dict[str, Path] = {}

    def model(name: str) -> Path:
        if name not in written:
            if name == "gpt2":
                config: Any = transformers.GPT2Config(
                    n_embd=64, n_layer=2, n_head=4, bos_token_id=1, eos_token_id=2, embd_pdrop=0, attn_pdrop=0,
                    resid_pdrop=0,
                )  # fmt: skip
            else:
                config = MIXTURES[name]()
                for key, value in WIDE.items():
                    if hasattr(config, key):
                        setattr(config, key, value)
            written[name] = write_model(config, tmp_path_factory.mktemp("model"))
        return written[name]

    return model


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=torch.arange(80).view(2, 40) * 7 % 500).logits


def gradients(session: Session) -> dict[str, Tensor]:
    session.lm.train()
    batches = session.trainer.micro_batches(planned(session.sampler.epoch(0)[0], session.data.examples))
    session.trainer.accumulate(batches, denominator(batches), 0)
    return {n: p.grad.clone() for n, p in session.lm.named_parameters() if p.grad is not None}


def quantised_of(session: Session) -> dict[str, Tensor]:
    """Return the dense values of what is quantised, by the names of the model's own parameters."""
    dense = {}
    for path, module in session.lm.model.named_modules():
        if isinstance(module, GroupedExperts):
            for name in module.stack_shapes:
                matrices = [module.matrix(name, expert) for expert in range(module.num_experts)]
                dense[f"{path}.{name}"] = torch.stack(matrices)
        elif isinstance(module, QuantizedLinear) or hasattr(module, "codes"):
            weight: Any = module.quantized if isinstance(module, QuantizedLinear) else module.base_weight()
            values = dequantize(weight, torch.float32)
            is_conv = isinstance(module, QuantizedConv1D | LoraQuantizedConv1D)
            dense[f"{path}.weight"] = values.T if is_conv else values
    return dense


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("eight_bits", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_it_is_lora_on_the_dequantised_weights(
    name: str, eight_bits: bool, models: Any, data: Path, tmp_path: Path
) -> None:
    """The oracle is transformers' own model with the dequantised weights."""
    options = {"lora_dropout": 0.2} if name == "mixtral" else {}
    given = {f"qlora__{key}": value for key, value in {"r": 4, "load_in_8bit": eight_bits, **options}.items()}
    ours = session_of(models(name), data, adapter="qlora", **given)
    dense = quantised_of(ours)
    theirs = AutoModelForCausalLM.from_pretrained(models(name), dtype=torch.float32)
    of_layers = {n for n, p in theirs.get_decoder().named_parameters() if p.ndim >= 2}
    prefix = next(n for n, m in theirs.named_modules() if m is theirs.get_decoder())
    left = {n for n in of_layers if f"{prefix}.{n}" not in dense and not n.endswith("bias")}
    assert not [n for n in left if not any(part in n for part in ("embed", "wte", "wpe", "gate.weight", "router"))]
    with torch.no_grad():
        for key, values in dense.items():
            parameter = theirs.get_parameter(key)
            assert 0 < (parameter - values).abs().max() < 0.3 * parameter.abs().max()
            parameter.copy_(values)
    torch.testing.assert_close(logits(ours.lm.model), logits(theirs), rtol=1e-5, atol=1e-5)
    theirs.save_pretrained(tmp_path / "dense")
    transformers.AutoTokenizer.from_pretrained(models(name)).save_pretrained(tmp_path / "dense")
    lora = session_of(tmp_path / "dense", data, **{f"lora__{key}": v for key, v in {"r": 4, **options}.items()})
    draws = [torch.Generator().manual_seed(3) for _ in range(2)]
    for session, generator in zip((ours, lora), draws, strict=True):
        for _, parameter in sorted(session.lm.named_parameters()):
            if parameter.requires_grad:
                parameter.data.normal_(0, 0.05, generator=generator)
    found, expected = gradients(ours), gradients(lora)
    assert found.keys() == expected.keys()
    for key, gradient in found.items():
        torch.testing.assert_close(gradient, expected[key], rtol=1e-4, atol=1e-6, msg=key)
    # PEFT loads it on the plain model, and here it becomes one.
    ours.lm.adapters["qlora"].save(tmp_path)
    peft = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tmp_path / "dense"), tmp_path)
    after = logits(ours.lm.model)
    torch.testing.assert_close(after, logits(peft), rtol=1e-5, atol=1e-5)
    ours.lm.adapters["qlora"].merge(ours.lm)
    torch.testing.assert_close(logits(ours.lm.model), after, rtol=1e-5, atol=1e-5)
    assert [type(m) for m in ours.lm.model.modules()] == [type(m) for m in theirs.modules()]
    ours.lm.model.save_pretrained(tmp_path / "merged")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    torch.testing.assert_close(logits(again), after, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["gpt2", "gpt-oss"])
def test_the_codes_of_each_matrix_are_those_of_bitsandbytes(name: str, models: Any, data: Path) -> None:
    from bitsandbytes.functional import quantize_4bit

    session = session_of(models(name), data, adapter="qlora", qlora__bnb_4bit_use_double_quant=False)
    plain = AutoModelForCausalLM.from_pretrained(models(name), dtype=torch.float32)
    checked = 0
    for path, module in session.lm.model.named_modules():
        found: list[tuple[Tensor, Any]] = []
        if isinstance(module, GroupedExperts):
            for weight in module.stack_shapes:
                stack: Any = module.stack(weight)
                dense = plain.get_parameter(f"{path}.{weight}")
                found += [(dense[expert], stack.matrix(expert)) for expert in range(len(dense))]
        elif isinstance(module, LoraQuantizedConv1D):
            original: Any = plain.get_submodule(path)
            assert isinstance(original, Conv1D)
            found.append((original.weight.T, module.base_weight()))
        for dense_OK, ours in found:
            codes, state = quantize_4bit(dense_OK.detach().contiguous(), quant_type="nf4", blocksize=64)
            assert torch.equal(ours.codes, codes.flatten())
            assert torch.equal(ours.absmax, state.absmax)
            checked += 1
    assert checked >= 8


def test_what_stays_dense_is_named(data: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    config = MIXTURES["mixtral"]()
    config.hidden_size, config.intermediate_size = 24, 33  # an expert's 24 x 33 weights are no whole blocks
    model = write_model(config, tmp_path)
    session = session_of(model, data, adapter="qlora", qlora__r=4)
    said = r"80.6 % of the decoder's weights stay dense, such as .*experts.gate_up_proj: the number of its elements is"
    assert re.search(said, caplog.text)
    assert not any(isinstance(m, GroupedExperts) and m.stack_shapes for m in session.lm.modules())


@pytest.mark.parametrize("name", ["mixtral", "gpt2"])
def test_a_plan_counts_the_codes(name: str, models: Any, data: Path) -> None:
    session = session_of(models(name), data, adapter="qlora", qlora__r=4)
    tensors = {t.data_ptr(): t.nbytes for t in [*session.lm.parameters(), *session.lm.buffers()] if t.numel()}
    kinds: dict[str, Any] = {}
    for plugin in ("lora", "qlora"):
        plan = sftx.plan(model=str(models(name)), data=str(data), plugins={"chatml": {}, plugin: {"r": 4}})
        kinds[plugin] = plan.need
    assert kinds["qlora"].kinds["weights"] == pytest.approx(sum(tensors.values()), abs=64)
    assert kinds["qlora"].kinds["weights"] < 0.6 * kinds["lora"].kinds["weights"]
    assert kinds["qlora"].num_parameters == kinds["lora"].num_parameters
