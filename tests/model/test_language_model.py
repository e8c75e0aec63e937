"""Hidden states and head give what the architecture's own forward gives: losses, logits, answers."""

from __future__ import annotations

import contextlib
import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import (
    AutoModelForCausalLM,
    CohereConfig,
    Gemma2Config,
    Gemma3TextConfig,
    GPT2Config,
    GraniteConfig,
    LlamaConfig,
    MixtralConfig,
    Phi3Config,
    Qwen2Config,
    Qwen2MoeConfig,
)

from architectures import SHAPE
from sftx import Adapter, Batch, Example, ModelError, PluginError, pack, pad
from sftx.model.generation import embed_prompts
from sftx.model.language_model import CausalLM
from sftx_plugins.collators.padded import Padded
from sftx_plugins.losses.masked_ce import MaskedCE
from trainers import answers_in_order

EXPERTS = {"output_router_logits": True, "router_aux_loss_coef": 0.1}
CONFIGS = {
    "llama": LlamaConfig(**SHAPE),
    "tied": LlamaConfig(**SHAPE, tie_word_embeddings=True),
    "qwen2": Qwen2Config(**SHAPE),
    "phi3": Phi3Config(**SHAPE),
    "gemma2 (soft cap)": Gemma2Config(**SHAPE, final_logit_softcapping=0.5),
    "gemma3": Gemma3TextConfig(**SHAPE, sliding_window=4, layer_types=["sliding_attention", "full_attention"]),
    "cohere (logit scale)": CohereConfig(**SHAPE, logit_scale=0.25),
    "granite (logit scaling)": GraniteConfig(**SHAPE, logits_scaling=4.0),
    "gpt2": GPT2Config(vocab_size=211, n_embd=32, n_layer=2, n_head=4, bos_token_id=1, eos_token_id=2),
    "mixtral (router loss)": MixtralConfig(**SHAPE, **EXPERTS, num_local_experts=4),
    "qwen2-moe (router loss)": Qwen2MoeConfig(
        **SHAPE, **EXPERTS, num_experts=4, moe_intermediate_size=16, shared_expert_intermediate_size=16
    ),
}


