"""A plugin's hook is called and becomes a stage of the run, whose errors carry the plugin's name from then on."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Final, cast

from sftx.assembly.hookspecs import RETURNS
from sftx.distributed.process_group import is_lost_peer_error
from sftx.errors import DataError, PluginError, SftxError, did_you_mean, one_line
from sftx.types import Adapter, Batch, LossSum, Observer


def arguments_of(function: Callable[..., object]) -> list[str]:
    return list(inspect.signature(function).parameters)


def make(plugin: object, hook: str, **arguments: Any) -> Any:
    """What the plugin's `hook` returns, given those of `arguments` that it asks for. Raises PluginError."""
    implementation = getattr(plugin, hook)
    made = implementation(**{name: arguments[name] for name in arguments_of(implementation)})
    kind = RETURNS[hook]
    lacking = [] if kind in (Adapter, Observer) else _lacking(made, kind)
    # Not isinstance for a protocol: from Python 3.12 on that does not see what is delegated by __getattr__.
    if lacking or (kind in (Adapter, Observer) and not isinstance(made, kind)):
        article = "an" if kind.__name__[0] in "AO" else "a"
        named_ones = [name for name in lacking if name != "__call__"]
        lacks = f", which has also {', '.join(named_ones)}" if named_ones else ""
        lacks = "; is its `return` missing?" if made is None else lacks
        raise PluginError(f"{hook} returned {type(made).__name__}, expected {article} {kind.__name__}{lacks}")
    if isinstance(made, Observer):
        _check_events(made)
    return made


def _check_events(observer: Observer) -> None:
    """Raises PluginError for a method that no run would ever call."""
    for name in dir(observer):
        if name.startswith("on_") and not hasattr(Observer, name):
            hint = did_you_mean(name, [event for event in vars(Observer) if event.startswith("on_")])
            raise PluginError(f"{type(observer).__name__}.{name} is no event of this sftx's observers{hint}")


def _lacking(made: object, protocol: type) -> list[str]:
    """What a protocol promises and an object has not."""
    promised = [name for name in sorted(vars(protocol)) if not name.startswith("_") or name == "__call__"]
    return [name for name in promised if not hasattr(made, name)]


@contextmanager
def named(who: str, what: str) -> Iterator[None]:
    """Puts a plugin's name in front of the errors of its own code, which need not know its name and version.

    A plugin that calls sys.exit does not end the process as if all were well.
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


def _is_not_its_fault(error: BaseException, hook: str, method: str) -> bool:
    """Whether a row of data, a full device or disk, or a lost process is to blame, of which the engine tells more."""
    if isinstance(error, DataError):
        return hook in ("sftx_parser", "sftx_template")
    if method == "save" and (isinstance(error, OSError) or type(error).__name__ == "SafetensorError"):
        return True
    torch = sys.modules.get("torch")  # which nothing here imports
    if is_lost_peer_error(error):
        return True
    return isinstance(error, MemoryError) or (torch is not None and isinstance(error, torch.OutOfMemoryError))


_RESULTS: Final[Mapping[tuple[str, str], tuple[type, ...]]] = {
    ("sftx_parser", "parse"): (tuple, list),
    ("sftx_template", "render"): (tuple, list),
    ("sftx_template", "generation_prompt"): (tuple, list),
    ("sftx_collator", "plan"): (tuple,),
    ("sftx_collator", "collate"): (Batch,),
    ("sftx_loss", "denominator"): (int, float),
    ("sftx_loss", "__call__"): (LossSum,),
    ("sftx_metric", "__call__"): (Mapping, int, float),
    ("sftx_metric", "corpus"): (Mapping, int, float),
}
"""What a stage's methods must return, where something else would fail far from its cause."""


class Guarded:
    """A stage as the plugin made it, whose methods run within `named` and must return what they promise."""

    def __init__(self, who: str, hook: str, stage: object) -> None:
        self._who = who
        self._hook = hook
        self._stage = stage

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):  # pickle and copy look for what is theirs
            raise AttributeError(name)
        try:
            value = getattr(self._stage, name)
        except AttributeError:
            if not hasattr(type(self._stage), name):
                raise  # it has none, which whoever asks may be ready for
            with named(self._who, name):
                raise
        except BaseException:
            with named(self._who, name):
                raise
        return self._guard(value, name) if inspect.isroutine(value) else value

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._guard(cast(Any, self._stage), "__call__")(*args, **kwargs)

    def __str__(self) -> str:
        return self._who

    def _guard(self, function: Callable[..., Any], name: str) -> Callable[..., Any]:
        what = self._hook.removeprefix("sftx_") if name == "__call__" else name
        expected = _RESULTS.get((self._hook, name), ())

        def guarded(*args: Any, **kwargs: Any) -> Any:
            try:
                result = function(*args, **kwargs)
            except BaseException as error:
                if _is_not_its_fault(error, self._hook, name):
                    raise
                with named(self._who, what):
                    raise
            if expected and not isinstance(result, expected):
                wanted = expected[-1].__name__
                raise PluginError(f"{self._who}: {what} returned {type(result).__name__}, expected a {wanted}")
            return result

        return guarded
