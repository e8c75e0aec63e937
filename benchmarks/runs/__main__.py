"""Compare whole training runs of sftx and of other trainers on the same rows, each in a process of its own.

`python benchmarks/runs` trains the embedded model on the first rows of the alpaca demo set (`make assets`) that have at
most 512 tokens. The rows are token ids with labels, the same for all; optimizer (AdamW, constant learning rate), LoRA
(r 16 on all linear layers) and batch are the same too. Trainers take turns, so that a busy minute hits all of them.
The first two steps are left out. It prints non-padding tokens per second, the share of what the machine's own
matrix products allow (4 operations a parameter and token), the time to the end of the first step, peak resident memory,
and the mean loss of all label tokens. Where the losses of two trainers differ by more than 1 %, the comparison is void
and the exit code is 1. A trainer that is not installed is listed. All is written as JSON.

LLaMA-Factory needs an environment of its own: `--llama-factory-python DIR/bin/python`.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
DATA = ROOT / ".assets" / "llamafactory" / "alpaca_en_demo.json"
OUT = ROOT / "benchmarks" / "results" / "cpu"
LENGTH = 512
WARM_UP = 2
LOSS_TOLERANCE = 0.01


@dataclass
class Trainer:
    """One way to train, with what its runs took."""

    name: str
    needs: str
    """The module that must be installed."""
    packed: bool
    python: str = sys.executable
    seconds: list[float] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)
    label_tokens: list[int] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)
    first_step: list[float] = field(default_factory=list)
    peak_bytes: list[int] = field(default_factory=list)

    def figures(self, gemm_rate: float, num_parameters: int) -> dict[str, float]:
        rate = statistics.median(tokens / s for tokens, s in zip(self.tokens, self.seconds, strict=True))
        labels = statistics.median(tokens / s for tokens, s in zip(self.label_tokens, self.seconds, strict=True))
        return {
            "tokens_per_second": rate,
            "label_tokens_per_second": labels,
            "share_of_gemm_rate": rate * 4 * num_parameters / gemm_rate,
            "first_step_seconds": statistics.median(self.first_step),
            "peak_bytes": statistics.median(self.peak_bytes),
            "loss": statistics.mean(self.losses),
        }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="bfloat16")
    parser.add_argument("--rows", type=int, default=96, help="rows of data (96)")
    parser.add_argument("--repeats", type=int, default=2, help="runs of each trainer (2)")
    parser.add_argument("--full", action="store_true", help="train the whole model, without LoRA")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)), help="of each process")
    parser.add_argument("--llama-factory-python", default=sys.executable, help="the interpreter that has LLaMA-Factory")
    parser.add_argument("--trainers", nargs="*", help="names of those to run")
    parser.add_argument("--out", type=Path, help="JSON file [benchmarks/results/cpu/runs-DTYPE.json]")
    options = parser.parse_args()
    if not DATA.is_file():
        print(f"{DATA} is missing; run `make assets`", file=sys.stderr)
        return 2
    trainers = [
        Trainer("sftx packed", "sftx", packed=True),
        Trainer("sftx padded", "sftx", packed=False),
        Trainer("TRL packed (bfd)", "trl", packed=True),
        Trainer("LLaMA-Factory padded", "llamafactory", packed=False, python=options.llama_factory_python),
        Trainer("TRL padded", "trl", packed=False),
    ]
    chosen = [one for one in trainers if not options.trainers or one.name in options.trainers]
    absent = [one.name for one in chosen if not _is_installed(one)]
    chosen = [one for one in chosen if one.name not in absent]
    gemm_rates = []
    with tempfile.TemporaryDirectory(prefix="sftx-runs-") as directory:
        place = Path(directory)
        model, num_parameters = _prepare(place / "rows.jsonl", options.rows)
        for number in range(options.repeats):
            gemm_rates.append(_gemm_rate(options.dtype, options.threads))
            for trainer in chosen:
                print(f"{trainer.name}, run {number + 1} of {options.repeats}", flush=True)
                _run(trainer, place, model, options, seed=number)
    gemm_rate = statistics.median(gemm_rates)
    report = {
        "machine": f"{platform.machine()}, {options.threads} threads",
        "dtype": options.dtype,
        "trains": "all weights" if options.full else "LoRA r16",
        "rows": options.rows,
        "gemm_rate": gemm_rate,
        "trainers": {one.name: one.figures(gemm_rate, num_parameters) for one in chosen},
        "absent": absent,
        "versions": {one.needs: _version(one) for one in chosen} | _versions(),
    }
    is_void = _print(report)
    out = options.out or OUT / f"runs-{'full-' if options.full else ''}{options.dtype}.json"
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    picture = out.with_suffix(".png")
    _draw(report, picture)
    print(f"written: {out}, {picture}")
    return int(is_void)


def _is_installed(trainer: Trainer) -> bool:
    code = f"import importlib.util, sys; sys.exit(importlib.util.find_spec('{trainer.needs}') is None)"
    return subprocess.run([trainer.python, "-c", code], check=False).returncode == 0


def _version(trainer: Trainer) -> str:
    code = f"import importlib.metadata as m; print(m.version('{trainer.needs}'))"
    return subprocess.run([trainer.python, "-c", code], check=True, capture_output=True, text=True).stdout.strip()


def _prepare(target: Path, num_rows: int) -> tuple[str, int]:
    """Write rows as token ids with labels; return the model's directory and its number of parameters."""
    from sftx.config.options import EMBEDDED_MODEL
    from sftx.data.encoder import Encoder
    from sftx.model import names
    from sftx.model.load import load_spec, load_tokenizer
    from sftx.types import IGNORE_INDEX, Location
    from sftx_plugins.parsers.alpaca import Alpaca
    from sftx_plugins.templates.chatml import ChatML

    model = names.resolve(EMBEDDED_MODEL)
    tokenizer, spec = load_tokenizer(model), load_spec(model)
    encoder = Encoder(tokenizer, ChatML().sftx_template(tokenizer))
    parser, rows = Alpaca().sftx_parser(), []
    for number, record in enumerate(json.loads(DATA.read_text(encoding="utf-8")), 1):
        (conversation,) = parser.parse(record, Location(DATA.name, number))
        ids, mask, _ = encoder.encode_segments(encoder.template.render(conversation))
        if len(ids) <= LENGTH:
            labels = [int(token) if trained else IGNORE_INDEX for token, trained in zip(ids, mask, strict=True)]
            rows.append({"input_ids": [int(token) for token in ids], "labels": labels})
    target.write_text("".join(json.dumps(row) + "\n" for row in rows[:num_rows]), encoding="utf-8")
    return str(model), spec.skeleton.num_parameters()


