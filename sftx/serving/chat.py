"""A chat with a trained model: prompted by its template, answered turn by turn."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

from sftx.checkpoint.load_run import LoadedRun
from sftx.errors import ConfigError
from sftx.model.decoding import Decoder, Request, Sampling
from sftx.model.text_stream import TextStream
from sftx.types import Conversation, Message


class Chat:
    """Messages so far, and the engine that keeps their keys and values between turns.

    With `adapters=False` the base model answers, as it was before training.
    """

    def __init__(
        self,
        loaded: LoadedRun,
        sampling: Sampling,
        *,
        system: str = "",
        stop: Sequence[str] = (),
        adapters: bool = True,
    ) -> None:
        """Raises ConfigError for a model without a template, which cannot be asked anything."""
        self._loaded = loaded
        self._sampling = sampling
        self._stop = tuple(stop)
        self._adapters = adapters
        self._decoder = Decoder(loaded.lm, stop_ids=loaded.stop_ids, max_rows=1)
        self.system = system
        self.turns: list[Message] = []
        """User and assistant in turn."""
        self.last: Request | None = None
        if loaded.template is None:
            raise ConfigError(f"{loaded.directory}: {loaded.no_template}; only plain text can be continued")

    def reset(self) -> None:
        """Forget the turns so far; the system message stays."""
        self.turns = []

    @property
    def messages(self) -> list[Message]:
        return [*([Message("system", self.system)] if self.system else []), *self.turns]

    def answer(self, text: str) -> Iterator[str]:
        """Yield the answer to a user's message piece by piece, and add both to the turns.

        When the caller stops reading, the answer ends there. Raises DataError for what the template cannot render.
        """
        question = Message("user", text)
        prompt = self._loaded.prompt(Conversation((*self.messages, question)))
        # Another answer to the same words in a later turn, and the same ones in a chat that is repeated.
        seed = self._sampling.seed + len(self.turns)
        self.last = request = Request(prompt, replace(self._sampling, seed=seed))
        stream = TextStream(self._loaded.tokenizer, self._stop, skip_special_tokens=False)
        self._decoder.submit(request)
        try:
            num_read = 0
            while not request.finish_reason:
                with self._computing():
                    self._decoder.step()
                for token in request.answer_ids[num_read:]:
                    num_read += 1
                    if piece := stream.add(token):
                        yield piece
                    if stream.is_stopped:
                        self._decoder.cancel(request)
            if piece := stream.finish():
                yield piece
        finally:
            self._decoder.cancel(request)
            self.turns += [question, Message("assistant", stream.text)]

    @contextlib.contextmanager
    def _computing(self) -> Iterator[None]:
        with (
            self._loaded.autocast(),
            contextlib.nullcontext() if self._adapters else self._loaded.lm.without_adapters(),
        ):
            yield

    def as_record(self) -> dict[str, Any]:
        """Return the chat as a row of the format `messages`, which can be trained on."""
        return {"messages": [{"role": message.role, "content": message.content} for message in self.messages]}
