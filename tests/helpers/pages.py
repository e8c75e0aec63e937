"""Reads the code blocks of the documentation, checks what can be checked without running them, and runs a page.

A paragraph that is nothing but a name in backticks, above a block, is the name of the file that holds the block. A
comment `<!-- not run: why -->` above a block says why no test runs its commands; what they say is checked all the same.
"""

from __future__ import annotations

import ast
import contextlib
import importlib.util
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import tempfile
import tomllib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Final, TypeAlias

import click
import yaml
from markdown_it import MarkdownIt

ROOT: Final = Path(__file__).parents[2]
DOCS: Final = ROOT / "docs"
SHELLS: Final = ("sh", "console")
OTHER_PROGRAMS: Final = {
    "curl", "echo", "export", "mlflow", "ollama", "source", "sqlite3", "tensorboard", "vllm", "eval", "cd", "timeout",
    "cmp", "grep", "sbatch", "sky", "kubectl", "until", "do", "done", "kill",
}  # fmt: skip
"""Programs that are not ours, of which nothing is checked but that they are meant."""


@dataclass(frozen=True)
class Block:
    """A code block of a page."""

    page: Path
    line: int
    language: str
    text: str
    file: str | None
    """The name of the file that it is."""
    not_run: str | None
    """Why no test runs it."""

    def __str__(self) -> str:
        return f"{self.page.relative_to(ROOT)}:{self.line}"

    @property
    def is_of_another_tool(self) -> bool:
        """Return whether it is the file that a page for users of another tool begins with; its syntax alone is ours."""
        return self.page.parent.name == "migrating" and not self.text.startswith("# Written by `sftx migrate`")


@dataclass(frozen=True)
class Command:
    """A line of a shell, with what a page shows below it."""

    line: str
    shown: tuple[str, ...]

    def simple(self) -> list[list[str]]:
        """Return the words of each program that the line starts; `...` stands for more words."""
        lexer = shlex.shlex(self.line, posix=True, punctuation_chars="|&;<>")
        lexer.whitespace_split, lexer.commenters = True, "#"
        commands: list[list[str]] = [[]]
        words = iter(lexer)
        for word in words:
            if set(word) <= set("|&;"):
                commands.append([])
            elif set(word) <= set("<>"):
                next(words)  # the file
            else:
                commands[-1].append(word)
        is_setting = re.compile(r"[A-Z_]+=").match
        without = ([word for n, word in enumerate(words) if n or not is_setting(word)] for words in commands)
        return [[word for word in words if word != "..."] for words in without if words]

    @property
    def is_part(self) -> bool:
        """Return whether it is a part of a command, whose other words the reader has to add."""
        return "..." in self.line.partition("#")[0].split()


def pages() -> list[Path]:
    """Return every page of the documentation. Decisions of the past are as they were."""
    return [ROOT / "README.md", *(page for page in sorted(DOCS.rglob("*.md")) if page.parent.name != "decisions")]


@cache
def blocks(page: Path) -> list[Block]:
    found: list[Block] = []
    file = not_run = None
    for token in MarkdownIt("commonmark").enable("table").parse(page.read_text(encoding="utf-8")):
        match token.type:
            case "fence" | "code_block":
                assert token.map is not None
                language = token.info.split(" ")[0] if token.type == "fence" else "sh"
                found.append(Block(page, token.map[0] + 1, language, token.content, file, not_run))
                file = not_run = None
            case "inline" if named := re.fullmatch(r"`([^`\s]+)`", token.content):
                file = named[1]
            case "html_block" if reason := re.fullmatch(r"<!-- not run: (.+?) -->", token.content.strip(), re.DOTALL):
                not_run = reason[1]
            case "inline" | "html_block" | "heading_open":
                file = not_run = None
    return found


def commands(block: Block) -> list[Command]:
    """Return the commands of a block of a shell. In one of a console each follows `$ `, and its output follows it."""
    text = re.sub(r"[ \t]*\\\n\s*", " ", block.text)
    if block.language == "sh":
        return [Command(line, ()) for line in text.splitlines() if line.strip() and not line.startswith("#")]
    found: list[tuple[str, list[str]]] = []
    for line in text.splitlines():
        if line.startswith("$ "):
            found.append((line[2:], []))
        else:
            assert found, f"{block}: a block of a console begins with a command: $ sftx ..."
            found[-1][1].append(line)
    return [Command(line, tuple(shown)) for line, shown in found]


