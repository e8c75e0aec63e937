"""Tests of commands that installed packages add to sftx, and of how little is read to list them."""

from __future__ import annotations

import importlib
import json
import os
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import click
import pytest
from click.shell_completion import ShellComplete
from click.testing import CliRunner, Result

from environments import build_wheel, make_environment
from sftx.cli import BUILT_IN, main

ROOT = Path(__file__).parents[2]
COMMAND = """
import click
import sftx


@click.command()
@click.option("--fail", type=click.Choice(["config", "other"]))
def command(fail):
    \"\"\"Say hello.\"\"\"
    if fail:
        raise sftx.ConfigError("the flag is wrong") if fail == "config" else ValueError("oh")
    click.echo("hello")
"""


@pytest.fixture
def install(install_plugin: Any) -> Any:
    def install_command(distribution: str, code: str, name: str, **options: Any) -> None:
        metadata = [f"Summary: {distribution} says hello.", "License-Expression: MIT"]
        install_plugin(distribution, code, {name: "command"}, group="sftx.commands", metadata=metadata, **options)

    return install_command


def sftx(*arguments: str) -> Result:
    return CliRunner().invoke(main, list(arguments))


def test_a_command_is_listed_with_its_package_and_runs(install: Any) -> None:
    install("acme", COMMAND, "greet")
    shown = sftx("--help")
    assert shown.stdout.partition("Commands of installed packages:\n")[2] == "  greet  acme: acme says hello.\n"
    assert "acme" not in sys.modules
    assert sftx("plugins", "list").stdout.endswith(
        "\n\nCOMMAND  DISTRIBUTION  OBJECT\ngreet    acme 1.0      acme:command\n"
    )
    listed = json.loads(sftx("plugins", "list", "--json").stdout)
    assert [one for one in listed if "command" in one] == [
        {"name": "greet", "distribution": "acme", "version": "1.0", "command": "acme:command"}
    ]
    assert "acme" not in sys.modules
    assert sftx("greet").stdout == "hello\n"
    assert "Say hello." in sftx("greet", "--help").stdout
    info = sftx("plugins", "info", "greet").stdout
    assert re.search(r"^command +sftx greet\ndistribution +acme 1\.0\nlicense +MIT$", info, re.MULTILINE)
    assert "Say hello." in info
    refused = sftx("plugins", "check", "greet")
    assert refused.exit_code == 1
    assert "command 'greet' (acme 1.0) has no contract to be checked against; see sftx greet --help" in refused.stderr


def test_without_commands_of_packages_there_is_no_section_for_them() -> None:
    assert "installed packages" not in sftx("--help").stdout
    assert "COMMAND" not in sftx("plugins", "list").stdout


def test_errors_of_a_command_are_those_of_a_built_in_one(install: Any) -> None:
    install("acme", COMMAND, "greet")
    wrong = sftx("greet", "--fail", "config")
    assert (wrong.exit_code, wrong.stderr) == (1, "sftx: error: the flag is wrong\n")
    assert isinstance(sftx("--debug", "greet", "--fail", "config").exception, Exception)
    assert sftx("greet", "--no").exit_code == 2
    failed = sftx("greet", "--fail", "other")
    said = "sftx: error: command 'greet' (acme 1.0): failed: ValueError: oh; sftx --debug greet shows where\n"
    assert (failed.exit_code, failed.stderr) == (1, said)
    assert isinstance(sftx("--debug", "greet", "--fail", "other").exception, ValueError)


def test_a_command_of_sftx_cannot_be_replaced(install: Any) -> None:
    install("acme", COMMAND, "doctor")
    warning = "command 'doctor' (acme 1.0) is ignored: sftx has a command of this name\n"
    for arguments in (["doctor", "--help"], ["--help"]):
        done = sftx(*arguments)
        assert done.exit_code == 0
        assert done.stderr == warning
        assert "acme says" not in done.stdout
    assert "Check the data and options" in sftx("--help").stdout
    assert sftx("plan", "--help").stderr == ""
    assert "acme" not in sys.modules


def test_two_packages_with_one_command_are_an_error_that_names_both(install: Any) -> None:
    install("acme", COMMAND, "greet")
    install("zeta", COMMAND, "greet")
    shown = sftx("--help").stdout
    assert "acme: acme says hello." in shown
    assert "zeta: zeta says hello." in shown
    done = sftx("greet")
    assert (done.exit_code, done.stderr) == (
        1,
        "sftx: error: command 'greet' is provided by acme 1.0 and zeta 1.0; uninstall one of them\n",
    )


@pytest.mark.parametrize(
    ("code", "message"),
    [
        ("import no_such_module", "cannot be imported from 'acme:command': ModuleNotFoundError: No module named"),
        ("raise SystemExit(0)", "cannot be imported from 'acme:command': SystemExit: 0"),
        ("command =", "cannot be imported from 'acme:command': SyntaxError: invalid syntax"),
        ("def command(): ...", "'acme:command' is a value of the type function, expected a click command"),
        (f"{COMMAND}\ncommand = type(command)", "'acme:command' is a value of the type type, expected a click command"),
    ],
)
def test_a_package_that_is_broken_is_one_line_with_its_name_and_harms_nothing_else(
    install: Any, code: str, message: str
) -> None:
    install("acme", code, "greet")
    assert sftx("--help").exit_code == sftx("plugins", "list").exit_code == 0
    done = sftx("greet")
    assert done.exit_code == 1
    assert done.stderr.startswith(f"sftx: error: command 'greet' (acme 1.0): {message}")
    assert done.stderr.count("\n") == 1


