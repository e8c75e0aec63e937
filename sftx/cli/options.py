"""Every option of a run file on the command line, under its own name: shared by the commands that look at a run."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import Annotated, Any, Final, get_args, get_origin, get_type_hints

import click

from sftx.cli.settings import parse as parse_settings
from sftx.config import loading, options, run_file

# The option that names each of these differs from the field's own name.
_RENAMED: Final = {
    "data.train": "data",
    "data.eval": "eval-data",
    "train.torch_compile": "compile",
    "generation.batch_size": "generation-batch-size",
}
_SECTIONS: Final = {"data": options.DataConfig, "train": options.TrainConfig, "generation": options.GenerationConfig}


def run_options(*sections: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Gives a command RUN_FILE and the options of a run, of these sections; it is called with `file` and `loaded`.

    What else the command takes stands in its own decorators.
    """

    def decorate(function: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(function)
        def command(
            file: Path | None,
            plugins: tuple[str, ...],
            without: tuple[str, ...],
            settings: tuple[str, ...],
            **rest: Any,
        ) -> Any:
            if file is not None and file.suffix not in (".yaml", ".yml") and file.exists():
                raise click.UsageError(
                    f"{file} is no run file; give each file of data an option of its own: --data {file}"
                )
            options = {name: rest.pop(name) for name in list(rest) if name in ours}
            assignments = _assignments(settings, options)
            loaded = loading.load(file, add=plugins, remove=without, assignments=assignments)
            return function(file=file, loaded=loaded, **rest)

        ours = {"model", "trust_remote_code", "add_tokens", "output_dir"}
        for section in reversed(sections):
            for name, option in reversed(_options_of(section).items()):
                command = option(command)
                ours.add(name)
        for option in reversed(_COMMON if "train" in sections else _COMMON[:-1]):
            command = option(command)
        return command

    return decorate


_COMMON: Final = (
    click.argument("file", metavar="[RUN_FILE]", required=False, type=click.Path(dir_okay=False, path_type=Path)),
    click.option(
        "--plugin",
        "plugins",
        metavar="NAME",
        multiple=True,
        help="Add a plugin; the order is that of application.",
    ),
    click.option("--no-plugin", "without", metavar="NAME", multiple=True, help="Take a plugin out, a default one too."),
    click.option("--set", "settings", metavar="NAME=VALUE", multiple=True, help="Set any option: lora.r=32."),
    click.option("--model", metavar="DIR|HUB_ID", help="Model directory or hub id."),
    click.option(
        "--trust-remote-code/--no-trust-remote-code",
        default=None,
        help="Run Python code that the model's directory or repository brings along.  [default: False]",
    ),
    click.option(
        "--add-tokens/--no-add-tokens",
        default=None,
        help="Add control tokens that the template needs and the tokenizer lacks, and train them.  [default: False]",
    ),
    click.option("--output-dir", metavar="DIR", help="Directory of this run.  [default: runs/<name>-<n>]"),
)


def _options_of(section: str) -> dict[str, Callable[..., Any]]:
    """One click option for each field of a section, in the order of the file, by the name of its parameter."""
    found = {}
    hints = get_type_hints(_SECTIONS[section], include_extras=True)
    for spec in dataclasses.fields(_SECTIONS[section]):
        if dataclasses.is_dataclass(spec.default):
            continue  # by its own fields: --set data.filters.min_turns=2
        dotted = f"{section}.{spec.name}"
        flag = f"--{_RENAMED.get(dotted, spec.name).replace('_', '-')}"
        description = next(m.description for m in get_args(hints[spec.name]) if hasattr(m, "description"))
        name = dotted.replace(".", "__")
        found[name] = _option(name, flag, hints[spec.name], spec.default, description)
    return found


def _option(name: str, flag: str, hint: Any, default: Any, description: str) -> Callable[..., Any]:
    plain = get_args(hint)[0] if get_origin(hint) is Annotated else hint
    kinds = [kind for kind in (get_args(plain) or (plain,)) if kind is not type(None)]
    many = isinstance(default, tuple)
    values = ", ".join(map(str, default)) if many else default
    shown = "" if values in (None, "") else f"  [default: {values}]"
    if kinds == [bool]:
        return click.option(f"{flag}/--no-{flag[2:]}", name, default=None, help=description + shown)
    metavar = "|".join(map(str, kinds)) if all(isinstance(k, str) for k in kinds) else None
    if many:
        metavar = "ROLE" if default else "PATH"
    elif metavar is None:
        metavar = kinds[0].__name__.upper() if len(kinds) == 1 else "VALUE"
    return click.option(flag, name, metavar=metavar, multiple=many, default=None, help=description + shown)


def _assignments(settings: tuple[str, ...], options: dict[str, Any]) -> list[tuple[str, Any, str]]:
    """(dotted name, JSON value, what the user typed) of every option that was given."""
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
            text = dotted in ("model", "output_dir", "data.system")
            given.append((dotted, value if text else run_file.parse_value(value), f"{flag} {value}"))
    given += parse_settings(settings)
    return given
