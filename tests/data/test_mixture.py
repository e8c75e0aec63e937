"""Weighted sources: the weights decide how many examples an epoch has, each epoch draws anew, groups stay together."""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sftx.data.mixture import sample
from sftx.errors import DataError


def drawn(sizes: list[int], weights: list[float], strategy: Any, epoch: int = 0, seed: int = 1) -> Counter[int]:
    """Count how often each example is drawn. Source s has examples s*1000, s*1000+1, ..., each its own group."""
    sources = np.repeat(np.arange(len(sizes), dtype=np.int32), sizes)
    names = np.concatenate([np.arange(size) + 1000 * s for s, size in enumerate(sizes)])
    indices, groups = sample(np.arange(sum(sizes)), sources, weights, strategy, seed=seed, epoch=epoch)
    assert sorted(groups.tolist()) == list(range(len(indices)))
    return Counter(names[indices].tolist())


def per_source(counts: Counter[int]) -> dict[int, int]:
    found: Counter[int] = Counter()
    for name, number in counts.items():
        found[name // 1000] += number
    return dict(found)


def test_without_weights_an_epoch_has_every_example_once() -> None:
    assert set(drawn([5, 7], [1, 1], "concat").values()) == {1}


def test_concat_repeats_by_weight_and_draws_a_fraction_anew() -> None:
    first, second = (drawn([10, 100], [2.5, 0.3], "concat", epoch) for epoch in (0, 1))
    assert per_source(first) == per_source(second) == {0: 25, 1: 30}
    assert Counter(first[name] for name in range(10)) == {2: 5, 3: 5}
    assert max(first[name] for name in range(1000, 1100)) == 1
    assert first != second
    assert first == drawn([10, 100], [2.5, 0.3], "concat", 0)


@pytest.mark.parametrize(
    ("strategy", "expected"), [("interleave_under", {0: 10, 1: 30}), ("interleave_over", {0: 33, 1: 100})]
)
def test_interleaving_keeps_the_proportions_of_the_weights(strategy: str, expected: dict[int, int]) -> None:
    counts = drawn([10, 100], [1, 3], strategy)
    assert per_source(counts) == expected
    if strategy == "interleave_over":
        assert all(counts[name] == 1 for name in range(1000, 1100))
        assert {counts[name] for name in range(10)} == {3, 4}


def test_over_many_epochs_every_example_is_drawn_equally_often() -> None:
    total: Counter[int] = Counter()
    for epoch in range(200):
        total += drawn([40], [0.5], "concat", epoch)
    # Binomial with n=200 and p=0.5: six standard deviations are 42.
    assert all(58 <= total[name] <= 142 for name in range(40))


def test_groups_stay_together_and_each_repetition_is_a_group_of_its_own() -> None:
    groups = np.array([0, 0, 1, 1, 2, 2])
    indices, drawn_groups = sample(groups, np.zeros(6, np.int32), [2.0], "concat", seed=1, epoch=0)
    members: dict[int, list[int]] = {}
    for index, group in zip(indices.tolist(), drawn_groups.tolist(), strict=True):
        members.setdefault(group, []).append(index)
    assert sorted(map(tuple, members.values())) == [(0, 1), (0, 1), (2, 3), (2, 3), (4, 5), (4, 5)]


@given(
    st.lists(st.tuples(st.integers(0, 30), st.floats(0.1, 5)), min_size=1, max_size=4),
    st.sampled_from(["concat", "interleave_under", "interleave_over"]),
)
def test_any_weights_give_an_epoch(sources: list[tuple[int, float]], strategy: Any) -> None:
    sizes, weights = [size for size, _ in sources], [weight for _, weight in sources]
    if not sum(sizes):
        return
    if strategy == "concat" and not any(round(size * weight) for size, weight in sources):
        with pytest.raises(DataError, match="the weights leave no row"):
            drawn(sizes, weights, strategy)
        return
    counts = drawn(sizes, weights, strategy)
    for source, (size, weight) in enumerate(sources):
        number = per_source(counts).get(source, 0)
        if strategy == "concat":
            assert number == round(size * weight)
        elif strategy == "interleave_over":
            assert number >= size
        else:
            assert number <= size
