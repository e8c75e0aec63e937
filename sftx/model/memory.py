"""Whether an error says that memory ran out."""

from __future__ import annotations

from typing import Final

import torch

# torch's allocator for the CPU and some libraries of a GPU raise a RuntimeError that only its words tell from others.
_WORDS: Final = (
    "can't allocate memory",
    "cannot allocate memory",
    "not enough memory",
    "out of memory",
    "bad_alloc",
    "alloc_failed",
)


def is_out_of_memory(error: BaseException | None) -> bool:
    """Of a GPU or of the host; also where a library has wrapped the error in one of its own."""
    while error is not None:
        if isinstance(error, torch.OutOfMemoryError | MemoryError):
            return True
        if isinstance(error, RuntimeError | OSError) and any(word in str(error).lower() for word in _WORDS):
            return True
        error = error.__cause__
    return False
