"""Time and memory of a provider's forward and backward.

Providers are measured round by round, one after the other within a round, so that whatever drifts (clocks,
temperature, neighbours on the machine) hits all of them alike.
"""

from __future__ import annotations

import functools
import gc
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Final, NamedTuple, Protocol

import torch
from torch import Tensor

from sftx_kernels.bench.cases import PASSES, Pass
from sftx_kernels.bench.devices import Device
from sftx_kernels.bench.problems import Problem
from sftx_kernels.bench.providers import Prepared, Provider

MIN_ROUNDS: Final = 3
MAX_ROUNDS: Final = 100

Times = dict[Pass, float]  # in ms


class Quantiles(NamedTuple):
    """In ms."""

    p20: float
    median: float
    p80: float


@dataclass
class Run:
    """One provider on one problem: what it computes, and what was measured of it so far."""

    provider: Provider
    prepared: Prepared
    problem: Problem
    upstream: list[Tensor] = field(default_factory=list)  # of the outputs; known after the first call
    samples: list[Times] = field(default_factory=list)

    def forward(self) -> tuple[Tensor, ...]:
        return self.prepared.forward()

    def backward(self, outputs: Sequence[Tensor]) -> tuple[Tensor, ...]:
        return torch.autograd.grad(outputs, list(self.prepared.leaves.values()), self.upstream)

    def first_call(self) -> dict[str, Tensor]:
        """Outputs and gradients by the names of a Reference; whatever is compiled, is compiled here."""
        outputs = self.forward()
        self.upstream = self.problem.upstream(outputs)
        gradients = self.backward(outputs)
        names = [f"y{number}" for number in range(len(outputs))] if outputs[0].dim() else ["loss"]
        flat = [y.reshape(-1, y.shape[-1]) if y.dim() else y for y in outputs]
        return dict(zip(names, flat, strict=True)) | dict(zip(self.prepared.leaves, gradients, strict=True))

    def quantiles(self) -> dict[Pass, Quantiles]:
        return {name: quantiles([sample[name] for sample in self.samples]) for name in PASSES}


def quantiles(values: Sequence[float]) -> Quantiles:
    return Quantiles(
        *torch.tensor(values, dtype=torch.float64).quantile(torch.tensor([0.2, 0.5, 0.8]).double()).tolist()
    )


class Clock(Protocol):
    num_warmups: int  # rounds that do not count

    def round(self, run: Run) -> Callable[[], Times]:
        """Runs all passes once; the result is read after `finish`."""
        ...

    def finish(self) -> None: ...


class _CpuClock:
    """Caches are left as the provider before left them: with inputs of this size, full of something else."""

    num_warmups = 0  # the first call was one

    def round(self, run: Run) -> Callable[[], Times]:
        start = time.perf_counter()
        outputs = run.forward()
        middle = time.perf_counter()
        run.backward(outputs)
        end = time.perf_counter()
        times: Times = {
            "forward": (middle - start) * 1e3,
            "backward": (end - middle) * 1e3,
            "both": (end - start) * 1e3,
        }
        return lambda: times

    def finish(self) -> None:
        pass


class _CudaClock:
    """Events around each pass, the cache flushed before; nothing waits within a round, so that launches overlap."""

    num_warmups = 1

    def __init__(self, device: Device) -> None:
        self.device = device.torch_device
        self.buffer = torch.empty(2 * device.peaks.cache_bytes, dtype=torch.int8, device=self.device)

    def round(self, run: Run) -> Callable[[], Times]:
        spans: dict[Pass, tuple[torch.cuda.Event, torch.cuda.Event]] = {}
        for name in PASSES:
            spans[name] = (torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True))
        with torch.cuda.device(self.device):
            self._start(spans["both"])
            run.backward(run.forward())
            spans["both"][1].record()
            self._start(spans["forward"])
            outputs = run.forward()
            spans["forward"][1].record()
            self._start(spans["backward"])
            run.backward(outputs)
            spans["backward"][1].record()
        return lambda: {name: start.elapsed_time(end) for name, (start, end) in spans.items()}

    def _start(self, span: tuple[torch.cuda.Event, torch.cuda.Event]) -> None:
        self.buffer.zero_()
        span[0].record()

    def finish(self) -> None:
        torch.cuda.synchronize(self.device)


def make_clock(device: Device) -> Clock:
    return _CudaClock(device) if device.torch_device.type == "cuda" else _CpuClock()


def time_runs(
    runs: Sequence[Run], clock: Clock, budget_s: float, guard: Callable[[Run, Callable[[], None]], None]
) -> None:
    """Fills the samples of the runs, in as many rounds as the budget allows, MIN_ROUNDS at least.

    `guard` calls a function for a run and keeps its failure, so that one that raises ends its own row alone.
    """
    start = time.perf_counter()
    for number in range(1, clock.num_warmups + MAX_ROUNDS + 1):
        pending: list[tuple[Run, Callable[[], Times]]] = []

        def one(run: Run, pending: list[tuple[Run, Callable[[], Times]]]) -> None:
            pending.append((run, clock.round(run)))

        for run in runs:
            guard(run, functools.partial(one, run, pending))
        clock.finish()
        if number > clock.num_warmups:
            for run, read in pending:
                run.samples.append(read())
        elapsed = time.perf_counter() - start
        if number >= clock.num_warmups + MIN_ROUNDS and elapsed * (number + 1) / number > budget_s:
            break


@contextmanager
def _quiet() -> Iterator[None]:
    """The profiler of torch 2.13 writes two lines to stderr a session, whatever its log level says."""
    sys.stderr.flush()
    kept, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nowhere)


def peak_bytes(device: torch.device, function: Callable[[], object]) -> int:
    """The most that torch's allocator held at once while `function` ran, on top of what it held before."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        function()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    with (
        _quiet(),
        torch.profiler.profile(
            activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True, acc_events=True
        ) as result,
    ):
        function()
    assert result.profiler is not None
    kineto = result.profiler.kineto_results
    assert kineto is not None
    held = peak = 0
    for event in sorted((e for e in kineto.events() if e.name() == "[memory]"), key=lambda e: e.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak


def memory_of(run: Run, device: torch.device) -> int:
    """Peak of forward and backward, the gradients that stay included."""
    return peak_bytes(device, lambda: run.backward(run.forward()))


def rates(times: Mapping[Pass, Quantiles], run: Run, device: Device) -> dict[Pass, dict[str, float]]:
    """For each pass its least work over its median time: TFLOP/s, GB/s, and the per cent of the speed of light."""
    case, peaks = run.problem.case, device.peaks
    result: dict[Pass, dict[str, float]] = {}
    for name, work in case.least().items():
        seconds = times[name].median / 1e3
        light_s = max(work.flops / peaks.flops_per_s[case.dtype], work.num_bytes / peaks.bytes_per_s)
        result[name] = {
            "tflop_per_s": work.flops / seconds / 1e12,
            "gb_per_s": work.num_bytes / seconds / 1e9,
            "light_percent": 100 * light_s / seconds,
        }
    return result
