"""Python's collector of reference cycles, held back where many objects are made that have none."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def collector_paused() -> Iterator[None]:
    """Let no garbage be searched for within the block.

    The collector looks at all objects of the process again whenever a quarter as many are new. A process that has
    imported torch and transformers has half a million: while these are imported, and while rows are encoded, a third of
    the time went into looks that found nothing. What has no cycle is freed within the block as ever.
    """
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()
