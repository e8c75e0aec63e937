"""Plan a run from its configuration: parameters, memory by kind, what fits, time and cost. Nothing is loaded."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Final

import torch

from sftx.assembly.registry import Assembly, activate
from sftx.assembly.stages.optimizer_stages import OptimizerStage
from sftx.config.loading import LoadedConfig
from sftx.config.named_plugins import leaner_than
from sftx.config.options import RunConfig, TrainConfig
from sftx.data.sampler import num_micro_batches
from sftx.errors import SftxError, one_line
from sftx.inspection.memory_plan import MAX_ROWS
from sftx.inspection.memory_plan.dry_run import DryRunner
from sftx.inspection.memory_plan.run_size import RunSize, first_group, measure_run
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
# On a CPU, oneDNN compiles a kernel for each new shape of a product in bfloat16 and keeps the last 1,024. So much more
# memory had a run of SmolLM2-135M with each micro-batch of a new length, until some 60 of them (two cores of an Intel
# Xeon with AVX-512 BF16, torch 2.13; docs/planning.md).
_KERNEL_BYTES: Final = 19 * 10**6
_MAX_KERNEL_BYTES: Final = 740 * 10**6
_WORLD_SIZES: Final = (2, 4, 8, 16, 32, 64)
_UTILISATION: Final = 0.4
"""The assumed part of a card's peak throughput."""
_CPU_UTILISATION: Final = 0.5
"""The assumed part of the throughput of a large product on a CPU."""
_MAX_ADVICE: Final = 2
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
    """Of the steps and the evaluations; None when the number of tokens or the rate is not known."""
    num_tokens: int | None
    price: float | None
    assumptions: tuple[str, ...]
    untrained_parts: tuple[str, ...]
    """A line for each kind of weights that the run leaves as they are, and how much of them adapters reach."""


