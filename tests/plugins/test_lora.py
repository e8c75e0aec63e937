"""LoRA: it starts as the identity, trains the chosen modules, loads strictly, and merges to the same logits."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from sessions import session_of
from sftx.errors import ConfigError, ModelError
from sftx.trainer.session import Session
from trainers import denominator, planned

ROWS = [{"prompt": f"what is {n} plus one", "completion": f"{n + 1} " * (n % 5 + 1)} for n in range(24)]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("lora") / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return path


def logits(session: Session) -> Any:
    import torch

    batch = session.trainer.collator.collate(session.data.examples[:4])
    session.lm.eval()
    with torch.no_grad():
        return session.lm.logits(session.lm.hidden(batch).hidden_BTD)


def take_steps(session: Session, count: int = 3) -> list[float]:
    losses = []
    for number, (epoch, step, *_) in zip(range(1, count + 1), session.sampler, strict=False):
        session.lm.train()
        batches = session.trainer.micro_batches(planned(step, session.data.examples))
        losses.append(session.trainer.train_step(number, epoch, batches).loss)
    return losses


def test_it_starts_as_the_identity_and_trains_only_its_own_parameters(tiny_model_dir: Path, data: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    session = session_of(tiny_model_dir, data, train__learning_rate=1e-2)
    base = AutoModelForCausalLM.from_pretrained(tiny_model_dir)
    batch = session.trainer.collator.collate(session.data.examples[:4])
    before = logits(session)
    length = len(session.data.examples[0].token_ids)
    theirs = base(batch.input_ids_BT[:1, :length]).logits
    torch.testing.assert_close(before[:1, :length], theirs, rtol=1e-5, atol=1e-5)
    frozen = {n: p.detach().clone() for n, p in session.lm.named_parameters() if not p.requires_grad}
    trained = {n for n, p in session.lm.named_parameters() if p.requires_grad}
    assert {name.rsplit(".", 1)[1] for name in trained} == {"lora_A", "lora_B"}
    assert len(trained) == 2 * 2 * 7  # A and B of seven linear layers in two blocks; not the head
    losses = take_steps(session)
    assert losses[-1] < losses[0]
    assert all(torch.equal(p, frozen[n]) for n, p in session.lm.named_parameters() if n in frozen)
    assert (logits(session) - before).abs().max() > 1e-3


@pytest.mark.parametrize("saved", [[], ["lm_head", "embed_tokens"]])
def test_it_loads_what_it_saved_merges_and_can_be_disabled(
    tiny_model_dir: Path, data: Path, tmp_path: Path, saved: list[str]
) -> None:
    import torch

    session = session_of(tiny_model_dir, data, train__learning_rate=1e-2, lora__modules_to_save=saved)
    before = logits(session)
    take_steps(session)
    after = logits(session)
    assert (after - before).abs().max() > 1e-3
    with session.lm.without_adapters():
        assert torch.equal(logits(session), before)
    assert torch.equal(logits(session), after)

    adapter = session.lm.adapters["lora"]
    adapter.save(tmp_path)
    other = session_of(tiny_model_dir, data, lora__modules_to_save=saved)
    assert not torch.equal(logits(other), after)
    other.lm.adapters["lora"].load(tmp_path)
    assert torch.equal(logits(other), after)

    adapter.merge(session.lm)
    torch.testing.assert_close(logits(session), after, rtol=1e-5, atol=1e-5)
    assert not [name for name, _ in session.lm.named_parameters() if "lora" in name]


def test_peft_loads_modules_trained_in_full(tiny_model_dir: Path, data: Path, tmp_path: Path) -> None:
    """Tied weights are trained as one tensor and saved under both names for PEFT."""
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    session = session_of(
        tiny_model_dir, data, train__learning_rate=1e-2, lora__modules_to_save=["lm_head", "embed_tokens"]
    )
    lm = session.lm
    assert lm.head_weight is lm.model.get_input_embeddings().weight
    assert lm.head_weight.requires_grad
    take_steps(session)
    lm.adapters["lora"].save(tmp_path)
    batch = session.trainer.collator.collate(session.data.examples[:1])
    oracle = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny_model_dir), tmp_path)
    with torch.no_grad():
        theirs = oracle.eval()(batch.input_ids_BT).logits
        lm.eval()
        ours = lm.logits(lm.hidden(batch).hidden_BTD)
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("alone", ["lm_head", "embed_tokens"])
def test_tied_weights_are_never_split(tiny_model_dir: Path, data: Path, alone: str) -> None:
    with pytest.raises(ConfigError, match=r"modules_to_save.*lm_head and model\.embed_tokens"):
        session_of(tiny_model_dir, data, lora__modules_to_save=[alone])


def test_target_modules_are_endings_or_a_regular_expression_of_the_whole_path(tiny_model_dir: Path, data: Path) -> None:
    def adapted(targets: Any) -> set[str]:
        session = session_of(tiny_model_dir, data, lora__target_modules=targets)
        return {
            name.removeprefix("model.model.layers.").removesuffix(".lora_A")
            for name, _ in session.lm.named_parameters()
            if name.endswith("lora_A")
        }

    queries = {"0.self_attn.q_proj", "1.self_attn.q_proj"}
    assert adapted(["q_proj"]) == queries
    assert adapted(["q_proj", "layers.1.mlp.up_proj"]) == queries | {"1.mlp.up_proj"}
    assert adapted(r"model\.layers\.1\.self_attn\.(q|v)_proj") == {"1.self_attn.q_proj", "1.self_attn.v_proj"}
    with pytest.raises(ConfigError, match=r"target_modules \['wq'\].*q_proj, k_proj"):
        adapted(["wq"])
    with pytest.raises(ConfigError, match=r"target_modules \['wq'\]"):
        adapted(["q_proj", "wq"])
    with pytest.raises(ConfigError, match=r"target_modules '\('.*regular expression"):
        adapted("(")
    with pytest.raises(ConfigError, match=r"target_modules.*'lm_head'.*one tensor.*modules_to_save"):
        adapted(["lm_head"])


def test_a_rank_that_no_layer_can_have_is_refused(tiny_model_dir: Path, data: Path) -> None:
    session_of(tiny_model_dir, data, lora__r=32)
    for r in (33, 10**6):
        with pytest.raises(ConfigError, match=rf"r={r} .*at most 32"):
            session_of(tiny_model_dir, data, lora__r=r)


def test_layers_that_another_adapter_has_changed_are_refused(
    tiny_model_dir: Path, data: Path, install_plugin: Any
) -> None:
    code = (
        "import dataclasses\nimport sftx\nfrom sftx_plugins.adapters.lora import Lora\n\n\n"
        "@dataclasses.dataclass(frozen=True, eq=False)\nclass Again(Lora):\n    pass\n"
    )
    install_plugin("acme", code, {"again": "Again"})
    with pytest.raises(ConfigError, match=r"'again' \(acme 1\.0\):.* model\.layers"):
        session_of(tiny_model_dir, data, "again")


def test_loading_is_strict(tiny_model_dir: Path, data: Path, tmp_path: Path) -> None:
    narrow = session_of(tiny_model_dir, data, lora__target_modules=["q_proj"])
    narrow.lm.adapters["lora"].save(tmp_path)
    wide = session_of(tiny_model_dir, data)
    with pytest.raises(ModelError, match=r"\b24\b.*missing.*\b0\b"):
        wide.lm.adapters["lora"].load(tmp_path)
    other_rank = session_of(tiny_model_dir, data, lora__target_modules=["q_proj"], lora__r=4)
    with pytest.raises(ModelError, match=r"\[16, 32\].*\[4, 32\]"):
        other_rank.lm.adapters["lora"].load(tmp_path)


def test_dropout_is_the_same_when_checkpointing_recomputes_it(tiny_model_dir: Path, data: Path) -> None:
    import torch

    gradients = {}
    for checkpointing in (False, True):
        session = session_of(tiny_model_dir, data, lora__lora_dropout=0.3, train__gradient_checkpointing=checkpointing)
        with torch.no_grad():
            for name, parameter in session.lm.named_parameters():
                if name.endswith("lora_B"):
                    parameter.normal_(0, 0.05, generator=torch.Generator().manual_seed(len(name)))
        batches = session.trainer.micro_batches(planned(session.sampler.epoch(0)[0], session.data.examples))
        session.trainer.accumulate(batches, denominator(batches), 0)
        gradients[checkpointing] = torch.cat([p.grad.flatten() for p in session.trainer.parameters])
    torch.testing.assert_close(gradients[True], gradients[False], rtol=1e-6, atol=1e-7)
    session.trainer.optimizer.zero_grad()
    session.trainer.accumulate(batches, denominator(batches), 1)
    other = torch.cat([p.grad.flatten() for p in session.trainer.parameters])
    assert not torch.allclose(other, gradients[True], rtol=1e-2), "another step must draw another mask"


def test_the_module_that_is_replaced_keeps_no_weight(tiny_model_dir: Path, data: Path) -> None:
    """Where fsdp2 shares a weight out, a second reference would keep all of it in memory."""
    from sftx_plugins.adapters.lora_layers import LoraLinear

    layers = [m for m in session_of(tiny_model_dir, data).lm.modules() if isinstance(m, LoraLinear)]
    assert layers
    assert all(layer.base[0].weight is None for layer in layers)
