"""Every shipped kernel configuration, compiled ahead of time for GPUs that are not here, and what came out.

Each module of `sftx_kernels.gpu` has `shipped(chip)`, which yields (name, Launch) with tensors on the meta device.
`rows` compiles them (`aot.py`) and makes a `Row` of each. `broken_gates` says what is wrong with a row, whatever the
version of Triton; `stale` compares rows with the golden file, which holds for the version that it names. `run` does
all of it and prints.

Compilation runs in processes of its own, since the kernels may be interpreted in this one.
"""

from __future__ import annotations

import functools
import importlib
import json
import multiprocessing
import os
import pkgutil
import sys
import warnings
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Final

from sftx_kernels.bench import BenchError, aot, assembly, files, limits
from sftx_kernels.gpu.launch import CHIPS, Chip, Launch

_INTERPRET: Final = "TRITON_INTERPRET"

GOLDEN: Final = Path(__file__).resolve().parents[3] / "benchmarks" / "static.json"
"""Lies in a checkout; the wheel has none."""

_COLUMNS: Final = 120


@dataclass(frozen=True)
class Row:
    """One configuration on one target. Counts are of instructions in the text, not of those executed."""

    arch: str
    name: str
    grid: int
    num_warps: int
    num_stages: int
    flops: int
    num_bytes: int
    uses_dot: bool
    roofline_us: Mapping[str, float]  # device -> the least time there
    error: str = ""  # why it did not compile; then all below is 0
    registers: int = 0  # of a thread; on AMD the vector registers
    stack_bytes: int = 0  # of a thread; scratch on AMD
    spill_stores: int = 0
    spill_loads: int = 0
    shared_bytes: int = 0  # of a program; LDS on AMD
    programs: int = 0  # that a multiprocessor holds at once
    occupancy: float = 0.0  # its warps, as a share of those it could hold
    limited_by: str = ""
    tensor_core: Mapping[str, int] = field(default_factory=dict)  # instruction -> how many
    plain_dots: int = 0  # products of tiles that run without tensor cores
    stretches: Sequence[assembly.Stretch] = ()  # the innermost loops, the main one first

    @property
    def key(self) -> str:
        return f"{self.arch} {self.name}"


def modules() -> tuple[str, ...]:
    """The modules of `sftx_kernels.gpu`, by name; imports none."""
    package = importlib.import_module("sftx_kernels.gpu")
    return tuple(sorted(f"{package.__name__}.{module.name}" for module in pkgutil.iter_modules(package.__path__)))


def collect(chip: Chip, sources: Sequence[str]) -> dict[str, Launch]:
    """Name -> launch of all configurations that `sources` (names of modules) ship for a chip. Imports triton.

    Raises:
        ValueError: two configurations have one name.
    """
    launches: dict[str, Launch] = {}
    for source in sources:
        shipped = getattr(importlib.import_module(source), "shipped", None)
        for name, launch in shipped(chip) if shipped else ():
            if name in launches:
                raise ValueError(f"{source}.shipped: two configurations are called {name!r}")
            launches[name] = launch
    return launches


# Gates


def broken_gates(row: Row) -> list[str]:
    """What is wrong with a row, one complaint each; none if it may ship."""
    if row.error:
        return [f"does not compile: {row.error}"]
    return [*_spills(row), *_shared(row), *_dots(row), *_loads(row)]


def _spills(row: Row) -> Iterator[str]:
    if row.stack_bytes or row.spill_stores or row.spill_loads:
        yield f"spills: {row.stack_bytes} bytes of stack, {row.spill_stores} stores, {row.spill_loads} loads"


def _shared(row: Row) -> Iterator[str]:
    if row.shared_bytes > CHIPS[row.arch].shared_bytes:
        yield f"shared memory: {row.shared_bytes} bytes, a program may take {CHIPS[row.arch].shared_bytes}"
    elif not row.programs:
        yield f"does not fit a multiprocessor: {row.limited_by}"


