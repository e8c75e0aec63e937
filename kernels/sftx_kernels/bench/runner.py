"""The bench from top to bottom: cases, providers, rounds, rows, files."""

from __future__ import annotations

import functools
import gc
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final, TypeVar

import torch

from sftx_kernels import dispatch
from sftx_kernels.bench import BenchError, cases, files, measure, plot, report, rss
from sftx_kernels.bench.baseline import Baseline, regressed
from sftx_kernels.bench.cases import Case
from sftx_kernels.bench.devices import Device, describe
from sftx_kernels.bench.measure import Run
from sftx_kernels.bench.peers import all_providers, providers_of
from sftx_kernels.bench.problems import Problem, Reference, make_problem
from sftx_kernels.bench.providers import Provider
from sftx_kernels.bench.report import Row

_T = TypeVar("_T")
_MAX_CHARS: Final = 240  # of a foreign exception's message
# The rounds of a case go on for this long, if MIN_ROUNDS do not take longer.
_CASE_S: Final = {"cpu": 15.0, "cuda": 4.0}
# Whose backend an operation runs on.
_DISPATCHED: Final = {
    "cross-entropy": "cross_entropy", "linear-cross-entropy": "cross_entropy", "lora": "lora_linear",
}  # fmt: skip


@dataclass(frozen=True)
class Options:
    """What `sftx bench` was asked. None: the default of the device.

    max_regress: the share by which a median or a peak of ours may exceed the baseline's.
    rss: measure peak resident memory too, a process for each provider of each case (CPU only).
    budget_s: cases that have not begun by then are not run, and said; the case that runs is finished.
    """

    operations: tuple[str, ...] = cases.OPERATIONS
    device: str | None = None
    dtypes: tuple[str, ...] | None = None
    shapes: Path | None = None
    providers: tuple[str, ...] | None = None
    masks: tuple[float, ...] = (0.0, 0.5, 0.9)
    json: Path | None = None
    csv: Path | None = None
    plot: Path | None = None
    baseline: Path | None = None
    max_regress: float = 0.05
    rss: bool = False
    budget_s: float | None = None


class _DeviceLostError(RuntimeError):
    """A kernel broke the GPU's context, and nothing can run in this process any more."""


def run(options: Options) -> int:
    """Measures, prints and writes. 1 where ours regressed, failed or was not measured, or the device was lost; else 0.

    Raises:
        BenchError: what was asked for cannot be.
    """
    deadline = time.monotonic() + options.budget_s if options.budget_s is not None else float("inf")
    torch_device = _device(options.device)
    todo = _cases(options, torch_device)
    wants_ours = _wants_ours(todo, options, torch_device)
    baseline = Baseline(options.baseline) if options.baseline else None
    options = _probed(options, todo)
    device = describe(torch_device, tuple(dict.fromkeys(case.dtype for case in todo)))
    environment = report.environment(device)
    if baseline is not None:
        baseline.match(environment)
    print(report.header(environment, device))
    rows: list[Row] = []
    lost = None
    while todo and time.monotonic() < deadline and lost is None:
        try:
            rows += _run_case(todo.pop(0), options, device, deadline, rows.append)
        except _DeviceLostError as error:
            lost = str(error)
        _write(options, environment, rows, todo)
    if not rows:
        _write(options, environment, rows, todo)  # what was not run is all there is
    _print_left_out(rows, todo, options, lost)
    if options.plot is not None:
        for path in plot.write_plots(options.plot, rows, device.name):
            print(f"wrote {path}")
    good = _good(rows, wants_ours) and lost is None
    return 0 if (baseline is None or _holds(baseline, rows, options.max_regress)) and good else 1


def _print_left_out(rows: Sequence[Row], todo: Sequence[Case], options: Options, lost: str | None) -> None:
    if absent := report.absent_of(rows):
        print("\nabsent:", *absent, sep="\n  ")
    if lost is not None:
        print(f"\nthe device was lost, the rest was not run: {lost}")
    for case in todo:
        print(f"not run: {case}" + ("" if lost else f": the budget of {options.budget_s:.0f} s was spent"))


