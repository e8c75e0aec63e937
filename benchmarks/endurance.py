"""Measure whether the memory of a run grows, by sampling it while the embedded model trains for an hour.

The run uses LoRA r16 on all linear layers, packed rows of 512 tokens and two micro-batches a step, and regularly
evaluates and answers held-out rows and saves checkpoints. It is `sftx run` in a process of its own, which SIGTERM ends.
The first quarter of the time (first evaluation, first checkpoint, caches that fill) is warm-up. After it, each
micro-batch makes memory rise and fall by a fifth, so that only the minimum of each of nine equal periods is used. The
samples, and the growth of a line fitted to these nine minima by least squares, relative to its beginning, are written
to benchmarks/results/cpu/endurance.json, or to --out. Linux only, because memory is read from /proc.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import signal
import statistics
import subprocess
import sys
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
OUT = ROOT / "benchmarks" / "results" / "cpu" / "endurance.json"
MAX_GROWTH = 0.01
WARM_UP, PERIODS = 0.25, 9
COMMAND = (
    "run --plugin chatml --plugin lora --plugin packed --plugin exact-match --set packed.length=512 --max-length 512 "
    "--data sftx:demo/train.jsonl --eval-data held_out.jsonl --per-device-train-batch-size 1 "
    "--gradient-accumulation-steps 2 --max-steps 1000000 --max-rows 8 --max-new-tokens 24 "
    "--per-device-eval-batch-size 4 --eval-steps {eval_steps} --save-minutes {save_minutes} --save-total-limit 2 "
    "--logging-steps 10 --use-cpu --output-dir run"
)
HELD_OUT_ROWS = 40


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=60.0, help="minutes of training (60)")
    parser.add_argument("--every", type=float, default=5.0, help="seconds between two samples (5)")
    parser.add_argument("--directory", type=Path, default=Path("endurance"), help="directory of the run (endurance)")
    parser.add_argument("--out", type=Path, default=OUT)
    parser.add_argument("--again", action="store_true", help="only report on the samples in the directory")
    options = parser.parse_args()
    if not Path("/proc/self/statm").is_file():
        print("/proc is needed, which this system lacks", file=sys.stderr)
        return 2
    if options.again:
        samples = [(s, b) for s, b in json.loads((options.directory / "samples.json").read_text(encoding="utf-8"))]
        return _conclude(samples, options.directory / "run", options.out)
    if options.directory.exists():
        print(f"{options.directory} exists already; name another with --directory", file=sys.stderr)
        return 2
    samples, code = _run(options.directory, options.minutes, options.every)
    if code != 128 + signal.SIGTERM:
        print(f"the run ended with {code}; see {options.directory}/stderr.txt", file=sys.stderr)
        return 1
    return _conclude(samples, options.directory / "run", options.out)


def _conclude(samples: list[tuple[float, int]], run: Path, out: Path) -> int:
    report = _report(samples, run)
    _print(report)
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(report) + "\n", encoding="utf-8")
    print(f"written: {out}")
    return int(not report["growth"] < MAX_GROWTH)


def _run(directory: Path, minutes: float, every: float) -> tuple[list[tuple[float, int]], int]:
    """Run the training, and return its samples (seconds since the first step, resident bytes) and its exit code."""
    directory.mkdir(parents=True)
    held_out = (ROOT / "sftx" / "demo" / "held_out.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
    (directory / "held_out.jsonl").write_text("".join(held_out[:HELD_OUT_ROWS]), encoding="utf-8")
    command = COMMAND.format(eval_steps=max(1, round(minutes / 2)), save_minutes=minutes / 12)
    metrics, samples = directory / "run" / "metrics.jsonl", []
    with (
        (directory / "stdout.txt").open("w") as out,
        (directory / "stderr.txt").open("w") as err,
        subprocess.Popen(
            [sys.executable, "-m", "sftx", *command.split()], cwd=directory, stdout=out, stderr=err
        ) as process,
    ):
        began: float | None = None
        while process.poll() is None:
            if began is None and metrics.exists() and '"event": "step"' in metrics.read_text(encoding="utf-8"):
                began = time.monotonic()
            if began is not None:
                seconds = time.monotonic() - began
                samples.append((seconds, _resident_bytes(process.pid)))
                (directory / "samples.json").write_text(json.dumps(samples), encoding="utf-8")
                if seconds >= 60 * minutes:
                    process.send_signal(signal.SIGTERM)
                    process.wait()
                    break
            time.sleep(every)
    code = process.returncode
    return samples, code if code >= 0 else 128 - code


def _resident_bytes(pid: int) -> int:
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def _report(samples: list[tuple[float, int]], run: Path) -> dict[str, Any]:
    end = samples[-1][0]
    settled = [(seconds, resident) for seconds, resident in samples if seconds >= WARM_UP * end]
    length = (end - settled[0][0]) / PERIODS
    minima: dict[int, int] = {}
    for seconds, resident in settled:
        period = min(PERIODS - 1, int((seconds - settled[0][0]) / length))
        minima[period] = min(resident, minima.get(period, resident))
    line = statistics.linear_regression(list(minima), list(minima.values()))
    events = [json.loads(text) for text in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    steps = [event for event in events if event["event"] == "step"]
    return {
        "machine": f"{platform.machine()}, {os.environ.get('OMP_NUM_THREADS', os.cpu_count())} threads",
        "torch": version("torch"),
        "transformers": version("transformers"),
        "command": COMMAND,
        "minutes": end / 60,
        "steps": len(steps),
        "micro_batches": 2 * len(steps),
        "tokens": sum(step["num_input_tokens"] for step in steps),
        "evaluations": len(events) - len(steps),
        "loss": [steps[0]["loss"], steps[-1]["loss"]],
        "warm_up_minutes": WARM_UP * end / 60,
        "bytes_after_warm_up": line.intercept,
        "floors": list(minima.values()),
        "growth": line.slope * (PERIODS - 1) / line.intercept,
        "highest_bytes": max(resident for _, resident in settled),
        "samples": [[round(seconds, 1), resident] for seconds, resident in samples],
    }


def _print(report: dict[str, Any]) -> None:
    print(f"{report['machine']}, torch {report['torch']}, transformers {report['transformers']}")
    print(
        f"{report['minutes']:.1f} minutes: {report['steps']} steps, {report['tokens']} tokens, "
        f"{report['evaluations']} evaluations, loss {report['loss'][0]:.3f} -> {report['loss'][1]:.3f}"
    )
    missed = "" if report["growth"] < MAX_GROWTH else ", missed"
    print(
        f"resident memory {report['bytes_after_warm_up'] / 1e6:.0f} MB after {report['warm_up_minutes']:.0f} minutes; "
        f"growth since {report['growth']:+.2%} (goal under {MAX_GROWTH:.0%}{missed}), "
        f"highest {report['highest_bytes'] / 1e6:.0f} MB"
    )


if __name__ == "__main__":
    sys.exit(main())
