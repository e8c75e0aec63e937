"""Names become plugins, and plugins become the stages of a run.

discover: read what is installed, from metadata alone. activate: import the named plugins, check their hosts and
options. assemble: call their hooks, once each. Every registration lives in the entry-point group `sftx.plugins`;
the built-in plugins stand there as anybody else's do.
"""

from __future__ import annotations

import dataclasses
import importlib.metadata
import json
import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, Final, cast

import pluggy

from sftx import _deprecated
from sftx.assembly import hookspecs
from sftx.assembly.hookspecs import ONE_PROVIDER, PROJECT, RETURNS
from sftx.assembly.stages import Guarded, arguments_of, make, named
from sftx.config.default_plugins import DEFAULT_PLUGINS
from sftx.errors import PluginError, did_you_mean, one_line
from sftx.events import Provider, RunInfo
from sftx.types import Adapter, Collator, Loss, Metric, ModelSpec, Observer, Parser, Template

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from sftx.config.loading import LoadedConfig
    from sftx.config.run_file import Origins

GROUP: Final = "sftx.plugins"

log = logging.getLogger(__name__)

# --- discover: metadata only -------------------------------------------------------------------


@dataclass(frozen=True)
class PluginInfo:
    """One entry point of the group: known without importing anything of the plugin."""

    name: str
    value: str
    """`package.module:Class`"""
    distribution: importlib.metadata.Distribution

    @cached_property
    def package(self) -> str:
        """Name of the distribution."""
        return self.distribution.metadata["Name"]

    @property
    def version(self) -> str:
        return self.distribution.version

    def __str__(self) -> str:
        return f"plugin {self.name!r} ({self.package} {self.version})"


def discover() -> list[PluginInfo]:
    """Every installed plugin, by name. A name may stand twice; that is an error only when it is used.

    A distribution whose metadata cannot be read is left out, with a warning.
    """
    found: dict[tuple[str, str, str], PluginInfo] = {}
    for distribution in importlib.metadata.distributions():
        try:
            entries = [entry for entry in distribution.entry_points if entry.group == GROUP]
            infos = [PluginInfo(entry.name, entry.value, distribution) for entry in entries]
            keys = [(info.name, info.value, _canonical(info.package)) for info in infos]
        except Exception as error:
            place = getattr(distribution, "_path", "a distribution")
            log.warning("%s: its metadata cannot be read, so its plugins are left out: %s", place, one_line(error))
            continue
        for key, info in zip(keys, infos, strict=True):
            found.setdefault(key, info)  # of a distribution that stands on the path twice, Python imports the first
    return sorted(found.values(), key=lambda info: (info.name, info.package))


def _canonical(package: str) -> str:
    return package.lower().replace("_", "-")


def find(name: str, installed: Sequence[PluginInfo], *, origin: str = "") -> PluginInfo:
    """The one installed plugin of that name. Raises PluginError when there is none, or more than one."""
    matches = [info for info in installed if info.name == name]
    if len(matches) == 1:
        return matches[0]
    start = f"{origin}: " if origin else ""
    if matches:
        owners = " and ".join(f"{info.package} {info.version}" for info in matches)
        if len({info.package for info in matches}) == 1:  # one name twice, in one distribution or in two of one name
            owners = " and ".join(f"{info.value} of {info.package} {info.version}" for info in matches)
        raise PluginError(f"{start}plugin {name!r} is provided by {owners}; uninstall one of them")
    names = [info.name for info in installed]
    hint = did_you_mean(name, names) or f"; installed are {', '.join(names)}"
    raise PluginError(f"{start}plugin {name!r} is not installed{hint}")


# --- activate: import what is named ------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Active:
    """A plugin of this run: where it comes from, and the instance that holds its options."""

    info: PluginInfo
    plugin: Any

    @property
    def options(self) -> dict[str, Any]:
        """Its options as JSON values, defaults written out."""
        from pydantic import TypeAdapter

        values: dict[str, Any] = json.loads(TypeAdapter(type(self.plugin)).dump_json(self.plugin, warnings=False))
        return values