def _device(name: str | None) -> torch.device:
    has_gpu = torch.cuda.is_available()
    try:
        device = torch.device(name or ("cuda" if has_gpu else "cpu"))
    except RuntimeError as error:
        raise BenchError(f"device: expected cpu, cuda or cuda:N, got {name!r}") from error
    if device.type not in ("cpu", "cuda"):
        raise BenchError(f"device: expected cpu, cuda or cuda:N, got {name!r}")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise BenchError(f"device: {name} is not there; torch sees {torch.cuda.device_count()} GPUs")
    return device


def _cases(options: Options, device: torch.device) -> list[Case]:
    if options.providers is not None:
        known = dict.fromkeys(p.name for p in all_providers() if p.op in options.operations)
        if unknown := [name for name in options.providers if name not in known]:
            operations = ", ".join(options.operations)
            raise BenchError(f"providers: {operations} has no {unknown[0]!r}; there are {', '.join(known)}")
    if options.rss and device.type != "cpu":
        raise BenchError("rss: peak resident memory is measured on a CPU only")
    shapes = cases.read_shapes(options.shapes) if options.shapes else cases.default_shapes(device.type)
    dtypes = options.dtypes or cases.default_dtypes(device.type)
    found = list(cases.expand(shapes, options.operations, dtypes, options.masks))
    if not found:
        raise BenchError(f"{options.shapes}: has no shape of {', '.join(options.operations)}")
    idle = [op for op in dict.fromkeys(case.op for case in found) if not providers_of(op, options.providers)]
    found = [case for case in found if case.op not in idle]
    if not found:
        raise BenchError(f"providers: {', '.join(idle)} has none of {', '.join(options.providers or ())}")
    if idle:
        print(f"left out: {', '.join(idle)}; no provider of it was asked for")
    return found


def _wants_ours(todo: Sequence[Case], options: Options, device: torch.device) -> bool:
    """Whether anything of ours was asked for; BenchError if SFTX_KERNELS asks for what it cannot run on."""
    ours = [case for case in todo if any(provider.ours for provider in providers_of(case.op, options.providers))]
    try:
        for case in ours:
            dispatch.decide(_DISPATCHED[case.op], device, case.torch_dtype)
    except ValueError as error:
        raise BenchError(str(error)) from error
    return bool(ours)


def _probed(options: Options, todo: Sequence[Case]) -> Options:
    """The options, without pictures where nothing draws; a place that cannot be written is told now."""
    if options.plot is not None and not plot.has_matplotlib():
        print("no plots: matplotlib is not installed")
        options = replace(options, plot=None)
    targets = [path for path in (options.json, options.csv) if path is not None]
    if options.plot is not None:
        targets += [plot.path_of(options.plot, op) for op in dict.fromkeys(case.op for case in todo)]
    files.probe(*targets)
    return options


def _write(options: Options, environment: dict[str, object], rows: Sequence[Row], not_run: Sequence[Case]) -> None:
    """After each case, so that what was measured is kept whatever happens later."""
    if options.json is not None:
        report.write_json(options.json, environment, rows, not_run)
    if options.csv is not None:
        report.write_csv(options.csv, environment, rows)


def _run_case(case: Case, options: Options, device: Device, deadline: float, keep: Callable[[Row], None]) -> list[Row]:
    """A row for each provider. Where the device is lost, they are given to `keep` as far as they are."""
    providers = providers_of(case.op, options.providers)
    rows = [Row(case, provider.name, provider.ours, version=provider.version()) for provider in providers]
    try:
        _fill_rows(case, list(zip(providers, rows, strict=True)), options, device, deadline)
    except _DeviceLostError:
        for row in rows:
            if not row.passes and row.failure is None and row.absent is None:
                row.absent = "the device was lost"
            keep(row)
        raise
    report.print_case(rows)
    return rows


