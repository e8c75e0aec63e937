"""Makes one frozen RunConfig of a run file and a command line, which wins over the file. Nothing here imports torch."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sftx import paths
from sftx.config import run_file
from sftx.config.default_plugins import DEFAULT_PLUGINS, SOURCES
from sftx.config.flatten import flatten
from sftx.config.named_plugins import PLUGIN_OPTIONS
from sftx.config.options import SECTION_CLASSES, SECTIONS, RunConfig
from sftx.config.unknown_options import UnknownOption, UnknownOptionsError, answered, is_harmless, note
from sftx.config.validation import validate
from sftx.errors import ConfigError, did_you_mean


@dataclass(frozen=True)
class LoadedConfig:
    """The configuration of a run, and where each of its values was set, for errors that are found later."""

    config: RunConfig
    origins: run_file.Origins


def load(
    path: Path | None,
    *,
    add: Sequence[str] = (),
    remove: Sequence[str] = (),
    assignments: Sequence[tuple[str, Any, str]] = (),
    plugin_class: Callable[[str], type | None] | None = None,
) -> LoadedConfig:
    """Return the run that a run file and a command line describe together; the command line wins.

    `add` and `remove` are the names after `--plugin` and `--no-plugin`; `assignments` are (dotted name, JSON value,
    option as the user typed it). With neither a file nor `data.train` it is the demo, `sftx/demo/run.yaml`.
    All options that do not exist are in one UnknownOptionsError; those of plugins too, with `plugin_class`, which
    returns the options dataclass of an installed plugin. Raises ConfigError.
    """
    if path is None and not any(name == "data.train" for name, _, _ in assignments):
        path = paths.DEMO_RUN_FILE
    values, origins = run_file.read(path) if path is not None else ({}, run_file.Origins())
    # A section without a value is an empty section.
    values = {name: value for name, value in values.items() if value is not None or name not in SECTION_CLASSES}
    values["plugins"] = plugins = _plugin_options(values.get("plugins"), origins)
    for name in [name for name in values if name.partition(".")[0] in {*SECTION_CLASSES, "plugins", "launch"} - {name}]:
        _set_dotted(values, name, values.pop(name), origins)
    typed_for = {name: f"--plugin {name or repr(name)}" for name in add}
    for name in add:
        if name not in plugins:
            plugins[name] = {}
            origins.set(f"plugins.{name}", typed_for[name])
    # The list `plugins:` of Axolotl has names of classes. An empty value would ask for nothing, to be there does not.
    theirs = [
        UnknownOption(name, plugins.pop(name) or True, typed_for.get(name) or origins.of("plugins"), tuple(plugins))
        for name in list(plugins)
        if name.startswith("axolotl.")
    ]
    named = set(plugins)
    given: dict[str, tuple[Any, str]] = {}
    for name, value, typed in assignments:
        parts = _split_name(name, plugins) if "." in name else [name]
        _assign(values, parts, value, typed)
        dotted = ".".join(parts)
        # Of one option that is given twice the last counts; of two names for it neither comes last.
        before, earlier = given.get(dotted, (value, typed))
        names = {text.partition("=")[0] for text in (typed, earlier) if text.startswith("--")}
        if before != value and len(names) > 1:
            raise ConfigError(f"{typed}: contradicts {earlier}; leave one of them out")
        given[dotted] = (value, typed)
        origins.set(dotted, typed)
        if parts[0] == "plugins" and len(parts) > 1:
            typed_for.setdefault(parts[1], typed)
    for name in remove:
        if name in typed_for:
            raise ConfigError(f"--no-plugin {name}: contradicts {typed_for[name]}; leave one of them out")
        plugins.pop(name, None)
        origins.set(f"without.{name}", f"--no-plugin {name}")
    if isinstance(without := values.setdefault("without", []), list):
        values["without"] = [*without, *(name for name in dict.fromkeys(remove) if name not in without)]
    try:
        config = validate(RunConfig, values, origins=origins)
    except UnknownOptionsError as error:
        if plugin_class is None:
            raise
        of_plugins = [*theirs, *_unknown_of_plugins(plugins, plugin_class, origins)]
        raise UnknownOptionsError([*error.unknown, *answered(of_plugins, flatten(values))]) from None
    if theirs:
        found = answered(theirs, flatten(values))
        if not all(map(is_harmless, found)):
            raise UnknownOptionsError(found)
        note(found)
    # Plugins that are in the run without being named, so that options of theirs may be set.
    present = {name for defaults in DEFAULT_PLUGINS.values() for name in defaults}
    present.update(*(option.plugins(getattr(config.train, option.name)) for option in PLUGIN_OPTIONS))
    schemes = {source.scheme for source in (*config.data.train, *config.data.eval)}
    present.update(name for name in SOURCES if name in schemes)
    for name, typed in typed_for.items():
        # An option alone adds no plugin: `--set lora.r=8` must not turn full fine-tuning into LoRA.
        if name not in named and name not in present:
            advice = did_you_mean(name, named) or f"; add --plugin {name}"
            if advice.startswith("; add") and plugin_class is not None and plugin_class(name) is None:
                advice = f", and none of that name is installed{did_you_mean(name, SECTIONS)}"
            raise ConfigError(f"{typed}: plugin {name!r} is not in this run{advice}")
    return LoadedConfig(config, origins)


def _unknown_of_plugins(
    plugins: Mapping[str, Any], plugin_class: Callable[[str], type | None], origins: run_file.Origins
) -> list[UnknownOption]:
    """Return the options of plugins that do not exist."""
    unknown = []
    for name, options in plugins.items():
        cls = plugin_class(name)
        if cls is None or not isinstance(options, dict):
            continue
        known = tuple(field.name for field in dataclasses.fields(cls))
        for option in [option for option in options if option not in known]:
            dotted = f"plugins.{name}.{option}"
            unknown.append(UnknownOption(dotted, options[option], origins.of(dotted), known))
    return unknown


def _set_dotted(values: dict[str, Any], name: str, value: Any, origins: run_file.Origins) -> None:
    """Set an option that stands at the top of a run file under its dotted name, as in `train.seed: 1`."""
    place = origins.of(name)
    section, _, rest = name.partition(".")
    is_plugin = section == "plugins" and (value is None or isinstance(value, dict))
    if is_plugin and not value:
        values["plugins"].setdefault(rest, {})
    else:
        parts = [section, rest] if is_plugin else _split_name(name, values["plugins"])
        if ".".join(parts) in flatten(values) or (is_plugin and rest in values["plugins"]):
            raise ConfigError(f"{place}: {name} is set twice; leave one of them out")
        _assign(values, parts, value, f"{place}: {name}")
    origins.set(name, place)


def default_name(run_file: Path | None, config: RunConfig) -> str:
    """Return the name with which the default output directory begins: that of the run file, or of the first data."""
    first = next(iter(config.data.train), None)
    source = str(run_file) if run_file is not None else "run" if first is None else first.address
    if source.startswith("sftx:"):
        return "demo"
    if run_file is None and first is not None and first.scheme is not None:
        source = source.partition("?")[0]  # what follows may be a whole query
    # Of a pattern such as `data/*.jsonl`, the directory.
    parts = [part for part in Path(source).parts if not re.search(r"[*?[]", part)]
    return Path(*parts).name.split(".")[0] or "run"


def _plugin_options(table: Any, origins: run_file.Origins) -> dict[str, Any]:
    """Return `plugins:` as a mapping of names to options; a list of names, and an entry without a value, set none."""
    if table is None:
        return {}
    if isinstance(table, list) and all(isinstance(name, str) for name in table):
        return {name: {} for name in table}
    if not isinstance(table, dict):
        raise ConfigError(
            f"{origins.of('plugins') or 'plugins'}: got {json.dumps(table, default=str)}, expected a mapping of "
            "plugin names to options, such as {chatml: {}, lora: {r: 16}}"
        )
    return {name: {} if options is None else options for name, options in table.items()}


def _split_name(name: str, plugins: Collection[str]) -> list[str]:
    """Split a dotted name; `plugins.` may be left out, and the name of a plugin may have dots, as qwen2.5 has."""
    if name.partition(".")[0] not in SECTIONS:
        name = f"plugins.{name}"
    section, _, rest = name.partition(".")
    owners = [plugin for plugin in plugins if rest.startswith(f"{plugin}.")] if section == "plugins" else []
    if not owners:
        return name.split(".")
    owner = max(owners, key=len)
    return [section, owner, *rest.removeprefix(f"{owner}.").split(".")]


def _assign(values: dict[str, Any], parts: Sequence[str], value: Any, typed: str) -> None:
    """Set the option of the dotted name `parts` in nested `values`, making the sections that are missing."""
    *sections, last = parts
    for depth, section in enumerate(sections, start=1):
        if values.get(section) is None:
            values[section] = {}
        values = values[section]
        if not isinstance(values, dict):
            raise ConfigError(f"{typed}: {'.'.join(sections[:depth])} has no options of its own")
    values[last] = value
