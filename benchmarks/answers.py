"""Score a run's result on its held-out rows by every way in which it can be asked, and compare the answers.

    python benchmarks/answers.py runs/demo --rows 200 --way chat --way server

The ways: the engine (`load_run`), a chat, the merged model in transformers, the adapter in PEFT, GGUF in transformers
and in llama.cpp (where `llama_cpp` is installed), and the server through the package `openai`. All answer greedily.
What a way needs (merged model, GGUF files in f16 and q8_0) is exported into the run's directory, where it is not there
yet. The table has the exact-match score of each way, and how many of its answers are, as text, those of the engine. The
exit code is 1 when a way scores otherwise than the engine; the answers are written to --out.
"""

from __future__ import annotations

import argparse
import gc
import importlib.util
import json
import re
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Final

import torch

from sftx import Question, load_run
from sftx.assembly.registry import activate
from sftx.checkpoint import layout
from sftx.checkpoint.questions import as_messages
from sftx.config import loading
from sftx.data.pipeline import build_pipeline
from sftx.types import Conversation
from sftx_plugins.metrics.exact_match import ExactMatch

BATCH: Final = 16
Rows = Sequence[Question]


def messages_of(row: Question) -> list[dict[str, Any]]:
    return as_messages(Conversation(row.messages, row.tools))


def by_engine(run: Path, rows: Rows, new_tokens: int) -> list[str]:
    loaded = load_run(run, device="cpu")
    prompts = [row.prompt_ids for row in rows]
    answers = loaded.answer(prompts, max_new_tokens=new_tokens, batch_size=BATCH)
    return [str(loaded.tokenizer.decode(ids, skip_special_tokens=True)) for ids in answers]


def by_chat(run: Path, rows: Rows, new_tokens: int) -> list[str]:
    from sftx.model.decoding import Sampling
    from sftx.serving.chat import Chat

    loaded = load_run(run, device="cpu")
    answers = []
    for row in rows:
        *before, question = row.messages
        system = before[0].content if before and before[0].role == "system" else ""
        chat = Chat(loaded, Sampling(max_new_tokens=new_tokens), system=system)
        chat.turns = before[1:] if system else before
        answers.append("".join(chat.answer(question.content)))
    return answers


def _generated(model: Any, tokenizer: Any, rows: Rows, new_tokens: int) -> list[str]:
    """Return the answers of a model of transformers, by its own chat template and generation settings."""
    answers: list[str] = []
    tokenizer.padding_side = "left"
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    for start in range(0, len(rows), BATCH):
        asked = [messages_of(row) for row in rows[start : start + BATCH]]
        given = tokenizer.apply_chat_template(
            asked, add_generation_prompt=True, padding=True, return_tensors="pt", return_dict=True
        )
        with torch.no_grad():
            out = model.generate(**given, max_new_tokens=new_tokens, do_sample=False, repetition_penalty=1.0)
        answers += tokenizer.batch_decode(out[:, given["input_ids"].shape[1] :], skip_special_tokens=True)
    return answers


def by_transformers(run: Path, rows: Rows, new_tokens: int) -> list[str]:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    directory = run / layout.MERGED
    model = AutoModelForCausalLM.from_pretrained(directory, dtype="auto").eval()
    return _generated(model, AutoTokenizer.from_pretrained(directory), rows, new_tokens)


def by_peft(run: Path, rows: Rows, new_tokens: int) -> list[str]:
    from peft import AutoPeftModelForCausalLM
    from transformers import AutoTokenizer, GenerationConfig

    directory = run / layout.ADAPTER
    model = AutoPeftModelForCausalLM.from_pretrained(directory, dtype="auto").eval()
    model.generation_config = GenerationConfig.from_pretrained(directory)
    return _generated(model, AutoTokenizer.from_pretrained(directory), rows, new_tokens)


def gguf(run: Path, dtype: str) -> Path:
    return run / layout.EXPORT / f"gguf-{dtype}" / f"model-{dtype}.gguf"


def by_gguf_in_transformers(run: Path, rows: Rows, new_tokens: int, dtype: str) -> list[str]:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    file = gguf(run, dtype)
    model = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    model.generation_config.eos_token_id = tokenizer.eos_token_id  # the file's, which transformers does not read
    return _generated(model, tokenizer, rows, new_tokens)


def by_llama_cpp(run: Path, rows: Rows, new_tokens: int, dtype: str) -> list[str]:
    from llama_cpp import Llama

    model = Llama(str(gguf(run, dtype)), n_ctx=4096, verbose=False)
    answers = []
    for row in rows:
        asked: Any = messages_of(row)
        given: Any = model.create_chat_completion(asked, temperature=0, repeat_penalty=1.0, max_tokens=new_tokens)
        answers.append(str(given["choices"][0]["message"]["content"] or ""))
    return answers


