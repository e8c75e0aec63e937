"""Answers options that sftx does not have: all of them in one error that says for each what to write instead."""

from __future__ import annotations

import difflib
import importlib.metadata
import logging
import re
import shlex
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Any, Final

from sftx.config import run_file
from sftx.config.default_plugins import ENTRY_POINTS
from sftx.errors import ConfigError, one_line

if TYPE_CHECKING:
    from sftx.config.other_tools import Answer

log = logging.getLogger(__name__)

_FILE_LINE: Final = re.compile(r"(.+):\d+")
_MAX_LINES: Final = 200
"""The most options that one error lists: a file with more that do not exist is no run file."""


@dataclass(frozen=True)
class UnknownOption:
    """An option that does not exist here."""

    name: str
    """The dotted name, as in `train.max_length`."""
    value: Any
    place: str
    """The line of the run file, or what the user typed: an option, `argument lr=1`, or a keyword of Python."""
    known: tuple[str, ...]
    """The options that exist where this one stands."""
    answer: Answer | None = None

    @property
    def leaf(self) -> str:
        return self.name.rpartition(".")[2]

    @property
    def is_typed(self) -> bool:
        return self.place.startswith(("--", "argument "))

    @property
    def is_keyword(self) -> bool:
        return re.match(r"[\w\[\]'\"]+=", self.place) is not None

    @property
    def is_flag(self) -> bool:
        return self.is_typed and not self.place.startswith("--set ")

    def title(self) -> str:
        """Return where the option stands and its name, or what was typed."""
        title = self.place if self.is_typed or self.is_keyword else f"{self.place}: {self.name}".removeprefix(": ")
        return one_line(ConfigError(title), max_chars=200)

    def to_write(self) -> list[str]:
        """Return what to write instead, one text for each option: a line of a run file, flags, or a Python keyword."""
        options = self.answer.write if self.answer else {}
        text = _flag if self.is_typed else _keyword if self.is_keyword else _line
        return [text(name, value) for name, value in options.items()]

    def advice(self, *, alone: bool = True) -> str:
        """Return the sentence after the option. One that stands alone, not in a list, also gets a list of names."""
        if self.answer is None:
            return self._guess(alone=alone)
        why = self.answer.why
        if self.answer.kind == "write":
            why = "; ".join([why] * bool(why) + [f"not carried over: {text}" for text in self.answer.lost])
            return f"write {' and '.join(self.to_write())}{f' ({why})' if why else ''}"
        return f"leave it out: {why}" if why else "leave it out"

    def _guess(self, *, alone: bool) -> str:
        from sftx.config import other_tools
        from sftx.config.launch_options import launch_names
        from sftx.config.options import SECTION_CLASSES, flag

        own = [f"{section}.{field.name}" for section, cls in SECTION_CLASSES.items() for field in fields(cls)]
        is_of_launch = self.name.startswith("launch.")
        if is_of_launch:
            own = launch_names()
        by_name = {name.rpartition(".")[2]: name for name in own} | {name: name for name in self.known}
        beside = difflib.get_close_matches(self.leaf, self.known, n=1)
        close = difflib.get_close_matches(self.leaf, {**dict.fromkeys(beside), **by_name}, n=1, cutoff=0.7) or beside
        is_a_plugins = self.name.startswith("plugins.") and bool(beside)
        theirs = (
            []
            if is_a_plugins or is_of_launch
            else difflib.get_close_matches(self.leaf, other_tools.names(), n=1, cutoff=0.85)
        )
        if theirs and close:
            close = difflib.get_close_matches(self.leaf, [*close, *theirs], n=1)
        close = close or theirs
        if close and close[0] in by_name:
            name = by_name[close[0]]
            if self.is_flag and "." in name:
                return f"did you mean {flag(name)}?"
            return f"did you mean {name.rpartition('.')[2] if self.is_keyword else name!r}?"
        if close:
            meant = replace(self, answer=other_tools.answer(close[0], self.value, {}))
            return f"did you mean {close[0]!r}? {meant.advice()}"
        if self.is_flag:
            return "see --help"
        if not alone:
            return "there is nothing like it"
        return f"known are {', '.join(self.known)}" if self.known else "it takes none"


