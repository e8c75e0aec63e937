"""Packed rows give the loss and the gradients of their documents one by one, by each way of keeping them apart.

Dimensions: T tokens, H query heads, K key heads, D head dimension.
"""

from __future__ import annotations

import copy
import dataclasses
import itertools
import logging
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    Gemma2Config,
    Gemma3TextConfig,
    GPT2Config,
    GptOssConfig,
    Lfm2Config,
    LlamaConfig,
    MambaConfig,
    MistralConfig,
    MixtralConfig,
    Phi3Config,
    PreTrainedConfig,
    Qwen2Config,
    Qwen3Config,
    masking_utils,
)

from architectures import SHAPE
from sftx import Attention, Batch, Example, ModelError, pack, pad
from sftx.model import packed_attention, varlen_attention
from sftx.model.language_model import CausalLM
from sftx.trainer.layers import enable_checkpointing
from sftx.trainer.self_checks import check_packing
from sftx_plugins.collators.packed import Packed, PackedRows
from sftx_plugins.collators.padded import Padded
from sftx_plugins.losses.masked_ce import MaskedCE
from trainers import answers_in_order

LENGTHS = (9, 1, 5, 13)
MIXED = ["sliding_attention", "full_attention"]
CONFIGS: dict[str, tuple[PreTrainedConfig, str | None]] = {
    "llama, grouped heads": (LlamaConfig(**SHAPE), None),
    "llama, one key head": (LlamaConfig(**SHAPE | {"num_key_value_heads": 1}), None),
    "qwen2": (Qwen2Config(**SHAPE), None),
    "qwen3": (Qwen3Config(**SHAPE), None),
    "mixtral": (MixtralConfig(**SHAPE, num_local_experts=4), None),
    "mistral, window": (MistralConfig(**SHAPE, sliding_window=5), None),
    "phi3, window": (Phi3Config(**SHAPE, sliding_window=6), None),
    "gemma3, window in one layer": (Gemma3TextConfig(**SHAPE, sliding_window=5, layer_types=MIXED), None),
    "gemma2, soft caps": (
        Gemma2Config(**SHAPE, sliding_window=5),
        r"'eager'|depends on softcap",
    ),
    "gpt2, dropout": (
        GPT2Config(vocab_size=211, n_embd=32, n_layer=2, n_head=4, bos_token_id=1, eos_token_id=2),
        "dropout in its attention",
    ),
}
"""Architectures, and for those that fall back to transformers' own mask the reason why varlen cannot be used."""
LEAKING: dict[str, PreTrainedConfig] = {
    "lfm2, convolution": Lfm2Config(**SHAPE, layer_types=["conv", "full_attention"], initializer_range=0.1),
    "mamba, state space": MambaConfig(vocab_size=211, hidden_size=32, num_hidden_layers=2, state_size=8),
}


def examples(lengths: Sequence[int] = LENGTHS, vocabulary: int = 211) -> list[Example]:
    generator = torch.Generator().manual_seed(5)
    return [
        Example(
            token_ids=torch.randint(3, vocabulary, (length,), generator=generator).tolist(),
            loss_mask=[at > 0 for at in range(length)],
            row_id=f"row {number}",
            group=number,
        )
        for number, length in enumerate(lengths)
    ]


def made(config: PreTrainedConfig) -> CausalLM:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(copy.deepcopy(config))
    return CausalLM(model, None).eval()  # type: ignore[arg-type]


def loss_and_gradients(lm: CausalLM, batches: Sequence[Batch]) -> tuple[float, dict[str, Tensor]]:
    lm.zero_grad(set_to_none=True)
    total = 0.0
    for batch in batches:
        loss = MaskedCE()(lm, batch).sum if batch.num_label_tokens else None
        if loss is not None:
            loss.backward()
            total += loss.item()
    gradients = {name: p.grad for name, p in lm.named_parameters() if p.grad is not None}
    lm.zero_grad(set_to_none=True)
    return total, gradients


