"""This module activates the plugins of one run and calls their hooks.

`activate` imports the plugins that the configuration names and adds the default ones; an `Assembly` holds them and
calls each hook once, when the run needs that stage.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pluggy

from sftx.assembly import hookspecs
from sftx.assembly.discovery import hooks_of, instance, load_class, options_of
from sftx.assembly.entry_points import PluginInfo, discover, find
from sftx.assembly.hookspecs import ONE_PROVIDER, PROJECT, RETURNS, VALIDATE
from sftx.assembly.peft_config import adapter_directory, as_saved
from sftx.assembly.stages.adapter_stage import AdapterStage, check_trainable
from sftx.assembly.stages.control_stage import ControlStage
from sftx.assembly.stages.data_stages import CollatorStage, ParserStage, RowSourceStage, TemplateStage
from sftx.assembly.stages.evaluation_stages import EvaluatorStage, MetricStage
from sftx.assembly.stages.exporter_stages import ExporterStage
from sftx.assembly.stages.loss_stage import LossStage
from sftx.assembly.stages.optimizer_stages import OptimizerStage, ScheduleStage
from sftx.assembly.stages.rollout_stages import RewardStage, RolloutStage
from sftx.assembly.stages.stage import call, make, named
from sftx.config.default_plugins import DEFAULT_PLUGINS, SOURCES
from sftx.config.named_plugins import PLUGIN_OPTIONS, PluginOption
from sftx.config.options import RunConfig, TrainConfig, as_dict
from sftx.config.unknown_options import UnknownOptionsError
from sftx.errors import ConfigError, PluginError, did_you_mean
from sftx.events import Provider, RunInfo
from sftx.secret import Secret
from sftx.types import ModelSpec, Observer

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from sftx.config.loading import LoadedConfig
    from sftx.config.run_file import Origins


def activate(loaded: LoadedConfig) -> Assembly:
    """Return the plugins of a run: the named ones in their order, then a default one for each hook left unfilled.

    Raises PluginError and ConfigError.
    """
    config, origins = loaded.config, loaded.origins
    installed = discover()
    for name in config.without:
        find(name, installed, origin=origins.of(f"without.{name}") or f"--no-plugin {name}")
    assembly = Assembly(origins)
    wrong: list[UnknownOptionsError] = []
    for name, options in config.plugins.items():
        info = find(name, installed, origin=origins.of(f"plugins.{name}") or f"--plugin {name}")
        try:
            assembly.add(info, options)
        except UnknownOptionsError as error:
            wrong.append(error)
    if wrong:
        raise (
            wrong[0]
            if len(wrong) == 1
            else UnknownOptionsError([option for error in wrong for option in error.unknown])
        )
    train = config.train
    if train.early_stopping_patience is not None and "early-stopping" not in config.plugins:
        options = {"patience": train.early_stopping_patience, "threshold": train.early_stopping_threshold}
        assembly.add(find("early-stopping", installed), options, is_implied=True)
    for option in PLUGIN_OPTIONS:
        assembly.choose(option, config, installed)
    schemes = {source.scheme for source in (*config.data.train, *config.data.eval)}
    for name in SOURCES:
        if name in schemes and name not in config.without and name not in config.plugins:
            assembly.add(find(name, installed), {})
    for hook, names in DEFAULT_PLUGINS.items():
        if hook in ONE_PROVIDER and assembly.providers(hook):
            continue
        for name in names:
            if name not in config.without and name not in config.plugins:
                assembly.add(find(name, installed), {})
    assembly.check()
    for option in PLUGIN_OPTIONS:
        assembly.check_partial_options(option, config.train, installed)
    assembly.run = RunInfo(Path(config.output_dir or "."), assembly.resolved(config))
    assembly.validate()
    return assembly


def exporter(name: str, options: Mapping[str, Any], origins: Origins, run: RunInfo) -> ExporterStage:
    """Return the exporter of the installed plugin `name`. Raises PluginError, also when it exports nothing."""
    assembly, installed = Assembly(origins), discover()
    if all(info.name != name for info in installed):
        known = _exporters(installed)
        raise PluginError(
            f"--to {name or repr(name)}: no plugin of this name is installed"
            + (did_you_mean(name, known) or f"; exporters are {', '.join(known)}")
        )
    assembly.add(find(name, installed, origin=f"--to {name}"), options)
    assembly.run = run
    assembly.validate()
    exporters = assembly.exporters()
    if not exporters:
        known = _exporters(installed)
        raise PluginError(f"--to {name}: {assembly.active[0].info} is no exporter; exporters are {', '.join(known)}")
    return exporters[name]


def _exporters(installed: Sequence[PluginInfo]) -> list[str]:
    """Return the names of the exporters, for an error. Of sftx's own plugins none is imported: some need torch."""
    own = [info.name for info in installed if info.value.startswith("sftx_plugins.exporters.")]
    return sorted([*own, *_others("sftx_exporter", installed)])


