"""A run's configuration becomes a plan: parameters, memory by kind, what fits, time and cost. Nothing is loaded."""

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
from sftx.config.loading import Loaded
from sftx.config.options import RunConfig, TrainConfig
from sftx.data.sampler import num_micro_batches
from sftx.inspection.memory_plan import MOST_ROWS, fake_sharding
from sftx.inspection.memory_plan.devices import Device
from sftx.inspection.memory_plan.dry_run import Rehearsals
from sftx.inspection.memory_plan.fake_sharding import Moments
from sftx.model import names
from sftx.trainer import parallel
from sftx.trainer import precision as precisions
from sftx.trainer.precision import Precision

# Beside tensors: the CUDA context with its kernels, cuBLAS workspaces, and what the caching allocator cannot hand out.
_GPU_PROCESS_BYTES: Final = 3 * 2**28
_RANKS: Final = (2, 4, 8, 16, 32, 64)
_UTILISATION: Final = 0.4
_FARTHEST: Final = 16
"""Times what is known to fit is the most that is tried next."""


@dataclass(frozen=True)
class Need:
    """Bytes that one process needs, by what they are for, and which of its rows and lengths they were planned with."""

    rows: int
    max_length: int
    num_tokens: int
    num_parameters: int
    num_trainable: int
    longest: int | None
    """Tokens that the model was made for, where its configuration says."""
    when: str
    """What the process is at when it needs the most."""
    kinds: Mapping[str, int]

    @property
    def total(self) -> int:
        return sum(self.kinds.values())


@dataclass(frozen=True)
class Plan:
    """What `sftx plan` tells; JSON values and dataclasses of these."""

    model: str
    device: Device
    dtype: str
    num_processes: int
    distributed: str
    need: Need
    fits: bool | None
    """None: it was not asked what for."""
    largest_batch: int | None
    largest_length: int | None
    advice: tuple[str, ...]
    tokens_per_second: float | None
    seconds: float | None
    price: float | None
    assumptions: tuple[str, ...]


@dataclass
class Planner:
    """Plans of one run on one kind of device."""

    loaded: Loaded
    device: Device
    num_processes: int = 1
    _rehearsed: dict[tuple[Any, ...], Moments] = field(default_factory=dict)

    @property
    def config(self) -> RunConfig:
        return self.loaded.config

    @cached_property
    def process_bytes(self) -> int:
        """Of a process that has imported what a run imports; asked for first before a rehearsal adds to this one."""
        return _resident_bytes()

    @cached_property
    def model(self) -> str:
        """Where its config.json is: nothing else is needed. Raises ModelError."""
        place = Path(self.config.model).expanduser()
        if not (place / "config.json").is_file():
            names.check(self.config.model)
        return names.resolve(self.config.model)

    @cached_property
    def precision(self) -> Precision:
        """As the device would choose, on the CPU, where it is rehearsed. Planned for are GPUs that have bfloat16."""
        train = self.config.train
        bf16 = True if self.device.is_gpu and train.bf16 is None and not train.fp16 else train.bf16
        return precisions.choose(dataclasses.replace(train, use_cpu=True, bf16=bf16))

    @cached_property
    def rehearsals(self) -> Rehearsals:
        return Rehearsals(
            activate(self.loaded),
            self.precision,
            self.model,
            trust_remote_code=self.config.trust_remote_code,
            on_gpu=self.device.is_gpu,
        )

    def need(
        self, *, rows: int | None = None, max_length: int | None = None, ranks: int | None = None, **changed: Any
    ) -> Need:
        """With these in place of what the run says: `rows` at once in each of so many processes. Raises SftxError."""
        train = dataclasses.replace(self.config.train, torch_compile=False, **changed)
        ranks = ranks or self.num_processes
        max_length = max_length or self.config.data.max_length
        if rows is None:
            rounds, rows = num_micro_batches(self.config.train.rows_per_step, ranks, train.micro_batch_size)
            train = dataclasses.replace(train, gradient_accumulation_steps=rounds)
        moments = self._moments(train, rows, max_length)
        when, kinds = self._largest(moments, train.distributed, ranks)
        counts = self.rehearsals.counts
        return Need(
            rows,
            max_length,
            self.rehearsals.num_tokens(rows, max_length),
            counts.num_parameters,
            counts.num_trainable,
            counts.longest,
            when,
            kinds,
        )

    def _moments(self, train: TrainConfig, rows: int, max_length: int) -> Moments:
        """Of one process that has all of the model."""
        assert self.process_bytes
        accumulates = (train.gradient_accumulation_steps or 1) > 1
        key = (rows, max_length, accumulates, train.gradient_checkpointing, train.optim)
        if key not in self._rehearsed:
            self._rehearsed[key] = {
                "the update": [self.rehearsals.update(train)],
                "forward and backward": self.rehearsals.step(train, rows=rows, max_length=max_length),
            }
        return self._rehearsed[key]

    def _largest(self, moments: Moments, distributed: str, ranks: int) -> tuple[str, Mapping[str, int]]:
        counts = self.rehearsals.counts
        if ranks == 1:
            each = fake_sharding.of_one(moments)
        elif distributed == "ddp":
            each = fake_sharding.of_ddp(moments, counts)
        else:
            each = fake_sharding.of_fsdp2(moments, counts, ranks, sent_itemsize=self.precision.dtype.itemsize)
        when, most = max(map(self._on_device, each), key=lambda pair: sum(pair[1].values()))
        return when, most | {"process": _GPU_PROCESS_BYTES if self.device.is_gpu else self.process_bytes}

    def _on_device(self, pair: fake_sharding.Pair) -> fake_sharding.Pair:
        if not (self.config.train.fsdp_offload and self.device.is_gpu):
            return pair
        return pair[0], pair[1] | {"weights": 0, "gradients": 0, "optimizer": 0}


