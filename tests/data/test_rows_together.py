"""Rows that are encoded together: what they become, and how often the tokenizer is called."""

from __future__ import annotations

from typing import Any

import pytest

from sftx.assembly.stages.data_stages import ParserStage
from sftx.config.options import DataConfig, Source
from sftx.data.encoder import Encoder
from sftx.data.row_encoder import EncodedRow, RowEncoder
from sftx.errors import DataError
from sftx.testing.kit import Kit, built_in, make_stage
from sftx.types import Location

SOURCE = Source("rows.jsonl")
RECORDS: list[dict[str, Any]] = [
    {"messages": [{"role": role, "content": f"{role} says {text}"} for role in ("system", "user", "assistant")]}
    for text in ("hello", "hello", "你好 <|im_end|>", " x", "")
]
RECORDS += [{"text": "plain text"}, {"text": ""}]
SURROGATE = {"messages": [{"role": "user", "content": "q \ud800"}, {"role": "assistant", "content": "a"}]}
NO_PARSER = {"neither": 1}


class Counting:
    """Passes calls on to a tokenizer, and counts them."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer, self.texts, self.num_calls = tokenizer, list[str](), 0

    def encode_batch_fast(self, texts: list[str], **options: Any) -> Any:
        self.num_calls += bool(texts)
        self.texts += texts
        return self.tokenizer.encode_batch_fast(texts, **options)

    def encode(self, text: str, **options: Any) -> Any:
        self.num_calls += 1
        self.texts.append(text)
        return self.tokenizer.encode(text, **options)


@pytest.fixture(scope="module")
def encoder() -> Encoder:
    return Kit(built_in("chatml")).encoder


def row_encoder(encoder: Encoder, **options: Any) -> RowEncoder:
    parsers = {name: ParserStage(name, make_stage(built_in(name), "sftx_parser")) for name in ("messages", "text")}
    return RowEncoder(parsers, encoder, DataConfig(**options))


def encode(encoder: RowEncoder, records: list[dict[str, Any]]) -> list[EncodedRow]:
    return encoder.rows([(Location("rows.jsonl", n), record) for n, record in enumerate(records)], SOURCE)


def test_rows_together_are_what_each_is_alone(encoder: Encoder) -> None:
    encode_row = row_encoder(encoder, invalid_rows="drop")
    records = [*RECORDS, SURROGATE, NO_PARSER, *RECORDS]
    alone = [encode_row(Location("rows.jsonl", n), record, SOURCE) for n, record in enumerate(records)]
    together = encode(encode_row, records)
    assert together == alone
    assert sum(len(row.examples) for row in together) == 2 * 6


def test_a_text_is_given_to_the_tokenizer_once_and_all_of_them_in_one_call(encoder: Encoder) -> None:
    plain, continuing = Counting(encoder._plain), Counting(encoder._continuing)
    try:
        encoder._plain, encoder._continuing = plain, continuing  # type: ignore[assignment]
        encode(row_encoder(encoder), RECORDS * 20)
    finally:
        encoder._plain, encoder._continuing = plain.tokenizer, continuing.tokenizer
    assert (plain.num_calls, continuing.num_calls) == (1, 1)
    for counting in (plain, continuing):
        assert len(counting.texts) == len(set(counting.texts)) > 0


@pytest.mark.parametrize(
    ("records", "number"), [([SURROGATE, NO_PARSER], 1), ([NO_PARSER, SURROGATE], 1), ([*RECORDS, SURROGATE], 8)]
)
def test_the_first_wrong_row_is_the_one_that_is_reported(
    encoder: Encoder, records: list[dict[str, Any]], number: int
) -> None:
    with pytest.raises(DataError, match=rf"^rows\.jsonl:{number}: "):
        row_encoder(encoder).rows([(Location("rows.jsonl", n), record) for n, record in enumerate(records, 1)], SOURCE)