def load_class(info: PluginInfo) -> type:
    """Imports the plugin's class, after checking that it asks for this version of sftx. Raises PluginError."""
    from sftx.config.options import SECTIONS

    _check_host(info)
    if info.name in SECTIONS:
        raise PluginError(f"{info}: the name {info.name!r} is a section of the run file; rename the plugin")
    try:
        cls = importlib.metadata.EntryPoint(info.name, info.value, GROUP).load()
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # sys.exit too: the process must not end as if all were well
        place = f" in {error.filename}" if isinstance(error, SyntaxError) else ""
        raise PluginError(
            f"{info}: cannot be imported from {info.value!r}: {type(error).__name__}: {one_line(error)}{place}; "
            f"mend or reinstall {info.package}, or leave the plugin out"
        ) from error
    if not (isinstance(cls, type) and dataclasses.is_dataclass(cls)):
        raise PluginError(f"{info}: {info.value!r} is no dataclass; a plugin is a frozen dataclass of its options")
    if cls.__eq__ is not object.__eq__:
        raise PluginError(
            f"{info}: declare it as @dataclass(frozen=True, eq=False); pluggy compares and hashes plugins"
        )
    return cls


def _check_host(info: PluginInfo) -> None:
    from packaging.requirements import InvalidRequirement, Requirement

    version = _host_version()
    for text in info.distribution.requires or ():
        try:
            requirement = Requirement(text)
        except InvalidRequirement:
            continue
        wanted = requirement.name.lower() == PROJECT and (requirement.marker is None or requirement.marker.evaluate())
        if wanted and not requirement.specifier.contains(version, prereleases=True):
            raise PluginError(
                f"{info}: is made for sftx {requirement.specifier}, this is sftx {version}; "
                f"install another version of {info.package} or of sftx"
            )


def instance(info: PluginInfo, cls: type, options: Mapping[str, Any], origins: Origins) -> Any:
    """The plugin with these options. Raises ConfigError for wrong ones, PluginError when run.yaml cannot hold them."""
    from sftx.config.validation import validate

    prefix = f"plugins.{info.name}."
    with named(str(info), "reading its options"):
        plugin: Any = validate(cls, options, who=str(info), prefix=prefix, origins=origins)
    with named(str(info), "writing its options into run.yaml and reading them back"):
        again: Any = validate(cls, Active(info, plugin).options, who=str(info), origins=origins)
        for field in dataclasses.fields(cls):
            if getattr(again, field.name) != getattr(plugin, field.name):
                raise PluginError(
                    f"option {field.name!r} is not the same when it was written into run.yaml and read back, so the "
                    "run could not be repeated; give it a type that JSON knows"
                )
    return plugin


def hooks_of(info: PluginInfo, cls: type) -> list[str]:
    """The hooks that a plugin's class fills, in the order of the stages.

    Raises PluginError when a marked method is no hook of this host, or asks for what it does not pass.
    """
    with named(str(info), "looking for its hooks"):
        marked = [name for name in dir(cls) if hasattr(getattr(cls, name), _MARK)]
        unmarked = [name for name in RETURNS if hasattr(cls, name) and name not in marked]
    if unmarked or not marked:
        what = f"{', '.join(unmarked)} is not marked as a hook" if unmarked else "fills no hook"
        raise PluginError(f"{info}: {what}; put @sftx.hookimpl above the method")
    for name in marked:
        if name not in RETURNS:
            hint = did_you_mean(name, RETURNS) or f"; hooks are {', '.join(RETURNS)}"
            raise PluginError(f"{info}: {name} is no hook of sftx {_host_version()}{hint}")
        options = getattr(getattr(cls, name), _MARK)
        if options["wrapper"] or options["hookwrapper"]:
            raise PluginError(f"{info}: {name} is a wrapper; hooks of sftx are not wrapped")
        passed = arguments_of(getattr(hookspecs, name))
        unknown = [argument for argument in arguments_of(getattr(cls, name))[1:] if argument not in passed]
        if unknown:
            raise PluginError(
                f"{info}: {name} asks for {', '.join(unknown)}, which sftx {_host_version()} does not pass; "
                f"it passes {', '.join(passed) or 'nothing'}"
            )
        _deprecated.hook(str(info), name, arguments_of(getattr(cls, name))[1:])
    return [hook for hook in RETURNS if hook in marked]


_MARK: Final = f"{PROJECT}_impl"  # the attribute in which pluggy keeps a marker's options


def _host_version() -> str:
    from sftx import __version__

    return __version__


