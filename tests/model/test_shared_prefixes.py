"""Rows in which a prompt stands once for all of its answers give the loss and the gradients of the examples alone.

Dimensions: T tokens, H query heads, K key heads, D head dimension.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    Gemma3TextConfig,
    GptOssConfig,
    Lfm2Config,
    LlamaConfig,
    MistralConfig,
    MixtralConfig,
    PreTrainedConfig,
    Qwen2Config,
    Qwen3Config,
)

from architectures import SHAPE
from sftx import IGNORE_INDEX, Attention, Batch, ConfigError, Example, pack, pad, per_label, sum_by_example
from sftx.assembly.stages.data_stages import CollatorStage
from sftx.data.collate import common_prefix, documents_of
from sftx.model import packed_attention, varlen_attention
from sftx.model.language_model import CausalLM
from sftx.testing import check_collator
from sftx.trainer.layers import enable_checkpointing
from sftx.trainer.self_checks import share_prefixes
from sftx.types import SharedPrefixes
from sftx_plugins.collators.packed import Packed, PackedRows
from sftx_plugins.collators.padded import Padded
from sftx_plugins.losses.masked_ce import MaskedCE

MIXED = ["sliding_attention", "full_attention"]
WAYS: dict[str, tuple[PreTrainedConfig, Attention]] = {
    "llama": (LlamaConfig(**SHAPE), "varlen"),
    "llama, one key head": (LlamaConfig(**SHAPE | {"num_key_value_heads": 1}), "varlen"),
    "llama, mask": (LlamaConfig(**SHAPE), "mask4d"),
    "qwen2": (Qwen2Config(**SHAPE), "varlen"),
    "qwen3": (Qwen3Config(**SHAPE), "varlen"),
    "mistral, window shorter than the prompts": (MistralConfig(**SHAPE, sliding_window=5), "varlen"),
    "mistral, window longer than some": (MistralConfig(**SHAPE, sliding_window=14), "varlen"),
    "mistral, window, mask": (MistralConfig(**SHAPE, sliding_window=5), "mask4d"),
    "gemma3, window in one layer": (Gemma3TextConfig(**SHAPE, sliding_window=7, layer_types=MIXED), "varlen"),
    "gemma3, window in one layer, mask": (Gemma3TextConfig(**SHAPE, sliding_window=7, layer_types=MIXED), "mask4d"),
    "gemma2, soft caps": (Gemma2Config(**SHAPE, sliding_window=5), "mask4d"),
    "gpt-oss": (GptOssConfig(**SHAPE, num_local_experts=4, num_experts_per_tok=2, sliding_window=5), "mask4d"),
}
"""Architectures with the attention that they compute shared prefixes by."""


def group(number: int, prompt: int, answers: Sequence[int], *, weighted: bool = False) -> list[Example]:
    """Return the examples of a prompt of so many tokens, and of answers of these lengths, all of which are trained."""
    generator = torch.Generator().manual_seed(number)

    def ids(length: int) -> list[int]:
        return torch.randint(3, 211, (length,), generator=generator).tolist()

    asked = ids(prompt)
    return [
        Example(
            [*asked, *ids(length)],  # type: ignore[arg-type]
            [False] * prompt + [True] * length,  # type: ignore[arg-type]
            f"row {number}#{n}",
            number,
            weights=[0.5 + 0.1 * t for t in range(prompt + length)] if weighted else None,  # type: ignore[arg-type]
        )
        for n, length in enumerate(answers)
    ]


GROUPS = (
    *group(1, 12, (4, 7)),
    *group(2, 1, (5, 3)),  # nothing to share: the only common token is that which each branch needs
    *group(3, 20, (3, 1, 9, 2, 6, 4, 5, 1), weighted=True),
    *group(4, 8, (6,)),
    *group(5, 3, (16, 2)),
)


def made(config: PreTrainedConfig) -> CausalLM:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(copy.deepcopy(config))
    return CausalLM(model, None).eval()  # type: ignore[arg-type]


def loss_and_gradients(lm: CausalLM, batches: Sequence[Batch]) -> tuple[float, dict[str, Tensor]]:
    """Return the sum of the losses, and its gradients by the names of the parameters."""
    lm.zero_grad(set_to_none=True)
    total = 0.0
    for batch in batches:
        loss = MaskedCE()(lm, batch).sum
        loss.backward()
        total += loss.item()
    gradients = {name: p.grad for name, p in lm.named_parameters() if p.grad is not None}
    lm.zero_grad(set_to_none=True)
    return total, gradients


# --- the row --------------------------------------------------------------------------------------


def test_a_prompt_stands_once_and_each_answer_begins_with_its_last_token() -> None:
    examples = group(1, 4, (2, 3))
    asked, (one, other) = examples[0].token_ids[:4].tolist(), (example.token_ids[4:].tolist() for example in examples)
    batch = pack(examples, share_prefixes=True)
    assert batch.shared is not None
    assert batch.cu_seqlens is not None
    assert batch.input_ids_BT.tolist() == [[*asked[:3], asked[3], *one, asked[3], *other]]
    ignored = IGNORE_INDEX
    assert batch.labels_BT.tolist() == [[ignored] * 3 + [*one, ignored] + [*other, ignored]]
    assert batch.position_ids_BT.tolist() == [[0, 1, 2, 3, 4, 5, 3, 4, 5, 6]]
    assert batch.cu_seqlens.tolist() == [0, 3, 6, 10]
    assert batch.shared.prefix_P.tolist() == [-1, 0, 0]
    assert batch.shared.piece_E.tolist() == [1, 2]
    assert batch.shared.keys_K.tolist() == [0, 1, 2, 0, 1, 2, 3, 4, 5, 0, 1, 2, 6, 7, 8, 9]
    assert batch.shared.cu_seqlens_k.tolist() == [0, 3, 9, 16]
    assert (batch.max_seqlen, batch.shared.max_seqlen_k, batch.num_label_tokens, batch.num_input_tokens) == (
        4,
        7,
        5,
        13,
    )
    assert [positions.tolist() for positions in documents_of(batch)] == [[0, 1, 2, 3, 4, 5], [0, 1, 2, 6, 7, 8, 9]]


@pytest.mark.parametrize(
    ("ids", "masks", "shared"),
    [
        ([[1, 2, 3, 4], [1, 2, 3, 5, 6]], ["0001", "00011"], 2),
        ([[1, 2, 3, 4], [1, 2, 3, 5, 6]], ["0111", "00011"], 0),  # a trained token is a label of its own example
        ([[1, 2, 3, 4], [1, 2, 3, 5, 6]], ["1001", "00011"], 2),  # the first token is never a label
        ([[1, 2, 3], [1, 2, 3, 5, 6]], ["000", "00011"], 2),
        ([[1, 2, 3], [1, 2, 3]], ["001", "001"], 1),
        ([[1, 2], [3, 2]], ["01", "01"], 0),
        ([[1, 2, 3, 4]], ["0001"], 0),
        ([[1], [1]], ["0", "0"], 0),
    ],
)
def test_what_is_shared_is_equal_and_not_trained(ids: list[list[int]], masks: list[str], shared: int) -> None:
    examples: list[Any] = [
        Example(own, [on == "1" for on in mask], f"row {n}", 0)  # type: ignore[arg-type]
        for n, (own, mask) in enumerate(zip(ids, masks, strict=True))
    ]
    assert common_prefix(examples) == shared
    assert (pack(examples, share_prefixes=True).shared is None) == (shared == 0)


def test_numbers_of_examples_are_the_same_as_in_padded_rows() -> None:
    numbers = [torch.randn(len(example.token_ids)).tolist() for example in GROUPS]
    padded, shared = pad(GROUPS), pack(GROUPS, share_prefixes=True)
    assert shared.input_ids_BT.numel() < 0.6 * sum(len(example.token_ids) for example in GROUPS)
    assert shared.num_label_tokens == padded.num_label_tokens == int((shared.labels_BT != IGNORE_INDEX).sum())
    sums = [sum_by_example(batch, per_label(batch, numbers)) for batch in (padded, shared)]
    assert torch.allclose(*sums, rtol=1e-6)
    assert [o.row_id for o in shared.examples] == list(shared.row_ids) == list(padded.row_ids)
    ids_N = shared.input_ids_BT[0]
    assert [ids_N[positions].tolist() for positions in documents_of(shared)] == [e.token_ids.tolist() for e in GROUPS]
    moved = shared.to(torch.device("cpu"))
    assert moved.shared is not None


@pytest.mark.parametrize("plugin", [Packed(share_prefixes=True), Padded(padding_free=True, share_prefixes=True)])
def test_collators_that_share_keep_the_contract(plugin: object) -> None:
    check_collator(plugin)


# --- loss and gradients ---------------------------------------------------------------------------


@pytest.mark.parametrize("name", WAYS)
def test_loss_and_gradients_are_those_of_the_examples_alone(name: str) -> None:
    config, attention = WAYS[name]
    lm = made(config)
    alone, wanted = loss_and_gradients(lm, [pad([example]) for example in GROUPS])
    batch = pack(GROUPS, attention="mask4d" if name.endswith("mask") else "varlen", share_prefixes=True)
    assert batch.shared is not None
    shared, gradients = loss_and_gradients(lm, [batch])
    assert lm.attention_of(batch) == attention
    assert shared == pytest.approx(alone, rel=1e-5)
    assert gradients.keys() == wanted.keys()
    norm = torch.stack([gradient.square().sum() for gradient in wanted.values()]).sum().sqrt()
    for parameter, gradient in gradients.items():
        assert (gradient - wanted[parameter]).norm() < 1e-5 * norm, parameter


@pytest.mark.parametrize("checkpointing", [False, True])
def test_an_adapter_gets_the_same_gradients(checkpointing: bool, tiny_model: Path) -> None:
    from sftx.model.load import load_model, load_spec
    from sftx_plugins.adapters.lora import Lora

    spec = load_spec(str(tiny_model))
    adapter = Lora(r=4).sftx_adapter(spec)
    lm = CausalLM(load_model(spec, [adapter], dtype=torch.float32, device=torch.device("cpu")), None)  # type: ignore[arg-type]
    lm.attach({"lora": adapter})
    with torch.no_grad():
        for name, parameter in lm.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.05)
    if checkpointing:
        enable_checkpointing(lm.model)
    lm.train()
    alone, wanted = loss_and_gradients(lm, [pad([example]) for example in GROUPS])
    shared, gradients = loss_and_gradients(lm, [pack(GROUPS, share_prefixes=True)])
    assert shared == pytest.approx(alone, rel=1e-5)
    for parameter, gradient in gradients.items():
        assert (gradient - wanted[parameter]).norm() < 1e-5 * wanted[parameter].norm() + 1e-6, parameter


# --- the operation --------------------------------------------------------------------------------

PIECES = torch.tensor([0, 140, 150, 290, 291, 300, 302], dtype=torch.int32)
PREFIXES = torch.tensor([-1, 0, 0, -1, 3, 0], dtype=torch.int32)


def by_definition(query_THD: Tensor, key_TKD: Tensor, value_TKD: Tensor, scale: float, window: int | None) -> Tensor:
    """Compute the attention of a row of PIECES from all scores."""
    pieces_T = torch.searchsorted(PIECES, torch.arange(len(query_THD)), right=True) - 1
    lengths = PIECES.diff()
    begin_P = torch.where(PREFIXES < 0, 0, lengths[PREFIXES.clamp(min=0)])
    positions_T = torch.arange(len(query_THD)) - PIECES[pieces_T] + begin_P[pieces_T]
    mask_TT = packed_attention.shared_mask(pieces_T, PREFIXES, positions_T, query_THD.dtype, window)[0, 0]
    size = query_THD.shape[1] // key_TKD.shape[1]
    key_THD, value_THD = (x.repeat_interleave(size, 1) for x in (key_TKD, value_TKD))
    scores_HTT = torch.einsum("thd,shd->hts", query_THD, key_THD) * scale + mask_TT
    return torch.einsum("hts,shd->thd", scores_HTT.softmax(-1), value_THD)


SHARED = SharedPrefixes(PREFIXES, torch.tensor([1, 2, 4, 5]), torch.empty(0), torch.empty(0), 0)
"""What the operation of the CPU needs of a batch; the rest is for the kernel of a GPU."""


@pytest.mark.parametrize("window", [None, 1, 7, 130, 141, 1000])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_the_operation_is_attention_of_a_branch_to_prefix_and_itself(dtype: torch.dtype, window: int | None) -> None:
    torch.manual_seed(0)
    inputs = [torch.randn(302, heads, 16).to(dtype) for heads in (4, 2, 2)]
    grad_THD = torch.randn(302, 4, 16).to(dtype)
    expected, exact = [], [x.double().requires_grad_() for x in inputs]
    out = by_definition(*exact, 0.3, window)
    expected = [out, *torch.autograd.grad(out, exact, grad_THD.double())]
    leaves = [x.requires_grad_() for x in inputs]
    ours = varlen_attention.attend(*leaves, PIECES, 140, scale=0.3, window=window, shared=SHARED)
    found = [ours, *torch.autograd.grad(ours, leaves, grad_THD)]
    tolerance = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 2e-2}[dtype]
    for one, other in zip(found, expected, strict=True):
        assert one.dtype == dtype
        assert (one.double() - other).norm() <= tolerance * other.norm()


@pytest.mark.parametrize("window", [None, 4, 20])
def test_the_gpus_kernel_is_given_the_keys_of_each_piece(window: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """A stand-in for torch's kernel, by its documented meaning: queries and keys end together."""

    def varlen_attn(
        query: Tensor, key: Tensor, value: Tensor, cu_seq_q: Tensor, cu_seq_k: Tensor, max_q: int, max_k: int, *,
        scale: float, window_size: tuple[int, int], **options: bool,
    ) -> Tensor:  # fmt: skip
        assert (max_q, max_k) == (int(cu_seq_q.diff().max()), int(cu_seq_k.diff().max()))
        size = query.shape[1] // key.shape[1]
        out = torch.empty_like(query)
        for (q0, q1), (k0, k1) in zip(pairwise(cu_seq_q.tolist()), pairwise(cu_seq_k.tolist()), strict=True):
            visible = torch.ones(q1 - q0, k1 - k0, dtype=torch.bool).tril(behind := (k1 - k0) - (q1 - q0))
            if window_size[0] >= 0:
                visible = visible.triu(behind - window_size[0])
            scores = torch.einsum("qhd,khd->hqk", query[q0:q1], key[k0:k1].repeat_interleave(size, 1)) * scale
            probabilities = scores.masked_fill(~visible, -torch.inf).softmax(-1)
            out[q0:q1] = torch.einsum("hqk,khd->qhd", probabilities, value[k0:k1].repeat_interleave(size, 1))
        return out

    monkeypatch.setattr(varlen_attention, "varlen_attn", varlen_attn)
    monkeypatch.setattr(varlen_attention, "_HAS_GQA", True)
    batch = pack(GROUPS, share_prefixes=True)
    torch.manual_seed(0)
    leaves = [torch.randn(batch.input_ids_BT.numel(), heads, 8, requires_grad=True) for heads in (4, 2, 2)]
    assert batch.cu_seqlens is not None
    arguments = (*leaves, batch.cu_seqlens, batch.max_seqlen)
    grad_THD = torch.randn(leaves[0].shape)
    results = []
    for attend in (varlen_attention.attend_on_gpu, varlen_attention.attend):
        out = attend(*arguments, scale=0.3, window=window, shared=batch.shared)
        results.append([out, *torch.autograd.grad(out, leaves, grad_THD)])
    for on_gpu, on_cpu in zip(*results, strict=True):
        torch.testing.assert_close(on_gpu, on_cpu, rtol=1e-4, atol=1e-5)


