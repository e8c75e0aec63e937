"""The short runs themselves: made to the end, killed in the middle of a step, resumed, planned.

Each function here is the work of a process of its own.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import signal
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import psutil
from torch import Tensor

from sftx.config.loading import LoadedConfig
from sftx.inspection.dataset_view import view_dataset
from sftx.inspection.memory_plan.planner import Planner
from sftx.inspection.memory_plan.run_size import measure_run
from sftx.inspection.memory_plan.target_device import CPU, TargetDevice
from sftx.trainer.trainer import MicroBatch
from sftx.training import assembled


def train(loaded: LoadedConfig, *, resume: bool = False) -> None:
    """Make the run to its end, as `sftx run` does, but for the report. Raises SftxError."""
    with assembled(loaded, name="verify", resume=resume) as session:
        _forget_the_peak()
        session.run()


def _forget_the_peak() -> None:
    """Let the peak of this process's memory begin anew: the plan is that of the steps, and not of loading weights.

    While they are loaded, the file that they come from is mapped as well. Linux alone can forget.
    """
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")


def train_until_killed(loaded: LoadedConfig, step: int) -> None:
    """Make the run until the backward pass of this step, counted from 1, and be killed before the update."""
    with assembled(loaded, name="verify") as session:
        accumulate = session.trainer.accumulate

        def killed(
            micro_batches: Sequence[MicroBatch], denominator: float, number: int
        ) -> tuple[Tensor, dict[str, Tensor]]:
            sums = accumulate(micro_batches, denominator, number)
            if number == step - 1:
                os.kill(os.getpid(), getattr(signal, "SIGKILL", signal.SIGTERM))  # Windows ends a process by either
            return sums

        session.trainer.accumulate = killed  # type: ignore[method-assign]
        session.run()


def plan_memory(loaded: LoadedConfig, device: str, *, is_forked: bool) -> dict[str, Any]:
    """Return the memory that `sftx plan` counts for the steps of the run, with the length of their longest row.

    `is_forked`: whether this process is the fork of one with the imports of a run. Pages of libraries' files, 160 MB of
    them, belong to a forked process from its first look at them on, so here its parent's memory is that of a process.
    """
    target = CPU if device == "cpu" else TargetDevice(device, is_gpu=True)
    config = loaded.config
    loaded = dataclasses.replace(loaded, config=dataclasses.replace(config, train=config.train.resolve_batch_size(1)))
    planner = Planner(loaded, target)
    if is_forked:
        planner.process_bytes = psutil.Process(os.getppid()).memory_info().rss
    assert planner.process_bytes  # read before rows are encoded
    planner.size = measure_run(loaded)
    view = view_dataset(loaded)
    pipeline = view.pipeline
    sampler = pipeline.sampler(view.dataset("train"), loaded.config.train)
    longest = 0
    for _, planned in zip(range(loaded.config.train.max_steps or 1), sampler, strict=False):
        indices = [index for row in planned.rows for index in row]
        longest = max(longest, int(planned.lengths[indices].max()))
    longest = pipeline.collator.row_length or longest
    held_out = view.dataset("eval").examples if loaded.config.data.has_eval else ()
    data = dataclasses.replace(loaded.config.data, max_length=max([longest, *map(_length, held_out)]))
    planner.loaded = dataclasses.replace(loaded, config=dataclasses.replace(loaded.config, data=data))
    need = planner.estimate(max_length=longest)
    return {"total": need.total, "kinds": dict(need.kinds), "when": need.when, "rows": need.rows, "longest": longest}


def model_bytes(num_parameters: int, num_trainable: int) -> int:
    """Return bytes that a process needs at least: weights, with gradients and AdamW's state of those that train."""
    return 2 * num_parameters + 14 * num_trainable


def _length(example: Any) -> int:
    return len(example.token_ids)


def steps_of(output_dir: Path) -> list[dict[str, Any]]:
    """Return the lines of the steps in metrics.jsonl."""
    lines = map(json.loads, (output_dir / "metrics.jsonl").read_text(encoding="utf-8").splitlines())
    return [line for line in lines if line["event"] == "step"]
