"""10,000 malformed rows: each becomes examples, an entry of the ledger, or an error with its location.

Every example is checked without the code that made its mask: its trained tokens decode to exactly the text of the
trained turns, without any text that the row marks as not the assistant's, and the number of its control tokens is that
of the template.
"""

from __future__ import annotations

import itertools
import json
import re
import unicodedata
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from sftx.assembly.discovery import load_class
from sftx.assembly.entry_points import discover, find
from sftx.config.default_plugins import DEFAULT_PLUGINS
from sftx.config.options import DataConfig, Source
from sftx.data.encoder import Encoder
from sftx.data.row_encoder import RowEncoder
from sftx.errors import DataError
from sftx.model.tiny import make_tokenizer
from sftx.types import Conversation, Location, Message, Parsed, Parser, PlainText, Tokens
from wrong_rows import FORBIDDEN, places, texts, wrong_rows

ROWS = 10_000
CUT_TO = 24
LONG_EVERY = 417  # a string of a megabyte, which takes a second to encode
ASSETS = Path(__file__).parents[2] / ".assets"
END = "<|im_end|>"
PARSERS: dict[str, Parser] = {name: load_class(find(name, discover()))() for name in DEFAULT_PLUGINS["sftx_parser"]}
SAMPLES = [sample for parser in PARSERS.values() for sample in parser.samples]

# --- texts of the row ------------------------------------------------------------


def bare(text: str) -> str:
    return re.sub(r"\s|</?think>", "", text)


def says(record: dict[str, Any]) -> set[str]:
    """Return every text of the row without white space and tags, and the joined parts of a content or instruction."""
    found = {bare(inner[key]) for inner, key in texts(record)} | {""}
    for inner, key in places(record):
        parts = inner[key] if type(inner[key]) is list else []
        for kinds in (("text",), ("reasoning", "thinking")):
            chosen = [part for part in parts if type(part) is dict and part.get("type") in kinds]
            found.add(
                bare(
                    "".join(
                        str(next(filter(None, map(part.get, (part["type"], "text", "value"))), "")) for part in chosen
                    )
                )
            )
    return found | {bare("".join(str(record.get(key) or "") for key in ("instruction", "input")))}


def check_nothing_is_lost(conversation: Conversation, record: dict[str, Any], format_: str) -> None:
    """Check that the row has the text of each parsed turn: as a whole value, or as a part of a transcript."""
    whole = says(record)
    for message in conversation.messages:
        reasoning, content = bare(message.reasoning), bare(message.content)
        if message.tool_calls or format_ == "hh-rlhf":
            assert all(any(text in other for other in whole) for text in (reasoning, content))
        else:
            assert reasoning + content in whole or {reasoning, content} <= whole


# --- the trained text in ChatML, with tools in the form of Hermes ----------------------


def trained_text(conversation: Conversation) -> str:
    messages = conversation.messages
    written = []
    for number, message in enumerate(messages):
        if not message.trained:
            continue
        if message.role == "tool":
            closes = number + 1 == len(messages) or messages[number + 1].role != "tool"
            written.append(f"{message.content}\n</tool_response>" + (f"{END}\n" if closes else ""))
            continue
        thought = f"<think>\n{message.reasoning}\n</think>\n\n" if message.reasoning else ""
        calls = [
            f'<tool_call>\n{{"name": {json.dumps(call.name, ensure_ascii=False)}, '
            f'"arguments": {json.dumps(call.arguments, ensure_ascii=False)}}}\n</tool_call>'
            for call in message.tool_calls
        ]
        said = "\n".join([message.content] if message.content else []) + ("\n" if message.content and calls else "")
        written.append(f"{thought}{said}" + "\n".join(calls) + f"{END}\n")
    return "".join(written)


def num_controls(conversation: Conversation, vocabulary: dict[str, int]) -> int:
    """Count the control tokens of ChatML: two for each turn (consecutive tool results share one), reasoning and calls.

    The system text that lists the tools has an example call and its tags twice.
    """
    messages: list[Message] = list(conversation.messages)
    if conversation.tools and not (messages and messages[0].role == "system"):
        messages.insert(0, Message("system", ""))
    joined = sum(one.role == other.role == "tool" for one, other in itertools.pairwise(messages))
    number = 2 * (len(messages) - joined)
    for tag, times in (
        ("<think>", sum(bool(m.reasoning) for m in messages)),
        ("<tool_call>", sum(len(m.tool_calls) for m in messages) + 2 * bool(conversation.tools)),
        ("<tool_response>", sum(m.role == "tool" for m in messages)),
    ):
        number += 2 * times if tag in vocabulary else 0
    return number


# --- the run ----------------------------------------------------------------------------------------------------


