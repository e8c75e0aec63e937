"""Memory does not grow with the number of steps: nothing of a step is kept but its counters."""

from __future__ import annotations

import gc
import json
import multiprocessing
import os
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

from sftx.config.loading import load
from sftx.training import run

MICRO_BATCHES, ACCUMULATION = 10_000, 4
LEAKING = 2_500
"""Micro-batches after those, each of which leaks a list on purpose."""
SHORT_MICRO_BATCHES, SHORT_LEAKING = 500, 100
BOUND = 60.0
"""Bytes a micro-batch. The smallest thing that Python can keep of one, a list with one number in it, takes 96."""
BLOCKS = 10
T_OF_9 = 2.262
"""Student's t of 9 degrees of freedom, which 97.5 % lie under."""

Sample = tuple[int, int]
"""Micro-batches that are done, and memory in use: resident bytes, or allocated blocks of Python."""


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


def allocated_blocks() -> int:
    gc.collect()
    return sys.getallocatedblocks()


def small_model(directory: Path) -> Path:
    """A Llama of one layer: the trainer around it is under test."""
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


def measured(
    directory: Path, num_settled: int, num_leaking: int, measure: Callable[[], int], *, logging_steps: int
) -> list[Sample]:
    """Trains in this process and measures every 5 steps; the last `num_leaking` micro-batches leak a list each."""
    from sftx.trainer.trainer import Trainer

    words = ["one", "two", "three", "four", "five"]
    rows = [{"prompt": f"{n}", "completion": " ".join(words[: 1 + n % 5])} for n in range(64)]
    (directory / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    samples: list[Sample] = []
    kept: list[list[float]] = []
    train_step = Trainer.train_step

    def sampled(trainer: Trainer, number: int, *rest: Any) -> Any:
        report = train_step(trainer, number, *rest)
        done = number * ACCUMULATION
        if done > num_settled:
            kept.extend([float(number)] for _ in range(ACCUMULATION))
        if number % 5 == 0:
            samples.append((done, measure()))
        return report

    given = {
        "model": str(small_model(directory / "model")),
        "data.train": str(directory / "rows.jsonl"),
        "output_dir": str(directory / "run"),
        "plugins.lora.target_modules": ["q_proj", "down_proj"],
        "plugins.lora.lora_dropout": 0.1,
        "train.per_device_train_batch_size": 1,
        "train.gradient_accumulation_steps": ACCUMULATION,
        "train.max_steps": (num_settled + num_leaking) // ACCUMULATION,
        "train.logging_steps": logging_steps,
    }
    assignments = [(name, value, name) for name, value in given.items()]
    loaded = load(None, add=["chatml", "lora"], remove=["progress"], assignments=assignments)
    with mock.patch.object(Trainer, "train_step", sampled):
        run(loaded)
    return samples


def test_a_step_leaves_no_python_objects(tmp_path: Path) -> None:
    """The short form: counts blocks of Python's allocator, which need no statistics, and sees no leak in C++."""
    gc.collect()
    gc.freeze()  # collections look at new objects only, which is quick
    try:
        samples = measured(tmp_path, SHORT_MICRO_BATCHES, SHORT_LEAKING, allocated_blocks, logging_steps=100_000)
    finally:
        gc.unfreeze()
    settled = [sample for sample in samples if SHORT_MICRO_BATCHES / 2 < sample[0] <= SHORT_MICRO_BATCHES]
    leaking = [sample for sample in samples if sample[0] > SHORT_MICRO_BATCHES]
    growth, with_leak = (statistics.linear_regression(*zip(*part, strict=True)).slope for part in (settled, leaking))
    # A leaked list with one float takes 3 blocks. The bar of the terminal is left out: it keeps its last 1000 times.
    assert growth < 1.5
    assert with_leak > growth + 2, "a leak would not be seen"


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="/proc/self/statm is Linux's")
def test_memory_does_not_grow_with_the_steps(tmp_path: Path) -> None:
    # A process of its own: in one that has allocated gigabytes and freed them, a leak would fill the holes unseen.
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        samples = pool.apply(measured, (tmp_path, MICRO_BATCHES, LEAKING, resident_bytes), {"logging_steps": 500})
    # The first half fills caches and the allocator's free lists.
    settled = [sample for sample in samples if MICRO_BATCHES / 2 < sample[0] <= MICRO_BATCHES]
    leaking = [sample for sample in samples if sample[0] > MICRO_BATCHES]
    assert upper_growth(settled) < BOUND, f"{upper_growth(settled):.0f} bytes a micro-batch"
    assert upper_growth(leaking) > BOUND, f"{upper_growth(leaking):.0f}: a leak would not be seen"
