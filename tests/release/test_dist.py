"""What `make dist` builds: the same bytes each time, with everything that belongs in it and nothing else."""

from __future__ import annotations

import subprocess
import sys
import tarfile
import tomllib
import zipfile
from email.message import Message
from email.parser import Parser
from pathlib import Path

import pytest

import sftx

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = {"sftx": "", "sftx_kernels": "kernels/", "sftx_plugins": "plugins/"}
"""The packages, and where they lie in the repository."""
NOT_IN_SDIST = {".gitignore", ".ci/run"}

WHEEL_BYTES = 1_300_000
"""1,241,000 at 0.2.0, of 3.6 MB unpacked. The largest file is the demo's rows: 238 KB, 23 KB in the wheel."""
SDIST_BYTES = 3_000_000
"""2,884,000 at 0.2.0, of which 650,000 are pictures of the documentation."""


def tracked(*where: str) -> list[str]:
    command = ["git", "ls-tree", "-r", "-z", "--name-only", "HEAD", *where]
    done = subprocess.run(command, cwd=ROOT, check=True, text=True, stdout=subprocess.PIPE)
    return done.stdout.strip("\0").split("\0")


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Two builds of the same commit."""
    directories = (tmp_path_factory.mktemp("first"), tmp_path_factory.mktemp("second"))
    for directory in directories:
        command = [sys.executable, "benchmarks/dist.py", "--no-isolation", "--out", str(directory)]
        subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    return directories


@pytest.mark.slow
def test_two_builds_are_the_same_bytes(built: tuple[Path, Path]) -> None:
    first, second = ({file.name: file.read_bytes() for file in directory.iterdir()} for directory in built)
    assert len(first) == 2
    assert first == second


@pytest.mark.slow
def test_the_wheel_holds_the_packages_and_nothing_else(built: tuple[Path, Path]) -> None:
    (wheel,) = built[0].glob("*.whl")
    assert wheel.stat().st_size < WHEEL_BYTES
    with zipfile.ZipFile(wheel) as archive:
        names = {name for name in archive.namelist() if ".dist-info/" not in name}
    expected = {file.removeprefix(root) for package, root in PACKAGES.items() for file in tracked(f"{root}{package}")}
    assert names == expected


@pytest.mark.slow
def test_the_sdist_holds_the_repository(built: tuple[Path, Path]) -> None:
    """From it the documentation is read, the tests run, and the wheel is built, as `make dist` does."""
    (sdist,) = built[0].glob("*.tar.gz")
    assert sdist.stat().st_size < SDIST_BYTES
    with tarfile.open(sdist) as archive:
        root = f"sftx-{sftx.__version__}/"
        names = {entry.name.removeprefix(root) for entry in archive if entry.isfile()}
    made = {name for name in names if name.startswith("sftx.egg-info/")} | {"PKG-INFO", "setup.cfg"}
    assert names - made == set(tracked()) - NOT_IN_SDIST


@pytest.mark.slow
def test_the_metadata_is_that_of_pyproject(built: tuple[Path, Path]) -> None:
    (wheel,) = built[0].glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        root = f"sftx-{sftx.__version__}.dist-info"
        metadata: Message = Parser().parsestr(archive.read(f"{root}/METADATA").decode())
        entry_points = archive.read(f"{root}/entry_points.txt").decode()
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert metadata["License-Expression"] == "Apache-2.0"
    assert set(metadata.get_all("Provides-Extra", [])) == set(project["optional-dependencies"])
    assert metadata["Requires-Python"] == project["requires-python"]
    assert all(f"{name} = " in entry_points for name in project["entry-points"]["sftx.plugins"])


def test_every_file_of_a_package_is_packed() -> None:
    """A file beside the modules that `package-data` does not name would be missing where the wheel is installed."""
    setuptools = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["setuptools"]
    for package, root in PACKAGES.items():
        folder = ROOT / root / package
        beside = {path for path in folder.rglob("*") if path.is_file() and path.suffix not in (".py", ".pyc")}
        packed = {path for pattern in setuptools["package-data"][package] for path in folder.glob(pattern)}
        assert beside - packed == set()
