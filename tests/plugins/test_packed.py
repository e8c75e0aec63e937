"""`packed` loses and repeats no token, fills its rows, is a pure function, and takes time linear in the rows."""

from __future__ import annotations

import random
import time
from collections.abc import Sequence
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sftx import IGNORE_INDEX, ConfigError, Example, Step, Window, pack, pad
from sftx_plugins.collators.packed import Packed, PackedRows
from sftx_plugins.collators.padded import Padded


def rows_of(
    lengths: Sequence[int], length: int = 64, strategy: str = "bfd", **changes: object
) -> list[tuple[int, ...]]:
    return [row for step in plan(lengths, length, strategy, **changes)[0] for row in step]


def plan(
    lengths: Sequence[int], length: int = 64, strategy: str = "bfd", **changes: object
) -> tuple[list[Step], tuple[int, ...]]:
    window = Window(lengths, range(len(lengths)), rows_per_step=4, seed=1)
    return PackedRows(length, strategy, "varlen").plan(replace(window, **changes))  # type: ignore[arg-type]


def example(number: int, length: int, *, weighted: bool = False) -> Example:
    return Example(
        token_ids=[100 * number + at for at in range(length)],
        loss_mask=[at > 1 for at in range(length)],
        row_id=f"row {number}",
        group=number,
        weights=[0.5 + at for at in range(length)] if weighted else None,
    )


SIZES = st.lists(st.integers(1, 90), min_size=1, max_size=150)


