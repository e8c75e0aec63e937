"""`sftx run`: every option of a run file, under its own name, on the command line."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Final, get_args, get_origin, get_type_hints

import click

from sftx import config, run_file
from sftx.cli.settings import parse as parse_settings

# The option that names each of these differs from the field's own name.
_RENAMED: Final = {"data.train": "data", "data.eval": "eval-data"}


def _section_options(function: Callable[..., Any]) -> Callable[..., Any]:
    """One click option for each field of the sections data, train and generation, in the order of the file."""
    for section, cls in reversed(
        (("data", config.DataConfig), ("train", config.TrainConfig), ("generation", config.GenerationConfig))
    ):
        hints = get_type_hints(cls, include_extras=True)
        for spec in reversed(dataclasses.fields(cls)):
            dotted = f"{section}.{spec.name}"
            flag = f"--{_RENAMED.get(dotted, spec.name).replace('_', '-')}"
            description = next(m.description for m in get_args(hints[spec.name]) if hasattr(m, "description"))
            function = _option(dotted.replace(".", "__"), flag, hints[spec.name], spec.default, description)(function)
    return function


def _option(name: str, flag: str, hint: Any, default: Any, description: str) -> Callable[..., Any]:
    plain = get_args(hint)[0] if get_origin(hint) is Annotated else hint
    kinds = [kind for kind in (get_args(plain) or (plain,)) if kind is not type(None)]
    shown = "" if default in (None, ()) else f"  [default: {default}]"
    if kinds == [bool]:
        return click.option(f"{flag}/--no-{flag[2:]}", name, default=None, help=description + shown)
    many = default == ()
    metavar = "FILE" if many else "|".join(map(str, kinds)) if all(isinstance(k, str) for k in kinds) else None
    if metavar is None:
        metavar = kinds[0].__name__.upper() if len(kinds) == 1 else "VALUE"
    return click.option(flag, name, metavar=metavar, multiple=many, default=None, help=description + shown)


@click.command()
@click.argument("file", metavar="[RUN_FILE]", required=False, type=click.Path(dir_okay=False, path_type=Path))
@click.option(
    "--plugin",
    "plugins",
    metavar="NAME",
    multiple=True,
    help="Add a plugin; the order is that of application.",
)
@click.option("--no-plugin", "without", metavar="NAME", multiple=True, help="Take a plugin out, a default one too.")
@click.option("--set", "settings", metavar="NAME=VALUE", multiple=True, help="Set any option: lora.r=32.")
@click.option("--model", metavar="DIR|HUB_ID", help="Model directory or hub id.")
@click.option(
    "--trust-remote-code/--no-trust-remote-code",
    default=None,
    help="Run Python code that the model's directory or repository brings along.  [default: False]",
)
@click.option("--output-dir", metavar="DIR", help="Directory of this run.  [default: runs/<name>-<n>]")
@_section_options
def command(
    file: Path | None,
    plugins: tuple[str, ...],
    without: tuple[str, ...],
    settings: tuple[str, ...],
    **options: Any,
) -> None:
    """Fine-tune a model as RUN_FILE (YAML) and the options say; the options win.

    With neither a run file nor data, it trains the embedded model on the embedded data.
    """
    if file is not None and file.suffix in (".jsonl", ".csv", ".parquet"):
        raise click.UsageError(f"{file} is no run file; give each file of data an option of its own: --data {file}")
    loaded = config.load(file, add=plugins, remove=without, assignments=_assignments(settings, options))
    from sftx.run import run

    run(loaded, name=_name(file, loaded.config))


def _assignments(settings: tuple[str, ...], options: dict[str, Any]) -> list[tuple[str, Any, str]]:
    """(dotted name, value, what the user typed) of every option that was given."""
    given: list[tuple[str, Any, str]] = []
    for option, value in options.items():
        if value is None or value == ():
            continue
        dotted = option.replace("__", ".")
        flag = f"--{_RENAMED.get(dotted, dotted.rpartition('.')[2]).replace('_', '-')}"
        if isinstance(value, tuple):
            given.append((dotted, list(value), f"{flag} {' '.join(value)}"))
        elif isinstance(value, bool):
            given.append((dotted, value, flag if value else f"--no-{flag[2:]}"))
        else:
            parsed = value if dotted in ("model", "output_dir") else run_file.parse_value(value)
            given.append((dotted, parsed, f"{flag} {value}"))
    given += parse_settings(settings)
    return given


def _name(file: Path | None, loaded: config.RunConfig) -> str:
    """What the default output directory is called after: the run file, or the first file of data."""
    source = str(file) if file is not None else next(iter(loaded.data.train), "run")
    if source.startswith("sftx:"):
        return "demo"
    return Path(source).name.split(".")[0] or "run"