def test_the_operation_is_a_proper_one() -> None:
    leaves = [torch.randn(302, heads, 8, requires_grad=True) for heads in (4, 2, 2)]
    for window in (None, 9):
        torch.library.opcheck(varlen_attention.attend_on_cpu, (*leaves, PIECES, 0.3, window, PREFIXES))


def test_long_pieces_take_torchs_backward(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(varlen_attention, "_LONG", 32)
    test_the_operation_is_attention_of_a_branch_to_prefix_and_itself(torch.float32, None)


# --- the check at the start -----------------------------------------------------------------------


def sharing_of(lm: CausalLM, collator: Any) -> bool:
    stage = CollatorStage("the collator", collator)
    with torch.no_grad():
        share_prefixes(lm, stage, GROUPS)
    return stage.collate(GROUPS).shared is not None


def packed_rows(attention: Attention = "varlen") -> PackedRows:
    return PackedRows(128, "bfd", attention)


@pytest.mark.parametrize("name", [name for name in WAYS if name != "gpt-oss"])
def test_prefixes_are_shared_where_the_states_stay_the_same(name: str) -> None:
    assert sharing_of(made(WAYS[name][0]), packed_rows("mask4d" if name.endswith("mask") else "varlen"))


def test_padded_shares_without_padding_alone(caplog: pytest.LogCaptureFixture) -> None:
    lm = made(LlamaConfig(**SHAPE))
    assert sharing_of(lm, Padded(padding_free=True))
    with caplog.at_level(logging.INFO):
        assert not sharing_of(lm, Padded())
        assert not sharing_of(lm, packed_rows("mask"))
    assert [record.getMessage() for record in caplog.records] == [
        "the prompt of several answers is computed for each of them: the collator pads; --plugin packed, or --set "
        "padded.padding_free=true, shares it",
        "the prompt of several answers is computed for each of them: the collator packs with transformers' own mask",
    ]
    with pytest.raises(ConfigError, match="share_prefixes: padded rows share nothing"):
        Padded(share_prefixes=True).sftx_collator()
    with pytest.raises(ConfigError, match="share_prefixes: transformers' mask"):
        Packed(share_prefixes=True, attention="mask").sftx_collator(64)


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        (Lfm2Config(**SHAPE, layer_types=["conv", "full_attention"]), "it fails on a row with shared prefixes"),
        (MixtralConfig(**SHAPE, num_local_experts=4, output_router_logits=True), "the loss of its router counts"),
    ],
)
def test_a_model_that_cannot_shares_nothing_and_says_why(
    config: PreTrainedConfig, reason: str, caplog: pytest.LogCaptureFixture
) -> None:
    assert not sharing_of(made(config), packed_rows())
    assert reason in caplog.records[-1].getMessage()


FAULTS = {
    "a branch does not see its prefix": lambda prefix_P: torch.full_like(prefix_P, -1),
    "a branch sees another prefix": lambda prefix_P: torch.where(prefix_P >= 0, 0, -1).to(prefix_P.dtype),
    "a branch sees the branch before it": lambda prefix_P: torch.where(
        prefix_P >= 0, torch.arange(len(prefix_P)) - 1, -1
    ).to(prefix_P.dtype),
}


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("attention", ["varlen", "mask4d"])
def test_a_leak_between_answers_is_found(
    fault: str, attention: Attention, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    lm = made(LlamaConfig(**SHAPE))
    right_op, right_mask = varlen_attention.attend_on_cpu, packed_attention.shared_mask
    wrong = FAULTS[fault]
    monkeypatch.setattr(
        varlen_attention, "attend_on_cpu", lambda *a: right_op(*a[:6], None if a[6] is None else wrong(a[6]))
    )
    monkeypatch.setattr(
        packed_attention, "shared_mask", lambda pieces, prefix, *a: right_mask(pieces, wrong(prefix), *a)
    )
    assert not sharing_of(lm, packed_rows(attention))
    assert "of their norm away from those without" in caplog.records[-1].getMessage()
