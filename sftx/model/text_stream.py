"""Text of an answer while its tokens arrive: whole characters only, and nothing of a stop string."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Final

from tokenizers.decoders import DecodeStream

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_PART_OF_A_CHARACTER: Final = "\ufffd"


class TextStream:
    """Turns token ids into text piece by piece. What has been returned never changes afterwards.

    Text that may be the beginning of a stop string is held back until it is known not to be.
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, stop: Sequence[str] = (), *, skip_special_tokens: bool = True
    ) -> None:
        self._tokenizer = tokenizer
        self._stop = [text for text in stop if text]
        self._skip = skip_special_tokens
        backend: Any = getattr(tokenizer, "backend_tokenizer", None)
        self._backend = backend
        self._stream = DecodeStream(skip_special_tokens=skip_special_tokens) if backend is not None else None
        self._ids: list[int] = []
        self._num_decoded = 0
        """Characters of the ids that were decoded, for a tokenizer in Python."""
        self._held = ""
        self.text = ""
        """All text that was returned."""
        self.is_stopped = False
        """Whether a stop string was met; what follows it is no part of the text."""

    def add(self, token_id: int) -> str:
        """Return the text that is certain after one more token; often none."""
        return self._release(self._decode(token_id))

    def finish(self) -> str:
        """Return the text that was held back, at the end of the answer."""
        if self.is_stopped:
            return ""
        if self._stream is not None:  # bytes that never became a character
            decoded = str(self._tokenizer.decode(self._ids, skip_special_tokens=self._skip))
            rest = decoded[len(self.text) + len(self._held) :]
        else:
            rest = self._decode(None)
        released, self._held = self._held + rest, ""
        self.text += released
        return released

    def _decode(self, token_id: int | None) -> str:
        if token_id is not None:
            self._ids.append(token_id)
            if self._stream is not None:
                return self._stream.step(self._backend, token_id) or ""
        decoded = str(self._tokenizer.decode(self._ids, skip_special_tokens=self._skip))
        if token_id is not None and decoded.endswith(_PART_OF_A_CHARACTER):
            return ""
        new, self._num_decoded = decoded[self._num_decoded :], len(decoded)
        return new

    def _release(self, new: str) -> str:
        if self.is_stopped:
            return ""
        pending = self._held + new
        found = [place for stop in self._stop if (place := pending.find(stop)) >= 0]
        if found:
            self.is_stopped = True
            released, self._held = pending[: min(found)], ""
        else:
            num_held = max((_overlap(pending, stop) for stop in self._stop), default=0)
            released, self._held = pending[: len(pending) - num_held], pending[len(pending) - num_held :]
        self.text += released
        return released


def _overlap(text: str, stop: str) -> int:
    """Return how many characters at the end of the text begin the stop string."""
    return next((n for n in range(min(len(text), len(stop) - 1), 0, -1) if stop.startswith(text[-n:])), 0)
