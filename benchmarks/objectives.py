"""Measure how far GRPO and DPO raise the share of exact answers of the embedded model after supervised fine-tuning.

1. A short supervised run (`--sft-steps`) on the demo data reaches a middling share of exact matches on held-out rows.
2. GRPO goes on from its adapter, with the exact match of a sampled answer with the row's own as the only reward.
3. DPO goes on from the same adapter, on pairs of a right and a wrong answer that the supervised model itself sampled
   (`--samples` answers a row at temperature 1); a row whose answers are all right, or all wrong, gives no pair.

2 and 3 run once for each seed. The shares of exact matches are those of greedy answers to the first `--held-out` rows
that the demo holds out, which no run trains on. `python benchmarks/objectives.py` writes
benchmarks/results/cpu/objectives.json and a picture beside it.
"""

from __future__ import annotations

import argparse
import json
import platform
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

ROOT: Final = Path(__file__).resolve().parents[1]
DEMO: Final = ROOT / "sftx" / "demo"
OUT: Final = ROOT / "benchmarks" / "results" / "cpu" / "objectives.json"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--sft-steps", type=int, default=20)
    parser.add_argument("--grpo-steps", type=int, default=16)
    parser.add_argument("--dpo-steps", type=int, default=16)
    parser.add_argument("--held-out", type=int, default=100, help="held-out rows that are asked")
    parser.add_argument("--rows", type=int, default=160, help="training rows that answers are sampled for")
    parser.add_argument("--samples", type=int, default=4)
    parser.add_argument("--out", type=Path, default=OUT)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="sftx-objectives-") as directory:
        report = compare(options, Path(directory))
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    draw(report, options.out.with_suffix(".png"))
    return 0


def compare(options: argparse.Namespace, work: Path) -> dict[str, Any]:
    """Train all and return the share of exact matches by step of each run."""
    held_out = copy_rows(DEMO / "held_out.jsonl", work / "held_out.jsonl", options.held_out)
    train = copy_rows(DEMO / "train.jsonl", work / "train.jsonl", None)
    sft = run(
        work / "sft",
        ["lora"],
        train,
        held_out,
        options.sft_steps,
        seed=0,
        rows=4,
        options={"train.learning_rate": 2e-3},
    )
    begin = {"lora.init_from": str(work / "sft" / "adapter")}
    pairs = make_pairs(work, copy_rows(train, work / "asked.jsonl", options.rows), options.samples)
    report: dict[str, Any] = {
        "machine": platform.processor() or platform.machine(),
        "options": {name: value for name, value in vars(options).items() if name != "out"},
        "num_pairs": pairs,
        "sft": sft,
        "grpo": [],
        "dpo": [],
    }
    for seed in range(options.seeds):
        grpo = {"grpo.num_generations": 8, "grpo.max_completion_length": 48, "grpo.temperature": 1.0}
        report["grpo"].append(
            run(
                work / f"grpo-{seed}", ["lora", "grpo", "reward-exact-match"], train, held_out, options.grpo_steps,
                seed=seed, options={**begin, **grpo, "train.learning_rate": 3e-4},
            )
        )  # fmt: skip
        report["dpo"].append(
            run(
                work / f"dpo-{seed}", ["lora", "dpo"], work / "pairs.jsonl", as_pairs(held_out), options.dpo_steps,
                seed=seed, options={**begin, "train.learning_rate": 5e-5},
            )
        )  # fmt: skip
        print(json.dumps({name: report[name][-1] for name in ("grpo", "dpo")}), flush=True)
    return report


def copy_rows(source: Path, target: Path, num_rows: int | None) -> Path:
    """Write the first rows of a file, or all, into another one."""
    lines = source.read_text(encoding="utf-8").splitlines(keepends=True)
    target.write_text("".join(lines[:num_rows]), encoding="utf-8")
    return target


