"""`sftx plugins`: what is installed, from metadata alone; what one plugin offers and keeps, which imports it."""

from __future__ import annotations

import contextlib
import json
import shutil
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from sftx.assembly.discovery import PluginInfo, discover, find, hooks_of, instance, load_class
from sftx.assembly.stages import named
from sftx.cli import new
from sftx.errors import PluginError, printable

if TYPE_CHECKING:
    from sftx.testing import Finding


@click.group()
def command() -> None:
    """List, describe, check and begin plugins."""


@command.command("list")
@click.option("--json", "as_json", is_flag=True, help="Print a JSON list.")
def list_plugins(as_json: bool) -> None:
    """Every installed plugin; nothing of theirs is imported."""
    plugins = [
        {"name": info.name, "distribution": info.package, "version": info.version, "class": info.value}
        for info in discover()
    ]
    if as_json:
        click.echo(json.dumps(plugins, indent=2))
        return
    _print_columns([["PLUGIN", "DISTRIBUTION", "CLASS"]] + [
        [p["name"], f"{p['distribution']} {p['version']}", p["class"]] for p in plugins
    ])  # fmt: skip


@command.command()
@click.argument("name")
def info(name: str) -> None:
    """Hooks and options of the plugin NAME, which is imported for it."""
    from pydantic import TypeAdapter

    found = find(name, discover())
    cls = load_class(found)
    metadata = found.distribution.metadata
    rows = [
        ["plugin", found.name],
        ["distribution", f"{found.package} {found.version}"],
        ["license", *(metadata.get_all("License-Expression") or metadata.get_all("License") or ["not said"])[:1]],
        ["docs", _docs(metadata.get_all("Project-URL") or ()) or "no link given"],
        ["class", found.value],
        ["fills", ", ".join(hooks_of(found, cls))],
    ]
    _print_columns(rows)
    if cls.__doc__:
        click.echo(printable(f"\n{' '.join(cls.__doc__.split())}"))
    with named(str(found), "describing its options"):
        options: dict[str, Any] = TypeAdapter(cls).json_schema().get("properties", {})
    if not options:
        click.echo("\nIt takes no options.")
        return
    click.echo("")
    rows = [["OPTION", "TYPE", "DEFAULT", "MEANING"]]
    for option, schema in options.items():
        default = json.dumps(schema["default"]) if "default" in schema else "required"
        rows.append([f"{name}.{option}", _type(schema), default, schema.get("description", "")])
    _print_columns(rows)


def _docs(urls: Sequence[str]) -> str:
    """The link of a distribution's `Project-URL: label, url` lines that leads to its documentation."""
    links = {label.strip().lower(): url.strip() for label, _, url in (line.partition(",") for line in urls)}
    return next((links[label] for label in ("documentation", "docs", "homepage", "repository") if label in links), "")


@command.command()
@click.argument("name")
@click.option("--set", "settings", metavar="NAME=VALUE", multiple=True, help="An option of the plugin: lora.r=32.")
@click.option(
    "--model",
    metavar="DIR",
    type=click.Path(exists=True, file_okay=False, path_type=Path),
    help="Check against this model and its tokenizer.  [default: a tiny one, made on the spot]",
)
@click.option("--json", "as_json", is_flag=True, help="Print the findings as a JSON list.")
def check(name: str, settings: tuple[str, ...], model: Path | None, as_json: bool) -> None:
    """Hold the installed plugin NAME against the contract of its package and of each hook that it fills.

    Exits with 1 when a clause is broken. docs/plugins.md has the contract.
    """
    from sftx.cli.settings import parse as parse_settings
    from sftx.config.run_file import Origins

    try:
        found = find(name, discover())
    except PluginError as error:
        package = f"sftx-{name}"
        if not Path(package).is_dir():
            raise
        raise PluginError(f"{error}; for the package here: python -m pip install --editable {package}") from None
    options: dict[str, Any] = {}
    origins = Origins()
    for dotted, value, typed in parse_settings(settings):
        plugin, _, option = dotted.removeprefix("plugins.").partition(".")
        if plugin != name:
            raise PluginError(f"{typed}: is no option of plugin {name!r}")
        options[option] = value
        origins.set(f"plugins.{name}.{option}", typed)
    with contextlib.redirect_stdout(sys.stderr):  # what the plugin prints is no finding
        if options:  # wrong ones are told before torch is imported; what else is wrong is a finding
            with contextlib.suppress(PluginError):
                instance(found, load_class(found), options, origins)
        from sftx.testing.contract import check_plugin

        findings = check_plugin(found, options, origins, model=model)
    if as_json:
        import dataclasses

        click.echo(json.dumps([dataclasses.asdict(finding) for finding in findings], indent=2))
    else:
        _print_findings(found, findings)
    if any(finding.status == "failed" for finding in findings):
        sys.exit(1)