def _dots(row: Row) -> Iterator[str]:
    if row.uses_dot and not row.tensor_core:
        yield "no tensor-core instruction, though it multiplies matrices"
    elif row.plain_dots:
        yield f"{row.plain_dots} products of tiles without tensor-core instructions"


def _loads(row: Row) -> Iterator[str]:
    """Most bytes that an innermost loop loads must come by vectors of 8 or more bytes a thread, or in bulk. Of code
    without a loop only some must: there, a look-up in a small table cannot be told from badly read data."""
    for stretch in row.stretches:
        narrow, wide = stretch.narrow_bytes, stretch.wide_bytes
        if narrow > wide and (stretch.is_loop or not wide):
            where = "an innermost loop" if stretch.is_loop else "a kernel without loops"
            yield f"scalar loads in {where}: bytes a thread -> loads: {dict(stretch.loads)}"


# Rows


def rows(archs: Sequence[str], sources: Sequence[str] | None = None, workers: int = 2) -> list[Row]:
    """All configurations of `sources` (default: `modules()`) on `archs`, compiled by up to `workers` processes."""
    sources = tuple(sources or modules())
    spawn = multiprocessing.get_context("spawn")  # a fork would carry over the interpreted kernels
    workers = min(workers, os.cpu_count() or 1)  # and the pool starts none without a task
    with ProcessPoolExecutor(workers, mp_context=spawn, initializer=_start) as pool:
        try:
            with aot.uninterrupted():
                plans = [(arch, pool.submit(_plan, arch, sources)) for arch in archs]
            groups = [(arch, names) for arch, plan in plans for names in plan.result()]
            with aot.uninterrupted():
                found = [(arch, names, pool.submit(_rows, arch, sources, names)) for arch, names in groups]
            return sorted(
                (row for arch, names, future in found for row in _result(future, arch, names)), key=lambda row: row.key
            )
        except KeyboardInterrupt:
            pool.shutdown(cancel_futures=True)  # waits for what is being compiled alone
            raise


def _result(future: Future[list[Row]], arch: str, names: tuple[str, ...]) -> list[Row]:
    """A compiler that aborts takes its process with it, and the pool, but not the report."""
    try:
        return future.result()
    except BrokenProcessPool:
        error = "a compiler process died, on this configuration or on one beside it"
        return [Row(arch, name, 0, 0, 0, 0, 0, False, {}, error) for name in names]


def _start() -> None:
    """A worker's first act: kernels here are compiled, never interpreted, which triton asks as it is imported."""
    if os.environ.pop(_INTERPRET, None) is not None:
        assert "triton" not in sys.modules, f"triton was imported while {_INTERPRET} was set"
    # Triton 3.9 announces that 3.10 changes the default; the golden file will show what that changes.
    warnings.filterwarnings("ignore", "TRITON_DEFAULT_FP_FUSION", UserWarning)


_collected = functools.cache(lambda arch, sources: collect(CHIPS[arch], sources))


def _plan(arch: str, sources: tuple[str, ...]) -> list[tuple[str, ...]]:
    """The names of all configurations; those that are compiled alike stand together."""
    groups: dict[str, list[str]] = {}
    for name, launch in _collected(arch, sources).items():
        try:
            source, options = aot.specialise(arch, launch)
        except Exception as problem:
            problem.add_note(f"in {name!r} for {arch}")
            raise
        groups.setdefault(f"{source.hash()} {options}", []).append(name)
    return [tuple(names) for names in groups.values()]


def _rows(arch: str, sources: tuple[str, ...], names: tuple[str, ...]) -> list[Row]:
    """The rows of configurations that are compiled alike."""
    launches = [_collected(arch, sources)[name] for name in names]
    found: dict[str, Any]
    try:
        found = aot.findings(arch, launches[0], aot.compile_launch(arch, launches[0]))
    except Exception as problem:  # whatever a compiler raises is a finding of the report
        found = {"error": _told(problem)}
    return [_row(arch, name, launch, found) for name, launch in zip(names, launches, strict=True)]


def _told(problem: BaseException) -> str:
    """One line, of what lies at the bottom: Triton's own error only points at the place."""
    while problem.__cause__ is not None:
        problem = problem.__cause__
    return f"{type(problem).__name__}: {' '.join(str(problem).split())}"[:300]


