"""A run file and a command line become one frozen RunConfig; the command line wins. Nothing here imports torch."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sftx.assembly.hookspecs import DEFAULTS
from sftx.config import run_file
from sftx.config.options import SECTIONS, RunConfig
from sftx.config.validation import validate
from sftx.errors import ConfigError, did_you_mean


@dataclass(frozen=True)
class Loaded:
    """A run, and where each of its values was set, for errors that can only be seen later."""

    config: RunConfig
    origins: run_file.Origins


def load(
    path: Path | None,
    *,
    add: Sequence[str] = (),
    remove: Sequence[str] = (),
    assignments: Sequence[tuple[str, Any, str]] = (),
) -> Loaded:
    """The run that a file and a command line describe together; the command line wins.

    `add` and `remove` are the names after `--plugin` and `--no-plugin`; `assignments` are (dotted name, JSON value,
    what the user typed). With neither a file nor `data.train` it is the embedded default, `sftx/demo/run.yaml`.
    Raises ConfigError.
    """
    if path is None and not any(name == "data.train" for name, _, _ in assignments):
        path = run_file.EMBEDDED
    values, origins = run_file.read(path) if path is not None else ({}, run_file.Origins())
    sections = ("data", "train", "generation", "plugins")
    values = {name: value for name, value in values.items() if value is not None or name not in sections}
    values["plugins"] = plugins = _plugin_table(values, origins)
    wanted = {name: f"--plugin {name}" for name in add}
    for name in add:
        plugins.setdefault(name, {})
    named = set(plugins)
    for name, value, typed in assignments:
        parts = _path(name, plugins)
        run_file.assign(values, parts, value, typed)
        origins.set(".".join(parts), typed)
        if parts[0] == "plugins" and len(parts) > 1:
            wanted.setdefault(parts[1], typed)
    _refuse_strangers({name: typed for name, typed in wanted.items() if name not in named}, named)
    for name in remove:
        if name in wanted:
            raise ConfigError(f"--no-plugin {name}: contradicts {wanted[name]}; leave one of them out")
        plugins.pop(name, None)
    if isinstance(without := values.setdefault("without", []), list):
        values["without"] = [*without, *(name for name in dict.fromkeys(remove) if name not in without)]
    return Loaded(validate(RunConfig, values, origins=origins), origins)


def _path(name: str, plugins: Collection[str]) -> list[str]:
    """The sections that a dotted name goes through; a plugin's own name may have dots, as qwen2.5 has."""
    if name.partition(".")[0] not in SECTIONS:
        name = f"plugins.{name}"
    section, _, rest = name.partition(".")
    owners = [plugin for plugin in plugins if rest.startswith(f"{plugin}.")] if section == "plugins" else []
    if not owners:
        return name.split(".")
    owner = max(owners, key=len)
    return [section, owner, *rest.removeprefix(f"{owner}.").split(".")]


def _refuse_strangers(wanted: Mapping[str, str], named: Collection[str]) -> None:
    """An option alone brings no plugin in: it would turn full fine-tuning into LoRA. The defaults are there already."""
    for name, typed in wanted.items():
        if not any(name in names for names in DEFAULTS.values()):
            hint = did_you_mean(name, named) or f"; add --plugin {name}"
            raise ConfigError(f"{typed}: plugin {name!r} is not in this run{hint}")


def _plugin_table(values: Mapping[str, Any], origins: run_file.Origins) -> dict[str, Any]:
    """`plugins:` as a mapping; a list of names and an empty entry are the same without options."""
    table = values.get("plugins")
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
