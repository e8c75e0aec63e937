"""This module finds installed plugins, imports those that a run names, and checks them.

Every plugin is an entry point of the group `sftx.plugins`; the built-in ones are registered in the same way.
`discover` and `find` read metadata only; `load_class` is the first function that imports code of a plugin.
"""

from __future__ import annotations

import dataclasses
import importlib.metadata
import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, Final

import pluggy

from sftx.assembly import hookspecs
from sftx.assembly.hookspecs import PROJECT, RETURNS, VALIDATE
from sftx.assembly.stages import arguments_of, named
from sftx.config.default_plugins import ENTRY_POINTS
from sftx.errors import PluginError, did_you_mean, one_line

if TYPE_CHECKING:
    from sftx.config.run_file import Origins

GROUP: Final = ENTRY_POINTS

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class PluginInfo:
    """An entry point of the group `sftx.plugins`, read from metadata without importing the plugin."""

    name: str
    value: str
    """`package.module:Class`"""
    distribution: importlib.metadata.Distribution

    @cached_property
    def package(self) -> str:
        """Return the name of the distribution."""
        return self.distribution.metadata["Name"]

    @property
    def version(self) -> str:
        return self.distribution.version

    def __str__(self) -> str:
        return f"plugin {self.name!r} ({self.package} {self.version})"


def discover() -> list[PluginInfo]:
    """Return every installed plugin, sorted by name.

    Two distributions may use the same name; this is an error only when the name is used (`find`). A distribution whose
    metadata cannot be read is left out with a warning.
    """
    plugins: dict[tuple[str, str, str], PluginInfo] = {}
    for distribution in importlib.metadata.distributions():
        try:
            entries = [entry for entry in distribution.entry_points if entry.group == GROUP]
            infos = [PluginInfo(entry.name, entry.value, distribution) for entry in entries]
            keys = [(info.name, info.value, info.package.lower().replace("_", "-")) for info in infos]
        except Exception as error:
            place = getattr(distribution, "_path", "a distribution")
            log.warning("%s: its metadata cannot be read, so its plugins are left out: %s", place, one_line(error))
            continue
        for key, info in zip(keys, infos, strict=True):
            plugins.setdefault(key, info)  # if a distribution is on sys.path twice, Python imports the first one
    return sorted(plugins.values(), key=lambda info: (info.name, info.package))


def find(name: str, installed: Sequence[PluginInfo], *, origin: str = "") -> PluginInfo:
    """Return the installed plugin called `name`. Raises PluginError when there is none, or more than one.

    `origin` is the option or line of the run file that names the plugin; error messages begin with it.
    """
    matches = [info for info in installed if info.name == name]
    if len(matches) == 1:
        return matches[0]
    prefix = f"{origin}: " if origin else ""
    if matches:
        owners = " and ".join(f"{info.package} {info.version}" for info in matches)
        if len({info.package for info in matches}) == 1:  # a distribution defines the name twice, or is installed twice
            owners = " and ".join(f"{info.value} of {info.package} {info.version}" for info in matches)
        raise PluginError(f"{prefix}plugin {name!r} is provided by {owners}; uninstall one of them")
    names = [info.name for info in installed]
    hint = did_you_mean(name, names) or f"; installed are {', '.join(names)}"
    raise PluginError(f"{prefix}plugin {name!r} is not installed{hint}")


def load_class(info: PluginInfo) -> type:
    """Return the plugin's class, imported once its version range is known to include this sftx. Raises PluginError."""
    from sftx.config.options import SECTIONS

    _check_sftx_version(info)
    if info.name in SECTIONS:
        raise PluginError(f"{info}: the name {info.name!r} is a section of the run file; rename the plugin")
    try:
        cls = importlib.metadata.EntryPoint(info.name, info.value, GROUP).load()
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # including SystemExit: a plugin must not end the process with exit code 0
        place = f" in {error.filename}" if isinstance(error, SyntaxError) else ""
        raise PluginError(
            f"{info}: cannot be imported from {info.value!r}: {type(error).__name__}: {one_line(error)}{place}; "
            f"fix or reinstall {info.package}, or leave the plugin out"
        ) from error
    if not (isinstance(cls, type) and dataclasses.is_dataclass(cls)):
        raise PluginError(f"{info}: {info.value!r} is not a dataclass; a plugin is a frozen dataclass of its options")
    if cls.__eq__ is not object.__eq__:
        raise PluginError(
            f"{info}: declare it as @dataclass(frozen=True, eq=False); pluggy compares and hashes plugins"
        )
    return cls


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
    from pydantic import TypeAdapter

    values: dict[str, Any] = json.loads(TypeAdapter(type(plugin)).dump_json(plugin, warnings=False))
    return values


def _sftx_version() -> str:
    from sftx import __version__

    return __version__
