"""The static report: shipped kernels pass the gates and match the golden file, and each gate can fail.

The first tier compiles for sm_90 alone; the other chips are marked slow.
"""

from __future__ import annotations

import ast
import dataclasses
import functools
import json
import os
import signal
import subprocess
import sys
from concurrent.futures import Future
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

import pytest

from sftx_kernels.bench import BenchError
from sftx_kernels.bench.devices import DATA_SHEETS
from sftx_kernels.bench.report import print_table
from sftx_kernels.bench.static import assembly, compiler, report
from sftx_kernels.bench.static.assembly import Instruction, Stretch
from sftx_kernels.bench.static.occupancy import CHIP_OF_DEVICE, MULTIPROCESSORS, occupancy
from sftx_kernels.triton.launch import CHIPS, Work

SASS = """
.text.toy:
        /*0000*/                   LDG.E.64 R2, desc[UR4][R2.64] ;
        /*0010*/              @!P0 BRA `(.L_x_9) ;
.L_x_1:
        /*0020*/                   LDGSTS.E.BYPASS.LTC128B.128 [R1], desc[UR4][R2.64] ;
        /*0030*/                   LDG.E.U8.CONSTANT R2, desc[UR4][R2.64] ;
        /*0040*/                   SYNCS.PHASECHK.TRANS64.TRYWAIT P1, [UR6], R4 ;
        /*0050*/              @!P1 BRA `(.L_x_7) ;
.L_x_2:
        /*0060*/                   HGMMA.64x128x16.F32.BF16 R24, gdesc[UR8], R24 ;
        /*0070*/                   HFMA2.MMA R19, -RZ, RZ, 0, 0 ;
        /*0080*/                   BRA.U UP0, `(.L_x_1) ;
        /*0090*/                   STL [R1+0x8], R3 ;
        /*00a0*/                   EXIT ;
.L_x_7:
        /*00b0*/                   SYNCS.PHASECHK.TRANS64.TRYWAIT P1, [UR6], R4 ;
        /*00c0*/              @!P1 BRA `(.L_x_7) ;
        /*00d0*/                   BRA `(.L_x_2) ;
.L_x_9:
        /*00e0*/                   LDG.E.U16 R2, desc[UR4][R2.64] ;
        /*00f0*/              @!P0 BRA `(.L_x_9) ;
        /*0100*/                   EXIT ;
.L_x_10:
        /*0110*/                   BRA `(.L_x_10);
"""

AMDGCN = """
toy:                                    ; @toy
\ts_load_dwordx4 s[4:7], s[0:1], 0x0
.LBB0_1:                                ; %loop
\tbuffer_load_dwordx4 v[4:7], v12, s[24:27], 0 offen
\tglobal_load_ushort v1, v[2:3], off
\tv_mfma_f32_32x32x8_bf16 v[0:15], v[16:17], v[18:19], v[0:15]
\ts_cbranch_scc1 .LBB0_1                ; again
\tscratch_store_dword off, v1, off
\ts_endpgm
\t.amdgpu_metadata
amdhsa.kernels:
  - .agpr_count:     0
    .private_segment_fixed_size: 8
    .vgpr_count:     78
    .vgpr_spill_count: 1
"""


def test_loops_of_sass_are_found_though_their_waits_lie_out_of_line() -> None:
    main, other = assembly.stretches(assembly.parse_sass(SASS))
    assert main == Stretch(True, 1, {"1": 1, "16": 1})
    assert other == Stretch(True, 0, {"2": 1})
    assert (main.wide_bytes, main.narrow_bytes, other.narrow_bytes) == (16, 1, 2)


def test_loops_of_amdgcn() -> None:
    listing = assembly.parse_amdgcn(AMDGCN)
    assert assembly.stretches(listing) == [Stretch(True, 1, {"16": 1, "2": 1})]
    assert assembly.count([i for i in listing if isinstance(i, Instruction)], "scratch_store") == 1
    metadata = assembly.amd_metadata(AMDGCN)
    assert (metadata["vgpr_count"], metadata["vgpr_spill_count"], metadata["private_segment_fixed_size"]) == (78, 1, 8)


