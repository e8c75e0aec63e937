"""`run` selects cases and providers, measures them in rounds, prints rows and writes files."""

from __future__ import annotations

import functools
import gc
import importlib.util
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final, TypeVar

import torch

from sftx_kernels import dispatch
from sftx_kernels.bench import BenchError, files, measure, operations, plot, report, rss
from sftx_kernels.bench.baseline import Baseline, regressed
from sftx_kernels.bench.cases import Case, Problem, Provider, Reference, make_problem
from sftx_kernels.bench.devices import Device, describe
from sftx_kernels.bench.measure import Run
from sftx_kernels.bench.operations import providers_of
from sftx_kernels.bench.report import Row

_T = TypeVar("_T")
_MAX_CHARS: Final = 240  # of an exception's message
_CASE_S: Final = {"cpu": 15.0, "cuda": 4.0}  # for the rounds of a case, unless MIN_ROUNDS take longer


@dataclass(frozen=True)
class Options:
    """Options are the arguments of `sftx bench`. None means the default of the device.

    max_regress: the share by which a median or a peak of sftx may exceed the baseline's.
    rss: measure peak resident memory too, in a process for each provider of each case (CPU only).
    budget_s: cases that have not begun by then are listed and not run; a running case is finished.
    """

    operations: tuple[str, ...] = operations.OPERATIONS
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
    """Raised when a kernel broke the GPU's context, so that nothing can run in this process any more."""


def run(options: Options) -> int:
    """Measure, print and write; return 1 if sftx regressed, failed or was not measured, or the device was lost, else 0.

    Raises:
        BenchError: the options cannot be satisfied.
    """
    deadline = time.monotonic() + options.budget_s if options.budget_s is not None else float("inf")
    torch_device = _device(options.device)
    todo = _cases(options, torch_device)
    measures_ours = _measures_ours(todo, options, torch_device)
    baseline = Baseline(options.baseline) if options.baseline else None
    options = _check_targets(options, todo)
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
        _write(options, environment, rows, todo)  # only the cases that were not run
    if absent := report.absent_of(rows):
        print("\nabsent:", *absent, sep="\n  ")
    if lost is not None:
        print(f"\nthe device was lost, the rest was not run: {lost}")
    for case in todo:
        print(f"not run: {case}" + ("" if lost else f": the budget of {options.budget_s:.0f} s was spent"))
    if options.plot is not None:
        for path in plot.write_plots(options.plot, rows, device.name):
            print(f"wrote {path}")
    good = _print_failures(rows, measures_ours=measures_ours) and lost is None
    return 0 if (baseline is None or _print_comparison(baseline, rows, options.max_regress)) and good else 1


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
        known = dict.fromkeys(p.name for p in operations.PROVIDERS if p.op in options.operations)
        if unknown := [name for name in options.providers if name not in known]:
            ops = ", ".join(options.operations)
            raise BenchError(f"providers: {ops} has no {unknown[0]!r}; there are {', '.join(known)}")
    if options.rss and device.type != "cpu":
        raise BenchError("rss: peak resident memory is measured on a CPU only")
    shapes = operations.read_shapes(options.shapes) if options.shapes else operations.default_shapes(device.type)
    dtypes = options.dtypes or operations.default_dtypes(device.type)
    cases = list(operations.expand(shapes, options.operations, dtypes, options.masks))
    if not cases:
        raise BenchError(f"{options.shapes}: has no shape of {', '.join(options.operations)}")
    idle = [op for op in dict.fromkeys(case.op for case in cases) if not providers_of(op, options.providers)]
    cases = [case for case in cases if case.op not in idle]
    if not cases:
        raise BenchError(f"providers: {', '.join(idle)} has none of {', '.join(options.providers or ())}")
    if idle:
        print(f"left out: {', '.join(idle)}; no provider of it was asked for")
    return cases


