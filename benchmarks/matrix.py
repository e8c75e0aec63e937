"""Install the built wheel in empty environments and use it there as a user would: `make matrix`.

Each cell of the matrix is a Python with the lowest or the newest version of every direct dependency that the wheel's
metadata allows and that has a wheel for this Python, as uv resolves them. In its environment, which lies in a temporary
directory outside of the repository, every module is imported, a tiny model is trained with LoRA and in full, a run is
resumed, asked, and merged. A table is printed, and `--page` gets it between its two comments; `--out` gets the cells as
JSON, those of an earlier call with the same version of sftx are kept unless they were run again. A Python that is not
found is a row of the table too.

The script needs uv and nothing of sftx, so that any Python runs it: also that of a container, to which the script and
the wheel were copied.
"""

from __future__ import annotations

import argparse
import contextlib
import email
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

PYTHONS = ("3.11", "3.12", "3.13", "3.14")
VERSIONS = {"lowest": "lowest-direct", "newest": "highest"}
"""What a cell is called, and what uv calls it."""

RUN_FILE = """\
model: sftx:tiny
data: {train: rows.jsonl, max_length: 256}
plugins: {chatml: {}, lora: {r: 4}}
train: {max_steps: 2, per_device_train_batch_size: 2, save_steps: 1, lr_scheduler_type: constant, use_cpu: true}
output_dir: runs/lora
"""

IMPORTS = """\
import importlib, pkgutil
optional = {"lm_eval", "mlx", "pytest", "starlette"}  # what the optional dependencies bring
for root in ("sftx", "sftx_kernels", "sftx_plugins"):
    for module in pkgutil.walk_packages(importlib.import_module(root).__path__, root + "."):
        try:
            module.name.endswith("__main__") or importlib.import_module(module.name)
        except ModuleNotFoundError as error:
            if error.name not in optional:
                raise
"""

KERNELS = """\
import torch
from torch.nn.functional import cross_entropy
from sftx_kernels import linear_cross_entropy
torch.manual_seed(0)
hidden, weight, labels = torch.randn(24, 16), torch.randn(50, 16), torch.randint(50, (24,))
ours, theirs = (x.clone().requires_grad_() for x in (hidden, hidden))
linear_cross_entropy(ours, weight, labels, chunk_rows=5).loss.backward()
cross_entropy(theirs @ weight.T, labels, reduction="sum").backward()
torch.testing.assert_close(ours.grad, theirs.grad)
"""

VERSIONS_OF = """\
import json, platform
from importlib.metadata import PackageNotFoundError, version
found = {"python": platform.python_version()}
for name in ("sftx", "torch", "transformers", "triton"):
    try:
        found[name] = version(name)
    except PackageNotFoundError:
        found[name] = "none"
print(json.dumps(found))
"""

SFTX = ("{bin}/sftx",)
PYTHON = ("{bin}/python", "-c")
NOT_PASSED_ON = ("PYTHONDONTWRITEBYTECODE", "PYTHONHOME", "PYTHONPATH", "VIRTUAL_ENV")
"""What the environment of this script may have and that of a step must not: it would not be a user's."""

STEPS: Mapping[str, Sequence[str]] = {
    "version": (*SFTX, "--version"),
    "plugins list": (*SFTX, "plugins", "list"),
    "bench --help": (*SFTX, "bench", "--help"),
    "imports": (*PYTHON, IMPORTS),
    "kernels": (*PYTHON, KERNELS),
    "doctor": (*SFTX, "doctor", "run.yaml"),
    "run, LoRA": (*SFTX, "run", "run.yaml"),
    "run --resume": (*SFTX, "run", "run.yaml", "--resume", "--max-steps", "4"),
    "run, full": (*SFTX, "run", "run.yaml", "--no-plugin", "lora", "--output-dir", "runs/full"),
    "chat": (*SFTX, "chat", "runs/lora", "--max-new-tokens", "4"),
    "generate": (*SFTX, "generate", "runs/full", "--data", "rows.jsonl", "--out", "a.jsonl", "--max-new-tokens", "4"),
    "merge": (*SFTX, "merge", "runs/lora"),
}
"""What is done in each environment, in this order. Each must end with exit code 0."""

