"""QLoRA: PEFT on a base that bitsandbytes quantised, merging, and what its options choose."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig, LlamaConfig, LlamaForCausalLM

from sessions import session_of
from sftx.errors import ConfigError
from sftx.model.quantised import num_weights
from sftx.trainer.session import Session
from sftx_kernels import QuantizedLinear
from sftx_plugins.adapters.lora_layers import LoraQuantizedLinear
from trainers import planned

ROWS = [{"prompt": f"what is {n} plus one", "completion": f"{n + 1} " * (n % 5 + 1)} for n in range(24)]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("qlora") / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return path


@pytest.fixture(scope="module")
def model(tokenizer_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama whose inputs are as wide as a block of 64, as bitsandbytes needs on a CPU."""
    directory = tmp_path_factory.mktemp("model")
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_dir)
    tokenizer.save_pretrained(directory)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, eos_token_id=tokenizer.eos_token_id,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(directory)
    return directory


def qlora_of(model: Path, data: Path, **options: Any) -> Session:
    given: dict[str, Any] = {"train__learning_rate": 1e-2}
    return session_of(model, data, adapter="qlora", **given | options)


def logits(session: Session) -> Tensor:
    batch = session.trainer.collator.collate(session.data.examples[:4])
    session.lm.eval()
    with torch.no_grad():
        return session.lm.logits(session.lm.hidden(batch).hidden_BTD)


def take_steps(session: Session, count: int = 3) -> None:
    for number, (epoch, step, *_) in zip(range(1, count + 1), session.sampler, strict=False):
        session.lm.train()
        session.trainer.train_step(number, epoch, session.trainer.micro_batches(planned(step, session.data.examples)))


@pytest.mark.parametrize(
    ("option", "theirs"),
    [
        ({}, {"load_in_4bit": True, "bnb_4bit_use_double_quant": True}),
        ({"qlora__bnb_4bit_use_double_quant": False}, {"load_in_4bit": True}),
    ],
)
def test_peft_computes_the_same_on_a_base_that_bitsandbytes_quantised(
    model: Path, data: Path, tmp_path: Path, option: dict[str, Any], theirs: dict[str, Any]
) -> None:
    session = qlora_of(model, data, **option)
    before = logits(session)
    take_steps(session)
    session.lm.adapters["qlora"].save(tmp_path)
    kind = BitsAndBytesConfig(**theirs, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32)
    base = AutoModelForCausalLM.from_pretrained(model, quantization_config=kind, dtype=torch.float32)
    ids_BT = session.trainer.collator.collate(session.data.examples[:1]).input_ids_BT
    with torch.no_grad():
        ours = logits(session)[:1, : ids_BT.shape[1]]
        # In evaluation bitsandbytes multiplies in bf16 on some CPUs.
        peft = PeftModel.from_pretrained(base, tmp_path).train()
        expected = peft(ids_BT).logits
    assert (ours - before[:1, : ids_BT.shape[1]]).abs().max() > 1e-3
    # Doubly quantised, a few absmax of bitsandbytes on a CPU are not the nearest level (tests/kernels/test_nf4.py).
    tolerance = 2e-3 if theirs.get("bnb_4bit_use_double_quant") else 2e-5
    torch.testing.assert_close(ours, expected, rtol=tolerance, atol=tolerance)


def test_the_adapter_is_loaded_by_peft_on_the_plain_base(model: Path, data: Path, tmp_path: Path) -> None:
    session = qlora_of(model, data)
    take_steps(session)
    session.lm.adapters["qlora"].save(tmp_path)
    ids_BT = session.trainer.collator.collate(session.data.examples[:1]).input_ids_BT
    plain = session_of(model, data)
    plain.lm.adapters["lora"].load(tmp_path)
    peft = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(model), tmp_path).eval()
    with torch.no_grad():
        expected = peft(ids_BT).logits
    torch.testing.assert_close(logits(plain)[:1, : ids_BT.shape[1]], expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("eight_bits", [False, True])
def test_it_merges_into_the_dequantised_weights(model: Path, data: Path, eight_bits: bool) -> None:
    session = qlora_of(model, data, qlora__load_in_8bit=eight_bits)
    quantised = {n: m for n, m in session.lm.named_modules() if isinstance(m, LoraQuantizedLinear)}
    assert len(quantised) == 2 * 7
    take_steps(session)
    after = logits(session)
    session.lm.adapters["qlora"].merge(session.lm)
    torch.testing.assert_close(logits(session), after, rtol=1e-5, atol=1e-5)
    assert {p.dtype for p in session.lm.parameters()} == {torch.float32}


def test_what_stays_dense(model: Path, data: Path) -> None:
    def quantised(**options: Any) -> set[str]:
        session = qlora_of(model, data, **options)
        return {
            name.rpartition(".")[2]
            for name, module in session.lm.named_modules()
            if isinstance(module, QuantizedLinear | LoraQuantizedLinear)
        }

    everything = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
    assert quantised() == everything
    assert quantised(qlora__target_modules=["q_proj"]) == everything  # layers that are not adapted as well
    assert quantised(qlora__llm_int8_skip_modules=["down_proj", "self_attn.q_proj"]) == everything - {
        "down_proj",
        "q_proj",
    }
    assert quantised(qlora__modules_to_save=["layers.1.mlp", "layers.0.mlp"]) == {
        "q_proj",
        "k_proj",
        "v_proj",
        "o_proj",
    }


def test_what_is_quantised_and_not_adapted_is_named_with_the_option_that_reaches_it(model: Path, data: Path) -> None:
    reach = qlora_of(model, data, qlora__target_modules=["q_proj"]).start_report.reach
    shares = dict(re.findall(r"([\w.]+) ([\d.]+) %", reach))
    assert {"mlp.up_proj", "mlp.down_proj", "self_attn.k_proj", "lm_head"} <= shares.keys()
    assert reach.endswith("(name them in target_modules)")


def test_nothing_to_quantise_is_refused(model: Path, data: Path) -> None:
    with pytest.raises(ConfigError, match=r"qlora: no layer .* is left to quantise; take lora, or name fewer"):
        qlora_of(model, data, qlora__llm_int8_skip_modules=["layers"])


def test_weights_are_counted_and_not_their_bytes(model: Path, data: Path) -> None:
    lora, qlora = session_of(model, data), qlora_of(model, data)
    assert num_weights(qlora.lm.parameters()) == num_weights(lora.lm.parameters())
    assert qlora.start_report.num_parameters == lora.start_report.num_parameters


def test_it_refuses_to_run_beside_another_adapter(model: Path, data: Path) -> None:
    with pytest.raises(ConfigError, match=r"another adapter of this run has changed .*; leave one of the two out"):
        session_of(model, data, "qlora")
    with pytest.raises(ConfigError, match=r"q_proj is quantised, and vera adapts plain layers; take lora or qlora"):
        session_of(model, data, "qlora", adapter="vera")
