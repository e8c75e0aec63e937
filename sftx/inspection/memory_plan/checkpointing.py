"""Choose gradient checkpointing for a run that leaves it open: on where a step would not fit into the free memory."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import math
from pathlib import Path
from typing import Any, Final

import psutil
import torch
from transformers import PretrainedConfig

from sftx.config.loading import LoadedConfig
from sftx.config.options import RunConfig
from sftx.distributed.process_group import env_int
from sftx.errors import SftxError, counted
from sftx.inspection.memory_plan import MAX_ROWS, MAX_TOKENS
from sftx.inspection.memory_plan.planner import Planner
from sftx.inspection.memory_plan.target_device import CPU, TargetDevice
from sftx.model.load import load_config
from sftx.model.names import resolve

log = logging.getLogger(__name__)

_USABLE: Final = 0.9
"""The part of the free memory that a step may plan with: an estimate is off by some per cent."""
_LOGITS: Final = 2**26
"""Bytes of a chunk of logits, with its gradients."""
_ROOMY: Final = 0.3
"""Below this part of the free memory even a generous bound is trusted, and no step is planned."""


def choose(
    loaded: LoadedConfig,
    config: RunConfig,
    device: torch.device,
    *,
    num_processes: int,
    longest: int,
    examples_per_row: int,
) -> bool:
    """Return whether to recompute the layers in the backward pass, and log the reason when it is chosen.

    `config` has the batch sizes of this run; `longest` is the largest number of tokens of an example, or of a packed
    row; `examples_per_row` is the largest group of examples that share a row. What the user has set stays. Otherwise a
    step is planned as `sftx plan` does, unless a bound from the model's configuration shows at once that there is room
    enough. A step that fits in neither way is tried without: the error says what to change.
    """
    train = config.train
    if train.gradient_checkpointing is not None:
        return train.gradient_checkpointing
    rows, free = train.micro_batch_size, free_bytes(device)
    if (
        free is None
        or _generous_bound(config, rows * longest * examples_per_row) < _ROOMY * free
        or rows > MAX_ROWS
        or longest > MAX_TOKENS
    ):
        return False
    planned = dataclasses.replace(loaded, config=config)
    target = CPU if device.type == "cpu" else TargetDevice(str(device), is_gpu=True)
    planner = Planner(planned, target, num_processes)
    options: dict[str, Any] = {"rows": rows, "max_length": longest}
    try:
        without, with_it = (_needed(planner, **options, gradient_checkpointing=is_on) for is_on in (False, True))
    except SftxError as error:  # what is wrong is said where the model is loaded
        log.debug("no step was planned: %s", error)
        return False
    limit = free * _USABLE
    if without <= limit or with_it >= without:
        return False
    log.info(
        "gradient checkpointing: on, since a micro-batch of %s of %s needs about %.1f GB without it and %.1f GB with "
        "it, and %.1f GB are free; --no-gradient-checkpointing leaves it off",
        counted(rows, "row"), counted(longest, "token"), without / 1e9, with_it / 1e9, free / 1e9,
    )  # fmt: skip
    return True


def _needed(planner: Planner, **options: Any) -> int:
    """Return the bytes that a run allocates from now on: what a process on a CPU has in memory already is not free."""
    estimate = planner.estimate(**options)
    return estimate.total if planner.device.is_gpu else estimate.total - estimate.kinds["process"]


def free_bytes(device: torch.device) -> int | None:
    """Return the bytes that are free on the device for this process; None if unknown.

    Those of the host are within its control group's limits, and shared with the other processes of the run there.
    """
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    if device.type != "cpu":
        return None
    found = [int(psutil.virtual_memory().available)]
    with contextlib.suppress(OSError, ValueError):
        limit, used = (Path(f"/sys/fs/cgroup/memory.{name}").read_text(encoding="utf-8") for name in ("max", "current"))
        found.append(int(limit) - int(used))  # "max" stands for no limit, and is no number
    return min(found) // env_int("LOCAL_WORLD_SIZE", 1)


def _generous_bound(config: RunConfig, num_tokens: int) -> float:
    """Return more bytes than the activations of so many tokens, the weights and the optimizer's state can take.

    A layer keeps some ten tensors of the hidden size and six of the MLP's, which are counted in fp32; a mixture of
    experts computes several MLPs for a token. Weights, gradients and state are counted as those of full fine-tuning in
    fp32 with a copy, and a chunk of logits is added.
    """
    model = load_config(resolve(config.model), trust_remote_code=config.trust_remote_code).get_text_config()
    if not all(hasattr(model, name) for name in ("hidden_size", "num_hidden_layers", "vocab_size")):
        return math.inf
    hidden, num_layers = model.hidden_size, model.num_hidden_layers
    inner = max(_numbers(model, "intermediate_size"), default=4 * hidden)
    num_mlps = 1 + max(_numbers(model, "num_experts_per_tok"), default=0)
    num_experts = max((*_numbers(model, "num_experts"), *_numbers(model, "num_local_experts")), default=1)
    activations = num_tokens * num_layers * (10 * hidden + 6 * inner * num_mlps) * 4
    weights = num_layers * hidden * (4 * hidden + 3 * inner * num_experts) + 2 * model.vocab_size * hidden
    return float(activations + 20 * weights + _LOGITS)


def _numbers(model: PretrainedConfig, name: str) -> list[int]:
    """Return the numbers of an entry: one, or one a layer as Gemma 3n has them; none where it is missing or null."""
    value = getattr(model, name, None)
    return list(value) if isinstance(value, list | tuple) else [] if value is None else [value]