class UnknownOptionsError(ConfigError):
    """Options that do not exist here, with what to write instead of each. Several are a list, one to a line."""

    def __init__(self, unknown: Sequence[UnknownOption], start: str = "") -> None:
        """`unknown` have been answered; `start` is the plugin whose options they are, if it is one's."""
        self.unknown = list(unknown)
        self._start = start
        if all(option.is_flag for option in self.unknown):
            self.exit_code = 2  # as for any command line that is not valid
        super().__init__("\n".join(self._lines()))

    def _lines(self) -> list[str]:
        wrong = [option for option in self.unknown if not is_harmless(option)]
        if len(wrong) == 1:
            (option,) = wrong
            where = [part for part in (option.place, self._start) if part]
            name = option.name.removeprefix("plugins.") if not self._start else option.leaf
            text = ": ".join([*where, f"option {name!r} does not exist; {option.advice()}"])
            return [one_line(ConfigError(text), max_chars=2000)]
        lines = [f"{len(wrong)} options do not exist here; {self._migrating()}what to write instead of each:"]
        written: dict[str, tuple[str, Any]] = {}
        for number, option in enumerate(wrong):
            if number == _MAX_LINES:
                lines.append(f"  and {len(wrong) - number} more")
                break
            if option.answer is not None and option.answer.kind == "write":
                # What two options ask for is written once, where the first of them stands.
                new = {name: value for name, value in option.answer.write.items() if name not in written}
                if not new:
                    said_by = next(written[name][0] for name in option.answer.write)
                    is_same = all(written[name][1] == value for name, value in option.answer.write.items())
                    says = f"{said_by} says it" if is_same else f"it contradicts {said_by}, which says another value"
                    lines.append(f"  {option.title()}: leave it out: {says}")
                    continue
                written |= {name: (option.leaf, value) for name, value in new.items()}
                option = replace(option, answer=replace(option.answer, write=new))
            lines.append(f"  {option.title()}: {one_line(ConfigError(option.advice(alone=False)), max_chars=600)}")
        if harmless := [option.leaf for option in self.unknown if is_harmless(option)]:
            lines.append(f"  these may stay, as they ask for nothing here: {', '.join(harmless)}")
        return lines

    def _migrating(self) -> str:
        """Return a hint for a file of another tool: options at its top that the table knows."""
        theirs = [option for option in self.unknown if "." not in option.name and option.answer is not None]
        files = {found[1] for option in theirs if (found := _FILE_LINE.fullmatch(option.place))}
        if len(theirs) < 3 or len(files) != 1:
            return ""
        return f"`sftx migrate {shlex.quote(files.pop())}` writes a run file that says the same; "


def is_harmless(option: UnknownOption) -> bool:
    return option.answer is not None and option.answer.kind == "leave out"


def answered(unknown: Iterable[UnknownOption], given: Mapping[str, Any]) -> list[UnknownOption]:
    """Return the options with their answers. `given` are all options beside them, by their dotted names."""
    from sftx.config import other_tools

    found = list(unknown)
    beside = {**given, **{option.leaf: option.value for option in found}}
    plugins = _plugin_names()
    answers = []
    for option in found:
        # The plugins of Axolotl have names with dots, the names of all other options are what follows the last one.
        made = other_tools.answer(option.name, option.value, beside) if option.name.startswith("axolotl.") else None
        made = made or other_tools.answer(option.leaf.replace("-", "_"), option.value, beside)
        if made is None and option.leaf in plugins and "." not in option.name:
            options = option.value if isinstance(option.value, dict) else {}
            made = other_tools.Answer("write", {f"plugins.{option.leaf}": options}, "plugins stand under `plugins:`")
        is_plugins = option.name.startswith("plugins.")
        if is_plugins and made is not None and _is_elsewhere(made, option) and _near(option.leaf, option.known):
            made = None  # a slip in the name of the plugin's own option is likelier than an option of another tool
        answers.append(replace(option, answer=made))
    return answers


