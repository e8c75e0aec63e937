"""Truncation policies keep the tokens that they promise, and never train a stop token where the text did not stop."""

from __future__ import annotations

import dataclasses
import functools
import random
from collections import Counter
from importlib.metadata import entry_points
from itertools import groupby
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import assets
from sftx.config.options import DataConfig
from sftx.data.encoder import Encoder
from sftx.data.row_encoder import EncodedRow, RowEncoder, mark_trained, split_units
from sftx.data.truncate import LabelledTokens, fit, infer_lengths
from sftx.errors import DataError
from sftx.testing.kit import Kit, built_in
from sftx.types import Conversation, Location, Message, PlainText, ToolCall
from sftx_plugins.templates.chatml import ChatML

WHERE = Location("rows.jsonl", 7)
STOP = 3
"""The only control token of the made-up rows below."""


@pytest.fixture(scope="module")
def kit() -> Kit:
    return Kit(ChatML())


def turns(*lengths: int) -> Conversation:
    roles = ("user", "assistant")
    return Conversation(
        tuple(Message(roles[n % 2], " ".join(f"w{n}x{i}" for i in range(length))) for n, length in enumerate(lengths))
    )


def encode(kit: Kit, conversation: Any, **options: Any) -> EncodedRow:
    return RowEncoder({}, kit.encoder, DataConfig(**options)).encode([conversation], EncodedRow(WHERE))


def test_lengths_of_known_examples() -> None:
    assert infer_lengths(3000, 2000, 1000) == (600, 400)
    assert infer_lengths(1000, 100, 1000) == (900, 100)


@settings(max_examples=500)
@given(st.integers(0, 5000), st.integers(0, 5000), st.integers(1, 3000))
def test_lengths_are_those_of_llama_factory(prompt: int, answer: int, limit: int) -> None:
    theirs = assets.function(assets.path("llamafactory", "processor_utils.py"), "infer_seqlen")
    if prompt + answer > 0:
        assert infer_lengths(prompt, answer, limit) == theirs(prompt, answer, limit)


def test_cut_end_keeps_the_beginning_without_the_stop_token(kit: Kit) -> None:
    whole = encode(kit, turns(20, 40)).examples[0]
    row = encode(kit, turns(20, 40), max_length=len(whole.token_ids) - 10)
    (cut,) = row.examples
    assert cut.token_ids.tolist() == whole.token_ids[:-10].tolist()
    assert kit.encoder.stop_ids[0] not in cut.token_ids[cut.loss_mask]
    assert [(e.action, e.length, e.kept) for e in row.entries] == [
        ("cut", len(whole.token_ids), len(whole.token_ids) - 10)
    ]


def test_cut_oldest_removes_whole_turns_and_keeps_the_system_message(kit: Kit) -> None:
    conversation = Conversation((Message("system", "Be brief."), *turns(30, 5, 30, 6, 10, 7).messages))
    limit = len(encode(kit, Conversation((conversation.messages[0], *conversation.messages[3:]))).examples[0].token_ids)
    (cut,) = encode(kit, conversation, long_rows="cut_oldest", max_length=limit).examples
    text = kit.tokenizer.decode(cut.token_ids)
    assert text.startswith("<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nw2x0 ")
    assert "w0x" not in text
    assert "w1x" not in text
    assert cut.token_ids[cut.loss_mask].tolist().count(kit.encoder.stop_ids[0]) == 2


OPTIONS: dict[str, list[dict[str, Any]]] = {
    "deepseek3": [{}, {"earlier_reasoning": "drop"}],
    "llama3": [{}, {"dates": True}],
    "mistral": [{}, {"place": "last"}],
    "qwen3": [{}, {"thinking": "strip"}, {"thinking": "empty"}],
}
BUILT_IN = sorted(
    point.name
    for point in entry_points(group="sftx.plugins")
    if ".templates." in point.value and "jinja" not in point.value
)
TOOL = {"type": "function", "function": {"name": "f", "parameters": {"type": "object", "properties": {}}}}


def random_chat(rng: random.Random, template: Any) -> Conversation:
    """Return a conversation of a few or many turns, with all that the template can write."""

    def text(least: int = 1) -> str:
        return " ".join(rng.choices(["word", "two words", "长", "\n", "-", "x" * 30], k=rng.randint(least, 12)))

    messages = [Message("system", text())] if rng.random() < 0.5 else []
    for _ in range(rng.randint(2, 25)):
        messages.append(Message("user", text()))
        if rng.random() < 0.2 and getattr(template, "has_tools", False):
            messages.append(Message("assistant", "", tool_calls=(ToolCall("f", {"a": text()}),)))
            messages.append(Message("tool", text()))
        reasoning = text() if rng.random() < 0.3 and hasattr(template, "jinja") else ""
        answer = f"Yes. {text()}"
        messages.append(Message("assistant", answer, reasoning=reasoning, trainable=rng.choice([None, None, False])))
    has_tools = rng.random() < 0.3 and getattr(template, "has_tools", False)
    return Conversation(tuple(messages), tools=(TOOL,) if has_tools else ())


