"""Ten thousand micro-batches leave the process as large as it was: nothing is kept of a step but its counters."""

from __future__ import annotations

import json
import multiprocessing
import os
import statistics
import sys
from pathlib import Path
from typing import Any

import pytest

from sftx.config.loading import load
from sftx.run import run

MICRO_BATCHES, ACCUMULATION = 10_000, 4
LEAKING = 2_500
"""Micro-batches after those, which keep something on purpose."""
BOUND = 60.0
"""Bytes a micro-batch. The smallest thing that Python can keep of one, a list with one number in it, takes 96."""
BLOCKS = 10
T_OF_9 = 2.262
"""Student's t of 9 degrees of freedom, which 97.5 % lie under."""

Sample = tuple[int, int]
"""Micro-batches that are done, and resident bytes."""


def upper_growth(samples: list[Sample]) -> float:
    """Bytes a micro-batch that resident memory grows by at most, with 97.5 % confidence.

    The allocator takes and returns pages in bursts, so that neighbouring samples say the same: the slope is fitted by
    least squares in each of BLOCKS equal stretches, and its error is that of the mean of these.
    """
    size = len(samples) // BLOCKS
    stretches = [samples[at * size : (at + 1) * size + 1] for at in range(BLOCKS)]
    slopes = [statistics.linear_regression(*zip(*stretch, strict=True)).slope for stretch in stretches]
    return statistics.fmean(slopes) + T_OF_9 * statistics.stdev(slopes) / BLOCKS**0.5


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def small_model(directory: Path) -> Path:
    """A Llama of one layer: what is looked at is the engine around it."""
    from transformers import LlamaConfig, LlamaForCausalLM

    from sftx.model.tiny import make_tokenizer

    tokenizer = make_tokenizer()
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=128,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    LlamaForCausalLM(config).save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return directory


def measured(directory: Path) -> list[Sample]:
    """Trains in this process; after MICRO_BATCHES each one leaves something behind."""
    from sftx.trainer.trainer import Trainer

    words = ["one", "two", "three", "four", "five"]
    rows = [{"prompt": f"{n}", "completion": " ".join(words[: 1 + n % 5])} for n in range(64)]
    (directory / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    samples: list[Sample] = []
    kept: list[list[float]] = []
    step = Trainer.step

    def sampled(trainer: Trainer, number: int, *rest: Any) -> Any:
        report = step(trainer, number, *rest)
        done = number * ACCUMULATION
        if done > MICRO_BATCHES:
            kept.extend([float(number)] for _ in range(ACCUMULATION))
        if number % 5 == 0:
            samples.append((done, resident_bytes()))
        return report

    Trainer.step = sampled  # type: ignore[method-assign]
    given = {
        "model": str(small_model(directory / "model")),
        "data.train": str(directory / "rows.jsonl"),
        "output_dir": str(directory / "run"),
        "plugins.lora.target_modules": ["q_proj", "down_proj"],
        "plugins.lora.lora_dropout": 0.1,
        "train.per_device_train_batch_size": 1,
        "train.gradient_accumulation_steps": ACCUMULATION,
        "train.max_steps": (MICRO_BATCHES + LEAKING) // ACCUMULATION,
        "train.logging_steps": 500,
    }
    run(load(None, add=["chatml", "lora"], assignments=[(name, value, name) for name, value in given.items()]))
    return samples


@pytest.mark.skipif(sys.platform != "linux", reason="/proc/self/statm is Linux's")
def test_memory_does_not_grow_with_the_steps(tmp_path: Path) -> None:
    # A process of its own: in one that has had gigabytes and given them back, a leak would fill the holes unseen.
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        samples = pool.apply(measured, (tmp_path,))
    # Half of them fill what fills only once: caches, the allocator's free lists.
    settled = [sample for sample in samples if MICRO_BATCHES / 2 < sample[0] <= MICRO_BATCHES]
    leaking = [sample for sample in samples if sample[0] > MICRO_BATCHES]
    assert upper_growth(settled) < BOUND, f"{upper_growth(settled):.0f} bytes a micro-batch"
    assert upper_growth(leaking) > BOUND, f"{upper_growth(leaking):.0f}: a leak would not be seen"