def _is_elsewhere(made: Answer, option: UnknownOption) -> bool:
    """Return whether the answer is about no option here, or about those of other plugins alone."""
    own = option.name.rpartition(".")[0]
    is_others = all(name.startswith("plugins.") and name.rpartition(".")[0] != own for name in made.write)
    return made.kind != "leave out" and is_others


def _near(name: str, known: Sequence[str]) -> bool:
    return bool(difflib.get_close_matches(name, known, n=1))


def _plugin_names() -> set[str]:
    return {entry.name for entry in importlib.metadata.entry_points(group=ENTRY_POINTS)}


def expanded(option: UnknownOption, origins: run_file.Origins) -> list[UnknownOption]:
    """Return the options in a section of a run file that does not exist, such as `training_args: {lora_r: 8}`.

    It is the option itself when it is no section, or holds no option of any tool.
    """
    from sftx.config import other_tools

    inner = {} if option.is_typed or option.is_keyword or not isinstance(option.value, dict) else option.value
    is_known = option.leaf in _plugin_names() or other_tools.answer(option.leaf, option.value, {}) is not None
    if is_known or not any(other_tools.answer(name, value, {}) for name, value in inner.items()):
        return [option]
    names = {f"{option.name}.{name}": value for name, value in inner.items()}
    return [replace(option, name=name, value=value, place=origins.of(name)) for name, value in names.items()]


def asks_for_nothing(name: str, value: Any) -> bool:
    """Return whether an option of ours with this value asks for nothing in another tool, as `max_steps: -1` does."""
    from sftx.config import other_tools

    made = other_tools.answer(name, value, {})
    return made is not None and made.kind == "leave out"


def note(harmless: Sequence[UnknownOption]) -> None:
    """Say which options of other tools are left out."""
    log.info("options of other tools that ask for nothing here: %s", ", ".join(option.leaf for option in harmless))


def _line(name: str, value: Any) -> str:
    """Return the line of a run file that sets an option."""
    if name.startswith("data.train.*."):
        return f"data.train: [{{path: ..., {name.rpartition('.')[2]}: {run_file.flow(value)}}}]"
    return f"{name}: {run_file.flow(value)}"


def _flag(name: str, value: Any) -> str:
    """Return the arguments of a command line that set an option."""
    from sftx.config.options import flag

    section, _, rest = name.partition(".")
    if section == "plugins":
        plugin, _, option = rest.rpartition(".")
        if not plugin or isinstance(value, dict):
            options = [f"--set {shlex.quote(f'{rest}.{key}={run_file.flow(v)}')}" for key, v in dict(value).items()]
            return " ".join([f"--plugin {rest}", *options])
        return f"--plugin {plugin} --set {shlex.quote(f'{plugin}.{option}={run_file.flow(value)}')}"
    if name.startswith("data.train.*."):
        return f"--set {shlex.quote(_line(name, value).replace(': ', '=', 1))}"
    if isinstance(value, bool):
        return flag(name) if value else f"--no-{flag(name)[2:]}"
    if isinstance(value, list) and all(isinstance(item, str) for item in value):
        return " ".join(f"{flag(name)} {shlex.quote(item)}" for item in value)
    if isinstance(value, list | dict) or name.count(".") > 1:
        return f"--set {shlex.quote(f'{name}={run_file.flow(value)}')}"
    return f"{flag(name)} {shlex.quote(value if isinstance(value, str) else run_file.flow(value))}"


def _keyword(name: str, value: Any) -> str:
    """Return the keyword of `sftx.run` that sets an option."""
    section, _, rest = name.partition(".")
    if section == "plugins":
        plugin, _, option = (rest, "", "") if isinstance(value, dict) else rest.rpartition(".")
        return f"plugins={ ({plugin: {option: value} if option else value})!r}"
    if name.startswith("data.train.*."):
        return f"data=[{{'path': ..., {name.rpartition('.')[2]!r}: {value!r}}}]"
    if name in ("data.train", "data.eval"):
        return f"{'data' if rest == 'train' else 'eval_data'}={value!r}"
    return f"{rest or section}={value!r}"
