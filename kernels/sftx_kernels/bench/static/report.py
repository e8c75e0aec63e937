"""The static report compiles every shipped kernel configuration for GPUs that are not present, and checks the binaries.

A module of `sftx_kernels.triton` has `shipped(chip)`, which yields (name, Launch) with tensors on the meta device.
`rows` compiles them (`compiler.py`) into a `Row` each. `broken_gates` checks a row under any version of Triton; `stale`
compares rows with the golden file, which is valid for the version that it names. `run` does all of it and prints.

Compilation runs in separate processes, since the kernels may be interpreted in this one.
"""

from __future__ import annotations

import functools
import importlib
import json
import multiprocessing
import os
import pkgutil
import shutil
import sys
import warnings
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Final

from sftx_kernels.bench import BenchError, files
from sftx_kernels.bench.devices import DATA_SHEETS
from sftx_kernels.bench.report import print_table
from sftx_kernels.bench.static import assembly, compiler
from sftx_kernels.bench.static.occupancy import CHIP_OF_DEVICE
from sftx_kernels.triton.launch import CHIPS, Chip, Launch

_INTERPRET: Final = "TRITON_INTERPRET"

GOLDEN: Final = Path(__file__).resolve().parents[4] / "benchmarks" / "static.json"
"""This is the golden file of a checkout; the wheel has none."""

_COLUMNS: Final = 120


@dataclass(frozen=True)
class Row:
    """A Row describes one configuration on one target. It counts instructions in the text, not those executed."""

    arch: str
    name: str
    grid: int
    num_warps: int
    num_stages: int
    flops: int
    num_bytes: int
    uses_dot: bool
    roofline_us: Mapping[str, float]  # device -> the least time of its work
    error: str = ""  # why it did not compile; then all fields below are 0
    registers: int = 0  # of a thread; on AMD the vector registers
    stack_bytes: int = 0  # of a thread; scratch on AMD
    spill_stores: int = 0
    spill_loads: int = 0
    shared_bytes: int = 0  # of a program; LDS on AMD
    programs: int = 0  # on a multiprocessor at once
    occupancy: float = 0.0  # their warps, as a share of the largest number
    limited_by: str = ""
    tensor_core: Mapping[str, int] = field(default_factory=dict)  # instruction -> how many
    plain_dots: int = 0  # products of tiles that run without tensor cores
    stretches: Sequence[assembly.Stretch] = ()  # the innermost loops, the main one first

    @property
    def key(self) -> str:
        return f"{self.arch} {self.name}"


def modules() -> tuple[str, ...]:
    """Return the names of the modules of `sftx_kernels.triton` without importing them."""
    package = importlib.import_module("sftx_kernels.triton")
    return tuple(sorted(f"{package.__name__}.{module.name}" for module in pkgutil.iter_modules(package.__path__)))


def collect(chip: Chip, sources: Sequence[str]) -> dict[str, Launch]:
    """Return the launch of every configuration that `sources` (names of modules) ship for a chip, by its name.

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


# ---- gates


def broken_gates(row: Row) -> Iterator[str]:
    """Yield a complaint for each gate that a row does not pass.

    Most bytes that an innermost loop loads must come by vectors of 8 or more bytes a thread, or in bulk. Code without a
    loop needs only some: there, look-ups in a small table cannot be told from badly read data.
    """
    if row.error:
        yield f"does not compile: {row.error}"
        return
    if row.stack_bytes or row.spill_stores or row.spill_loads:
        yield f"spills: {row.stack_bytes} bytes of stack, {row.spill_stores} stores, {row.spill_loads} loads"

    if row.shared_bytes > CHIPS[row.arch].shared_bytes:
        yield f"shared memory: {row.shared_bytes} bytes, a program may take {CHIPS[row.arch].shared_bytes}"
    elif not row.programs:
        yield f"does not fit a multiprocessor: {row.limited_by}"

    if row.uses_dot and not row.tensor_core:
        yield "no tensor-core instruction, though it multiplies matrices"
    elif row.plain_dots:
        yield f"{row.plain_dots} products of tiles without tensor-core instructions"

    for stretch in row.stretches:
        narrow, wide = stretch.narrow_bytes, stretch.wide_bytes
        if narrow > wide and (stretch.is_loop or not wide):
            where = "an innermost loop" if stretch.is_loop else "a kernel without loops"
            yield f"scalar loads in {where}: bytes a thread -> loads: {dict(stretch.loads)}"


# ---- rows


def rows(archs: Sequence[str], sources: Sequence[str] | None = None, workers: int = 2) -> list[Row]:
    """Compile all configurations of `sources` (default: `modules()`) for `archs` in up to `workers` processes."""
    sources = tuple(sources or modules())
    spawn = multiprocessing.get_context("spawn")  # a fork would carry over the interpreted kernels
    workers = min(workers, os.cpu_count() or 1)
    with ProcessPoolExecutor(workers, mp_context=spawn, initializer=_start) as pool:
        try:
            with compiler.uninterrupted():
                plans = [(arch, pool.submit(_plan, arch, sources)) for arch in archs]
            groups = [(arch, names) for arch, plan in plans for names in plan.result()]
            with compiler.uninterrupted():
                futures = [(arch, names, pool.submit(_rows, arch, sources, names)) for arch, names in groups]
            return sorted(
                (row for arch, names, future in futures for row in _result(future, arch, names)),
                key=lambda row: row.key,
            )
        except KeyboardInterrupt:
            pool.shutdown(cancel_futures=True)  # waits only for running compilations
            raise


def _result(future: Future[list[Row]], arch: str, names: tuple[str, ...]) -> list[Row]:
    """Return a future's rows; if a compiler aborted, which kills its process and the pool, rows with that error."""
    try:
        return future.result()
    except BrokenProcessPool:
        error = "a compiler process died, on this configuration or on one beside it"
        return [Row(arch, name, 0, 0, 0, 0, 0, False, {}, error) for name in names]