# --- checks that run nothing


def check(block: Block, directory: Path) -> None:
    """Raise an error that names the block if it is not valid in its language."""
    checks: dict[str, Callable[[Block, Path], None]] = {
        "sh": _check_shell, "console": _check_shell, "bash": _check_bash, "python": _check_python,
        "yaml": _check_yaml, "json": _check_json, "toml": _check_toml, "jinja": _check_jinja, "text": _check_text,
        "{toctree}": _check_toctree,
    }  # fmt: skip
    assert block.language in checks, f"{block}: name the language of the block; known are {', '.join(checks)}"
    try:
        checks[block.language](block, directory)
    except (Exception, SystemExit) as error:
        raise AssertionError(f"{block}: {type(error).__name__}: {error}") from error


def _check_shell(block: Block, directory: Path) -> None:
    for command in commands(block):
        for words in command.simple():
            check_program(words, directory, is_part=command.is_part)


def check_program(words: Sequence[str], directory: Path, *, is_part: bool = False) -> None:
    """Raise an error if a command names a command, an option, an extra or a target that does not exist."""
    match list(words):
        case ["sftx", *rest]:
            check_sftx(rest, directory, is_part=is_part)
        case ["torchrun", *rest]:
            check_program(["sftx", *rest[rest.index("sftx") + 1 :]], directory, is_part=is_part)
        case ["python", "-m", ("pip" | "pytest" | "mypy" | "sftx") as module, *rest]:
            if module in ("pip", "sftx"):
                check_program([module, *rest], directory, is_part=is_part)
        case ["python", file, *_]:
            assert (ROOT / file).exists(), f"there is no file {file}"
        case ["pip", "install", *what]:
            extras = _project()["optional-dependencies"]
            for requirement in what:
                for extra in re.findall(r"(?:sftx|\.)\[(.+)\]", requirement):
                    assert set(extra.split(",")) <= set(extras), f"no extra {extra}"
        case ["make", *targets]:
            made = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
            named = {target for target in targets if "=" not in target}
            assert named <= set(made), f"no target {named}"
        case [program, *_]:
            assert program in OTHER_PROGRAMS, f"what is {program}?"


class _Loaded(BaseException):
    """A command has read its options, and would begin."""


def check_sftx(words: Sequence[str], directory: Path, *, is_part: bool) -> None:
    """Parse a command of sftx, and where it takes a run's options load them with those of its plugins."""
    import sftx.cli.options
    from sftx.assembly.registry import activate
    from sftx.cli import main
    from sftx.errors import SftxError

    asks_for_help = "--help" in words
    words = [word for word in words if word not in ("--debug", "--help", "--version")]
    command: click.Command = main
    context = click.Context(main, info_name="sftx")
    while isinstance(command, click.Group):
        if not words:
            return
        found = command.get_command(context, words[0])
        if found is None and words[0] not in _installed_later():
            raise click.UsageError(f"no command {words[0]}")
        if found is None:
            return
        command, words = found, words[1:]
    if asks_for_help:
        return
    loaded: list[Any] = []

    def stop(value: Any) -> Any:
        loaded.append(value)
        raise _Loaded

    before = sftx.cli.options.go_on_from_adapter
    sftx.cli.options.go_on_from_adapter = stop
    try:
        with contextlib.chdir(directory), context:
            made = command.make_context(command.name or "", list(words), parent=context)
            if isinstance(command, sftx.cli.options.RunCommand):
                with made, contextlib.suppress(_Loaded):
                    command.invoke(made)
                if not _installed_later() & set(loaded[0].config.plugins):
                    activate(loaded[0])
    except click.MissingParameter:
        if not is_part:
            raise
    except (click.BadParameter, SftxError) as error:
        # What the reader has and a test does not: files and runs of his, and a package for his store.
        if not re.search(
            r"(File|Directory|Path) '.*' does not exist|no such run file|directory in the store|:// needs \w+; pip",
            error.message if isinstance(error, click.BadParameter) else str(error),
        ):
            raise
    finally:
        sftx.cli.options.go_on_from_adapter = before


