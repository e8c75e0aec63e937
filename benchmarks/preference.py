"""Measure DPO on the embedded model with LoRA, on a CPU with one thread: sftx with both references, beside TRL.

    python benchmarks/preference.py [--rounds 2] [--steps 6]

Each run is a process of its own on the same token ids, in fp32, and the runs take turns. Printed are the median seconds
that the processor worked for a step after the first, which other processes change little, those that passed, tokens a
second of the former, and the peak memory of the process.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

PAIRS_PER_STEP, LEARNING_RATE = 2, 5e-5
KINDS = ("sftx adapters", "sftx precompute", "trl adapters", "trl precompute")


def write_rows(path: Path, num: int) -> None:
    """Write pairs whose prompts have some 80 tokens and whose answers have some 40."""
    rng = random.Random("preference")
    words = [
        "light",
        "kitchen",
        "blue",
        "music",
        "seven",
        "please",
        "wake",
        "river",
        "stone",
        "paper",
        "green",
        "table",
    ]

    def text(num_words: int) -> str:
        return " ".join(rng.choices(words, k=num_words))

    rows = [
        {
            "prompt": text(rng.randint(40, 100)),
            "chosen": text(rng.randint(20, 50)),
            "rejected": text(rng.randint(20, 50)),
        }
        for _ in range(num)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def arguments(directory: Path, kind: str, steps: int) -> list[str]:
    return (
        f"run --data {directory}/pairs.jsonl --plugin chatml --plugin lora --plugin dpo --no-bf16 --use-cpu "
        f"--set dpo.reference={kind} --set padded.group_by_length=false --max-steps {steps} --learning-rate "
        f"{LEARNING_RATE} --per-device-train-batch-size {PAIRS_PER_STEP} --output-dir {directory}/{kind}"
    ).split()


def write_ids(directory: Path, steps: int) -> None:
    """Write the token ids of the rows in the order in which sftx trains on them."""
    from sftx.config.loading import load
    from sftx.training import assemble

    options = {
        "data.train": str(directory / "pairs.jsonl"),
        "output_dir": str(directory / "never"),
        "padded.group_by_length": False,
        "train.max_steps": steps,
        "train.per_device_train_batch_size": PAIRS_PER_STEP,
        "train.use_cpu": True,
    }
    session = assemble(load(None, add=["chatml", "lora", "dpo"], assignments=[(k, v, k) for k, v in options.items()]))
    rows = []
    for planned in session.sampler:
        for chosen, rejected in planned.rows:
            ids = {}
            for name, example in (("chosen", planned.examples[chosen]), ("rejected", planned.examples[rejected])):
                begin = example.loss_mask.tolist().index(True)
                ids |= {
                    "prompt_ids": example.token_ids[:begin].tolist(),
                    f"{name}_ids": example.token_ids[begin:].tolist(),
                }
            rows.append(ids)
    (directory / "ids.json").write_text(json.dumps(rows), encoding="utf-8")


def run_sftx(directory: Path, kind: str, steps: int) -> None:
    """Train with the command of sftx, and write the seconds of each step."""
    from sftx.cli import main
    from sftx.trainer.trainer import Trainer

    seconds: list[tuple[float, float]] = []
    train_step = Trainer.train_step

    def timed(self: Trainer, *given: Any) -> Any:
        begin = clocks()
        report = train_step(self, *given)
        seconds.append(passed(begin))
        return report

    Trainer.train_step = timed  # type: ignore[method-assign]
    main.main(args=arguments(directory, kind, steps), prog_name="sftx", standalone_mode=False)
    (directory / "seconds.json").write_text(json.dumps(seconds), encoding="utf-8")


def clocks() -> tuple[float, float]:
    return time.process_time(), time.perf_counter()


def passed(begin: tuple[float, float]) -> tuple[float, float]:
    now = clocks()
    return now[0] - begin[0], now[1] - begin[1]


def run_trl(directory: Path, kind: str, steps: int) -> None:
    """Train with TRL's DPOTrainer on the token ids, and write the seconds of each step."""
    from datasets import Dataset
    from peft import LoraConfig
    from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
    from trl import DPOConfig, DPOTrainer

    from sftx.config.options import EMBEDDED_MODEL
    from sftx.model.names import resolve

    model = resolve(EMBEDDED_MODEL)
    seconds: list[tuple[float, float]] = []

    class Times(TrainerCallback):  # type: ignore[misc]
        def on_step_begin(self, *_: Any, **__: Any) -> None:
            self.begin = clocks()

        def on_step_end(self, *_: Any, **__: Any) -> None:
            seconds.append(passed(self.begin))

    class Trainer(DPOTrainer):  # type: ignore[misc]
        def _prepare_dataset(self, dataset: Any, *_: Any) -> Any:
            return dataset  # tokenised already

    trainer = Trainer(
        AutoModelForCausalLM.from_pretrained(model, dtype="float32"),
        args=DPOConfig(
            output_dir=str(directory / "trl"),
            max_steps=steps,
            per_device_train_batch_size=PAIRS_PER_STEP,
            learning_rate=LEARNING_RATE,
            use_cpu=True,
            bf16=False,
            gradient_checkpointing=False,
            report_to="none",
            save_strategy="no",
            train_sampling_strategy="sequential",
            disable_tqdm=True,
            precompute_ref_log_probs=kind == "precompute",
        ),
        processing_class=AutoTokenizer.from_pretrained(model),
        train_dataset=Dataset.from_list(json.loads((directory / "ids.json").read_text())),
        peft_config=LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM"),
        callbacks=[Times()],
    )
    trainer.train()
    (directory / "seconds.json").write_text(json.dumps(seconds), encoding="utf-8")


