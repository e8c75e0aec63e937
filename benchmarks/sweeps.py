"""Measure how a run grows with its sequences, vocabulary, LoRA rank, processes and rows, and draw it.

Each point but those of `rows` is `sftx run` in processes of its own, in the dtype that is its default, one thread each:
packed rows of random token ids, a model of the embedded model's shape with six layers and random weights, LoRA
on all linear layers. The first step is left out. `rows` encodes generated conversations in one process (see encode.py),
and plans packed steps of one epoch.

- `sequence`: one document of so many tokens a step, with gradient checkpointing from 8,192 tokens on.
- `vocabulary`: so many rows of embedding and head; 4 rows of 512 tokens.
- `lora_r`: 4 rows of 512 tokens.
- `processes`: DDP; a step has 8 rows of 512 tokens, 2 at once in each process.

`python benchmarks/sweeps.py` writes benchmarks/results/cpu/sweeps.json and a picture beside it.
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
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from encode import generate, run_and_sample

from sftx.config import options
from sftx.model import names

ROOT: Final = Path(__file__).resolve().parents[1]
OUT: Final = ROOT / "benchmarks" / "results" / "cpu" / "sweeps.json"
SWEEPS: Final[Mapping[str, Sequence[int]]] = {
    "sequence": (512, 1024, 2048, 4096, 8192, 16384),
    "vocabulary": (32_768, 65_536, 131_072, 262_144),
    "lora_r": (8, 16, 32, 64, 128, 256),
    "processes": (1, 2, 4),
    "rows": (1_000, 10_000, 100_000, 1_000_000),
}
NUM_LAYERS: Final = 6
CHECKPOINTED: Final = 8192
"""Tokens of a sequence from which on activations are computed again."""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sweeps", nargs="*", choices=SWEEPS, default=list(SWEEPS))
    parser.add_argument("--points", type=int, default=None, help="of each sweep, only the first ones")
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--draw", action="store_true", help="draw what was measured before")
    parser.add_argument("--out", type=Path, default=OUT)
    arguments = parser.parse_args()
    report: dict[str, Any] = {"machine": platform.processor() or platform.machine(), "sweeps": {}}
    if arguments.out.is_file():
        report["sweeps"] = json.loads(arguments.out.read_text(encoding="utf-8"))["sweeps"]
    for sweep in () if arguments.draw else arguments.sweeps:
        points = report["sweeps"][sweep] = []
        for value in SWEEPS[sweep][: arguments.points]:
            figures = rows(value) if sweep == "rows" else steps(sweep, value, arguments.steps)
            points.append({"value": value, **figures})
            print(f"{sweep} {value}: {json.dumps(figures)}", flush=True)
            arguments.out.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    draw(report, arguments.out.with_suffix(".png"))
    return 0


def steps(sweep: str, value: int, num_steps: int) -> dict[str, float]:
    """Return tokens per second and peak memory of a run. Of several processes it is that of the largest one."""
    length, num_rows, vocabulary = (value, 1, None) if sweep == "sequence" else (512, 4, None)
    if sweep == "vocabulary":
        vocabulary = value
    if sweep == "processes":
        num_rows = 8
    with tempfile.TemporaryDirectory(prefix="sftx-sweeps-") as directory:
        work = Path(directory)
        model = make_model(work / "model", vocabulary)
        rng = random.Random(0)
        row = {"input_ids": [rng.randrange(1000) for _ in range(length)]}
        (work / "rows.jsonl").write_text(
            "".join(f"{json.dumps(row)}\n" for _ in range(num_rows * num_steps)), encoding="utf-8"
        )
        command = [
            sys.executable, "-m", "sftx", "run", "--model", str(model), "--data", str(work / "rows.jsonl"),
            "--plugin", "tokens", "--plugin", "packed", "--plugin", "lora", "--use-cpu", "--save-strategy", "no",
            "--max-length", str(length), "--max-steps", str(num_steps), "--train-batch-size", str(num_rows),
            "--per-device-train-batch-size", str(min(num_rows, 2 if sweep == "processes" else 4)),
            "--set", f"lora.r={value if sweep == 'lora_r' else 16}", "--output-dir", str(work / "run"),
            *(["--gradient-checkpointing"] if length >= CHECKPOINTED else []),
            *(["--nproc", str(value)] if sweep == "processes" else []),
        ]  # fmt: skip
        done = subprocess.run(command, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True)
        if done.returncode:
            sys.exit(f"{sweep} {value}: {done.stderr[-2000:]}")
        lines = (work / "run" / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
        measured = [event for event in map(json.loads, lines) if event["event"] == "step"][1:]
        return {
            "tokens_per_second": sum(one["num_input_tokens"] for one in measured)
            / sum(one["seconds"] for one in measured),
            "peak_bytes": max(one["peak_bytes"] for one in measured),
        }


def make_model(directory: Path, vocabulary: int | None) -> Path:
    """Write a model of the embedded model's shape with fewer layers, and its tokenizer."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from sftx.model.load import load_spec, load_tokenizer

    source = names.resolve(options.EMBEDDED_MODEL)
    found = load_spec(source, trust_remote_code=False).config.to_dict()
    changed = {"num_hidden_layers": NUM_LAYERS, "max_position_embeddings": 32_768, "layer_types": None}
    config = LlamaConfig(**{**found, **changed, **({} if vocabulary is None else {"vocab_size": vocabulary})})
    torch.manual_seed(0)
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(directory)
    load_tokenizer(source, trust_remote_code=False).save_pretrained(directory)
    return directory


