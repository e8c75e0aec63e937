"""The thread that owns the models of a server: requests of all clients are answered in one running batch a model."""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Final, Literal, TypeAlias

from sftx.checkpoint.load_run import LoadedRun
from sftx.errors import is_out_of_memory, one_line
from sftx.model.decoding import Decoder, Request
from sftx.model.text_stream import TextStream

log = logging.getLogger(__name__)

Reason: TypeAlias = Literal["stop", "length", "cancelled", "timeout", "error"]

_IDLE_S: Final = 0.1
"""Seconds after which an idle thread looks whether it is to end."""


@dataclass(eq=False)
class Job:
    """A request of a client: what is asked, and where the answer goes."""

    model: str
    request: Request
    stream: TextStream
    deliver: Callable[[str, int, Reason | None], None]
    """Called in the worker's thread with new text, the number of tokens of the answer so far and, with the last call,
    the reason why it is the last."""
    deadline: float
    """time.monotonic() after which the answer ends."""
    is_cancelled: bool = False
    """Set by the client's side when nobody reads any more."""
    num_read: int = 0
    error: str = ""


@dataclass
class Counters:
    """Counts of what the server has done since its start, for `/metrics`."""

    prompt_tokens: int = 0
    answer_tokens: int = 0
    answers: dict[str, int] = field(default_factory=dict)
    """Answers by the reason of their end."""
    first_token_seconds: float = 0.0
    """Time from the arrival of a request to the first token of its answer, summed over answers."""
    first_tokens: int = 0


class Worker(threading.Thread):
    """Answers jobs until `close`. Each model has a running batch of at most `max_rows` rows."""

    def __init__(self, models: dict[str, LoadedRun], *, max_rows: int, max_waiting: int) -> None:
        super().__init__(name="sftx-worker", daemon=True)
        self.models = models
        self.counters = Counters()
        self._max_rows = max_rows
        self._decoders = {name: self._new_decoder(loaded) for name, loaded in models.items()}
        self._arrived: queue.Queue[tuple[float, Job]] = queue.Queue(max_waiting)
        self._open: dict[Request, tuple[float, Job]] = {}
        self._is_closing = threading.Event()
        self._max_waiting = max_waiting

    def _new_decoder(self, loaded: LoadedRun) -> Decoder:
        return Decoder(loaded.lm, stop_ids=loaded.stop_ids, max_rows=self._max_rows, with_log_probabilities=True)

    @property
    def num_open(self) -> int:
        """Return how many jobs are being answered or wait."""
        return len(self._open) + self._arrived.qsize()

    def submit(self, job: Job) -> bool:
        """Let a job wait for its turn. Return False when too many wait already."""
        if self.num_open >= self._max_waiting + self._max_rows:
            return False
        try:
            self._arrived.put_nowait((time.monotonic(), job))
        except queue.Full:
            return False
        return True

    def close(self) -> None:
        """End the thread when the token that is being computed is done; jobs that are open are cancelled."""
        self._is_closing.set()
        self.join()

    def run(self) -> None:
        while not self._is_closing.is_set():
            self._take()
            for name, decoder in self._decoders.items():
                try:
                    with self.models[name].autocast():
                        moved = decoder.step()
                except Exception as error:
                    self._fail(name, error)
                else:
                    for request in moved:
                        self._read(request)
            self._end_late_ones()
        for arrived, job in [*self._open.values()]:
            self._end(arrived, job, "cancelled")

    def _take(self) -> None:
        """Hand jobs that arrived to their engines; wait for one when nothing is to do."""
        wait = _IDLE_S if not self._open else 0
        while True:
            try:
                arrived, job = self._arrived.get(block=wait > 0, timeout=wait or None)
            except queue.Empty:
                return
            wait = 0
            self._open[job.request] = arrived, job
            self.counters.prompt_tokens += len(job.request.prompt_ids)
            self._decoders[job.model].submit(job.request)

    def _read(self, request: Request) -> None:
        """Deliver what is new of an answer."""
        if request not in self._open:
            return
        arrived, job = self._open[request]
        if job.num_read == 0:
            self.counters.first_tokens += 1
            self.counters.first_token_seconds += time.monotonic() - arrived
        new = request.answer_ids[job.num_read :]
        job.num_read += len(new)
        self.counters.answer_tokens += len(new)
        text = "".join(map(job.stream.add, new))
        if job.stream.is_stopped:
            self._decoders[job.model].cancel(request)
            self._end(arrived, job, "stop", text)
        elif request.finish_reason in ("stop", "length"):
            reason: Reason = "length" if request.finish_reason == "length" else "stop"
            self._end(arrived, job, reason, text + job.stream.finish())
        elif text:
            job.deliver(text, job.num_read, None)

    def _end_late_ones(self) -> None:
        now = time.monotonic()
        for arrived, job in [*self._open.values()]:
            if job.is_cancelled or now > job.deadline:
                self._decoders[job.model].cancel(job.request)
                self._end(arrived, job, "cancelled" if job.is_cancelled else "timeout")

    def _end(self, arrived: float, job: Job, reason: Reason, text: str = "") -> None:
        self._open.pop(job.request, None)
        self.counters.answers[reason] = self.counters.answers.get(reason, 0) + 1
        job.deliver(text, job.num_read, reason)

    def _fail(self, name: str, error: Exception) -> None:
        """End every answer of a model whose step failed, and begin with an empty batch."""
        log.error("%s: %s: %s", name, type(error).__name__, one_line(error), exc_info=not is_out_of_memory(error))
        self._decoders[name] = self._new_decoder(self.models[name])
        for arrived, job in [*self._open.values()]:
            if job.model == name:
                job.error = "not enough memory" if is_out_of_memory(error) else type(error).__name__
                self._end(arrived, job, "error")
