"""`row_chunks` splits the rows of an elementwise operation so that its passes find a chunk in the cache.

In eager torch each elementwise operation is a pass over memory. On a CPU, an operation of several passes that does all
of them for some rows before the next ones reads its inputs from memory once.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

import torch

# 512 kB in fp32: two such buffers are the L2 cache of a current server core. With fewer than 2**15 elements a thread,
# torch runs an operation on one thread.
_CACHED_ELEMENTS: Final = 1 << 17


def chunk_rows(num_rows: int, width: int, device: torch.device) -> int:
    """Return how many rows of `width` elements a chunk has: all of them but on a CPU."""
    if device.type != "cpu":
        return max(1, num_rows)
    return max(1, min(num_rows, _CACHED_ELEMENTS * torch.get_num_threads() // max(1, width)))


def row_chunks(num_rows: int, width: int, device: torch.device) -> Iterator[slice]:
    """Yield the slices of rows that are processed together."""
    step = chunk_rows(num_rows, width, device)
    return (slice(start, min(num_rows, start + step)) for start in range(0, num_rows, step))
