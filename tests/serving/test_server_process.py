"""`sftx serve` as a process of its own, with many clients at once, and with clients that do what they must not."""

from __future__ import annotations

import concurrent.futures
import contextlib
import http.client
import itertools
import json
import os
import signal
import socket
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import psutil
import pytest

from sftx.checkpoint.load_run import LoadedRun, load_run
from sftx.model.decoding import Decoder, Request, Sampling
from sftx.testing.runs import run_tiny
from sftx.types import Conversation, Message

KEY = "a key"
NUM_CLIENTS = 200
T_OF_9 = 2.262
"""Student's t of 9 degrees of freedom, which 97.5 % lie under."""
BOUND = 1000.0
"""Bytes a request that memory may grow by. What a request is, kept on purpose below, takes several times as many."""
KEEPS_JOBS = """
from sftx.cli import main
from sftx.serving.worker import Worker
kept, submit = [], Worker.submit
Worker.submit = lambda worker, job: kept.append(job) or submit(worker, job)
main()
"""


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a run whose adapter has clearly changed the model."""
    settings = {"train.learning_rate": 0.05, "train.max_steps": 4}
    return run_tiny(["lora"], tmp_path_factory.mktemp("served"), settings=settings).output_dir


@pytest.fixture(scope="module")
def models(run_dir: Path) -> dict[str, LoadedRun]:
    return {"mine": load_run(run_dir, device="cpu"), "base": load_run(run_dir.parent / "model", device="cpu")}


@contextlib.contextmanager
def serving(run_dir: Path, *options: str, program: str = "from sftx.cli import main; main()") -> Iterator[Any]:
    """Serve a run and its base; yield the process, its URL, and the lines that it has written so far."""
    arguments = ["serve", f"mine={run_dir}", f"base={run_dir.parent / 'model'}", "--port", "0", "--device", "cpu"]
    command = [sys.executable, "-c", program, *arguments, "--max-body-bytes", "20000", *options]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env={**os.environ, "SFTX_API_KEY": KEY})
    lines: list[str] = []
    assert process.stderr is not None
    try:
        while not any("serving" in line for line in lines):
            lines.append(line := process.stderr.readline())
            assert line, lines
        url = lines[-1].split()[-1].removesuffix("/v1")
        reader = threading.Thread(target=lambda: lines.extend(process.stderr or ()), daemon=True)
        reader.start()
        yield process, url, lines
    finally:
        process.kill()
        process.wait()
        reader.join(10)
        process.stderr.close()


@pytest.fixture(scope="module")
def served(run_dir: Path) -> Iterator[Any]:
    with serving(run_dir, "--max-waiting", "500") as started:
        yield started


@pytest.fixture(scope="module")
def url(served: Any) -> str:
    return str(served[1])


def body_of(model: str, content: str, **settings: Any) -> dict[str, Any]:
    return {"model": model, "messages": [{"role": "user", "content": content}], "max_tokens": 6, **settings}


def post(url: str, body: dict[str, Any] | bytes, key: str = KEY, path: str = "chat/completions") -> httpx.Response:
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    headers = {"Authorization": f"Bearer {key}", "Content-Type": "application/json"}
    return httpx.post(f"{url}/v1/{path}", content=content, headers=headers, timeout=300)


def answer(loaded: LoadedRun, content: str, seed: int) -> str:
    prompt = loaded.prompt(Conversation((Message("user", content),)))
    request = Request(prompt, Sampling(6, temperature=1.0, seed=seed))
    list(Decoder(loaded.lm, stop_ids=loaded.stop_ids, max_rows=1).run([request]))
    return str(loaded.tokenizer.decode(request.answer_ids))


def ask_all(url: str, models: dict[str, LoadedRun], num: int) -> None:
    """Ask by as many clients at once, half of them streaming, and check each one's answer."""
    ready = threading.Barrier(num)

    def ask(number: int) -> str:
        model = ("mine", "base")[number % 2]
        body = body_of(model, f"Question {number}: what is {number} + {number}?", temperature=1.0, seed=number)
        ready.wait(300)
        if number % 4 < 2:
            return str(post(url, body).json()["choices"][0]["message"]["content"])
        client = openai.OpenAI(base_url=f"{url}/v1", api_key=KEY, max_retries=0, timeout=300)
        with client, client.chat.completions.create(**body, stream=True) as stream:
            return "".join(chunk.choices[0].delta.content or "" for chunk in stream)

    with concurrent.futures.ThreadPoolExecutor(num) as pool:
        answers = list(pool.map(ask, range(num)))
    own = [
        answer(models[("mine", "base")[number % 2]], f"Question {number}: what is {number} + {number}?", number)
        for number in range(num)
    ]
    assert answers == own
    assert len(set(own)) > num / 2