def _measures_ours(todo: Sequence[Case], options: Options, device: torch.device) -> bool:
    """Return True if a provider of sftx is selected; raises BenchError if SFTX_KERNELS requests an unusable backend."""
    ours = [case for case in todo if any(provider.ours for provider in providers_of(case.op, options.providers))]
    try:
        for case in ours:
            dispatch.decide(case.shape.dispatched_as, device, case.torch_dtype)
    except ValueError as error:
        raise BenchError(str(error)) from error
    return bool(ours)


def _check_targets(options: Options, todo: Sequence[Case]) -> Options:
    """Check before measuring that results can be written; return the options, without plots if it cannot draw."""
    if options.plot is not None and importlib.util.find_spec("matplotlib") is None:
        print("no plots: matplotlib is not installed")
        options = replace(options, plot=None)
    targets = [path for path in (options.json, options.csv) if path is not None]
    if options.plot is not None:
        targets += [plot.path_of(options.plot, op) for op in dict.fromkeys(case.op for case in todo)]
    files.probe(*targets)
    return options


def _write(options: Options, environment: dict[str, object], rows: Sequence[Row], not_run: Sequence[Case]) -> None:
    """Write the results so far: called after each case, so that a later failure loses none."""
    if options.json is not None:
        report.write_json(options.json, environment, rows, not_run)
    if options.csv is not None:
        report.write_csv(options.csv, environment, rows)


def _run_case(case: Case, options: Options, device: Device, deadline: float, keep: Callable[[Row], None]) -> list[Row]:
    """Return a row for each provider. If the device is lost, the rows so far are passed to `keep` first."""
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
    """Prepare a provider, call it once (compilation happens here) and record the error of its results."""
    run = Run(provider, provider.prepare(problem), problem)
    values = run.first_call()
    if reference is None:
        row.error_on = "not compared, each draws a dropout mask of its own"
    else:
        if provider.name != problem.case.shape.floor:  # which computes another function
            row.error, row.error_of = reference.error(values)
        row.error_on = reference.note
    return run


def _measure(runs: Sequence[tuple[Run, Row]], device: Device, budget_s: float, options: Options) -> None:
    """Time all runs together, then measure the memory of each."""
    row_of = {id(run): row for run, row in runs}

    def guard(run: Run, function: Callable[[], None]) -> None:
        if row_of[id(run)].failure is None:
            _attempt(row_of[id(run)], device, function)

    measure.time_runs([run for run, _ in runs], device, budget_s, guard)
    for run, row in runs:
        if row.failure is not None or not run.samples:
            continue
        times = run.quantiles()
        rates = measure.rates(times, run, device)
        row.num_rounds = len(run.samples)
        row.passes = {
            name: {f"{key}_ms": value for key, value in times[name]._asdict().items()} | rates[name] for name in times
        }
        # The peak of forward and backward includes the gradients.
        step = functools.partial(lambda run: run.backward(run.forward()), run)
        row.peak_bytes = _attempt(row, device, functools.partial(measure.peak_bytes, device.torch_device, step))
        if options.rss:
            row.peak_rss_bytes = _attempt(
                row, device, functools.partial(rss.peak_rss_bytes, run.problem.case, run.provider)
            )


def _attempt(row: Row, device: Device, function: Callable[[], _T]) -> _T | None:
    """Return the function's result. If it raises, record the exception in the row and return None.

    Raises:
        _DeviceLostError: the device fails every later call too, as after an illegal memory access.
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


def _print_failures(rows: Sequence[Row], *, measures_ours: bool) -> bool:
    """Print the failures of sftx; return True if there are none and, with `measures_ours`, sftx was measured."""
    failed = [row for row in rows if row.ours and row.failure is not None]
    for row in failed:
        print(f"failed: {row.provider}, {row.case}: {row.failure}")
    nothing = measures_ours and not any(row.ours and row.passes for row in rows)
    if nothing:
        print("nothing of ours was measured")
    return not failed and not nothing


def _print_comparison(baseline: Baseline, rows: Sequence[Row], max_regress: float) -> bool:
    """Print the figures that are worse than the baseline by more than `max_regress`; return True if there are none.

    Return False if no figure could be compared.
    """
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