def _start() -> None:
    """Initialise a worker: triton reads at import whether kernels are interpreted; here they are compiled."""
    if os.environ.pop(_INTERPRET, None) is not None:
        assert "triton" not in sys.modules, f"triton was imported while {_INTERPRET} was set"
    # Triton 3.9 warns that 3.10 changes the default; the golden file will show the effect.
    warnings.filterwarnings("ignore", "TRITON_DEFAULT_FP_FUSION", UserWarning)


_collected = functools.cache(lambda arch, sources: collect(CHIPS[arch], sources))


def _plan(arch: str, sources: tuple[str, ...]) -> list[tuple[str, ...]]:
    """Return the names of all configurations, grouped by identical compilation."""
    groups: dict[str, list[str]] = {}
    for name, launch in _collected(arch, sources).items():
        try:
            source, options = compiler.specialise(arch, launch)
        except Exception as problem:
            problem.add_note(f"in {name!r} for {arch}")
            raise
        groups.setdefault(f"{source.hash()} {options}", []).append(name)
    return [tuple(names) for names in groups.values()]


def _rows(arch: str, sources: tuple[str, ...], names: tuple[str, ...]) -> list[Row]:
    """Return the rows of a group of configurations with identical compilation."""
    launches = [_collected(arch, sources)[name] for name in names]
    properties: dict[str, Any]
    try:
        properties = compiler.properties(arch, launches[0])
    except Exception as error:  # any exception of a compiler is a result of the report
        cause: BaseException = error  # the last in the chain has the reason; Triton's own error only the source line
        while cause.__cause__ is not None:
            cause = cause.__cause__
        properties = {"error": f"{type(cause).__name__}: {' '.join(str(cause).split())}"[:300]}
    rows = []
    for name, launch in zip(names, launches, strict=True):
        dtype = "bf16" if launch.uses_dot else "fp32"
        roofline_us = {
            device: float(f"{DATA_SHEETS[device].least_seconds(launch.work, dtype) * 1e6:.4g}")
            for device, chip in CHIP_OF_DEVICE.items()
            if chip == arch
        }
        rows.append(
            Row(
                arch, name, launch.grid, launch.num_warps, launch.num_stages, launch.work.flops, launch.work.num_bytes,
                launch.uses_dot, roofline_us, **properties,
            )
        )  # fmt: skip
    return rows


# ---- the golden file


def stale(golden: Path, rows: Sequence[Row], archs: Sequence[str]) -> list[str]:
    """Return a complaint for each row of `archs` that differs from the golden file.

    There is none if the file does not exist (as with an installed wheel) or was written with another Triton.
    """
    known = _read(golden)
    if known["triton"] != _triton_version():
        return []
    before = {key: row for key, row in known["rows"].items() if key.split()[0] in archs}
    now = {row.key: _as_json(row) for row in rows}
    complaints = [f"{key}: not in the golden file" for key in now.keys() - before.keys()]
    complaints += [f"{key}: in the golden file, and no longer shipped" for key in before.keys() - now.keys()]
    for key in before.keys() & now.keys():
        old, new = before[key], now[key]
        changed = sorted(name for name in old.keys() | new.keys() if old.get(name) != new.get(name))
        if changed:
            complaints.append(f"{key}: " + "; ".join(f"{name} {old.get(name)} -> {new.get(name)}" for name in changed))
    return sorted(complaints)


