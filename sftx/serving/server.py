"""The HTTP interface of OpenAI over a `Worker`: chat completions, completions, models, health, metrics.

https://platform.openai.com/docs/api-reference. Requests are read by pydantic; a field that is not known is ignored, as
clients send many, and one that would change the answer and is not supported is refused.
"""

from __future__ import annotations

import asyncio
import contextlib
import hmac
import json
import time
import uuid
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Final, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.requests import Request as HTTPRequest
from starlette.responses import JSONResponse, PlainTextResponse, Response, StreamingResponse
from starlette.routing import Route

from sftx.assembly.entry_points import discover, find
from sftx.assembly.registry import Assembly
from sftx.assembly.stages.data_stages import ParserStage
from sftx.checkpoint.load_run import LoadedRun
from sftx.config.run_file import Origins
from sftx.errors import ConfigError, DataError, one_line
from sftx.model.decoding import Request, Sampling
from sftx.model.text_stream import TextStream
from sftx.serving.settings import sampling_of
from sftx.serving.worker import Job, Reason, Worker
from sftx.types import Conversation, Location

_ERROR_TYPES: Final = {
    400: "invalid_request_error", 401: "authentication_error", 404: "not_found_error", 405: "invalid_request_error",
    408: "timeout_error", 413: "invalid_request_error", 503: "overloaded_error",
}  # fmt: skip


@dataclass(frozen=True)
class Limits:
    """The most that one client may ask for, so that it cannot take the server from the others."""

    body_bytes: int = 4 * 2**20
    max_new_tokens: int = 4096
    """Of one answer; also where a request asks for more."""
    seconds: float = 600.0
    """For one answer, waiting included."""
    answers: int = 16
    """Of one request (`n`, or prompts)."""


class HTTPError(Exception):
    """A request that is answered with an error."""

    def __init__(self, status: int, message: str, param: str | None = None) -> None:
        super().__init__(message)
        self.status, self.message, self.param = status, message, param


class _StreamOptions(BaseModel):
    include_usage: bool = False


class _Body(BaseModel):
    """The fields that both kinds of completions have."""

    model_config = ConfigDict(extra="ignore", strict=True)

    model: str
    stream: bool = False
    stream_options: _StreamOptions | None = None
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=0)] | None = None
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    repetition_penalty: Annotated[float, Field(gt=0)] | None = None
    seed: int | None = None
    stop: str | Annotated[list[str], Field(max_length=16)] | None = None
    n: Annotated[int, Field(ge=1)] | None = None
    presence_penalty: Literal[0] | None = None
    frequency_penalty: Literal[0] | None = None
    logit_bias: Annotated[dict[str, float], Field(max_length=0)] | None = None


class ChatBody(_Body):
    messages: Annotated[list[dict[str, Any]], Field(min_length=1)]
    tools: list[dict[str, Any]] | None = None
    tool_choice: Literal["auto", "none"] | None = None
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    logprobs: bool | None = None
    top_logprobs: Literal[0] | None = None


class CompletionBody(_Body):
    prompt: str | list[str] | list[int] | list[list[int]]
    logprobs: Literal[0] | None = None
    echo: Literal[False] | None = None
    suffix: None = None


@dataclass(eq=False)
class _Answer:
    """One answer in progress, seen from the event loop."""

    job: Job
    events: asyncio.Queue[tuple[str, Reason | None]]
    text: str = ""
    reason: Reason | None = None

    async def pieces(self) -> AsyncIterator[str]:
        """Yield text as it comes. Raises HTTPError when the answer failed or took too long."""
        while self.reason is None:
            piece, self.reason = await self.events.get()
            self.text += piece
            if piece:
                yield piece
        if self.reason == "error":
            raise HTTPError(500, f"the answer failed: {self.job.error}")
        if self.reason in ("timeout", "cancelled"):
            raise HTTPError(408 if self.reason == "timeout" else 503, f"the answer was ended ({self.reason})")


