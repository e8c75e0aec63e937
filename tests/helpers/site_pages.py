"""Writes the pages of the site that say what the code says: `python tests/helpers/site_pages.py`.

They are docs/command-options.md (from the commands' own help), docs/run-file.md (the options of a run file) and
docs/plugin-directory.md (what is known of each built-in plugin). The last one has the result of `sftx plugins check` of
each, which takes minutes and is therefore recorded in docs/plugin-checks.json: `make plugin-checks`.
"""

from __future__ import annotations

import ast
import dataclasses
import json
import re
import sys
import tomllib
from collections.abc import Iterable, Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Any, Final

import click

import sftx
from sftx.assembly.discovery import hooks_of, load_class
from sftx.assembly.entry_points import PLUGINS, PluginInfo, discover
from sftx.assembly.hookspecs import RETURNS
from sftx.cli import BUILT_IN, main
from sftx.cli.options import RunCommand
from sftx.cli.plugins import described_type
from sftx.config.options import SECTION_CLASSES, RunConfig, flag

ROOT: Final = Path(__file__).parents[2]
DOCS: Final = ROOT / "docs"
CHECKS: Final = DOCS / "plugin-checks.json"
REWRITE: Final = "run `python tests/helpers/site_pages.py`"

COMMANDS_INTRODUCTION: Final = """# Commands and their options

What `sftx COMMAND --help` prints, generated from it. [Commands, files and plugins](commands.md) says what each is for.
`sftx --debug COMMAND` shows the traceback of an error.
"""
RUN_FILE_INTRODUCTION: Final = """# Options of a run file

Every option of `sftx run RUN_FILE`, generated from the code that validates it. An option stands in its section
(`train:` and below it `learning_rate: 1.0e-4`), at the top under its dotted name (`train.learning_rate: 1.0e-4`), or on
the command line, which wins: by its flag, or as `--set train.learning_rate=1e-4`. In Python it is a keyword.
`sftx plugins schema --all` prints the JSON schema of it for editors.

## Beside the sections
"""
DIRECTORY_INTRODUCTION: Final = """# Directory of plugins

Every built-in plugin, from its own metadata. *Contract* is the result of `sftx plugins check NAME`: how many clauses it
keeps, those of its package and its hooks, and a run of two steps. The same check is there for
[a plugin of yours](plugins.md), and `sftx plugins list` shows what is installed beside these.
"""

HOOK_PAGES: Final = tuple(hook.removeprefix("sftx_") for hook in RETURNS)
OWN_TESTS: Final = {
    "lm-eval": "tests/plugins/test_lm_eval.py",
    "reward-model": "tests/plugins/test_reward_model.py",
}
"""Plugins that need a task, or a model, before they can be checked: their own tests check their contract."""


def cell(text: str) -> str:
    """Return text as one cell of a table; what looks like a tag is no tag."""
    return " ".join(text.split()).replace("|", "\\|").replace("<", "&lt;")


def code(text: str) -> str:
    return f"`{text.replace('|', chr(92) + '|')}`"


def table(head: Iterable[str], rows: Iterable[Iterable[str]]) -> list[str]:
    head = list(head)
    return [*("| " + " | ".join(row) + " |" for row in (head, ["---"] * len(head), *map(list, rows))), ""]


# --- commands


def commands_page() -> str:
    lines = [COMMANDS_INTRODUCTION]
    with click.Context(main, info_name="sftx") as context:
        for name in BUILT_IN:
            command = main.get_command(context, name)
            assert command is not None
            lines += _command(command, name, context, 2)
    return "\n".join(lines).rstrip() + "\n"


def _command(command: click.Command, name: str, parent: click.Context, level: int) -> Iterator[str]:
    context = click.Context(command, info_name=name, parent=parent)
    yield f"{'#' * level} {context.command_path}\n"
    yield f"`{' '.join([context.command_path, *command.collect_usage_pieces(context)])}`\n"
    for paragraph in (command.help or "").replace("\b", "").split("\n\n"):
        yield cell(paragraph).replace("\\|", "|") + "\n"
    own, of_run = [], 0
    for parameter in command.params:
        record = parameter.get_help_record(context)
        if record is None or not isinstance(parameter, click.Option):
            continue
        if isinstance(command, RunCommand) and _is_of_run_file(parameter):
            of_run += 1
        else:
            own.append([code(record[0]), cell(record[1])])
    if own:
        yield "\n".join(table(("option", "meaning"), own))
    if of_run:
        yield "It takes the [options of a run](run-file.md) too, each by its flag.\n"
    if isinstance(command, click.Group):
        for child in command.list_commands(context):
            found = command.get_command(context, child)
            assert found is not None
            yield from _command(found, child, context, level + 1)


