"""`sftx plugins`: what is installed, from metadata alone; and what one plugin offers, which imports it."""

from __future__ import annotations

import json
from typing import Any

import click

from sftx.plugins import discover


@click.group()
def command() -> None:
    """List plugins and describe them."""


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

    from sftx.plugins import find, hooks_of, load_class

    found = find(name, discover())
    cls = load_class(found)
    click.echo(f"{found.name} ({found.package} {found.version}), {found.value}")
    if cls.__doc__:
        click.echo(f"  {' '.join(cls.__doc__.split())}")
    click.echo(f"  fills {', '.join(hooks_of(found, cls))}")
    options: dict[str, Any] = TypeAdapter(cls).json_schema().get("properties", {})
    if not options:
        click.echo("  takes no options")
        return
    click.echo("")
    rows = [["OPTION", "TYPE", "DEFAULT", "MEANING"]]
    for option, schema in options.items():
        default = json.dumps(schema["default"]) if "default" in schema else "required"
        rows.append([f"{name}.{option}", _type(schema), default, schema.get("description", "")])
    _print_columns(rows)


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
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    for row in rows:
        click.echo("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())
