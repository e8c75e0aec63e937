"""The server, asked by OpenAI's own client and by clients that do what they must not."""

from __future__ import annotations

import concurrent.futures
import http.client
import json
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
import uvicorn

from sftx.checkpoint.load_run import LoadedRun, load_run
from sftx.model.decoding import Decoder, Request, Sampling
from sftx.serving.server import Limits, Server
from sftx.serving.worker import Worker
from sftx.testing.runs import run_tiny
from sftx.types import Conversation, Message

KEY = "a key"


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return run_tiny(["lora"], tmp_path_factory.mktemp("served")).output_dir


@pytest.fixture(scope="module")
def loaded(run_dir: Path) -> LoadedRun:
    return load_run(run_dir)


@pytest.fixture(scope="module")
def url(loaded: LoadedRun) -> Iterator[str]:
    worker = Worker({"mine": loaded}, max_rows=8, max_waiting=300)
    server = Server(worker, limits=Limits(body_bytes=20_000, max_new_tokens=200, seconds=60), api_key=KEY)
    config = uvicorn.Config(server.app, port=0, log_level="warning")
    listening = config.bind_socket()
    running = uvicorn.Server(config)
    worker.start()
    thread = threading.Thread(target=running.run, kwargs={"sockets": [listening]}, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{listening.getsockname()[1]}"
    running.should_exit = True
    thread.join(30)
    worker.close()


@pytest.fixture
def client(url: str) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{url}/v1", api_key=KEY, max_retries=0, timeout=60)


def asked(content: str) -> list[Any]:
    return [{"role": "user", "content": content}]


def answer(loaded: LoadedRun, content: str, max_new_tokens: int, **settings: Any) -> str:
    prompt = loaded.prompt(Conversation((Message("user", content),)))
    request = Request(prompt, Sampling(max_new_tokens, **settings))
    list(Decoder(loaded.lm, stop_ids=loaded.stop_ids, max_rows=1).run([request]))
    return str(loaded.tokenizer.decode(request.answer_ids))


def post(url: str, body: bytes | dict[str, Any], key: str = KEY) -> httpx.Response:
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    headers = {"Authorization": f"Bearer {key}", "Content-Type": "application/json"}
    return httpx.post(f"{url}/v1/chat/completions", content=content, headers=headers, timeout=60)


def test_a_chat_completion_is_the_answer_of_the_run(client: openai.OpenAI, loaded: LoadedRun) -> None:
    done = client.chat.completions.create(model="mine", messages=asked("Hello!"), max_tokens=12)
    assert done.choices[0].message.content == answer(loaded, "Hello!", 12)
    assert done.choices[0].finish_reason in ("stop", "length")
    assert done.usage is not None
    assert done.usage.prompt_tokens == len(loaded.prompt(Conversation((Message("user", "Hello!"),))))
    assert done.usage.total_tokens == done.usage.prompt_tokens + done.usage.completion_tokens
    assert [model.id for model in client.models.list()] == ["mine"]


def test_a_stream_adds_up_to_the_answer(client: openai.OpenAI, loaded: LoadedRun) -> None:
    chunks = list(
        client.chat.completions.create(
            model="mine", messages=asked("Hello!"), max_tokens=12, stream=True, stream_options={"include_usage": True}
        )
    )
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert text == answer(loaded, "Hello!", 12)
    assert chunks[0].choices[0].delta.role == "assistant"
    assert [chunk.choices[0].finish_reason for chunk in chunks if chunk.choices][-1] in ("stop", "length")
    assert chunks[-1].usage is not None
    assert chunks[-1].usage.completion_tokens > 0


def test_completions_take_text_ids_and_lists(client: openai.OpenAI, loaded: LoadedRun) -> None:
    ids = loaded.tokenizer.encode("Once upon")
    done = client.completions.create(model="mine", prompt=["Once upon", "a time"], max_tokens=5, temperature=0)
    assert [choice.index for choice in done.choices] == [0, 1]
    again = client.completions.create(model="mine", prompt=ids, max_tokens=5, temperature=0)
    assert again.choices[0].text == done.choices[0].text
    request = Request(ids, Sampling(5))
    list(Decoder(loaded.lm, stop_ids=loaded.stop_ids, max_rows=1).run([request]))
    assert done.choices[0].text == loaded.tokenizer.decode(request.answer_ids)


def test_a_seed_repeats_and_n_answers_differ(client: openai.OpenAI) -> None:
    def said(seed: int) -> list[str | None]:
        done = client.chat.completions.create(
            model="mine", messages=asked("Hello!"), max_tokens=12, temperature=1.5, seed=seed, n=3
        )
        return [choice.message.content for choice in done.choices]

    assert said(1) == said(1)
    assert len(set(said(1))) == 3
    assert said(1) != said(2)


def test_stop_strings_and_log_probabilities(client: openai.OpenAI, loaded: LoadedRun) -> None:
    whole = answer(loaded, "Hello!", 12)
    stop = whole[len(whole) // 2 :][:3]
    done = client.chat.completions.create(
        model="mine", messages=asked("Hello!"), max_tokens=12, stop=[stop], logprobs=True
    )
    assert done.choices[0].message.content == whole[: whole.index(stop)]
    assert done.choices[0].finish_reason == "stop"
    logprobs = done.choices[0].logprobs
    assert logprobs is not None
    assert logprobs.content
    assert all(token.logprob <= 0 for token in logprobs.content)


def test_200_clients_at_once_get_their_own_answers(url: str, client: openai.OpenAI, loaded: LoadedRun) -> None:
    questions = [f"Question number {number}: what is {number} + {number}?" for number in range(200)]

    def ask(number: int) -> str | None:
        done = client.chat.completions.create(
            model="mine", messages=asked(questions[number]), max_tokens=6, temperature=1.0, seed=number
        )
        return done.choices[0].message.content

    with concurrent.futures.ThreadPoolExecutor(200) as pool:
        answers = list(pool.map(ask, range(200)))
    for number in range(0, 200, 10):
        assert answers[number] == answer(loaded, questions[number], 6, temperature=1.0, seed=number)
    assert len(set(answers)) > 100


@pytest.mark.parametrize(
    ("body", "status", "message"),
    [
        (b"{not json", 400, "body: Invalid JSON"),
        (b"[]", 400, "body: Input should be an object"),
        ({"model": "mine"}, 400, "messages: Field required"),
        ({"model": "mine", "messages": []}, 400, "messages: List should have at least 1 item"),
        ({"model": "other", "messages": asked("hi")}, 404, "model 'other' is not served; there are mine"),
        ({"model": "mine", "messages": asked("hi"), "temperature": -1}, 400, "temperature: Input should be greater"),
        ({"model": "mine", "messages": asked("hi"), "max_tokens": 0}, 400, "max_tokens: Input should be greater"),
        ({"model": "mine", "messages": asked("hi"), "n": 999}, 400, "n: 999 answers were asked for, at most 16"),
        (
            {"model": "mine", "messages": asked("hi"), "presence_penalty": 1.0},
            400,
            "presence_penalty: Input should be 0",
        ),
        ({"model": "mine", "messages": [{"role": "nobody", "content": "hi"}]}, 400, "role"),
        ({"model": "mine", "messages": asked("word " * 3000)}, 400, "tokens, the model takes 1 to"),
        ({"model": "mine", "messages": asked("x" * 30_000)}, 413, "the body is larger than 20,000 bytes"),
    ],
)
def test_a_wrong_request_is_answered_with_what_is_wrong(
    url: str, body: bytes | dict[str, Any], status: int, message: str
) -> None:
    response = post(url, body)
    assert response.status_code == status, response.text
    error = response.json()["error"]
    assert message in error["message"]
    assert error["type"] in ("invalid_request_error", "not_found_error")


@pytest.mark.parametrize("key", ["", "another", KEY[:-1]])
def test_a_wrong_key_is_refused(url: str, key: str) -> None:
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    for path in ("chat/completions", "completions"):
        assert httpx.post(f"{url}/v1/{path}", json={}, headers=headers).status_code == (
            401 if key.strip() != KEY else 400
        )
    assert httpx.get(f"{url}/v1/models").status_code == 401
    assert httpx.get(f"{url}/health").json() == {"status": "ok"}


def test_clients_that_hang_up_leave_no_work_behind(url: str) -> None:
    host, port = url.removeprefix("http://").split(":")
    body = json.dumps(
        {"model": "mine", "messages": asked("Hello!"), "max_tokens": 200, "stream": True, "stop": ["\x00"]}
    )
    for stream in (True, False) * 4:
        connection = http.client.HTTPConnection(host, int(port), timeout=30)
        text = body if stream else body.replace('"stream": true', '"stream": false')
        connection.request("POST", "/v1/chat/completions", text, {"Authorization": f"Bearer {KEY}"})
        if stream:
            connection.getresponse().read(10)
        connection.close()
    deadline = time.monotonic() + 60
    while "sftx_open_answers 0\n" not in (text := httpx.get(f"{url}/metrics").text):
        assert time.monotonic() < deadline, text
        time.sleep(0.2)
    assert 'sftx_answers_total{reason="cancelled"}' in text


def test_metrics_are_in_the_form_of_prometheus(url: str) -> None:
    text = httpx.get(f"{url}/metrics").text
    samples = [line for line in text.splitlines() if not line.startswith("#")]
    assert all(float(line.rpartition(" ")[2]) >= 0 for line in samples)
    assert any(line.startswith('sftx_requests_total{status="200"} ') for line in samples)
