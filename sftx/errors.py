"""The errors that a user can cause. Each message is one line: the place, what was found there, and what to do."""

from __future__ import annotations

import difflib
import sys
from collections.abc import Iterable
from typing import Final


class SftxError(Exception):
    """The base class of all errors of sftx. The command line prints the message and exits with `exit_code`."""

    exit_code = 1
    rank: int | None = None
    """The rank that raised it, if the process group was initialised."""
    is_shared: bool = False
    """True when every rank knows of the error, so that rank 0 prints it for all."""

    def __str__(self) -> str:
        """Return the message, in which no secret is shown."""
        return redacted(super().__str__())


class ConfigError(SftxError):
    """The run file or the command line has a value that is not allowed."""


class PluginError(SftxError):
    """A plugin is missing, broken, made for another version of sftx, or returned what its hook does not allow."""


class DataError(SftxError):
    """A source cannot be read, or one of its rows cannot be trained on."""


class ModelError(SftxError):
    """A model or tokenizer cannot be loaded, or does not compute what sftx expects of it."""


class TrainingError(SftxError):
    """A run cannot continue: the loss is not finite, or memory ran out."""


class OutputError(SftxError):
    """A result cannot be written."""


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """Return `"; did you mean 'lora'?"` for the closest known name, or the empty string when none is close."""
    close = difflib.get_close_matches(word, list(known), n=1)
    return f"; did you mean {close[0]!r}?" if close else ""


def counted(number: int, one: str, several: str = "") -> str:
    """Return a count with its noun, and a verb where the noun has one: `1 row`, `2,000 rows`, `1 row is`.

    `several` is what follows every number but 1, by default `one` with an s.
    """
    return f"1 {one}" if number == 1 else f"{number:,} {several or one + 's'}"


_KINDS: Final[dict[type, str]] = {
    type(None): "null",
    bool: "true or false",
    int: "a number",
    float: "a number",
    str: "text",
    list: "a list",
    dict: "an object",
}


def kind_of(value: object) -> str:
    """Return the kind of a JSON value in words, such as `a list`."""
    return _KINDS.get(type(value), f"a value of the type {type(value).__name__}")


# How torch's CPU allocator and some GPU libraries word the RuntimeError or OSError that they raise without memory.
_OUT_OF_MEMORY: Final = (
    "can't allocate memory",
    "cannot allocate memory",
    "not enough memory",
    "out of memory",
    "bad_alloc",
    "alloc_failed",
)


def is_out_of_memory(error: BaseException | None) -> bool:
    """Return whether the error, or one of its causes, says that a GPU or the host ran out of memory."""
    torch = sys.modules.get("torch")  # errors of torch can only come from a torch that is imported
    kinds = (MemoryError,) if torch is None else (MemoryError, torch.OutOfMemoryError)
    while error is not None:
        if isinstance(error, kinds):
            return True
        if isinstance(error, RuntimeError | OSError) and any(text in str(error).lower() for text in _OUT_OF_MEMORY):
            return True
        error = error.__cause__
    return False


_SECRETS: Final[set[str]] = set()
_LEAST_SECRET: Final = 4
"""Characters of a secret that messages hide: a shorter one is in too many words."""


def hide(secret: str) -> None:
    """Let no message of this process that is logged or printed have this text in it."""
    if len(secret) >= _LEAST_SECRET:
        _SECRETS.add(secret)


def redacted(text: str) -> str:
    """Return the text with `***` in place of each secret."""
    for secret in _SECRETS:
        text = text.replace(secret, "***")
    return text


def one_line(error: BaseException, *, max_chars: int = 300) -> str:
    """Return the message of any exception as one line of at most `max_chars` characters."""
    try:
        text = " ".join(redacted(str(error)).split())
    except Exception:
        text = "its message cannot be read"
    text = text or type(error).__name__
    return text if len(text) <= max_chars else text[: max_chars - 3] + "..."


def printable(text: str) -> str:
    """Replace characters that control a terminal, which file names, rows and messages of libraries may contain.

    Secrets are replaced too.
    """
    return "".join(c if c.isprintable() or c in "\n\t" else "?" for c in redacted(text))