def examples(lengths: tuple[int, ...] = (9, 5, 13)) -> list[Example]:
    generator = torch.Generator().manual_seed(5)
    return [
        Example(
            token_ids=torch.randint(3, 211, (length,), generator=generator).tolist(),
            loss_mask=[at > length // 3 and at % 4 != 0 for at in range(length)],
            row_id=f"row {number}",
            group=number,
        )
        for number, length in enumerate(lengths)
    ]


def model_of(name: str) -> Any:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(CONFIGS[name]).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(3)  # so that caps and scales bite
    return model


def their_inputs(rows: list[Example]) -> dict[str, torch.Tensor]:
    length = max(len(e.token_ids) for e in rows)
    ids, labels, mask = (torch.full((len(rows), length), fill) for fill in (0, -100, 0))
    for b, example in enumerate(rows):
        for t, (token, trained) in enumerate(zip(example.token_ids, example.loss_mask, strict=True)):
            ids[b, t], mask[b, t], labels[b, t] = token, 1, token if trained else -100
    return {"input_ids": ids, "labels": labels, "attention_mask": mask}


@pytest.mark.parametrize("name", CONFIGS)
def test_the_loss_is_the_architectures_own(name: str) -> None:
    """Soft caps, scales and router losses included, on padded rows."""
    model = model_of(name)
    lm = CausalLM(model, tokenizer=None).eval()  # type: ignore[arg-type]
    lm.check()
    rows = examples()
    batch = Padded().collate(rows)
    out = MaskedCE()(lm, batch)
    ours = out.sum / batch.num_label_tokens + (0 if out.aux_loss is None else out.aux_loss)
    theirs = model(**their_inputs(rows), use_cache=False).loss
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
    assert (out.aux_loss is not None) == ("router" in name)
    trained = [p for p in lm.parameters() if p.requires_grad]
    own = torch.autograd.grad(ours, trained, allow_unused=True)
    expected = torch.autograd.grad(theirs, trained, allow_unused=True)
    for mine, other in zip(own, expected, strict=True):
        assert (mine is None) == (other is None)
        if mine is not None:
            torch.testing.assert_close(mine, other, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", ["llama", "gemma2 (soft cap)", "granite (logit scaling)", "phi3"])
def test_cross_entropy_is_that_of_the_logits(name: str) -> None:
    """With the architecture's scale and soft cap, weighted and summed, or per token."""
    lm = CausalLM(model_of(name), tokenizer=None).eval()  # type: ignore[arg-type]
    batch = Padded().collate(examples())
    hidden_BTD = lm.hidden(batch).hidden_BTD
    nll_N = torch.nn.functional.cross_entropy(
        lm.logits(hidden_BTD).flatten(0, 1), batch.labels_BT.flatten(), reduction="none"
    )
    out = lm.cross_entropy(hidden_BTD, batch.labels_BT, num_valid=batch.num_label_tokens, reduction="none")
    torch.testing.assert_close(out.loss, nll_N, rtol=1e-5, atol=1e-5)
    weights_BT = torch.rand(batch.labels_BT.shape)
    weighted = lm.cross_entropy(hidden_BTD, batch.labels_BT, token_weights_BT=weights_BT, stats=True)
    torch.testing.assert_close(weighted.loss, (nll_N * weights_BT.flatten()).sum(), rtol=1e-5, atol=1e-5)
    assert weighted.num_tokens == batch.num_label_tokens
    assert weighted.correct_N is not None


def test_what_lies_under_the_padding_is_never_seen() -> None:
    """Other ids there change nothing: neither the loss nor any gradient."""
    lm = CausalLM(model_of("tied"), tokenizer=None)  # type: ignore[arg-type]
    batch = Padded().collate(examples())
    assert batch.lengths_B is not None
    outside = torch.arange(batch.input_ids_BT.shape[1]) >= batch.lengths_B[:, None]
    assert outside.any()
    results = []
    for fill in (0, 2, 77):
        batch.input_ids_BT = batch.input_ids_BT.masked_fill(outside, fill)
        lm.zero_grad()
        out = MaskedCE()(lm, batch)
        out.sum.backward()
        results.append((out.sum.detach(), [p.grad.clone() for p in lm.parameters() if p.grad is not None]))
    for loss, gradients in results[1:]:
        assert torch.equal(loss, results[0][0])
        assert all(torch.equal(a, b) for a, b in zip(gradients, results[0][1], strict=True))


def test_padding_a_batch_changes_no_loss() -> None:
    lm = CausalLM(model_of("gemma3"), tokenizer=None)  # type: ignore[arg-type]
    rows = examples()
    alone = sum(MaskedCE()(lm, Padded().collate([row])).sum for row in rows)
    together = MaskedCE()(lm, Padded(pad_to_multiple_of=16).collate(rows)).sum
    torch.testing.assert_close(together, alone, rtol=1e-5, atol=1e-5)


class Products(TorchDispatchMode):
    """Notes the shape of each weight that is expanded to a batch, which a CPU copies once a row in bf16."""

    def __init__(self) -> None:
        super().__init__()
        self.expanded: list[tuple[int, ...]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten.bmm.default:
            weight = args[-1]
            # Rotary embeddings multiply a [B, D, 1] by a [B, 1, T] of positions: no weight.
            if weight.shape[0] > 1 and weight.shape[1] > 1 and weight.stride(0) == 0:
                self.expanded.append(tuple(weight.shape))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("name", CONFIGS)
def test_no_frozen_weight_is_expanded_to_the_rows_of_a_batch(name: str) -> None:
    """In training, evaluation and answering, where the head gets the last position of each row, a slice with gaps."""
    lm = CausalLM(model_of(name), tokenizer=None).eval()  # type: ignore[arg-type]
    lm.requires_grad_(False)
    rows = examples()
    with torch.no_grad(), Products() as products:
        # What torch 2.13 makes of a slice with gaps times the head, and 2.15 no longer does.
        weight_VD = lm.model.get_output_embeddings().weight
        torch.bmm(torch.ones(2, 1, 32, dtype=weight_VD.dtype), weight_VD.T.expand(2, -1, -1))
    assert products.expanded == [(2, 32, 211)], "the fault that this test looks for"
    with torch.no_grad(), Products() as products:
        batch = Padded().collate(rows)
        MaskedCE()(lm, batch)
        last_B1D = lm.hidden(batch).hidden_BTD[:, -1:]
        logits_B1V = lm.logits(last_B1D)
        asked = [list(row.token_ids) for row in rows]
        answers_in_order(lm, asked, max_new_tokens=3, stop_ids=(), batch_size=3)
    assert products.expanded == []
    torch.testing.assert_close(logits_B1V, lm.logits(last_B1D.contiguous()), rtol=0, atol=0)


def test_an_architecture_that_computes_its_logits_otherwise_is_refused_by_name() -> None:
    model = model_of("llama")
    model.lm_head.register_forward_hook(lambda module, args, out: out * 1.01)
    lm = CausalLM(model, tokenizer=None).eval()  # type: ignore[arg-type]
    with pytest.raises(ModelError, match=r"LlamaForCausalLM: its logits are not head\(hidden\)"):
        lm.check()


def test_answers_of_a_batch_are_those_of_single_rows_and_end_at_the_stop_token() -> None:
    model = model_of("qwen2")
    lm = CausalLM(model, tokenizer=None).eval()  # type: ignore[arg-type]
    prompts = [e.token_ids for e in examples((3, 11, 6, 4))]
    together = answers_in_order(lm, prompts, max_new_tokens=12, stop_ids=(), batch_size=4)
    alone = [answers_in_order(lm, [p], max_new_tokens=12, stop_ids=(), batch_size=1)[0] for p in prompts]
    assert together == alone
    assert all(len(answer) == 12 for answer in together)
    stop = together[0][5]
    stopped = answers_in_order(lm, prompts, max_new_tokens=12, stop_ids=(stop,), batch_size=2)
    assert stopped == [answer[: answer.index(stop)] if stop in answer else answer for answer in together]


def test_a_batch_moves_with_all_its_tensors() -> None:
    batch = Padded().collate(examples())
    batch.extras["scores"] = torch.ones(2)
    moved: Batch = batch.to(torch.device("meta"))
    assert moved.input_ids_BT.device.type == moved.labels_BT.device.type == moved.extras["scores"].device.type == "meta"
    assert moved.num_label_tokens == batch.num_label_tokens
    assert batch.input_ids_BT.device.type == "cpu"


class Swaps(Adapter):
    """Gives one token the embedding of the token that extras name for its document."""

    PLACEHOLDER = 3

    def embed(self, batch: Batch, embeds_BTD: torch.Tensor) -> torch.Tensor:
        other_PD = self.embedding(batch.extras["others"])
        return embeds_BTD.masked_scatter((batch.input_ids_BT == self.PLACEHOLDER)[..., None], other_PD)

    def attach(self, lm: Any) -> None:
        self.embedding = lm.model.get_input_embeddings()

    def disabled(self) -> Any:
        return contextlib.nullcontext()

    def save(self, directory: Path) -> None: ...
    def load(self, directory: Path) -> None: ...
    def merge(self, lm: Any) -> None: ...


@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
@pytest.mark.parametrize("name", ["llama", "gemma2 (soft cap)", "gemma3", "gpt2", "granite (logit scaling)"])
def test_a_replaced_embedding_computes_what_its_token_computes(name: str, packed: bool) -> None:
    """In the forward of a loss and in answers, and not where the model is to be what it was before training."""
    lm = CausalLM(model_of(name), None)  # type: ignore[arg-type]
    lm.attach({"swaps": Swaps()})
    others = (17, 90, 140)
    asked: list[Example] = []
    meant: list[Example] = []
    for example, other in zip(examples(), others, strict=True):
        ids = example.token_ids.copy()
        ids[ids == Swaps.PLACEHOLDER] = 4
        for token, rows in ((Swaps.PLACEHOLDER, asked), (other, meant)):
            ids[2] = token
            rows.append(dataclasses.replace(example, token_ids=ids.copy()))

    def collate(rows: Any) -> Batch:
        batch = (pack if packed else pad)(rows)
        batch.extras["others"] = torch.tensor([others[row.group] for row in rows])
        return batch

    with torch.no_grad():
        with lm.ignoring_extras():
            expected_BTD = lm.hidden(collate(meant)).hidden_BTD
        torch.testing.assert_close(lm.hidden(collate(asked)).hidden_BTD, expected_BTD)
        with lm.without_adapters():
            assert (lm.hidden(collate(asked)).hidden_BTD - expected_BTD).abs().max() > 1e-2
        lm.check()  # its tokens have no extras

    def embed(indices: Any) -> Any:
        return embed_prompts(lm, collate, [asked[index] for index in reversed(indices)])[::-1]

    options: dict[str, Any] = {"max_new_tokens": 6, "stop_ids": (), "batch_size": 2}
    prompts, of_meant = ([row.token_ids.tolist() for row in rows] for rows in (asked, meant))
    answers = answers_in_order(lm, prompts, **options, embed=embed)
    assert answers == answers_in_order(lm, of_meant, **options)
    assert answers != answers_in_order(lm, prompts, **options)


def test_a_collator_that_changes_prompts_is_refused() -> None:
    lm = CausalLM(model_of("llama"), None)  # type: ignore[arg-type]

    def cut(rows: Any) -> Batch:
        return pad([dataclasses.replace(row, token_ids=row.token_ids[1:], loss_mask=row.loss_mask[1:]) for row in rows])

    with torch.no_grad(), pytest.raises(PluginError, match="no document of row 0 with its 9 tokens"):
        embed_prompts(lm, cut, examples())
