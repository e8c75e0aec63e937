"""What a run trains of a model, and what it says that it leaves: experts, routers, and towers of other modalities."""

from __future__ import annotations

import json
import logging
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    Gemma3Config,
    Gemma3ImageProcessorPil,
    Gemma3Processor,
    GPT2Config,
)

from architectures import MIXTURES, SHAPE, write_model
from sessions import session_of
from sftx.checkpoint.checkpoint import write_artefact
from sftx.checkpoint.load_run import load_run
from sftx.config.loading import load
from sftx.errors import ConfigError, ModelError
from sftx.model import tiny
from sftx.model.load import load_spec
from sftx.trainer.session import Session
from sftx.training import assemble
from sftx_plugins.adapters.lora import Lora
from sftx_plugins.trainable.freeze import Freeze
from trainers import planned


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("parts") / "rows.jsonl"
    rows = [{"prompt": f"what is {n} plus one", "completion": f"{n + 1} " * (n % 5 + 1)} for n in range(8)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def gemma3() -> Gemma3Config:
    vision = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    return Gemma3Config(
        text_config={**SHAPE, "sliding_window": 16},
        vision_config={**vision, "image_size": 28, "patch_size": 14},
        mm_tokens_per_image=4,
        image_token_index=5,
        boi_token_index=6,
        eoi_token_index=7,
    )


def take_a_step(session: Session) -> None:
    epoch, step, *_ = next(iter(session.sampler))
    session.lm.train()
    session.trainer.train_step(1, epoch, session.trainer.micro_batches(planned(step, session.data.examples)))


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=torch.arange(40)[None] * 7 % 500).logits