def first_window_that_fits(unit: Conversation, limit: int, encode: RowEncoder) -> LabelledTokens | None:
    """Encode every window of turns, from the longest on, until one fits."""
    system = [m for m in unit.messages if m.role == "system"]
    turns = [m for m in unit.messages if m.role != "system"]
    for start in range(1, len(turns)):
        if turns[start].role == "user":
            tokens = encode.labelled(dataclasses.replace(unit, messages=(*system, *turns[start:])))
            if len(tokens[0]) <= limit:
                return tokens
    return None


@pytest.mark.parametrize("name", [*BUILT_IN, "tokenizer"])
def test_cut_oldest_keeps_the_longest_window_that_fits(name: str) -> None:
    rng = random.Random(name)
    outcomes = Counter[str]()
    for options in (variants := OPTIONS.get(name, [{}])):
        encoder = Kit(built_in(name, **options)).encoder
        for _ in range(12 // len(variants)):
            conversation = random_chat(rng, encoder.template)
            encode = RowEncoder({}, encoder, DataConfig())
            known: dict[tuple[str, bool], list[int]] = {}
            for unit in split_units(mark_trained(conversation, encode.config), encoder):
                assert isinstance(unit, Conversation)
                labelled = encode.labelled(unit, known=known)
                assert labelled == encode.labelled(unit)
                limit = int(len(labelled[0]) * rng.uniform(0.05, 0.99))
                config = DataConfig(max_length=limit, long_rows="cut_oldest")
                with_known = functools.partial(encode.labelled, known=known)
                cut = fit(unit, labelled, config, encoder.is_control, with_known)
                expected = first_window_that_fits(unit, limit, encode)
                outcomes["cut" if expected is not None else "dropped"] += 1
                if expected is None:
                    assert not cut.kept
                else:
                    assert cut.labelled == expected
                    whole = [list(range(len(expected[0])))] if any(expected[1][1:]) else []
                    assert [kept.tolist() for kept in cut.kept] == whole
    assert outcomes["cut"] > 5, outcomes


@pytest.mark.parametrize("policy", ["cut_oldest", "cut_proportional", "split"])
@pytest.mark.parametrize("name", ["chatml", "qwen3", "tokenizer"])
def test_each_text_of_a_long_chat_is_encoded_once(name: str, policy: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    encoder = Kit(built_in(name)).encoder
    conversation = turns(*random.Random(1).choices(range(3, 40), k=60 if name == "qwen3" else 400))
    num_chars = num_windows = 0

    def plain(text: str, **options: Any) -> list[int]:
        nonlocal num_chars
        num_chars += len(text)
        return Encoder.plain(encoder, text, **options)

    def count(*args: Any, **options: Any) -> Any:
        nonlocal num_windows
        num_windows += 1
        return Encoder.encode(encoder, *args, **options)

    monkeypatch.setattr(encoder, "plain", plain)
    monkeypatch.setattr(encoder, "encode", count)
    row = RowEncoder({}, encoder, DataConfig(max_length=2000, long_rows=policy)).encode(
        [conversation], EncodedRow(WHERE)
    )
    assert row.examples
    num_units = 30 if name == "qwen3" else 1
    # Besides its texts, a conversation has its markup, and an earlier answer is joined with it once it is not trained.
    assert num_chars < 1.5 * sum(len(m.content) + 20 for m in conversation.messages) * (2 if name == "qwen3" else 1)
    assert num_windows <= 5 * num_units


def test_cut_oldest_drops_a_row_whose_last_turns_alone_are_too_long(kit: Kit) -> None:
    row = encode(kit, turns(5, 5, 50, 50), long_rows="cut_oldest", max_length=40)
    assert not row.examples
    assert row.entries[0].reason == "its prompt alone fills max_length=40"


def test_cut_proportional_keeps_the_control_tokens_of_the_turns(kit: Kit) -> None:
    conversation = turns(100, 80)
    whole = encode(kit, conversation).examples[0]
    limit = len(whole.token_ids) // 2
    (cut,) = encode(kit, conversation, long_rows="cut_proportional", max_length=limit).examples
    num_answer = int(whole.loss_mask.sum())
    expected = infer_lengths(len(whole.token_ids) - num_answer, num_answer, limit)
    assert (int((~cut.loss_mask).sum()), int(cut.loss_mask.sum())) == expected
    text = kit.tokenizer.decode(cut.token_ids)
    assert text.startswith("<|im_start|>user\nw0x0 w0x1 ")
    assert "<|im_end|>\n<|im_start|>assistant\nw1x0 w1x1 " in text
    assert kit.encoder.stop_ids[0] not in cut.token_ids[cut.loss_mask]


@settings(max_examples=300)
@given(st.data())
def test_cut_proportional_keeps_as_many_tokens_of_every_turn_as_llama_factory(data: st.DataObject) -> None:
    theirs = assets.function(assets.path("llamafactory", "processor_utils.py"), "infer_seqlen")
    pairs = data.draw(st.lists(st.tuples(st.integers(1, 40), st.integers(1, 40)), min_size=1, max_size=5))
    limit = data.draw(st.integers(2, 100))
    ids: list[int] = []
    mask: list[bool] = []
    for prompt, answer in pairs:
        ids += [10 + n for n in range(prompt)] + [100 + n for n in range(answer - 1)] + [STOP]
        mask += [False] * prompt + [True] * answer
    total, expected = 0, []
    for prompt, answer in pairs:
        if total >= limit:
            break
        kept = theirs(prompt, answer, limit - total)
        expected.append(kept)
        total += sum(kept)
    piece = (ids, mask, [1.0] * len(ids))
    config = DataConfig(max_length=limit, long_rows="cut_proportional")
    found = fit(PlainText(""), piece, config, lambda token: token == STOP, lambda unit: piece).kept
    if not found:
        assert not any(answer for n, (_, answer) in enumerate(expected) if n or expected[0][0])
        return
    (kept,) = found
    kept_ids, kept_mask = [ids[n] for n in kept], [mask[n] for n in kept]
    assert len(kept_ids) == total <= limit
    assert sum(kept_mask) == sum(answer for _, answer in expected)
    # A stop that is trained ends an answer of which nothing was cut.
    assert [t for t, on in zip(kept_ids, kept_mask, strict=True) if on].count(STOP) == sum(
        kept == answer for (_, kept), (_, answer) in zip(expected, pairs, strict=False)
    )


def test_split_keeps_every_token_once(kit: Kit) -> None:
    text = PlainText(" ".join(f"w{n}" for n in range(200)))
    (whole,) = encode(kit, text, max_length=10_000).examples
    row = encode(kit, text, max_length=64, long_rows="split")
    assert [token for piece in row.examples for token in piece.token_ids.tolist()] == whole.token_ids.tolist()
    assert [piece.row_id for piece in row.examples] == [f"{WHERE}#{n + 1}" for n in range(len(row.examples))]
    assert all(len(piece.token_ids) == 64 for piece in row.examples[:-1])
    assert [e.action for e in row.entries] == ["split"]


def test_drop_and_error(kit: Kit) -> None:
    row = encode(kit, turns(20, 40), max_length=30, long_rows="drop")
    assert (row.examples, row.entries[0].reason) == ([], "longer than max_length=30")
    with pytest.raises(DataError, match=r"rows.jsonl:7: \d+ tokens, more than data.max_length=30"):
        encode(kit, turns(20, 40), max_length=30, long_rows="error")


@settings(max_examples=150, deadline=None)
@given(
    st.lists(st.integers(1, 30), min_size=2, max_size=8),
    st.integers(4, 120),
    st.sampled_from(["cut_end", "cut_oldest", "cut_proportional", "split", "drop"]),
)
def test_no_policy_returns_a_long_example_or_a_false_stop_token(lengths: list[int], limit: int, policy: Any) -> None:
    kit = _SHARED
    answers = turns(*lengths).messages[1::2]
    right = [f"{m.content}<|im_end|>" for m in answers]
    row = encode(kit, turns(*lengths), max_length=limit, long_rows=policy)
    for example in row.examples:
        assert len(example.token_ids) <= limit
        assert example.loss_mask[1:].any()
        for on, run in groupby(range(len(example.token_ids)), key=lambda at: bool(example.loss_mask[at])):
            said = kit.tokenizer.decode(example.token_ids[list(run)])
            if on and "<|im_end|>" in said:
                answer = said.removesuffix("\n")
                # A whole answer, or the end of one that begins in the example before.
                assert answer in right or (policy == "split" and any(whole.endswith(answer) for whole in right))


_SHARED = Kit(ChatML())
