"""Commands import no more than they need, and packages import one another in one direction only."""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import sftx

ROOT = Path(__file__).parents[2]
SFTX = Path(sys.executable).with_name("sftx")
HEAVY = {"torch", "transformers", "datasets", "numpy", "pandas", "pyarrow", "safetensors", "tokenizers"}
_IMPORT_TIME = re.compile(r"import time: +\d+ \| +\d+ \| +([\w.]+)")


def start(command: list[str], cwd: Path) -> tuple[subprocess.CompletedProcess[str], set[str]]:
    """Run a command in a new process; return its result and the top-level packages it imported."""
    done = subprocess.run(
        command,
        cwd=cwd,
        env=os.environ | {"PYTHONPROFILEIMPORTTIME": "1"},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    imported = {name.partition(".")[0] for name in _IMPORT_TIME.findall(done.stderr)}
    done.stderr = "".join(line for line in done.stderr.splitlines(keepends=True) if not line.startswith("import time:"))
    return done, imported


@pytest.mark.parametrize(
    ("arguments", "unneeded"),
    [
        (["--help"], {"pydantic", "rich", "yaml"}),
        (["--version"], {"pydantic", "rich", "yaml"}),
        (["plugins", "list"], {"pydantic", "rich", "yaml"}),
        (["plugins", "list", "--json"], {"pydantic", "rich", "yaml"}),
        (["plugins", "info", "lora"], {"rich"}),
        (["run", "--help"], {"rich"}),
        (["bench", "--help"], {"pydantic", "rich", "yaml"}),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_a_command_that_needs_no_model_imports_nothing_heavy(
    arguments: list[str], unneeded: set[str], tmp_path: Path
) -> None:
    done, imported = start([str(SFTX), *arguments], tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout
    assert imported & (HEAVY | unneeded) == set()
    assert "click" in imported


def test_python_m_sftx_is_the_command_and_as_light(tmp_path: Path) -> None:
    done, imported = start([sys.executable, "-m", "sftx", "--help"], tmp_path)
    assert done.returncode == 0
    assert "Usage: " in done.stdout
    assert imported & (HEAVY | {"pydantic", "rich"}) == set()


def test_importing_sftx_needs_neither_torch_nor_a_validator(tmp_path: Path) -> None:
    done, imported = start([sys.executable, "-c", "import sftx"], tmp_path)
    assert done.returncode == 0
    assert "sftx" in imported
    assert imported & (HEAVY | {"pydantic", "rich", "click", "yaml"}) == set()


def test_a_wrong_option_of_a_plugin_is_said_before_torch_is_imported(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").touch()
    command = ["run", "--data", "rows.jsonl", "--plugin", "chatml", "--plugin", "lora", "--set", "lora.r=0"]
    done, imported = start([str(SFTX), *command], tmp_path)
    assert done.returncode == 1
    assert done.stdout == ""
    assert done.stderr == (
        f"sftx: error: --set lora.r=0: plugin 'lora' (sftx {sftx.__version__}): option 'r': got 0, "
        "expected a number greater than or equal to 1\n"
    )
    assert imported & HEAVY == set()
    assert [path.name for path in tmp_path.iterdir()] == ["rows.jsonl"]


def test_activating_every_built_in_plugin_of_a_run_imports_no_torch(tmp_path: Path) -> None:
    """Errors of assembly (two templates, a hook without a plugin) are reported before torch is imported."""
    code = (
        "from sftx.assembly import registry\n"
        "from sftx.config import loading\n"
        "given = [('data.train', ['rows.jsonl'], '--data rows.jsonl')]\n"
        "loaded = loading.load(None, add=['chatml', 'lora', 'exact-match'], assignments=given)\n"
        "assert registry.activate(loaded).table()\n"
    )
    done, imported = start([sys.executable, "-c", code], tmp_path)
    assert done.returncode == 0, done.stderr
    assert imported & {"torch", "transformers", "datasets"} == set()


# --- arrows -------------------------------------------------------------------------------------


def imports(directory: Path) -> Iterator[tuple[str, str, list[str]]]:
    """Yield (file and line, module, names) of each import statement under `directory`, at any level."""
    files = sorted(directory.rglob("*.py"))
    assert files
    for file in files:
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            place = f"{file.relative_to(ROOT)}:{getattr(node, 'lineno', 0)}"
            if isinstance(node, ast.Import):
                for alias in node.names:
                    yield place, alias.name, []
            elif isinstance(node, ast.ImportFrom):
                assert node.level == 0, f"{place}: relative import"
                yield place, node.module or "", [alias.name for alias in node.names]


def package(module: str) -> str:
    return module.partition(".")[0]


def test_the_core_does_not_know_the_built_in_plugins() -> None:
    assert [place for place, module, _ in imports(ROOT / "sftx") if package(module) == "sftx_plugins"] == []


def test_a_run_needs_no_test_kit() -> None:
    allowed = ("sftx/testing/", "sftx/pytest_plugin.py", "sftx/cli/plugins.py")
    found = [place for place, module, _ in imports(ROOT / "sftx") if module.startswith("sftx.testing")]
    assert found
    assert [place for place in found if not place.startswith(allowed)] == []


def test_kernels_know_neither_the_core_nor_the_plugins() -> None:
    wrong = {"sftx", "sftx_plugins"}
    assert [place for place, module, _ in imports(ROOT / "kernels" / "sftx_kernels") if package(module) in wrong] == []


def test_plugins_import_the_public_names_of_the_core_alone() -> None:
    """Built-in plugins import as third-party plugins must: names of `sftx.__all__`, from `sftx`."""
    found = [(p, m, names) for p, m, names in imports(ROOT / "plugins" / "sftx_plugins") if package(m) == "sftx"]
    assert found
    assert [place for place, module, _ in found if module != "sftx"] == []
    assert [place for place, _, names in found if not set(names) <= set(sftx.__all__)] == []


def test_every_public_name_exists_once() -> None:
    assert sorted(set(sftx.__all__)) == sorted(sftx.__all__)
    assert [name for name in sftx.__all__ if name != "LanguageModel" and not hasattr(sftx, name)] == []
