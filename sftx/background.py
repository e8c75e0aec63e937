"""`in_background` computes something in a thread, on a core that would be idle."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import TypeVar

T = TypeVar("T")


def in_background(compute: Callable[[], T]) -> Callable[[], T]:
    """Begin `compute` in a thread; return a function that waits for its result, and raises what it raised.

    It gains where the interpreter's lock is free: in hashes, reads and tensor products. A process that ends meanwhile
    does not wait for it.
    """
    future: Future[T] = Future()

    def run() -> None:
        try:
            future.set_result(compute())
        except BaseException as error:
            future.set_exception(error)

    threading.Thread(target=run, daemon=True).start()
    return future.result
