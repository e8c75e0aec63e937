"""The bench itself on a CPU: who is right, who is absent, who fails; what is measured and written."""

from __future__ import annotations

import contextlib
import csv
import functools
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from benching import CPU, PEAKS, SHAPES, bench, rows_of
from sftx_kernels.bench import devices, measure, report, rss, runner
from sftx_kernels.bench.cases import PASSES, Case, Provider, Shape, make_problem
from sftx_kernels.bench.measure import Run
from sftx_kernels.bench.operations import PROVIDERS, LinearCrossEntropyShape, LoraShape, providers_of

pytestmark = pytest.mark.usefixtures("short")


# ---- providers


@pytest.mark.parametrize("dtype", ["fp32", "bf16", pytest.param("fp16", marks=pytest.mark.slow)])
@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: f"{shape.op} {shape}")
def test_every_provider_that_can_run_here_is_right(shape: Shape, dtype: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Error in units of the dtype's last place. Compiled ones are traced as ever, but not through a C++ compiler."""
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager"))
    case = Case(shape, dtype, 0.5 if shape.has_labels else 0.0)
    ran = []
    for provider in providers_of(shape.op):
        if provider.absent(case, CPU):
            continue
        problem = make_problem(case, CPU)
        reference = problem.reference(1e15)
        assert reference is not None
        run = Run(provider, provider.prepare(problem), problem)
        values = run.first_call()
        assert all(values[name].shape == exact.shape for name, exact in reference.values.items() if name in values)
        ran.append(provider.name)
        if provider.name == shape.floor:
            continue
        error, where = reference.error(values)
        assert error < 4 * torch.finfo(case.torch_dtype).eps, f"{provider.name}: {error} in {where}"
    assert {"sftx", "torch-eager", "torch-compile"} <= set(ran)
    assert shape.op != "lora" or {"peft", "frozen-linear"} <= set(ran)
    assert shape.op != "grouped-lora" or {"added-weights", "frozen-linear"} <= set(ran)


def test_who_needs_a_gpu_or_is_not_installed_is_absent_with_the_reason(shapes: Callable[..., Path]) -> None:
    result = bench("cross-entropy", "--shapes", shapes(SHAPES[0]), "--dtype", "fp32", "--mask", 0, "--device", "cpu",
                   "--providers", "sftx,sftx-torch,torch-eager-upcast,quack")  # fmt: skip
    assert result.exit_code == 0, result.output
    assert "sftx-torch: runs on GPUs only, this is cpu (cross-entropy)" in result.output
    assert "torch-eager-upcast: is torch-eager in fp32 (cross-entropy)" in result.output
    assert "quack: quack-kernels is not installed (cross-entropy)" in result.output


@pytest.mark.parametrize("when", ["prepare", "first call", "later"])
def test_a_provider_that_raises_is_a_row_and_not_the_end(
    when: str, shapes: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    eager = next(p for p in PROVIDERS if p.name == "torch-eager" and p.op == "cross-entropy")
    calls = 0

    def broken(problem: Any) -> Any:
        prepared = eager.prepare(problem)
        if when == "prepare":
            raise RuntimeError("no such\n  kernel")

        def forward() -> Any:
            nonlocal calls
            calls += 1
            if when == "first call" or calls > 2:
                raise RuntimeError("no such\n  kernel")
            return prepared.forward()

        return prepared._replace(forward=forward)

    def providers(op: str, names: Any = None) -> list[Provider]:
        return [replace(eager, name="sftx", prepare=broken, package="sftx_kernels"), eager]

    monkeypatch.setattr(runner, "providers_of", providers)
    out = tmp_path / "out.json"
    result = bench("cross-entropy", "--shapes", shapes(SHAPES[0]), "--dtype", "fp32", "--mask", 0, "--json", out)
    # Ours, so it is told by the exit code as well.
    assert result.exit_code == 1
    assert "failed: sftx: RuntimeError: no such kernel\n" in result.output
    rows = rows_of(out)
    assert rows["sftx"]["failure"] == "RuntimeError: no such kernel"
    assert rows["sftx"]["passes"] == {}
    assert rows["torch-eager"]["failure"] is None
    assert rows["torch-eager"]["passes"].keys() == set(PASSES)


def test_inputs_that_do_not_fit_leave_the_other_cases(
    shapes: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    def crowded(case: Case, device: torch.device) -> Any:
        if case.op == "cross-entropy":
            raise torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate")
        return make_problem(case, device)

    monkeypatch.setattr(runner, "make_problem", crowded)
    result = bench("--shapes", shapes(*SHAPES[:2]), "--dtype", "fp32", "--mask", 0, "--providers", "sftx",
                   "--device", "cpu")  # fmt: skip
    assert result.exit_code == 0, result.output
    why = "no inputs or no reference: OutOfMemoryError: CUDA out of memory. Tried to allocate"
    assert f"sftx: {why} (cross-entropy)" in result.output
    assert "\nsftx " in result.output


def test_a_lost_device_ends_the_bench_and_keeps_what_was_measured(
    shapes: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After an illegal access every call fails; that is asked of the device once a provider has raised."""
    gpu = devices.Device(torch.device("cuda"), "a GPU", PEAKS)
    row = report.Row(Case(SHAPES[0], "fp32"), "peer", ours=False)

    def illegal(*_: object) -> None:
        raise RuntimeError("an illegal memory access was encountered")

    monkeypatch.setattr(torch.cuda, "synchronize", illegal)
    with pytest.raises(
        runner._DeviceLostError, match="peer on cross-entropy 24x130, fp32, 0% masked: RuntimeError: an"
    ):
        runner._attempt(row, gpu, illegal)

    first_call, seen = runner._first_call, 0

    def lose(*arguments: Any) -> Any:
        nonlocal seen
        seen += 1
        if seen == 4:
            raise runner._DeviceLostError("peer")
        return first_call(*arguments)

    monkeypatch.setattr(runner, "_first_call", lose)
    monkeypatch.setattr(runner, "_attempt", lambda _row, _device, function: function())
    out = tmp_path / "out.json"
    result = bench("linear-cross-entropy", "--shapes", shapes(*SHAPES[:3]), "--dtype", "fp32", "--mask", "0", "--json",
                   out, "--providers", "sftx,sftx-low-memory,torch-eager", "--device", "cpu")  # fmt: skip
    assert result.exit_code == 1
    assert "the device was lost, the rest was not run: peer" in result.output
    rows = json.loads(out.read_text())["rows"]
    assert [bool(row["passes"]) for row in rows] == [True] * 3 + [False] * 3
    assert rows[3]["absent"] == "the device was lost"


# ---- what is measured


def test_the_clock_of_a_gpu_flushes_before_each_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a CPU in the place of the GPU, with events that take the time themselves."""
    log: list[str] = []

    class Event:
        def __init__(self, *, enable_timing: bool) -> None:
            assert enable_timing

        def record(self) -> None:
            log.append("event")
            self.at = len(log)

        def elapsed_time(self, end: Event) -> float:
            return float(end.at - self.at)

    class Buffer:
        def zero_(self) -> None:
            log.append("flush")

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "device", lambda _device: contextlib.nullcontext())
    case = Case(LoraShape(4, 8, (4,), rank=2), "fp32")
    problem, provider = make_problem(case, CPU), providers_of(case.op, ("torch-eager",))[0]
    run = Run(provider, provider.prepare(problem), problem)
    run.first_call()
    forward, backward = run.forward, run.backward
    monkeypatch.setattr(run, "forward", lambda: (log.append("forward"), forward())[1])
    monkeypatch.setattr(run, "backward", lambda outputs: (log.append("backward"), backward(outputs))[1])
    clock = measure._CudaClock(devices.Device(CPU, "a GPU", replace(PEAKS, cache_bytes=64)))
    assert clock.buffer.numel() == 128
    clock.buffer = Buffer()  # type: ignore[assignment]
    read = clock.round(run)
    both = ["flush", "event", "forward", "backward", "event"]
    assert log == [*both, "flush", "event", "forward", "event", "flush", "event", "backward", "event"]
    assert read() == {"forward": 2.0, "backward": 2.0, "both": 3.0}


def test_peak_bytes_of_the_allocator() -> None:
    def work() -> torch.Tensor:
        first = torch.ones(1000)
        second = first + 1
        del first
        return second[:10].clone()

    # 8000 at the peak, and what the allocator rounds up.
    assert 8000 <= measure.peak_bytes(CPU, work) < 8000 + 4 * 64


def test_peak_resident_memory_in_a_process_of_its_own() -> None:
    """Eager holds the logits and their gradient at once, 32 MB each, and perhaps the softmax between them."""
    case = Case(LinearCrossEntropyShape(512, 16, 16000), "fp32", 0.0)
    (eager,) = providers_of(case.op, ("torch-eager",))
    assert 60e6 < rss.peak_rss_bytes(case, eager) < 160e6


def test_quantiles_and_rates() -> None:
    assert measure.quantiles([5.0, 1.0, 2.0, 3.0, 4.0]) == pytest.approx((1.8, 3.0, 4.2))
    case = Case(LinearCrossEntropyShape(1000, 100, 1000), "fp32")
    problem, provider = make_problem(case, CPU), providers_of(case.op, ("sftx",))[0]
    run = Run(provider, provider.prepare(problem), problem)
    times = dict.fromkeys(PASSES, measure.Quantiles(1.0, 10.0, 20.0))
    rates = measure.rates(times, run, devices.Device(CPU, "a CPU", PEAKS))
    # 4e8 operations in 10 ms are 0.04 TFLOP/s, of 0.1 that the device could.
    assert rates["both"]["tflop_per_s"] == pytest.approx(0.04)
    assert rates["both"]["light_percent"] == pytest.approx(40)
    assert rates["both"]["gb_per_s"] == pytest.approx(case.least()["both"].num_bytes / 10e-3 / 1e9)


def test_devices_by_their_data_sheets_and_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, bf16 in {"NVIDIA H100 80GB HBM3": 989.4, "NVIDIA H200": 989.4, "NVIDIA A100-SXM4-80GB": 312}.items():
        monkeypatch.setattr(devices, "device_name", lambda _device, name=name: name)
        found = devices.describe(torch.device("cuda"), ("bf16",))
        assert found.peaks.source == "data sheet"
        assert found.peaks.flops_per_s["bf16"] == bf16 * 1e12
        assert found.peaks.bytes_per_s > 2e12
    assert devices.slug("NVIDIA A100-SXM4-80GB") == "nvidia-a100-sxm4-80gb"
    monkeypatch.setattr(devices, "device_name", lambda _device: "NVIDIA H100 PCIe")
    found = devices.describe(CPU, ("bf16",))
    assert found.peaks.source == "measured here"
    assert found.peaks.flops_per_s["bf16"] >= found.peaks.flops_per_s["fp32"] > 1e9
    assert found.peaks.bytes_per_s > 1e8


# ---- what is written


def test_table_json_csv_and_pictures(shapes: Callable[..., Path], tmp_path: Path) -> None:
    path = shapes(*SHAPES[:2], SHAPES[3], LoraShape(24, 32, (16,), rank=4, dropout=0.1))
    names = "sftx,sftx-low-memory,torch-eager,frozen-linear,peft"
    json_path, csv_path, plots = tmp_path / "new" / "out.json", tmp_path / "out.csv", tmp_path / "plots"
    files = ["--json", json_path, "--csv", csv_path, "--plot", plots]
    result = bench(
        "--shapes", path, "--dtype", "fp32", "--mask", "0,.5", "--providers", names, "--device", "cpu", *files
    )
    assert result.exit_code == 0, result.output
    for word in ("speed of light (made up): fp32 0.1", "x eager", "/ frozen", "peak MB", "% light", "p20 - p80"):
        assert word in result.output
    assert "linear-cross-entropy 24x16x130 frozen, fp32, 50% masked\n" in result.output
    assert "not compared, each draws a dropout mask of its own" in result.output

    document = json.loads(json_path.read_text())
    environment = document["environment"]
    assert environment["device"] == "a CPU"
    assert environment["versions"]["torch"] == torch.__version__
    assert {"python", "git", "threads", "peaks", "cuda"} <= environment.keys()
    assert document["not_run"] == []
    rows = document["rows"]
    # Two masks for each loss; LoRA has none.
    assert len(rows) == 2 * 2 + 2 * 3 + 4 + 4
    row = next(row for row in rows if row["op"] == "linear-cross-entropy" and row["mask"] == 0.5)
    assert (row["rows"], row["hidden"], row["vocab"], row["trained"]) == (24, 16, 130, False)
    assert row["error"] < 1e-6
    assert row["error_on"] == "all rows"
    assert row["peak_bytes"] > 0
    assert row["num_rounds"] == measure.MIN_ROUNDS
    both = row["passes"]["both"]
    assert 0 < both["p20_ms"] <= both["median_ms"] <= both["p80_ms"]
    assert {"tflop_per_s", "gb_per_s", "light_percent"} <= both.keys()
    assert all(row["error"] is None for row in rows if row.get("dropout") or row["provider"] == "frozen-linear")

    with csv_path.open(newline="") as file:
        lines = list(csv.DictReader(file))
    assert len(lines) == 3 * len(rows)
    assert {line["pass"] for line in lines} == set(PASSES)
    assert float(lines[0]["median_ms"]) > 0
    pictures = sorted(plots.iterdir())
    assert [picture.name for picture in pictures] == ["cross-entropy.png", "linear-cross-entropy.png", "lora.png"]
    for picture in pictures:
        content = picture.read_bytes()
        assert content.startswith(b"\x89PNG\r\n\x1a\n")
        assert 10_000 < len(content) < 1_000_000


def test_what_does_not_fit_the_budget_is_listed(shapes: Callable[..., Path], tmp_path: Path) -> None:
    out = tmp_path / "out.json"
    result = bench("all", "--shapes", shapes(*SHAPES[:2]), "--dtype", "fp32", "--mask", "0", "--budget", "1e-6",
                   "--json", out)  # fmt: skip
    assert result.exit_code == 1
    assert result.output.endswith("nothing of ours was measured\n")
    assert result.output.count("not run: ") == 2
    assert json.loads(out.read_text())["not_run"] == [
        "cross-entropy 24x130, fp32, 0% masked",
        "linear-cross-entropy 24x16x130 frozen, fp32, 0% masked",
    ]