def _fill_rows(
    case: Case, rows: Sequence[tuple[Provider, Row]], options: Options, device: Device, deadline: float
) -> None:
    try:
        problem = make_problem(case, device.torch_device)
        reference = problem.reference(device.peaks.flops_per_s["fp64"])
    except (RuntimeError, MemoryError) as error:  # a small GPU has no room for the large cases
        for _, row in rows:
            row.absent = f"no inputs or no reference: {_one_line(error)}"
        return
    runs: list[tuple[Run, Row]] = []
    for provider, row in rows:
        row.absent = provider.absent(case, device.torch_device)
        if row.absent is None and runs and time.monotonic() > deadline:
            row.absent = "the time budget was spent"
        if row.absent is None:
            run = _attempt(row, device, functools.partial(_first_call, provider, problem, reference, row))
            if run is not None:
                runs.append((run, row))
    budget_s = min(_CASE_S[device.torch_device.type], max(0.0, deadline - time.monotonic()))
    _measure(runs, device, budget_s, options)


def _first_call(provider: Provider, problem: Problem, reference: Reference | None, row: Row) -> Run:
    """Prepares, compiles what is compiled at the first call, and takes the error of its results."""
    run = Run(provider, provider.prepare(problem), problem)
    values = run.first_call()
    if reference is None:
        row.error_on = "not compared, each draws a dropout mask of its own"
    else:
        # The floor computes another function: its y is not LoRA's.
        if provider.name != report.FLOOR:
            row.error, row.error_of = reference.error(values)
        row.error_on = reference.note
    return run


def _measure(runs: Sequence[tuple[Run, Row]], device: Device, budget_s: float, options: Options) -> None:
    """Times all of them together, then takes the memory of each."""
    row_of = {id(run): row for run, row in runs}

    def guard(run: Run, function: Callable[[], None]) -> None:
        if row_of[id(run)].failure is None:
            _attempt(row_of[id(run)], device, function)

    measure.time_runs([run for run, _ in runs], measure.make_clock(device), budget_s, guard)
    for run, row in runs:
        if row.failure is not None or not run.samples:
            continue
        times = run.quantiles()
        rates = measure.rates(times, run, device)
        row.num_rounds = len(run.samples)
        row.passes = {
            name: {f"{key}_ms": value for key, value in times[name]._asdict().items()} | rates[name] for name in times
        }
        row.peak_bytes = _attempt(row, device, functools.partial(measure.memory_of, run, device.torch_device))
        if options.rss:
            row.peak_rss_bytes = _attempt(
                row, device, functools.partial(rss.peak_rss_bytes, run.problem.case, run.provider)
            )


def _attempt(row: Row, device: Device, function: Callable[[], _T]) -> _T | None:
    """The function's result; where it raises, the row keeps the reason in one line and nothing else is hurt.

    Raises:
        _DeviceLostError: after an illegal access, say, every later call of the process fails too.
    """
    try:
        return function()
    except Exception as error:
        row.failure = _one_line(error)
    row.passes = {}
    gc.collect()
    if device.torch_device.type == "cuda":
        try:
            torch.cuda.synchronize(device.torch_device)
            torch.cuda.empty_cache()
        except RuntimeError as error:
            raise _DeviceLostError(f"{row.provider} on {row.case}: {row.failure}") from error
    return None


def _one_line(error: BaseException) -> str:
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text}"[:_MAX_CHARS].removesuffix(": ")


def _good(rows: Sequence[Row], wants_ours: bool) -> bool:
    """Prints who of ours failed; whether none did and, where ours was asked for, something of it was measured."""
    failed = [row for row in rows if row.ours and row.failure is not None]
    for row in failed:
        print(f"failed: {row.provider}, {row.case}: {row.failure}")
    nothing = wants_ours and not any(row.ours and row.passes for row in rows)
    if nothing:
        print("nothing of ours was measured")
    return not failed and not nothing


def _holds(baseline: Baseline, rows: Sequence[Row], max_regress: float) -> bool:
    """Prints what became worse than the baseline by more than was allowed; whether nothing did, of something."""
    changes, num_new = baseline.compare(rows)
    worse = [change for change in changes if regressed(change, max_regress)]
    print(f"\nagainst {baseline.path}: {len(changes)} figures, {len(worse)} worse by more than {max_regress:.1%}")
    if num_new:
        print(f"  not in the baseline: {num_new} rows")
    for difference in baseline.differences:
        print(f"  NOT THE SAME VERSION, so a change may not be ours: {difference}")
    for change in worse:
        print(f"  {change}")
    if not changes:
        print("  nothing was compared: no case and provider of ours is in both")
    return bool(changes) and not worse