@cache
def _installed_later() -> set[str]:
    """Return the names of plugins and commands that pages write and install."""
    text = "\n".join(page.read_text(encoding="utf-8") for page in pages())
    return set(re.findall(r"sftx plugins new ([\w-]+)", text))


@cache
def _project() -> dict[str, Any]:
    project: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    return project


def _check_python(block: Block, directory: Path) -> None:
    try:
        tree = ast.parse(block.text)
    except SyntaxError:
        tree = ast.parse(f"def {block.text.rstrip()}: ...")  # a signature of the reference
    compile(tree, str(block), "exec")
    if block.is_of_another_tool:
        return
    for node in ast.walk(tree):
        modules = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        if isinstance(node, ast.ImportFrom) and not node.level:
            modules = [node.module or ""]
        for module in modules:
            if module.partition(".")[0].removeprefix("sftx_") in _installed_later():
                continue
            spec = importlib.util.find_spec(module)
            assert spec is not None, f"no module {module}"
            if module.partition(".")[0].startswith("sftx") and isinstance(node, ast.ImportFrom):
                missing = {alias.name for alias in node.names} - _public_names(Path(spec.origin or ""))
                assert not missing, f"{module} has no public {missing}"


@cache
def _public_names(file: Path) -> set[str]:
    """Return what a module lists in `__all__`, without importing it: some of ours import torch."""
    for node in ast.parse(file.read_text(encoding="utf-8")).body:
        match node:
            case ast.Assign(targets=[ast.Name(id="__all__")], value=value):
                return set(ast.literal_eval(value))
    return set()


def _check_yaml(block: Block, directory: Path) -> None:
    from sftx.assembly.registry import activate
    from sftx.config import loading

    documents = list(yaml.safe_load_all(block.text))
    assert all(isinstance(document, dict) for document in documents)
    if len(documents) == 1 and not {"kind", "apiVersion"} & set(documents[0]) and not block.is_of_another_tool:
        file = directory / "checked.yaml"
        file.write_text(block.text, encoding="utf-8")
        loaded = loading.load(file)
        if not _installed_later() & set(loaded.config.plugins):
            activate(loaded)


def _check_json(block: Block, directory: Path) -> None:
    is_lines = (block.file or ".jsonl").endswith(".jsonl") and not block.text.startswith("{\n")
    for text in block.text.splitlines() if is_lines else [block.text]:
        json.loads(text)


def _check_toml(block: Block, directory: Path) -> None:
    tomllib.loads(block.text)


def _check_jinja(block: Block, directory: Path) -> None:
    import jinja2

    jinja2.Environment().parse(block.text)


def _check_bash(block: Block, directory: Path) -> None:
    subprocess.run(["bash", "-n"], input=block.text, text=True, check=True, capture_output=True)


def _check_text(block: Block, directory: Path) -> None:
    assert block.file or block.not_run, "say which file it is, or why nothing checks it: <!-- not run: a formula -->"


def _check_toctree(block: Block, directory: Path) -> None:
    assert block.page == DOCS / "index.md", "the contents are in docs/index.md"


# --- running a page


@dataclass(frozen=True)
class Ran:
    """A command that was run, and what it printed."""

    block: Block
    command: Command
    exit_code: int
    output: str

    def lacks(self) -> list[str]:
        """Return the lines that the page shows and that were not printed in this order; numbers may be others."""
        missing = []
        printed = iter([_normal(line) for line in self.output.splitlines()])
        for line in self.command.shown:
            if line.strip() not in ("...", "") and _normal(line) not in printed:
                missing.append(line)
        return missing


def _normal(line: str) -> str:
    """Return a line without what differs from machine to machine: numbers, white space and what they fill."""
    return " ".join(re.sub(r"\d+([.,:]\d+)*(e[+-]\d+)?", "0", line).split())


Runner: TypeAlias = Callable[[str, Path], tuple[int, str]]
"""Runs a line in a directory; returns its exit code and what it printed."""


def write_files(page: Path, directory: Path) -> None:
    """Write every file that a page shows."""
    for block in blocks(page):
        _write(block, directory)


def _write(block: Block, directory: Path) -> None:
    if block.file is not None:
        file = directory / block.file
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(block.text, encoding="utf-8")


def answers_until_it_is_stopped(command: Command) -> bool:
    """Return whether a line starts a server: what follows it would never be run, and no test would stop it."""
    return any(words[1:2] == ["serve"] and "--help" not in words for words in command.simple())


