"""Held-out rows: which rows of the training data `data.eval_fraction` holds out, and held-out rows that are trained on.

Which rows are held out depends on what they say and on `data.eval_seed`, and on nothing else: not on the order of
sources and files, the number of processes, the tokenizer or the template. So runs that are compared evaluate the same
rows.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from sftx.assembly.stages.data_stages import ParserStage
from sftx.config.options import DataConfig, Source
from sftx.data import sources
from sftx.data.parsed_rows import ParsedRow, parse_rows
from sftx.data.sources import NO_PLUGINS, RowSources
from sftx.errors import DataError, counted
from sftx.types import Conversation, Parsed, PlainText

if TYPE_CHECKING:
    from sftx.data.dataset import Dataset, Examples

log = logging.getLogger(__name__)


def choose(
    data_sources: Sequence[Source],
    config: DataConfig,
    parsers: Mapping[str, ParserStage],
    row_sources: RowSources = NO_PLUGINS,
) -> frozenset[tuple[int, int]]:
    """Return the held-out rows: number of the source, and how many of its rows come before the row.

    Rows with the same content are held out together, and so are rows with the same value of the field
    `config.eval_group`. Rows that train nothing are neither counted nor held out. Raises DataError.
    """
    assert config.eval_fraction is not None
    rows: list[tuple[int, int, bytes]] = []
    joined = _Joined()
    for row in parse_rows(data_sources, config, parsers, row_sources):
        if row.parsed:
            content = _digest([_content(one) for one in row.parsed])
            joined.add(content)
            if config.eval_group is not None:
                joined.add(content, _digest({"group": _group(row, config.eval_group)}))
            rows.append((row.source, row.index, content))
    sizes = Counter(joined.first(content) for _, _, content in rows)
    seed = str(config.eval_seed).encode()
    order = sorted(sizes, key=lambda unit: hashlib.blake2b(unit, key=seed, digest_size=16).digest())
    wanted = config.eval_fraction if config.eval_fraction >= 1 else max(1, round(config.eval_fraction * len(rows)))
    what = f"data.eval_fraction={config.eval_fraction:g}"
    if wanted >= len(rows):
        raise DataError(f"{what}: leaves no row to train on of {len(rows)} that train something; hold out fewer")
    held_out: set[bytes] = set()
    num_held_out = 0
    for unit in order:
        is_nearer = abs(num_held_out + sizes[unit] - wanted) < abs(num_held_out - wanted)
        if is_nearer and num_held_out + sizes[unit] < len(rows):
            held_out.add(unit)
            num_held_out += sizes[unit]
    if not held_out and len(order) > 1:  # all are much larger than what is wanted
        held_out.add(min(order, key=lambda unit: sizes[unit]))
    if not held_out:
        raise DataError(
            f"{what}: the {len(rows)} rows that train something all belong together (equal content, or the same value "
            "of data.eval_group), so that none can be held out; give held-out rows with --eval-data"
        )
    return frozenset((source, index) for source, index, content in rows if joined.first(content) in held_out)


class _Joined:
    """Sets of keys that belong together; each set is known by its smallest key."""

    def __init__(self) -> None:
        self._parents: dict[bytes, bytes] = {}

    def add(self, *keys: bytes) -> None:
        """Add keys that belong together, and join the sets that have one of them."""
        first = min(self.first(key) for key in keys)
        for key in keys:
            self._parents[self.first(key)] = first

    def first(self, key: bytes) -> bytes:
        """Return the smallest key of the set of a key."""
        path = []
        while (parent := self._parents.setdefault(key, key)) != key:
            path.append(key)
            key = parent
        for passed in path:  # so that later calls are short
            self._parents[passed] = key
        return key


def _group(row: ParsedRow, field: str) -> Any:
    try:
        value = sources.column_value(row.record, field, row.row.where)
        return int(value) if isinstance(value, float) and value.is_integer() else value  # 1.0 is the group 1
    except DataError as error:
        raise DataError(str(error).replace(": columns: no column", ": data.eval_group: no field")) from None


def _content(parsed: Parsed) -> Any:
    """Return what a row says, without what no template writes: which turns are trained, ids, space around the text."""
    if parsed.extras:
        return [_content(dataclasses.replace(parsed, extras={})), parsed.extras]
    if isinstance(parsed, Conversation):
        turns = [
            [turn.role, turn.content.strip(), turn.reasoning.strip(), [[c.name, c.arguments] for c in turn.tool_calls]]
            for turn in parsed.messages
        ]
        return [turns, parsed.tools]
    return parsed.text.strip() if isinstance(parsed, PlainText) else parsed.token_ids


def _digest(value: Any) -> bytes:
    text = json.dumps(value, sort_keys=True, default=str)
    return hashlib.blake2b(text.encode(), digest_size=16).digest()


# --- held-out rows that are trained on ------------------------------------------------------------


def find_overlap(train: Dataset, held_out: Dataset) -> list[tuple[int, int]]:
    """Return the held-out examples with exactly the tokens, labels and extras of a training one, as pairs of indices.

    The second index is that of the first such training example. Where the training rows are the questions of a rollout,
    a held-out example is compared up to its last answer.
    """
    if not len(held_out.examples):
        return []
    equal: dict[bytes, list[int]] = {}
    for index, digest in enumerate(_questions(held_out.examples) if train.questions else held_out.examples.digests()):
        equal.setdefault(digest, []).append(index)
    pairs = []
    for index, digest in enumerate(train.examples.whole.digests()):
        pairs += [(held, index) for held in equal.pop(digest, ())]
    return sorted(pairs)


def _questions(examples: Examples) -> Iterator[bytes]:
    """Yield a digest of the tokens of each example before its last run of label tokens."""
    for index in range(len(examples)):
        _, loss_mask = examples.tokens(index)
        starts = np.flatnonzero(np.diff(loss_mask, prepend=False) & loss_mask)
        yield examples.prompt_digest(index, int(starts[-1]) if len(starts) else len(loss_mask))


def describe_overlap(pairs: Sequence[tuple[int, int]], train: Dataset, held_out: Dataset) -> str:
    """Return number and share of the held-out examples that are trained on, and the places of the first."""
    held, trained = pairs[0]
    num = len(held_out.examples)
    return (
        f"{len(pairs):,} of {counted(num, 'held-out example')} ({len(pairs) / num:.1%}) "
        f"{'is' if len(pairs) == 1 else 'are'} trained on (first: "
        f"{held_out.examples.where(held)} is {train.examples.whole.where(trained)})"
    )


def check_overlap(train: Dataset, held_out: Dataset, max_overlap: float) -> None:
    """Warn of held-out examples that are trained on. Raises DataError when their share is over `max_overlap`."""
    pairs = find_overlap(train, held_out)
    if not pairs:
        return
    found = describe_overlap(pairs, train, held_out)
    if len(pairs) > max_overlap * len(held_out.examples):
        raise DataError(
            f"{found}, more than data.max_overlap={max_overlap:g} allows: a score on them says nothing; remove them "
            "from one of the two, or raise data.max_overlap"
        )
    log.warning("%s: a score on them says nothing; remove them from one of the two", found)