class Server:
    """The application over a worker that runs."""

    def __init__(self, worker: Worker, *, limits: Limits, api_key: str | None = None) -> None:
        self._worker = worker
        self._limits = limits
        self._api_key = api_key
        self._started = int(time.time())
        self._statuses: dict[int, int] = {}
        assembly = Assembly(Origins())
        assembly.add(find("messages", discover()), {})
        self._parser: ParserStage = assembly.parsers()["messages"]
        self.app = Starlette(
            routes=[
                Route("/v1/chat/completions", self._guarded(self._chat), methods=["POST"]),
                Route("/v1/completions", self._guarded(self._complete), methods=["POST"]),
                Route("/v1/models", self._guarded(self._models), methods=["GET"]),
                Route("/health", self._health, methods=["GET"]),
                Route("/metrics", self._metrics, methods=["GET"]),
            ],
            exception_handlers={HTTPException: _no_such_page},
        )

    # --- requests -------------------------------------------------------------------------------

    def _guarded(self, handle: Callable[[HTTPRequest], Any]) -> Callable[[HTTPRequest], Any]:
        """Return a handler that checks the key, and answers errors as OpenAI's servers do."""

        async def guarded(request: HTTPRequest) -> Response:
            try:
                self._check_key(request)
                response: Response = await handle(request)
            except HTTPError as error:
                response = _error_response(error)
            except ClientDisconnect:
                response = _error_response(HTTPError(499, "the client has closed the connection"))
            self._statuses[response.status_code] = self._statuses.get(response.status_code, 0) + 1
            return response

        return guarded

    def _check_key(self, request: HTTPRequest) -> None:
        if self._api_key is None:
            return
        given = request.headers.get("authorization", "").removeprefix("Bearer ").encode()
        if not hmac.compare_digest(given, self._api_key.encode()):
            raise HTTPError(401, "the API key is missing or wrong; send it as Authorization: Bearer KEY")

    async def _read(self, request: HTTPRequest, kind: type[_Body]) -> Any:
        """Return the body. Raises HTTPError for one that is too large or wrong."""
        body = bytearray()
        async for chunk in request.stream():
            body += chunk
            if len(body) > self._limits.body_bytes:
                raise HTTPError(413, f"the body is larger than {self._limits.body_bytes:,} bytes")
        try:
            return kind.model_validate_json(bytes(body))
        except ValidationError as error:
            first = error.errors(include_url=False, include_input=False)[0]
            param = ".".join(str(part) for part in first["loc"] if not str(part).startswith(("list[", "constrained")))
            raise HTTPError(400, f"{param or 'body'}: {first['msg']}", param or None) from None

    def _loaded(self, name: str) -> LoadedRun:
        if name not in self._worker.models:
            raise HTTPError(404, f"model {name!r} is not served; there are {', '.join(self._worker.models)}", "model")
        return self._worker.models[name]

    async def _chat(self, request: HTTPRequest) -> Response:
        body: ChatBody = await self._read(request, ChatBody)
        loaded = self._loaded(body.model)
        record = {"messages": body.messages}
        if body.tools and body.tool_choice != "none":
            record["tools"] = body.tools
        try:
            (conversation,) = self._parser.parse(record, Location("messages", 1, "request"))
            assert isinstance(conversation, Conversation)
            prompt = loaded.prompt(conversation)
        except (DataError, ConfigError) as error:
            raise HTTPError(400, one_line(error), "messages") from None
        max_tokens = body.max_completion_tokens or body.max_tokens
        answers = self._submit(body, loaded, [prompt], max_tokens)
        frame = _ChatFrame(body.model, with_log_probabilities=bool(body.logprobs), has_tools="tools" in record)
        return await self._respond(request, body, loaded, answers, frame)

    async def _complete(self, request: HTTPRequest) -> Response:
        body: CompletionBody = await self._read(request, CompletionBody)
        loaded = self._loaded(body.model)
        prompts = _prompts(body.prompt, loaded)
        answers = self._submit(body, loaded, prompts, body.max_tokens or 16)
        return await self._respond(request, body, loaded, answers, _CompletionFrame(body.model))

    def _submit(
        self, body: _Body, loaded: LoadedRun, prompts: Sequence[Sequence[int]], max_tokens: int | None
    ) -> list[_Answer]:
        """Let each answer wait for its turn. Raises HTTPError when there is no room, or a prompt is too long."""
        num = len(prompts) * (body.n or 1)
        if num > self._limits.answers:
            raise HTTPError(400, f"n: {num} answers were asked for, at most {self._limits.answers} are given", "n")
        names = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")
        chosen = {name: getattr(body, name) for name in names}
        try:
            sampling = sampling_of(loaded.generation_config, max_new_tokens=max_tokens, **chosen)
        except ConfigError as error:
            raise HTTPError(400, one_line(error)) from None
        loop = asyncio.get_running_loop()
        stop = [body.stop] if isinstance(body.stop, str) else body.stop or []
        seed = body.seed if body.seed is not None else uuid.uuid4().int % 2**31
        context = int(getattr(loaded.lm.config, "max_position_embeddings", None) or 2**30)
        answers = []
        for number in range(num):
            prompt = list(prompts[number // (body.n or 1)])
            room = context - len(prompt)
            if not prompt or room < 1:
                raise HTTPError(
                    400, f"the prompt has {len(prompt)} tokens, the model takes 1 to {context - 1}", "messages"
                )
            most = min(sampling.max_new_tokens, self._limits.max_new_tokens, room)
            settings = Sampling(**(vars(sampling) | {"max_new_tokens": most, "seed": seed + number}))
            answers.append(_make_answer(body.model, loaded, prompt, settings, stop, self._limits.seconds, loop))
        for answer in answers:
            if not self._worker.submit(answer.job):
                for other in answers:
                    other.job.is_cancelled = True
                raise HTTPError(503, "too many requests wait already; try again later")
        return answers

    async def _respond(
        self, request: HTTPRequest, body: _Body, loaded: LoadedRun, answers: list[_Answer], frame: _Frame
    ) -> Response:
        if body.stream:
            usage = bool(body.stream_options and body.stream_options.include_usage)
            events = _events(answers, frame, loaded, with_usage=usage)
            return StreamingResponse(events, media_type="text/event-stream", headers={"Cache-Control": "no-cache"})
        reading: asyncio.Future[Any] = asyncio.gather(*(_read_all(answer) for answer in answers))
        gone: asyncio.Future[Any] = asyncio.ensure_future(_disconnected(request))
        try:
            await asyncio.wait([reading, gone], return_when=asyncio.FIRST_COMPLETED)
            if not reading.done():
                raise HTTPError(499, "the client has closed the connection")
            await reading
        finally:
            gone.cancel()
            _cancel(answers)
            if not reading.done():
                reading.cancel()
                with contextlib.suppress(asyncio.CancelledError):
                    await reading
        choices = [frame.choice(number, answer, loaded) for number, answer in enumerate(answers)]
        return JSONResponse({**frame.head(), "choices": choices, "usage": _usage(answers)})

    async def _models(self, request: HTTPRequest) -> Response:
        data = [
            {"id": name, "object": "model", "created": self._started, "owned_by": "sftx"}
            for name in self._worker.models
        ]
        return JSONResponse({"object": "list", "data": data})

    async def _health(self, request: HTTPRequest) -> Response:
        alive = self._worker.is_alive()
        return JSONResponse({"status": "ok" if alive else "failed"}, 200 if alive else 503)

    async def _metrics(self, request: HTTPRequest) -> Response:
        """Answer in Prometheus' text format, https://prometheus.io/docs/instrumenting/exposition_formats."""
        done = self._worker.counters
        values: list[tuple[str, str, Mapping[str, float]]] = [
            ("sftx_requests_total", "counter", {f'{{status="{s}"}}': n for s, n in sorted(self._statuses.items())}),
            ("sftx_answers_total", "counter", {f'{{reason="{r}"}}': n for r, n in sorted(done.answers.items())}),
            ("sftx_prompt_tokens_total", "counter", {"": done.prompt_tokens}),
            ("sftx_answer_tokens_total", "counter", {"": done.answer_tokens}),
            ("sftx_open_answers", "gauge", {"": self._worker.num_open}),
            ("sftx_first_token_seconds_sum", "counter", {"": done.first_token_seconds}),
            ("sftx_first_token_seconds_count", "counter", {"": done.first_tokens}),
        ]
        lines = []
        for name, kind, series in values:
            lines.append(f"# TYPE {name} {kind}")
            lines += [f"{name}{labels} {value:g}" for labels, value in series.items()]
        return PlainTextResponse("\n".join(lines) + "\n", media_type="text/plain; version=0.0.4")


# --- answers ------------------------------------------------------------------------------------


def _make_answer(
    model: str,
    loaded: LoadedRun,
    prompt: Sequence[int],
    sampling: Sampling,
    stop: Sequence[str],
    seconds: float,
    loop: asyncio.AbstractEventLoop,
) -> _Answer:
    events: asyncio.Queue[tuple[str, Reason | None]] = asyncio.Queue()

    def deliver(text: str, num_tokens: int, reason: Reason | None) -> None:
        with contextlib.suppress(RuntimeError):  # the loop is closed: the server has stopped
            loop.call_soon_threadsafe(events.put_nowait, (text, reason))

    job = Job(
        model,
        Request(prompt, sampling),
        TextStream(loaded.tokenizer, stop, skip_special_tokens=False),
        deliver,
        time.monotonic() + seconds,
    )
    return _Answer(job, events)


def _prompts(prompt: str | list[str] | list[int] | list[list[int]], loaded: LoadedRun) -> list[list[int]]:
    """Return the token ids of each prompt of a completion: text, token ids, or a list of either."""
    items: list[Any] = [prompt] if isinstance(prompt, str) or (prompt and isinstance(prompt[0], int)) else list(prompt)
    size = len(loaded.tokenizer)
    prompts = []
    for item in items:
        ids = loaded.tokenizer.encode(item) if isinstance(item, str) else list(item)
        if any(not 0 <= token < size for token in ids):
            raise HTTPError(400, f"prompt: token ids are from 0 to {size - 1}", "prompt")
        prompts.append(ids)
    if not prompts:
        raise HTTPError(400, "prompt: is empty", "prompt")
    return prompts


async def _read_all(answer: _Answer) -> None:
    async for _ in answer.pieces():
        pass


async def _disconnected(request: HTTPRequest) -> None:
    while not await request.is_disconnected():
        await asyncio.sleep(0.25)


def _cancel(answers: Sequence[_Answer]) -> None:
    for answer in answers:
        answer.job.is_cancelled = answer.reason is None


def _usage(answers: Sequence[_Answer]) -> dict[str, int]:
    prompt = sum(len(answer.job.request.prompt_ids) for answer in answers)
    completion = sum(answer.job.num_read for answer in answers)
    return {"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion}


async def _events(
    answers: Sequence[_Answer], frame: _Frame, loaded: LoadedRun, *, with_usage: bool
) -> AsyncIterator[bytes]:
    """Yield server-sent events: pieces of all answers as they come, then the end of the stream."""
    merged: asyncio.Queue[tuple[int, str | None, HTTPError | None]] = asyncio.Queue()

    async def forward(number: int, answer: _Answer) -> None:
        try:
            async for piece in answer.pieces():
                merged.put_nowait((number, piece, None))
            merged.put_nowait((number, None, None))
        except HTTPError as error:
            merged.put_nowait((number, None, error))

    tasks = [asyncio.ensure_future(forward(number, answer)) for number, answer in enumerate(answers)]
    try:
        for number in range(len(answers)):
            if first := frame.first_delta(number):
                yield _event({**frame.head(is_chunk=True), "choices": [first]})
        num_open = len(answers)
        while num_open:
            number, piece, error = await merged.get()
            if error is not None:
                yield _event({"error": _error(error)})
                return
            if piece is not None:
                yield _event({**frame.head(is_chunk=True), "choices": [frame.delta(number, piece)]})
                continue
            num_open -= 1
            yield _event({**frame.head(is_chunk=True), "choices": [frame.last_delta(number, answers[number], loaded)]})
        if with_usage:
            yield _event({**frame.head(is_chunk=True), "choices": [], "usage": _usage(answers)})
        yield b"data: [DONE]\n\n"
    finally:  # also when the client has gone
        _cancel(answers)
        for task in tasks:
            task.cancel()


def _event(value: Mapping[str, Any]) -> bytes:
    return f"data: {json.dumps(value, ensure_ascii=False)}\n\n".encode()


def _error(error: HTTPError) -> dict[str, Any]:
    kind = _ERROR_TYPES.get(error.status, "server_error")
    return {"message": error.message, "type": kind, "param": error.param, "code": None}


def _error_response(error: HTTPError) -> Response:
    headers = {"Retry-After": "5"} if error.status == 503 else {}
    return JSONResponse({"error": _error(error)}, error.status, headers=headers)


async def _no_such_page(request: HTTPRequest, error: Exception) -> Response:
    """Answer a path or a method that there is not, in the form of the other errors."""
    assert isinstance(error, HTTPException)
    return _error_response(HTTPError(error.status_code, f"{request.method} {request.url.path}: {error.detail}"))


# --- the shapes of answers ----------------------------------------------------------------------


class _Frame:
    """The JSON around the text of an answer."""

    def __init__(self, model: str, prefix: str, kind: str) -> None:
        self._fields = {"id": f"{prefix}-{uuid.uuid4().hex}", "created": int(time.time()), "model": model}
        self._kind = kind

    def head(self, *, is_chunk: bool = False) -> dict[str, Any]:
        return {**self._fields, "object": self._kind}

    def choice(self, number: int, answer: _Answer, loaded: LoadedRun) -> dict[str, Any]:
        return {"index": number, "text": answer.text, "logprobs": None, "finish_reason": answer.reason}

    def first_delta(self, number: int) -> dict[str, Any] | None:
        return None

    def delta(self, number: int, piece: str) -> dict[str, Any]:
        return {"index": number, "text": piece, "logprobs": None, "finish_reason": None}

    def last_delta(self, number: int, answer: _Answer, loaded: LoadedRun) -> dict[str, Any]:
        return {"index": number, "text": "", "logprobs": None, "finish_reason": answer.reason}


class _CompletionFrame(_Frame):
    def __init__(self, model: str) -> None:
        super().__init__(model, "cmpl", "text_completion")


class _ChatFrame(_Frame):
    def __init__(self, model: str, *, with_log_probabilities: bool, has_tools: bool) -> None:
        super().__init__(model, "chatcmpl", "chat.completion")
        self._with_log_probabilities = with_log_probabilities
        self._has_tools = has_tools

    def head(self, *, is_chunk: bool = False) -> dict[str, Any]:
        return {**self._fields, "object": "chat.completion.chunk" if is_chunk else self._kind}

    def choice(self, number: int, answer: _Answer, loaded: LoadedRun) -> dict[str, Any]:
        content, calls = _tool_calls(answer.text) if self._has_tools else (answer.text, [])
        message: dict[str, Any] = {"role": "assistant", "content": content}
        if calls:
            message["tool_calls"] = calls
        reason = "tool_calls" if calls else answer.reason
        return {
            "index": number,
            "message": message,
            "logprobs": self._logprobs(answer, loaded),
            "finish_reason": reason,
        }

    def first_delta(self, number: int) -> dict[str, Any] | None:
        return {"index": number, "delta": {"role": "assistant", "content": ""}, "finish_reason": None}

    def delta(self, number: int, piece: str) -> dict[str, Any]:
        return {"index": number, "delta": {"content": piece}, "finish_reason": None}

    def last_delta(self, number: int, answer: _Answer, loaded: LoadedRun) -> dict[str, Any]:
        _, calls = _tool_calls(answer.text) if self._has_tools else ("", [])
        delta = {"tool_calls": [{"index": at, **call} for at, call in enumerate(calls)]} if calls else {}
        reason = "tool_calls" if calls else answer.reason
        return {"index": number, "delta": delta, "logprobs": self._logprobs(answer, loaded), "finish_reason": reason}

    def _logprobs(self, answer: _Answer, loaded: LoadedRun) -> dict[str, Any] | None:
        if not self._with_log_probabilities:
            return None
        request = answer.job.request
        content = []
        for token, value in zip(request.answer_ids, request.log_probabilities, strict=False):
            text = str(loaded.tokenizer.decode([token]))
            content.append({"token": text, "logprob": value, "bytes": list(text.encode()), "top_logprobs": []})
        return {"content": content, "refusal": None}


def _tool_calls(text: str) -> tuple[str | None, list[dict[str, Any]]]:
    """Return the text before the first call, and the calls that are written as Hermes and Qwen write them.

    Text with a call that is no JSON object with a name and arguments is returned as it is.
    """
    before, *parts = text.split("<tool_call>")
    calls = []
    for part in parts:
        try:
            call = json.loads(part.partition("</tool_call>")[0])
            function = {
                "name": str(call["name"]),
                "arguments": json.dumps(call.get("arguments") or {}, ensure_ascii=False),
            }
        except (ValueError, KeyError, TypeError, AttributeError):
            return text, []
        calls.append({"id": f"call_{uuid.uuid4().hex[:24]}", "type": "function", "function": function})
    return (before.strip() or None) if calls else text, calls
