"""Measure time and resident memory of encoding a million generated rows, and of a second start from the cache.

The benchmark generates a file of conversations (`--rows`), then prepares it twice, each time in a new process: first
by encoding it, then from the cache. Resident memory is the sum over the process and its workers, sampled ten times a
second; it includes resident pages of memory-mapped files. The result is written to
benchmarks/results/cpu/encode.json, or to --out.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

from sftx.config import loading, options
from sftx.model import names

ROOT = Path(__file__).resolve().parents[1]
OUT = ROOT / "benchmarks" / "results" / "cpu" / "encode.json"
MAX_RSS_BYTES, MAX_SECOND_START_S = 2 * 10**9, 3.0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--num-proc", type=int, default=None)
    parser.add_argument("--out", type=Path, default=OUT)
    parser.add_argument("--prepare", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--model", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.prepare is not None:
        prepare(arguments.prepare, arguments.model, arguments.num_proc)
        return 0
    with tempfile.TemporaryDirectory() as work:
        data = Path(work) / "rows.jsonl"
        generate(data, arguments.rows)
        environment = os.environ | {"SFTX_CACHE": str(Path(work) / "cache"), "TOKENIZERS_PARALLELISM": "false"}
        command = [sys.executable, __file__, "--prepare", str(data), "--model", names.resolve(options.EMBEDDED_MODEL)]
        command += [] if arguments.num_proc is None else ["--num-proc", str(arguments.num_proc)]
        runs = {name: run_and_sample(command, environment) for name in ("first", "second")}
        result = {
            "rows": arguments.rows,
            "file_bytes": data.stat().st_size,
            "cores": os.cpu_count(),
            "machine": platform.processor() or platform.machine(),
            **runs,
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


def prepare(path: Path, model: str, num_proc: int | None) -> None:
    """Encode the rows as `sftx run` does before it loads the model, and print the result as one line of JSON."""
    from sftx.assembly.registry import activate
    from sftx.data.pipeline import build_pipeline

    assignments: list[tuple[str, Any, str]] = [
        ("model", model, "--model"),
        ("data.train", [str(path)], "--data"),
        ("data.cache", True, "--cache"),
    ]
    if num_proc is not None:
        assignments.append(("data.num_proc", num_proc, "--num-proc"))
    loaded = loading.load(None, add=["chatml"], assignments=assignments)
    pipeline = build_pipeline(loaded.config, activate(loaded), loaded.origins)
    start = time.perf_counter()
    data = pipeline.load_train()
    seconds = time.perf_counter() - start
    print(json.dumps({"prepare_s": seconds, "examples": len(data.examples), "tokens": data.num_input_tokens}))


def run_and_sample(command: list[str], environment: dict[str, str]) -> dict[str, Any]:
    """Run a command and return the JSON of its last line, with the peak resident memory of it and its children."""
    peak = 0
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
    return json.loads(printed.splitlines()[-1]) | {"peak_rss_bytes": peak}


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