def _resident_bytes() -> int:
    """What this process holds, which has imported what a run imports."""
    import sftx.trainer.session  # noqa: F401
    from sftx.trainer.precision import peak_bytes

    statm = Path("/proc/self/statm")
    if not statm.exists():
        import torch

        return peak_bytes(torch.device("cpu"))
    import resource

    return int(statm.read_text().split()[1]) * resource.getpagesize()


def plan(
    loaded: Loaded,
    device: Device,
    *,
    num_processes: int = 1,
    tokens_per_second: float | None = None,
    price_per_hour: float | None = None,
    num_tokens: int | None = None,
) -> Plan:
    """The whole plan. Raises SftxError for what a run could not be begun with."""
    resolved = loaded.config.train.resolve_batch_size(num_processes)
    loaded = dataclasses.replace(loaded, config=dataclasses.replace(loaded.config, train=resolved))
    planner = Planner(loaded, device, num_processes)
    need = planner.need()
    if num_processes > 1:
        parallel.check(loaded.config.train, has_adapters=need.num_trainable < need.num_parameters)
    limit = device.num_bytes
    fits = None if limit is None else need.total <= limit
    largest = _largest_batch(planner, limit) if limit is not None else None
    length = _largest_length(planner, need, limit) if limit is not None else None
    rate, how = _rate(planner, need, tokens_per_second)
    seconds = None if rate is None or num_tokens is None else num_tokens / rate
    hours = None if seconds is None else seconds / 3600
    train = loaded.config.train
    return Plan(
        model=loaded.config.model,
        device=device,
        dtype=str(planner.precision),
        num_processes=num_processes,
        distributed=train.distributed,
        need=need,
        fits=fits,
        largest_batch=largest,
        largest_length=length,
        advice=() if fits is not False else _advice(planner, need, limit or 0),
        tokens_per_second=rate,
        seconds=seconds,
        price=None if hours is None or price_per_hour is None else hours * price_per_hour,
        assumptions=(*_assumptions(planner, need), *how),
    )


def _largest_batch(planner: Planner, limit: int) -> int:
    """Rows that fit, 0 when not one does."""
    return _most(lambda rows: planner.need(rows=rows).total, limit, 1, 2, at_most=MOST_ROWS)


