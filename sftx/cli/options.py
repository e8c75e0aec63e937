"""The options of a run on the command line, for every command that reads a run file."""

from __future__ import annotations

import dataclasses
import re
import shlex
from collections.abc import Callable, Sequence
from functools import wraps
from pathlib import Path
from typing import Annotated, Any, Final, get_args, get_origin, get_type_hints

import click

from sftx.assembly.discovery import options_class
from sftx.assembly.peft_config import go_on_from_adapter
from sftx.config import loading, run_file
from sftx.config.options import EMBEDDED_MODEL, SECTION_CLASSES, SECTIONS, RunConfig
from sftx.config.options import flag as flag_of
from sftx.errors import ConfigError
from sftx.phases import phase

_COMMON: Final = (
    click.argument("file", metavar="[RUN_FILE]", required=False, type=click.Path(path_type=Path)),
    click.option(
        "--plugin", "plugins", metavar="NAME", multiple=True, help="Add a plugin; plugins apply in the order given."
    ),
    click.option(
        "--no-plugin", "without", metavar="NAME", multiple=True, help="Remove a plugin, which may be a default one."
    ),
    click.option(
        "--set", "settings", metavar="NAME=VALUE", multiple=True, help="Set any option by its dotted name: lora.r=32."
    ),
    click.option(
        "--model", metavar="DIR|HUB_ID", help=f"Model directory or hub id.  [default: {EMBEDDED_MODEL}, embedded]"
    ),
    click.option(
        "--trust-remote-code/--no-trust-remote-code",
        default=None,
        help="Run Python code from the directory or repository of the model.  [default: False]",
    ),
    click.option(
        "--add-tokens/--no-add-tokens",
        default=None,
        help="Add control tokens that the template needs and the tokenizer lacks, and train them.  [default: False]",
    ),
    click.option(
        "--output-dir", metavar="DIR|ADDRESS", help="Output directory of this run.  [default: runs/<name>-<n>]"
    ),
    click.option(
        "--upload-to", metavar="ADDRESS", help="Copy it to a store while the run trains, such as s3://bucket/runs/x."
    ),
    click.option(
        "--upload-timeout",
        metavar="S",
        help="Seconds without progress after which the end of the run waits no longer for an upload.  [default: 300]",
    ),
)
_OF_OUTPUT: Final = 3
"""How many of these options, the last ones, are those of a command that trains."""


_EMPTY: Final = "''"
"""An empty argument, as it is typed in a shell."""
_UNKNOWN: Final = "sftx.options.unknown"
"""The key of click's context under which a command keeps the options that it does not have."""


class RunCommand(click.Command):
    """A command that takes the options of a run, and those of other tools too, which loading answers all at once.

    `--max_length` is the same as `--max-length`, and `--bf16 true` the same as `--bf16`, as in transformers' parser.
    """

    def make_context(self, *args: Any, **kwargs: Any) -> click.Context:
        return super().make_context(*args, token_normalize_func=_with_hyphens, **kwargs)

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        remaining = self._without_values_of_switches(args)
        unknown: list[tuple[str, Any, str]] = []
        ctx.meta[_UNKNOWN] = unknown
        while True:
            try:
                parsed, others, _ = self.make_parser(ctx).parse_args(list(remaining))
                for argument in [parsed.get("file"), *others]:
                    if (
                        isinstance(argument, str)
                        and re.match(r"[A-Za-z_][\w.-]*=", argument)
                        and not Path(argument).exists()
                    ):
                        remaining.remove(argument)
                        unknown.append(self._answered(argument))
                return super().parse_args(ctx, list(remaining))
            except click.NoSuchOption as error:
                taken = _take(remaining, error.option_name)
                if taken is None:
                    raise
                unknown.append(taken)

    def _answered(self, argument: str) -> tuple[str, Any, str]:
        """Return `lora_r=8`, as other programs take options, as an option that does not exist.

        Raises ConfigError, which says what to write, for an option of this command and for one of a plugin.
        """
        name, _, text = argument.partition("=")
        section = name.rpartition(".")[0]
        flag = flag_of(name) if section in SECTION_CLASSES else f"--{_with_hyphens(name)}"
        option = next((o for o in self.params if isinstance(o, click.Option) and flag in o.opts), None)
        if option is not None:
            is_on = option.is_flag and text.lower() == "true"
            raise ConfigError(f"argument {argument}: write {flag}{'' if is_on else f' {shlex.quote(text)}'}")
        if section or name in SECTIONS:
            raise ConfigError(f"argument {argument}: write --set {shlex.quote(argument)}")
        return name.replace("-", "_"), parse_value(text), f"argument {argument}"

    def _without_values_of_switches(self, args: Sequence[str]) -> list[str]:
        """Return the arguments with `--bf16 true` and `--bf16=false` as click wants them: `--bf16`, `--no-bf16`."""
        switches = {
            on: off
            for option in self.params
            if isinstance(option, click.Option) and option.is_flag
            for on, off in zip(option.opts, option.secondary_opts, strict=False)
        }
        kept: list[str] = []
        for argument in args:
            name, equals, value = argument.partition("=")
            if not equals and kept and argument.lower() in ("true", "false"):
                name, value = kept[-1], argument
            off = switches.get(_with_hyphens(name))
            if off is None or value.lower() not in ("true", "false"):
                kept.append(argument)
                continue
            if not equals:
                kept.pop()
            kept.append(_with_hyphens(name) if value.lower() == "true" else off)
        return kept


