"""Rows with the log-probabilities of a teacher, and how they are kept with an example until its batch is made."""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Final, NamedTuple

from sftx import DataError, Example, Location, Record, Tokens
from sftx_plugins.parsers import _values
from sftx_plugins.parsers.tokens import TokenIds

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

IDS, LOG_PROBS, TEMPERATURE = "teacher_ids", "teacher_log_probs", "teacher_temperature"
"""The fields of a record beside those of `tokens`."""

_EXTRAS: Final = "teacher"
_PLACES: Final = "teacher_places"
"""Keys of an example's extras: what was stored, and for each token as a float which row of it is the token's.

Tokens that are not trained have the first row, so that a plan of memory, which makes an example longer and trains all
of it, finds one for each.
"""
_MOST: Final = 1e-3
"""How far beyond 1 the stored probabilities of a token may add up: log-probabilities are often rounded to bf16."""


class StoredTopK(NamedTuple):
    """The k largest log-probabilities of a teacher for some tokens of an example. L of its tokens have them."""

    places: list[float]
    """[T], for each token of the example which of the L rows is its own; meaningless where it is not trained."""
    num_tokens: int
    """Tokens of the record: more than those of an example that was cut."""
    ids_LK: NDArray[np.int64]
    log_probs_LK: NDArray[np.float32]
    """In nats, at `temperature`."""
    temperature: float


class TeacherRows:
    """Reads the rows of `tokens` with two more fields: what a teacher says in place of each token.

    `teacher_ids[i]` and `teacher_log_probs[i]` are the k most likely tokens in place of `input_ids[i]`, given the
    tokens before it, and the logarithms of their probabilities in nats, in any order. They are empty or null where a
    token is not trained, and for the first one. `teacher_temperature` is the temperature of these probabilities, 1 by
    default. Padding is refused.
    """

    fields: ClassVar[str] = f"input_ids, {IDS}, {LOG_PROBS} (labels, {TEMPERATURE})"
    samples: ClassVar[Sequence[Record]] = (
        {
            "input_ids": [40, 41, 42, 43],
            "labels": [-100, -100, 42, 43],
            IDS: [[], [], [42, 7], [43, 44]],
            LOG_PROBS: [[], [], [-0.1, -2.5], [-0.7, -0.8]],
        },
        {
            "input_ids": [50, 51, 52],
            IDS: [None, [9, 51], [52, 51]],
            LOG_PROBS: [None, [-0.4, -1.6], [-0.01, -5.0]],
            TEMPERATURE: 1.0,
        },
        {
            "input_ids": [60, 61, 62, 63, 64],
            "loss_mask": [0, 1, 0, 1, 1],
            IDS: [[], [61, 5], [], [63, 6], [3, 64]],
            LOG_PROBS: [[], [-0.2, -3], [], [-1.5, -1.6], [-0.3, -1.9]],
        },
    )

    def accepts(self, record: Record) -> bool:
        return "input_ids" in record and IDS in record

    def parse(self, record: Record, where: Location) -> tuple[Tokens, ...]:
        import numpy as np

        (tokens,) = TokenIds().parse(record, where)
        length = len(tokens.token_ids)
        if length != len(record["input_ids"]):
            raise DataError(f"{where}: has padding, which {IDS} cannot follow; remove it from all fields")
        ids, log_probs = (_lists(record, name, length, where) for name in (IDS, LOG_PROBS))
        positions = [at for at in range(1, length) if tokens.loss_mask[at]]
        for at in positions:
            _check(ids[at], log_probs[at], at, where)
        sizes = sorted({len(ids[at]) for at in positions})
        if len(sizes) > 1:
            raise DataError(
                f"{where}: {IDS} has {sizes[0]} tokens at one place and {sizes[-1]} at another; give each as many"
            )
        temperature = record.get(TEMPERATURE, 1.0)
        if not _is_number(temperature) or not temperature > 0:
            raise DataError(f"{where}: {TEMPERATURE} is {_values.shown(temperature)}, expected a number above 0")
        places = dict(zip(positions, map(float, range(len(positions))), strict=True))
        extras = {
            "num_tokens": length,
            "num_rows": len(positions),
            "ids": _packed(np.array([ids[at] for at in positions], np.int32)),
            "log_probs": _packed(np.array([log_probs[at] for at in positions], np.float32)),
            "temperature": float(temperature),
        }
        of_tokens = [places.get(at, 0.0) for at in range(length)]
        return (Tokens(tokens.token_ids, tokens.loss_mask, extras={_EXTRAS: extras, _PLACES: of_tokens}),)


def stored(example: Example) -> StoredTopK | None:
    """Return what `TeacherRows` read with the example; None for one of another format."""
    import numpy as np

    kept: Mapping[str, Any] | None = example.extras.get(_EXTRAS)
    if kept is None:
        return None
    ids, log_probs = (
        np.frombuffer(base64.b64decode(kept[name]), dtype).reshape(kept["num_rows"], -1)
        for name, dtype in (("ids", np.int32), ("log_probs", np.float32))
    )
    places: list[float] = example.extras[_PLACES]
    return StoredTopK(
        places, kept["num_tokens"], ids.astype(np.int64), log_probs.astype(np.float32), kept["temperature"]
    )


def _packed(array: NDArray[Any]) -> str:
    """Return the bytes of an array as text: lists of numbers would take four times the memory, and ages to read."""
    return base64.b64encode(array.tobytes()).decode("ascii")


def _lists(record: Record, name: str, length: int, where: Location) -> list[list[Any]]:
    """Return a list for each token, empty for null. Raises DataError."""
    values = _values.list_of(record.get(name), name, where)
    if len(values) != length:
        raise DataError(f"{where}: {name} has {len(values)} entries for {length} input_ids; give one each, [] for none")
    wrong = next((at for at, value in enumerate(values) if not (value is None or isinstance(value, list))), None)
    if wrong is not None:
        raise DataError(f"{where}: {name}[{wrong}] is {_values.shown(values[wrong])}, expected a list")
    return [value or [] for value in values]


def _check(ids: list[Any], log_probs: list[Any], at: int, where: Location) -> None:
    """Raise DataError unless these are distinct token ids, and as many logarithms of probabilities."""
    import math

    if not ids:
        raise DataError(f"{where}: {IDS}[{at}] is empty, and input_ids[{at}] is trained; give its most likely tokens")
    if len(ids) != len(log_probs):
        raise DataError(f"{where}: {LOG_PROBS}[{at}] has {len(log_probs)} numbers for {len(ids)} of {IDS}[{at}]")
    wrong = [value for value in ids if type(value) is not int or not 0 <= value < 2**31]
    if wrong or len(set(ids)) < len(ids):
        found = _values.shown(wrong[0]) if wrong else "a token twice"
        raise DataError(f"{where}: {IDS}[{at}] has {found}, expected token ids, each once")
    if not all(_is_number(value) for value in log_probs):
        found = next(_values.shown(value) for value in log_probs if not _is_number(value))
        raise DataError(f"{where}: {LOG_PROBS}[{at}] has {found}, expected finite numbers")
    total = math.fsum(math.exp(min(value, 1.0)) for value in log_probs)
    if total > 1 + _MOST:
        raise DataError(
            f"{where}: {LOG_PROBS}[{at}] are of probabilities that add up to {total:.4g}; expected natural logarithms "
            "of probabilities, not logits"
        )


def _is_number(value: Any) -> bool:
    import math

    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
