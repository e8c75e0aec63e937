"""Tests of docs/plugins.md and docs/hooks: the tutorial's commands work, and the contract is that of the code."""

from __future__ import annotations

import dataclasses
import importlib
import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest

from environments import Environment, make_environment
from sftx.assembly.hookspecs import RETURNS

DOCS = Path(__file__).parents[2] / "docs"
PAGE = (DOCS / "plugins.md").read_text(encoding="utf-8")
TUTORIAL = PAGE.partition("## A plugin in ten minutes")[2].partition("\n## ")[0]


def steps() -> Iterator[tuple[str, str]]:
    """Yield the steps of the tutorial in order: ("run", command) or (path of a file, its text)."""
    block = r"(?:^`([^`\n]+)`\n\n)?^```(\w+)\n(.*?)^```$"
    for path, kind, text in re.findall(block, TUTORIAL, flags=re.MULTILINE | re.DOTALL):
        if kind == "sh":
            yield from (("run", line) for line in text.splitlines())
        else:
            assert path, f"no file name above a block of {kind}"
            yield path, text


def run(environment: Environment, command: str, cwd: Path) -> str:
    """Run a command of the page; pip gets the options that it needs without a network."""
    words = shlex.split(command)
    arguments = words[2:] if words[:2] == ["python", "-m"] else words
    if arguments[:2] == ["pip", "install"]:
        arguments[2:2] = ["--quiet", "--no-deps", "--no-index", "--no-build-isolation"]
    done = environment.run(*arguments, cwd=cwd)
    assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    return done.stdout


@pytest.mark.slow
@pytest.mark.usefixtures("real_model_dir")
def test_the_tutorial_works_as_it_is_written(tmp_path: Path) -> None:
    environment = make_environment(tmp_path / "environment")
    here = tmp_path / "here"
    here.mkdir()
    said: dict[str, str] = {}
    for what, text in steps():
        if what == "run":
            said[text] = run(environment, text, here)
        else:
            (here / what).write_text(text, encoding="utf-8")
    checked = next(output for command, output in said.items() if command.startswith("sftx plugins check"))
    assert re.search(r"^run +trains +ok$", checked, flags=re.MULTILINE)
    assert " 0 broken, 0 skipped" in checked
    trained = [output for command, output in said.items() if command.startswith("sftx run")]
    assert len(trained) == 2
    assert all(re.search(r"held-out, step 2: .*keywords [01]", output) for output in trained)
    assert "min_letters" in next(output for command, output in said.items() if command.startswith("sftx plugins info"))


@pytest.mark.parametrize("name", ["package", *(hook.removeprefix("sftx_") for hook in RETURNS)])
def test_every_clause_is_on_the_page_of_its_hook_with_its_reason(name: str) -> None:
    from sftx.testing.contract import SUITES

    page = PAGE if name == "package" else (DOCS / "hooks" / f"{name}.md").read_text(encoding="utf-8")
    suite = SUITES[name]
    rows = re.findall(
        r"^\| `([\w-]+)` \| (.+?) \| (.+?) \|$", page.partition("Contract")[2] or page, flags=re.MULTILINE
    )
    clauses = [("made", suite.made), *((clause.name, clause.rule) for clause in suite.clauses)]
    assert [(name, rule) for name, rule, _ in rows] == clauses
    assert all(len(reason) > 10 for *_, reason in rows)


def test_every_hook_is_on_the_page_and_has_one_of_its_own() -> None:
    shown = re.findall(r"^\| \[`sftx_(\w+)\(.*?\)`\]\(hooks/(\w+)\.md\)", PAGE, flags=re.MULTILINE)
    assert shown == [(hook.removeprefix("sftx_"),) * 2 for hook in RETURNS]
    assert {file.stem for file in (DOCS / "hooks").glob("*.md")} == {name for name, _ in shown} | {"command"}


@pytest.mark.parametrize("hook", [hook.removeprefix("sftx_") for hook in RETURNS])
def test_the_example_of_each_page_keeps_the_contract(
    hook: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import sftx.testing

    page = (DOCS / "hooks" / f"{hook}.md").read_text(encoding="utf-8")
    blocks = re.findall(r"^```python\n(.*?)^```$", page, flags=re.MULTILINE | re.DOTALL)
    (block,) = blocks
    assert block.count("\n") <= (70 if hook == "adapter" else 40)  # an adapter has five methods to write
    (tmp_path / f"page_of_{hook}.py").write_text(block, encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    module = importlib.import_module(f"page_of_{hook}")
    (plugin,) = (one for one in vars(module).values() if isinstance(one, type) and hasattr(one, f"sftx_{hook}"))
    assert dataclasses.fields(plugin)
    getattr(sftx.testing, f"check_{hook}")(plugin())
