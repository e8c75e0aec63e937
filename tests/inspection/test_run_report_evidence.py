"""A run records evidence for its report: texts of tokens, loss masks, and the losses that the model itself computes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from sftx.data.dataset import Examples, Writer
from sftx.data.row_encoder import EncodedRow
from sftx.data.token_text import token_texts
from sftx.events import TokenLosses
from sftx.model.language_model import CausalLM
from sftx.model.tiny import make_tokenizer, model_dir
from sftx.trainer.evidence import as_evidence, choose_row, shown_rows, token_losses
from sftx.types import Example, Location

TEXT = "Bread, 预训练 🦙🦙 and שלום.\n  <|im_end|>"


@pytest.fixture(scope="module")
def lm() -> CausalLM:
    return CausalLM(AutoModelForCausalLM.from_pretrained(model_dir()), make_tokenizer()).eval()


class Words:
    """Decodes as Llama's tokenizer does: the space that a text begins with is left out."""

    def decode(self, token_ids: Sequence[int], **_: Any) -> str:
        return "".join(f" {token_id}" for token_id in token_ids)[1:]


def examples_of(lengths: Sequence[int]) -> Examples:
    writer = Writer()
    for n, length in enumerate(lengths, 1):
        mask = np.arange(length) >= length // 2
        where = Location("a.jsonl", n)
        writer.add(EncodedRow(where, "text", [Example(np.arange(length), mask, str(where), 0)]), 0)
    return writer.finish()


def test_the_text_of_tokens_is_the_text() -> None:
    tokenizer = make_tokenizer()
    ids = tokenizer(TEXT).input_ids
    texts = token_texts(ids, tokenizer)
    assert len(texts) == len(ids)
    assert "".join(texts) == TEXT
    assert "" in texts, "characters of several tokens"
    assert not any("\N{REPLACEMENT CHARACTER}" in text for text in texts)


def test_no_space_is_lost_between_tokens() -> None:
    assert token_texts([7, 8, 9], Words()) == ["7", " 8", " 9"]  # type: ignore[arg-type]


def test_half_a_character_at_the_end_is_shown_as_such() -> None:
    tokenizer = make_tokenizer()
    ids = tokenizer("🦙").input_ids
    assert len(ids) > 1
    texts = token_texts(ids[:-1], tokenizer)
    assert len(texts) == len(ids) - 1
    assert "\N{REPLACEMENT CHARACTER}" in texts[0]


def example(length: int, first: int) -> Example:
    return Example([n % 100 + 10 for n in range(length)], [n >= first for n in range(length)], f"row {length}", 0)


def test_rows_are_spread_and_as_many_as_there_are() -> None:
    tokenizer = make_tokenizer()
    rows = [replace(example(10, 4), row_id=str(n)) for n in range(20)]
    assert [row["row"] for row in shown_rows(rows, tokenizer)] == ["0", "4", "8", "12", "16"]
    assert [row["row"] for row in shown_rows(rows[:2], tokenizer)] == ["0", "1"]
    assert shown_rows([], tokenizer) == []


@pytest.mark.parametrize(
    ("length", "first", "left_out"),
    [(300, 20, [0, 0]), (1000, 20, [0, 600]), (1000, 500, [400, 200]), (1000, 990, [600, 0]), (350, 340, [0, 0])],
)
def test_of_a_long_row_what_is_trained_is_shown(length: int, first: int, left_out: list[int]) -> None:
    (row,) = shown_rows([example(length, first)], make_tokenizer())
    assert row["left_out"] == left_out
    assert len(row["tokens"]) == length - sum(left_out) <= 400
    assert sum(trained for _, trained in row["tokens"]) > 0


@pytest.mark.parametrize(
    ("lengths", "chosen"),
    [([5, 300, 40, 50], "a.jsonl:3"), ([5, 30, 9], "a.jsonl:2"), ([600, 400], "a.jsonl:2"), ([31, 257], "a.jsonl:1")],
)
def test_the_chosen_row_has_a_readable_length(lengths: list[int], chosen: str) -> None:
    row = choose_row(examples_of(lengths))
    assert row is not None
    assert row.row_id == chosen
    assert len(row.token_ids) == len(row.loss_mask) <= 256
    assert choose_row(examples_of([])) is None


def test_every_token_has_the_loss_that_the_model_gives_it(lm: CausalLM) -> None:
    ids = lm.tokenizer(TEXT).input_ids
    row = Example(ids, [n > 5 for n in range(len(ids))], "row", 0, weights=[2.0] * len(ids))
    with torch.no_grad():
        found = token_losses(lm, row)
        logits_TV = lm.model(torch.tensor([ids])).logits[0, :-1]
        own = torch.nn.functional.cross_entropy(logits_TV, torch.tensor(ids[1:]), reduction="none")
    assert found.losses[0] is None
    assert found.losses[1:] == pytest.approx(own.tolist(), rel=1e-5)
    assert found.trained == tuple(row.loss_mask)
    assert "".join(found.tokens) == TEXT


def test_what_is_no_number_or_of_another_row_is_null() -> None:
    before = TokenLosses("a", ("x", "y"), (None, math.inf), (False, True))
    assert as_evidence([], before, replace(before, losses=(None, 1.0)))["token_losses"] == {
        "row": "a",
        "tokens": ["x", "y"],
        "trained": [0, 1],
        "before": [None, None],
        "after": [None, 1.0],
    }
    assert as_evidence([], before, replace(before, row_id="b"))["token_losses"]["after"] is None
    assert as_evidence([], None, before) == {"rows": [], "token_losses": None}
