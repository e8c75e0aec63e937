"""Measure GRPO on the embedded model with LoRA, on a CPU with one thread, beside TRL's GRPOTrainer.

    python benchmarks/grpo.py [--rounds 2] [--steps 5] [--out benchmarks/results/cpu/grpo.json]

Both ask the same prompts (requests of the alpaca demo set, `make assets`) in the model's own chat template, sample as
many answers to each at temperature 1, reward short words, and take as many steps of the same learning rate, in fp32.
Each run is a process of its own, and the runs take turns. The sampled answers differ, so time is given for each sampled
token: that of the whole step, with sampling, rewards, log-probabilities, the backward pass and the update. The first
step is left out. `work` is time of the processor, which other processes change little.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any, Final

from preference import clocks, measured_process

ROOT: Final = Path(__file__).resolve().parents[1]
DATA: Final = ROOT / ".assets" / "llamafactory" / "alpaca_en_demo.json"
QUESTIONS, ANSWERS, LENGTH, LEARNING_RATE = 2, 8, 64, 1e-5
KINDS: Final = ("sftx padded", "sftx packed", "trl padded")
REWARD: Final = """
def score(answer):
    words = answer.split()
    return -sum(map(len, words)) / max(len(words), 1)
"""


def write_rows(directory: Path, num: int) -> None:
    """Write requests that have an input of their own, which are the longer ones."""
    records = [record for record in json.loads(DATA.read_text(encoding="utf-8")) if record["input"]]
    rows = [[{"role": "user", "content": f"{r['instruction']}\n{r['input']}"}] for r in records[:num]]
    (directory / "rows.jsonl").write_text(
        "".join(json.dumps({"messages": row}) + "\n" for row in rows), encoding="utf-8"
    )
    (directory / "short_words.py").write_text(REWARD, encoding="utf-8")


def write_figures(directory: Path, ends: list[tuple[float, float]], tokens: list[int]) -> None:
    """Write seconds of work, seconds passed and sampled tokens of each step after the first."""
    steps = [
        {"work": end[0] - begin[0], "passed": end[1] - begin[1], "tokens": count}
        for (begin, end), count in zip(itertools.pairwise(ends), tokens[1:], strict=True)
    ]
    (directory / "steps.json").write_text(json.dumps(steps), encoding="utf-8")


def run_sftx(directory: Path, collator: str, steps: int) -> None:
    from sftx.cli import main
    from sftx.trainer.rollout import RolloutMaker
    from sftx.trainer.trainer import Trainer

    ends: list[tuple[float, float]] = []
    tokens: list[int] = []
    train_step, make = Trainer.train_step, RolloutMaker.__call__

    def timed(self: Trainer, *given: Any) -> Any:
        report = train_step(self, *given)
        ends.append(clocks())
        return report

    def counted(self: RolloutMaker, *given: Any) -> Any:
        made = make(self, *given)
        tokens.append(sum(example.num_label_tokens for example in made.examples))
        return made

    Trainer.train_step, RolloutMaker.__call__ = timed, counted  # type: ignore[method-assign]
    main.main(
        args=(
            f"run --data {directory}/rows.jsonl --plugin tokenizer --plugin lora --plugin grpo --plugin {collator} "
            f"--plugin reward-function --set reward-function.function={directory}/short_words.py:score --no-bf16 "
            f"--use-cpu --set grpo.num_generations={ANSWERS} --set grpo.max_completion_length={LENGTH} "
            f"--max-steps {steps} --learning-rate {LEARNING_RATE} --lr-scheduler-type constant "
            f"--train-batch-size {QUESTIONS} --per-device-train-batch-size {QUESTIONS} "
            f"--output-dir {directory}/sftx-{collator}"
        ).split(),
        prog_name="sftx",
        standalone_mode=False,
    )
    write_figures(directory, ends, tokens)


def run_trl(directory: Path, _: str, steps: int) -> None:
    from datasets import Dataset
    from peft import LoraConfig
    from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
    from trl import GRPOConfig, GRPOTrainer

    from sftx.config.options import EMBEDDED_MODEL
    from sftx.model.names import resolve

    model = resolve(EMBEDDED_MODEL)
    ends: list[tuple[float, float]] = []
    tokens: list[int] = []
    space: dict[str, Any] = {}
    exec(REWARD, space)

    def reward(completions: Any, completion_ids: Any, **_: Any) -> list[float]:
        tokens.append(sum(map(len, completion_ids)))
        return [space["score"](completion[-1]["content"]) for completion in completions]

    class Times(TrainerCallback):  # type: ignore[misc]
        def on_step_end(self, *_: Any, **__: Any) -> None:
            ends.append(clocks())

    rows = map(json.loads, (directory / "rows.jsonl").read_text(encoding="utf-8").splitlines())
    trainer = GRPOTrainer(
        AutoModelForCausalLM.from_pretrained(model, dtype="float32"),
        reward_funcs=[reward],
        args=GRPOConfig(
            output_dir=str(directory / "trl"),
            max_steps=steps,
            per_device_train_batch_size=QUESTIONS * ANSWERS,
            num_generations=ANSWERS,
            max_completion_length=LENGTH,
            learning_rate=LEARNING_RATE,
            lr_scheduler_type="constant",
            use_cpu=True,
            bf16=False,
            gradient_checkpointing=False,
            report_to="none",
            save_strategy="no",
            disable_tqdm=True,
        ),
        processing_class=AutoTokenizer.from_pretrained(model),
        train_dataset=Dataset.from_list([{"prompt": row["messages"]} for row in rows]),
        peft_config=LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM"),
        callbacks=[Times()],
    )
    trainer.train()
    write_figures(directory, ends, tokens)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    os.environ |= {"OMP_NUM_THREADS": "1", "SFTX_CACHE": tempfile.mkdtemp(), "TOKENIZERS_PARALLELISM": "false"}
    steps: dict[str, list[dict[str, float]]] = {kind: [] for kind in KINDS}
    peaks: dict[str, float] = {}
    for number in range(options.rounds):
        for kind in KINDS:
            with tempfile.TemporaryDirectory(prefix="sftx-grpo-") as place:
                directory = Path(place)
                write_rows(directory, QUESTIONS * options.steps)
                tool, collator = kind.split()
                peak = measured_process(f"grpo.run_{tool}(Path({place!r}), {collator!r}, {options.steps})", kind)
                steps[kind] += json.loads((directory / "steps.json").read_text(encoding="utf-8"))
                peaks[kind] = max(peak, peaks.get(kind, 0.0))
            load = ", ".join(f"{value:.1f}" for value in os.getloadavg())
            print(f"round {number + 1}, {kind}: {steps[kind][1 - options.steps :]}, load {load}", flush=True)
    figures = {
        kind: {
            "tokens_per_second_of_work": statistics.median(step["tokens"] / step["work"] for step in of_kind),
            "tokens_per_second": statistics.median(step["tokens"] / step["passed"] for step in of_kind),
            "tokens_per_step": statistics.mean(step["tokens"] for step in of_kind),
            "peak_gb": peaks[kind],
        }
        for kind, of_kind in steps.items()
    }
    print(f"\n{QUESTIONS} questions of {ANSWERS} answers a step\n")
    print("| | sampled tokens a s of work | a s passed | tokens a step | peak GB |\n| --- | --- | --- | --- | --- |")
    for kind, one in figures.items():
        print(f"| {kind} |" + "|".join(f" {value:.2f} " for value in one.values()) + "|")
    if options.out is not None:
        settings = {"questions": QUESTIONS, "answers": ANSWERS, "max_completion_length": LENGTH, "dtype": "float32"}
        options.out.write_text(json.dumps({"settings": settings, **figures}, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())