def rows(num_rows: int) -> dict[str, float]:
    """Return what it takes to encode so many conversations in one process, and to plan an epoch of packed steps."""
    from sftx import Window
    from sftx_plugins.collators.packed import PackedRows

    with tempfile.TemporaryDirectory(prefix="sftx-sweeps-") as directory:
        data = Path(directory) / "rows.jsonl"
        generate(data, num_rows)
        command = [sys.executable, str(ROOT / "benchmarks" / "encode.py"), "--prepare", str(data), "--num-proc", "1"]
        command += ["--model", names.resolve(options.EMBEDDED_MODEL)]
        encoded = run_and_sample(command, os.environ | {"SFTX_CACHE": str(Path(directory) / "cache")})
    rng = random.Random(0)
    window = Window([rng.randint(20, 400) for _ in range(num_rows)], range(num_rows), rows_per_step=8)
    start = time.perf_counter()
    PackedRows(2048, "bfd", "varlen").plan(window)
    return {
        "encode_seconds": encoded["prepare_s"],
        "plan_seconds": time.perf_counter() - start,
        "peak_bytes": encoded["peak_rss_bytes"],
    }


def draw(report: Mapping[str, Any], target: Path) -> None:
    """Draw speed above and memory below, a sweep a column."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import FuncFormatter, NullFormatter

    sweeps = {name: points for name, points in report["sweeps"].items() if points}
    figure = Figure(figsize=(3.2 * len(sweeps), 5), layout="constrained")
    FigureCanvasAgg(figure)
    upper, lower = figure.subplots(2, len(sweeps), squeeze=False)
    for column, (name, points) in enumerate(sweeps.items()):
        values = [point["value"] for point in points]
        speed, memory = upper[column], lower[column]
        if name == "rows":
            for key, label in (("encode_seconds", "encode"), ("plan_seconds", "plan packed steps")):
                speed.loglog(values, [point[key] for point in points], marker="o", label=label)
            speed.legend(frameon=False, fontsize=8)
            speed.set_title("seconds", fontsize=9)
        else:
            speed.plot(values, [point["tokens_per_second"] for point in points], marker="o")
            speed.set_ylim(bottom=0)
            speed.set_title("tokens/s", fontsize=9)
        memory.plot(values, [point["peak_bytes"] / 1e9 for point in points], marker="o", color="#D55E00")
        memory.set_ylim(bottom=0)
        memory.set_title("peak memory, GB", fontsize=9)
        memory.set_xlabel(name.replace("_", " "))
        for axes in (speed, memory):
            axes.set_xscale("log", base=10 if name == "rows" else 2)
            axes.set_xticks(values)
            axes.xaxis.set_major_formatter(FuncFormatter(short))
            axes.xaxis.set_minor_formatter(NullFormatter())
            axes.tick_params(labelsize=8)
            axes.spines[["top", "right"]].set_visible(False)
    figure.suptitle(f"{report['machine']}, one thread a process", fontsize=10)
    figure.savefig(target, dpi=120)


def short(value: float, _: int | None = None) -> str:
    """Return a number of a scale as text: 1024 as 1k where it is a power of two, 1,000 as 1k too."""
    for size, unit in ((2**20, "M"), (10**6, "M"), (2**10, "k"), (10**3, "k")):
        if value >= size and value % size == 0:
            return f"{value / size:g}{unit}"
    return f"{value:g}"


if __name__ == "__main__":
    sys.exit(main())