def measured(directory: Path, kind: str, steps: int) -> tuple[list[tuple[float, float]], float]:
    """Run in a process of its own; return its steps' seconds of work and of waiting, and its peak memory in GB."""
    tool, reference = kind.split()
    shutil.rmtree(directory / reference, ignore_errors=True)
    peak = measured_process(f"preference.run_{tool}(Path({str(directory)!r}), {reference!r}, {steps})", kind)
    return json.loads((directory / "seconds.json").read_text(encoding="utf-8")), peak


def measured_process(call: str, name: str) -> float:
    """Call a function of a module of this directory in a process of its own; return its peak memory in GB."""
    code = (
        f"import sys; from pathlib import Path; sys.path.insert(0, {str(Path(__file__).parent)!r}); "
        f"import {call.partition('.')[0]}; {call}"
    )
    child = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    assert child.stderr is not None
    said = child.stderr.read().decode()
    _, status, usage = os.wait4(child.pid, 0)
    if status:
        raise SystemExit(f"{name} failed:\n{said[-2000:]}")
    return usage.ru_maxrss / 1e6


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--steps", type=int, default=6)
    options = parser.parse_args()
    os.environ |= {"OMP_NUM_THREADS": "1", "SFTX_CACHE": tempfile.mkdtemp(), "TOKENIZERS_PARALLELISM": "false"}
    directory = Path(tempfile.mkdtemp())
    write_rows(directory / "pairs.jsonl", PAIRS_PER_STEP * options.steps)
    write_ids(directory, options.steps)
    rows = json.loads((directory / "ids.json").read_text())
    tokens = sum(2 * len(r["prompt_ids"]) + len(r["chosen_ids"]) + len(r["rejected_ids"]) for r in rows)
    seconds: dict[str, list[tuple[float, float]]] = {kind: [] for kind in KINDS}
    peaks: dict[str, float] = {}
    for number in range(options.rounds):
        for kind in KINDS:
            steps, peak = measured(directory, kind, options.steps)
            seconds[kind] += steps[1:]
            peaks[kind] = max(peak, peaks.get(kind, 0.0))
            load = ", ".join(f"{value:.1f}" for value in os.getloadavg())
            print(f"round {number + 1}, {kind}: {[round(own, 2) for own, _ in steps]} s, load {load}", flush=True)
    print(f"\n{len(rows)} pairs, {tokens / options.steps:.0f} tokens a step of {PAIRS_PER_STEP} pairs\n")
    print("| | s of work a step | s passed | tokens a s of work | peak GB |\n| --- | --- | --- | --- | --- |")
    for kind in KINDS:
        work, waited = (statistics.median(column) for column in zip(*seconds[kind], strict=True))
        print(f"| {kind} | {work:.2f} | {waited:.2f} | {tokens / options.steps / work:.0f} | {peaks[kind]:.2f} |")


if __name__ == "__main__":
    main()
