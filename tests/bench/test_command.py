"""`sftx bench` as it is called: the baseline, wrong options, and what it does not need."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from benching import SHAPES, bench, rows_of
from sftx.cli import bench as cli
from sftx.errors import SftxError
from sftx_kernels.bench import BenchError, cases, files, operations, report, runner
from sftx_kernels.bench.baseline import Baseline
from sftx_kernels.bench.cases import PASSES
from sftx_kernels.bench.operations import LinearCrossEntropyShape

pytestmark = pytest.mark.usefixtures("short")


# ---- the baseline


@pytest.fixture
def measured(shapes: Callable[..., Path], tmp_path: Path) -> tuple[list[object], Path]:
    """The arguments of a run, and what it wrote."""
    arguments: list[object] = ["lora", "--shapes", shapes(SHAPES[3]), "--dtype", "fp32", "--providers",
                               "sftx,torch-eager", "--device", "cpu"]  # fmt: skip
    out = tmp_path / "baseline.json"
    assert bench(*arguments, "--json", out).exit_code == 0
    return arguments, out


def doctor(path: Path, change: Callable[[dict[str, Any]], None]) -> Path:
    document = json.loads(path.read_text())
    change(document)
    path.write_text(json.dumps(document))
    return path


def scale(provider: str, factor: float) -> Callable[[dict[str, Any]], None]:
    def change(document: dict[str, Any]) -> None:
        for row in document["rows"]:
            if row["provider"] == provider:
                for figures in row["passes"].values():
                    figures["median_ms"] *= factor

    return change


def test_slower_than_the_baseline_exits_with_1_and_says_where(measured: tuple[list[object], Path]) -> None:
    arguments, path = measured
    doctor(path, scale("sftx", 1e-3))
    result = bench(*arguments, "--baseline", path)
    assert result.exit_code == 1
    assert f"against {path}: 4 figures, 3 worse by more than 5.0%" in result.output
    for name in PASSES:
        assert f"sftx, lora 24x32x16 r4, fp32, {name}: " in result.output


@pytest.mark.parametrize(("provider", "factor"), [("sftx", 1e3), ("torch-eager", 1e-3)])
def test_faster_or_somebody_else_slower_is_good(
    measured: tuple[list[object], Path], provider: str, factor: float
) -> None:
    arguments, path = measured
    doctor(doctor(path, scale("sftx", 1e3)), scale(provider, factor))
    result = bench(*arguments, "--baseline", path)
    assert result.exit_code == 0, result.output
    assert "4 figures, 0 worse" in result.output


def test_more_memory_than_the_baseline_is_worse(measured: tuple[list[object], Path]) -> None:
    arguments, path = measured

    def change(document: dict[str, Any]) -> None:
        scale("sftx", 1e3)(document)
        document["rows"][0]["peak_bytes"] *= 0.9

    doctor(path, change)
    result = bench(*arguments, "--baseline", path)
    assert result.exit_code == 1
    assert "fp32, peak memory: " in result.output
    assert bench(*arguments, "--baseline", path, "--max-regress", "20%").exit_code == 0


def test_another_version_is_said_and_another_device_or_file_refused(measured: tuple[list[object], Path]) -> None:
    arguments, path = measured

    def older(document: dict[str, Any]) -> None:
        scale("sftx", 1e3)(document)
        document["environment"]["versions"]["torch"] = "2.0"

    result = bench(*arguments, "--baseline", doctor(path, older))
    assert result.exit_code == 0
    assert f"NOT THE SAME VERSION, so a change may not be ours: torch: 2.0 -> {torch.__version__}" in result.output
    doctor(path, lambda document: document["environment"].update(device="another"))
    refused = bench(*arguments, "--baseline", path)
    assert isinstance(refused.exception, SftxError)
    assert str(refused.exception) == f"{path}: measured on another, this is a CPU"
    path.write_text("[]")
    refused = bench(*arguments, "--baseline", path)
    assert str(refused.exception) == f"{path}: expected a result of sftx bench --json in format {report.FORMAT}"


def test_a_baseline_that_has_nothing_of_this_run_is_not_a_pass(measured: tuple[list[object], Path]) -> None:
    arguments, path = measured
    doctor(path, lambda document: document.update(rows=[]))
    result = bench(*arguments, "--baseline", path)
    assert result.exit_code == 1
    assert "0 figures, 0 worse" in result.output
    assert "nothing was compared: no case and provider of ours is in both" in result.output


def _row(**changes: Any) -> Callable[[dict[str, Any]], None]:
    return lambda document: document["rows"][0].update(changes)


def _median(value: object) -> Callable[[dict[str, Any]], None]:
    return lambda document: document["rows"][0]["passes"]["both"].update(median_ms=value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda document: document.pop("environment"), 'expected "environment" with a "device"'),
        (lambda document: document["environment"].pop("device"), 'expected "environment" with a "device"'),
        (lambda document: document["environment"].update(versions=[]), 'environment: expected "versions" by name'),
        (lambda document: document.pop("rows"), 'expected a list of "rows"'),
        (lambda document: document["rows"].append(3), "row 3: expected an object that says"),
        (_row(ours=None), "row 1: expected an object that says whether it is"),
        (_row(op=["lora"]), "row 1: op: expected a text, got ['lora']"),
        (_row(mask="0"), "row 1: mask: expected a share, got '0'"),
        (_row(passes={"both": 3}), "row 1: passes: expected the figures of each by name"),
        (_row(peak_bytes=0), "row 1: peak_bytes: expected a finite number > 0, got 0"),
        (_median(float("nan")), "row 1: both: median_ms: expected a finite number > 0, got nan"),
        (_median(float("inf")), "row 1: both: median_ms: expected a finite number > 0, got inf"),
        (_median(10**400), "row 1: both: median_ms: expected a finite number > 0, got 1000"),
        (_median(True), "row 1: both: median_ms: expected a finite number > 0, got True"),
        (_median(None), "row 1: both: median_ms: expected a finite number > 0, got None"),
    ],
)
def test_a_baseline_with_something_missing_or_mistyped_is_told_first(
    change: Callable[[dict[str, Any]], None], message: str, tmp_path: Path
) -> None:
    row = report.Row(cases.Case(SHAPES[3], "fp32"), "sftx", ours=True, peak_bytes=1)
    row.passes = {"both": {"median_ms": 1.0}}
    path = tmp_path / "old.json"
    environment = {"device": "a CPU", "versions": {}}
    report.write_json(path, environment, [row, row], [])
    Baseline(path).match(environment)
    with pytest.raises(BenchError) as caught:
        Baseline(doctor(path, change))
    assert str(caught.value).startswith(f"{path}: {message}")


# ---- the command


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["gelu"], "Invalid value for '[OPERATION]': 'gelu' is not one of 'cross-entropy', "),
        (["--device", "tpu"], "Invalid value for '--device': got 'tpu'; expected cpu, cuda or cuda:N"),
        (["--device", "cuda:x"], "Invalid value for '--device': got 'cuda:x'; expected"),
        (["--dtype", "fp32,int8"], "Invalid value for '--dtype': got 'int8'; expected fp32, bf16, fp16"),
        (["--mask", "0,2"], "Invalid value for '--mask': got '0,2'; expected shares from 0 to 1, such as 0,.5,.9"),
        (["--mask", "half"], "Invalid value for '--mask': got 'half'"),
        (["--providers", "sftx,lager"], "Invalid value for '--providers': got 'lager'; expected sftx,"),
        (["--providers", "sftx,torch-eagre"], "; did you mean 'torch-eager'?"),
        (["--shapes", "none.json"], "Invalid value for '--shapes': File 'none.json' does not exist."),
        (["--baseline", "none.json"], "Invalid value for '--baseline': File 'none.json' does not exist."),
        (["--max-regress", "-1%"], "Invalid value for '--max-regress': got '-1%'; expected a share such as 5% or"),
        (["--budget", "0"], "Invalid value for '--budget': 0.0 is not in the range x>0."),
        (["--budget", "nan"], "Invalid value for '--budget': got nan; expected seconds"),
        (["--device", ""], "Invalid value for '--device': got ''; expected cpu, cuda or cuda:N"),
        (["--json", ""], "Invalid value for '--json': got ''; expected a name"),
        (["--csv", ""], "Invalid value for '--csv': got ''; expected a name"),
        (["--plot", ""], "Invalid value for '--plot': got ''; expected a name"),
        (["--static", "--mask", "0"], "--mask has no meaning with --static"),
        (["--max-regress", "1%"], "--max-regress has no meaning without --baseline"),
        (["--update-golden"], "--update-golden has no meaning without --static"),
        (["--static", "--arch", "sm_70"], "Invalid value for '--arch': got 'sm_70'; expected sm_80, sm_90,"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_a_wrong_option_is_one_line_and_2(arguments: list[str], message: str) -> None:
    result = bench(*arguments)
    assert result.exit_code == 2
    lines = result.output.splitlines()
    assert sum(line.startswith("Error: ") for line in lines) == 1
    assert lines[-1].startswith("Error: ")
    assert message in lines[-1]


def test_what_only_torch_can_tell_is_one_line_too(tmp_path: Path) -> None:
    for arguments, message in (
        (["--device", "cuda:99"], "device: cuda:99 is not there; torch sees "),
        (["lora", "--providers", "torch-fused"], "providers: lora has no 'torch-fused'; there are sftx, "),
        (["--json", tmp_path], ""),
    ):
        result = bench(*arguments)
        if message:
            assert isinstance(result.exception, SftxError)
            assert str(result.exception).startswith(message)
        else:
            assert result.exit_code == 2


def test_a_result_that_cannot_be_written_is_told_before_anything_is_measured(
    shapes: Callable[..., Path], tmp_path: Path
) -> None:
    (tmp_path / "plain").touch()
    (tmp_path / "taken" / "lora.png").mkdir(parents=True)
    both = tmp_path / "both"
    for arguments, message in (
        (["--json", tmp_path / "plain" / "out.json"], "out.json: cannot be written: "),
        (["--csv", tmp_path / "plain" / "out.csv"], "out.csv: cannot be written: "),
        (["--plot", tmp_path / "plain" / "plots"], "lora.png: cannot be written: "),
        (["--plot", tmp_path / "taken"], "lora.png: cannot be written: it is a directory"),
        (["--json", both, "--csv", f"{tmp_path}/./both"], "both: given twice"),
        (["--json", both, "--plot", both], "both: cannot be written: it is a directory"),
    ):
        result = bench("lora", "--shapes", shapes(SHAPES[3]), *arguments)
        assert isinstance(result.exception, SftxError)
        assert message in str(result.exception)
        assert "speed of light" not in result.output


def test_an_old_result_stays_until_there_is_a_new_one(
    shapes: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    old, out = tmp_path / "old", tmp_path / "results"
    old.write_text("kept")
    out.mkdir()
    (out / "out.json").symlink_to(old)

    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    arguments = ["lora", "--shapes", shapes(SHAPES[3]), "--dtype", "fp32", "--providers", "sftx", "--device", "cpu"]
    monkeypatch.setattr(runner, "_run_case", interrupted)
    bench(*arguments, "--json", out / "out.json")
    assert old.read_text() == "kept"
    monkeypatch.undo()
    with pytest.raises(ZeroDivisionError), files.writing(out / "out.json") as file:
        file.write(str(1 / 0))
    assert old.read_text() == "kept"
    report.write_json(out / "out.json", {}, [], [])
    assert json.loads(old.read_text())["rows"] == []
    assert [path.name for path in out.iterdir()] == ["out.json"]
    files.probe(Path("/dev/null"), Path("/dev/null"))
    report.write_json(Path("/dev/null"), {}, [], [])
    assert Path("/dev/null").is_char_device()
    with pytest.raises(BenchError, match="/dev/full: cannot be written: No space left"):
        report.write_json(Path("/dev/full"), {}, [], [])


def test_an_operation_without_a_provider_that_was_asked_for_is_left_out(shapes: Callable[..., Path]) -> None:
    every = shapes(SHAPES[0], SHAPES[3])
    result = bench("--shapes", every, "--dtype", "fp32", "--providers", "frozen-linear", "--device", "cpu")
    assert result.exit_code == 0, result.output
    assert "left out: cross-entropy; no provider of it was asked for\n" in result.output
    result = bench("--shapes", shapes(SHAPES[0]), "--providers", "peft,frozen-linear", "--device", "cpu")
    assert str(result.exception) == "providers: cross-entropy has none of peft, frozen-linear"


def test_nothing_of_ours_though_it_was_asked_for_exits_with_1(shapes: Callable[..., Path]) -> None:
    result = bench("lora", "--shapes", shapes(SHAPES[3]), "--dtype", "fp32", "--device", "cpu",
                   "--providers", "sftx-torch,frozen-linear")  # fmt: skip
    assert result.exit_code == 1
    assert result.output.endswith("nothing of ours was measured\n")


def test_a_wrong_backend_in_the_environment_is_told_once(
    shapes: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SFTX_KERNELS", "tritn")
    arguments = ["--shapes", shapes(SHAPES[0], SHAPES[3]), "--dtype", "fp32", "--device", "cpu"]
    result = bench(*arguments)
    assert isinstance(result.exception, SftxError)
    assert str(result.exception).startswith("SFTX_KERNELS: expected a backend, ")
    assert result.output == ""
    assert bench(*arguments, "--providers", "frozen-linear").exit_code == 0  # which it does not concern


def test_names_of_the_command_are_those_of_the_bench() -> None:
    from sftx_kernels.triton.launch import CHIPS

    assert set(cli.PROVIDERS) == {provider.name for provider in operations.PROVIDERS}
    assert cli.OPERATIONS == operations.OPERATIONS
    assert set(cli.DTYPES) == set(cases.DTYPES)
    assert set(cli.ARCHS) == set(CHIPS)


def test_static_is_handed_on(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from sftx_kernels.bench.static import report

    seen: list[object] = []
    monkeypatch.setattr(report, "run", lambda *arguments: seen.extend(arguments) or 1)
    result = bench("--static", "--arch", "sm_90,gfx942", "--json", tmp_path / "s.json", "--workers", 3)
    assert result.exit_code == 1, result.output
    assert seen == [("sm_90", "gfx942"), tmp_path / "s.json", False, 3]


# ---- what is not needed


def in_a_process(code: str, *arguments: object) -> str:
    done = subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)], capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_a_wrong_option_is_told_before_torch_is_imported() -> None:
    said = in_a_process(
        "import sys\n"
        "from sftx.cli.bench import command\n"
        "try: command(['--dtype', 'int8'])\n"
        "except SystemExit as stop: print(stop.code, 'torch' in sys.modules, 'rich' in sys.modules)\n"
    )
    assert said == "2 False False\n"


def test_torch_alone_is_enough(shapes: Callable[..., Path], tmp_path: Path) -> None:
    """With nothing else to import: a plain table, no picture but a line that says why, and JSON."""
    path = shapes(LinearCrossEntropyShape(24, 16, 130))
    said = in_a_process(
        "import sys, importlib, pathlib\n"
        "blocked = 'sftx rich click pydantic transformers matplotlib peft datasets yaml safetensors pluggy'\n"
        "for name in blocked.split(): sys.modules[name] = None\n"
        "names = 'cases cross_entropy linear_cross_entropy lora operations devices measure rss report plot runner'\n"
        "for name in names.split():\n"
        "    importlib.import_module(f'sftx_kernels.bench.{name}')\n"
        "from sftx_kernels.bench import measure\n"
        "from sftx_kernels.bench.runner import Options, run\n"
        "measure.MAX_ROUNDS = measure.MIN_ROUNDS\n"
        "root = pathlib.Path(sys.argv[2])\n"
        "options = Options(device='cpu', shapes=pathlib.Path(sys.argv[1]), masks=(0.5,), dtypes=('fp32',),\n"
        "                  providers=('sftx', 'torch-eager'), plot=root / 'plots', json=root / 'out.json')\n"
        "sys.exit(run(options))\n",
        path,
        tmp_path,
    )
    assert "\n  provider     fwd ms  bwd ms" in said
    assert "no plots: matplotlib is not installed" in said
    assert rows_of(tmp_path / "out.json").keys() == {"sftx", "torch-eager"}
    assert not (tmp_path / "plots").exists()


def test_no_shape_of_the_operation(shapes: Callable[..., Path]) -> None:
    with pytest.raises(BenchError, match=r"shapes\.json: has no shape of lora"):
        runner.run(runner.Options(operations=("lora",), shapes=shapes(SHAPES[0])))