class Model:
    """A tokenizer, and row encoders that use it with ChatML."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        self.vocabulary = tokenizer.get_vocab()
        template = load_class(find("chatml", discover()))().sftx_template(tokenizer)
        self.encoder = Encoder(tokenizer, template)
        # One encoder does not cut any row, and the others cut many.
        self.whole = RowEncoder(PARSERS, self.encoder, DataConfig(max_length=2**22))
        self.cut = [
            RowEncoder(PARSERS, self.encoder, DataConfig(max_length=CUT_TO, long_rows=policy))
            for policy in ("cut_end", "cut_oldest", "cut_proportional", "split", "drop")
        ]

    def decode(self, ids: list[int]) -> str:
        return str(self.tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False))


def encode(
    encoder: RowEncoder, where: Location, record: dict[str, Any]
) -> tuple[list[tuple[list[int], list[bool]]], int]:
    """Return token ids and mask of each example of a record, and the number of its ledger entries. Raises DataError."""
    row = encoder(where, record, Source("fuzz.jsonl"))
    assert all(entry.where == where and entry.reason for entry in row.entries)
    return [(one.token_ids.tolist(), one.loss_mask.tolist()) for one in row.examples], len(row.entries)


@pytest.fixture(scope="module")
def models() -> list[Model]:
    from transformers import AutoTokenizer

    directory = ASSETS / "tokenizers" / "qwen3"
    assert directory.is_dir(), f"{directory} is missing; run `make assets`"
    return [Model(make_tokenizer()), Model(AutoTokenizer.from_pretrained(directory))]


def trained_ids(ids: list[int], mask: list[bool]) -> list[int]:
    return [token for token, on in zip(ids, mask, strict=True) if on]


def check(parsed: Parsed, ids: list[int], mask: list[bool], model: Model) -> None:
    """Check that exactly the right tokens are trained."""
    trained = trained_ids(ids, mask)
    if isinstance(parsed, Tokens):
        assert (ids, mask) == (list(parsed.token_ids), list(parsed.loss_mask))
        return
    controls = [token for token in ids if model.encoder.is_control(token)]
    if isinstance(parsed, PlainText):
        assert trained == ids
        assert controls == [model.tokenizer.eos_token_id]
        assert same(model.decode(ids[:-1]), parsed.text)
        return
    assert same(model.decode(trained), trained_text(parsed))
    assert len(controls) == num_controls(parsed, model.vocabulary)
    assert sum(token in model.encoder.stop_ids for token in trained) == sum(
        m.trained and not (m.role == after.role == "tool")
        for m, after in zip(parsed.messages, (*parsed.messages[1:], Message("", "")), strict=True)
    )
    assert FORBIDDEN not in model.decode(trained)


def same(one: str, other: str) -> bool:
    """Return whether two texts are equal after Unicode normalization (NFC), which Qwen's tokenizer applies first."""
    return one == other or unicodedata.normalize("NFC", one) == unicodedata.normalize("NFC", other)


def test_no_row_gives_a_traceback_or_trains_a_wrong_token(models: list[Model]) -> None:
    outcomes: Counter[str] = Counter()
    formats: Counter[str] = Counter()
    for number, record in enumerate(wrong_rows(SAMPLES, ROWS, long_every=LONG_EVERY)):
        where = Location("fuzz.jsonl", number + 1)
        model = models[number % 5 == 0]
        name = next((name for name, parser in PARSERS.items() if parser.accepts(record)), "")
        try:
            examples, entries = encode(model.whole, where, record)
        except DataError as refused:
            error = str(refused)
        else:
            error = ""
        if error:
            assert str(where) in error
            assert len(error) < 1000, "an error has one line, however long the value is"
            assert error.isprintable()
            outcomes["refused" if name else "of no format"] += 1
            continue
        if not examples:
            assert entries == 1
            outcomes["in the ledger"] += 1
            continue
        assert entries == 0
        parsed = PARSERS[name].parse(record, where)
        assert len(parsed) == len(examples)
        for one, (ids, mask) in zip(parsed, examples, strict=True):
            check(one, ids, mask, model)
            if isinstance(one, Conversation):
                check_nothing_is_lost(one, record, name)
        outcomes["trained on"] += 1
        formats[name] += 1
        if number % 4 == 0:
            cut, entries = encode(model.cut[number % len(model.cut)], where, record)
            assert all(len(ids) <= CUT_TO for ids, _ in cut)
            assert cut == examples or entries
            assert not any(FORBIDDEN in model.decode(trained_ids(*one)) for one in cut)
            outcomes["cut"] += cut != examples
    print(dict(outcomes), dict(formats))
    assert outcomes.pop("cut") > 0.03 * ROWS
    assert sum(outcomes.values()) == ROWS
    assert outcomes["trained on"] > 0.4 * ROWS
    assert outcomes["refused"] > 0.2 * ROWS
    assert outcomes["in the ledger"] > 0.005 * ROWS
    assert outcomes["of no format"] > 0.005 * ROWS
    assert set(formats) == set(PARSERS)
    assert min(formats.values()) > 0.01 * ROWS