def _gemm_rate(dtype: str, threads: int) -> float:
    """Return operations a second of a product of [2048, 576] and [576, 1536], in a process of its own."""
    code = (
        "import time, torch\n"
        f"torch.set_num_threads({threads})\n"
        f"a, b = torch.randn(2048, 576, dtype=torch.{dtype}), torch.randn(576, 1536, dtype=torch.{dtype})\n"
        "best = 1e9\n"
        "for _ in range(60):\n"
        "    start = time.perf_counter(); a @ b; best = min(best, time.perf_counter() - start)\n"
        "print(2 * 2048 * 576 * 1536 / best)"
    )
    return float(subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout)


def _run(trainer: Trainer, place: Path, model: str, options: argparse.Namespace, *, seed: int) -> None:
    """Run a trainer in a process of its own, and add what it took to its figures."""
    settings: dict[str, Any] = {
        "model": model,
        "data": str(place / "rows.jsonl"),
        "output_dir": str(place / f"{trainer.name.replace(' ', '-')}-{seed}"),
        "result": str(place / "steps.json"),
        "dtype": options.dtype,
        "lora": not options.full,
        "packed": trainer.packed,
        "rows": 4 if trainer.packed else 8,
        "max_length": LENGTH,
        "learning_rate": 1e-5 if options.full else 1e-4,
        "threads": options.threads,
        "seed": seed,
    }
    is_sftx = trainer.needs == "sftx"
    (place / "settings.json").write_text(json.dumps(settings), encoding="utf-8")
    other = [trainer.python, str(HERE / f"run_{trainer.needs}.py"), str(place / "settings.json")]
    environment = os.environ | {"OMP_NUM_THREADS": str(options.threads), "TOKENIZERS_PARALLELISM": "false"}
    with (place / "log.txt").open("w", encoding="utf-8") as log:
        start = time.time()
        process = subprocess.Popen(
            _sftx_command(settings) if is_sftx else other, stdout=log, stderr=subprocess.STDOUT, env=environment
        )
        _, status, usage = os.wait4(process.pid, 0)
    if status != 0:
        raise SystemExit(f"{trainer.name} failed:\n{(place / 'log.txt').read_text(encoding='utf-8')[-2000:]}")
    steps = _sftx_steps(Path(settings["output_dir"])) if is_sftx else json.loads(Path(settings["result"]).read_text())
    measured, labels = steps[WARM_UP:], sum(step["label_tokens"] for step in steps)
    trainer.seconds.append(sum(step["seconds"] for step in measured))
    trainer.tokens.append(sum(int(step["tokens"]) for step in measured))
    trainer.label_tokens.append(sum(int(step["label_tokens"]) for step in measured))
    trainer.losses.append(sum(step["loss"] * step["label_tokens"] for step in steps) / labels)
    trainer.first_step.append(steps[0]["ended"] - start)
    trainer.peak_bytes.append(usage.ru_maxrss * 1024)


