"""Sources with weights become the examples of one epoch, drawn anew for each: pure in the seed and the epoch."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Final, Literal

import numpy as np
from numpy.typing import NDArray

from sftx.errors import DataError

Strategy = Literal["concat", "interleave_under", "interleave_over"]
_ONCE: Final = 1.0
_MOST_DRAWN: Final = 10**9


def sample(
    groups: NDArray[np.int64],
    sources: NDArray[np.int32],
    weights: Sequence[float],
    strategy: Strategy,
    *,
    seed: int,
    epoch: int,
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Indices of the examples of this epoch, and their groups: distinct for each time that a group is drawn.

    `groups` [n] rising, `sources` [n], `weights` by source. `concat`: each group of a source as often as its weight
    says, a fraction of the weight being that share of the groups. `interleave_*`: sources in shares that are as their
    weights, until the first of them is used up (`under`) or every one is (`over`); as LLaMA-Factory's strategies.
    Raises DataError when that leaves nothing.
    """
    if strategy == "concat" and all(weight == _ONCE for weight in weights):
        return np.arange(len(groups)), groups
    starts = np.flatnonzero(np.diff(groups, prepend=-1))  # the first example of each group
    sizes = np.diff(np.append(starts, len(groups)))
    chosen = [
        _draw(np.flatnonzero(sources[starts] == source), num, f"mixture {seed} {epoch} {source}")
        for source, num in enumerate(_numbers(sources[starts], weights, strategy))
    ]
    drawn = np.concatenate(chosen)
    if not len(drawn):
        raise DataError("data.train: the weights leave no row for an epoch; raise one of them")
    num = sizes[drawn]
    before = np.cumsum(num) - num
    return np.repeat(starts[drawn] - before, num) + np.arange(num.sum()), np.repeat(np.arange(len(drawn)), num)


def _numbers(sources: NDArray[np.int32], weights: Sequence[float], strategy: Strategy) -> list[int]:
    """How many groups each source gives."""
    available = [int((sources == source).sum()) for source in range(len(weights))]
    if strategy == "concat":
        return [round(num * weight) for num, weight in zip(available, weights, strict=True)]
    epochs = [num / weight for num, weight in zip(available, weights, strict=True) if num]
    unit = min(epochs, default=0) if strategy == "interleave_under" else max(epochs, default=0)
    numbers = [round(unit * weight) if num else 0 for num, weight in zip(available, weights, strict=True)]
    if sum(numbers) > _MOST_DRAWN:
        raise DataError(
            f"data.train: the weights ask for {sum(numbers):,} rows in an epoch; bring them nearer together"
        )
    return numbers


def _draw(available: NDArray[np.int64], num: int, seed: str) -> NDArray[np.int64]:
    """`num` of them: every one equally often, and the rest at random without repetition."""
    times, rest = divmod(num, len(available)) if len(available) else (0, 0)
    # Seeds of text are hashed: streams of neighbouring epochs have nothing in common.
    generator = np.random.default_rng(np.frombuffer(hashlib.sha256(seed.encode()).digest(), np.uint32))
    return np.concatenate([np.tile(available, times), generator.permutation(available)[:rest]])