def metric(url: str, name: str) -> float:
    text = httpx.get(f"{url}/metrics").text
    return next((float(line.split()[-1]) for line in text.splitlines() if line.startswith(f"{name} ")), 0.0)


def wait_until_idle(url: str) -> None:
    deadline = time.monotonic() + 120
    while metric(url, "sftx_open_answers"):
        assert time.monotonic() < deadline, httpx.get(f"{url}/metrics").text
        time.sleep(0.1)


def hang_up(url: str, *, after_first_chunk: bool) -> None:
    """Ask for a long answer, and close the connection."""
    host, port = url.removeprefix("http://").split(":")
    connection = http.client.HTTPConnection(host, int(port), timeout=60)
    body = json.dumps(body_of("mine", "Hello!", max_tokens=100, stream=after_first_chunk, temperature=1.0))
    connection.request("POST", "/v1/chat/completions", body, {"Authorization": f"Bearer {KEY}"})
    if after_first_chunk:
        connection.getresponse().read(10)
    connection.close()


def test_clients_at_once_get_their_own_answers(url: str, served: Any, models: dict[str, LoadedRun]) -> None:
    ask_all(url, models, 24)
    assert served[2][-1].startswith("loaded once for mine, base: ")


@pytest.mark.slow
def test_200_clients_at_once_get_their_own_answers(url: str, models: dict[str, LoadedRun]) -> None:
    ask_all(url, models, NUM_CLIENTS)


@pytest.mark.parametrize(
    ("body", "status"),
    [
        (b"x" * 20_001, 413),
        (b"x" * 30_000_000, 413),
        (b"{", 400),
        (b"", 400),
        (b'{"model": "\xff"}', 400),
        (b"[" * 15_000, 400),
        (body_of("nobody", "hi"), 404),
        (body_of("mine", "word " * 3000), 400),
    ],
    ids=["too large", "much too large", "half", "empty", "no UTF-8", "nested", "no such model", "too long"],
)
def test_a_wrong_body_gets_its_status(url: str, body: dict[str, Any] | bytes, status: int) -> None:
    response = post(url, body)
    assert response.status_code == status, response.text
    assert response.json()["error"]["message"]


def test_a_wrong_key_path_or_method_gets_its_status(url: str) -> None:
    assert post(url, body_of("mine", "hi"), key="another").status_code == 401
    assert post(url, {}, key="another", path="completions").status_code == 401
    for method, path, status in (("GET", "/v1/chat/completions", 405), ("POST", "/v1/nothing", 404), ("GET", "/", 404)):
        response = httpx.request(method, url + path, headers={"Authorization": f"Bearer {KEY}"})
        assert (response.status_code, response.json()["error"]["code"]) == (status, None)


def test_clients_that_hang_up_disturb_no_other(url: str, served: Any, models: dict[str, LoadedRun]) -> None:
    host, port = url.removeprefix("http://").split(":")
    with concurrent.futures.ThreadPoolExecutor(12) as pool:
        gone = [pool.submit(hang_up, url, after_first_chunk=bool(number % 2)) for number in range(10)]
        ask_all(url, models, 8)
        for future in gone:
            future.result()
    for sent in (b'Content-Length: 1000\r\n\r\n{"model"', b"Transfer-Encoding: chunked\r\n\r\n5\r\n{"):
        with socket.create_connection((host, int(port))) as half:
            head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {KEY}\r\n"
            half.sendall(head.encode() + sent)
    with socket.create_connection((host, int(port))) as other:
        other.sendall(b"no request\r\n\r\n")
        assert other.recv(100).startswith(b"HTTP/1.1 400 ")
    wait_until_idle(url)
    ask_all(url, models, 4)
    assert not any("Traceback" in line for line in served[2]), served[2]