def _largest_length(planner: Planner, need: Need, limit: int) -> int:
    """Tokens of one row that fits, 0 when none does; no more than the model was made for."""
    half = max(2, need.max_length // 2)
    return _most(
        lambda length: planner.need(rows=1, max_length=length).total, limit, half, max(half + 1, need.max_length),
        at_most=need.longest or sys.maxsize,
    )  # fmt: skip


def _most(total: Callable[[int], int], limit: int, first: int, second: int, *, at_most: int = sys.maxsize) -> int:
    """The largest number whose total is within the limit, to 1 %; totals rise, mostly on a straight line.

    The line through the last two that were asked for says the next, between the largest that is known to fit and the
    smallest that is known not to; every third is halfway between these, for totals that lie on no line.
    """
    seen = [(first, total(first)), (second, total(second))]
    while True:
        fits = max((at for at, size in seen if size <= limit), default=0)
        over = min((at for at, size in seen if size > limit), default=at_most + 1)
        near = max(1, fits // 100)
        if over - fits <= near:
            return min(fits, at_most)
        (a, of_a), (b, of_b) = seen[-2:]
        guess = b + math.floor((limit - of_b) * (b - a) / max(1, of_b - of_a))
        if len(seen) % 3 == 1:
            guess = (fits + over) // 2
        guess = min(max(guess, fits + near), over - 1, _FARTHEST * max(fits, second))
        seen.append((guess, total(guess)))


def _advice(planner: Planner, need: Need, limit: int) -> tuple[str, ...]:
    """What to change, each with what it would need then; what fits first."""
    train = planner.config.train
    trains_all = need.num_trainable == need.num_parameters
    rows_of_step = train.rows_per_step
    lean: dict[str, Any] = {} if train.gradient_checkpointing else {"gradient_checkpointing": True}
    changes = [lean] if lean else []
    if need.rows > 1:
        lean = lean | {"train_batch_size": rows_of_step, "per_device_train_batch_size": 1}
        changes.append(lean)
    tried = [(_flags(change), planner.need(**change)) for change in changes]
    half = max(2, need.max_length // 2)
    tried.append((f"--max-length {half}", planner.need(max_length=half)))
    if trains_all and train.optim == "adamw":
        tried.append(("--optim adafactor", planner.need(optim="adafactor")))
    ranks = [ranks for ranks in _RANKS if rows_of_step % ranks == 0]
    if planner.num_processes == 1 and ranks and parallel.can_share(train, has_adapters=not trains_all):
        tried.append(_spread(planner, [{}, *changes], ranks, limit))
    lines = [
        f"{what}: {one.total / 1e9:.1f} GB, {'fits' if one.total <= limit else 'does not fit alone'}"
        for what, one in sorted(tried, key=lambda pair: pair[1].total > limit)
    ]
    if trains_all:
        frozen = need.num_parameters * planner.precision.base_dtype(frozen=True).itemsize
        lines.append(f"--plugin lora: {frozen / 1e9:.1f} GB of frozen weights, which need no gradient and no state")
    return tuple(lines)


def _spread(planner: Planner, changes: Sequence[dict[str, Any]], ranks: Sequence[int], limit: int) -> tuple[str, Need]:
    """The fewest processes of fsdp2 that are enough, with the first of the changes that makes them so."""

    def tried(change: dict[str, Any], number: int) -> tuple[str, Need]:
        flags = " ".join([f"--distributed fsdp2 --nproc {number}", *filter(None, [_flags(change)])])
        return f"{flags}, each on a device of its own", planner.need(ranks=number, distributed="fsdp2", **change)

    each = (tried(change, number) for change in changes for number in ranks)
    return next((pair for pair in each if pair[1].total <= limit), tried(changes[-1], ranks[-1]))


def _flags(change: Mapping[str, Any]) -> str:
    """As the command line takes it."""
    words = [f"--{name.replace('_', '-')}" + ("" if value is True else f" {value}") for name, value in change.items()]
    return " ".join(words)


def _rate(planner: Planner, need: Need, given: float | None) -> tuple[float | None, tuple[str, ...]]:
    """Tokens a second of all processes, and how that is known."""
    if given is not None:
        return given, (f"{given:g} tokens/s as given",)
    if planner.device.flops is None:
        return None, ()
    # Forward 2, gradients of the inputs 2, of the weights 2 (Kaplan et al. 2020, arXiv:2001.08361, section 2.1).
    each = (4 * need.num_parameters + 2 * need.num_trainable) * (
        4 / 3 if planner.config.train.gradient_checkpointing else 1
    )
    rate = planner.device.flops * _UTILISATION / each * planner.num_processes
    return rate, (
        f"{rate:,.0f} tokens/s: {_UTILISATION:.0%} of {planner.device.flops / 1e12:.0f} TFLOP/s, {each / 1e9:.1f} "
        "GFLOP a token, without attention's products",
    )


def _assumptions(planner: Planner, need: Need) -> tuple[str, ...]:
    train = planner.config.train
    lines = [f"every row has {need.max_length} tokens, all of them trained"]
    if train.torch_compile:
        lines.append("as without torch_compile, whose buffers are not known before it compiles")
    if planner.device.is_gpu:
        lines.append(
            f"{_GPU_PROCESS_BYTES / 2**30:g} GiB for the CUDA context, libraries' workspaces and fragmentation; "
            "the kernels' path in plain torch; a GPU with bfloat16"
        )
    else:
        lines.append(
            "memory of the process as this one has it, with the same imports; MALLOC_MMAP_THRESHOLD_=65536 in the "
            "environment, without which glibc keeps what is freed, up to 35 % more (docs/planning.md)"
        )
    if planner.config.data.eval:
        lines.append("without the held-out evaluation; a lower --per-device-eval-batch-size makes that smaller")
    if planner.num_processes > 1:
        lines.append(
            "ddp: gradients are there all the time, as views of its buckets"
            if train.distributed == "ddp"
            else "fsdp2: what lies outside of the layers is whole for all of a step, and of layers those at work"
        )
    return tuple(lines)