@pytest.mark.parametrize("name", MIXTURES)
def test_experts_that_are_not_adapted_are_named_and_peft_loads_the_rest(
    name: str, data: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    from peft import PeftModel

    model = write_model(MIXTURES[name](), tmp_path / "model")
    with caplog.at_level(logging.WARNING, "sftx"):
        in_deepseek = ["q_b_proj", "o_proj", "shared_experts.down_proj", "layers.0.mlp.down_proj"]
        targets = in_deepseek if name == "deepseek-v3" else ["q_proj", "o_proj"]
        session = session_of(
            model, data, train__learning_rate=1e-2, lora__lora_dropout=0.1, lora__target_modules=targets
        )
    skeleton = load_spec(str(model)).skeleton
    experts = sum(p.numel() for path, p in skeleton.named_parameters() if path.endswith("experts.gate_up_proj"))
    share = 100 * experts / skeleton.num_parameters()
    assert f"not adapted: mlp.experts.gate_up_proj {share:.1f} %" in caplog.text
    take_a_step(session)
    session.lm.adapters["lora"].save(tmp_path)
    base = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    untrained = logits(base)
    theirs = logits(PeftModel.from_pretrained(base, tmp_path))
    torch.testing.assert_close(logits(session.lm.model), theirs, rtol=1e-5, atol=1e-5)
    assert (theirs - untrained).abs().max() > 1e-4
    torch.testing.assert_close(logits(load_run(tmp_path).lm.model), theirs, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("options", [{}, {"target_modules": ("c_attn",)}, {"modules_to_save": ("lm_head", "wte")}])
def test_a_model_without_linear_layers_gets_no_adapter(options: dict[str, Any], tmp_path: Path) -> None:
    config = GPT2Config(n_embd=32, n_layer=2, n_head=4, bos_token_id=1, eos_token_id=2)
    spec = load_spec(str(write_model(config, tmp_path)))
    for block in spec.skeleton.transformer.h:
        for name in ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj"):
            block.set_submodule(name, torch.nn.Identity())
    with pytest.raises(
        ConfigError, match=r"GPT2LMHeadModel has no layer that this adapter can change \(nn\.Linear, Conv1D"
    ):
        Lora(**options).sftx_adapter(spec)


@pytest.mark.parametrize("saved", [["mlp", "norm"], ["mlp", "down_proj"], ["q_proj", "embed_tokens", "lm_head"]])
def test_what_trains_in_full_is_not_adapted_beside(saved: list[str], data: Path, tmp_path: Path) -> None:
    """A module within another one, or one that is adapted too, would be saved under names that PEFT does not know."""
    from peft import PeftModel

    session = session_of(tiny.model_dir(), data, train__learning_rate=1e-2, lora__modules_to_save=saved)
    take_a_step(session)
    session.lm.adapters["lora"].save(tmp_path)
    base = AutoModelForCausalLM.from_pretrained(tiny.model_dir(), dtype=torch.float32)
    theirs = logits(PeftModel.from_pretrained(base, tmp_path))
    torch.testing.assert_close(logits(session.lm.model), theirs, rtol=1e-5, atol=1e-5)


def test_modules_that_leave_nothing_to_adapt_are_refused() -> None:
    with pytest.raises(ConfigError, match="nothing is left to adapt"):
        Lora(modules_to_save=("self_attn", "mlp")).sftx_adapter(load_spec(str(tiny.model_dir())))


def test_adapters_reach_the_language_model_of_a_multimodal_one(
    data: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    from peft import PeftModel

    model = write_model(gemma3(), tmp_path / "model")
    with caplog.at_level(logging.WARNING, "sftx"):
        session = session_of(model, data, train__learning_rate=1e-2)
    assert re.search(r"not trained: vision_tower \d+\.\d % of the model's weights", caplog.text)
    trained = {name for name, p in session.lm.model.named_parameters() if p.requires_grad}
    assert trained
    assert all(name.startswith("model.language_model.") for name in trained)
    take_a_step(session)
    session.lm.adapters["lora"].save(tmp_path)
    theirs = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32), tmp_path)
    torch.testing.assert_close(logits(session.lm.model), logits(theirs), rtol=1e-5, atol=1e-5)
    with pytest.raises(ConfigError, match=r"'multi_modal_projector' matches no module of the language model"):
        session_of(model, data, lora__modules_to_save=["multi_modal_projector"])


def test_freeze_trains_layers_of_the_language_model_of_a_multimodal_one(tmp_path: Path) -> None:
    spec = load_spec(str(write_model(gemma3(), tmp_path)))
    chosen = Freeze(trainable_layers=1, extra_modules=("norm|lm_head",)).sftx_trainable(spec)
    assert {name.partition(".layers.")[0] for name in chosen} == {
        "model.language_model", "model.language_model.norm.weight", "lm_head.weight"
    }  # fmt: skip
    assert {name.split(".")[3] for name in chosen if ".layers." in name} == {"1"}
    with pytest.raises(ConfigError, match=r"'vision_tower' matches no parameter of the language model"):
        Freeze(extra_modules=("vision_tower",)).sftx_trainable(spec)


def test_a_multimodal_model_keeps_its_processor(data: Path, tmp_path: Path) -> None:
    from transformers import AutoProcessor, AutoTokenizer

    model = write_model(gemma3(), tmp_path / "model")
    special = dict.fromkeys(("boi_token", "eoi_token", "image_token"), "<|endoftext|>")
    tokenizer = AutoTokenizer.from_pretrained(model, extra_special_tokens=special)
    Gemma3Processor(Gemma3ImageProcessorPil(size={"height": 28, "width": 28}), tokenizer).save_pretrained(model)
    assignments = [("model", str(model), ""), ("data.train", str(data), ""), ("output_dir", str(tmp_path / "run"), "")]
    session = assemble(load(None, add=["chatml"], assignments=assignments))
    lm = session.lm
    assert {n for n, p in lm.model.named_parameters() if p.requires_grad} == {
        n for n, _ in lm.model.named_parameters() if n.startswith(("model.language_model.", "lm_head"))
    }
    out = tmp_path / "out"
    out.mkdir()
    write_artefact(lm, out, session.process_group)
    assert AutoProcessor.from_pretrained(out).image_processor.size == {"height": 28, "width": 28}


@pytest.mark.parametrize(
    ("model_type", "architecture", "said"),
    [
        ("qwen2_5_vl", "Qwen2_5_VLForConditionalGeneration", "is multimodal (vision)"),
        ("llava", "LlavaForConditionalGeneration", "is multimodal (vision)"),
        ("t5", "T5ForConditionalGeneration", "is an encoder-decoder"),
        ("distilbert", "DistilBertModel", "predicts no next token"),
    ],
)
def test_a_model_that_is_no_causal_language_model_is_called_what_it_is(
    model_type: str, architecture: str, said: str, tmp_path: Path
) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": model_type, "architectures": [architecture]}))
    with pytest.raises(
        ModelError, match=re.escape(f"{architecture} {said}, and has no causal language model")
    ) as error:
        load_spec(str(tmp_path))
    assert len(str(error.value)) < 400
