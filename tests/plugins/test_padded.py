"""`padded` loses and repeats no example, is a pure function, keeps pairs together, and masks by length."""

from __future__ import annotations

import random
import subprocess
import sys
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sftx import IGNORE_INDEX, Example, Window
from sftx_plugins.collators.padded import Padded


def plan(padded: Padded, lengths: list[int], **changes: int) -> object:
    return padded.plan(replace(Window(lengths, range(len(lengths)), rows_per_step=4, seed=1), **changes))  # type: ignore[arg-type]


@given(
    lengths=st.lists(st.integers(2, 500), min_size=1, max_size=120),
    rows_per_step=st.integers(1, 9),
    grouped=st.booleans(),
    is_last=st.booleans(),
    paired=st.booleans(),
    seed=st.integers(0, 2**32 - 1),
)
def test_every_example_is_planned_once_or_carried_over(
    lengths: list[int], rows_per_step: int, grouped: bool, is_last: bool, paired: bool, seed: int
) -> None:
    groups = [index // 2 for index in range(len(lengths))] if paired else list(range(len(lengths)))
    window = Window(lengths, groups, rows_per_step, seed=seed, is_last=is_last)
    steps, carried = Padded(group_by_length=grouped).plan(window)
    assert sorted([i for step in steps for row in step for i in row] + list(carried)) == list(range(len(lengths)))
    assert all(len({groups[i] for i in row}) == 1 for step in steps for row in step)
    short = [step for step in steps if len(step) < rows_per_step]
    assert len(short) <= (1 if is_last else 0)
    assert not (is_last and carried)


def test_the_plan_is_a_pure_function_of_seed_epoch_and_window() -> None:
    rng = random.Random(0)
    lengths = [rng.randint(2, 90) for _ in range(64)]
    first = plan(Padded(), lengths)
    assert first == plan(Padded(), lengths)
    for change in ({"seed": 2}, {"epoch": 1}, {"index": 1}):
        assert first != plan(Padded(), lengths, **change)


def test_the_plan_is_the_same_in_another_process() -> None:
    code = (
        "from sftx import Window; from sftx_plugins.collators.padded import Padded;"
        "print(Padded().plan(Window(range(2, 60), range(58), rows_per_step=4, seed=3, epoch=1)))"
    )
    runs = {
        subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, check=True, env={"PYTHONHASHSEED": seed}
        ).stdout
        for seed in ("1", "2")
    }
    own = Padded().plan(Window(range(2, 60), range(58), rows_per_step=4, seed=3, epoch=1))
    assert runs == {f"{own}\n"}


def test_rows_of_similar_length_share_a_step() -> None:
    rng = random.Random(0)
    lengths = [rng.randint(2, 900) for _ in range(800)]

    def padding(padded: Padded) -> int:
        steps, _ = padded.plan(Window(lengths, range(800), rows_per_step=8))
        return sum(max(lengths[i] for (i,) in step) * len(step) for step in steps) - sum(lengths)

    assert padding(Padded()) < padding(Padded(group_by_length=False)) / 10


def test_labels_are_shifted_and_padding_is_masked_by_length() -> None:
    first = Example([7, 2, 9, 2], [False, False, True, True], "a", 0)
    second = Example([5, 2], [True, True], "b", 1, weights=[1.0, 0.5])
    batch = Padded(pad_to_multiple_of=3).collate([first, second])
    no = IGNORE_INDEX
    assert batch.input_ids_BT.shape == (2, 6)
    assert batch.labels_BT.tolist() == [[no, 9, 2, no, no, no], [2, no, no, no, no, no]]
    assert batch.lengths_B is not None
    assert batch.lengths_B.tolist() == [4, 2]
    assert batch.position_ids_BT.tolist() == [list(range(6))] * 2
    assert (batch.num_label_tokens, batch.num_input_tokens, batch.max_seqlen) == (3, 6, 4)
    assert batch.token_weights_BT is not None
    assert batch.token_weights_BT[1, 0] == pytest.approx(0.5)
    assert batch.num_label_tokens == sum(e.num_label_tokens for e in (first, second))
    assert batch.row_ids == ("a", "b")