@dataclass
class Planner:
    """Estimates the memory of one run on one kind of device, also with other options than the run's."""

    loaded: LoadedConfig
    device: TargetDevice
    num_processes: int = 1
    size: RunSize | None = None
    """None when the data is not known."""
    _snapshots: dict[tuple[Any, ...], Snapshots] = field(default_factory=dict)
    _evaluations: dict[tuple[Any, ...], Snapshots] = field(default_factory=dict)

    @property
    def config(self) -> RunConfig:
        return self.loaded.config

    @cached_property
    def process_bytes(self) -> int:
        """Resident memory of this process with the imports of a run; read before a dry run adds to it."""
        import psutil

        import sftx.trainer.session  # noqa: F401

        return int(psutil.Process().memory_info().rss)

    @cached_property
    def precision(self) -> Precision:
        """The dtypes that the device would choose, on the CPU, where dry runs are made. GPUs have bfloat16."""
        train = self.config.train
        bf16 = True if self.device.is_gpu and train.bf16 is None and not train.fp16 else train.bf16
        options = dataclasses.replace(train, use_cpu=True, bf16=bf16)
        return precisions.choose(options, bf16_weights=self.optimizer.bf16_weights)

    @cached_property
    def assembly(self) -> Assembly:
        return activate(self.loaded)

    @cached_property
    def optimizer(self) -> OptimizerStage:
        return self.assembly.optimizer()

    @cached_property
    def dry_runner(self) -> DryRunner:
        """Raises ModelError when the model's config.json cannot be found; no other file of the model is needed."""
        if not (Path(self.config.model).expanduser() / "config.json").is_file():
            names.check(self.config.model)
        return DryRunner(
            self.assembly,
            self.optimizer,
            self.precision,
            names.resolve(self.config.model),
            trust_remote_code=self.config.trust_remote_code,
            on_gpu=self.device.is_gpu,
            group=first_group(self.config, self.assembly),
        )

    @property
    def answers(self) -> tuple[int, int] | None:
        """The rows of a batch of answers and the tokens of its prompts; None when no metric needs answers."""
        config = self.config
        if not config.data.has_eval or not self.assembly.providers("sftx_metric"):
            return None
        rows = config.generation.batch_size or config.train.per_device_eval_batch_size
        if self.size is None or not self.size.prompt_lengths:
            return rows, config.data.max_length
        return min(rows, len(self.size.prompt_lengths)), max(self.size.prompt_lengths)

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
        eval_rows = train.per_device_eval_batch_size
        key = (rows, max_length, accumulates, train.gradient_checkpointing, eval_rows)
        if key not in self._snapshots:
            self._snapshots[key] = {
                "the update": [self.dry_runner.update_peak(train)],
                "forward and backward": self.dry_runner.step_peaks(train, rows=rows, max_length=max_length),
                **self._evaluation(train),
            }
        return self._snapshots[key]

    def _evaluation(self, train: TrainConfig) -> Snapshots:
        """Return the peaks of an evaluation: of the loss of held-out rows, and of answers to them."""
        if not self.config.data.has_eval:
            return {}
        rows = train.per_device_eval_batch_size
        if self.size is not None:
            rows = max(1, min(rows, self.size.num_eval_rows))
        answers = self.answers
        key = (rows, answers)
        if key not in self._evaluations:
            runner, length = self.dry_runner, self.config.data.max_length
            evaluated = dataclasses.replace(train, per_device_eval_batch_size=rows)
            peaks = {"the evaluation": runner.evaluation_peaks(evaluated, max_length=length)}
            if answers is not None:
                num_rows, prompt_length = answers
                if self.config.generation.batch_size is None:
                    num_rows = min(num_rows, train.per_device_eval_batch_size)
                peaks["the answers"] = runner.answer_peaks(
                    train,
                    rows=num_rows,
                    prompt_length=prompt_length,
                    max_new_tokens=self.config.generation.max_new_tokens,
                )
            self._evaluations[key] = peaks
        return self._evaluations[key]

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
        process_bytes = _GPU_PROCESS_BYTES if self.device.is_gpu else self.process_bytes
        kernel_bytes = self._kernel_bytes(world_size)
        return when, kinds | ({"kernels": kernel_bytes} if kernel_bytes else {}) | {"process": process_bytes}

    def _kernel_bytes(self, world_size: int) -> int:
        """Return the memory of the kernels that oneDNN compiles, if each micro-batch has another number of tokens."""
        if self.device.is_gpu or self.precision.dtype == torch.float32:
            return 0
        train = self.config.train
        num_steps = train.max_steps if self.size is None else self.size.num_steps
        if num_steps is None:
            return _MAX_KERNEL_BYTES
        rounds, _ = num_micro_batches(train.rows_per_step, world_size, train.micro_batch_size)
        return min(_MAX_KERNEL_BYTES, num_steps * rounds * _KERNEL_BYTES)


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
    assert planner.process_bytes  # read before rows are encoded
    no_size = ""
    try:
        planner.size = measure_run(loaded)
    except (SftxError, OSError) as error:
        no_size = one_line(error)
    if num_tokens is None and planner.size is not None:
        num_tokens = planner.size.num_input_tokens
    need = planner.estimate()
    if num_processes > 1:
        parallel.check(loaded.config.train, planner.optimizer, has_adapters=planner.dry_runner.size.has_adapters)
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
    speed = _speed(planner, tokens_per_second)
    rate = None if speed is None else speed.flops / _flop_per_token(planner) * num_processes
    seconds = None
    if speed is not None and rate is not None and num_tokens is not None:
        seconds = num_tokens / rate + _evaluation_seconds(planner, speed)
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
        num_tokens=num_tokens,
        price=None if hours is None or price_per_hour is None else hours * price_per_hour,
        assumptions=(
            *_assumptions(planner, need),
            f"no rate is known for {device.name}: --tokens-per-second, or a card's name, gives the time"
            if speed is None or rate is None
            else f"{rate:,.0f} tokens/s: {speed.reason}",
            *([f"no time without data or --num-tokens ({no_size})"] if num_tokens is None else []),
        ),
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
    """Return up to two changes of the options with which the run was planned to fit, the smallest changes first."""
    train = planner.config.train
    trains_all = not planner.dry_runner.size.has_adapters
    rows_per_step = train.rows_per_step
    combined: dict[str, Any] = {} if train.gradient_checkpointing else {"gradient_checkpointing": True}
    changes = [combined] if combined else []
    if need.rows > 1:
        combined = combined | {"train_batch_size": rows_per_step, "per_device_train_batch_size": 1}
        changes.append(combined)
    if planner.config.data.has_eval and train.per_device_eval_batch_size > 1:
        changes = [{"per_device_eval_batch_size": 1}, *changes, combined | {"per_device_eval_batch_size": 1}]
    fitting = [
        (_as_flags(change), estimate) for change in changes if (estimate := planner.estimate(**change)).total <= limit
    ]
    if trains_all and (leaner := leaner_than(planner.optimizer.state_bytes)):
        fitting += _with_optimizer(planner, leaner, [{}, combined], limit)
    half = max(2, need.max_length // 2)
    if len(fitting) < _MAX_ADVICE and (shorter := planner.estimate(max_length=half)).total <= limit:
        fitting.append((f"--max-length {half}", shorter))
    world_sizes = [world_size for world_size in _WORLD_SIZES if rows_per_step % world_size == 0]
    can_share = parallel.can_share(train, planner.optimizer, has_adapters=not trains_all)
    if len(fitting) < _MAX_ADVICE and planner.num_processes == 1 and world_sizes and can_share:
        fixed = {"train_batch_size": rows_per_step}  # without it, every process would add rows to a step
        fitting += _sharded(planner, [fixed, *({**fixed, **change} for change in changes)], world_sizes, limit)
    if len(fitting) < _MAX_ADVICE and trains_all:
        plugins = dict(planner.config.plugins) | {"lora": {}}
        config = dataclasses.replace(planner.config, plugins=plugins)
        adapted = Planner(dataclasses.replace(planner.loaded, config=config), planner.device, planner.num_processes)
        adapted.size = planner.size
        with contextlib.suppress(SftxError):  # a model that lora does not adapt
            for change in ({}, combined):
                if (estimate := adapted.estimate(**change)).total <= limit:
                    fitting.append((f"--plugin lora {_as_flags(change)}".strip(), estimate))
                    break
    return tuple(f"{what}: {estimate.total / 1e9:.1f} GB, fits" for what, estimate in fitting[:_MAX_ADVICE])


def _with_optimizer(
    planner: Planner, name: str, changes: Sequence[Mapping[str, Any]], limit: int
) -> list[tuple[str, MemoryEstimate]]:
    """Return those of the changes with which the run fits when this built-in optimizer takes the place of its own."""
    given, own = planner.config, planner.optimizer.name
    plugins = {plugin: options for plugin, options in given.plugins.items() if plugin != own}
    config = dataclasses.replace(given, plugins=plugins, train=dataclasses.replace(given.train, optim=name))
    lean = Planner(dataclasses.replace(planner.loaded, config=config), planner.device, planner.num_processes)
    lean.size, lean.process_bytes = planner.size, planner.process_bytes
    instead = f" in place of --plugin {own}" if own in given.plugins else ""
    try:
        return [
            (f"--optim {name}{instead} {_as_flags(change)}".strip(), estimate)
            for change in changes
            if (estimate := lean.estimate(**change)).total <= limit
        ]
    except SftxError:  # an option that only the run's own optimizer reads
        return []


def _sharded(
    planner: Planner, changes: Sequence[Mapping[str, Any]], world_sizes: Sequence[int], limit: int
) -> list[tuple[str, MemoryEstimate]]:
    """Return the fewest fsdp2 processes with which the run fits, for the first of the changes that suffices."""
    for change in changes:
        for world_size in world_sizes:
            estimate = planner.estimate(world_size=world_size, distributed="fsdp2", **change)
            if estimate.total <= limit:
                flags = f"--distributed fsdp2 --nproc {world_size} {_as_flags(change)}, each on a device of its own"
                return [(flags, estimate)]
    return []


def _as_flags(change: Mapping[str, Any]) -> str:
    """Return changed options as the command line takes them."""
    flags = [f"--{name.replace('_', '-')}" + ("" if value is True else f" {value}") for name, value in change.items()]
    return " ".join(flags)


@dataclass(frozen=True)
class _Speed:
    """How fast one process computes."""

    flops: float
    """FLOP/s that a run reaches."""
    bandwidth: float | None
    """Bytes/s that writing an answer, which reads all weights for each token, reaches; None if not known."""
    reason: str


def _speed(planner: Planner, tokens_per_second: float | None) -> _Speed | None:
    """Return the speed from the measured rate that was given, a card's data sheet, or products on this CPU; or None."""
    device, flop_per_token = planner.device, _flop_per_token(planner)
    per_token = f"{flop_per_token / 1e9:.2g} GFLOP a token, without attention's products"
    bandwidth = None if device.bandwidth is None else device.bandwidth * _UTILISATION
    if tokens_per_second is not None:
        return _Speed(tokens_per_second * flop_per_token / planner.num_processes, bandwidth, "as given")
    if device.flops is not None:
        peak = f"{_UTILISATION:.0%} of {device.flops / 1e12:.0f} TFLOP/s"
        return _Speed(device.flops * _UTILISATION, bandwidth, f"{peak}, {per_token}")
    if device.is_gpu:
        return None
    flops, bandwidth = measure_cpu(planner.precision.dtype)
    share = f"{_CPU_UTILISATION:.0%} of the {flops / 1e9:,.0f} GFLOP/s"
    reason = f"{share} that a large product reaches now on this CPU, with its threads and its load, {per_token}"
    return _Speed(flops * _CPU_UTILISATION, bandwidth, reason)


def measure_cpu(dtype: torch.dtype) -> tuple[float, float]:
    """Return the FLOP/s of a product of large matrices on this CPU, and the bytes/s with which it reads one."""
    matrix = torch.ones(2048, 2048, dtype=dtype)

    def seconds(right: torch.Tensor, times: int) -> float:
        matrix @ right
        start = time.perf_counter()
        for _ in range(times):
            matrix @ right
        return (time.perf_counter() - start) / times

    flops = 2 * 2048**2 * 512 / seconds(torch.ones(2048, 512, dtype=dtype), 3)
    return flops, matrix.nbytes / seconds(torch.ones(2048, 1, dtype=dtype), 10)


def _flop_per_token(planner: Planner) -> float:
    """Return FLOP per token of a step (Kaplan et al. 2020, arXiv:2001.08361, section 2.1).

    Each parameter that a token is multiplied with costs 2 in the forward, 2 for the gradient of inputs, and 2 for its
    own gradient if it is trained.
    """
    size = planner.dry_runner.size
    recomputation = 4 / 3 if planner.config.train.gradient_checkpointing else 1
    return (4 * size.num_active + 2 * min(size.num_trainable, size.num_active)) * recomputation


def _evaluation_seconds(planner: Planner, speed: _Speed) -> float:
    """Return the time of all evaluations; every answer is assumed to have `max_new_tokens` tokens."""
    run, size = planner.size, planner.dry_runner.size
    if run is None or not run.num_evaluations:
        return 0.0
    tokens = float(run.num_eval_tokens)
    writing = 0.0
    if planner.answers is not None and run.prompt_lengths:
        rows, _ = planner.answers
        tokens += sum(run.prompt_lengths)
        num_new = math.ceil(len(run.prompt_lengths) / rows) * planner.config.generation.max_new_tokens
        weights = size.num_active * planner.precision.dtype.itemsize
        reading = 0.0 if speed.bandwidth is None else weights / speed.bandwidth
        writing = num_new * max(reading, rows * 2 * size.num_active / speed.flops)
    one = tokens * 2 * size.num_active / speed.flops + writing
    return run.num_evaluations * one / planner.num_processes


def _assumptions(planner: Planner, need: MemoryEstimate) -> tuple[str, ...]:
    train = planner.config.train
    lines = [f"every row has {need.max_length} tokens, all of them label tokens"]
    if (rollout := planner.assembly.rollout()) is not None:
        lines = [
            f"every question has {rollout.num_answers} examples of {need.max_length} tokens, all of them label tokens",
            f"without the time and the cache of sampling answers, and a second model that {rollout} may compare with",
        ]
    if train.torch_compile:
        lines.append("without torch_compile, whose buffers are not known before it compiles")
    if planner.dry_runner.declared_state:
        lines.append(planner.dry_runner.declared_state)
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
        if "kernels" in need.kinds:
            lines.append("kernels: those that oneDNN compiles for products of each new number of tokens, and keeps")
    if planner.answers is not None:
        rows, prompt_length = planner.answers
        new = planner.config.generation.max_new_tokens
        lines.append(f"{rows} answers at once, to prompts of {prompt_length} tokens, each of {new} new tokens")
    if planner.num_processes > 1:
        lines.append(
            "ddp: gradients are allocated all the time, as views of its buckets"
            if train.distributed == "ddp"
            else "fsdp2: weights outside the layers are unsharded during the whole step, layers while they compute"
        )
    return tuple(lines)
