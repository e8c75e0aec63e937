"""Short runs that teach the tiny model to answer, so that answers can be compared between loaders."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from sftx.config.loading import load
from sftx.training import run

MAX_NEW_TOKENS = 12
SOUNDS = {
    "cat": "meow",
    "dog": "woof",
    "cow": "moo",
    "owl": "hoot hoot",
    "bee": "buzz",
    "duck": "quack",
    "lion": "roar",
}
QUESTIONS = [" ".join([animal] * 3) for animal in SOUNDS]
"""The held-out questions, in the order of their rows."""


def write_rows(directory: Path) -> None:
    """Write train.jsonl and held.jsonl, and other.jsonl, which answers each question with the next animal's sound."""
    others = dict(zip(SOUNDS, [*list(SOUNDS.values())[1:], "meow"], strict=True))
    for name, sounds, repeats in (
        ("train", SOUNDS, (2, 3, 4, 5)),
        ("held", SOUNDS, (3,)),
        ("other", others, (2, 3, 4)),
    ):
        rows = [
            {
                "messages": [
                    {"role": "user", "content": " ".join([animal] * n)},
                    {"role": "assistant", "content": sound},
                ]
            }
            for animal, sound in sounds.items()
            for n in repeats
        ]
        (directory / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def train(rows: Path, out: Path, *plugins: str, **options: Any) -> Path:
    """Run on these rows with checkpoints and answers; return the run directory. `__` in a name stands for a dot."""
    values = {
        "data.train": str(rows / "train.jsonl"),
        "data.eval": str(rows / "held.jsonl"),
        "data.max_overlap": 1,
        "output_dir": str(out),
        "train.learning_rate": 1e-2,
        "train.num_train_epochs": 30,
        "train.save_steps": 30,
        "train.eval_steps": 30,
        "train.logging_steps": 5,
        "generation.max_new_tokens": MAX_NEW_TOKENS,
        "generation.num_samples": 7,
    } | {name.replace("__", "."): value for name, value in options.items()}
    assignments = [(name, value, f"--set {name}") for name, value in values.items()]
    return run(load(None, add=["chatml", "exact-match", *plugins], assignments=assignments)).output_dir


def answers_of(out: Path) -> list[str]:
    """Return the run's own answers to QUESTIONS at its end."""
    samples = json.loads((out / "summary.json").read_text(encoding="utf-8"))["samples"]
    written = [json.loads(line) for line in (out / "generated_predictions.jsonl").read_text().splitlines()]
    assert [line["predict"] for line in written] == [sample["after"] for sample in samples]
    assert len({sample["after"] for sample in samples}) > 3, "answers that are all alike show little"
    return [sample["after"] for sample in samples]