LEAVES: Mapping[str, Sequence[str]] = {
    "run, LoRA": ("runs/lora/adapter/adapter_model.safetensors",),
    "run --resume": ("runs/lora/checkpoints/step-4",),
    "run, full": ("runs/full/model/model.safetensors",),
    "generate": ("a.jsonl",),
    "merge": ("runs/lora/merged/model.safetensors",),
}
"""What must be there after a step."""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--wheel", type=Path, help="wheel to install  [default: the one in dist/]")
    parser.add_argument("--python", action="append", default=[], help="interpreter to use besides those on the path")
    parser.add_argument("--pythons", nargs="+", default=PYTHONS, choices=PYTHONS, help="which versions of Python")
    parser.add_argument("--versions", nargs="+", default=list(VERSIONS), choices=VERSIONS, help="of the dependencies")
    parser.add_argument("--out", type=Path, help="JSON file to write or extend")
    parser.add_argument("--page", type=Path, help="Markdown file that has the table")
    arguments = parser.parse_args()
    uv = shutil.which("uv", path=os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")]))
    if uv is None:
        parser.error("uv is not found; pip install uv")
    wheels = [arguments.wheel] if arguments.wheel else sorted(Path("dist").glob("sftx-*.whl"))
    if len(wheels) != 1 or not wheels[0].is_file():
        parser.error(f"expected one wheel, got {', '.join(map(str, wheels)) or 'none in dist/'}; make dist, or --wheel")
    wheel = wheels[0].resolve()
    cells = read_cells(arguments.out, wheel)
    interpreters = find_interpreters(arguments.python)
    for python in arguments.pythons:
        for versions in arguments.versions:
            if python in interpreters:
                cells[python, versions] = run_cell(uv, wheel, python, interpreters[python], versions)
            else:
                cells.setdefault((python, versions), {"result": "not run: no such Python was found"})
            write_cells(arguments.out, wheel, cells)
    print("\n".join(table(cells)))
    if arguments.page is not None:
        arguments.page.write_text(fill(arguments.page.read_text(encoding="utf-8"), cells), encoding="utf-8")
    return int(any(cell["result"].startswith("failed") for cell in cells.values()))


def find_interpreters(given: Sequence[str]) -> dict[str, str]:
    """Return an interpreter for each version of Python: one that was given, else one on the path."""
    on_path = {python: path for python in PYTHONS if (path := shutil.which(f"python{python}"))}
    # pyenv lays a script on the path for each version that it has, also for those that are not switched on.
    found = {python: path for python, path in on_path.items() if version_of(path) == python}
    for path in given:
        version = version_of(path)
        if version is None:
            raise SystemExit(f"{path} does not run")
        found[version] = path
    return found


def version_of(interpreter: str) -> str | None:
    ask = [interpreter, "-c", "import sys; print('%d.%d' % sys.version_info[:2])"]
    try:
        done = subprocess.run(ask, text=True, capture_output=True)
    except OSError:
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def run_cell(uv: str, wheel: Path, python: str, interpreter: str, versions: str) -> dict[str, Any]:
    """Make an environment, go through the steps, and remove it; the first step that fails is the last."""
    kept = {
        name: value for name, value in os.environ.items() if name not in NOT_PASSED_ON and not name.startswith("SFTX_")
    }
    cell: dict[str, Any] = {"system": f"{platform.system()} {platform.machine()}"}
    with tempfile.TemporaryDirectory(prefix="sftx-matrix-") as directory:
        home = Path(directory)
        bin_directory = home / "env" / ("Scripts" if os.name == "nt" else "bin")
        environment = kept | {"SFTX_CACHE": str(home / "cache"), "HF_HOME": str(home / "hub"), "HF_HUB_OFFLINE": "1"}
        work = home / "work"
        work.mkdir()
        (work / "run.yaml").write_text(RUN_FILE, encoding="utf-8")
        turns = [{"role": "user", "content": "2 + 2"}, {"role": "assistant", "content": "4"}]
        (work / "rows.jsonl").write_text((json.dumps({"messages": turns}) + "\n") * 8, encoding="utf-8")
        # Without compiling: what has no wheel for a Python, such as numpy 1.26 for 3.13, is not what a user gets.
        into = ("--python", str(home / "env"), "--resolution", VERSIONS[versions], "--no-build")
        install = (uv, "pip", "install", "--quiet", *into)
        # Named one by one, as to uv a dependency of the wheel that is not named is an indirect one.
        direct = requirements(wheel)
        steps = {
            "environment": (uv, "venv", "--quiet", "--python", interpreter, str(home / "env")),
            "install": (*install, str(wheel), *direct),
            **{name: [part.replace("{bin}", str(bin_directory)) for part in step] for name, step in STEPS.items()},
        }
        cell["seconds"] = {}
        for name, command in steps.items():
            print(f"Python {python}, {versions}: {name}", file=sys.stderr, flush=True)
            with timed(cell["seconds"], name):
                problem = run_step(command, work, environment, LEAVES.get(name, ()))
            if name == "install" and problem is None:
                ask = [str(bin_directory / "python"), "-c", VERSIONS_OF]
                cell |= json.loads(subprocess.run(ask, check=True, text=True, stdout=subprocess.PIPE, cwd=work).stdout)
            if problem is not None:
                return cell | {"result": f"failed: {name}: {problem}"}
    return cell | {"result": "passed"}


def requirements(wheel: Path) -> list[str]:
    """Return what the wheel requires, without its extras."""
    with zipfile.ZipFile(wheel) as archive:
        name = next(name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
        metadata = email.message_from_bytes(archive.read(name))
    return [line for line in metadata.get_all("Requires-Dist", []) if "extra ==" not in line]


def run_step(command: Sequence[str], work: Path, environment: Mapping[str, str], leaves: Sequence[str]) -> str | None:
    """Return what went wrong, in a line, or None. The step reads one question from a pipe."""
    done = subprocess.run(command, cwd=work, env=environment, input="2 + 2", text=True, capture_output=True)
    if done.returncode != 0:
        lines = [line for line in done.stderr.splitlines() if line.strip()] or [f"exit code {done.returncode}"]
        # The line of an error of sftx, else the last of a traceback.
        return next((line for line in lines if line.startswith("sftx: error")), lines[-1])[:300]
    return next((f"{path} is missing" for path in leaves if not (work / path).exists()), None)


@contextlib.contextmanager
def timed(seconds: dict[str, float], name: str) -> Iterator[None]:
    begin = time.perf_counter()
    yield
    seconds[name] = round(time.perf_counter() - begin, 1)


def read_cells(path: Path | None, wheel: Path) -> dict[tuple[str, str], dict[str, Any]]:
    """Return the cells that an earlier call found with this version of sftx."""
    if path is None or not path.exists():
        return {}
    before = json.loads(path.read_text(encoding="utf-8"))
    if before["wheel"] != wheel.name:
        return {}
    return {(cell.pop("of"), cell.pop("versions")): cell for cell in before["cells"]}


def write_cells(path: Path | None, wheel: Path, cells: Mapping[tuple[str, str], Mapping[str, Any]]) -> None:
    if path is None:
        return
    rows = [{"of": python, "versions": versions, **cells[python, versions]} for python, versions in sorted(cells)]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"wheel": wheel.name, "cells": rows}, indent=1) + "\n", encoding="utf-8")


def table(cells: Mapping[tuple[str, str], Mapping[str, Any]]) -> Iterator[str]:
    """Yield the lines of a Markdown table with a row for each cell."""
    yield "| Python | dependencies | torch | transformers | triton | result | s |"
    yield "| --- | --- | --- | --- | --- | --- | --- |"
    for (python, versions), cell in sorted(cells.items()):
        found = [cell.get(name, "") for name in ("torch", "transformers", "triton")]
        seconds = f"{sum(cell['seconds'].values()):.0f}" if "seconds" in cell else ""
        row = (cell.get("python", python), versions, *found, cell["result"].replace("|", "\\|"), seconds)
        yield f"| {' | '.join(row)} |"


def fill(page: str, cells: Mapping[tuple[str, str], Mapping[str, Any]]) -> str:
    """Return the page with the table of these cells."""
    lines = "\n".join(table(cells))
    between = r"(?<=<!-- matrix -->\n).*?(?=<!-- end -->)"
    return re.sub(between, lambda _: f"\n{lines}\n\n", page, flags=re.DOTALL)


if __name__ == "__main__":
    sys.exit(main())
