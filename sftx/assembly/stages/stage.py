"""Shared by all stages: the call of a hook, the check of what it returns, and the plugin's name in errors."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterator, Set
from contextlib import contextmanager
from typing import Any

from sftx.assembly.hookspecs import RETURNS
from sftx.distributed.process_group import is_lost_peer_error
from sftx.errors import PluginError, SftxError, did_you_mean, is_out_of_memory, one_line
from sftx.types import Adapter, Control, Observer


def arguments_of(function: Callable[..., object]) -> list[str]:
    """Return the names of the parameters; none for a function in C that does not say them."""
    try:
        return list(inspect.signature(function).parameters)
    except ValueError:
        return []


def call(plugin: object, hook: str, **arguments: Any) -> Any:
    """Call the plugin's `hook` with those of `arguments` that it asks for, and return what it returns."""
    implementation = getattr(plugin, hook)
    return implementation(**{name: arguments[name] for name in arguments_of(implementation)})


def make(plugin: object, hook: str, **arguments: Any) -> Any:
    """Call the plugin's `hook` with those of `arguments` that it asks for. Raises PluginError for a wrong result."""
    made = call(plugin, hook, **arguments)
    kind = RETURNS[hook]
    missing: list[str] = []
    if kind in (Adapter, Control, Observer, Set):
        is_right = isinstance(made, kind)
    else:  # not isinstance for a protocol: from Python 3.12 on it does not see what __getattr__ delegates
        promised = sorted(name for name in vars(kind) if not name.startswith("_") or name == "__call__")
        missing = [name for name in promised if not hasattr(made, name)]
        is_right = not missing
    if not is_right:
        article = "an" if kind.__name__[0] in "AO" else "a"
        named_ones = [name for name in missing if name != "__call__"]
        lacks = f", which has also {', '.join(named_ones)}" if named_ones else ""
        lacks = "; is its `return` missing?" if made is None else lacks
        raise PluginError(f"{hook} returned {type(made).__name__}, expected {article} {kind.__name__}{lacks}")
    for base, prefix in ((Observer, "on_"), (Control, "after_")):
        for name in dir(made) if isinstance(made, base) else ():
            if name.startswith(prefix) and not hasattr(base, name):  # no run would ever call it
                hint = did_you_mean(name, [event for event in vars(base) if event.startswith(prefix)])
                raise PluginError(f"{type(made).__name__}.{name} is no event of this sftx's {hook[5:]}s{hint}")
    return made


@contextmanager
def named(who: str, what: str) -> Iterator[None]:
    """Put a plugin's name in front of the errors of its code, which need not know its own name and version.

    sys.exit in a plugin becomes an error too: the process must not end as if all were well.
    """
    try:
        yield
    except SftxError as error:
        if who not in str(error):
            error.args = (f"{who}: {error}",)
        raise
    except KeyboardInterrupt:
        raise
    except BaseException as error:
        raise PluginError(f"{who}: {what} failed: {type(error).__name__}: {one_line(error)}") from error


class Stage:
    """The plugin's own object, and the name under which its errors are reported."""

    def __init__(self, plugin: str) -> None:
        self._plugin = plugin

    def __str__(self) -> str:
        return self._plugin

    @contextmanager
    def _attribute(self, what: str) -> Iterator[None]:
        """Name the plugin in errors, except those of the machine, which the trainer explains by itself."""
        try:
            yield
        except BaseException as error:
            if is_out_of_memory(error) or is_lost_peer_error(error) or self._explains_itself(error, what):
                raise
            with named(self._plugin, what):
                raise

    def _explains_itself(self, error: BaseException, what: str) -> bool:
        """Return whether the error needs no plugin's name: a row of data is at fault, or a full disk."""
        return False

    def _refuse(self, message: str) -> PluginError:
        return PluginError(f"{self._plugin}: {message}")


def is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def not_json(value: object, place: str) -> str:
    """Return which value at `place` JSON does not hold unchanged, and what to give instead; empty if there is none.

    Encoded rows are kept as JSON in the cache, from which a tuple would come back as a list, and the key 1 as "1".
    """
    found: Iterator[str] = iter(())
    if type(value) is dict:
        if odd := [key for key in value if type(key) is not str]:
            return f"{place} with the key {odd[0]!r:.60}, which JSON does not hold unchanged; use text as keys"
        found = (not_json(own, f"{place}[{key!r}]") for key, own in value.items())
    elif type(value) is list:
        found = (not_json(own, f"{place}[{number}]") for number, own in enumerate(value))
    elif not (value is None or type(value) in (str, int, bool) or (type(value) is float and math.isfinite(value))):
        return (
            f"{place} = {value!r:.60} ({type(value).__name__}), which JSON does not hold unchanged; use dicts, lists, "
            "text, finite numbers, True, False or None"
        )
    return next(filter(None, found), "")
