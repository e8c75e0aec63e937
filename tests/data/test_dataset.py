"""Columns give back the very examples that were written, from memory and from mapped files, whole and wrapped."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sftx.data.dataset import Examples, Writer
from sftx.data.row_encoder import EncodedRow
from sftx.types import Example, Location

ROWS = st.lists(
    st.lists(st.tuples(st.integers(0, 99), st.booleans(), st.sampled_from([1.0, 1.0, 0.5])), min_size=1, max_size=12),
    min_size=1,
    max_size=12,
)


def rows_of(tokens: list[list[tuple[int, bool, float]]]) -> list[EncodedRow]:
    rows = []
    for number, row in enumerate(tokens, 1):
        ids, mask, weights = (list(column) for column in zip(*row, strict=True))
        weighted = any(weight != 1 for weight in weights)
        extras = {"number": number} if number % 3 == 0 else {}
        where = Location("a.jsonl" if number % 2 else "b.parquet", number, "line" if number % 2 else "row")
        example = Example(np.array(ids), np.array(mask), str(where), 0, np.array(weights) if weighted else None, extras)
        rows.append(EncodedRow(where, examples=[example]))
    return rows


def content(example: Example) -> tuple[list[int], list[bool], list[float]]:
    """Return ids, mask and weights of every token."""
    weights = [1.0] * len(example.token_ids) if example.weights is None else example.weights.tolist()
    return example.token_ids.tolist(), example.loss_mask.tolist(), weights


def written(rows: list[EncodedRow], directory: Path | None) -> Examples:
    writer = Writer(directory)
    for row in rows:
        writer.add(row, 0)
    return writer.finish()


@given(ROWS)
def test_what_is_written_is_read(tmp_path_factory: pytest.TempPathFactory, tokens: Any) -> None:
    rows = rows_of(tokens)
    expected = [example for number, row in enumerate(rows) for example in row.examples_from_group(number)]
    directory = tmp_path_factory.mktemp("columns")
    for found in (written(rows, None), written(rows, directory), Examples.load(directory)):
        assert list(found) == expected
        assert found[-1] == expected[-1]
        assert found[1:3] == expected[1:3]
        assert found.lengths.tolist() == [len(e.token_ids) for e in expected]
        assert found.num_label_tokens.tolist() == [e.num_label_tokens for e in expected]
        assert found.largest_id == max(max(e.token_ids) for e in expected)
        assert found.num_input_tokens == sum(len(e.token_ids) for e in expected)


@given(ROWS, st.integers(1, 20))
def test_wrapped_keeps_every_token_that_is_trained_and_fills_rows(tokens: Any, length: int) -> None:
    whole = written(rows_of(tokens), None)
    pieces = whole.wrapped(length)
    flat = [
        (example.row_id, token, trained, weight)
        for example in whole
        for token, trained, weight in zip(*content(example), strict=True)
    ]
    expected = []  # the pieces, cut from a list, but for those that would train nothing
    at = 0
    for example in whole:
        end = at + len(example.token_ids)
        for start, stop in itertools.pairwise(sorted({at, end, *range(-(-at // length) * length, end, length)})):
            if any(trained for _, _, trained, _ in flat[start + 1 : stop]):
                expected.append(flat[start:stop])
        at = end
    assert [piece.token_ids.tolist() for piece in pieces] == [[token for _, token, _, _ in part] for part in expected]
    assert [piece.loss_mask.tolist() for piece in pieces] == [
        [trained for _, _, trained, _ in part] for part in expected
    ]
    weights = [[weight for _, _, _, weight in part] for part in expected]
    assert [content(piece)[2] for piece in pieces] == weights
    assert [piece.row_id.partition("#")[0] for piece in pieces] == [part[0][0] for part in expected]
    assert pieces.num_label_tokens.tolist() == [example.num_label_tokens for example in pieces]
    assert min(pieces.num_label_tokens.tolist(), default=1) > 0
    assert len({e.row_id for e in pieces}) == len(pieces)
    assert len(set(pieces.groups.tolist())) == len(pieces)


def test_wrapped_rows_of_plain_text_are_full() -> None:
    rows = rows_of([[(7, True, 1.0)] * size for size in (5, 9, 16, 2, 11)])
    ends = np.cumsum(written(rows, None).wrapped(8).lengths)
    assert set(ends.tolist()) >= {8, 16, 24, 32, 40}


def test_an_empty_set() -> None:
    assert list(Writer().finish()) == []
    assert len(Writer().finish().lengths) == 0


def test_an_index_that_is_not_there_is_an_index_error() -> None:
    examples = written(rows_of([[(1, True, 1.0)]]), None)
    with pytest.raises(IndexError):
        examples[1]
    assert isinstance(examples[-1], Example)
