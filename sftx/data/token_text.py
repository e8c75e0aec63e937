"""The text of single tokens, for people to read: the only place where tokens are decoded one by one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_MAX_TOKENS_PER_CHARACTER: Final = 8
"""A character may be split over at most so many tokens: bytes of UTF-8, with room for an emoji's joiners."""


def token_texts(token_ids: Sequence[int], tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """Return the text of each token; joined, these are the decoded text.

    When several tokens hold the bytes of one character, the first has the character and the others have an empty text.
    Each token is decoded together with the one before it, since some tokenizers omit the space that a text begins with.
    """

    def decode(begin: int, end: int) -> str:
        ids = list(token_ids[begin:end])
        return str(tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False))

    texts: list[str] = []
    previous = begin = 0  # where the last whole character and the current one begin
    for end in range(1, len(token_ids) + 1):
        prefix, text = decode(previous, begin), decode(previous, end)
        is_whole = not text.endswith("\N{REPLACEMENT CHARACTER}")
        if is_whole or end - begin == _MAX_TOKENS_PER_CHARACTER or end == len(token_ids):
            texts += [text[len(prefix) :], *[""] * (end - begin - 1)]
            previous, begin = begin, end
    return texts