def _is_of_run_file(parameter: click.Parameter) -> bool:
    """Return whether an option is on the page of the run file: a field of a section, or one beside the sections."""
    beside = {field.name for field in dataclasses.fields(RunConfig)} | {"plugins", "without", "settings"}
    return "__" in (parameter.name or "") or parameter.name in beside


# --- the run file


def run_file_page() -> str:
    lines = [RUN_FILE_INTRODUCTION]
    sections = {"": RunConfig, **SECTION_CLASSES}
    for section, cls in sections.items():
        if section:
            lines += [f"## {section}", ""]
        lines += _options(
            cls, f"{section}." if section else "", leave_out=tuple(SECTION_CLASSES) if not section else ()
        )
        for field in dataclasses.fields(cls):
            inner = type(field.default)
            if section and dataclasses.is_dataclass(inner):
                lines += [f"### {section}.{field.name}", "", *_options(inner, f"{section}.{field.name}.", flags=False)]
        if section == "data":
            from sftx.config.options import Source

            said = "Each of `data.train` and `data.eval` is a path, or a mapping of these:"
            lines += ["### A source", "", said, "", *_options(Source, "", flags=False)]
    lines += [
        "## plugins",
        "",
        "A mapping of plugins to their options, or a list of names, in the order of application.",
        "",
    ]
    for info in built_in():
        cls = load_class(info)
        if dataclasses.fields(cls):
            lines += [f"### {info.name}", "", _first_sentence(cls), "", *_options(cls, f"{info.name}.", flags=False)]
    return "\n".join(lines).rstrip() + "\n"


def _options(cls: Any, prefix: str, *, flags: bool = True, leave_out: tuple[str, ...] = ()) -> list[str]:
    from pydantic import TypeAdapter

    schema = TypeAdapter(cls).json_schema()
    schema = schema["$defs"][schema["$ref"].rpartition("/")[2]] if "$ref" in schema else schema
    properties: Mapping[str, Any] = schema["properties"]
    rows = []
    for field in dataclasses.fields(cls):
        if field.name in leave_out or dataclasses.is_dataclass(type(field.default)):
            continue
        dotted = prefix + field.name
        names = code(dotted)
        if flags and (prefix or field.name not in ("plugins", "without")):
            names += f"<br>{code(flag(dotted))}"
        rows.append([names, _kind(properties[field.name]), _default(field), cell(_description(properties[field.name]))])
    return table(("option", "value", "default", "meaning"), rows)


def _kind(schema: Mapping[str, Any]) -> str:
    kind = described_type(dict(schema)) if "$ref" not in json.dumps(schema) else "see below"
    kind = re.sub(r" \| null$", "", kind).replace('"', "")
    return cell(re.sub(r">= (\S+) <= (\S+)", r"\1 to \2", kind))


def _description(schema: Mapping[str, Any]) -> str:
    return str(schema.get("description", ""))


def _default(field: dataclasses.Field[Any]) -> str:
    if field.default_factory is not dataclasses.MISSING:
        value: Any = field.default_factory()
    elif field.default is dataclasses.MISSING:
        return "required"
    else:
        value = field.default
    if value is None or value in ((), {}, ""):
        return ""
    return code(json.dumps(value, default=str).strip('"'))


# --- plugins


@cache
def built_in() -> tuple[PluginInfo, ...]:
    """Return the plugins of this package in the order of the stages of a run, then as pyproject.toml has them."""
    names = list(_project()["entry-points"][PLUGINS])
    found = [info for info in discover() if info.package == "sftx" and info.name in names]
    return tuple(sorted(found, key=lambda info: (HOOK_PAGES.index(_hooks(info)[0]), names.index(info.name))))


def _hooks(info: PluginInfo) -> list[str]:
    """Return the hooks of a plugin. One with a parser or a collator beside a loss is listed by what it is for."""
    hooks = [hook.removeprefix("sftx_") for hook in hooks_of(info, load_class(info))]
    return sorted(hooks, key=lambda hook: hook in ("parser", "collator"))


def _first_sentence(cls: type) -> str:
    text = " ".join((cls.__doc__ or "").split())
    return cell(re.split(r"(?<=[.!?])(?<! al\.) ", text)[0])