def by_server(run: Path, rows: Rows, new_tokens: int) -> list[str]:
    from openai import OpenAI

    command = [sys.executable, "-m", "sftx", "serve", f"run={run}", "--port", "0", "--device", "cpu"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as server:
        try:
            assert server.stderr is not None
            address = next(found[0] for line in server.stderr if (found := re.search(r"http://\S+", line)))
            client = OpenAI(base_url=address, api_key="any", timeout=3600)

            def ask(row: Question) -> str:
                given: Any = client.chat.completions.create(
                    model="run", messages=messages_of(row), temperature=0, max_tokens=new_tokens
                )
                return str(given.choices[0].message.content or "")

            with ThreadPoolExecutor(BATCH) as pool:
                return list(pool.map(ask, rows))
        finally:
            server.terminate()


WAYS: Final[dict[str, Callable[[Path, Rows, int], list[str]]]] = {
    "engine": by_engine,
    "chat": by_chat,
    "transformers, merged": by_transformers,
    "PEFT, adapter": by_peft,
    "transformers, GGUF f16": lambda *given: by_gguf_in_transformers(*given, "f16"),
    "transformers, GGUF q8_0": lambda *given: by_gguf_in_transformers(*given, "q8_0"),
    "llama.cpp, GGUF f16": lambda *given: by_llama_cpp(*given, "f16"),
    "llama.cpp, GGUF q8_0": lambda *given: by_llama_cpp(*given, "q8_0"),
    "server, openai client": by_server,
}


def why_not(way: str, run: Path) -> str:
    """Return why a way is not there; empty where it is. Exports what it needs."""
    needs = {"llama.cpp": "llama_cpp", "server": "openai", "PEFT": "peft"}
    module = needs.get(way.partition(",")[0])
    if module and importlib.util.find_spec(module) is None:
        return f"{module} is not installed"
    if "PEFT" in way and not (run / layout.ADAPTER / "adapter_config.json").exists():
        return "its result is no adapter of PEFT"
    if "merged" in way and not (run / layout.MERGED).exists():
        subprocess.run([sys.executable, "-m", "sftx", "merge", str(run)], check=True)
    for dtype in ("f16", "q8_0"):
        if way.endswith(dtype) and not gguf(run, dtype).exists():
            into = ["--into", str(gguf(run, dtype).parent), "--set", f"gguf.dtype={dtype}"]
            subprocess.run([sys.executable, "-m", "sftx", "export", str(run), "--to", "gguf", *into], check=True)
    return ""


def held_out_rows(run: Path) -> list[Question]:
    loaded = loading.load(run / layout.RUN)
    return build_pipeline(loaded.config, activate(loaded), loaded.origins).load_eval(questions=True).questions


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("--rows", type=int, default=200, help="held-out rows, from the first on")
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--way", action="append", help="those whose name has this text; by default all")
    parser.add_argument("--out", type=Path, help="a JSON file with scores and answers")
    given = parser.parse_args()
    rows = [row for row in held_out_rows(given.run) if row.messages[-1].role == "user"][: given.rows]
    chosen = [way for way in WAYS if way == "engine" or not given.way or any(text in way for text in given.way)]
    score, own, found = ExactMatch(), list[str](), dict[str, Any]()
    print(f"{len(rows)} rows, up to {given.new_tokens} new tokens\n")
    print("| way | exact match | answers as the engine's | seconds |\n| --- | --- | --- | --- |", flush=True)
    for way in chosen:
        if reason := why_not(way, given.run):
            print(f"| {way} | {reason} | | |", flush=True)
            continue
        start = time.perf_counter()
        answers = [answer.strip() for answer in WAYS[way](given.run, rows, given.new_tokens)]
        seconds = time.perf_counter() - start
        own = own or answers
        exact = sum(score(answer, row.reference) for answer, row in zip(answers, rows, strict=True)) / len(rows)
        same = sum(a == b for a, b in zip(answers, own, strict=True))
        found[way] = {"exact_match": exact, "same": same, "seconds": seconds, "answers": answers}
        print(f"| {way} | {exact:.3f} | {same} of {len(rows)} | {seconds:.0f} |", flush=True)
        gc.collect()
    if given.out is not None:
        given.out.write_text(json.dumps(found, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    sys.exit(any(way["exact_match"] != found["engine"]["exact_match"] for way in found.values()))


if __name__ == "__main__":
    main()
