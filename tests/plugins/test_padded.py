"""`padded` loses and repeats nothing, is pure, keeps pairs together, and masks by length."""

from __future__ import annotations

import random
import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sftx import IGNORE_INDEX, Example
from sftx_plugins.collators.padded import Padded


def plan(padded: Padded, lengths: list[int], groups: list[int] | None = None, **changes: object) -> object:
    arguments = {"seed": 1, "epoch": 0, "window": 0, "examples_per_step": 4, "final": True} | changes
    return padded.plan(lengths, groups or list(range(len(lengths))), **arguments)  # type: ignore[arg-type]


@given(
    lengths=st.lists(st.integers(2, 500), min_size=1, max_size=120),
    examples_per_step=st.integers(1, 9),
    grouped=st.booleans(),
    final=st.booleans(),
    paired=st.booleans(),
    seed=st.integers(0, 2**32 - 1),
)
def test_every_example_is_planned_once_or_carried_over(
    lengths: list[int], examples_per_step: int, grouped: bool, final: bool, paired: bool, seed: int
) -> None:
    groups = [index // 2 for index in range(len(lengths))] if paired else list(range(len(lengths)))
    steps, carried = Padded(group_by_length=grouped).plan(
        lengths, groups, seed=seed, epoch=0, window=0, examples_per_step=examples_per_step, final=final
    )
    assert sorted([i for step in steps for row in step for i in row] + list(carried)) == list(range(len(lengths)))
    assert all(len({groups[i] for i in row}) == 1 for step in steps for row in step)
    short = [step for step in steps if len(step) < examples_per_step]
    assert len(short) <= (1 if final else 0)
    assert not (final and carried)


def test_the_plan_is_pure_in_seed_epoch_and_window() -> None:
    rng = random.Random(0)
    lengths = [rng.randint(2, 90) for _ in range(64)]
    first = plan(Padded(), lengths)
    assert first == plan(Padded(), lengths)
    for change in ({"seed": 2}, {"epoch": 1}, {"window": 1}):
        assert first != plan(Padded(), lengths, **change)


def test_the_plan_is_the_same_in_another_process() -> None:
    code = (
        "from sftx_plugins.collators.padded import Padded;"
        "print(Padded().plan(list(range(2, 60)), list(range(58)), seed=3, epoch=1, window=0,"
        " examples_per_step=4, final=True))"
    )
    runs = {
        subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, check=True, env={"PYTHONHASHSEED": seed}
        ).stdout
        for seed in ("1", "2")
    }
    own = Padded().plan(list(range(2, 60)), list(range(58)), seed=3, epoch=1, window=0, examples_per_step=4, final=True)
    assert runs == {f"{own}\n"}


def test_rows_of_similar_length_share_a_step() -> None:
    rng = random.Random(0)
    lengths = [rng.randint(2, 900) for _ in range(800)]

    def padding(padded: Padded) -> int:
        steps, _ = padded.plan(lengths, list(range(800)), seed=0, epoch=0, window=0, examples_per_step=8, final=True)
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
