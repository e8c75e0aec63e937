"""Sample the examples of one epoch from weighted sources, as a pure function of the seed and the epoch."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Final, Literal

import numpy as np
from numpy.typing import NDArray

from sftx.errors import DataError

Strategy = Literal["concat", "interleave_under", "interleave_over"]
_MOST_GROUPS: Final = 10**9


def sample(
    groups: NDArray[np.int64],
    sources: NDArray[np.int32],
    weights: Sequence[float],
    strategy: Strategy,
    *,
    seed: int,
    epoch: int,
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return the indices of the epoch's examples and their groups, which are distinct for each time a group is drawn.

    `groups` [n] ascending and `sources` [n] belong to the examples, `weights` to the sources. `concat`: the number of
    groups of a source is multiplied with its weight. `interleave_*`: the numbers of groups are in proportion to the
    weights; the epoch ends when the first source is exhausted (`under`) or when every source is (`over`), as in
    LLaMA-Factory. Raises DataError when no group is drawn.
    """
    if strategy == "concat" and all(weight == 1 for weight in weights):
        return np.arange(len(groups)), groups
    starts = np.flatnonzero(np.diff(groups, prepend=-1))  # index of the first example of each group
    sizes = np.diff(np.append(starts, len(groups)))
    drawn = np.concatenate(
        [
            _draw(np.flatnonzero(sources[starts] == source), num, f"mixture {seed} {epoch} {source}")
            for source, num in enumerate(_num_groups(sources[starts], weights, strategy))
        ]
    )
    if not len(drawn):
        raise DataError("data.train: the weights leave no row for an epoch; raise one of them")
    num = sizes[drawn]
    before = np.cumsum(num) - num
    return np.repeat(starts[drawn] - before, num) + np.arange(num.sum()), np.repeat(np.arange(len(drawn)), num)


def _num_groups(sources: NDArray[np.int32], weights: Sequence[float], strategy: Strategy) -> list[int]:
    """Return how many groups are drawn from each source; `sources` [groups]."""
    available = [int((sources == source).sum()) for source in range(len(weights))]
    if strategy == "concat":
        return [round(num * weight) for num, weight in zip(available, weights, strict=True)]
    ratios = [num / weight for num, weight in zip(available, weights, strict=True) if num]
    ratio = min(ratios, default=0) if strategy == "interleave_under" else max(ratios, default=0)
    numbers = [round(ratio * weight) if num else 0 for num, weight in zip(available, weights, strict=True)]
    if sum(numbers) > _MOST_GROUPS:
        raise DataError(
            f"data.train: the weights ask for {sum(numbers):,} rows in an epoch; bring them nearer together"
        )
    return numbers


def _draw(available: NDArray[np.int64], num: int, seed: str) -> NDArray[np.int64]:
    """Draw `num` of the groups: each one equally often, and the remainder at random without repetition."""
    times, remainder = divmod(num, len(available)) if len(available) else (0, 0)
    # The seed is hashed, so that the random streams of neighbouring epochs are independent.
    generator = np.random.default_rng(np.frombuffer(hashlib.sha256(seed.encode()).digest(), np.uint32))
    return np.concatenate([np.tile(available, times), generator.permutation(available)[:remainder]])