def _with_hyphens(name: str) -> str:
    return name.replace("_", "-")


def _take(arguments: list[str], name: str) -> tuple[str, Any, str] | None:
    """Remove an option with its values from the arguments; return (name, JSON value, option as typed).

    Its values are what follows up to the next option, but for a run file. None when it is no option of another tool:
    short, or one of the sections of a run file.
    """
    place = next(
        (n for n, typed in enumerate(arguments) if _with_hyphens(typed.partition("=")[0]) == _with_hyphens(name)), None
    )
    plain = name.removeprefix("--").replace("-", "_")
    if place is None or not name.startswith("--") or plain in SECTIONS:
        return None
    _, equals, text = arguments[place].partition("=")
    end = place + 1
    while not equals and end < len(arguments) and not arguments[end].startswith("--"):
        if Path(arguments[end]).suffix in (".yaml", ".yml"):
            break
        end += 1
    texts = [text] if equals else arguments[place + 1 : end]
    typed = " ".join(arguments[place:end])
    del arguments[place:end]
    values = [parse_value(text) for text in texts]
    return plain, (True if not values else values[0] if len(values) == 1 else values), typed


def run_options(*sections: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Give a command RUN_FILE and the options of these sections; it is called with `file` and `loaded`.

    A command that does not train has no --output-dir. What else it takes, its own decorators declare.
    """

    def decorate(function: Callable[..., Any]) -> Callable[..., Any]:
        names = {"model", "trust_remote_code", "add_tokens", "output_dir", "upload_to", "upload_timeout"}

        @wraps(function)
        def command(
            file: Path | None,
            plugins: tuple[str, ...],
            without: tuple[str, ...],
            settings: tuple[str, ...],
            **rest: Any,
        ) -> Any:
            if file is not None and file.is_dir():
                hint = f"; the run file of this run is {file / 'run.yaml'}" if (file / "run.yaml").is_file() else ""
                raise click.UsageError(f"{file} is a directory, and a run file is a YAML file{hint}")
            if file is not None and file.suffix not in (".yaml", ".yml") and file.exists():
                raise click.UsageError(
                    f"{file} is no run file; give each file of data an option of its own: --data {file}, or quote the "
                    f"pattern that names them: --data '*{file.suffix}'"
                )
            values = {name: rest.pop(name) for name in list(rest) if name in names}
            assignments = [*_assignments(values), *parse_settings(settings)]
            with phase("reading", "options"):
                loaded = loading.load(
                    file,
                    add=plugins,
                    remove=without,
                    assignments=[*assignments, *click.get_current_context().meta[_UNKNOWN]],
                    plugin_class=options_class,
                )
                loaded = go_on_from_adapter(loaded)
            return function(file=file, loaded=loaded, **rest)

        for section in reversed(sections):
            for name, option in reversed(_section_options(section).items()):
                command = option(command)
                names.add(name)
        for option in reversed(_COMMON if "train" in sections else _COMMON[:-_OF_OUTPUT]):
            command = option(command)
        return command

    return decorate


def _section_options(section: str) -> dict[str, Callable[..., Any]]:
    """Return a click option for each field of a section, by the name of its parameter (`train__seed`)."""
    options = {}
    hints = get_type_hints(SECTION_CLASSES[section], include_extras=True)
    for field in dataclasses.fields(SECTION_CLASSES[section]):
        if dataclasses.is_dataclass(field.default):
            continue  # its own fields are set with --set data.filters.min_turns=2
        dotted = f"{section}.{field.name}"
        name, flag, hint = dotted.replace(".", "__"), flag_of(dotted), hints[field.name]
        values = ", ".join(map(str, field.default)) if isinstance(field.default, tuple) else field.default
        text = next(part.description for part in get_args(hint) if hasattr(part, "description"))
        text += "" if values in (None, "") else f"  [default: {values}]"
        plain = get_args(hint)[0] if get_origin(hint) is Annotated else hint
        types = [member for member in (get_args(plain) or (plain,)) if member is not type(None)]
        if types == [bool]:
            options[name] = click.option(f"{flag}/--no-{flag[2:]}", name, default=None, help=text)
            continue
        if isinstance(field.default, tuple):
            metavar = "ROLE" if field.default else "PATH"
        elif all(isinstance(member, str) for member in types):  # the choices of a Literal
            metavar = "|".join(types)
        else:
            metavar = types[0].__name__.upper() if len(types) == 1 else "VALUE"
        multiple = isinstance(field.default, tuple)
        options[name] = click.option(flag, name, metavar=metavar, multiple=multiple, default=None, help=text)
    return options


def _assignments(values: dict[str, Any]) -> list[tuple[str, Any, str]]:
    """Return (dotted name, JSON value, option as typed) for each option that was given."""
    assignments: list[tuple[str, Any, str]] = []
    for name, value in values.items():
        dotted = name.replace("__", ".")
        flag = flag_of(dotted)
        if value is None or value == ():
            continue
        if isinstance(value, tuple):
            assignments.append((dotted, list(value), f"{flag} {' '.join(part or _EMPTY for part in value)}"))
        elif isinstance(value, bool):
            assignments.append((dotted, value, flag if value else f"--no-{flag[2:]}"))
        else:
            assignments.append(
                (dotted, value if _takes_text(dotted) else parse_value(value), f"{flag} {value or _EMPTY}")
            )
    return assignments


def _takes_text(dotted: str) -> bool:
    """Return whether the option takes text alone, so that `--format 12` is the format `12` and no number."""
    section, _, name = dotted.rpartition(".")
    hint = get_type_hints(SECTION_CLASSES[section] if section else RunConfig)[name]
    return {member for member in (get_args(hint) or (hint,)) if member is not type(None)} == {str}


def parse_settings(settings: Sequence[str]) -> list[tuple[str, Any, str]]:
    """Return (dotted name, JSON value, option as typed) for each `--set NAME=VALUE`. Raises BadParameter."""
    assignments: list[tuple[str, Any, str]] = []
    for setting in settings:
        name, equals, text = setting.partition("=")
        if not (name and equals) or name.strip() != name or not name.strip("."):
            raise click.BadParameter(
                f"{setting!r} is not of the form PLUGIN.OPTION=VALUE or SECTION.OPTION=VALUE, such as lora.r=32 or "
                "train.seed=1",
                param_hint="--set",
            )
        assignments.append((name, parse_value(text), f"--set {setting}"))
    return assignments


def parse_value(text: str) -> Any:
    """Return the JSON value of an argument: `32`, `1e-4`, `[a, b]` and `'32'` as in YAML, any other text as it is.

    `Answer: yes` is text here and no mapping, and ` #` begins no comment.
    """
    try:
        value, _ = run_file.parse(text)
    except ConfigError:
        return text
    if text.lstrip().startswith(("[", "{", "'", '"')):
        return value
    return text if isinstance(value, str | list | dict) or "#" in text else value