def test_of_nested_loops_the_inner_one_counts() -> None:
    load, branch = Instruction("LDG.E.128"), "outer inner"
    outer, inner = branch.split()
    listing = [outer, load, load, inner, load, Instruction("BRA", inner), Instruction("BRA", outer)]
    assert assembly.stretches(listing) == [Stretch(True, 0, {"16": 1})]


def test_a_kernel_without_loops_is_one_stretch() -> None:
    listing = [Instruction("LDG.E.128"), Instruction("LDG.E"), Instruction("UTMALDG.2D"), Instruction("STG.E")]
    (stretch,) = assembly.stretches(listing)
    assert stretch == Stretch(False, 0, {"16": 1, "4": 1, "bulk": 1})


@pytest.mark.parametrize(
    ("opcode", "width"),
    [
        *[("LDG.E.EF.128.CONSTANT", "16"), ("LDG.E.ENL2.256", "32"), ("LDGSTS.E", "4"), ("UBLKCP.S.G", "bulk")],
        *[("global_load_dwordx2", "8"), ("global_load_lds_dwordx4", "16"), ("buffer_load_ubyte_d16_hi", "1")],
        *[("global_load_short_d16", "2"), ("LDS.128", None), ("LDC.64", None), ("LDL", None)],
        *[("s_load_dwordx4", None), ("LDGDEPBAR", None), ("STG.E.128", None), ("buffer_store_dwordx4", None)],
    ],
)
def test_width_of_a_load(opcode: str, width: str | None) -> None:
    assert assembly.load_width(opcode) == width


@pytest.mark.parametrize(
    "opcode", ["HMMA.16816.F32", "HGMMA.64x128x16", "UTCHMMA", "UTCQMMA.2CTA", "v_mfma_f32_16x16x16"]
)
def test_tensor_core_instructions(opcode: str) -> None:
    assert assembly.tensor_core([Instruction(opcode), Instruction("HFMA2.MMA"), Instruction("FFMA")]).total() == 1


@pytest.mark.parametrize(
    ("arch", "warps", "registers", "shared", "programs", "limit"),
    [
        # 65536 registers / (256 threads x 128) = 2
        ("sm_90", 8, 128, 0, 2, "registers"),
        # 97 registers are given out as 104: 512 // 104 = 4 warps a scheduler, 16 in all
        ("sm_80", 4, 97, 0, 4, "registers"),
        # 228 KB / (96 KB and the system's 1 KB) = 2
        ("sm_90", 4, 32, 96 * 1024, 2, "shared"),
        ("sm_80", 4, 32, 82 * 1024, 1, "shared"),
        ("sm_100", 1, 16, 0, 32, "programs"),
        ("sm_100", 16, 16, 0, 4, "warps"),
        # LLVM says "Occupancy: 6" (waves a SIMD) for 78 registers; 24 waves a compute unit are 3 programs of 8
        ("gfx942", 8, 78, 0, 3, "registers"),
        ("gfx942", 4, 16, 33 * 1024, 1, "shared"),
        ("sm_80", 32, 255, 0, 0, "registers"),
    ],
)
def test_occupancy(arch: str, warps: int, registers: int, shared: int, programs: int, limit: str) -> None:
    found = occupancy(arch, warps, registers, shared)
    assert (found.programs, found.limit, found.warps) == (programs, limit, programs * warps)


def test_tensor_memory_limits_programs() -> None:
    assert occupancy("sm_100", 4, 64, 0, tensor_memory=256).programs == 2


def test_roofline() -> None:
    h100 = DATA_SHEETS["H100"]
    assert h100.least_seconds(Work(round(989.4e12), 1), "bf16") == pytest.approx(1.0)
    assert h100.least_seconds(Work(1, round(6.7e12)), "bf16") == pytest.approx(2.0)
    assert h100.least_seconds(Work(round(66.9e12), 1), "fp32") == pytest.approx(1.0)
    assert CHIP_OF_DEVICE.keys() == DATA_SHEETS.keys()
    assert set(CHIP_OF_DEVICE.values()) == set(CHIPS) == set(MULTIPROCESSORS)


# Compilation, in processes where nothing is interpreted


