"""This module measures time and memory of a provider's forward and backward.

Providers are measured round by round, one after the other within a round, so that drift (clocks, temperature, other
processes) affects all of them equally.
"""

from __future__ import annotations

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

from sftx_kernels.bench.cases import PASSES, Pass, Prepared, Problem, Provider
from sftx_kernels.bench.devices import Device

MIN_ROUNDS: Final = 3
MAX_ROUNDS: Final = 100

Times = dict[Pass, float]  # in ms


class Quantiles(NamedTuple):
    """Quantiles of times, in ms."""

    p20: float
    median: float
    p80: float


@dataclass
class Run:
    """A Run is one provider on one problem, with the samples measured so far."""

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
        """Return outputs and gradients by the names of a Reference. Compilation happens in this call."""
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
        """Run all passes once; the returned function reads the times after `finish`."""
        ...

    def finish(self) -> None: ...


class _CpuClock:
    """This clock leaves caches with the previous provider's data, which with inputs of this size helps no provider."""

    num_warmups = 0  # `first_call` was a warm-up

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
    """This clock records CUDA events around each pass and flushes caches before it; nothing syncs within a round."""

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


def time_runs(
    runs: Sequence[Run], device: Device, budget_s: float, guard: Callable[[Run, Callable[[], None]], None]
) -> None:
    """Fill the samples of the runs, in as many rounds as the budget allows, at least MIN_ROUNDS.

    `guard` calls a function for a run and records its failure, so that an exception ends only that run's row.
    """
    clock: Clock = _CudaClock(device) if device.torch_device.type == "cuda" else _CpuClock()
    start = time.perf_counter()
    for number in range(1, clock.num_warmups + MAX_ROUNDS + 1):
        pending: list[tuple[Run, Callable[[], Times]]] = []

        for run in runs:
            guard(run, lambda run=run, pending=pending: pending.append((run, clock.round(run))))  # type: ignore[misc]
        clock.finish()
        if number > clock.num_warmups:
            for run, read in pending:
                run.samples.append(read())
        elapsed = time.perf_counter() - start
        if number >= clock.num_warmups + MIN_ROUNDS and elapsed * (number + 1) / number > budget_s:
            break


@contextmanager
def _quiet() -> Iterator[None]:
    """Redirect stderr: the profiler of torch 2.13 writes two lines to it in each session, at every log level."""
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
    """Return the peak of torch's allocator while `function` ran, minus what was allocated before."""
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


def rates(times: Mapping[Pass, Quantiles], run: Run, device: Device) -> dict[Pass, dict[str, float]]:
    """Return each pass's least work over its median time: TFLOP/s, GB/s, and the percentage of the speed of light."""
    case = run.problem.case
    result: dict[Pass, dict[str, float]] = {}
    for name, work in case.least().items():
        seconds = times[name].median / 1e3
        result[name] = {
            "tflop_per_s": work.flops / seconds / 1e12,
            "gb_per_s": work.num_bytes / seconds / 1e9,
            "light_percent": 100 * device.peaks.least_seconds(work, case.dtype) / seconds,
        }
    return result
