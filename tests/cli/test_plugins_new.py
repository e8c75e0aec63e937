"""Tests of `sftx plugins new`: which names it refuses, what it writes, and that the written plugins work."""

from __future__ import annotations

import importlib
import json
import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import yaml
from click.testing import CliRunner

from environments import make_environment
from sftx import ConfigError, Location, OutputError, RunInfo, SftxError
from sftx.assembly.entry_points import discover, find
from sftx.cli.new import command
from sftx.config.loading import load
from sftx.config.options import SECTIONS
from sftx.scaffold import HOOKS, sftx_range, write_package

SEVERAL = ["loss", "parser", "template", "observer"]
TOGETHER = {"several": SEVERAL, "scored-rows": ["parser", "reward"], "scored-answers": ["rollout", "reward"]}
"""Hooks that one package implements together, by the end of its name."""
REPOSITORY = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def packages(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a directory with a package `sftx-my-HOOK` for each hook, those of TOGETHER, and `sftx-my-command`."""
    directory = tmp_path_factory.mktemp("packages")
    for hook in HOOKS:
        write_package(f"my-{hook}", [hook], directory)
    for name, hooks in TOGETHER.items():
        write_package(f"my-{name}", hooks, directory)
    write_package("my-command", ["command"], directory)
    return directory


def refused(name: str, directory: Path, hook: str = "metric", error: type[SftxError] = ConfigError) -> str:
    before = sorted(directory.rglob("*"))
    with pytest.raises(error) as caught:
        write_package(name, [hook], directory)
    assert sorted(directory.rglob("*")) == before
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_it_prints_the_files_and_the_three_next_commands_and_nothing_else(tmp_path: Path) -> None:
    place = tmp_path / "my packages"
    place.mkdir()
    done = CliRunner().invoke(command, ["sftx-unit-tests", "--hook", "metric", "--directory", str(place)])
    assert done.exit_code == 0, done.output
    package = place / "sftx-unit-tests"
    files = ["pyproject.toml", "README.md", ".gitignore"]
    files += ["sftx_unit_tests/__init__.py", "sftx_unit_tests/py.typed", "tests/test_unit_tests.py"]
    assert done.output.splitlines() == [
        *(str(package / file) for file in files),
        "",
        f"python -m pip install --editable '{package}[dev]'",
        f"python -m pytest '{package}'",
        "sftx plugins check unit-tests",
    ]
    assert {path.relative_to(package).as_posix() for path in package.rglob("*") if path.is_file()} == set(files)
    assert os.listdir(place) == ["sftx-unit-tests"]
    umask = os.umask(0)
    os.umask(umask)
    assert package.stat().st_mode & 0o777 == 0o777 & ~umask  # as mkdir makes it, readable to others


def test_usage_is_told_by_click(tmp_path: Path) -> None:
    for arguments, said in (
        (["mine", "--hook", "optimiser"], "'optimiser' is not one of 'source', 'parser', 'template'"),
        (["mine"], "Missing option '--hook'"),
        (["mine", "--hook", "loss", "--directory", str(tmp_path / "none")], "does not exist"),
    ):
        done = CliRunner().invoke(command, arguments)
        assert done.exit_code == 2
        assert said in done.output


def test_the_names_are_those_of_each_place(tmp_path: Path) -> None:
    package, *_ = write_package("sftx-two-words9", ["loss"], tmp_path)
    assert package == tmp_path / "sftx-two-words9"
    project = tomllib.loads((package / "pyproject.toml").read_text(encoding="utf-8"))
    assert project["project"]["name"] == "sftx-two-words9"
    assert project["project"]["entry-points"] == {"sftx.plugins": {"two-words9": "sftx_two_words9:TwoWords9"}}
    assert (package / "tests" / "test_two_words9.py").is_file()


@pytest.mark.parametrize(
    "name", ["", "Mine", "my_metric", "9lives", "-mine", "mine-", "my--metric", "mine.x", "../mine", "sftx-", "mine\n"]
)
def test_a_malformed_name_is_refused(name: str, tmp_path: Path) -> None:
    assert f"{name.removeprefix('sftx-')!r} is not a valid plugin name" in refused(name, tmp_path)


def test_a_name_that_is_taken_or_reserved_is_refused(tmp_path: Path) -> None:
    for section in {"data", "train"}:
        assert section in SECTIONS
        assert f"'{section}' is a section of the run file" in refused(section, tmp_path)
    assert re.search(r"'lora' is installed already, as plugin 'lora' \(sftx .*\)", refused("sftx-lora", tmp_path))
    # Installed, though no plugin: a package of that name would stand before ours, or ours before it.
    assert "would be the module sftx_kernels, which is installed already" in refused("kernels", tmp_path)
    assert "'null' is None in a run file, not a name" in refused("null", tmp_path)
    assert "'none' would be the class None" in refused("none", tmp_path)
    assert "would be the class Result" in refused("result", tmp_path)  # which its test imports
    assert "'metric' would be the class Metric" in refused("metric", tmp_path)
    assert "such as annotated-loss" in refused("annotated", tmp_path, "loss")
    write_package("metric", ["loss"], tmp_path)  # which does not import Metric


def test_a_place_that_is_taken_or_cannot_be_written_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "sftx-mine"
    package.mkdir()
    write_package("mine", ["metric"], tmp_path)  # an empty directory is no loss
    assert f"{package} exists already" in refused("mine", tmp_path, error=OutputError)
    (tmp_path / "sftx-file").write_text("kept")
    assert "exists already" in refused("file", tmp_path, error=OutputError)
    (tmp_path / "sftx-link").symlink_to(tmp_path / "nowhere")
    assert "exists already" in refused("link", tmp_path, error=OutputError)
    assert "File name too long" in refused("a" * 300, tmp_path, error=OutputError)
    (tmp_path / "taken").write_text("")
    with pytest.raises(OutputError, match="Not a directory"):
        write_package("mine", ["metric"], tmp_path / "taken")

    written: list[Path] = []

    def full(path: Path, text: str, encoding: str) -> None:
        written.append(path)
        if len(written) == 4:
            raise OSError(28, "No space left on device")
        path.touch()

    with monkeypatch.context() as patched:
        patched.setattr(Path, "write_text", full)
        assert "No space left on device" in refused("other", tmp_path, error=OutputError)
    assert len(written) == 4


@pytest.mark.parametrize(
    ("version", "expected"),
    [
        ("0.1.0", ">=0.1,<0.2"),
        ("1.9.3", ">=1.9,<1.10"),
        ("0.2.0.dev3", ">=0.2.dev0,<0.3"),
        ("2.0rc1", ">=2.0.dev0,<2.1"),
    ],
)
def test_the_range_holds_the_running_version_and_not_the_next_one(
    version: str, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from packaging.specifiers import SpecifierSet

    monkeypatch.setattr("sftx.__version__", version)
    assert sftx_range() == expected
    assert SpecifierSet(expected).contains(version, prereleases=True)


@pytest.mark.parametrize("hook", HOOKS)
def test_readme_and_metadata_say_what_the_plugin_says(
    hook: str, packages: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    name, package = f"my-{hook}", packages / f"sftx-my-{hook}"
    project = tomllib.loads((package / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    source = (package / f"sftx_my_{hook}" / "__init__.py").read_text(encoding="utf-8")
    readme = (package / "README.md").read_text(encoding="utf-8")
    assert project["license"] == "Apache-2.0"
    assert project["dependencies"] == [f"sftx{sftx_range()}"]
    assert f'    """{project["description"]}"""' in source
    assert f"\n{project['description']}\n" in readme
    code = "".join(file.read_text(encoding="utf-8") for file in package.glob("sftx_*/*.py"))
    assert code.count("# Yours: ") == 1

    module = ModuleType(f"sftx_my_{hook}")
    monkeypatch.setitem(sys.modules, module.__name__, module)  # where dataclasses look annotations up
    exec(compile(source, name, "exec"), module.__dict__)
    defaults = json.loads(json.dumps(vars(getattr(module, f"My{hook.capitalize()}")())))
    assert defaults
    for option, value in defaults.items():
        assert f"| `{option}` | " in readme
        assert f" | `{json.dumps(value)}` | " in readme

    if hook == "exporter":
        assert f"\nsftx export RUN --to {name}\n" in readme
        return
    run_file = re.search(r"```yaml\n(.*?)```", readme, re.DOTALL)
    assert run_file is not None
    plugins: dict[str, Any] = yaml.safe_load(run_file[1])["plugins"]
    assert plugins[name] == defaults
    (tmp_path / "run.yaml").write_text(run_file[1], encoding="utf-8")
    assert set(load(tmp_path / "run.yaml").config.plugins) == set(plugins)


def test_several_hooks_make_one_plugin_that_has_the_options_of_all(
    packages: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from sftx.testing.kit import make_stage

    package = packages / "sftx-my-several"
    monkeypatch.syspath_prepend(package)
    plugin = importlib.import_module("sftx_my_several").MySeveral(exponent=2.0, system="Be brief.", every=3)
    assert plugin.marker == "###"
    run = RunInfo(tmp_path, {})
    assert make_stage(plugin, "sftx_observer", run=run)._every == 3
    parsed = make_stage(plugin, "sftx_parser").parse({"question": "?", "answer": "!"}, Location("rows.jsonl", 1))
    assert parsed[0].messages[0].content == "Be brief."
    assert make_stage(plugin, "sftx_loss").exponent == 2
    readme = (package / "README.md").read_text(encoding="utf-8")
    assert "implements the hooks `sftx_parser`, `sftx_template`, `sftx_loss` and `sftx_observer`." in readme
    block = re.search(r"```yaml\n(.*?)```", readme, re.DOTALL)
    assert block is not None
    assert yaml.safe_load(block[1])["plugins"] == {
        "lora": {},
        "my-several": {"system": "", "marker": "###", "exponent": 0.0, "every": 1},
    }


def test_the_command_takes_several_hooks_and_refuses_those_that_no_class_can_have(tmp_path: Path) -> None:
    several = ["mine", "--directory", str(tmp_path), "--hook", "loss", "--hook"]
    error = CliRunner().invoke(command, [*several, "metric"]).exception
    assert isinstance(error, ConfigError)
    assert "--hook loss --hook metric: the classes for both define __call__" in str(error)
    assert "\n" not in str(error)
    assert os.listdir(tmp_path) == []
    assert CliRunner().invoke(command, [*several, "parser"]).exit_code == 0
    assert {path.name for path in (tmp_path / "sftx-mine" / "sftx_mine").iterdir()} == {
        *("__init__.py", "loss.py", "parser.py", "py.typed")
    }


def test_a_command_is_a_package_of_its_own_and_none_of_sftx_s_own(tmp_path: Path) -> None:
    for arguments, message in (
        (["report", "--hook", "command"], "'report' is a command of sftx itself; choose another name"),
        (
            ["mine", "--hook", "loss", "--hook", "command"],
            "--hook command makes a package of its own; leave --hook loss",
        ),
    ):
        error = CliRunner().invoke(command, [*arguments, "--directory", str(tmp_path)]).exception
        assert isinstance(error, ConfigError)
        assert str(error).startswith(message)
    done = CliRunner().invoke(command, ["mine", "--hook", "command", "--directory", str(tmp_path)])
    assert done.output.splitlines()[-1] == "sftx mine --help"
    project = tomllib.loads((tmp_path / "sftx-mine" / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert project["entry-points"] == {"sftx.commands": {"mine": "sftx_mine:command"}}


def test_the_text_of_the_packages_is_installed_with_sftx() -> None:
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text(encoding="utf-8"))
    patterns = project["tool"]["setuptools"]["package-data"]["sftx"]
    installed = {path for pattern in patterns for path in (REPOSITORY / "sftx").glob(pattern)}
    assert installed >= set((REPOSITORY / "sftx" / "scaffold").rglob("*.in"))


def test_the_packages_are_linted_and_formatted(packages: Path, tmp_path: Path) -> None:
    """They pass ruff with their own settings, and with those rules of this project that do not depend on the path."""
    for hook in HOOKS:  # names of other lengths break lines elsewhere
        write_package(f"x{HOOKS.index(hook)}", [hook], tmp_path)
        write_package(f"retrieval-augmented-answers-{hook}", [hook], tmp_path)
    write_package("retrieval-augmented-answers-command", ["command"], tmp_path)
    write_package("retrieval-augmented-answers", SEVERAL, tmp_path)
    rules = ("--extend-select", "SIM,RUF,PT,C4,RET,W,PLE,TID")
    for arguments in (["check", *rules], ["format", "--check"]):
        done = subprocess.run(
            [sys.executable, "-m", "ruff", *arguments, "--no-cache", packages, tmp_path], capture_output=True, text=True
        )
        assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.slow
def test_the_packages_are_typed_and_so_are_the_examples(packages: Path) -> None:
    """They pass mypy with the stricter settings of this project, so that the cache of `make types` is used."""
    assert tomllib.loads((packages / "sftx-my-loss" / "pyproject.toml").read_text())["tool"]["mypy"]["strict"]
    files = sorted(packages.rglob("*.py"))
    num_hooks, num_packages = sum(map(len, TOGETHER.values())), len(TOGETHER)
    assert len(files) == 2 * len(HOOKS) + 2 + 2 * num_hooks + num_packages + 2
    examples = sorted((REPOSITORY / "examples").glob("*/sftx_*/*.py"))
    assert len(examples) >= 2
    done = subprocess.run(
        [sys.executable, "-m", "mypy", "--no-error-summary", *files, *examples],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.slow
def test_mypy_as_the_page_says_finds_no_error_in_new_packages_beside_a_source_tree_of_sftx(
    packages: Path, tmp_path: Path
) -> None:
    """With the settings of a package, and all of them at once: the first run without a cache takes a minute."""
    places = [REPOSITORY, REPOSITORY / "kernels", REPOSITORY / "plugins", *sorted(packages.iterdir())]
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    environment["MYPYPATH"] = os.pathsep.join(map(str, places))

    def mypy(*files: Path) -> str:
        settings = ("--config-file", packages / "sftx-my-loss" / "pyproject.toml", "--cache-dir", tmp_path / "cache")
        command = [sys.executable, "-m", "mypy", "--no-error-summary", *settings, *files]
        return subprocess.run(command, env=environment, capture_output=True, text=True, cwd=tmp_path).stdout

    assert mypy(*sorted(packages.rglob("*.py"))) == ""
    wrong = tmp_path / "wrong.py"
    wrong.write_text("import sftx\n\n\ndef made() -> sftx.Loss:\n    return 3\n", encoding="utf-8")
    assert 'Incompatible return value type (got "int", expected "Loss")' in mypy(wrong)


@pytest.fixture(scope="module")
def installed(packages: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Return entries for sys.path that install the packages: a directory of their metadata, and the packages."""
    site = tmp_path_factory.mktemp("site-packages")
    for package in packages.iterdir():
        project = tomllib.loads((package / "pyproject.toml").read_text(encoding="utf-8"))["project"]
        info = site / f"{package.name.replace('-', '_')}-{project['version']}.dist-info"
        info.mkdir()
        lines = ["Metadata-Version: 2.4", f"Name: {project['name']}", f"Version: {project['version']}"]
        lines += [f"Summary: {project['description']}", f"License-Expression: {project['license']}"]
        lines += [f"Requires-Dist: {requirement}" for requirement in project["dependencies"]]
        readme = (package / project["readme"]).read_text(encoding="utf-8")
        (info / "METADATA").write_text("\n".join([*lines, "", readme]), encoding="utf-8")
        ((group, points),) = project["entry-points"].items()
        entries = [f"{name} = {value}" for name, value in points.items()]
        (info / "entry_points.txt").write_text("\n".join([f"[{group}]", *entries]), encoding="utf-8")
    return [site, *sorted(packages.iterdir())]


@pytest.mark.parametrize("hook", [*HOOKS, *TOGETHER])
def test_a_new_package_keeps_the_contract_of_a_package(
    hook: str, installed: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    from sftx.testing.package import SUITE

    monkeypatch.setattr(sys, "path", [*map(str, installed), *sys.path])
    findings = SUITE.findings(find(f"my-{hook}", discover()))
    assert [finding for finding in findings if finding.status != "ok"] == []


@pytest.mark.slow
def test_the_tests_of_the_new_packages_pass(installed: list[Path], tmp_path: Path) -> None:
    """They check the contract of each hook, and train for two steps with each plugin; all in one process."""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([*map(str, installed), *sys.path])}
    options = ("-q", "-W", "error", "--import-mode=importlib", "-p", "no:cacheprovider")
    done = subprocess.run(
        [sys.executable, "-m", "pytest", *options, "--rootdir", tmp_path, *(path / "tests" for path in installed[1:])],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    passed = re.search(r"(\d+) passed", done.stdout)
    assert passed is not None
    assert int(passed[1]) >= 3 * (len(HOOKS) + sum(map(len, TOGETHER.values())) + 1)


# One hook in the fast tests; what differs between hooks is tested above.
@pytest.mark.parametrize("hook", [HOOKS[0], *(pytest.param(hook, marks=pytest.mark.slow) for hook in HOOKS[1:])])
def test_a_new_package_installs_passes_its_tests_and_trains(hook: str, tmp_path: Path, tiny_model: Path) -> None:
    """The commands are those that a user types, in an empty directory: new, install, test, check, run."""
    home = tmp_path / "home"
    home.mkdir()
    environment = make_environment(tmp_path / "environment")

    def run(*arguments: str | Path) -> str:
        done = environment.run(*arguments, cwd=home)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    *_, install, test, check = run("sftx", "plugins", "new", f"my-{hook}", "--hook", hook).splitlines()
    package = home / f"sftx-my-{hook}"
    assert install == f"python -m pip install --editable '{package.name}[dev]'"
    environment.install(package)
    assert test == f"python -m pytest {package.name}"
    assert re.search(r"\d passed", run("pytest", package.name, "-q", "-W", "error"))
    assert check == f"sftx plugins check my-{hook}"
    assert ", 0 broken, 0 skipped" in run("sftx", "plugins", "check", f"my-{hook}")

    question, answer = ("question", "answer") if hook == "parser" else ("prompt", "completion")
    rows = [{question: f"What is {n} + 1?", answer: str(n + 1)} for n in range(8)]
    (home / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    readme = (package / "README.md").read_text(encoding="utf-8")
    if hook == "exporter":  # which has no part in a run, and writes what came of one
        plugins = ["--plugin", "chatml", "--plugin", "lora"]
    else:
        block = re.search(r"```yaml\n(.*?)```", readme, re.DOTALL)
        assert block is not None
        (home / "run.yaml").write_text(block[1], encoding="utf-8")
        plugins = ["run.yaml", "--plugin", f"my-{hook}"]
    run(
        *("sftx", "run", *plugins, "--model", tiny_model, "--data", "rows.jsonl"),
        *("--eval-fraction", "0.25", "--max-rows", "2", "--max-new-tokens", "4"),
        *("--max-steps", "2", "--per-device-train-batch-size", "2", "--use-cpu", "--output-dir", "run"),
    )
    summary = json.loads((home / "run" / "summary.json").read_text(encoding="utf-8"))
    assert summary["num_steps"] == 2
    if hook == "exporter":
        (command,) = re.findall(r"^sftx export .*$", readme, re.MULTILINE)
        assert "my-exporter" in run(*command.replace("RUN", "run").split())
        assert any((home / "run" / "export" / "my-exporter").iterdir())
        return
    resolved = yaml.safe_load((home / "run" / "run.yaml").read_text(encoding="utf-8"))
    assert f"my-{hook}" in resolved["plugins"]
