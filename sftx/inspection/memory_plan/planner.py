"""Plan a run from its configuration: parameters, memory by kind, what fits, time and cost. Nothing is loaded."""

from __future__ import annotations

import dataclasses
import math
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Final

from sftx.assembly.registry import activate
from sftx.config.loading import LoadedConfig
from sftx.config.optimizer_table import leaner_than
from sftx.config.options import RunConfig, TrainConfig
from sftx.data.sampler import num_micro_batches
from sftx.inspection.memory_plan import MAX_ROWS
from sftx.inspection.memory_plan.dry_run import DryRunner
from sftx.inspection.memory_plan.sharded_memory import (
    ProcessMemory,
    Snapshots,
    ddp_memory,
    fsdp2_memory,
    single_process_memory,
)
from sftx.inspection.memory_plan.target_device import TargetDevice
from sftx.model import names
from sftx.trainer import parallel
from sftx.trainer import precision as precisions
from sftx.trainer.precision import Precision

# Memory besides tensors: the CUDA context with its kernels, cuBLAS workspaces, the caching allocator's fragmentation.
_GPU_PROCESS_BYTES: Final = 3 * 2**28
_WORLD_SIZES: Final = (2, 4, 8, 16, 32, 64)
_UTILISATION: Final = 0.4
"""The assumed part of a card's peak throughput."""
_MAX_STEP_UP: Final = 16
"""The search for the largest batch tries at most so many times the number that is known to fit."""


@dataclass(frozen=True)
class MemoryEstimate:
    """The memory of one process in bytes, by what it is for, at the moment when it needs the most."""

    rows: int
    """Rows of a micro-batch."""
    max_length: int
    num_tokens: int
    """Positions of a micro-batch, padding included."""
    num_parameters: int
    num_trainable: int
    longest: int | None
    """The model's maximum length in tokens, if its configuration has one."""
    when: str
    """The part of a step with the peak."""
    kinds: Mapping[str, int]

    @property
    def total(self) -> int:
        return sum(self.kinds.values())


@dataclass(frozen=True)
class RunPlan:
    """The content of `sftx plan`; `dataclasses.asdict` of it, with `need.total`, is the output of `--json`."""

    model: str
    device: TargetDevice
    dtype: str
    num_processes: int
    distributed: str
    need: MemoryEstimate
    fits: bool | None
    """None when the device's memory is unlimited."""
    largest_batch: int | None
    largest_length: int | None
    advice: tuple[str, ...]
    tokens_per_second: float | None
    seconds: float | None
    price: float | None
    assumptions: tuple[str, ...]
    untrained_parts: tuple[str, ...]
    """A line for each kind of weights that the run leaves as they are."""


@dataclass
class Planner:
    """Estimates the memory of one run on one kind of device, also with other options than the run's."""

    loaded: LoadedConfig
    device: TargetDevice
    num_processes: int = 1
    _snapshots: dict[tuple[Any, ...], Snapshots] = field(default_factory=dict)

    @property
    def config(self) -> RunConfig:
        return self.loaded.config

    @cached_property
    def process_bytes(self) -> int:
        """Resident memory of this process with the imports of a run; read before a dry run adds to it."""
        import sftx.trainer.session  # noqa: F401
        from sftx.trainer.precision import peak_bytes

        statm = Path("/proc/self/statm")
        if not statm.exists():
            import torch

            return peak_bytes(torch.device("cpu"))
        import resource

        return int(statm.read_text().split()[1]) * resource.getpagesize()

    @cached_property
    def precision(self) -> Precision:
        """The dtypes that the device would choose, on the CPU, where dry runs are made. GPUs have bfloat16."""
        train = self.config.train
        bf16 = True if self.device.is_gpu and train.bf16 is None and not train.fp16 else train.bf16
        return precisions.choose(dataclasses.replace(train, use_cpu=True, bf16=bf16))

    @cached_property
    def dry_runner(self) -> DryRunner:
        """Raises ModelError when the model's config.json cannot be found; no other file of the model is needed."""
        if not (Path(self.config.model).expanduser() / "config.json").is_file():
            names.check(self.config.model)
        return DryRunner(
            activate(self.loaded),
            self.precision,
            names.resolve(self.config.model),
            trust_remote_code=self.config.trust_remote_code,
            on_gpu=self.device.is_gpu,
        )

    def estimate(
        self,
        *,
        rows: int | None = None,
        max_length: int | None = None,
        world_size: int | None = None,
        **changed_options: Any,
    ) -> MemoryEstimate:
        """Estimate the memory of one process. Raises SftxError.

        The arguments replace what the run says: `rows` is the micro-batch of one process, and `changed_options` are
        fields of TrainConfig.
        """
        train = dataclasses.replace(self.config.train, torch_compile=False, **changed_options)
        world_size = world_size or self.num_processes
        max_length = max_length or self.config.data.max_length
        if rows is None:
            num_rounds, rows = num_micro_batches(self.config.train.rows_per_step, world_size, train.micro_batch_size)
            train = dataclasses.replace(train, gradient_accumulation_steps=num_rounds)
        when, kinds = self._peak(self._dry_run(train, rows, max_length), train.distributed, world_size)
        size = self.dry_runner.size
        return MemoryEstimate(
            rows,
            max_length,
            self.dry_runner.num_tokens(rows, max_length),
            size.num_parameters,
            size.num_trainable,
            size.max_positions,
            when,
            kinds,
        )

    def _dry_run(self, train: TrainConfig, rows: int, max_length: int) -> Snapshots:
        """Return the peaks of one process that holds the whole model."""
        assert self.process_bytes
        accumulates = (train.gradient_accumulation_steps or 1) > 1
        key = (rows, max_length, accumulates, train.gradient_checkpointing, train.optim)
        if key not in self._snapshots:
            self._snapshots[key] = {
                "the update": [self.dry_runner.update_peak(train)],
                "forward and backward": self.dry_runner.step_peaks(train, rows=rows, max_length=max_length),
            }
        return self._snapshots[key]

    def _peak(self, snapshots: Snapshots, distributed: str, world_size: int) -> ProcessMemory:
        """Return the largest memory of one process, with the memory that the process needs besides tensors."""
        size = self.dry_runner.size
        if world_size == 1:
            candidates = single_process_memory(snapshots)
        elif distributed == "ddp":
            candidates = ddp_memory(snapshots, size)
        else:
            candidates = fsdp2_memory(snapshots, size, world_size, gathered_itemsize=self.precision.dtype.itemsize)
        if self.config.train.fsdp_offload and self.device.is_gpu:
            on_host = {"weights": 0, "gradients": 0, "optimizer": 0}
            candidates = ((when, kinds | on_host) for when, kinds in candidates)
        when, kinds = max(candidates, key=lambda candidate: sum(candidate[1].values()))
        return when, kinds | {"process": _GPU_PROCESS_BYTES if self.device.is_gpu else self.process_bytes}


