"""The masks of native templates compared with those of TRL's training templates."""

from __future__ import annotations

import dataclasses
from itertools import groupby

import pytest

from sftx import Conversation, Message
from sftx.data.row_encoder import split_units
from templating import BRIEFED, CALLED, ROUNDS, TOOLS, chat, encoded_by, text_of, trl_mask

EQUAL = [
    ("llama3", "llama3"),
    ("gemma3", "gemma3"),
    ("gemma", "gemma3"),
    ("phi", "phi3"),
    ("phi", "phi3_5"),
]


@pytest.mark.parametrize(("name", "training"), EQUAL)
@pytest.mark.parametrize("conversation", [ROUNDS, BRIEFED], ids=["plain", "system"])
def test_masks_are_those_of_trl(name: str, training: str, conversation: Conversation) -> None:
    tokenizer, encoder = encoded_by(name)
    ids, mask, _ = encoder.encode(conversation)
    eos = {"eos_token": "<|endoftext|>"} if name == "phi" else {}
    assert (ids, mask) == trl_mask(tokenizer, conversation, training, **eos)


BEGINS_EARLIER = [
    ("qwen2.5", "qwen2_5", BRIEFED, ["\n", "\n"]),
    ("qwen2.5", "qwen2_5", dataclasses.replace(CALLED, tools=TOOLS), ["\n", "\n"]),
    ("deepseek3", "deepseekv3", BRIEFED, ["<｜Assistant｜>", "<｜Assistant｜>"]),
    ("deepseek3", "deepseekv3", CALLED, ["<｜Assistant｜>", "<｜tool▁outputs▁end｜>"]),
]


@pytest.mark.parametrize(("name", "training", "conversation", "before"), BEGINS_EARLIER)
def test_masks_of_trl_that_also_train_the_last_token_of_the_prompt(
    name: str, training: str, conversation: Conversation, before: list[str]
) -> None:
    """TRL trains the newline after Qwen's role and DeepSeek's role token, which the model never generates."""
    tokenizer, encoder = encoded_by(name)
    ids, mask, _ = encoder.encode(conversation)
    their_ids, theirs = trl_mask(tokenizer, conversation, training)
    starts = [at for at in range(1, len(mask)) if mask[at] and not mask[at - 1]]
    assert ids == their_ids
    assert [at for at in range(len(ids)) if mask[at] != theirs[at]] == [at - 1 for at in starts]
    assert [tokenizer.decode([ids[at - 1]]) for at in starts] == before


def test_trl_keeps_every_thought_of_qwen3_and_makes_one_example_of_all() -> None:
    """TRL trains the same text of each turn; the context differs, because Qwen3 renders earlier turns differently."""
    tokenizer, encoder = encoded_by("qwen3")
    thoughts = chat(
        ("user", "a?"), Message("assistant", "A", reasoning="Hm."), ("user", "b?"), ("assistant", "B"), ("user", "c?"),
        Message("assistant", "C", reasoning="Oh."),
    )  # fmt: skip
    for conversation in (ROUNDS, BRIEFED, thoughts):
        encoded = [encoder.encode(unit) for unit in split_units(conversation, encoder)]
        their_ids, theirs = trl_mask(tokenizer, conversation, "qwen3")
        assert runs(their_ids, theirs) == [run for ids, mask, _ in encoded for run in runs(ids, mask)]
        assert (encoded[0][0], encoded[0][1]) == (their_ids[: len(encoded[0][0])], theirs[: len(encoded[0][0])])
        assert encoded[-1][0] != their_ids


def runs(ids: list[int], mask: list[bool]) -> list[list[int]]:
    pairs = zip(ids, mask, strict=True)
    return [[token for token, _ in run] for trained, run in groupby(pairs, key=lambda pair: pair[1]) if trained]


def test_a_newline_at_the_start_of_an_answer_is_a_token_of_its_own() -> None:
    """The newlines are split because only the second is trained; the text is the same as when joined."""
    tokenizer, encoder = encoded_by("chatml")
    conversation = chat(("user", "U"), ("assistant", "\nA"))
    ids, mask, _ = encoder.encode(conversation)
    joined = tokenizer(text_of(encoder.template.render(conversation)))["input_ids"]
    assert tokenizer.decode(ids) == tokenizer.decode(joined)
    at = next(at for at in range(len(ids)) if ids[at] != joined[at])
    assert tokenizer.convert_ids_to_tokens(joined[at]) == "ĊĊ"
    assert tokenizer.convert_ids_to_tokens(ids[at : at + 2]) == ["Ċ", "Ċ"]
    assert mask[at : at + 2] == [False, True]
    assert ids[at + 2 :] == joined[at + 1 :]