ARCHS = ["sm_90", *(pytest.param(arch, marks=pytest.mark.slow) for arch in ("sm_80", "sm_100", "gfx942"))]


@functools.cache
def toys(arch: str) -> dict[str, report.Row]:
    """Compile the toy kernels for a chip, once for all tests; their rows by name."""
    return {row.name: row for row in report.rows((arch,), ["static_toys"])}


@pytest.mark.parametrize("arch", ARCHS)
def test_good_kernels_pass_every_gate(arch: str) -> None:
    good = {name: row for name, row in toys(arch).items() if name.startswith("good/")}
    assert len(good) == 3
    assert {name: list(report.broken_gates(row)) for name, row in good.items()} == {name: [] for name in good}
    family = {"sm_80": "HMMA", "sm_90": "HGMMA", "sm_100": "UTCHMMA", "gfx942": "v_mfma"}[arch]
    row = good["good/product"]
    assert all(opcode.startswith(family) for opcode in row.tensor_core)
    assert row.stretches[0].is_loop
    assert row.stretches[0].num_dots > 0
    assert row.stretches[0].loads.keys() == {"16"}
    assert row.registers > 32
    assert row.shared_bytes >= 2 * 128 * 64 * 2


@pytest.mark.parametrize("arch", ["sm_90", pytest.param("gfx942", marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    ("name", "complaint"),
    [
        ("bad/spills", "spills: "),
        ("bad/scalar-loads", "scalar loads in an innermost loop"),
        ("bad/shared", "shared memory: "),
        ("bad/no-tensor-core", "no tensor-core instruction"),
    ],
)
def test_each_gate_can_fail(arch: str, name: str, complaint: str) -> None:
    (found,) = report.broken_gates(toys(arch)[name])
    assert found.startswith(complaint)


def test_one_product_among_others_without_tensor_cores_is_seen() -> None:
    row = toys("sm_90")["bad/plain-dot"]
    assert row.tensor_core
    assert list(report.broken_gates(row)) == ["1 products of tiles without tensor-core instructions"]


def test_configurations_compiled_alike_keep_their_own_work() -> None:
    one, other = toys("sm_90")["good/row-sum"], toys("sm_90")["good/row-sum/alike"]
    assert (one.flops, other.flops) == (64 * 4096, 64 * 8192)
    assert (
        dataclasses.replace(other, name=one.name, flops=one.flops, num_bytes=one.num_bytes, roofline_us=one.roofline_us)
        == one
    )
    # 64 rows of 4096 bf16 and 64 fp32 sums at 3.35 and 4.8 TB/s
    assert one.roofline_us == {"H100": 0.1566, "H200": 0.1093}


def test_a_kernel_that_does_not_compile_is_a_broken_gate() -> None:
    (found,) = report.broken_gates(toys("sm_90")["bad/does-not-compile"])
    assert found.startswith("does not compile: ValueError: ")
    assert found.endswith("must be a power of 2")


def test_what_kills_the_compiler_is_a_broken_gate() -> None:
    future: Future[list[report.Row]] = Future()
    future.set_exception(BrokenProcessPool())
    (row,) = report._result(future, "sm_90", ("toy",))
    assert list(report.broken_gates(row)) == [
        "does not compile: a compiler process died, on this configuration or on one beside it"
    ]


def test_names_are_unique() -> None:
    with pytest.raises(ValueError, match="two configurations are called 'good/row-sum'"):
        report.collect(CHIPS["sm_90"], ["static_toys", "static_toys"])


def test_golden_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    golden, archs = tmp_path / "golden.json", tuple(CHIPS)
    rows = [dataclasses.replace(row, arch=arch) for arch in archs for row in toys("sm_90").values()]
    assert report.stale(golden, rows, archs) == []  # there is none yet
    report.write_golden(golden, rows, archs)
    assert report.stale(golden, rows, archs) == []
    assert len(golden.read_text().splitlines()) == len(rows) + 2  # a line a row

    slower = [dataclasses.replace(row, registers=row.registers + 1) for row in rows if row.arch == "sm_90"]
    before = next(row.registers for row in rows if row.key == "sm_90 good/product")
    change = f"sm_90 good/product: registers {before} -> {before + 1}"
    assert change in report.stale(golden, slower, ("sm_90",))
    missing = report.stale(golden, [row for row in rows if row.name != "good/product"], archs)
    assert missing == [f"{arch} good/product: in the golden file, and no longer shipped" for arch in sorted(archs)]

    report.write_golden(golden, slower, ("sm_90",))  # the other targets' rows stay
    known = json.loads(golden.read_text())
    assert len(known["rows"]) == len(rows)
    report.write_golden(golden, [row for row in rows if row.arch != "sm_90"], ("sm_80", "sm_100", "gfx942"))
    assert [complaint.split()[0] for complaint in report.stale(golden, rows, archs)] == ["sm_90"] * len(slower)

    monkeypatch.setattr(report, "_triton_version", lambda: "0.0")
    assert report.stale(golden, rows, archs) == []  # another Triton's


def test_an_unknown_target_is_refused() -> None:
    with pytest.raises(BenchError, match="expected some of sm_80, sm_90, sm_100, gfx942, got 'sm_70'"):
        report.run(("sm_90", "sm_70"))


def test_a_golden_file_without_a_checkout_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BenchError, match=r"expected a checkout of the project, got no .*/absent"):
        report.run(update_golden=True, golden=tmp_path / "absent" / "static.json")


@pytest.mark.parametrize("content", ["{", "[]", '{"triton": "3"}', '{"triton": "3", "rows": {"": {}}}'])
def test_what_cannot_be_read_or_written_is_told_before_anything_is_compiled(
    content: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(report, "rows", lambda *_: pytest.fail("compiled"))
    golden = tmp_path / "golden.json"
    golden.write_text(content)
    with pytest.raises(BenchError, match=r"golden\.json: (cannot be read|expected a golden file)"):
        report.run(golden=golden)
    with pytest.raises(BenchError, match=r"x\.json: cannot be written: "):
        report.run(json_path=golden / "x.json", golden=tmp_path / "none.json")
    with pytest.raises(BenchError, match=r"golden\.json: given twice"):
        report.run(json_path=golden, update_golden=True, golden=golden)


def test_a_report_in_a_new_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(report, "rows", lambda *_: [])
    assert report.run(json_path=tmp_path / "new" / "x.json", golden=tmp_path / "none.json") == 0
    assert json.loads((tmp_path / "new" / "x.json").read_text())["rows"] == {}


def test_workers_leave_an_interrupt_to_the_parent() -> None:
    child = "import os, signal; os.kill(os.getpid(), signal.SIGINT); print('goes on')"
    with compiler.uninterrupted():
        done = subprocess.run([sys.executable, "-c", child], capture_output=True, text=True, check=True)
        assert signal.SIGINT in signal.pthread_sigmask(signal.SIG_BLOCK, [])
    assert done.stdout == "goes on\n"
    assert signal.SIGINT not in signal.pthread_sigmask(signal.SIG_BLOCK, [])


def test_no_more_workers_than_processors(monkeypatch: pytest.MonkeyPatch) -> None:
    def pool(workers: int, **_: object) -> None:
        raise ZeroDivisionError(workers)

    monkeypatch.setattr(report, "ProcessPoolExecutor", pool)
    monkeypatch.setattr(os, "cpu_count", lambda: 3)
    with pytest.raises(ZeroDivisionError, match="3"):
        report.rows(["sm_90"], workers=1000)


def test_table_without_rich(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("rich", "rich.console", "rich.table"):
        monkeypatch.setitem(sys.modules, name, None)
    print_table([["sm_90", "regs"], ["good row-sum", "32"], ["x", "128"]], width=10)
    assert capsys.readouterr().out == "  sm_90         regs\n  good row-sum    32\n  x              128\n"


# Specialisation, as the JIT does it


def test_specialisation_is_the_one_of_the_jit() -> None:
    script = """
import dataclasses
import static_toys
from sftx_kernels.bench.static import compiler
launch = static_toys._row_sum(4096, 4096)
def describe(**changes):
    changed = dataclasses.replace(launch, arguments={**launch.arguments, **changes})
    source, options = compiler.specialise("sm_90", changed)
    return list(source.signature.values()), source.constants, {k[0] for k, v in source.attrs.items() if v}
print([describe(), describe(V=1), describe(stride_x=2**31 + 1)])
"""
    ((types, constants, aligned), one, large) = ast.literal_eval(_compiled_python(script))
    assert types == ["*bf16", "*fp32", "constexpr", "i32", "i32", "constexpr"]
    assert constants == {(2,): None, (5,): 1024}
    assert aligned == {0, 1, 3, 4}
    assert one[0][3] == "constexpr"
    assert one[1][(3,)] == 1
    assert large[0][4] == "i64"
    assert large[2] == {0, 1, 3}


def _compiled_python(script: str) -> str:
    """What a script prints in a Python where kernels are compiled, not interpreted."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, sys.path))
    command = [sys.executable, "-c", script]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout


# What ships


@pytest.mark.parametrize(
    ("name", "flops", "num_bytes"),
    [
        # 2048 rows of 128256 bf16 logits read and their gradient written; int64 label, fp32 loss and lse of each row
        ("cross_entropy/row/bfloat16/V=128256/rows=2048/scan+gradient", 8 * 262668288, 4 * 262668288 + 2048 * 16),
        # S = x A^T: 2 M K R; x (8192 x 4096), A and S in bf16
        ("lora/shrink/bfloat16/M=8192/K=4096/R=16", 1073741824, 2 * (33554432 + 65536 + 131072)),
        # keep * (dS A): 2 M K R; dS, A and dX in bf16
        ("lora/outer/bfloat16/M=8192/K=4096/R=16/dropout", 1073741824, 2 * (33554432 + 65536 + 131072)),
        # x, the residual and both outputs, 8192 x 4096 in bf16; the weight, and an fp32 number a row
        ("rms_norm/forward/bfloat16/D=4096/rows=8192/residual", 7 * 33554432, 8 * 33554432 + 8192 + 32768),
        ("rms_norm/backward/bfloat16/D=4096/rows=8192/residual", 10 * 33554432, 8 * 33554432 + 8192 + 32768),
        # gate, up, dy and the gradients of both
        ("swiglu/backward/bfloat16/D=14336/rows=8192/silu", 12 * 117440512, 10 * 117440512),
        # q and k of 2 x 4096 tokens read and written; cos and sin of 4096 tokens, 64 of each
        ("rotary/bfloat16/heads=32+8/D=128", 3 * 41943040, 4 * 41943040 + 2 * 4096 * 64 * 2),
        # a multiplication each; half a byte of code, an fp32 scale for 64 of them, and bf16 written
        ("nf4/dequantize/bfloat16/14336x4096", 58720256, 29360128 + 4 * 917504 + 117440512),
    ],
)
def test_work_is_what_the_algorithm_cannot_do_without(name: str, flops: int, num_bytes: int) -> None:
    assert report.collect(CHIPS["sm_90"], report.modules())[name].work == Work(flops, num_bytes)


def test_what_ships_for_one_chip_is_what_the_golden_file_says() -> None:
    """One small module and one chip; the next test has all of them."""
    rows = report.rows(("sm_90",), ["sftx_kernels.triton.nf4"])
    assert rows
    assert [complaint for row in rows for complaint in report.broken_gates(row)] == []
    changed = [c for c in report.stale(report.GOLDEN, rows, ("sm_90",)) if not c.endswith("no longer shipped")]
    assert changed == []


@pytest.mark.slow
def test_what_ships_passes_its_gates_and_is_what_the_golden_file_says(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert report.GOLDEN.exists(), "write it with `sftx bench --static --update-golden`"
    code = report.run(json_path=tmp_path / "report.json")
    printed = capsys.readouterr().out
    complaints = [line for line in printed.splitlines() if line.startswith(("gate: ", "stale: "))]
    assert complaints == []
    assert code == 0
    rows = json.loads((tmp_path / "report.json").read_text())["rows"]
    assert {key.split()[0] for key in rows} == set(CHIPS)
    assert max(map(len, printed.splitlines())) <= 120
