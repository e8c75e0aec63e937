"""Defines what an option of another tool becomes here: the rules of which the table is made, and what makes them."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Final, Literal

Given = Mapping[str, Any]
"""All options of other tools that stand beside the one in question, by their names."""

EACH_SOURCE: Final = "data.train.*."
"""Begins the name of an option that every source of `data.train` gets."""


@dataclass(frozen=True)
class Answer:
    """Says what an option of another tool becomes here, with a certain value."""

    kind: Literal["write", "leave out", "not here"]
    write: Mapping[str, Any] = field(default_factory=dict)
    """The options to write instead, by dotted names, with their values; `plugins.packed: {}` adds a plugin."""
    why: str = ""
    lost: tuple[str, ...] = ()
    """Parts of the value that are not carried over, each with what to do."""
    inner: Mapping[str, Any] = field(default_factory=dict)
    """Options of the other tool that stand in this value; each has an answer of its own."""


@dataclass(frozen=True)
class Rule:
    """How a value becomes an Answer."""

    kind: Literal["write", "leave out", "not here"]
    make: Callable[[Any, Given], Answer]
    targets: tuple[str, ...] = ()
    """The options that it may write, for the documentation."""
    why: str = ""


class _Any:
    """The key of the rule for every value that has no rule of its own."""


ANY: Final = _Any()


@dataclass(frozen=True)
class Row:
    """Options of other tools that are answered alike. A name may be a pattern, such as `ddp_*`."""

    names: tuple[str, ...]
    rules: tuple[tuple[Any, Rule], ...]


# --- rules ----------------------------------------------------------------------------------------


def to(target: str, convert: Callable[[Any], Any] | None = None, *, why: str = "") -> Rule:
    """The value, converted if need be, is written to one option here."""
    return Rule(
        "write", lambda value, _: Answer("write", {target: convert(value) if convert else value}, why), (target,), why
    )


def write(options: Mapping[str, Any], *, why: str = "") -> Rule:
    """The same is written whatever the value."""
    answer = Answer("write", options, why)
    targets = tuple(name if value == {} else f"{name}: {brief(value)}" for name, value in options.items())
    return Rule("write", lambda *_: answer, targets, why)


def plugin(name: str, *, why: str = "") -> Rule:
    return write({f"plugins.{name}": {}}, why=why)


def made(make: Callable[[Any, Given], Answer], *targets: str, why: str = "") -> Rule:
    """A function decides."""
    return Rule("write", make, targets, why)


def leave_out(why: str = "") -> Rule:
    return Rule("leave out", lambda *_: Answer("leave out", why=why), why=why)


def not_here(why: str) -> Rule:
    return Rule("not here", lambda *_: Answer("not here", why=why), why=why)


def row(names: str, *rules: Rule | tuple[Any, Rule]) -> Row:
    """A rule without a value is for every value that has none of its own."""
    return Row(tuple(names.split()), tuple(rule if isinstance(rule, tuple) else (ANY, rule) for rule in rules))


def brief(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def stage(given: Given) -> str:
    """Return what kind of training the other options ask for: sft, pt, dpo, kto, orpo, simpo, grpo, ppo, rm, ..."""
    names = (given.get("rlhf_type"), given.get("rl"), given.get("stage"))
    found = next((name for name in names if name not in (None, "", False)), "sft")
    return str(found).lower()


def is_quantized(given: Given) -> bool:
    """Return whether the other options ask for a base in 4 or 8 bits."""
    is_on = any(given.get(name) is True for name in ("load_in_4bit", "load_in_8bit"))
    bits = any(given.get(name) in (4, 8) for name in ("quantization_bit", "quant_bits"))
    return is_on or bits or given.get("adapter") == "qlora" or "plugins.qlora" in given