def _print_findings(found: PluginInfo, findings: Sequence[Finding]) -> None:
    click.echo(printable(f"{found}\n"))
    rows = [["HOOK", "CLAUSE", "RESULT"]] + [
        [f.hook, f.clause, f.status.upper() if f.status == "failed" else f.status] for f in findings
    ]
    _print_columns(rows)
    # A pipe gets whole lines.
    width = shutil.get_terminal_size().columns if sys.stdout.isatty() else 10_000
    for finding in findings:
        if finding.status == "failed":
            rule, message = f"{finding.hook} / {finding.clause}: {finding.rule}", finding.message
            click.echo("\n" + click.wrap_text(printable(rule), width))
            click.echo(click.wrap_text(printable(message), width, initial_indent="    ", subsequent_indent="    "))
    count = Counter(finding.status for finding in findings)
    click.echo(f"\n{count['ok']} clauses kept, {count['failed']} broken, {count['skipped']} skipped")


@command.command()
@click.argument("names", nargs=-1, metavar="NAME...")
@click.option("--all", "every", is_flag=True, help="With every installed plugin, all of which are imported for it.")
def schema(names: tuple[str, ...], every: bool) -> None:
    """Print the JSON schema of a run file with the plugins NAME... and the default ones, for editors."""
    from sftx.assembly.hookspecs import DEFAULTS
    from sftx.config.json_schema import run_file_schema

    installed = discover()
    defaults = [name for provided in DEFAULTS.values() for name in provided]
    classes: dict[str, type] = {}
    if every:
        click.echo(f"sftx: importing all {len(installed)} installed plugins", err=True)
        names = tuple(info.name for info in installed)
    elif not names:
        raise click.UsageError("name the plugins of the run file, or give --all")
    for name in dict.fromkeys([*names, *defaults]):
        try:
            found = find(name, installed)
            hooks_of(found, cls := load_class(found))
            with named(str(found), "describing its options"):
                run_file_schema({name: cls})
            classes[name] = cls
        except PluginError as error:
            if not every:
                raise
            click.echo(printable(f"sftx: left out: {error}"), err=True)
    click.echo(json.dumps(run_file_schema(classes), indent=2))


command.add_command(new.command, "new")


def _type(schema: dict[str, Any]) -> str:
    """The type of a JSON schema in a few letters, with its bounds: `integer >= 1`, `string | null`."""
    if "anyOf" in schema:
        return " | ".join(_type(one) for one in schema["anyOf"])
    if "enum" in schema:
        return " | ".join(json.dumps(value) for value in schema["enum"])
    name = str(schema.get("type", "any"))
    if name == "array":
        name = f"list of {_type(schema['items'])}" if isinstance(schema.get("items"), dict) else "list"
    signs = {"minimum": ">=", "exclusiveMinimum": ">", "maximum": "<=", "exclusiveMaximum": "<"}
    bounds = [f"{sign} {schema[key]:g}" for key, sign in signs.items() if key in schema]
    return " ".join([name, *bounds])


def _print_columns(rows: list[list[str]]) -> None:
    rows = [[printable(" ".join(cell.split())) for cell in row] for row in rows]
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    for row in rows:
        click.echo("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())
