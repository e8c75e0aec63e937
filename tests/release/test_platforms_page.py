"""What docs/platforms.md and pyproject.toml say of versions of Python is what `make matrix` found."""

from __future__ import annotations

import json
import os
import re
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest

import sftx

ROOT = Path(__file__).resolve().parents[2]
CLASSIFIER = "Programming Language :: Python :: "


@pytest.fixture
def matrix(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The script, as a module."""
    monkeypatch.setattr(sys, "path", [str(ROOT / "benchmarks"), *sys.path])
    import matrix

    return matrix


def found() -> dict[tuple[str, str], dict[str, Any]]:
    report = json.loads((ROOT / "benchmarks" / "results" / "matrix.json").read_text(encoding="utf-8"))
    assert report["wheel"] == f"sftx-{sftx.__version__}-py3-none-any.whl"
    return {(cell["of"], cell["versions"]): cell for cell in report["cells"]}


def test_the_page_has_the_table_that_was_found(matrix: Any) -> None:
    page = (ROOT / "docs" / "platforms.md").read_text(encoding="utf-8")
    cells = found()
    assert "\n".join(matrix.table(cells)) in page
    assert matrix.fill(page, cells) == page
    assert matrix.fill(page, dict(list(cells.items())[1:])) != page
    assert cells.keys() == {(python, versions) for python in matrix.PYTHONS for versions in matrix.VERSIONS}


def test_a_cell_that_passed_went_through_all_steps(matrix: Any) -> None:
    for cell in found().values():
        assert cell["result"] != "passed" or cell["seconds"].keys() == {"environment", "install", *matrix.STEPS}


def test_the_project_names_the_pythons_that_passed_whole(matrix: Any) -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    named = [text.removeprefix(CLASSIFIER) for text in project["classifiers"] if text.startswith(CLASSIFIER)]
    cells = found()
    passed = [
        python for python in matrix.PYTHONS if all(cells[python, of]["result"] == "passed" for of in matrix.VERSIONS)
    ]
    assert named == ["3 :: Only", *passed]
    assert project["requires-python"] == f">={matrix.PYTHONS[0]}"


@pytest.mark.skipif(os.name == "nt", reason="a script of a POSIX shell")
def test_a_python_that_does_not_run_is_not_found(matrix: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As pyenv lays out the versions that are not switched on."""
    monkeypatch.setenv("PATH", str(tmp_path))
    here = "{}.{}".format(*sys.version_info)
    other = next(python for python in matrix.PYTHONS if python != here)
    for python, does in ((other, "exit 127"), (here, f'exec "{sys.executable}" "$@"')):
        script = tmp_path / f"python{python}"
        script.write_text(f"#!/bin/sh\n{does}\n", encoding="utf-8")
        script.chmod(0o755)
    assert matrix.find_interpreters([]) == {here: str(tmp_path / f"python{here}")}
    with pytest.raises(SystemExit, match=f"python{other} does not run"):
        matrix.find_interpreters([str(tmp_path / f"python{other}")])


def test_pages_show_the_version_that_is_released() -> None:
    shown = {
        (page.relative_to(ROOT).as_posix(), version)
        for page in [ROOT / "README.md", *ROOT.glob("docs/**/*.md")]
        for version in re.findall(r"^sftx, version (\S+)", page.read_text(encoding="utf-8"), re.MULTILINE)
    }
    assert ("docs/installing.md", sftx.__version__) in shown
    assert {version for _, version in shown} == {sftx.__version__}