@given(
    lengths=SIZES,
    length=st.integers(1, 100),
    strategy=st.sampled_from(["bfd", "wrapped"]),
    rows_per_step=st.integers(1, 5),
    group_size=st.integers(1, 3),
    is_last=st.booleans(),
    seed=st.integers(0, 2**32 - 1),
)
def test_every_token_is_packed_once_or_carried_over(
    lengths: list[int], length: int, strategy: str, rows_per_step: int, group_size: int, is_last: bool, seed: int
) -> None:
    groups = [index // group_size for index in range(len(lengths))]
    steps, carried = plan(
        lengths, length, strategy, groups=groups, rows_per_step=rows_per_step, is_last=is_last, seed=seed
    )
    rows = [row for step in steps for row in step]
    assert sorted([index for row in rows for index in row] + list(carried)) == list(range(len(lengths)))
    for row in rows:
        # Only a single group may be longer than a row.
        assert sum(lengths[index] for index in row) <= length or len({groups[index] for index in row}) == 1
        for group in {groups[index] for index in row}:
            members = [index for index in row if groups[index] == group]
            assert members == [index for index in range(len(lengths)) if groups[index] == group]
    short = [step for step in steps if len(step) < rows_per_step]
    assert len(short) <= (1 if is_last else 0)
    assert not (is_last and carried)


@given(lengths=SIZES, length=st.integers(90, 300))
def test_rows_are_those_of_best_fit_decreasing(lengths: list[int], length: int) -> None:
    """Compare with the textbook algorithm, which searches all open rows."""
    rooms: list[int] = []
    for size in sorted(lengths, reverse=True):
        fitting = [room for room in rooms if room >= size]
        room = min(fitting, default=length)
        if fitting:
            rooms.remove(room)
        rooms.append(room - size)
    packed = [length - sum(lengths[index] for index in row) for row in rows_of(lengths, length)]
    assert sorted(packed) == sorted(rooms)


@pytest.mark.parametrize("spread", [0.5, 1.0])
def test_rows_of_usual_lengths_are_full(spread: float) -> None:
    rng = random.Random(0)
    lengths = [min(2048, max(2, int(rng.lognormvariate(5, spread)))) for _ in range(3000)]
    rows = rows_of(lengths, 2048)
    assert sum(lengths) / (len(rows) * 2048) > 0.99


def test_a_plan_takes_time_linear_in_the_rows() -> None:
    rng = random.Random(0)
    lengths = [min(2048, max(2, int(rng.lognormvariate(5, 1)))) for _ in range(300_000)]

    def seconds(num: int) -> float:
        tries = []
        for _ in range(3):
            start = time.process_time()
            plan(lengths[:num], 2048, rows_per_step=16)
            tries.append(time.process_time() - start)
        return min(tries)

    # n log n is 1.25 times as much a row; n^2 would be 10.
    assert seconds(300_000) < 15 * seconds(30_000)


@pytest.mark.parametrize("strategy", ["bfd", "wrapped"])
def test_the_plan_is_a_pure_function_of_seed_epoch_and_window(strategy: str) -> None:
    rng = random.Random(0)
    lengths = [rng.randint(2, 30) for _ in range(200)]
    first = plan(lengths, strategy=strategy)
    assert first == plan(lengths, strategy=strategy)
    for change in ({"seed": 2}, {"epoch": 1}, {"index": 1}):
        assert first != plan(lengths, strategy=strategy, **change)


def test_each_epoch_packs_anew() -> None:
    lengths = [7] * 200
    assert set(rows_of(lengths)) != set(rows_of(lengths, epoch=1))


def test_the_emptiest_rows_are_carried_over() -> None:
    steps, carried = plan([60, 60, 60, 60, 5], rows_per_step=4, is_last=False)
    assert carried == (4,)
    assert sorted(steps[0]) == [(0,), (1,), (2,), (3,)]


@settings(max_examples=50)
@given(
    pieces=st.lists(st.integers(1, 200), min_size=1, max_size=40), length=st.integers(1, 64), per_step=st.integers(1, 4)
)
def test_a_wrapped_stream_fills_rows_of_exactly_that_length(pieces: list[int], length: int, per_step: int) -> None:
    cut: list[int] = []  # as the core cuts them: wherever their concatenation passes a multiple of the length
    for piece in pieces:
        while piece:
            cut.append(min(piece, length - sum(cut) % length))
            piece -= cut[-1]
    sums = [sum(cut[index] for index in row) for row in rows_of(cut, length, "wrapped")]
    assert sorted(sums, reverse=True) == [length] * (sum(cut) // length) + [sum(cut) % length] * (sum(cut) % length > 0)
    assert all(row == tuple(range(row[0], row[-1] + 1)) for row in rows_of(cut, length, "wrapped"))
    # In windows, what is carried over is the end of the stream: what follows goes on where it stopped.
    steps, carried = plan(cut, length, "wrapped", is_last=False, rows_per_step=per_step)
    assert all(sum(cut[index] for index in row) == length for step in steps for row in step)
    assert carried == tuple(range(len(cut) - len(carried), len(cut)))


def test_wrap_length_is_the_rows_length_where_the_stream_is_wrapped() -> None:
    assert Packed(strategy="wrapped").sftx_collator(512).wrap_length == 512  # type: ignore[attr-defined]
    assert Packed(strategy="wrapped", length=128).sftx_collator(512).wrap_length == 128  # type: ignore[attr-defined]
    assert Packed().sftx_collator(512).wrap_length is None  # type: ignore[attr-defined]


def test_a_row_is_its_documents_one_after_the_other() -> None:
    batch = Packed(attention="mask4d").sftx_collator(64).collate([example(1, 5), example(2, 1), example(3, 3)])
    assert batch.input_ids_BT.tolist() == [[100, 101, 102, 103, 104, 200, 300, 301, 302]]
    ignored = IGNORE_INDEX
    assert batch.labels_BT.tolist() == [[ignored, 102, 103, 104, ignored, ignored, ignored, 302, ignored]]
    assert batch.position_ids_BT.tolist() == [[0, 1, 2, 3, 4, 0, 0, 1, 2]]
    assert batch.cu_seqlens is not None
    assert batch.cu_seqlens.tolist() == [0, 5, 6, 9]
    assert batch.lengths_B is None
    assert (batch.max_seqlen, batch.num_label_tokens, batch.num_input_tokens, batch.attention) == (5, 4, 9, "mask4d")
    assert batch.token_weights_BT is None


def test_labels_and_weights_are_those_of_padded_rows() -> None:
    examples = [example(1, 7, weighted=True), example(2, 4), example(3, 9, weighted=True)]
    padded, packed = pad(examples), pack(examples)
    assert padded.token_weights_BT is not None
    assert packed.token_weights_BT is not None
    real = padded.position_ids_BT < padded.lengths_B[:, None]  # type: ignore[index]
    assert packed.labels_BT[0].tolist() == padded.labels_BT[real].tolist()
    assert packed.token_weights_BT[0].tolist() == padded.token_weights_BT[real].tolist()
    assert packed.num_label_tokens == padded.num_label_tokens == (packed.labels_BT != IGNORE_INDEX).sum()


def test_padding_free_packs_the_rows_of_a_padded_plan() -> None:
    examples = [example(1, 7), example(2, 4)]
    batch = Padded(padding_free=True).sftx_collator().collate(examples)
    assert batch.input_ids_BT.tolist() == pack(examples).input_ids_BT.tolist()
    assert batch.cu_seqlens is not None
    with pytest.raises(ConfigError, match=r"padding_free.*pad_to_multiple_of"):
        Padded(padding_free=True, pad_to_multiple_of=8).sftx_collator()
