"""This module imports installed plugins that a run names, and commands that a user types, and checks them.

Every plugin is an entry point of the group `sftx.plugins`; the built-in ones are registered in the same way. Before
`load` nothing imports code of a plugin.
"""

from __future__ import annotations

import dataclasses
import importlib.metadata
import json
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import pluggy

from sftx.assembly import hookspecs
from sftx.assembly.entry_points import PLUGINS, PluginInfo, discover, find
from sftx.assembly.hookspecs import PROJECT, RETURNS, VALIDATE
from sftx.assembly.stages.stage import arguments_of, named
from sftx.errors import PluginError, did_you_mean, kind_of, one_line

if TYPE_CHECKING:
    import click

    from sftx.config.run_file import Origins


def load(info: PluginInfo) -> Any:
    """Import what an entry point names, once its version range is known to include this sftx. Raises PluginError."""
    _check_sftx_version(info)
    try:
        return importlib.metadata.EntryPoint(info.name, info.value, info.group).load()
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # including SystemExit: a plugin must not end the process with exit code 0
        place = f" in {error.filename}" if isinstance(error, SyntaxError) else ""
        advice = ", or leave the plugin out" if info.group == PLUGINS else ""
        raise PluginError(
            f"{info}: cannot be imported from {info.value!r}: {type(error).__name__}: {one_line(error)}{place}; "
            f"fix or reinstall {info.package}{advice}"
        ) from error


def load_class(info: PluginInfo) -> type:
    """Return the plugin's class, imported (see `load`) and checked. Raises PluginError."""
    from sftx.config.options import SECTIONS

    if info.name in SECTIONS:
        raise PluginError(f"{info}: the name {info.name!r} is a section of the run file; rename the plugin")
    cls = load(info)
    if not (isinstance(cls, type) and dataclasses.is_dataclass(cls)):
        raise PluginError(f"{info}: {info.value!r} is not a dataclass; a plugin is a frozen dataclass of its options")
    if cls.__eq__ is not object.__eq__:
        raise PluginError(
            f"{info}: declare it as @dataclass(frozen=True, eq=False); pluggy compares and hashes plugins"
        )
    return cls


def load_command(info: PluginInfo) -> click.Command:
    """Return a command of the command line, imported (see `load`). Raises PluginError for what is no command."""
    import click

    command = load(info)
    if not isinstance(command, click.Command):
        raise PluginError(f"{info}: {info.value!r} is {kind_of(command)}, expected a click command")
    return command


def options_class(name: str) -> type | None:
    """Return the class of an installed plugin, None when there is no such plugin or it is broken."""
    try:
        return load_class(find(name, discover()))
    except PluginError:
        return None


def _check_sftx_version(info: PluginInfo) -> None:
    from packaging.requirements import InvalidRequirement, Requirement

    version = _sftx_version()
    for text in info.distribution.requires or ():
        if not text.lower().startswith(PROJECT):  # parsing each of them for each plugin takes longer than importing it
            continue
        try:
            requirement = Requirement(text)
        except InvalidRequirement:
            continue
        applies = requirement.marker is None or requirement.marker.evaluate()
        if requirement.name.lower() != PROJECT or not applies:
            continue
        if not requirement.specifier.contains(version, prereleases=True):
            raise PluginError(
                f"{info}: requires sftx {requirement.specifier}, this is sftx {version}; "
                f"install another version of {info.package} or of sftx"
            )


def hooks_of(info: PluginInfo, cls: type) -> list[str]:
    """Return the hooks of stages that a plugin's class implements, in the order of the stages of a run.

    Raises PluginError when the class implements none, when a marked method is not a hook of this sftx, or when it has
    a parameter that the hook does not pass. pluggy would find the last two when the plugin is registered, but its
    errors name neither the distribution nor its version, and suggest nothing.
    """
    manager = pluggy.PluginManager(PROJECT)
    with named(str(info), "looking for its hooks"):
        implementations = {name: opts for name in dir(cls) if (opts := manager.parse_hookimpl_opts(cls, name))}
        unmarked = [name for name in (VALIDATE, *RETURNS) if hasattr(cls, name) and name not in implementations]
    if unmarked or not implementations:
        problem = f"{', '.join(unmarked)} is not marked as a hook" if unmarked else "implements no hook"
        raise PluginError(f"{info}: {problem}; put @sftx.hookimpl above the method")
    if implementations.keys() == {VALIDATE}:
        raise PluginError(f"{info}: implements {VALIDATE} alone, which makes no stage; implement another hook as well")
    for name, opts in implementations.items():
        if name not in (VALIDATE, *RETURNS):
            hint = did_you_mean(name, RETURNS) or f"; hooks are {', '.join(RETURNS)}"
            raise PluginError(f"{info}: {name} is not a hook of sftx {_sftx_version()}{hint}")
        if opts["wrapper"] or opts["hookwrapper"]:
            raise PluginError(f"{info}: {name} is a wrapper; sftx does not support hook wrappers")
        passed = arguments_of(getattr(hookspecs, name))
        unknown = [argument for argument in arguments_of(getattr(cls, name))[1:] if argument not in passed]
        if unknown:
            raise PluginError(
                f"{info}: {name} has the parameter {', '.join(unknown)}, which sftx {_sftx_version()} does not pass; "
                f"it passes {', '.join(passed) or 'nothing'}"
            )
    return [hook for hook in RETURNS if hook in implementations]


def required_options(cls: type) -> list[str]:
    """Return the options of a plugin's class that have no default."""
    missing = dataclasses.MISSING
    fields = dataclasses.fields(cls)
    return [field.name for field in fields if field.init and field.default is field.default_factory is missing]


def instance(info: PluginInfo, cls: type, options: Mapping[str, Any], origins: Origins) -> Any:
    """Return an instance of the plugin with these options.

    Raises ConfigError for invalid options, and PluginError when an option does not survive being written into run.yaml.
    """
    from sftx.config.validation import validate

    with named(str(info), "reading its options"):
        plugin: Any = validate(cls, options, who=str(info), prefix=f"plugins.{info.name}.", origins=origins)
    with named(str(info), "writing its options into run.yaml and reading them back"):
        reread: Any = validate(cls, options_of(plugin), who=str(info), origins=origins)
        for field in dataclasses.fields(cls):
            if getattr(reread, field.name) != getattr(plugin, field.name):
                raise PluginError(
                    f"option {field.name!r} changes when it is written into run.yaml and read back, so the run could "
                    "not be repeated; use a type that JSON can hold"
                )
    return plugin


def options_of(plugin: Any) -> dict[str, Any]:
    """Return the options of a plugin instance as JSON values, including those left at their defaults."""
    from sftx.config.options import adapter  # here, as a list of plugins needs no pydantic

    cls: Any = type(plugin)
    values: dict[str, Any] = json.loads(adapter(cls).dump_json(plugin, warnings=False))
    return values


def _sftx_version() -> str:
    from sftx import __version__

    return __version__