def directory_page() -> str:
    checks = json.loads(CHECKS.read_text(encoding="utf-8"))
    lines = [DIRECTORY_INTRODUCTION]
    groups: dict[str, list[PluginInfo]] = {}
    for info in built_in():
        groups.setdefault(_hooks(info)[0], []).append(info)
    for hook, infos in groups.items():
        rows = []
        for info in infos:
            cls = load_class(info)
            options = len(dataclasses.fields(cls))
            others = ", ".join(f"[{other}](hooks/{other}.md)" for other in _hooks(info)[1:])
            anchor = "".join(sign for sign in info.name.lower() if sign.isalnum() or sign in "-_")
            rows.append([
                code(info.name),
                _first_sentence(cls) + (f" Also: {others}." if others else ""),
                f"[{options}](run-file.md#{anchor})" if options else "",
                f"`sftx[{_extras()[info.name]}]`" if info.name in _extras() else "",
                _verdict(checks["plugins"].get(info.name)),
            ])  # fmt: skip
        title = hook.capitalize()
        lines += [f"## {title}", "", f"[What a plugin of this hook is](hooks/{hook}.md).", ""]
        lines += table(("plugin", "what it does", "options", "needs", "contract"), rows)
    lines += [
        "## Examples",
        "",
        "Packages as a third party would write them, each with its tests, in `examples/`:",
        "",
    ]
    projects = sorted((ROOT / "examples").glob("*/pyproject.toml"))
    found = [tomllib.loads(path.read_text(encoding="utf-8"))["project"] for path in projects]
    rows = [
        [code(one["name"]), cell(one["description"]), ", ".join(map(code, one["entry-points"][PLUGINS]))]
        for one in found
    ]
    lines += table(("package", "what it does", "plugins"), rows)
    return "\n".join(lines).rstrip() + "\n"


def _verdict(check: Mapping[str, Any] | None) -> str:
    if check is None:
        return "not checked"
    if "tests" in check:
        return "by tests of its own"
    broken = f", {len(check['broken'])} broken" if check["broken"] else ""
    gpu = " (needs a GPU)" if check["needs_gpu"] else ""
    return f"{check['kept']} kept{broken}{gpu}"


def extras() -> set[str]:
    """Return the extras that pyproject.toml declares."""
    return set(_project()["optional-dependencies"])


@cache
def _project() -> dict[str, Any]:
    project: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    return project


@cache
def _extras() -> dict[str, str]:
    """Return the extra that each plugin needs, if any: one of whose packages its module imports."""
    packages = {
        re.split(r"[\[>=;]", requirement)[0].replace("-", "_").removesuffix("_skinny"): extra
        for extra, requirements in reversed(_project()["optional-dependencies"].items())
        if extra not in ("dev", "docs")
        for requirement in requirements
    }
    return {
        info.name: packages[package]
        for info in built_in()
        for package in packages
        if package in _imports(ROOT / "plugins" / Path(*info.value.partition(":")[0].split(".")))
    }


@cache
def _imports(module: Path) -> set[str]:
    """Return the packages that a module imports, and those that it hands by name to a function that imports them."""
    names = set()
    for node in ast.walk(ast.parse(module.with_suffix(".py").read_text(encoding="utf-8"))):
        match node:
            case ast.Import(names=imported):
                names |= {alias.name.partition(".")[0] for alias in imported}
            case ast.ImportFrom(module=str(name)):
                names |= {name.partition(".")[0], name.rpartition(".")[2]}  # an exporter may build on that of gguf
            case ast.Call(args=arguments):
                texts = [one.value for one in arguments if isinstance(one, ast.Constant) and isinstance(one.value, str)]
                names |= {text.partition(".")[0] for text in texts}
    return names


def number_of_clauses(info: PluginInfo) -> int:
    """Return how many clauses `sftx plugins check` has for a plugin: those of its package and hooks, and its run."""
    from sftx.testing.contract import SUITES

    suites = [SUITES[name] for name in ("package", *_hooks(info))]
    return sum(1 + len(suite.clauses) for suite in suites) + 1


def check_all() -> dict[str, Any]:
    """Return the record of docs/plugin-checks.json."""
    from contracts import REQUIRED
    from sftx.config.run_file import Origins
    from sftx.testing.contract import check_plugin

    record: dict[str, Any] = {}
    for info in built_in():
        if info.name in OWN_TESTS:
            record[info.name] = {"tests": OWN_TESTS[info.name]}
            continue
        findings = check_plugin(info, REQUIRED.get(info.name, {}), Origins())
        by_status = {
            status: [f"{f.hook} / {f.clause}" for f in findings if f.status in statuses]
            for status, statuses in {"kept": ("ok",), "broken": ("failed", "skipped"), "exempt": ("exempt",)}.items()
        }
        needs_gpu = any(f.status == "exempt" and "needs a GPU" in f.message for f in findings)
        record[info.name] = {
            "kept": len(by_status["kept"]),
            "broken": by_status["broken"],
            "exempt": by_status["exempt"],
            "needs_gpu": needs_gpu,
        }
        print(info.name, record[info.name], file=sys.stderr, flush=True)
    return {"sftx": sftx.__version__, "plugins": record}


PAGES: Final = {
    "command-options.md": commands_page,
    "run-file.md": run_file_page,
    "plugin-directory.md": directory_page,
}

if __name__ == "__main__":
    if sys.argv[1:] == ["--check-plugins"]:
        CHECKS.write_text(json.dumps(check_all(), indent=1) + "\n", encoding="utf-8")
    for name, page in PAGES.items():
        (DOCS / name).write_text(page(), encoding="utf-8")