def run(
    directory: Path,
    plugins: Sequence[str],
    train: Path,
    held_out: Path,
    num_steps: int,
    *,
    seed: int,
    rows: int = 8,
    options: Mapping[str, Any] | None = None,
) -> list[tuple[int, float]]:
    """Train, and return pairs of a step and the share of exact matches after it; the first is before training."""
    command = [
        sys.executable, "-m", "sftx", "run", "--output-dir", str(directory), "--data", str(train),
        "--eval-data", str(held_out),
        *(part for name in ("chatml", "exact-match", *plugins) for part in ("--plugin", name)),
        "--max-steps", str(num_steps), "--train-batch-size", str(rows), "--per-device-train-batch-size", str(rows),
        "--eval-steps", str(max(1, num_steps // 2)), "--seed", str(seed), "--save-strategy", "no",
        "--set", "generation.max_new_tokens=48", "--lr-scheduler-type", "constant",
        *(part for name, value in (options or {}).items() for part in ("--set", f"{name}={value}")),
    ]  # fmt: skip
    finished(command)
    lines = (directory / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    events = [event for event in map(json.loads, lines) if event["event"] == "evaluate"]
    return [(event["step"], event["exact-match"]) for event in events]


def make_pairs(work: Path, asked: Path, num_samples: int) -> int:
    """Let the supervised model answer rows, write pairs of a right and a wrong answer, and return their number."""
    answers: dict[str, list[dict[str, Any]]] = {}
    for seed in range(num_samples):
        file = work / f"answers-{seed}.jsonl"
        command = [sys.executable, "-m", "sftx", "generate", str(work / "sft"), "--data", str(asked)]
        command += ["--out", str(file), "--temperature", "1", "--seed", str(seed)]
        finished([*command, "--max-new-tokens", "48", "--batch-size", "32"])
        for line in map(json.loads, file.read_text(encoding="utf-8").splitlines()):
            answers.setdefault(line["id"], []).append(line)
    pairs = []
    for lines in answers.values():
        right = [line for line in lines if line["answer"].strip() == line["label"].strip()]
        wrong = [line for line in lines if line["answer"].strip() != line["label"].strip()]
        if right and wrong:
            sides = {"chosen": right[0]["answer"], "rejected": wrong[0]["answer"]}
            messages = {side: [{"role": "assistant", "content": text}] for side, text in sides.items()}
            pairs.append({"prompt": lines[0]["messages"], **messages})
    (work / "pairs.jsonl").write_text("".join(f"{json.dumps(pair)}\n" for pair in pairs), encoding="utf-8")
    return len(pairs)


def as_pairs(held_out: Path) -> Path:
    """Write held-out rows as pairs, of which the metric reads the chosen side alone: the rejected one is another's."""
    rows = [json.loads(line)["messages"] for line in held_out.read_text(encoding="utf-8").splitlines()]
    pairs = [
        {"prompt": row[:-1], "chosen": row[-1:], "rejected": other[-1:]}
        for row, other in zip(rows, [*rows[1:], rows[0]], strict=True)
        if row[-1] != other[-1]
    ]
    target = held_out.with_name("held_out_pairs.jsonl")
    target.write_text("".join(f"{json.dumps(pair)}\n" for pair in pairs), encoding="utf-8")
    return target


def finished(command: Sequence[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{' '.join(command)}\n{done.stdout[-2000:]}{done.stderr[-2000:]}")


def draw(report: Mapping[str, Any], target: Path) -> None:
    """Draw the share of exact matches by step, a line for each seed."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 3.2), layout="constrained")
    FigureCanvasAgg(figure)
    for axes, name in zip(figure.subplots(1, 2, sharey=True), ("grpo", "dpo"), strict=True):
        for points in report[name]:
            steps, shares = zip(*points, strict=True)
            axes.plot(steps, shares, marker="o", markersize=3)
        axes.set_title(f"{name.upper()} after {report['sft'][-1][0]} supervised steps", fontsize=9)
        axes.set_xlabel("optimizer steps", fontsize=8)
        axes.set_ylim(0, 1)
        axes.tick_params(labelsize=8)
        axes.spines[["top", "right"]].set_visible(False)
    figure.axes[0].set_ylabel("exact answers to held-out rows", fontsize=8)
    figure.savefig(target, dpi=120)


if __name__ == "__main__":
    sys.exit(main())