@pytest.mark.parametrize("num", [8, pytest.param(60, marks=pytest.mark.slow)])
def test_sigterm_under_load_lets_every_answer_end(run_dir: Path, num: int) -> None:
    """Answers that run or wait are given to their end; who comes later is not let in."""
    begun = [threading.Event() for _ in range(num)]
    with serving(run_dir, "--max-rows", "4") as (process, url, lines):

        def ask(number: int) -> str | None:
            client = openai.OpenAI(base_url=f"{url}/v1", api_key=KEY, max_retries=0, timeout=300)
            body = body_of("mine", f"Question {number}", max_tokens=40, temperature=1.0, seed=number)
            with client, client.chat.completions.create(**body, stream=True) as stream:
                reason = None
                for chunk in stream:
                    begun[number].set()
                    reason = chunk.choices[0].finish_reason
                return reason

        with concurrent.futures.ThreadPoolExecutor(num) as pool:
            asked = [pool.submit(ask, number) for number in range(num)]
            # The first chunk, which has no text, is sent at once: most wait for their first token.
            assert all(event.wait(60) for event in begun), [future.exception(60) for future in asked]
            process.send_signal(signal.SIGTERM)
            assert {future.result() for future in asked} <= {"stop", "length"}
        assert process.wait(120) == 0
        with pytest.raises(httpx.ConnectError):
            post(url, body_of("mine", "hi"))
    assert lines[-1].strip() == "stopped"


# --- memory -------------------------------------------------------------------------------------


def upper_growth(samples: list[int], num_requests: int) -> float:
    """Return the bytes a request that memory grows by at most, with 97.5 % confidence.

    The allocator takes and returns pages in bursts, so that neighbouring samples say the same: the growth is measured
    over ten equal stretches, and its error is that of their mean.
    """
    stretch = (len(samples) - 1) // 10
    ends = samples[::stretch][:11]
    growths = [(after - before) / (num_requests / 10) for before, after in itertools.pairwise(ends)]
    return statistics.fmean(growths) + T_OF_9 * statistics.stdev(growths) / 10**0.5


def measured(run_dir: Path, num_requests: int, program: str) -> float:
    """Return the growth of a server's memory over requests of all kinds, after as many that fill its caches."""
    with serving(run_dir, program=program) as (process, url, _), httpx.Client(timeout=300) as client:
        resident: Callable[[], int] = lambda: psutil.Process(process.pid).memory_info().rss  # noqa: E731

        def ask(number: int) -> None:
            headers = {"Authorization": f"Bearer {KEY if number % 10 else 'another'}"}
            body = body_of(
                ("mine", "base")[number % 2], f"Question {number % 50}", max_tokens=2, stream=number % 3 == 0
            )
            client.post(f"{url}/v1/chat/completions", json=body, headers=headers)

        samples = []
        with concurrent.futures.ThreadPoolExecutor(8) as pool:
            for start in range(0, 2 * num_requests, num_requests // 50):
                list(pool.map(ask, range(start, start + num_requests // 50)))
                samples.append(resident())
    return upper_growth(samples[len(samples) // 2 - 1 :], num_requests)


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="resident memory is measured as Linux counts it")
def test_memory_does_not_grow_with_the_requests(run_dir: Path) -> None:
    growth = measured(run_dir, 2000, "from sftx.cli import main; main()")
    assert growth < BOUND, f"{growth:.0f} bytes a request"
    with_leak = measured(run_dir, 2000, KEEPS_JOBS)
    assert with_leak > BOUND, f"{with_leak:.0f}: a leak would not be seen"