def _row(arch: str, name: str, launch: Launch, found: Mapping[str, Any]) -> Row:
    work = launch.work
    roofline_us = {
        device: float(f"{peak.roofline_s(work.flops, work.num_bytes, uses_dot=launch.uses_dot) * 1e6:.4g}")
        for device, peak in limits.PEAKS.items()
        if peak.arch == arch
    }
    return Row(
        arch, name, launch.grid, launch.num_warps, launch.num_stages, work.flops, work.num_bytes, launch.uses_dot,
        roofline_us, **found,
    )  # fmt: skip


# The golden file


def stale(golden: Path, found: Sequence[Row], archs: Sequence[str]) -> list[str]:
    """Where the golden file differs from what was found on `archs`, one complaint a row.

    None where there is no such file (beside an installed wheel), or it was written with another Triton.
    """
    known = _read(golden)
    if known["triton"] != _triton_version():
        return []
    before = {key: row for key, row in known["rows"].items() if key.split()[0] in archs}
    now = {row.key: _as_json(row) for row in found}
    return [
        f"{key}: {change}"
        for key in sorted(before.keys() | now.keys())
        for change in _changes(before.get(key), now.get(key))
    ]


def _changes(before: Mapping[str, Any] | None, now: Mapping[str, Any] | None) -> list[str]:
    if before is None or now is None:
        return ["not in the golden file" if before is None else "in the golden file, and no longer shipped"]
    fields = sorted(name for name in before.keys() | now.keys() if before.get(name) != now.get(name))
    changes = [f"{name} {before.get(name)} -> {now.get(name)}" for name in fields]
    return ["; ".join(changes)] if changes else []


def write_golden(golden: Path, found: Sequence[Row], archs: Sequence[str]) -> None:
    """One line a row, so that a diff shows what changed. Rows of other targets stay if Triton's version is theirs."""
    known = _read(golden)
    same = known["triton"] == _triton_version()
    kept = {key: row for key, row in known["rows"].items() if same and key.split()[0] not in archs}
    lines = [
        f"{json.dumps(key)}: {json.dumps(row, sort_keys=True)}"
        for key, row in sorted((kept | {row.key: _as_json(row) for row in found}).items())
    ]
    with files.writing(golden) as file:
        file.write(f'{{"triton": "{_triton_version()}", "rows": {{\n' + ",\n".join(lines) + "\n}}\n")


def _read(golden: Path) -> dict[str, Any]:
    if not golden.exists():
        return {"triton": None, "rows": {}}
    known = files.read_json(golden)
    rows = known.get("rows") if isinstance(known, dict) and isinstance(known.get("triton"), str) else None
    if not isinstance(rows, dict) or not all(key.split() and isinstance(row, dict) for key, row in rows.items()):
        raise BenchError(f'{golden}: expected a golden file, of "triton" and "rows" by name')
    return {"triton": known["triton"], "rows": rows}


def _as_json(row: Row) -> dict[str, Any]:
    """A row without its key, as it comes back from JSON."""
    fields: dict[str, Any] = json.loads(json.dumps(asdict(row)))
    return {name: value for name, value in fields.items() if name not in ("arch", "name")}


def _triton_version() -> str:
    import triton

    return str(triton.__version__)


# The report