def activate(loaded: LoadedConfig) -> Assembly:
    """The plugins of a run: the named ones in their order, then the defaults of what they leave open.

    Raises PluginError, ConfigError.
    """
    config, origins = loaded.config, loaded.origins
    installed = discover()
    for name in config.without:
        find(name, installed, origin=origins.of("without") or f"--no-plugin {name}")
    assembly = Assembly(origins)
    for name, options in config.plugins.items():
        assembly.add(find(name, installed, origin=origins.of(f"plugins.{name}") or f"--plugin {name}"), options)
    for hook, names in DEFAULT_PLUGINS.items():
        if hook in ONE_PROVIDER and assembly.providers(hook):
            continue
        for name in names:
            if name not in config.without and name not in config.plugins:
                assembly.add(find(name, installed), {})
    assembly.check()
    return assembly


# --- assemble: call each hook once -------------------------------------------------------------


class Assembly:
    """The active plugins of one run and the stages that their hooks fill.

    A fresh manager each: pluggy's `register` is not atomic, so one that failed is thrown away whole.
    """

    def __init__(self, origins: Origins) -> None:
        self._origins = origins
        self._manager = pluggy.PluginManager(PROJECT)
        self._manager.add_hookspecs(hookspecs)
        self._active: dict[str, Active] = {}

    def add(self, info: PluginInfo, options: Mapping[str, Any]) -> None:
        """Imports one plugin, gives it its options and registers its hooks. Raises PluginError, ConfigError."""
        cls = load_class(info)
        hooks_of(info, cls)
        active = Active(info, instance(info, cls, options, self._origins))
        self._manager.register(active.plugin, info.name)
        self._active[info.name] = active

    def check(self) -> None:
        """Raises PluginError when two plugins fill a hook that takes one, or none fills one that is needed."""
        for hook in sorted(ONE_PROVIDER):
            providers = self.providers(hook)
            if len(providers) > 1:
                both = " and ".join(str(active.info) for active in providers)
                raise PluginError(f"{both} both fill {hook}, which takes one; leave one of them out")
            if not providers and hook in DEFAULT_PLUGINS:
                default = DEFAULT_PLUGINS[hook][0]
                raise PluginError(f"no plugin fills {hook}; name one with --plugin, by default it is {default!r}")

    @property
    def active(self) -> tuple[Active, ...]:
        return tuple(self._active.values())

    def providers(self, hook: str) -> list[Active]:
        """The plugins that fill `hook`, in the order in which they were named."""
        plugins = [impl.plugin for impl in getattr(self._manager.hook, hook).get_hookimpls()]
        return [active for active in self._active.values() if active.plugin in plugins]

    def table(self) -> tuple[Provider, ...]:
        """The assembled table: one line a stage and plugin."""
        return tuple(
            Provider(hook.removeprefix("sftx_"), a.info.name, a.info.package, a.info.version, a.options)
            for hook in RETURNS
            for a in self.providers(hook)
        )

    def parsers(self) -> dict[str, Parser]:
        return {a.info.name: cast(Parser, made) for a, made in self._call("sftx_parser")}

    def template(self, tokenizer: PreTrainedTokenizerBase) -> Template | None:
        return next((cast(Template, made) for _, made in self._call("sftx_template", tokenizer=tokenizer)), None)

    def collator(self, max_length: int) -> Collator:
        return next(cast(Collator, made) for _, made in self._call("sftx_collator", max_length=max_length))

    def loss(self) -> Loss:
        return next(cast(Loss, made) for _, made in self._call("sftx_loss"))

    def adapters(self, spec: ModelSpec) -> dict[str, Adapter]:
        return {a.info.name: cast(Adapter, made) for a, made in self._call("sftx_adapter", spec=spec)}

    def metrics(self) -> dict[str, Metric]:
        return {a.info.name: cast(Metric, made) for a, made in self._call("sftx_metric")}

    def observers(self, run: RunInfo) -> list[tuple[PluginInfo, Observer]]:
        return [(a.info, cast(Observer, made)) for a, made in self._call("sftx_observer", run=run)]

    def _call(self, hook: str, **arguments: Any) -> Iterator[tuple[Active, object]]:
        """What each provider returns. Not by pluggy's own call: that is last-in first-out and forgets who answered.

        Observers are guarded by who tells them: their errors stop no run.
        """
        for active in self.providers(hook):
            with named(str(active.info), hook):
                made = make(active.plugin, hook, **arguments)
            yield active, made if hook == "sftx_observer" else Guarded(str(active.info), hook, made)