def assert_equal_training(lm: CausalLM, ways: Sequence[Attention], rows: Sequence[Example]) -> None:
    """Asserts that each kind of packing has the loss and the gradient of the rows alone, to 1e-5."""
    alone, wanted = loss_and_gradients(lm, [pad([row]) for row in rows])
    for way in ways:
        packed, gradients = loss_and_gradients(lm, [pack(rows, attention=way)])
        assert_close(packed, gradients, alone, wanted)


def assert_close(packed: float, gradients: dict[str, Tensor], alone: float, wanted: dict[str, Tensor]) -> None:
    assert packed == pytest.approx(alone, rel=1e-5)
    assert gradients.keys() == wanted.keys()
    whole = norm(wanted.values())
    assert norm(gradients[name] - wanted[name] for name in wanted) <= 1e-5 * whole
    for name, gradient in wanted.items():
        # Each parameter's own, which may be small beside the rest: fp32 itself is off by 2e-4 of it on the real model,
        # and by 4e-5 in the whole, where fp64 is the measure. The bias of keys has rounding only: softmax drops it.
        assert norm([gradients[name] - gradient]) <= max(1e-4 * norm([gradient]), 1e-7 * whole), name


def norm(gradients: Iterable[Tensor]) -> float:
    return torch.stack([gradient.norm() for gradient in gradients]).norm().item()


@pytest.mark.parametrize("way", ["varlen", "mask", "mask4d"])
@pytest.mark.parametrize("name", CONFIGS)
def test_packed_training_is_that_of_documents_alone(
    name: str, way: Attention, caplog: pytest.LogCaptureFixture
) -> None:
    config, reason = CONFIGS[name]
    lm, rows = made(config), examples()
    with caplog.at_level(logging.WARNING):
        assert_equal_training(lm, (way, way), rows)
    said = [record.getMessage() for record in caplog.records if record.name.startswith("sftx")]
    if way == "varlen" and reason is not None:
        assert len(said) == 1
        assert re.search(reason, said[0])
    else:
        assert said == []
    ours = way == "varlen" and reason is None
    assert (lm.model.config._attn_implementation == packed_attention.NAME) == ours


def test_chunks_that_begin_with_the_row_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Such chunks differ from those of a document alone, and the probe's pieces are too short to see it."""
    monkeypatch.delattr(masking_utils, "remap_positions_for_packed_sequence", raising=False)
    lm = made(LlamaConfig(**SHAPE))
    lm.config.update({"attention_chunk_size": 4})
    with pytest.raises(ModelError, match="attends in chunks of 4 tokens"):
        lm.hidden(pack(examples(), attention="mask"))
    with pytest.raises(ModelError, match="attends in chunks of 4 tokens, and a document has 13"):
        lm.hidden(pack(examples(), attention="mask4d"))


def test_two_language_models_share_one_model(caplog: pytest.LogCaptureFixture) -> None:
    lm = made(LlamaConfig(**SHAPE))
    assert lm.attention_of(pack(examples())) == "varlen"
    assert CausalLM(lm.model, lm.tokenizer).attention_of(pack(examples())) == "varlen"
    assert caplog.text == ""


