"""What parsers find becomes records again: of any format, the one form that most tools read.

A conversation is written as OpenAI's messages, which the built-in format `messages` reads back as they were.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from sftx.assembly.stages import ParserStage
from sftx.config.options import DataConfig, Source
from sftx.data import sources
from sftx.data.ledger import Ledger
from sftx.data.row_encoder import EncodedRow, filtered_by_turns, mark_trained, parse_record
from sftx.errors import DataError, SftxError
from sftx.types import Conversation, Location, Message, Parsed, PlainText, Record, ToolCall

DUPLICATE = "the same as an earlier row"


def export(
    wanted: Sequence[Source], config: DataConfig, parsers: Mapping[str, ParserStage], ledger: Ledger
) -> Iterator[str]:
    """One line of JSON for each row of the sources, in their order; the ledger has those that are left out.

    Weights of sources say how an epoch is put together, and change nothing here; what counts tokens is not applied
    either. Raises DataError: a row that cannot be read or written, more dropped rows than `config.max_dropped` allows.
    """
    seen: set[bytes] = set()
    for source in wanted:
        filters = source.filters or config.filters
        for where, record in sources.read(source):
            row = EncodedRow(where)
            line = ""
            try:
                parsed = parse_record(record, row, parsers, source, config)
                if reason := filtered_by_turns(parsed, filters):
                    row.drop(reason, action="filtered")
                else:
                    line = _line(parsed, where, config)
                    key = hashlib.blake2b(line.encode(), digest_size=16).digest()
                    if filters.duplicates == "drop" and key in seen:
                        row.drop(DUPLICATE, action="filtered")
                    seen.add(key)
            except SftxError as error:
                if not (isinstance(error, DataError) and config.invalid_rows == "drop"):
                    raise
                row.drop(str(error).removeprefix(f"{where}: "))
            ledger.num_rows += 1
            ledger.entries += row.entries
            if not row.entries:
                yield line
    ledger.check(config.max_dropped)


def _line(parsed: Sequence[Parsed], where: Location, config: DataConfig) -> str:
    if len(parsed) != 1:
        raise DataError(
            f"{where}: its format makes {len(parsed)} examples of it that belong together (a preference pair), which a "
            "line of messages cannot say; leave such rows out"
        )
    record = to_record(mark_trained(parsed[0], config))
    try:
        line = json.dumps(record, ensure_ascii=False, allow_nan=False)
        line.encode()
    except UnicodeEncodeError:  # a lone surrogate, which JSON can hold as an escape
        return json.dumps(record)
    except (TypeError, ValueError, RecursionError) as error:
        raise DataError(f"{where}: cannot be written as JSON: {error}") from None
    return line


def to_record(parsed: Parsed) -> Record:
    """The record that the built-in formats read as `parsed`: `messages` and `tools`, `text`, or `input_ids`.

    `extras`, which a parser keeps for a loss of its own, are no part of any format and left out.
    """
    if isinstance(parsed, PlainText):
        return {"text": parsed.text}
    if not isinstance(parsed, Conversation):
        return {"input_ids": list(parsed.token_ids), "loss_mask": [int(trained) for trained in parsed.loss_mask]}
    record: dict[str, Any] = {"messages": [_message(message) for message in parsed.messages]}
    if parsed.tools:
        # As JSON text where a null would be lost: readers of tables take it for a key that is not there.
        record["tools"] = (
            json.dumps(parsed.tools, ensure_ascii=False) if _has_null(parsed.tools) else list(parsed.tools)
        )
    return record


def _message(message: Message) -> dict[str, Any]:
    written: dict[str, Any] = {"role": message.role, "content": message.content}
    if message.reasoning:
        written["reasoning_content"] = message.reasoning
    if message.tool_calls:
        written["tool_calls"] = [_tool_call(call) for call in message.tool_calls]
    for name in ("name", "tool_call_id"):
        if (value := getattr(message, name)) is not None:
            written[name] = value
    if message.weight == 0:
        return written | {"train": False}
    if message.trainable is not None:
        written["train"] = message.trainable
    if message.weight != 1:
        written["weight"] = message.weight
    return written


def _tool_call(call: ToolCall) -> dict[str, Any]:
    """The arguments are JSON text, as OpenAI has them: as objects, tables would fill them with each other's keys."""
    function = {"name": call.name, "arguments": json.dumps(call.arguments, ensure_ascii=False)}
    return ({} if call.id is None else {"id": call.id}) | {"type": "function", "function": function}


def _has_null(value: Any) -> bool:
    if isinstance(value, Mapping):
        return any(map(_has_null, value.values()))
    return value is None or (isinstance(value, list | tuple) and any(map(_has_null, value)))
