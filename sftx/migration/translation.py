"""Says what each option that was read becomes here, and what the other tool does without being asked."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Final

from sftx.config import other_tools
from sftx.config.options import SECTION_CLASSES, RunConfig
from sftx.config.other_tools import EACH_SOURCE, TOOLS, Answer
from sftx.config.other_tools.datasets import OF_EACH_SOURCE, first_row
from sftx.config.run_file import flow
from sftx.migration.reading import Reading

PluginClass = Callable[[str], type | None]
"""Returns the options dataclass of an installed plugin."""

_SPLIT: Final = ("train.train_batch_size", "train.gradient_accumulation_steps", "train.per_device_train_batch_size")


_NEEDED: Final = ("stage", "rl", "rlhf_type", "model", "data.train")
"""Without these a run trains something else than was meant."""


@dataclass
class Written:
    """An option of the run file."""

    value: Any
    comments: list[str] = field(default_factory=list)


def of_plugin(target: str, value: Any) -> tuple[str, str]:
    """Return the plugin and the option of `plugins.qwen2.5.default_system`; the option is empty for `plugins.x: {}`."""
    name = target.removeprefix("plugins.")
    plugin, _, option = (name, "", "") if value == {} else name.rpartition(".")
    return plugin, option


@dataclass(frozen=True)
class Lost:
    """An option that is not carried over."""

    name: str
    place: str
    advice: str


@dataclass
class Translation:
    """A run file, and what is to be said about it."""

    reading: Reading
    written: dict[str, Written] = field(default_factory=dict)
    """By dotted names; `plugins.packed` with {} adds a plugin."""
    carried: list[str] = field(default_factory=list)
    """Options of the other tool that are in the run file, or whose value is the default here."""
    lost: list[Lost] = field(default_factory=list)
    not_needed: dict[str, list[str]] = field(default_factory=dict)
    """Options that ask for nothing here, by the reason."""

    @property
    def sections(self) -> dict[str, Any]:
        """The options as nested mappings, of which the innermost values are Written; a plugin alone is {}."""
        nested: dict[str, Any] = {}
        for target, written in self.written.items():
            if not target.startswith("plugins."):
                section, _, option = target.partition(".")
                if option:
                    nested.setdefault(section, {})[option] = written
                else:
                    nested[section] = written
                continue
            plugin, option = of_plugin(target, written.value)
            options = nested.setdefault("plugins", {}).setdefault(plugin, {})
            options[option] = written
        return nested

    @property
    def problem(self) -> str:
        """Return what keeps the run file from meaning anything yet; an empty text if nothing does."""
        found = (lost for lost in self.lost if lost.name.partition(":")[0] in _NEEDED)
        return next((f"{lost.name}: {lost.advice}" for lost in found), "")

    @property
    def title(self) -> str:
        return TOOLS[self.reading.tool].title


def translate(reading: Reading, plugin_class: PluginClass) -> Translation:
    """Return the run file of what was read."""
    return _Translator(reading, plugin_class).run()


class _Translator:
    def __init__(self, reading: Reading, plugin_class: PluginClass) -> None:
        self._reading = reading
        self._tool = TOOLS[reading.tool]
        self._plugin_class = plugin_class
        self._to = Translation(reading)
        self._given = {name: option.value for name, option in reading.options.items()}
        self._for_sources: dict[str, Written] = {}
        if reading.tool == "trl":
            self._given["rows"] = self._rows()

    def _rows(self) -> str | None:
        """Return what the rows of a local file hold, as TRL tells them apart; None if it cannot be looked at."""
        entries = self._given.get("datasets")
        entry = entries[0] if isinstance(entries, list) and entries and isinstance(entries[0], dict) else {}
        path = self._given.get("dataset_name") or entry.get("data_files") or entry.get("path")
        row = first_row(path[0] if isinstance(path, list) and path else str(path or ""))
        if "prompt" in row:
            return "prompt" if isinstance(row["prompt"], str) else "turns"
        return next((name for name in ("messages", "conversations", "text") if name in row), None)

    def run(self) -> Translation:
        for name, place, advice in self._reading.lost:
            self._to.lost.append(Lost(name, place, advice))
        for option in self._reading.options.values():
            self._option(option.name, option.value, option.place)
        self._defaults()
        self._without_effect()
        self._sources()
        self._missing()
        self._drop_defaults()
        return self._to

    def _answer(self, name: str, value: Any) -> Answer | None:
        found = None
        if name.startswith("axolotl."):
            found = other_tools.answer(name, value, self._given, tool=self._reading.tool)
        return found or other_tools.answer(name.replace("-", "_"), value, self._given, tool=self._reading.tool)

    def _option(self, name: str, value: Any, place: str) -> None:
        if name == "plugins" and isinstance(value, list):
            for plugin in value:
                self._option(str(plugin), True, place)
            return
        answer = self._answer(name, value)
        if answer is None and _is_ours(name):
            answer = Answer("write", {name: value})
        if answer is None:
            advice = (
                "there is nothing like it here; `sftx run --help` lists the options"
                if value not in (None, False, "", [], {})
                else None
            )
            if advice:
                self._to.lost.append(Lost(name, place, advice))
            return
        if answer.why == OF_EACH_SOURCE:
            self._to.carried.append(name)
            return
        if answer.kind == "leave out":
            if name not in self._reading.implied:
                self._to.not_needed.setdefault(answer.why, []).append(name)
            return
        if answer.kind == "not here":
            self._to.lost.append(Lost(f"{name}: {_short(value)}", place, answer.why))
            return
        for target, setting in answer.write.items():
            is_short = (
                setting == value or isinstance(value, dict) or (isinstance(value, list) and len(flow(value)) > 60)
            )
            said = f"{name}: {_short(value)}" if not is_short else name if target.rpartition(".")[2] != name else ""
            self._write(target, setting, [said, answer.why], name, place)
        self._to.lost += [
            Lost(f"{name}: {text.partition(': ')[0]}", place, text.partition(": ")[2]) for text in answer.lost
        ]
        if name not in self._reading.implied:
            self._to.carried.append(name)

    def _write(self, target: str, value: Any, comments: list[str], name: str, place: str) -> None:
        comments = [text for text in comments if text]
        if target.startswith(EACH_SOURCE):
            self._for_sources[target.removeprefix(EACH_SOURCE)] = Written(value, comments)
            return
        before = self._to.written.get(target)
        if before is None:
            self._to.written[target] = Written(value, comments)
        elif value in ({}, before.value) or before.value == {}:
            before.value = before.value if value == {} else value
            before.comments += [text for text in comments if text not in before.comments]
        else:
            self._to.lost.append(
                Lost(
                    f"{name}: {_short(value)}",
                    place,
                    f"{target} has {_short(before.value)} of another option; choose one",
                )
            )

    def _defaults(self) -> None:
        """Write out what the tool does without being asked."""
        of = f"{self._tool.title}'s default"
        for default in self._tool.defaults:
            names = [default.option, *self._same(default.option)]
            if any(self._given.get(name) is not None for name in names) or not default.when(self._given):
                continue
            answer = self._answer(default.option, default.value)
            if answer is not None and answer.kind == "not here":
                self._to.lost.append(Lost(f"{default.option}: {_short(default.value)}", of, answer.why))
            for target, value in (answer.write if answer is not None else {}).items():
                if self._unsaid(target):
                    self._to.written[target] = Written(value, [of])
        for habit in self._tool.habits:
            if any(self._given.get(name) is not None for name in habit.unless) or not habit.when(self._given):
                continue
            for target, value in habit.write.items():
                target = (
                    target.replace("plugins.lora", "plugins.qlora") if other_tools.is_quantized(self._given) else target
                )
                if self._unsaid(target) and not (value == {} and self._has_template()):
                    self._to.written[target] = Written(value, [habit.why])

    def _unsaid(self, target: str) -> bool:
        """Return whether no option was given for a target, or for the number of steps where it is that of epochs."""
        is_within = any(name == target or name.startswith(f"{target}.") for name in self._to.written)
        has_batch = target == "train.train_batch_size" and "train.gradient_accumulation_steps" in self._to.written
        has_steps = target == "train.num_train_epochs" and "train.max_steps" in self._to.written
        return not (is_within or has_steps or has_batch)

    def _has_template(self) -> bool:
        """Return whether a plugin of the run is a template."""
        names = {of_plugin(name, w.value)[0] for name, w in self._to.written.items() if name.startswith("plugins.")}
        return any(hasattr(self._plugin_class(name), "sftx_template") for name in names)

    def _same(self, option: str) -> list[str]:
        """Other names of an option in the same row."""
        rows = [*self._tool.rows, *(row for rows in other_tools.TABLE.values() for row in rows)]
        found = next((row.names for row in rows if option in row.names), ())
        return [name for name in found if "*" not in name]

    def _without_effect(self) -> None:
        """Options of LoRA that the other tool does not read, as it trains no adapter."""
        if self._tool.trains_lora(self._given):
            for name in ("plugins.lora", "plugins.qlora"):
                if other_tools.is_quantized(self._given) == (name == "plugins.qlora") and self._unsaid(name):
                    self._to.written[name] = Written({})
            if other_tools.is_quantized(self._given):
                self._to.written = {k: v for k, v in self._to.written.items() if not k.startswith("plugins.lora")}
            return
        dropped = [name for name in self._to.written if f"{name}.".startswith(("plugins.lora.", "plugins.qlora."))]
        for name in dropped:
            del self._to.written[name]
        if dropped:
            options = [name.rpartition(".")[2] for name in dropped if name.count(".") > 1]
            self._to.not_needed.setdefault("no adapter is trained", []).extend(options)

    def _sources(self) -> None:
        """Give every source what other options say of each."""
        train = self._to.written.get("data.train")
        if not self._for_sources:
            return
        if train is None:
            for name, written in self._for_sources.items():
                self._to.lost.append(
                    Lost(name, "", f"write {name}: {_short(written.value)} to each source of data.train")
                )
            return
        entries = [entry if isinstance(entry, dict) else {"path": entry} for entry in train.value]
        train.value = [{**{name: w.value for name, w in self._for_sources.items()}, **entry} for entry in entries]
        train.value = [{"path": entry["path"], **entry} for entry in train.value]

    def _missing(self) -> None:
        """Say so where there is no model or no data: sftx would take those of its demo."""
        if "model" not in self._to.written:
            self._to.lost.append(Lost("model", "", "no model is named; write `model:` with its directory or hub id"))
        if "data.train" not in self._to.written:
            self._to.lost.append(Lost("data.train", "", "no data is named; write the paths of the files"))

    def _drop_defaults(self) -> None:
        """Leave out what is the default here anyway; a plugin whose options all are stays as `lora: {}`."""
        kept: dict[str, Written] = {}
        for target, written in self._to.written.items():
            if target.startswith("plugins."):
                plugin, option = of_plugin(target, written.value)
                default = _default(self._plugin_class(plugin), option) if option else _NONE
                kept.setdefault(f"plugins.{plugin}", Written({}))
            else:
                section, _, option = target.partition(".")
                cls = SECTION_CLASSES.get(section) if option else RunConfig
                default = _default(cls, option or section)
            is_default = default is not _NONE and _plain(written.value) == _plain(default)
            if not is_default or target in _SPLIT:
                kept[target] = written
        self._to.written = dict(sorted(kept.items(), key=lambda item: self._place(item[0])))

    def _place(self, target: str) -> tuple[int, ...]:
        """Return where an option stands in a run file: in the order of its section, plugins by what they are."""
        section, _, rest = target.partition(".")
        if section == "plugins":
            cls = self._plugin_class(
                of_plugin(target, self._to.written[target].value)[0] if target in self._to.written else rest
            )
            return (next((n for n, hook in enumerate(_HOOKS) if hasattr(cls, hook)), len(_HOOKS)),)
        names = [field.name for field in dataclasses.fields(SECTION_CLASSES[section] if rest else RunConfig)]
        name = rest.partition(".")[0] or section
        return (names.index(name) if name in names else len(names),)


_HOOKS: Final = ("sftx_template", "sftx_adapter", "sftx_trainable", "sftx_loss", "sftx_collator", "sftx_parser")
"""The stages of a run, in the order in which a run file names the plugins for them."""
_NONE: Final = object()


def _default(cls: Any, option: str) -> Any:
    """The default of an option, _NONE where it has none."""
    if cls is None or "." in option:
        return _NONE
    found = next((field for field in dataclasses.fields(cls) if field.name == option), None)
    if found is None:
        return _NONE
    if found.default_factory is not dataclasses.MISSING:
        return found.default_factory()
    return _NONE if found.default is dataclasses.MISSING else found.default


def _plain(value: Any) -> Any:
    if isinstance(value, bool):
        return ("bool", value)
    if isinstance(value, int | float):
        return float(value)
    return list(value) if isinstance(value, tuple) else value


def _is_ours(name: str) -> bool:
    """Return whether an option of another tool has the name of one at the top of a run file."""
    return name in {field.name for field in dataclasses.fields(RunConfig)} - {"data", "plugins", "train", "generation"}


def _short(value: Any) -> str:
    text = flow(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
