"""Compare `sftx serve` with `transformers serve`: time to the first token, and tokens a second, by number of clients.

Both serve one model in fp32 on the CPU, each in a process of its own with `--threads` threads. Clients ask the demo's
questions and stream greedy answers of at most `--new-tokens` tokens. For each number of clients, the servers take turns
for `--rounds` rounds, so that other load of the machine slows both. Tokens are counted by the model's tokenizer in the
text that arrived. The result is written to benchmarks/results/cpu/serving.json, or to --out. The exit code is 1 when 16
parallel clients of sftx get less than four times the tokens a second of one, or an answer failed.

transformers serve needs fastapi and uvicorn (`pip install transformers[serving]`); --only-sftx leaves it out.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.metadata
import json
import os
import platform
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
from transformers import AutoTokenizer

from sftx.model import names

ROOT = Path(__file__).resolve().parents[1]
OUT = ROOT / "benchmarks" / "results" / "cpu" / "serving.json"
QUESTIONS = ROOT / "sftx" / "demo" / "held_out.jsonl"
MIN_GAIN = 4.0
START_S = 600.0


@dataclass
class Answer:
    """A streamed answer: its text, and seconds from the request to its first piece and to its end."""

    text: str
    first_s: float
    whole_s: float
    error: str = ""


@contextlib.contextmanager
def serving(command: Sequence[str], port: int, threads: int) -> Iterator[str]:
    """Start a server and yield its address when it answers; end it afterwards."""
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "HF_HUB_OFFLINE": "1"}
    process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL)
    url, end = f"http://127.0.0.1:{port}", time.monotonic() + START_S
    try:
        while True:
            with contextlib.suppress(httpx.TransportError):
                if httpx.get(f"{url}/health").status_code == 200:
                    break
            if process.poll() is not None or time.monotonic() > end:
                raise SystemExit(f"{' '.join(command)}: has not started")
            time.sleep(0.2)
        yield url
    finally:
        process.terminate()
        process.wait()


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def ask(client: httpx.Client, url: str, model: str, question: str, new_tokens: int) -> Answer:
    body = {"model": model, "messages": [{"role": "user", "content": question}], "stream": True}
    body |= {"max_tokens": new_tokens, "temperature": 0}
    begin, first, text = time.perf_counter(), 0.0, ""
    try:
        with client.stream("POST", f"{url}/v1/chat/completions", json=body) as response:
            if response.status_code != 200:
                return Answer("", 0.0, 0.0, f"status {response.status_code}: {response.read().decode()[:200]}")
            for line in response.iter_lines():
                if not line.startswith("data: {"):
                    continue
                event: dict[str, Any] = json.loads(line.removeprefix("data: "))
                if "error" in event:
                    return Answer(text, first, 0.0, str(event["error"])[:200])
                piece = "".join(choice["delta"].get("content") or "" for choice in event["choices"])
                if piece and not first:
                    first = time.perf_counter() - begin
                text += piece
    except httpx.HTTPError as error:
        return Answer(text, first, 0.0, repr(error))
    return Answer(text, first, time.perf_counter() - begin)


def load(
    client: httpx.Client, url: str, model: str, questions: Sequence[str], num_clients: int, new_tokens: int
) -> tuple[float, list[Answer]]:
    """Return the seconds in which `num_clients` clients at once got the answers to all questions."""
    begin = time.perf_counter()
    with ThreadPoolExecutor(num_clients) as pool:
        answers = list(pool.map(lambda question: ask(client, url, model, question, new_tokens), questions))
    return time.perf_counter() - begin, answers


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="sftx:smollm2-135m-instruct", help="as in sftx run")
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 16])
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--requests", type=int, default=16, help="of each round, by all clients together")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--only-sftx", action="store_true")
    parser.add_argument("--continuous-batching", action="store_true", help="of transformers serve")
    parser.add_argument("--out", type=Path, default=OUT)
    arguments = parser.parse_args()

    place = names.resolve(arguments.model)
    tokenizer = AutoTokenizer.from_pretrained(place)
    rows = [json.loads(line) for line in QUESTIONS.read_text(encoding="utf-8").splitlines()]
    questions = [row["messages"][0]["content"] for row in rows[: arguments.requests]]
    ours, theirs = free_port(), free_port()
    commands = {
        "sftx": [sys.executable, "-m", "sftx", "serve", f"bench={place}", "--port", str(ours), "--device", "cpu"]
    }
    models, ports = {"sftx": "bench", "transformers": place}, {"sftx": ours, "transformers": theirs}
    if not arguments.only_sftx:
        options = ["--continuous-batching"] if arguments.continuous_batching else []
        program = str(Path(sys.executable).with_name("transformers"))
        commands["transformers"] = [
            program, "serve", place, "--port", str(theirs), "--host", "127.0.0.1", "--device", "cpu",
            "--dtype", "float32", "--log-level", "error", *options,
        ]  # fmt: skip

    results, errors = [], []
    with contextlib.ExitStack() as stack:
        client = stack.enter_context(httpx.Client(timeout=3600, limits=httpx.Limits(max_connections=None)))
        urls = {
            name: stack.enter_context(serving(command, ports[name], arguments.threads))
            for name, command in commands.items()
        }
        for name, url in urls.items():  # warm-up
            errors += [
                f"{name}: {answer.error}"
                for answer in [ask(client, url, models[name], questions[0], 4)]
                if answer.error
            ]
        for num_clients in arguments.clients if not errors else ():
            seconds = dict.fromkeys(urls, 0.0)
            answers: dict[str, list[Answer]] = {name: [] for name in urls}
            for turn in range(arguments.rounds):
                for name in list(urls) if turn % 2 else reversed(urls):
                    taken, given = load(client, urls[name], models[name], questions, num_clients, arguments.new_tokens)
                    seconds[name] += taken
                    answers[name] += given
            for name in urls:
                errors += [f"{name}: {answer.error}" for answer in answers[name] if answer.error]
                num_tokens = sum(len(tokenizer(answer.text).input_ids) for answer in answers[name])
                result = {
                    "server": name,
                    "clients": num_clients,
                    "answers": len(answers[name]),
                    "tokens_per_s": round(num_tokens / seconds[name], 2),
                    "median_first_token_s": round(statistics.median(a.first_s for a in answers[name]), 3),
                    "median_answer_s": round(statistics.median(a.whole_s for a in answers[name]), 3),
                    "same_as_sftx": sum(a.text == b.text for a, b in zip(answers[name], answers["sftx"], strict=True)),
                }
                results.append(result)
                print(json.dumps(result), flush=True)
    by_clients = {result["clients"]: result["tokens_per_s"] for result in results if result["server"] == "sftx"}
    gain = round(by_clients[16] / by_clients[1], 2) if {1, 16} <= by_clients.keys() else None
    report = {
        "model": arguments.model,
        "cores": os.cpu_count(),
        "machine": platform.processor() or platform.machine(),
        "threads": arguments.threads,
        "transformers": importlib.metadata.version("transformers"),
        "torch": importlib.metadata.version("torch"),
        "continuous_batching": arguments.continuous_batching,
        "load_average": os.getloadavg(),
        "new_tokens": arguments.new_tokens,
        "gain_of_16_clients": gain,
        "results": results,
        "errors": errors[:10],
    }
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    print(f"16 clients of sftx get {gain} times the tokens a second of one; {len(errors)} answers failed {errors[:1]}")
    return int(bool(errors) or (gain is not None and gain < MIN_GAIN))


if __name__ == "__main__":
    raise SystemExit(main())
