"""`sftx plugins` lists installed plugins from their metadata; its other commands import the named plugin."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import shutil
import sys
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import click

from sftx.assembly.discovery import hooks_of, instance, load_class, load_command, required_options
from sftx.assembly.entry_points import COMMANDS, PLUGINS, PluginInfo, discover, find
from sftx.assembly.hookspecs import PROJECT, RETURNS
from sftx.assembly.stages.stage import named
from sftx.cli import new
from sftx.errors import ConfigError, PluginError, printable
from sftx.phases import phase

if TYPE_CHECKING:
    from sftx.testing import Finding

NUM_MADE_UP_RUNS: Final = 14
"""The number of runs whose events `sftx plugins check` sends to an observer."""


@click.group()
def command() -> None:
    """List, describe, check and create plugins."""


@command.command("list")
@click.option("--json", "as_json", is_flag=True, help="Print a JSON list.")
def list_plugins(as_json: bool) -> None:
    """List every installed plugin, and the commands of installed packages, without importing any.

    Built-in plugins are listed by their hook, and those of other packages after them.
    """
    found = discover(PLUGINS, COMMANDS)
    if as_json:
        values = [
            {"name": info.name, "distribution": info.package, "version": info.version}
            | {"class" if info.group == PLUGINS else "command": info.value}
            for info in found
        ]
        click.echo(json.dumps(values, indent=2))
        return
    rows = {
        group: [[info.name, f"{info.package} {info.version}", info.value] for info in found if info.group == group]
        for group in (PLUGINS, COMMANDS)
    }
    groups: dict[str, list[list[str]]] = {hook.removeprefix("sftx_"): [] for hook in RETURNS}
    for row in rows[PLUGINS]:
        groups.setdefault(_kind(row[2], groups), []).append(row)
    groups[""] = groups.pop("", [])  # last
    table = [["PLUGIN", "DISTRIBUTION", "CLASS"]]
    for kind, group in groups.items():
        if group:
            table += [["", "", ""], [f"# {kind or 'of other packages'}", "", ""], *group]
    _print_columns(table)
    if rows[COMMANDS]:
        click.echo("")
        _print_columns([["COMMAND", "DISTRIBUTION", "OBJECT"], *rows[COMMANDS]])


def _kind(value: str, kinds: Iterable[str]) -> str:
    """Return the kind of a built-in plugin, by the package that its class is in; the empty string for any other.

    It is one of `kinds`, the hooks, or the name of a package whose plugins implement several hooks.
    """
    first, _, rest = value.partition(".")
    package = rest.partition(".")[0]
    if first != "sftx_plugins":
        return ""
    return next((kind for kind in kinds if package in (kind, f"{kind}s", f"{kind}es")), package)


@command.command()
@click.argument("name")
def info(name: str) -> None:
    """Show hooks and options of the plugin NAME, which is imported; or where the command NAME comes from."""
    from pydantic import TypeAdapter

    plugin = _find(name, PLUGINS, COMMANDS)
    metadata = plugin.distribution.metadata
    urls = (line.partition(",") for line in metadata.get_all("Project-URL") or ())
    links = {label.strip().lower(): url.strip() for label, _, url in urls}
    docs = [links[label] for label in ("documentation", "docs", "homepage", "repository") if links.get(label)]
    about = [
        ["distribution", f"{plugin.package} {plugin.version}"],
        ["license", *(metadata.get_all("License-Expression") or metadata.get_all("License") or ["unknown"])[:1]],
        ["docs", *(docs or ["no link"])[:1]],
    ]
    if plugin.group == COMMANDS:
        text = load_command(plugin).get_short_help_str(limit=200)
        _print_columns([["command", f"sftx {name}"], *about, ["object", plugin.value]])
        click.echo(printable(f"\n{text}\n\nIts options: sftx {name} --help"))
        return
    cls = load_class(plugin)
    _print_columns([["plugin", name], *about, ["class", plugin.value], ["hooks", ", ".join(hooks_of(plugin, cls))]])
    if cls.__doc__:
        click.echo(printable(f"\n{' '.join(cls.__doc__.split())}"))
    with named(str(plugin), "describing its options"):
        options: dict[str, Any] = TypeAdapter(cls).json_schema().get("properties", {})
        made = {
            field.name: field.default_factory()
            for field in (dataclasses.fields(cls) if dataclasses.is_dataclass(cls) else ())
            if field.default_factory is not dataclasses.MISSING
        }
    if not options:
        click.echo("\nIt takes no options.")
        return
    click.echo("")
    rows = [["OPTION", "TYPE", "DEFAULT", "MEANING"]]
    for option, schema in options.items():
        given = {"default": made[option]} if option in made else schema
        default = json.dumps(given["default"], default=str) if "default" in given else "required"
        rows.append([f"{name}.{option}", described_type(schema), default, schema.get("description", "")])
    _print_columns(rows)


@command.command()
@click.argument("name")
@click.option("--set", "settings", metavar="NAME=VALUE", multiple=True, help="An option of the plugin: lora.r=32.")
@click.option(
    "--model",
    metavar="DIR",
    type=click.Path(exists=True, file_okay=False, path_type=Path),
    help="Check with this model and its tokenizer.  [default: a tiny model]",
)
@click.option(
    "--skip",
    metavar="HOOK",
    multiple=True,
    help="Leave a hook out, such as observer, and the run of two steps. May be given several times.",
)
@click.option("--json", "as_json", is_flag=True, help="Print the findings as a JSON list.")
def check(name: str, settings: tuple[str, ...], model: Path | None, skip: tuple[str, ...], as_json: bool) -> None:
    """Check the installed plugin NAME against the contract of its package and of its hooks.

    All of its code is run. An observer gets the events of made-up runs: one that posts to a service posts them, unless
    it is left out with --skip observer.

    The exit code is 1 when a clause is broken. The contract is in docs/plugins.md and docs/hooks.
    """
    from sftx.cli.options import parse_settings
    from sftx.config.run_file import Origins

    plugin = _find(name, PLUGINS)
    options: dict[str, Any] = {}
    origins = Origins()
    for dotted, value, typed in parse_settings(settings):
        owner, _, option = dotted.removeprefix("plugins.").partition(".")
        if owner != name:
            raise PluginError(f"{typed}: is not an option of plugin {name!r}")
        options[option] = value
        origins.set(f"plugins.{name}.{option}", typed)
    with contextlib.redirect_stdout(sys.stderr):  # stdout is for the findings, not for what the plugin prints
        # Options that are missing or invalid are reported before torch is imported; other errors become findings.
        with contextlib.suppress(PluginError):
            cls = load_class(plugin)
            if missing := [option for option in required_options(cls) if option not in options]:
                add = " ".join(f"--set {name}.{option}=..." for option in missing)
                raise ConfigError(f"{plugin}: {', '.join(missing)} has no default; to check its hooks, add {add}")
            hooks = [hook.removeprefix(f"{PROJECT}_") for hook in hooks_of(plugin, cls)]
            if unknown := [hook for hook in skip if hook not in hooks]:
                raise click.UsageError(f"--skip {unknown[0]}: {plugin} implements {', '.join(hooks)}")
            if options:
                instance(plugin, cls, options, origins)
            if "observer" in hooks and "observer" not in skip:
                click.echo(
                    f"sftx: {printable(str(plugin))} gets the events of {NUM_MADE_UP_RUNS} made-up runs, and posts "
                    "them if it posts to a service; leave this out with --skip observer",
                    err=True,
                )
        with phase("importing", "torch and transformers"):
            from sftx.testing.contract import check_plugin

        findings = check_plugin(plugin, options, origins, model=model, skip=skip)
    if as_json:
        import dataclasses

        click.echo(json.dumps([dataclasses.asdict(finding) for finding in findings], indent=2))
    else:
        _print_findings(plugin, findings)
    if any(finding.status == "failed" for finding in findings):
        sys.exit(1)


def _find(name: str, *groups: str) -> PluginInfo:
    """Return the plugin, or command, NAME. Raises PluginError, which knows of a package in the current directory."""
    installed = discover(PLUGINS, COMMANDS)
    kind = next((info.group for info in installed if info.name == name and info.group in groups), PLUGINS)
    others = [str(info) for info in installed if info.name == name and info.group not in groups]
    try:
        return find(name, [info for info in installed if info.group == kind])
    except PluginError as error:
        package = f"sftx-{name}"
        if others:
            raise PluginError(f"{others[0]} has no contract to be checked against; see sftx {name} --help") from None
        if not Path(package).is_dir():
            raise
        raise PluginError(
            f"{error}; to install the package in this directory: python -m pip install --editable {package}"
        ) from None


def _print_findings(plugin: PluginInfo, findings: Sequence[Finding]) -> None:
    click.echo(printable(f"{plugin}\n"))
    rows = [["HOOK", "CLAUSE", "RESULT"]] + [
        [f.hook, f.clause, f.status.upper() if f.status == "failed" else f.status] for f in findings
    ]
    _print_columns(rows)
    # Lines are wrapped for a terminal only.
    width = shutil.get_terminal_size().columns if sys.stdout.isatty() else 10_000
    for finding in findings:
        if finding.status == "failed":
            rule, message = f"{finding.hook} / {finding.clause}: {finding.rule}", finding.message
            click.echo("\n" + click.wrap_text(printable(rule), width))
            click.echo(click.wrap_text(printable(message), width, initial_indent="    ", subsequent_indent="    "))
    count = Counter(finding.status for finding in findings)
    exempt = f", {count['exempt']} that do not apply to it" if count["exempt"] else ""
    click.echo(f"\n{count['ok']} clauses kept, {count['failed']} broken, {count['skipped']} skipped{exempt}")


@command.command()
@click.argument("names", nargs=-1, metavar="NAME...")
@click.option("--all", "every", is_flag=True, help="Include every installed plugin; all of them are imported.")
def schema(names: tuple[str, ...], every: bool) -> None:
    """Print a JSON schema for editors: run files with the plugins NAME... and the default ones."""
    from sftx.config.default_plugins import DEFAULT_PLUGINS, SOURCES
    from sftx.config.json_schema import run_file_schema

    installed = discover()
    defaults = [*(name for provided in DEFAULT_PLUGINS.values() for name in provided), *SOURCES]
    classes: dict[str, type] = {}
    if every:
        click.echo(f"sftx: importing all {len(installed)} installed plugins", err=True)
        names = tuple(info.name for info in installed)
    elif not names:
        raise click.UsageError("name the plugins of the run file, or give --all")
    for name in dict.fromkeys([*names, *defaults]):
        try:
            plugin = find(name, installed)
            hooks_of(plugin, cls := load_class(plugin))
            with named(str(plugin), "describing its options"):
                run_file_schema({name: cls})
            classes[name] = cls
        except PluginError as error:
            if not every:
                raise
            click.echo(printable(f"sftx: left out: {error}"), err=True)
    click.echo(json.dumps(run_file_schema(classes), indent=2))


command.add_command(new.command, "new")


def described_type(schema: dict[str, Any]) -> str:
    """Return the type of a JSON schema in short form, with its bounds: `integer >= 1`, `string | null`."""
    if "anyOf" in schema:
        return " | ".join(described_type(option) for option in schema["anyOf"])
    if "enum" in schema:
        return " | ".join(json.dumps(value) for value in schema["enum"])
    name = str(schema.get("type", "any"))
    if name == "array":
        name = f"list of {described_type(schema['items'])}" if isinstance(schema.get("items"), dict) else "list"
    signs = {"minimum": ">=", "exclusiveMinimum": ">", "maximum": "<=", "exclusiveMaximum": "<"}
    bounds = [f"{sign} {_number(schema[key])}" for key, sign in signs.items() if key in schema]
    return " ".join([name, *bounds])


def _number(value: float) -> str:
    return str(int(value)) if value == int(value) else f"{value:g}"


def _print_columns(rows: list[list[str]]) -> None:
    rows = [[printable(" ".join(cell.split())) for cell in row] for row in rows]
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = ("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows)
    click.echo("\n".join(lines))
