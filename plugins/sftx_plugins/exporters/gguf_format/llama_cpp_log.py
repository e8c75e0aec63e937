"""Silences what llama.cpp writes to stderr; `verbose=False` of llama-cpp-python lets its warnings through."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def quiet() -> Iterator[None]:
    """Silence llama.cpp inside, and leave its messages to llama-cpp-python again."""
    import llama_cpp
    from llama_cpp._logger import llama_log_callback

    silent = llama_cpp.llama_log_callback(lambda level, text, data: None)
    llama_cpp.llama_log_set(silent, None)
    try:
        yield
    finally:
        llama_cpp.llama_log_set(llama_log_callback, None)