def test_a_package_for_another_sftx_is_refused_before_it_is_imported(install: Any) -> None:
    install("acme", "raise RuntimeError", "greet", requires=["sftx>=9"])
    assert "command 'greet' (acme 1.0): requires sftx >=9, this is sftx" in sftx("greet").stderr


def test_a_shell_completes_commands_without_importing_them(install: Any) -> None:
    install("acme", COMMAND, "greet")
    install("broken", "raise RuntimeError", "grumble")

    def completions(words: list[str], incomplete: str) -> list[str]:
        shell = ShellComplete(main, {}, "sftx", "_SFTX_COMPLETE")
        return [item.value for item in shell.get_completions(words, incomplete)]

    assert sorted(completions([], "gr")) == ["greet", "grumble"]
    assert completions([], "d") == ["doctor", "data"]
    assert "acme" not in sys.modules
    assert completions(["greet"], "--f") == ["--fail"]
    assert completions(["grumble"], "--f") == []


def test_the_terminal_gets_no_control_characters_of_a_package(install_plugin: Any) -> None:
    install_plugin(
        "acme", COMMAND, {"greet\x1b[31m": "command"}, group="sftx.commands", metadata=["Summary: \x1b[31m\x9b"]
    )
    for arguments in (["--help"], ["plugins", "list"]):
        shown = CliRunner().invoke(main, arguments, color=True).output
        assert "\x1b" not in shown
        assert "\x9b" not in shown


def test_the_example_of_the_page_works(install: Any, tmp_path: Path) -> None:
    page = (ROOT / "docs" / "hooks" / "command.md").read_text(encoding="utf-8")
    (code,) = re.findall(r"^```python\n(.*?)^```$", page, flags=re.MULTILINE | re.DOTALL)
    assert code.count("\n") <= 40
    install("acme", code, "last-loss")
    run = tmp_path / "run"
    run.mkdir()
    assert "is no run directory" in sftx("last-loss", str(run)).stderr
    (run / "metrics.jsonl").write_text('{"event": "step", "loss": 2.5}\n{"event": "evaluate", "loss": 9}\n')
    assert sftx("last-loss", str(run), "--digits", "2").stdout == f"{run}: 2.50\n"


def test_every_built_in_command_exists() -> None:
    with click.Context(main) as context:
        assert main.list_commands(context) == list(BUILT_IN)


@pytest.mark.slow
def test_a_package_is_used_from_its_wheel(tmp_path: Path) -> None:
    environment = make_environment(tmp_path / "environment")
    environment.install(build_wheel(ROOT / "tests" / "packages" / "sftx-diff", tmp_path))
    for name, rate in (("a", 1), ("b", 2)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "run.yaml").write_text(f"train: {{learning_rate: {rate}, seed: 3}}\n")

    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        return environment.run("sftx", *arguments, cwd=tmp_path)

    assert "  diff  sftx-diff: Print the options in which two runs of sftx differ.\n" in run("--help").stdout
    assert run("diff", "a", "b").stdout == "train.learning_rate: 1 -> 2\n"
    (tmp_path / "c").mkdir()
    refused = run("diff", "a", "c")
    assert (refused.returncode, refused.stderr) == (1, "sftx: error: c: is no run directory, it has no run.yaml\n")
    assert "diff     sftx-diff 0.1.0  sftx_diff:command" in run("plugins", "list").stdout


COUNTING = """
import json, os, runpy, sys
opened = []
sys.addaudithook(lambda event, args: opened.append(str(args[0])) if event == "open" else None)
sys.argv = ["sftx", *sys.argv[1:]]
try:
    runpy.run_module("sftx", run_name="__main__")
finally:
    print(json.dumps([opened, sorted(sys.modules)]), file=sys.stderr)
"""


@pytest.mark.slow
@pytest.mark.parametrize("arguments", [["--help"], ["plugins", "list"]], ids=" ".join)
def test_two_hundred_packages_cost_two_files_each_and_no_module(
    arguments: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So the time to list them depends little on their number; benchmarks/start.py measures it."""
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    importlib.import_module("start").write_packages(tmp_path, 200)

    def count(path: str) -> tuple[str, Counter[str], set[str]]:
        environment = os.environ | {"PYTHONPATH": path}
        command = [sys.executable, "-c", COUNTING, *arguments]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True, cwd=ROOT)
        opened, modules = json.loads(done.stderr.splitlines()[-1])
        return done.stdout, Counter(Path(file).name for file in opened if str(tmp_path) in file), set(modules)

    path = os.environ.get("PYTHONPATH", "")
    shown, _, modules = count(path)
    assert "dummy" not in shown
    shown, opened, modules_beside = count(os.pathsep.join(filter(None, [path, str(tmp_path)])))
    assert len(set(re.findall(r"sftx-dummy-\d+", shown))) == 200
    # `plugins` looks first whether a package has a command of that name.
    assert opened == {"entry_points.txt": 200 if arguments == ["--help"] else 400, "METADATA": 200}
    assert modules_beside == modules
