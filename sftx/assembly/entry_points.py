"""This module finds what installed distributions offer: plugins and commands, as entry points of two groups.

It reads little and imports no code of theirs, so that a command starts as quickly beside hundreds of packages as beside
none: `importlib.metadata` would read each `entry_points.txt` twice, and parse the whole of `METADATA` as an e-mail
message for every value.
"""

from __future__ import annotations

import importlib.metadata
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from sftx.config.default_plugins import ENTRY_POINTS
from sftx.errors import PluginError, did_you_mean, one_line

PLUGINS: Final = ENTRY_POINTS
COMMANDS: Final = "sftx.commands"

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class PluginInfo:
    """A plugin, or a command of the command line, as its entry point says, without importing it."""

    name: str
    value: str
    """`package.module:Class`"""
    distribution: importlib.metadata.Distribution
    headers: Mapping[str, str]
    """The first lines of the metadata, by their names: `Name`, `Version`, `Summary` and other short ones."""
    group: str = PLUGINS

    @property
    def package(self) -> str:
        """The name of the distribution."""
        return self.headers["Name"]

    @property
    def version(self) -> str:
        return self.headers["Version"]

    def __str__(self) -> str:
        kind = "plugin" if self.group == PLUGINS else "command"
        return f"{kind} {self.name!r} ({self.package} {self.version})"


def discover(*groups: str, only: str | None = None) -> list[PluginInfo]:
    """Return every installed plugin, or what is installed under these groups, sorted by name; or `only` that name.

    Two distributions may use the same name; this is an error only when the name is used (`find`). A distribution whose
    metadata cannot be read is left out with a warning.
    """
    found: dict[tuple[str, ...], PluginInfo] = {}
    for distribution in importlib.metadata.distributions():
        try:
            entries = _entries(distribution.read_text("entry_points.txt") or "", groups or (PLUGINS,))
            if not (entries := [entry for entry in entries if only in (None, entry[1])]):
                continue
            headers = _headers(distribution)
            infos = [PluginInfo(name, value, distribution, headers, group) for group, name, value in entries]
            keys = [(info.group, info.name, info.value, info.package.lower().replace("_", "-")) for info in infos]
        except Exception as error:
            place = getattr(distribution, "_path", "a distribution")
            log.warning("%s: its metadata cannot be read, so its plugins are left out: %s", place, one_line(error))
            continue
        for key, info in zip(keys, infos, strict=True):
            found.setdefault(key, info)  # if a distribution is on sys.path twice, Python imports the first one
    return sorted(found.values(), key=lambda info: (info.name, info.package))


def _headers(distribution: importlib.metadata.Distribution) -> dict[str, str]:
    text = next(filter(None, map(distribution.read_text, ("METADATA", "PKG-INFO", ""))), "")
    lines = text.partition("\n\n")[0].splitlines()
    return dict(line.split(": ", 1) for line in lines if ": " in line)


def _entries(text: str, groups: Sequence[str]) -> list[tuple[str, str, str]]:
    """Return group, name and value of the entry points in an `entry_points.txt`. Raises ValueError."""
    entries: list[tuple[str, str, str]] = []
    group = ""
    for line in map(str.strip, text.splitlines() if any(f"[{group}]" in text for group in groups) else ()):
        if line.startswith("["):
            group = line.strip("[]")
        elif group in groups and line and not line.startswith("#"):
            name, equals, value = line.partition("=")
            if not equals:
                raise ValueError(f"{line!r} is no entry point")
            entries.append((group, name.strip(), value.strip()))
    return entries


def find(name: str, installed: Sequence[PluginInfo], *, origin: str = "") -> PluginInfo:
    """Return what is installed under `name`. Raises PluginError when there is nothing, or more than one.

    `origin` is the option or line of the run file that names the plugin; error messages begin with it.
    """
    matches = [info for info in installed if info.name == name]
    if len(matches) == 1:
        return matches[0]
    prefix = f"{origin}: " if origin else ""
    if matches:
        kind = str(matches[0]).partition(" ")[0]
        owners = " and ".join(f"{info.package} {info.version}" for info in matches)
        if len({info.package for info in matches}) == 1:  # a distribution defines the name twice, or is installed twice
            owners = " and ".join(f"{info.value} of {info.package} {info.version}" for info in matches)
        raise PluginError(f"{prefix}{kind} {name!r} is provided by {owners}; uninstall one of them")
    names = [info.name for info in installed]
    hint = did_you_mean(name, names) or f"; installed are {', '.join(names)}"
    raise PluginError(f"{prefix}plugin {name!r} is not installed{hint}")
