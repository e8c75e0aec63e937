"""Measure time and memory of encoding a million generated rows, of a second start from the cache, and of peers.

The benchmark generates a file of conversations (`--rows`), then prepares it twice, each time in a new process: first
by encoding it, then from the cache. Then TRL prepares the same file, in a process of its own and without a cache: its
trainer renders ChatML, encodes it and masks all but the assistant's turns, which must give as many tokens. All use
`--num-proc` processes. Resident memory is the sum over the process and its workers, sampled ten times a second; it
includes resident pages of memory-mapped files. `prepare_s` is the time from the file to encoded rows without imports,
`cpu_s` the processor time of the whole command and its workers, imports included; ratios are those of a peer to the
first run of sftx. The result is written to benchmarks/results/cpu/encode.json, or to --out.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import platform
import random
import resource
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from sftx.config import loading, options
from sftx.model import names

ROOT = Path(__file__).resolve().parents[1]
OUT = ROOT / "benchmarks" / "results" / "cpu" / "encode.json"
CHATML_FOR_TRL = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}{% if m.role == 'assistant' %}{% generation %}"
    "{{ m.content + '<|im_end|>\n' }}{% endgeneration %}{% else %}{{ m.content + '<|im_end|>\n' }}{% endif %}"
    "{% endfor %}"
)
"""ChatML with the marks by which transformers tells the assistant's tokens."""
MAX_RSS_BYTES, MAX_SECOND_START_S = 2 * 10**9, 3.0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--num-proc", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--out", type=Path, default=OUT)
    parser.add_argument("--prepare", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--peer", choices=PEERS, help=argparse.SUPPRESS)
    parser.add_argument("--model", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.prepare is not None:
        prepare_as = prepare if arguments.peer is None else PEERS[arguments.peer]
        prepare_as(arguments.prepare, arguments.model, arguments.num_proc)
        return 0
    with tempfile.TemporaryDirectory() as work:
        data = Path(work) / "rows.jsonl"
        generate(data, arguments.rows)
        environment = os.environ | {
            "SFTX_CACHE": str(Path(work) / "cache"),
            "HF_DATASETS_CACHE": str(Path(work) / "datasets"),
            "HF_HUB_OFFLINE": "1",  # all of it is here, and waiting for a network is not measured
            "TOKENIZERS_PARALLELISM": "false",
        }
        command = [sys.executable, __file__, "--prepare", str(data), "--model", names.resolve(options.EMBEDDED_MODEL)]
        command += ["--num-proc", str(arguments.num_proc)]
        runs = {name: run_and_sample(command, environment) for name in ("first", "second")}
        peers = {name: measure_peer(name, command, environment, runs["first"]) for name in PEERS}
        result = {
            "rows": arguments.rows,
            "file_bytes": data.stat().st_size,
            "cores": os.cpu_count(),
            "num_proc": arguments.num_proc,
            "machine": platform.processor() or platform.machine(),
            **runs,
            "peers": peers,
        }
    print(json.dumps(result, indent=2))
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    is_small = max(run["peak_rss_bytes"] for run in runs.values()) < MAX_RSS_BYTES
    return 0 if is_small and runs["second"]["prepare_s"] < MAX_SECOND_START_S else 1


def generate(path: Path, num_rows: int) -> None:
    """Write conversations of 2 or 4 turns of random words, with about 100 tokens a row."""
    rng = random.Random(0)
    words = [line.split()[0] for line in Path(__file__).read_text().splitlines() if line.split()]
    with path.open("w", encoding="utf-8") as file:
        for number in range(num_rows):
            turns = [
                {"role": role, "content": f"{number} " + " ".join(rng.choices(words, k=rng.randint(3, 20)))}
                for _ in range(rng.randint(1, 2))
                for role in ("user", "assistant")
            ]
            file.write(json.dumps({"messages": turns}) + "\n")


def measure_peer(
    name: str, command: list[str], environment: dict[str, str], ours: dict[str, Any]
) -> dict[str, Any] | str:
    """Return what a peer took, and its ratios to ours; say so when it is not installed."""
    try:
        version = importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"
    theirs = run_and_sample([*command, "--peer", name], environment)
    if theirs["tokens"] != ours["tokens"]:
        sys.exit(f"{name} encodes {theirs['tokens']} tokens, sftx {ours['tokens']}: they do not do the same")
    ratios = {f"{key}_ratio": theirs[key] / ours[key] for key in ("prepare_s", "cpu_s", "peak_rss_bytes")}
    return {"version": version, **theirs, **ratios}


def prepare(path: Path, model: str, num_proc: int) -> None:
    """Encode the rows as `sftx run` does before it loads the model, and print the result as one line of JSON."""
    from sftx.assembly.registry import activate
    from sftx.data.pipeline import build_pipeline

    assignments: list[tuple[str, Any, str]] = [
        ("model", model, "--model"),
        ("data.train", [str(path)], "--data"),
        ("data.cache", True, "--cache"),
        ("data.num_proc", num_proc, "--num-proc"),
    ]
    loaded = loading.load(None, add=["chatml"], assignments=assignments)
    pipeline = build_pipeline(loaded.config, activate(loaded), loaded.origins)
    start = time.perf_counter()
    data = pipeline.load_train()
    seconds = time.perf_counter() - start
    print(json.dumps({"prepare_s": seconds, "examples": len(data.examples), "tokens": data.num_input_tokens}))


def prepare_with_trl(path: Path, model: str, num_proc: int) -> None:
    """Let TRL's trainer prepare the rows: with a tiny model, since it prepares them when it is made."""
    import datasets
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM
    from trl import SFTConfig, SFTTrainer

    tokenizer = AutoTokenizer.from_pretrained(model)
    tokenizer.chat_template = CHATML_FOR_TRL
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1
    )
    tiny = LlamaForCausalLM(config)
    with tempfile.TemporaryDirectory() as out:
        options = SFTConfig(
            output_dir=out,
            assistant_only_loss=True,
            max_length=2048,
            dataset_num_proc=num_proc,
            report_to="none",
            use_cpu=True,
            bf16=False,
        )
        start = time.perf_counter()
        rows = datasets.load_dataset("json", data_files=str(path), split="train")
        trainer = SFTTrainer(model=tiny, args=options, train_dataset=rows, processing_class=tokenizer)
        seconds = time.perf_counter() - start
        encoded = trainer.train_dataset.with_format("arrow")["input_ids"]
        tokens = sum(int(chunk.flatten().__len__()) for chunk in encoded.chunks)
    print(json.dumps({"prepare_s": seconds, "examples": len(trainer.train_dataset), "tokens": tokens}))


def refuse_llamafactory(path: Path, model: str, num_proc: int) -> None:
    sys.exit("llamafactory is installed, and nobody has written yet how it is to prepare these rows")


PEERS: dict[str, Callable[[Path, str, int], None]] = {"trl": prepare_with_trl, "llamafactory": refuse_llamafactory}
"""What prepares the rows with each peer, by the name of its package."""


def run_and_sample(command: list[str], environment: dict[str, str]) -> dict[str, Any]:
    """Run a command and return the JSON of its last line, with the processor time and memory of it and its children."""
    peak = 0
    before = processor_seconds()
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) as process:

        def watch() -> None:
            nonlocal peak
            while process.poll() is None:
                peak = max(peak, resident_bytes(process.pid))
                time.sleep(0.1)

        watcher = threading.Thread(target=watch)
        watcher.start()
        assert process.stdout is not None
        printed = process.stdout.read()
        watcher.join()
    if process.returncode:
        sys.exit(process.returncode)
    return json.loads(printed.splitlines()[-1]) | {"cpu_s": processor_seconds() - before, "peak_rss_bytes": peak}


def processor_seconds() -> float:
    """Return the processor time of all children that have ended, and of theirs."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def resident_bytes(pid: int) -> int:
    """Return the resident memory of a process and all its descendants."""
    try:
        pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    except (OSError, IndexError):
        return 0
    return pages * os.sysconf("SC_PAGE_SIZE") + sum(resident_bytes(int(child)) for child in children)


if __name__ == "__main__":
    sys.exit(main())