@dataclass(frozen=True, eq=False)
class Active:
    """A plugin of this run: its entry point, and the instance that holds its options."""

    info: PluginInfo
    plugin: Any
    is_implied: bool = False
    """Whether an option of the run has added it, which the run file records in its place."""

    @property
    def options(self) -> dict[str, Any]:
        return options_of(self.plugin)


class Assembly:
    """The active plugins of one run, from which the stages of the run are made.

    Each assembly has its own plugin manager: `register` of pluggy is not atomic, so a manager in which it failed
    cannot be used any more. pluggy registers the plugins and validates their signatures; the hooks are called by
    `_call`, because pluggy calls the last plugin first and returns a list that does not say which plugin returned what.
    """

    def __init__(self, origins: Origins) -> None:
        self._origins = origins
        self._manager = pluggy.PluginManager(PROJECT)
        self._manager.add_hookspecs(hookspecs)
        self._active: dict[str, Active] = {}
        self._chosen: dict[str, Any] = {}
        self.run = RunInfo(Path(), {})
        """What hooks are told of the run."""

    def add(self, info: PluginInfo, options: Mapping[str, Any], *, is_implied: bool = False) -> None:
        """Import a plugin, make an instance with these options, and register it. Raises PluginError, ConfigError."""
        cls = load_class(info)
        hooks_of(info, cls)
        active = Active(info, instance(info, cls, options, self._origins), is_implied)
        self._manager.register(active.plugin, info.name)
        self._active[info.name] = active

    def choose(self, option: PluginOption, config: RunConfig, installed: Sequence[PluginInfo]) -> None:
        """Add the plugin that the option names, unless one for its hook is there. Raises ConfigError, PluginError.

        A plugin that is named takes the place of the option's default.
        """
        value, default = getattr(config.train, option.name), TrainConfig.__dataclass_fields__[option.name].default
        dotted = f"train.{option.name}"
        is_given = value != default or self._origins.has(dotted)
        origin = self._origins.of(dotted) if is_given else ""
        start = f"{origin}: option {dotted!r}" if origin else f"option {dotted!r}"
        names = {info.name for info in installed}
        name = next((name for name in option.plugins(value) if name in names), None)
        if name is None and value in option.built_in:  # the installed metadata are those of an older sftx
            find(option.plugins(value)[0], installed, origin=origin)
        if name is None:
            known = [*option.built_in, *_others(option.hook, installed)]
            raise ConfigError(
                f"{start}: got {json.dumps(value)}, expected {', '.join(map(repr, known))}, or another plugin "
                f"that implements {option.hook}{did_you_mean(value, known)}"
            )
        if providers := self.providers(option.hook):
            other = providers[0].info
            if is_given and len(providers) == 1 and other.name != name:
                raise ConfigError(f"{start}: is {value!r}, and {other} is named too; leave one of them out")
            self._chosen[option.name] = value if other.name == name else other.name
            return
        if name in config.without:
            raise ConfigError(f"{start}: is {value!r}, which --no-plugin {name} leaves out; name another one")
        info = find(name, installed, origin=origin)
        if name not in self._active:
            # One with options of its own stands in the run file with them.
            self.add(info, {}, is_implied=not dataclasses.fields(load_class(info)))
        if not self.providers(option.hook):
            raise ConfigError(f"{start}: {info} does not implement {option.hook}")
        self._chosen[option.name] = value

    def check_partial_options(self, option: PluginOption, train: TrainConfig, installed: Sequence[PluginInfo]) -> None:
        """Raise ConfigError for an option that the chosen plugin does not read, and others of its hook do."""
        (active,) = self.providers(option.hook)
        reads = _train_options(active.info, type(active.plugin))
        for name in option.partial:
            if getattr(train, name) != TrainConfig.__dataclass_fields__[name].default and name not in reads:
                origin, value = self._origins.of(f"train.{name}"), self._chosen[option.name]
                infos = {choice: find(option.plugins(choice)[0], installed) for choice in option.built_in}
                others = [choice for choice, info in infos.items() if name in _train_options(info, load_class(info))]
                raise ConfigError(
                    f"{origin + ': ' if origin else ''}option 'train.{name}': {option.name} {value} has "
                    f"none; leave it out, or choose {' or '.join(others)}"
                )

    def complete(self, config: RunConfig) -> RunConfig:
        """Return the options with the names of the plugins that were chosen in their place."""
        return dataclasses.replace(config, train=dataclasses.replace(config.train, **self._chosen))

    def check(self) -> None:
        """Raise PluginError for plugins that exclude one another, and when none implements a required hook."""
        chosen, adapters = self.providers("sftx_trainable"), self.providers("sftx_adapter")
        if chosen and adapters:
            raise PluginError(
                f"{chosen[0].info} trains weights of the model, and {adapters[0].info} freezes them all; leave one out"
            )
        rewards, rollouts = self.providers("sftx_reward"), self.providers("sftx_rollout")
        if rewards and not rollouts:
            raise PluginError(
                f"{rewards[0].info} scores answers of the model, and no plugin of this run makes any; add one that "
                "implements sftx_rollout, such as --plugin grpo"
            )
        for active in self.providers("sftx_exporter"):
            if not self.has_other_hooks(active.info.name, "sftx_exporter"):
                raise PluginError(
                    f"{active.info} has no part in a run: it writes a result in another form; leave it out, and write "
                    f"`sftx export RUN --to {active.info.name}` afterwards"
                )
        for hook in sorted(ONE_PROVIDER):
            providers = self.providers(hook)
            if len(providers) > 1:
                names = " and ".join(str(active.info) for active in providers)
                raise PluginError(f"{names} both implement {hook}, which takes one; leave one of them out")
            if not providers and hook in DEFAULT_PLUGINS:
                default = DEFAULT_PLUGINS[hook][0]
                raise PluginError(f"no plugin implements {hook}; name one with --plugin, by default it is {default!r}")

    def resolved(self, config: RunConfig) -> dict[str, Any]:
        """Return the run file with every default and every plugin's options written out, as JSON values."""
        plugins = {active.info.name: active.options for active in self.active if not active.is_implied}
        return as_dict(self.complete(config)) | {"plugins": plugins}

    def validate(self) -> None:
        """Let each plugin refuse the options of the run. Raises ConfigError."""
        for active in self.providers(VALIDATE):
            with named(str(active.info), VALIDATE):
                call(active.plugin, VALIDATE, run=self.run)

    def check_secrets(self) -> None:
        """Raise ConfigError for a secret whose environment variable is not set, or of which only the mask is known."""
        for active in self.active:
            for field in dataclasses.fields(active.plugin):
                if isinstance(value := getattr(active.plugin, field.name), Secret):
                    try:
                        value.reveal()
                    except ConfigError as error:
                        origin = self._origins.of(f"plugins.{active.info.name}.{field.name}")
                        start = f"{origin}: " if origin else ""
                        raise ConfigError(f"{start}{active.info}: option {field.name!r}: {error}") from None

    @property
    def active(self) -> tuple[Active, ...]:
        return tuple(self._active.values())

    def providers(self, hook: str) -> list[Active]:
        """Return the plugins that implement `hook`, in the order in which they were named."""
        names = {implementation.plugin_name for implementation in getattr(self._manager.hook, hook).get_hookimpls()}
        return [active for name, active in self._active.items() if name in names]

    def has_other_hooks(self, plugin: str, hook: str) -> bool:
        """Return whether this plugin of the run implements a stage besides that of `hook`."""
        active = self._active[plugin]
        return hooks_of(active.info, type(active.plugin)) != [hook]

    def table(self) -> tuple[Provider, ...]:
        """Return one entry for each stage and plugin, in the order of the stages."""
        return tuple(
            Provider(hook.removeprefix("sftx_"), a.info.name, a.info.package, a.info.version, a.options)
            for hook in RETURNS
            for a in self.providers(hook)
        )

    @cached_property
    def row_sources(self) -> dict[str, RowSourceStage]:
        """The sources by scheme, made once. Raises PluginError when two plugins have the same scheme."""
        stages: dict[str, RowSourceStage] = {}
        for a, made in self._call("sftx_source"):
            stage = RowSourceStage(str(a.info), made)
            if (other := stages.setdefault(stage.scheme, stage)) is not stage:
                raise PluginError(f"{other} and {stage} both read {stage.scheme}:...; leave one of them out")
        return stages

    def parsers(self) -> dict[str, ParserStage]:
        return {a.info.name: ParserStage(str(a.info), made) for a, made in self._call("sftx_parser")}

    def template(self, tokenizer: PreTrainedTokenizerBase) -> TemplateStage | None:
        made = [TemplateStage(str(a.info), made) for a, made in self._call("sftx_template", tokenizer=tokenizer)]
        return made[0] if made else None

    def collator(self, max_length: int) -> CollatorStage:
        return next(CollatorStage(str(a.info), made) for a, made in self._call("sftx_collator", max_length=max_length))

    def loss(self) -> LossStage:
        return next(LossStage(str(a.info), made) for a, made in self._call("sftx_loss"))

    def rollout(self) -> RolloutStage | None:
        """Return the rollout; None for a run that trains on its rows. Raises ConfigError for unknown rewards."""
        for active, made in self._call("sftx_rollout"):
            stage = RolloutStage(str(active.info), made)
            rewards = [reward.info.name for reward in self.providers("sftx_reward")]
            if stage.needs_reward and not rewards:
                raise ConfigError(
                    f"{stage}: no plugin scores the answers; add a reward, such as --plugin reward-exact-match or "
                    "reward-function"
                )
            for name in stage.reward_weights:
                if name not in rewards:
                    hint = did_you_mean(name, rewards) or f"; it has {', '.join(rewards) or 'none'}"
                    raise ConfigError(f"{stage}: option 'reward_weights': no reward {name!r} in this run{hint}")
            return stage
        return None

    def rewards(self) -> dict[str, RewardStage]:
        return {a.info.name: RewardStage(str(a.info), made) for a, made in self._call("sftx_reward")}

    def adapters(self, spec: ModelSpec, saved: Path | None = None) -> dict[str, AdapterStage]:
        """Return the adapters of a model by the names of their plugins.

        `saved`: an artefact or a checkpoint from which they are loaded afterwards.
        """
        providers, stages = self.providers("sftx_adapter"), {}
        for active in providers:
            plugin, name = active.plugin, active.info.name
            if saved is not None:
                plugin = as_saved(plugin, adapter_directory(saved, name, num_adapters=len(providers)))
            with named(str(active.info), "sftx_adapter"):
                made = make(plugin, "sftx_adapter", run=self.run, spec=spec)
            stages[name] = AdapterStage(str(active.info), made)
        return stages

    def trainable(self, spec: ModelSpec) -> frozenset[str] | None:
        """Return the names of the model's parameters that train; None when no plugin chooses some."""
        for active, names in self._call("sftx_trainable", spec=spec):
            with named(str(active.info), "sftx_trainable"):
                return check_trainable(names, spec)
        return None

    def optimizer(self) -> OptimizerStage:
        return next(OptimizerStage(str(a.info), made, a.info.name) for a, made in self._call("sftx_optimizer"))

    def schedule(self, num_warmup_steps: int, num_training_steps: int) -> ScheduleStage:
        """Return the schedule of a run of so many optimizer steps in all."""
        given = {"num_warmup_steps": num_warmup_steps, "num_training_steps": num_training_steps}
        return next(ScheduleStage(str(a.info), made) for a, made in self._call("sftx_schedule", **given))

    def metrics(self) -> dict[str, MetricStage]:
        return {a.info.name: MetricStage(str(a.info), made, a.info.name) for a, made in self._call("sftx_metric")}

    def evaluators(self) -> dict[str, EvaluatorStage]:
        return {a.info.name: EvaluatorStage(str(a.info), made) for a, made in self._call("sftx_evaluator")}

    def controls(self) -> dict[str, ControlStage]:
        return {a.info.name: ControlStage(str(a.info), made) for a, made in self._call("sftx_control")}

    def exporters(self) -> dict[str, ExporterStage]:
        return {a.info.name: ExporterStage(str(a.info), made) for a, made in self._call("sftx_exporter")}

    def observers(self) -> list[tuple[PluginInfo, Observer]]:
        """Return the observers without a wrapper: the trainer catches their errors, which stop no run."""
        return [(a.info, made) for a, made in self._call("sftx_observer")]

    def _call(self, hook: str, **arguments: Any) -> Iterator[tuple[Active, Any]]:
        """Call `hook` of each plugin that implements it, in the order of naming; yield the plugin and its result."""
        for active in self.providers(hook):
            with named(str(active.info), hook):
                made = make(active.plugin, hook, run=self.run, **arguments)
            yield active, made


def _others(hook: str, installed: Sequence[PluginInfo]) -> list[str]:
    """Return the names of other distributions' plugins for the hook, which are imported: an error needs it."""
    names = []
    for info in installed:
        with contextlib.suppress(PluginError):
            if info.package != PROJECT and hook in hooks_of(info, load_class(info)):
                names.append(info.name)
    return names


def _train_options(info: PluginInfo, cls: type) -> Sequence[str]:
    """Return the options of train that a plugin's class says it reads. Raises PluginError for one that is none."""
    names: Any = getattr(cls, "train_options", ())
    known = TrainConfig.__dataclass_fields__
    if not isinstance(names, list | tuple) or not all(name in known for name in names):
        raise PluginError(f"{info}: train_options is {names!r:.80}, expected a tuple of names of options of train")
    return names
