"""How held-out rows are batched for their loss: each row once, groups together, and little of it padding."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from sftx.data.dataset import Examples
from sftx.trainer.evaluate import batches_by_length


def examples_of(lengths: NDArray[np.int64], groups: NDArray[np.int64]) -> Examples:
    columns: dict[str, NDArray[Any]] = {"lengths": lengths, "groups": groups}
    return Examples(columns, [], {}, 0)


@pytest.mark.parametrize("batch_size", [1, 3, 8, 100])
@pytest.mark.parametrize("kind", ["sentences", "documents", "pairs", "equal", "one", "none"])
def test_every_row_is_in_one_batch_with_few_others_that_are_longer(kind: str, batch_size: int) -> None:
    rng = np.random.default_rng(0)
    lengths = {
        "sentences": rng.integers(38, 79, 200),
        "documents": rng.lognormal(5, 0.8, 1000).astype(np.int64) + 2,
        "pairs": rng.integers(38, 79, 200),
        "equal": np.full(300, 7),
        "one": np.array([5]),
        "none": np.array([], np.int64),
    }[kind]
    groups = np.arange(len(lengths)) // (2 if kind == "pairs" else 1)
    batches = [batch for batch in batches_by_length(examples_of(lengths, groups), batch_size) if len(batch)]
    assert sorted(index for batch in batches for index in batch.tolist()) == list(range(len(lengths)))
    units = [set(groups[batch].tolist()) for batch in batches]
    assert sum(map(len, units)) == len(set(groups.tolist()))  # no group is in two batches
    assert all(len(unit) <= batch_size for unit in units)
    if kind == "equal":
        assert len(batches) == -(-300 // batch_size)
    if kind in ("sentences", "documents") and batch_size == 100:
        assert sum(len(batch) * lengths[batch].max() for batch in batches) < 1.08 * lengths.sum()
        assert min(len(batch) for batch in batches[:-1]) >= 8
