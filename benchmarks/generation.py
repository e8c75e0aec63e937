"""Compare batched generation with generation of one row at a time, on the demo's held-out rows.

The embedded model answers in fp32: all rows in batches of `--batch-size`, and `--single` evenly spaced rows one at a
time. The two alternate, so that other load of the machine slows both. The speedup is the ratio of seconds a row, by
wall time and by CPU time of the process (which, with one thread, does not include other processes). Both must give the
same answer to a row. The result is written to benchmarks/results/cpu/generation.json, or to --out. The exit code is 1
for a speedup of less than five, or when an answer differs.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch

from sftx.assembly.registry import activate
from sftx.config import loading
from sftx.data.pipeline import build_pipeline
from sftx.model.generation import generate_greedy
from sftx.model.language_model import CausalLM
from sftx.model.load import load_model, load_spec

ROOT = Path(__file__).resolve().parents[1]
OUT = ROOT / "benchmarks" / "results" / "cpu" / "generation.json"
MIN_SPEEDUP = 5.0


@dataclass
class TimedGeneration:
    """Generates answers and keeps them with the time they took."""

    lm: CausalLM
    stop_ids: Sequence[int]
    max_new_tokens: int
    wall_s: float = 0.0
    cpu_s: float = 0.0
    answers: dict[int, list[int]] = field(default_factory=dict)

    def answer(self, prompts: Sequence[Sequence[int]], rows: Sequence[int], batch_size: int) -> None:
        """Generate the answers to the prompts of these rows."""
        wall, cpu = time.perf_counter(), time.process_time()
        answers = list(
            generate_greedy(
                self.lm,
                [prompts[row] for row in rows],
                max_new_tokens=self.max_new_tokens,
                stop_ids=self.stop_ids,
                batch_size=batch_size,
            )
        )
        self.wall_s += time.perf_counter() - wall
        self.cpu_s += time.process_time() - cpu
        self.answers.update((rows[index], answer) for index, answer in answers)

    def summary(self) -> dict[str, float]:
        num = len(self.answers)
        return {
            "rows": num,
            "wall_s_per_row": self.wall_s / num,
            "cpu_s_per_row": self.cpu_s / num,
            "tokens_per_answer": sum(map(len, self.answers.values())) / num,
        }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch-size", type=int, help="by default the demo's")
    parser.add_argument("--single", type=int, default=20, help="rows answered one at a time")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, default=OUT)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)

    loaded = loading.load(None, add=["chatml", "exact-match"])  # the embedded run file
    prepared = build_pipeline(loaded.config, activate(loaded), loaded.origins)
    prompts = [question.prompt_ids for question in prepared.load_eval(questions=True).questions]
    config = loaded.config
    batch_size = arguments.batch_size or config.generation.batch_size or config.train.per_device_eval_batch_size
    model = load_model(load_spec(prepared.model), [], dtype=torch.float32, device=torch.device("cpu"))
    lm = CausalLM(model, prepared.tokenizer)
    batched, single = (
        TimedGeneration(lm, prepared.encoder.stop_ids, config.generation.max_new_tokens) for _ in ("batched", "single")
    )
    list(generate_greedy(lm, prompts[:1], max_new_tokens=2, stop_ids=(), batch_size=1))  # warm-up

    by_length = sorted(range(len(prompts)), key=lambda row: len(prompts[row]))
    batches = [by_length[at : at + batch_size] for at in range(0, len(by_length), batch_size)]
    sample = [n * len(prompts) // arguments.single for n in range(arguments.single)]
    for turn, rows in enumerate(batches):
        single.answer(prompts, sample[turn :: len(batches)], 1)
        batched.answer(prompts, rows, batch_size)
        print(f"{turn + 1} of {len(batches)}", batched.summary(), single.summary(), flush=True)

    different = [row for row, answer in single.answers.items() if answer != batched.answers[row]]
    single_summary, batched_summary = single.summary(), batched.summary()
    result = {
        "cores": os.cpu_count(),
        "machine": platform.processor() or platform.machine(),
        "threads": arguments.threads,
        "load_average": os.getloadavg(),
        "batch_size": batch_size,
        "max_new_tokens": config.generation.max_new_tokens,
        "prompt_tokens": sum(map(len, prompts)) / len(prompts),
        "batched": batched_summary,
        "single": single_summary,
        "different_answers": len(different),
        "times_faster_wall": single_summary["wall_s_per_row"] / batched_summary["wall_s_per_row"],
        "times_faster_cpu": single_summary["cpu_s_per_row"] / batched_summary["cpu_s_per_row"],
    }
    print(json.dumps(result, indent=2))
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    return 0 if not different and min(result["times_faster_wall"], result["times_faster_cpu"]) >= MIN_SPEEDUP else 1


if __name__ == "__main__":
    raise SystemExit(main())
