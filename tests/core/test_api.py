"""The public interface is what it was: `sftx`, `sftx.testing` and the hooks, in `api.txt`.

A change that is meant is written with `python tests/core/test_api.py`, and comes with a line in CHANGELOG.md; what goes
away is deprecated first (`sftx/_deprecated.py`).
"""

from __future__ import annotations

import dataclasses
import inspect
import types
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import sftx
from sftx import _deprecated
from sftx.assembly import hookspecs

GOLDEN = Path(__file__).with_name("api.txt")


def described() -> str:
    import sftx.testing

    lines = []
    for module in (sftx, sftx.testing):
        for name in sorted(module.__all__):
            lines += _describe(f"{module.__name__}.{name}", getattr(module, name))
    for hook in hookspecs.RETURNS:
        lines.append(f"hook {hook}{_signature(getattr(hookspecs, hook))}")
    return "\n".join(lines) + "\n"


def _describe(name: str, thing: Any) -> Iterator[str]:
    if not isinstance(thing, type):
        is_function = isinstance(thing, types.FunctionType)
        yield f"{name}{_signature(thing)}" if is_function else f"{name}: {_plain(thing)}"
        return
    bases = ", ".join(base.__name__ for base in thing.__bases__ if base is not object)
    yield f"class {name}({bases})"
    if dataclasses.is_dataclass(thing):
        yield f"    {_signature(thing.__init__)}"
    for member, value in sorted(vars(thing).items()):
        if member.startswith("_") and member != "__call__":
            continue
        if isinstance(value, property):
            yield f"    {member}: {_signature(value.fget).partition(' -> ')[2]}"
        elif callable(value):
            yield f"    {member}{_signature(value)}"


def _signature(function: Any) -> str:
    return str(inspect.signature(function)).replace("'", "")


def _plain(value: Any) -> str:
    return type(value).__name__ if " at 0x" in repr(value) else repr(value)


def test_the_public_interface_is_the_one_on_record() -> None:
    assert described() == GOLDEN.read_text(encoding="utf-8"), (
        "the public interface has changed; if so it is meant, run `python tests/core/test_api.py` and tell CHANGELOG.md"
    )


def test_the_record_has_every_public_name_and_would_see_a_change() -> None:
    text = GOLDEN.read_text(encoding="utf-8")
    assert all(f"sftx.{name}" in text for name in sftx.__all__)
    assert "(examples: Sequence[Example], *, multiple_of: int = 1) -> Batch" in text
    assert "    render(self, conversation: Conversation) -> tuple[Segment, ...]" in text
    assert list(_describe("x", lambda a, *, b=1: a)) == ["x(a, *, b=1)"]


# --- deprecation --------------------------------------------------------------------------------


def test_a_former_name_gives_the_one_of_today_and_warns_with_versions(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(_deprecated.NAMES, "Turn", _deprecated.Deprecated("Message", "0.2", "0.4"))
    with pytest.warns(_deprecated.SftxDeprecationWarning) as caught:
        assert sftx.Turn is sftx.Message  # type: ignore[attr-defined]
    assert str(caught[0].message) == "sftx.Turn is deprecated since sftx 0.2 and goes in 0.4; use Message"
    assert caught[0].filename == __file__
    with pytest.raises(AttributeError, match="no attribute 'Never'"):
        sftx.Never  # type: ignore[attr-defined]  # noqa: B018


@pytest.mark.parametrize("what", ["sftx_observer", "sftx_observer(run)"])
def test_a_plugin_that_uses_a_deprecated_hook_or_argument_is_named(
    monkeypatch: pytest.MonkeyPatch, what: str, install_plugin: Any
) -> None:
    from sftx.assembly.registry import discover, find, hooks_of, load_class

    code = (
        "from dataclasses import dataclass\nimport sftx\n\n\n@dataclass(frozen=True, eq=False)\nclass Watch:\n"
        "    @sftx.hookimpl\n    def sftx_observer(self, run): return sftx.Observer()\n"
    )
    install_plugin("acme", code, {"watch": "Watch"})
    info = find("watch", discover())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        hooks_of(info, load_class(info))
    monkeypatch.setitem(_deprecated.HOOKS, what, _deprecated.Deprecated("something else", "0.2", "0.4"))
    with pytest.warns(_deprecated.SftxDeprecationWarning) as caught:
        hooks_of(info, load_class(info))
    assert str(caught[0].message) == (
        f"plugin 'watch' (acme 1.0): {what} is deprecated since sftx 0.2 and goes in 0.4; use something else"
    )


def test_nothing_deprecated_has_outlived_its_version() -> None:
    from packaging.version import Version

    for what, entry in (_deprecated.NAMES | _deprecated.HOOKS).items():
        assert Version(entry.removed_in) > Version(sftx.__version__), f"{what} was to go in {entry.removed_in}"


if __name__ == "__main__":
    GOLDEN.write_text(described(), encoding="utf-8")
