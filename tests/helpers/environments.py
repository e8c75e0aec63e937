"""Environments of Python for tests: a package is installed and used in one of its own, as a user would."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
import venv
from dataclasses import dataclass
from pathlib import Path
from subprocess import CompletedProcess

# What would let the tests' own paths and settings into the environment.
_NOT_PASSED = ("PYTHONPATH", "PYTHONHOME", "PYTEST_ADDOPTS")


@dataclass(frozen=True)
class Environment:
    """A virtual environment that sees this one's packages too, so that torch need not be installed anew."""

    python: Path

    def run(self, *arguments: str | Path, cwd: Path) -> CompletedProcess[str]:
        """`python -m arguments` in `cwd`; the caller looks at the exit code."""
        return _python_m(self.python, *arguments, cwd=cwd)

    def start(self, *arguments: str | Path, cwd: Path) -> subprocess.Popen[bytes]:
        """Begin `python -m arguments` in `cwd`, without its output."""
        command = [str(self.python), "-m", *map(str, arguments)]
        quiet = subprocess.DEVNULL
        return subprocess.Popen(command, cwd=cwd, env=variables(), stdin=quiet, stdout=quiet, stderr=quiet)

    def install(self, *what: Path) -> None:
        """Wheels or source trees, without what they require, without a network."""
        options = ("--quiet", "--no-deps", "--no-index", "--no-build-isolation")
        done = self.run("pip", "install", *options, *what, cwd=self.python.parent)
        assert done.returncode == 0, done.stdout + done.stderr


def make_environment(directory: Path) -> Environment:
    """A new environment in `directory`, over the packages of the running one."""
    venv.create(directory, symlinks=True)
    python = directory / "bin" / "python"
    own = directory / "lib" / f"python{sys.version_info[0]}.{sys.version_info[1]}" / "site-packages"
    # `addsitedir` rather than a bare path: it reads the .pth files there, by which sftx itself may be installed.
    (own / "parent.pth").write_text(f"import site; site.addsitedir({sysconfig.get_paths()['purelib']!r})\n")
    return Environment(python)


def build_wheel(project: Path, directory: Path) -> Path:
    """Builds a wheel of the source tree `project` in `directory`, from a copy: setuptools writes beside its sources."""
    source = directory / f"{project.name}-source"
    ignored = shutil.ignore_patterns("build", "*.egg-info", "__pycache__", ".*cache")
    shutil.copytree(project, source, ignore=ignored)
    wheels = directory / f"{project.name}-wheel"
    options = ("--quiet", "--no-deps", "--no-index", "--no-build-isolation", "--wheel-dir", wheels)
    done = _python_m(Path(sys.executable), "pip", "wheel", *options, source, cwd=directory)
    assert done.returncode == 0, done.stdout + done.stderr
    return next(wheels.glob("*.whl"))


def _python_m(python: Path, *arguments: str | Path, cwd: Path) -> CompletedProcess[str]:
    command = [str(python), "-m", *map(str, arguments)]
    return subprocess.run(command, cwd=cwd, env=variables(), capture_output=True, text=True, check=False)


def variables() -> dict[str, str]:
    passed = {name: value for name, value in os.environ.items() if name not in _NOT_PASSED}
    return passed | {"PIP_DISABLE_PIP_VERSION_CHECK": "1"}
