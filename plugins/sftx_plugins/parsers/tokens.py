"""`{"input_ids": [...], "labels": [...]}`: rows that were tokenised by another program."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Final

from sftx import IGNORE_INDEX, DataError, Location, Parser, Record, Tokens, hookimpl
from sftx_plugins.parsers import _values

_MASKS: Final = ("loss_mask", "completion_mask", "assistant_masks")


@dataclass(frozen=True, eq=False)
class TokenIds:
    """Token ids of the model's own tokenizer, and which of them are trained.

    `labels` repeat the ids, with -100 for untrained tokens; they are not shifted, because sftx shifts them itself.
    `loss_mask`, `completion_mask` and `assistant_masks` have a 1 for each trained token; if a record has several, a
    token needs a 1 in each. Without any of these every token is trained. Padding, marked by a 0 in `attention_mask`, is
    removed.
    """

    fields: ClassVar[str] = f"input_ids (labels, {', '.join(_MASKS)}, attention_mask)"
    samples: ClassVar[Sequence[Record]] = (
        {"input_ids": [40, 41, 42, 43], "labels": [-100, -100, 42, 43]},
        {"input_ids": [40, 41, 42, 43, 44], "loss_mask": [0, 0, 1, 1, 1]},
        {"input_ids": [0, 0, 40, 41, 42], "completion_mask": [0, 0, 0, 1, 1], "attention_mask": [0, 0, 1, 1, 1]},
        {"input_ids": [50, 51, 52]},
    )

    @hookimpl
    def sftx_parser(self) -> Parser:
        return self

    def accepts(self, record: Record) -> bool:
        return "input_ids" in record

    def parse(self, record: Record, where: Location) -> tuple[Tokens, ...]:
        ids = _ints(record, "input_ids", where)
        not_padding = _without_padding(record, len(ids), where)
        trained = [True] * len(ids)
        if record.get("labels") is not None:
            labels = _ints(record, "labels", where, len(ids))
            _check_labels(ids[not_padding], labels[not_padding], where)
            trained = [label != IGNORE_INDEX for label in labels]
        for field in _MASKS:
            if record.get(field) is not None:
                mask = _bits(record, field, where, len(ids))
                trained = [a and b for a, b in zip(trained, mask, strict=True)]
        return (Tokens(tuple(ids[not_padding]), tuple(trained[not_padding])),)


def _ints(record: Record, field: str, where: Location, length: int | None = None) -> list[int]:
    """Return a list of integers, `length` of them if that is given. Raises DataError."""
    values = _values.list_of(record.get(field), field, where)
    wrong = next((number for number, value in enumerate(values) if type(value) is not int), None)
    if wrong is not None:
        raise DataError(f"{where}: {field}[{wrong}] is {_values.shown(values[wrong])}, expected a whole number")
    if length is not None and len(values) != length:
        count = f"{len(values)} value{'s' * (len(values) != 1)}"
        raise DataError(f"{where}: {field} has {count} for {length} input_ids; give one each")
    return values


def _bits(record: Record, field: str, where: Location, length: int) -> list[bool]:
    """Return a mask of ones and zeros, or of true and false. Raises DataError."""
    values = record.get(field)
    if isinstance(values, list):
        record = {field: [int(value) if isinstance(value, bool) else value for value in values]}
    bits = _ints(record, field, where, length)
    wrong = next((number for number, value in enumerate(bits) if value not in (0, 1)), None)
    if wrong is not None:
        raise DataError(f"{where}: {field}[{wrong}] is {_values.shown(bits[wrong])}, expected 0 or 1")
    return [bit == 1 for bit in bits]


def _without_padding(record: Record, length: int, where: Location) -> slice:
    """Return the slice of the tokens that are not padding. Raises DataError if they are not contiguous."""
    if record.get("attention_mask") is None:
        return slice(0, length)
    mask = _bits(record, "attention_mask", where, length)
    if True not in mask:
        return slice(0, 0)
    start, end = mask.index(True), length - mask[::-1].index(True)
    if not all(mask[start:end]):
        raise DataError(
            f"{where}: attention_mask has a 0 between its ones, expected zeros at the ends alone; "
            "give each document a row of its own"
        )
    return slice(start, end)


def _check_labels(ids: list[int], labels: list[int], where: Location) -> None:
    """Raise DataError unless each label is the id at the same position, or IGNORE_INDEX."""
    wrong = next((at for at, label in enumerate(labels) if label not in (IGNORE_INDEX, ids[at])), None)
    if wrong is None:
        return
    shifted = all(label in (IGNORE_INDEX, token) for token, label in zip(ids[1:], labels[:-1], strict=True))
    advice = "they are shifted by one, which sftx does itself: " if shifted else ""
    raise DataError(
        f"{where}: labels[{wrong}] of the tokens without padding is {_values.shown(labels[wrong])} and their input_ids"
        f"[{wrong}] is {_values.shown(ids[wrong])}; {advice}give each token its own id, or {IGNORE_INDEX} to leave it "
        "untrained"
    )