def run(
    archs: Sequence[str] | None = None,
    json_path: Path | None = None,
    update_golden: bool = False,
    workers: int = 2,
    *,
    golden: Path = GOLDEN,
    sources: Sequence[str] | None = None,
) -> int:
    """Prints the report; 1 if a gate is broken or the golden file is stale, else 0.

    Args:
        archs: of CHIPS; None for all.
        json_path: where the rows are written too.
        update_golden: writes the golden file anew instead of comparing with it.
        sources: modules with `shipped`; None for `modules()`.

    Raises:
        BenchError: an unknown target, no place for the golden file or `json_path`, or a golden file that is none.
    """
    archs = tuple(archs or CHIPS)
    if unknown := [arch for arch in archs if arch not in CHIPS]:
        raise BenchError(f"targets: expected some of {', '.join(CHIPS)}, got {', '.join(map(repr, unknown))}")
    if update_golden and not golden.parent.is_dir():
        raise BenchError(f"the golden file: expected a checkout of the project, got no {golden.parent}")
    files.probe(*filter(None, (json_path, golden if update_golden else None)))
    _read(golden)  # what is wrong with it is told before anything is compiled
    if os.environ.get(_INTERPRET):
        print(f"{_INTERPRET} is set; the report compiles without it", file=sys.stderr)
    found = rows(archs, sources, workers)
    for arch in archs:
        _print_table(arch, [row for row in found if row.arch == arch])
    complaints = [f"gate: {row.key}: {complaint}" for row in found for complaint in broken_gates(row)]
    if json_path is not None:
        report = {"triton": _triton_version(), "rows": {row.key: _as_json(row) for row in found}}
        with files.writing(json_path) as file:
            file.write(json.dumps(report, indent=1, sort_keys=True) + "\n")
    comparison = _comparison(golden)
    if update_golden:
        write_golden(golden, found, archs)
        comparison = f"written to {golden}"
    else:
        complaints += [f"stale: {complaint}" for complaint in stale(golden, found, archs)]
    for complaint in complaints:
        print(complaint)
    print(f"Triton {_triton_version()}: {len(found)} rows, {len(complaints)} complaints; {comparison}")
    return 1 if complaints else 0


def _comparison(golden: Path) -> str:
    version = _read(golden)["triton"]
    if version is None:
        return f"not compared: no golden file at {golden}"
    if version != _triton_version():
        return f"not compared: the golden file is of Triton {version}"
    return "compared with the golden file"


def _print_table(arch: str, found: Sequence[Row]) -> None:
    """Registers, spills and loads are a thread's; programs and warps a multiprocessor's; times the roofline's."""
    devices = [device for device, peak in limits.PEAKS.items() if peak.arch == arch]
    header = [
        arch, "regs", "spills", "shared", "programs", "warps", "tensor core", "loads in loop", "GFLOP", "MB",
        *(f"{device} us" for device in devices),
    ]  # fmt: skip
    print_table(header, [_cells(row, devices) for row in found])


def _cells(row: Row, devices: Sequence[str]) -> list[str]:
    # Parts of a name, apart: so a narrow column breaks between them.
    name = row.name.replace("/", " ")
    if row.error:
        return [name, *["-"] * 5, row.error, *["-"] * (3 + len(devices))]
    families = sorted({"mfma" if "mfma" in opcode else opcode for opcode in row.tensor_core})
    loads = row.stretches[0].loads if row.stretches else {}
    return [
        name, str(row.registers), str(row.spill_stores + row.spill_loads), f"{row.shared_bytes / 1024:.0f}K",
        str(row.programs), f"{row.occupancy:.0%}", " ".join([str(sum(row.tensor_core.values())), *families]),
        " ".join(f"{n}x{width}" for width, n in loads.items()) or "-", _short(row.flops / 1e9),
        _short(row.num_bytes / 1e6), *(_short(row.roofline_us[device]) for device in devices),
    ]  # fmt: skip


def _short(number: float) -> str:
    """Three digits, never as a power of ten."""
    return f"{number:.0f}" if number >= 100 else f"{number:.3g}"


def print_table(header: Sequence[str], cells: Sequence[Sequence[str]]) -> None:
    """By rich where it is installed, else as aligned text."""
    try:
        from rich import box
        from rich.console import Console
        from rich.table import Table
    except ImportError:
        widths = [max(map(len, column)) for column in zip(header, *cells, strict=True)]
        for line in (header, *cells):
            print("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip())
        print()
        return
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
    for index, name in enumerate(header):
        table.add_column(
            name, justify="right" if index else "left", overflow="fold", no_wrap=bool(index) and "loads" not in name
        )
    for line in cells:
        table.add_row(*line)
    terminal = Console()
    Console(width=terminal.width if terminal.is_terminal else _COLUMNS).print(table)