@pytest.mark.slow
def test_packed_training_is_that_of_documents_alone_on_the_real_model(real_model_dir: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(real_model_dir)
    texts = ("The capital of France is Paris.", "ok", "One, two, three, four, five.")
    rows = []
    for number, text in enumerate(texts):
        ids = [*tokenizer(text).input_ids, tokenizer.eos_token_id]
        rows.append(Example(ids, [at > 1 for at in range(len(ids))], f"row {number}", number))
    lm = CausalLM(AutoModelForCausalLM.from_pretrained(real_model_dir, dtype=torch.float32), tokenizer).eval()
    assert_equal_training(lm, ("varlen", "mask", "mask4d"), rows)
    assert lm.attention_of(pack(rows)) == "varlen"


def test_the_4d_mask_is_llama_factorys() -> None:
    """A token attends to tokens with its document number that are not padding (0) and not after it."""
    numbers = [[1, 1, 2, 2, 2, 0], [1, 2, 2, 3, 3, 3], [0, 0, 1, 1, 1, 1]]
    for dtype in (torch.float32, torch.bfloat16):
        mask = packed_attention.block_mask(torch.tensor(numbers), dtype)
        assert mask.dtype == dtype
        assert mask.shape == (3, 1, 6, 6)
        for b, i, j in itertools.product(range(3), range(6), range(6)):
            seen = numbers[b][i] == numbers[b][j] and numbers[b][j] != 0 and j <= i
            assert mask[b, 0, i, j].item() == (0 if seen else torch.finfo(dtype).min)


def test_the_4d_mask_of_a_batch_follows_its_cu_seqlens() -> None:
    lm = made(LlamaConfig(**SHAPE))
    batch = pack(examples((2, 1, 3)), attention="mask4d")
    mask = packed_attention.decoder_arguments(batch, "mask4d", lm.config, torch.float32)["attention_mask"]
    assert torch.equal(mask, packed_attention.block_mask(torch.tensor([[1, 1, 2, 3, 3, 3]]), torch.float32))


# --- the operation ------------------------------------------------------------------------------


def tensors(lengths: Sequence[int], H: int, K: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    T = sum(lengths)
    cu_seqlens = torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32)
    # With the strides of a layer's projections, where the heads of a token are adjacent.
    query, key, value = (torch.randn(heads, T, 8, dtype=dtype).transpose(0, 1) for heads in (H, K, K))
    return query, key, value, cu_seqlens


def by_definition(query: Tensor, key: Tensor, value: Tensor, cu_seqlens: Tensor, window: int | None) -> Tensor:
    """Computes the softmax over the visible tokens in fp64."""
    at = torch.arange(len(query))
    document = torch.searchsorted(cu_seqlens, at, right=True)
    seen = (document[:, None] == document) & (at[:, None] >= at)
    if window is not None:
        seen &= at[:, None] - at < window
    size = query.shape[1] // key.shape[1]
    query, key, value = (
        query.double(),
        key.double().repeat_interleave(size, 1),
        value.double().repeat_interleave(size, 1),
    )
    scores = torch.einsum("ihd,jhd->hij", query, key) * 0.3
    return torch.einsum("hij,jhd->ihd", scores.masked_fill(~seen, -torch.inf).softmax(-1), value)


@pytest.mark.parametrize("window", [None, 1, 4, 100])
@pytest.mark.parametrize(("H", "K"), [(4, 4), (6, 2), (3, 1)])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
@pytest.mark.parametrize("long", [100, 1024])
def test_attention_and_its_gradients_are_those_of_the_definition(
    long: int, dtype: torch.dtype, tolerance: float, H: int, K: int, window: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(varlen_attention, "_LONG", long)  # torch's backward from 100 tokens on, or for none
    *inputs, cu_seqlens = tensors((7, 1, 150, 2), H, K, dtype)
    weights = torch.randn(160, H, 8, dtype=dtype)
    results = []
    for attend in (varlen_attention.attend, by_definition):
        leaves = [x.detach().clone().requires_grad_() for x in inputs]
        if attend is by_definition:
            out = by_definition(*leaves, cu_seqlens, window)  # type: ignore[misc]
        else:
            out = varlen_attention.attend(*leaves, cu_seqlens, 150, scale=0.3, window=window)  # type: ignore[misc]
        results.append([out, *torch.autograd.grad(out, leaves, weights.to(out.dtype))])
    for ours, right in zip(*results, strict=True):
        assert ours.dtype == dtype
        # A window of one token leaves softmax nothing to choose: the gradients of query and key are only rounding.
        scale = max(right.norm().item(), 1.0)
        assert (ours - right).norm() <= tolerance * scale


def test_torch_finds_nothing_wrong_with_the_operation() -> None:
    *inputs, cu_seqlens = tensors((7, 1, 3), 6, 2, torch.float32)
    leaves = [x.detach().requires_grad_() for x in inputs]
    torch.library.opcheck(varlen_attention.attend_on_cpu, (*leaves, cu_seqlens, 0.3, None))
    torch.library.opcheck(varlen_attention.attend_on_cpu, (*leaves, cu_seqlens, 0.3, 2))


@pytest.mark.parametrize("grouped", [True, False])
@pytest.mark.parametrize("window", [None, 4])
def test_the_gpus_kernel_is_asked_for_the_same(
    window: int | None, grouped: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A stand-in for torch's kernel, by its documented meaning, with and without the option for grouped heads."""

    def varlen_attn(
        query: Tensor, key: Tensor, value: Tensor, cu_seq_q: Tensor, cu_seq_k: Tensor, max_q: int, max_k: int, *,
        scale: float, window_size: tuple[int, int], **options: bool,
    ) -> Tensor:  # fmt: skip
        assert options == ({"enable_gqa": True} if grouped else {})
        assert key.shape[1] == (2 if grouped else 6)
        assert (max_q, max_k, scale, window_size[1]) == (30, 30, 0.3, 0)
        assert torch.equal(cu_seq_q, cu_seq_k)
        return by_definition(query, key, value, cu_seq_q, None if window_size[0] < 0 else window_size[0] + 1)

    monkeypatch.setattr(varlen_attention, "varlen_attn", varlen_attn)
    monkeypatch.setattr(varlen_attention, "_HAS_GQA", grouped)
    *inputs, cu_seqlens = tensors((7, 1, 30, 2), 6, 2, torch.float32)
    on_gpu = varlen_attention.attend_on_gpu(*inputs, cu_seqlens, 30, scale=0.3, window=window)  # type: ignore[misc]
    on_cpu = varlen_attention.attend(*inputs, cu_seqlens, 30, scale=0.3, window=window)  # type: ignore[misc]
    torch.testing.assert_close(on_gpu.float(), on_cpu)


def test_under_autocast_it_computes_in_bf16() -> None:
    lm, rows = made(LlamaConfig(**SHAPE)), examples()
    with torch.autocast("cpu", torch.bfloat16):
        packed = lm.hidden(pack(rows)).hidden_BTD[0]
        alone = torch.cat([lm.hidden(pad([row])).hidden_BTD[0] for row in rows])
    assert lm.model.config._attn_implementation == packed_attention.NAME
    assert (packed - alone).norm() <= 2e-2 * alone.norm()


# torch hides this warning itself, from a user's filters and not from one that makes errors of warnings.
@pytest.mark.slow  # tests/trainer/test_compile.py compiles packed rows too
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")
@pytest.mark.parametrize("checkpointing", [True, False])
def test_compiled_layers_have_no_graph_breaks(checkpointing: bool) -> None:
    from torch._dynamo.utils import counters

    batches = [pack(examples(lengths)) for lengths in (LENGTHS, (7, 8, 3), (20, 2))]
    eager, compiled = made(LlamaConfig(**SHAPE)), made(LlamaConfig(**SHAPE))
    torch._dynamo.reset()
    counters.clear()
    for lm in (eager, compiled):
        lm.attention_of(batches[0])
        lm.train()
        if checkpointing:
            enable_checkpointing(lm.model)
    for layer in compiled.model.model.layers:
        layer.compile(backend="aot_eager")
    for batch in batches:
        loss, gradients = loss_and_gradients(compiled, [batch])
        wanted, right = loss_and_gradients(eager, [batch])
        assert loss == pytest.approx(wanted, rel=1e-4)
        assert all((gradients[name] - right[name]).norm() <= 1e-4 * right[name].norm() for name in right)
    assert counters["stats"]["unique_graphs"] > 0
    assert not counters["graph_break"]


# --- what is not packed stays as it was ---------------------------------------------------------


@pytest.mark.parametrize(
    "config",
    [LlamaConfig(**SHAPE), MistralConfig(**SHAPE, sliding_window=5), CONFIGS["gemma3, window in one layer"][0]],
    ids=["llama", "mistral", "gemma3"],
)
def test_without_cu_seqlens_everything_is_as_with_sdpa(config: PreTrainedConfig) -> None:
    own, ours = made(config), made(config)
    assert ours.attention_of(pack(examples())) == "varlen"
    assert ours.model.config._attn_implementation == packed_attention.NAME
    prompts = [row.token_ids for row in examples((9, 2, 5, 13))]
    for lm in (own, ours):
        lm.check()
    answers = [
        answers_in_order(lm, prompts, max_new_tokens=8, stop_ids=[], batch_size=4)  # padded at the left, with a cache
        for lm in (own, ours)
    ]
    assert answers[0] == answers[1]
    for rows in (examples((13, 4, 7)), examples((13, 13))):
        assert torch.equal(own.hidden(pad(rows)).hidden_BTD, ours.hidden(pad(rows)).hidden_BTD)
    # The same with transformers' own packing, by position ids alone.
    mask = pack(examples(), attention="mask")
    assert torch.equal(own.hidden(mask).hidden_BTD, ours.hidden(mask).hidden_BTD)


def test_a_saved_model_does_not_name_our_attention(tmp_path: Path) -> None:
    lm = made(LlamaConfig(**SHAPE))
    lm.hidden(pack(examples()))
    lm.model.save_pretrained(tmp_path)
    assert packed_attention.NAME not in (tmp_path / "config.json").read_text(encoding="utf-8")


def test_what_varlen_is_not_made_for_is_said(caplog: pytest.LogCaptureFixture) -> None:
    reasons = {
        "it has layers of chunked_attention": {"layer_types": ["chunked_attention", "full_attention"]},
        "sliding windows": {"sliding_window": 5},
    }
    for reason, changes in reasons.items():
        lm = made(LlamaConfig(**SHAPE))
        lm.config.update(changes)
        caplog.clear()
        assert lm.attention_of(pack(examples())) == "mask"
        assert reason in caplog.text
        assert lm.model.config._attn_implementation == "sdpa"


# --- the leak probe -----------------------------------------------------------------------------


def probe(lm: CausalLM, way: Attention = "varlen") -> None:
    check_packing(lm, Packed(attention=way).sftx_collator(64), examples((30, 9, 40)))


@pytest.mark.parametrize("way", ["varlen", "mask", "mask4d"])
def test_the_probe_finds_nothing_where_nothing_leaks(way: Attention, caplog: pytest.LogCaptureFixture) -> None:
    lm = made(LlamaConfig(**SHAPE)).train()
    probe(lm, way)
    assert lm.training
    assert caplog.text == ""
    assert lm.attention_of(pack(examples(), attention=way)) == way


def test_the_probe_sees_a_leak_in_bf16_too(monkeypatch: pytest.MonkeyPatch) -> None:
    lm = made(LlamaConfig(**SHAPE))
    lm.model.to(torch.bfloat16)
    probe(lm, "mask")
    monkeypatch.setattr(packed_attention, "block_mask", lambda documents, dtype: torch.zeros(1, 1, 47, 47, dtype=dtype))
    with pytest.raises(ModelError, match="see one another"):
        probe(lm, "mask4d")


def test_the_probe_keeps_groups_whole() -> None:
    """A pair of a preference loss is one group, and its collator may rely on it."""
    seen: list[list[int]] = []

    class Pairs(PackedRows):
        def collate(self, examples: Sequence[Example]) -> Batch:
            seen.append([example.group for example in examples])
            return super().collate(examples)

    rows = [dataclasses.replace(row, group=number // 2) for number, row in enumerate(examples((30, 9, 40, 8, 5, 7)))]
    check_packing(made(LlamaConfig(**SHAPE)), Pairs(64, "bfd", "varlen"), rows)
    assert seen == [[0, 0], [0, 0, 1, 1]]


def test_the_probe_asks_nothing_of_a_collator_that_pads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(CausalLM, "hidden", None)
    check_packing(made(LlamaConfig(**SHAPE)), Padded().sftx_collator(), examples())


@pytest.mark.parametrize("name", LEAKING)
def test_an_architecture_that_leaks_stops_the_run(name: str) -> None:
    lm = made(LEAKING[name])
    with pytest.raises(ModelError, match=rf"^{type(lm.model).__name__}: documents .* with attention 'mask4d': "):
        probe(lm)


def test_masks_that_are_made_without_position_ids_are_made_here(caplog: pytest.LogCaptureFixture) -> None:
    """gpt-oss has attention sinks, a window in every second layer, and masks of transformers that know no documents."""
    lm = made(GptOssConfig(**SHAPE, sliding_window=5, num_local_experts=4, num_experts_per_tok=2))
    with caplog.at_level(logging.WARNING):
        probe(lm)
    said = [record.getMessage() for record in caplog.records]
    assert "'eager'" in said[0]
    assert re.search("packed with attention 'mask4d', as with its own mask another first document moves", said[1])
    assert lm.attention_of(pack(examples())) == "mask4d"
    assert_equal_training(lm, ("varlen", "mask", "mask4d"), examples())


def test_varlen_that_leaks_falls_back_to_the_mask(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """An attention that ignores cu_seqlens."""
    right = varlen_attention.attend

    def ignores_cu_seqlens(
        query: Tensor, key: Tensor, value: Tensor, cu_seqlens: Tensor, longest: int, **options: Any
    ) -> Tensor:
        return right(query, key, value, cu_seqlens[[0, -1]], int(cu_seqlens[-1]), **options)

    monkeypatch.setattr(varlen_attention, "attend", ignores_cu_seqlens)
    lm = made(LlamaConfig(**SHAPE))
    probe(lm)
    (said,) = [record.getMessage() for record in caplog.records]
    assert "attention 'mask'" in said
    assert "another first document moves the states of the others" in said
    assert lm.attention_of(pack(examples())) == "mask"


@pytest.mark.parametrize("wrong", ["a mask of ones", "no position ids", "positions that run on"])
def test_a_decoder_that_is_told_the_wrong_thing_is_found(wrong: str, monkeypatch: pytest.MonkeyPatch) -> None:
    right = packed_attention.decoder_arguments

    def arguments(batch: Batch, way: Attention, *rest: Any) -> dict[str, Any]:
        given = right(batch, way, *rest)
        T = batch.input_ids_BT.shape[1]
        if wrong == "a mask of ones":  # with it transformers no longer looks at the position ids
            return given | {"attention_mask": torch.ones(1, T, dtype=torch.int64)}
        return given | {"position_ids": None if wrong == "no position ids" else torch.arange(T)[None]}

    monkeypatch.setattr(packed_attention, "decoder_arguments", arguments)
    monkeypatch.setattr(CausalLM, "give_up_mask", lambda lm: None)  # with a ready-made mask Llama needs no positions
    with pytest.raises(ModelError, match="see one another"):
        probe(made(LlamaConfig(**SHAPE)), "mask")


def test_positions_that_run_on_are_found_though_nothing_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """The second document stands still when the first one changes, but is not what it is alone."""
    right = packed_attention.decoder_arguments

    def arguments(batch: Batch, way: Attention, *rest: Any) -> dict[str, Any]:
        T = batch.input_ids_BT.shape[1]
        return right(batch, way, *rest) | {"position_ids": torch.arange(T)[None].clamp(max=T - 9)}

    monkeypatch.setattr(packed_attention, "decoder_arguments", arguments)
    with pytest.raises(ModelError, match="away from what they are without another one"):
        probe(made(LlamaConfig(**SHAPE)), "mask4d")


def test_a_model_that_fails_on_packed_rows_is_named() -> None:
    with pytest.raises(ModelError, match=r"^MambaForCausalLM: .* it fails on a packed row: "):
        probe(made(LEAKING["mamba, state space"]), "mask4d")
