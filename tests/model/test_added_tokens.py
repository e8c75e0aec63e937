"""Added tokens: their rows are there, they alone of a frozen base train, and PEFT reads them."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from sftx.model import tiny
from sftx.model.added_tokens import add_missing, ids_of
from sftx.model.language_model import CausalLM
from sftx.model.load import load_model, load_spec, load_tokenizer
from sftx.types import Batch
from sftx_plugins.adapters.lora import Lora

NUM_SPARE = 640 - 512
"""Rows of the tiny model's embedding that no token has."""


def add(model_dir: Path, num_tokens: int) -> tuple[Any, tuple[int, ...]]:
    tokenizer = load_tokenizer(str(model_dir))
    wanted = [f"<new-{n:03}>" for n in reversed(range(num_tokens))]
    added = add_missing([*wanted, "<|im_end|>"], tokenizer)
    assert added == sorted(wanted)
    assert add_missing(wanted, tokenizer) == []
    return tokenizer, ids_of(added, tokenizer)


def adapted(model_dir: Path, num_tokens: int, **options: Any) -> tuple[CausalLM, tuple[int, ...]]:
    tokenizer, ids = add(model_dir, num_tokens)
    spec = load_spec(str(model_dir))
    spec = dataclasses.replace(spec, new_token_ids=ids)
    adapter = Lora(**options).sftx_adapter(spec)
    model = load_model(spec, [adapter], dtype=torch.float32, device=torch.device("cpu"))
    lm = CausalLM(model, tokenizer)
    torch.manual_seed(0)
    lm.attach({"lora": adapter})
    lm.check()
    return lm, ids


def logits_of(lm: CausalLM, ids_T: torch.Tensor) -> torch.Tensor:
    batch = Batch(
        input_ids_BT=ids_T[None],
        labels_BT=ids_T[None],
        position_ids_BT=torch.arange(len(ids_T))[None],
        lengths_B=torch.tensor([len(ids_T)]),
        cu_seqlens=None,
        max_seqlen=len(ids_T),
        row_ids=("row",),
        num_label_tokens=len(ids_T),
        num_input_tokens=len(ids_T),
    )
    return lm.logits(lm.hidden(batch).hidden_BTD)


def train(lm: CausalLM, ids_T: torch.Tensor, steps: int = 3) -> None:
    optimizer = torch.optim.AdamW([p for p in lm.parameters() if p.requires_grad], lr=1e-2, weight_decay=0.1)
    for _ in range(steps):
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(logits_of(lm, ids_T)[0, :-1], ids_T[1:]).backward()
        optimizer.step()


@pytest.fixture(params=["tied", "untied"])
def model_dir(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    if request.param == "tied":
        return tiny.model_dir()
    model = AutoModelForCausalLM.from_pretrained(tiny.model_dir(), tie_word_embeddings=False)
    model.lm_head.weight = torch.nn.Parameter(torch.randn_like(model.lm_head.weight) * 0.02)
    model.save_pretrained(tmp_path / "untied")
    load_tokenizer(str(tiny.model_dir())).save_pretrained(tmp_path / "untied")
    return tmp_path / "untied"


@pytest.mark.parametrize("num_tokens", [3, NUM_SPARE + 5])
def test_there_is_a_row_for_each_added_token(model_dir: Path, num_tokens: int) -> None:
    _, ids = add(model_dir, num_tokens)
    spec = load_spec(str(model_dir))
    before = AutoModelForCausalLM.from_pretrained(model_dir)
    spec = dataclasses.replace(spec, new_token_ids=ids)
    state = torch.get_rng_state()
    model, again = (load_model(spec, [], dtype=torch.float32, device=torch.device("cpu")) for _ in range(2))
    assert torch.equal(torch.get_rng_state(), state)
    for get in ("get_input_embeddings", "get_output_embeddings"):
        weight, old = getattr(model, get)().weight, getattr(before, get)().weight
        assert len(weight) == max(640, ids[-1] + 1)
        assert torch.equal(weight[:640], old)
        assert torch.equal(weight, getattr(again, get)().weight)
        assert ((weight[640:] - old.mean(0)).abs() < 1e-3).all()
    assert model.config.vocab_size == max(640, ids[-1] + 1)


@pytest.mark.parametrize("num_tokens", [3, NUM_SPARE + 5])
def test_lora_trains_just_these_rows_and_peft_reads_them(model_dir: Path, num_tokens: int, tmp_path: Path) -> None:
    from peft import PeftModel

    lm, ids = adapted(model_dir, num_tokens)
    ids_T = torch.tensor([5, ids[0], 7, ids[1], 9, ids[2], 11])
    before = logits_of(lm, ids_T).detach()
    old = [m.weight.detach().clone() for m in (lm.model.get_input_embeddings(), lm.model.get_output_embeddings())]
    train(lm, ids_T)
    after = logits_of(lm, ids_T).detach()
    for weight, was in zip((lm.model.get_input_embeddings().weight, lm.head_weight), old, strict=True):
        moved = (weight != was).any(1).nonzero().flatten().tolist()
        assert moved, "no row has moved"
        assert set(moved) <= set(ids)
    with lm.without_adapters():
        assert torch.equal(logits_of(lm, ids_T), before)

    adapter = lm.adapters["lora"]
    adapter.save(tmp_path)
    base = AutoModelForCausalLM.from_pretrained(model_dir)
    if num_tokens > NUM_SPARE:
        base.resize_token_embeddings(ids[-1] + 1)
    theirs = PeftModel.from_pretrained(base, str(tmp_path))
    torch.testing.assert_close(theirs(input_ids=ids_T[None]).logits, after, rtol=1e-5, atol=1e-5)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert all(rows == list(ids) for rows in config["trainable_token_indices"].values())

    fresh, _ = adapted(model_dir, num_tokens)
    fresh.adapters["lora"].load(tmp_path)
    torch.testing.assert_close(logits_of(fresh, ids_T), after, rtol=1e-6, atol=1e-6)
    adapter.merge(lm)
    torch.testing.assert_close(logits_of(lm, ids_T), after, rtol=1e-5, atol=1e-5)
    assert lm.model.config.tie_word_embeddings == (lm.head_weight is lm.model.get_input_embeddings().weight)
    assert not any("parametrizations" in name for name, _ in lm.model.named_parameters())


def test_modules_that_train_in_full_need_no_rows_of_their_own(tmp_path: Path) -> None:
    lm, _ = adapted(tiny.model_dir(), 3, modules_to_save=("lm_head", "embed_tokens"))
    lm.adapters["lora"].save(tmp_path)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["trainable_token_indices"] is None