def run_page(page: Path, run: Runner, directory: Path) -> Iterator[Ran]:
    """Write the files of a page and run its commands in their order, by `run(line, directory)`."""
    for block in blocks(page):
        _write(block, directory)
        if block.file is None and block.language in SHELLS and block.not_run is None:
            for command in commands(block):
                if command.is_part:
                    continue
                assert not answers_until_it_is_stopped(command), f"{block}: {command.line}: never ends"
                yield Ran(block, command, *run(command.line, directory))


def in_a_process(line: str, directory: Path) -> tuple[int, str]:
    """Run a command of sftx in a process of its own, with the tiny model where it names none. Others are not run.

    `sftx chat` reads what `echo` writes where a pipe leads to it, and is typed to otherwise.
    """
    *before, words = Command(line, ()).simple()
    words = with_tiny_model(words)
    if words[0] != "sftx":
        return 0, ""
    piped = " ".join(before[-1][1:]) + "\n" if before and before[-1][0] == "echo" else None
    variables = os.environ | {"PYTHONSAFEPATH": "1"}  # the script `sftx` does not see modules of the directory either
    command = [sys.executable, "-m", *words]
    if words[1] == "chat" and piped is None:
        exit_code, printed = _run_in_a_terminal(command, directory, variables, typed="Hello.\n")
        return exit_code or int("sftx: error:" in printed), printed  # at a terminal a chat goes on after an error
    return run_limited(command, directory, variables, piped=piped)


def with_tiny_model(words: list[str]) -> list[str]:
    """Return the words of a command with `--model sftx:tiny` if it would take the embedded model."""
    takes_it = words[0] == "sftx" and words[1] in ("run", "inspect", "doctor") and "--model" not in words
    return [*words[:2], "--model", "sftx:tiny", *words[2:]] if takes_it and words[2] != "run.yaml" else words


def in_a_shell(line: str, directory: Path, *, limit_s: float = 3600) -> tuple[int, str]:
    """Run a line in bash, where `sftx` and `python` are those of the tests."""
    tools = directory / ".tools"
    tools.mkdir(exist_ok=True)
    for name, module in {"sftx": " -m sftx", "python": ""}.items():
        (tools / name).write_text(f'#!/bin/sh\nexec {shlex.quote(sys.executable)}{module} "$@"\n', encoding="utf-8")
        (tools / name).chmod(0o755)
    variables = os.environ | {"PATH": f"{tools}:{os.environ['PATH']}"}
    return run_limited(["bash", "-c", line], directory, variables, limit_s=limit_s)


def _run_in_a_terminal(
    command: Sequence[str], directory: Path, variables: Mapping[str, str], *, typed: str
) -> tuple[int, str]:
    """Run a command that reads lines from a terminal, until the end of what is typed."""
    import pty

    ours, theirs = pty.openpty()
    try:
        os.write(ours, typed.encode() + b"\x04")  # Ctrl-D
        return run_limited(command, directory, variables, stdin=theirs)
    finally:
        os.close(theirs)
        os.close(ours)


def run_limited(
    command: Sequence[str],
    directory: Path,
    variables: Mapping[str, str],
    *,
    piped: str | None = None,
    stdin: int = subprocess.DEVNULL,
    limit_s: float = 600,
) -> tuple[int, str]:
    """Run a command and kill it, with the processes of its group, when the time is up: no page may stop the tests.

    Its output is a file, since a pipe would have to be read until the last process that holds it has ended.
    """
    variables = {**variables, "PYTHONUNBUFFERED": "1"}  # both streams in the order in which they are written
    with tempfile.TemporaryFile() as written, tempfile.TemporaryFile() as read:
        if piped is not None:
            read.write(piped.encode())
            read.seek(0)
            stdin = read.fileno()
        process = subprocess.Popen(
            command, cwd=directory, env=variables, stdin=stdin, stdout=written, stderr=subprocess.STDOUT,
            start_new_session=True,
        )  # fmt: skip
        late = ""
        try:
            process.wait(limit_s)
        except subprocess.TimeoutExpired:
            late = f"\nit was killed, for it had not ended after {limit_s:g} s"
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
            exit_code = process.wait()
        written.seek(0)
        return exit_code, written.read().decode(errors="replace") + late
