"""The public interface (`sftx`, `sftx.testing` and the hooks) is the one recorded in `api.txt`.

After an intended change, run `python tests/core/test_api.py` to record it, and add a line to CHANGELOG.md.
"""

from __future__ import annotations

import dataclasses
import inspect
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import sftx
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
        "the public interface has changed; if intended, run `python tests/core/test_api.py` and add to CHANGELOG.md"
    )


def test_the_record_has_every_public_name_and_would_see_a_change() -> None:
    text = GOLDEN.read_text(encoding="utf-8")
    assert all(f"sftx.{name}" in text for name in sftx.__all__)
    assert "(examples: Sequence[Example], *, multiple_of: int = 1) -> Batch" in text
    assert "    render(self, conversation: Conversation) -> tuple[Segment, ...]" in text
    assert list(_describe("x", lambda a, *, b=1: a)) == ["x(a, *, b=1)"]


if __name__ == "__main__":
    GOLDEN.write_text(described(), encoding="utf-8")