def write_golden(golden: Path, rows: Sequence[Row], archs: Sequence[str]) -> None:
    """Write a line for each row, so that diffs are readable. Rows of other targets stay if they have this version."""
    known = _read(golden)
    same = known["triton"] == _triton_version()
    kept = {key: row for key, row in known["rows"].items() if same and key.split()[0] not in archs}
    lines = [
        f"{json.dumps(key)}: {json.dumps(row, sort_keys=True)}"
        for key, row in sorted((kept | {row.key: _as_json(row) for row in rows}).items())
    ]
    with files.writing(golden) as file:
        file.write(f'{{"triton": "{_triton_version()}", "rows": {{\n' + ",\n".join(lines) + "\n}}\n")


def _read(golden: Path) -> dict[str, Any]:
    if not golden.exists():
        return {"triton": None, "rows": {}}
    known = files.read_json(golden)
    rows = known.get("rows") if isinstance(known, dict) and isinstance(known.get("triton"), str) else None
    if not isinstance(rows, dict) or not all(key.split() and isinstance(row, dict) for key, row in rows.items()):
        raise BenchError(f'{golden}: expected a golden file, with "triton" and "rows" by name')
    return {"triton": known["triton"], "rows": rows}


def _as_json(row: Row) -> dict[str, Any]:
    """Return a row without its key, as JSON values."""
    fields: dict[str, Any] = json.loads(json.dumps(asdict(row)))
    return {name: value for name, value in fields.items() if name not in ("arch", "name")}


def _triton_version() -> str:
    import triton

    return str(triton.__version__)


# ---- the report


def run(
    archs: Sequence[str] | None = None,
    json_path: Path | None = None,
    update_golden: bool = False,
    workers: int = 2,
    *,
    golden: Path = GOLDEN,
    sources: Sequence[str] | None = None,
) -> int:
    """Print the report; return 1 if a gate is broken or the golden file is stale, else 0.

    Args:
        archs: some of CHIPS; None for all.
        json_path: a file to which the rows are written too.
        update_golden: rewrite the golden file instead of comparing with it.
        sources: modules with `shipped`; None for `modules()`.

    Raises:
        BenchError: an unknown target, a golden file or `json_path` that cannot be written, or an invalid golden file.
    """
    archs = tuple(archs or CHIPS)
    if unknown := [arch for arch in archs if arch not in CHIPS]:
        raise BenchError(f"targets: expected some of {', '.join(CHIPS)}, got {', '.join(map(repr, unknown))}")
    if update_golden and not golden.parent.is_dir():
        raise BenchError(f"the golden file: expected a checkout of the project, got no {golden.parent}")
    files.probe(*filter(None, (json_path, golden if update_golden else None)))
    _read(golden)  # raises before anything is compiled
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
    known_version = _read(golden)["triton"]
    if known_version is None:
        comparison = f"not compared: no golden file at {golden}"
    elif known_version != _triton_version():
        comparison = f"not compared: the golden file is of Triton {known_version}"
    else:
        comparison = "compared with the golden file"
    if update_golden:
        write_golden(golden, found, archs)
        comparison = f"written to {golden}"
    else:
        complaints += [f"stale: {complaint}" for complaint in stale(golden, found, archs)]
    for complaint in complaints:
        print(complaint)
    print(f"Triton {_triton_version()}: {len(found)} rows, {len(complaints)} complaints; {comparison}")
    return 1 if complaints else 0


def _print_table(arch: str, rows: Sequence[Row]) -> None:
    """Print registers, spills and loads of a thread, programs and warps of a multiprocessor, and roofline times."""
    devices = [device for device, chip in CHIP_OF_DEVICE.items() if chip == arch]
    header = [
        arch, "regs", "spills", "shared", "programs", "warps", "tensor core", "loads in loop", "GFLOP", "MB",
        *(f"{device} us" for device in devices),
    ]  # fmt: skip
    print()
    width = shutil.get_terminal_size().columns if sys.stdout.isatty() else _COLUMNS
    print_table([header, *(_cells(row, devices) for row in rows)], width=width)


def _cells(row: Row, devices: Sequence[str]) -> list[str]:
    name = row.name.replace("/", " ")  # a narrow column breaks at the spaces
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
    """Format three digits, never as a power of ten."""
    return f"{number:.0f}" if number >= 100 else f"{number:.3g}"
