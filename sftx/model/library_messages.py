"""Passes on what transformers, tokenizers and huggingface_hub say while they load: each message once, in one line."""

from __future__ import annotations

import contextlib
import logging
import re
import warnings
from collections.abc import Iterator
from typing import Final

from transformers.utils import logging as transformers_logging

from sftx.errors import one_line

log = logging.getLogger(__name__)

_LIBRARIES: Final = ("transformers", "tokenizers", "huggingface_hub")

_NOISE: Final = (
    r"is (now )?deprecated",  # for those who write the code, not for those who run it
    r"LOAD REPORT",  # a table of many lines; `load_model` says in one what is missing or left over
    r"generation flags are not valid",  # `generation` says which are left out
    r"(embeddings|lm_head weights) will be initialized from a multivariate",  # `grow_embeddings` says it
    r"Ignoring clean_up_tokenization_spaces",  # answers are decoded without it
    r"`trust_remote_code` is to be used with Auto classes",  # it has no effect there
    r"unauthenticated requests|hf_xet",  # the speed of a download
)
"""Messages of which nothing follows for a user."""

_MAX_CHARS: Final = 500
_passed_on: set[tuple[str, str]] = set()


class _Collector(logging.Handler):
    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.messages: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.messages.append(record.getMessage())


@contextlib.contextmanager
def passed_on(source: str) -> Iterator[None]:
    """Log the libraries' warnings of the body as sftx's own, when it ends, each once in a process.

    `source` begins each line. FutureWarnings and DeprecationWarnings are meant for authors of code, and left out.
    """
    collector = _Collector()
    loggers = [logging.getLogger(name) for name in _LIBRARIES]
    before = [(logger.handlers, logger.propagate) for logger in loggers]
    transformers_logging.disable_progress_bar()
    for logger in loggers:
        logger.handlers, logger.propagate = [collector], False
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("ignore")
            for category in (UserWarning, RuntimeWarning):
                warnings.simplefilter("always", category)
            yield
    finally:
        for logger, (handlers, propagate) in zip(loggers, before, strict=True):
            logger.handlers, logger.propagate = handlers, propagate
        transformers_logging.enable_progress_bar()
        for text in [*collector.messages, *(str(warning.message) for warning in caught)]:
            line = one_line(Exception(text), max_chars=_MAX_CHARS)
            if (source, line) not in _passed_on and not any(re.search(noise, line) for noise in _NOISE):
                _passed_on.add((source, line))
                log.warning("%s: %s", source, line)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Silence transformers, whose messages of the body say nothing that sftx does not say itself."""
    verbosity = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity(logging.CRITICAL)
    try:
        yield
    finally:
        transformers_logging.set_verbosity(verbosity)