def _sftx_command(settings: dict[str, Any]) -> list[str]:
    options = {
        "model": settings["model"],
        "data": settings["data"],
        "max-length": settings["max_length"],
        "train-batch-size": settings["rows"],
        "per-device-train-batch-size": settings["rows"],
        "learning-rate": settings["learning_rate"],
        "lr-scheduler-type": "constant",
        "weight-decay": 0,
        "num-train-epochs": 1,
        "seed": settings["seed"],
        "output-dir": settings["output_dir"],
    }
    plugins = ["tokens", *(["lora"] if settings["lora"] else []), *(["packed"] if settings["packed"] else [])]
    return [
        sys.executable, "-m", "sftx", "run",
        *(part for name in plugins for part in ("--plugin", name)),
        *(part for name, value in options.items() for part in (f"--{name}", str(value))),
        *(["--set", "lora.lora_alpha=32"] if settings["lora"] else []),
        "--use-cpu", "--bf16" if settings["dtype"] == "bfloat16" else "--no-bf16", "--save-strategy", "no",
    ]  # fmt: skip


def _sftx_steps(directory: Path) -> list[dict[str, float]]:
    """Read the steps of a run. The first one ended so long before the last line was written as the others took."""
    path = directory / "metrics.jsonl"
    lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    steps = [line for line in lines if line["event"] == "step"]
    ended = path.stat().st_mtime - sum(step["seconds"] for step in steps[1:])
    names = {"tokens": "num_input_tokens", "label_tokens": "num_label_tokens", "seconds": "seconds", "loss": "loss"}
    return [{name: step[own] for name, own in names.items()} | {"ended": ended} for step in steps]


def _versions() -> dict[str, str]:
    versions = {}
    for name in ("torch", "transformers", "peft"):
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            continue
    return versions


def _print(report: dict[str, Any]) -> bool:
    """Print the table; return whether the losses differ, which makes the comparison void."""
    print(f"{report['machine']}, {report['dtype']}, {report['trains']}, GEMM {report['gemm_rate'] / 1e9:.0f} GFLOP/s")
    trainers: dict[str, dict[str, float]] = report["trainers"]
    name_of_last, last = list(trainers.items())[-1]
    for name, figures in trainers.items():
        print(
            f"{name:>20}: {figures['tokens_per_second']:7.1f} tokens/s "
            f"({figures['tokens_per_second'] / last['tokens_per_second']:.2f} times {name_of_last}), "
            f"{figures['share_of_gemm_rate']:.0%} of the products' rate, first step "
            f"{figures['first_step_seconds']:.1f} s, peak {figures['peak_bytes'] / 1e9:.2f} GB "
            f"({figures['peak_bytes'] / last['peak_bytes']:.2f} times), loss {figures['loss']:.4f}"
        )
    if report["absent"]:
        print(f"not installed: {', '.join(report['absent'])}")
    losses = [figures["loss"] for figures in trainers.values()]
    is_void = max(losses) > min(losses) * (1 + LOSS_TOLERANCE)
    if is_void:
        print(f"void: the losses differ by more than {LOSS_TOLERANCE:.0%}, so that not the same was trained")
    return is_void


def _draw(report: dict[str, Any], target: Path) -> None:
    """Draw speed, memory and the time to the first step as bars, a trainer a line."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    trainers: dict[str, dict[str, float]] = report["trainers"]
    panels = [("tokens_per_second", 1, "non-padding tokens/s"), ("peak_bytes", 1e-9, "peak memory, GB"),
              ("first_step_seconds", 1, "seconds to the end of the first step")]  # fmt: skip
    figure = Figure(figsize=(10, 0.6 + 0.5 * len(trainers)), layout="constrained")
    FigureCanvasAgg(figure)
    names = list(trainers)[::-1]
    for axes, (key, factor, title) in zip(figure.subplots(1, len(panels), sharey=True), panels, strict=True):
        values = [trainers[name][key] * factor for name in names]
        bars = axes.barh(names, values, color=["#0072B2" if name.startswith("sftx") else "#999999" for name in names])
        axes.bar_label(bars, fmt="%.4g", padding=3)
        axes.set_title(title, fontsize=10)
        axes.set_xlim(0, max(values) * 1.2)
        axes.spines[["top", "right"]].set_visible(False)
    figure.suptitle(f"{report['trains']}, {report['dtype']}, {report['machine']}", fontsize=10)
    figure.savefig(target, dpi=120)


if __name__ == "__main__":
    sys.exit(main())
