"""Convert records of any format into one that most tools read.

A conversation is written in OpenAI's messages format; the built-in parser `messages` reads it back unchanged.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from sftx.assembly.stages.data_stages import ParserStage
from sftx.config.options import DataConfig, Source
from sftx.data import held_out
from sftx.data.ledger import Ledger
from sftx.data.parsed_rows import parse_rows
from sftx.data.sources import NO_PLUGINS, RowSources
from sftx.errors import DataError
from sftx.types import Conversation, Location, Message, Parsed, PlainText, Record

DUPLICATE = "the same as an earlier row"


def export_lines(
    train: Sequence[Source],
    config: DataConfig,
    parsers: Mapping[str, ParserStage],
    ledger: Ledger,
    row_sources: RowSources = NO_PLUGINS,
) -> Iterator[str]:
    """Yield one line of JSON for each row that a run would train on, in order; the others are added to the ledger.

    Weights of sources and options that count tokens have no effect. Raises DataError for a row that cannot be read or
    written, and for more dropped rows than `config.max_dropped` allows.
    """
    seen: set[bytes] = set()
    left_out = held_out.choose(train, config, parsers, row_sources) if config.eval_fraction is not None else ()
    for parsed_row in parse_rows(train, config, parsers, row_sources):
        row, line = parsed_row.row, ""
        if (parsed_row.source, parsed_row.index) in left_out:
            row.drop(f"data.eval_fraction={config.eval_fraction:g}", action="held out")
        if not row.entries:
            try:
                line = _line(parsed_row.parsed, row.where)
            except DataError as error:
                if config.invalid_rows != "drop":
                    raise
                row.drop(str(error).removeprefix(f"{row.where}: "))
            else:
                key = hashlib.blake2b(line.encode(), digest_size=16).digest()
                if (train[parsed_row.source].filters or config.filters).duplicates == "drop" and key in seen:
                    row.drop(DUPLICATE, action="filtered")
                seen.add(key)
        ledger.num_rows += 1
        ledger.entries += row.entries
        if not row.entries:
            yield line
    ledger.check(config.max_dropped)


def _line(parsed: Sequence[Parsed], where: Location) -> str:
    """Return a parsed record, whose turns are marked, as one line of JSON, which is valid UTF-8."""
    if len(parsed) != 1:
        raise DataError(
            f"{where}: its format makes {len(parsed)} examples of it that belong together (a preference pair), which "
            "the messages format cannot express; leave such rows out"
        )
    record = to_record(parsed[0])
    try:
        line = json.dumps(record, ensure_ascii=False, allow_nan=False)
        line.encode()
    except UnicodeEncodeError:  # a lone surrogate, which JSON can only hold as an escape
        return json.dumps(record)
    except (TypeError, ValueError, RecursionError) as error:
        raise DataError(f"{where}: cannot be written as JSON: {error}") from None
    return line


def to_record(parsed: Parsed) -> Record:
    """Return the record that the built-in parsers read as `parsed`: `messages` and `tools`, `text`, or `input_ids`.

    `extras`, which a parser provides for a loss of its own, are left out, since none of these formats has them.
    """
    if isinstance(parsed, PlainText):
        return {"text": parsed.text}
    if not isinstance(parsed, Conversation):
        return {"input_ids": list(parsed.token_ids), "loss_mask": [int(trained) for trained in parsed.loss_mask]}
    record: dict[str, Any] = {"messages": [_message(message) for message in parsed.messages]}
    if parsed.tools:
        # JSON text keeps nulls, which readers of tables (parquet, Arrow) take for missing keys.
        record["tools"] = (
            json.dumps(parsed.tools, ensure_ascii=False) if _has_null(parsed.tools) else list(parsed.tools)
        )
    return record


def _message(message: Message) -> dict[str, Any]:
    """Return a message in OpenAI's format, with `train` and `weight` where the record sets them."""
    record: dict[str, Any] = {"role": message.role, "content": message.content}
    if message.reasoning:
        record["reasoning_content"] = message.reasoning
    if message.tool_calls:
        # The arguments are JSON text, as in OpenAI's format; readers of tables (parquet, Arrow) would give objects each
        # other's keys.
        record["tool_calls"] = [
            ({} if call.id is None else {"id": call.id})
            | {
                "type": "function",
                "function": {"name": call.name, "arguments": json.dumps(call.arguments, ensure_ascii=False)},
            }
            for call in message.tool_calls
        ]
    for name in ("name", "tool_call_id"):
        if (value := getattr(message, name)) is not None:
            record[name] = value
    if message.weight == 0:
        return record | {"train": False}
    if message.trainable is not None:
        record["train"] = message.trainable
    if message.weight != 1:
        record["weight"] = message.weight
    return record


def _has_null(value: Any) -> bool:
    """Return whether a JSON value contains null."""
    if isinstance(value, Mapping):
        return any(map(_has_null, value.values()))
    return value is None or (isinstance(value, list | tuple) and any(map(_has_null, value)))