def plan_run(
    loaded: LoadedConfig,
    device: TargetDevice,
    *,
    num_processes: int = 1,
    tokens_per_second: float | None = None,
    price_per_hour: float | None = None,
    num_tokens: int | None = None,
) -> RunPlan:
    """Plan a run. Raises SftxError for options with which the run could not start."""
    resolved = loaded.config.train.resolve_batch_size(num_processes)
    loaded = dataclasses.replace(loaded, config=dataclasses.replace(loaded.config, train=resolved))
    planner = Planner(loaded, device, num_processes)
    need = planner.estimate()
    if num_processes > 1:
        parallel.check(loaded.config.train, has_adapters=planner.dry_runner.size.has_adapters)
    fits = largest_batch = largest_length = None
    advice: tuple[str, ...] = ()
    if (limit := device.num_bytes) is not None:
        fits = need.total <= limit
        largest_batch = find_largest(lambda rows: planner.estimate(rows=rows).total, limit, 1, 2, at_most=MAX_ROWS)
        half = max(2, need.max_length // 2)
        largest_length = find_largest(
            lambda length: planner.estimate(rows=1, max_length=length).total,
            limit, half, max(half + 1, need.max_length), at_most=need.longest or sys.maxsize,
        )  # fmt: skip
        advice = () if fits else _advice(planner, need, limit)
    rate, rate_assumption = _rate(planner, need, tokens_per_second)
    seconds = None if rate is None or num_tokens is None else num_tokens / rate
    hours = None if seconds is None else seconds / 3600
    return RunPlan(
        model=loaded.config.model,
        device=device,
        dtype=str(planner.precision),
        num_processes=num_processes,
        distributed=loaded.config.train.distributed,
        need=need,
        fits=fits,
        largest_batch=largest_batch,
        largest_length=largest_length,
        advice=advice,
        tokens_per_second=rate,
        seconds=seconds,
        price=None if hours is None or price_per_hour is None else hours * price_per_hour,
        assumptions=(*_assumptions(planner, need), *rate_assumption),
        untrained_parts=planner.dry_runner.size.untrained_parts,
    )


def find_largest(
    total: Callable[[int], int], limit: int, first: int, second: int, *, at_most: int = sys.maxsize
) -> int:
    """Return the largest number whose total is within the limit, to 1 %; 0 when there is none.

    Totals increase, mostly linearly: the next guess lies on the line through the last two, between the largest number
    that is known to fit and the smallest that is known not to. Every third guess is halfway between these instead, for
    totals that are not linear.
    """
    seen = [(first, total(first)), (second, total(second))]
    while True:
        fits = max((number for number, size in seen if size <= limit), default=0)
        too_large = min((number for number, size in seen if size > limit), default=at_most + 1)
        tolerance = max(1, fits // 100)
        if too_large - fits <= tolerance:
            return min(fits, at_most)
        (a, total_a), (b, total_b) = seen[-2:]
        guess = b + math.floor((limit - total_b) * (b - a) / max(1, total_b - total_a))
        if len(seen) % 3 == 1:
            guess = (fits + too_large) // 2
        guess = min(max(guess, fits + tolerance), too_large - 1, _MAX_STEP_UP * max(fits, second))
        seen.append((guess, total(guess)))


def _advice(planner: Planner, need: MemoryEstimate, limit: int) -> tuple[str, ...]:
    """Return changes of the options, each with the memory that the run would need then; those that fit come first."""
    train = planner.config.train
    trains_all = not planner.dry_runner.size.has_adapters
    rows_per_step = train.rows_per_step
    combined: dict[str, Any] = {} if train.gradient_checkpointing else {"gradient_checkpointing": True}
    changes = [combined] if combined else []
    if need.rows > 1:
        combined = combined | {"train_batch_size": rows_per_step, "per_device_train_batch_size": 1}
        changes.append(combined)
    candidates = [(_as_flags(change), planner.estimate(**change)) for change in changes]
    half = max(2, need.max_length // 2)
    candidates.append((f"--max-length {half}", planner.estimate(max_length=half)))
    if trains_all and (leaner := leaner_than(train.optim)):
        candidates.append((f"--optim {leaner}", planner.estimate(optim=leaner)))
    world_sizes = [world_size for world_size in _WORLD_SIZES if rows_per_step % world_size == 0]
    if planner.num_processes == 1 and world_sizes and parallel.can_share(train, has_adapters=not trains_all):
        fixed = {"train_batch_size": rows_per_step}  # without it, every process would add rows to a step
        candidates.append(_sharded(planner, [fixed | change for change in ({}, *changes)], world_sizes, limit))
    lines = [
        f"{what}: {estimate.total / 1e9:.1f} GB, {'fits' if estimate.total <= limit else 'does not fit alone'}"
        for what, estimate in sorted(candidates, key=lambda candidate: candidate[1].total > limit)
    ]
    if trains_all:
        frozen = need.num_parameters * planner.precision.base_dtype(frozen=True).itemsize
        lines.append(f"--plugin lora: {frozen / 1e9:.1f} GB of frozen weights, without gradients and optimizer state")
    return tuple(lines)


def _sharded(
    planner: Planner, changes: Sequence[Mapping[str, Any]], world_sizes: Sequence[int], limit: int
) -> tuple[str, MemoryEstimate]:
    """Return the fewest fsdp2 processes with which the run fits, for the first of the changes that suffices.

    If none suffices, it is the most processes with the last change.
    """

    def candidate(change: Mapping[str, Any], world_size: int) -> tuple[str, MemoryEstimate]:
        flags = f"--distributed fsdp2 --nproc {world_size} {_as_flags(change)}, each on a device of its own"
        return flags, planner.estimate(world_size=world_size, distributed="fsdp2", **change)

    candidates = (candidate(change, world_size) for change in changes for world_size in world_sizes)
    fitting = (pair for pair in candidates if pair[1].total <= limit)
    return next(fitting, None) or candidate(changes[-1], world_sizes[-1])


def _as_flags(change: Mapping[str, Any]) -> str:
    """Return changed options as the command line takes them."""
    flags = [f"--{name.replace('_', '-')}" + ("" if value is True else f" {value}") for name, value in change.items()]
    return " ".join(flags)


def _rate(planner: Planner, need: MemoryEstimate, measured: float | None) -> tuple[float | None, tuple[str, ...]]:
    """Return tokens per second of all processes, and the assumption behind it."""
    if measured is not None:
        return measured, (f"{measured:g} tokens/s as given",)
    if planner.device.flops is None:
        return None, ()
    # FLOP per parameter and token: forward 2, gradients of inputs 2, of weights 2 (Kaplan et al. 2020,
    # arXiv:2001.08361, section 2.1).
    recomputation = 4 / 3 if planner.config.train.gradient_checkpointing else 1
    flop_per_token = (4 * need.num_parameters + 2 * need.num_trainable) * recomputation
    rate = planner.device.flops * _UTILISATION / flop_per_token * planner.num_processes
    return rate, (
        f"{rate:,.0f} tokens/s: {_UTILISATION:.0%} of {planner.device.flops / 1e12:.0f} TFLOP/s, "
        f"{flop_per_token / 1e9:.1f} GFLOP a token, without attention's products",
    )


def _assumptions(planner: Planner, need: MemoryEstimate) -> tuple[str, ...]:
    train = planner.config.train
    lines = [f"every row has {need.max_length} tokens, all of them label tokens"]
    if train.torch_compile:
        lines.append("without torch_compile, whose buffers are not known before it compiles")
    if planner.device.is_gpu:
        lines.append(
            f"{_GPU_PROCESS_BYTES / 2**30:g} GiB for the CUDA context, libraries' workspaces and fragmentation; "
            "the kernels' plain-torch implementation; a GPU with bfloat16"
        )
    else:
        lines.append(
            "process memory as in this process, with the same imports; MALLOC_MMAP_THRESHOLD_=65536 in the "
            "environment, without which glibc keeps freed memory, up to 35 % more (docs/planning.md)"
        )
    if planner.config.data.eval:
        lines.append("without the held-out evaluation; a lower --per-device-eval-batch-size reduces its memory")
    if planner.num_processes > 1:
        lines.append(
            "ddp: gradients are allocated all the time, as views of its buckets"
            if train.distributed == "ddp"
            else "fsdp2: weights outside the layers are unsharded during the whole step, layers while they compute"
        )
    return tuple(lines)
