"""Tells what to write here for options of TRL, transformers, PEFT, LLaMA-Factory, Axolotl and ms-swift.

`answer` looks an option up together with its value, since `packing: false` asks for nothing and `packing: true` for a
plugin. It is imported when a run has an option that sftx does not know, and by `sftx migrate`; the tables of
docs/migrating/ are made of it.
"""

from __future__ import annotations

import dataclasses
import fnmatch
import re
from collections.abc import Iterable, Mapping
from dataclasses import replace
from functools import lru_cache
from typing import Any, Final

from sftx.config.options import SECTION_CLASSES
from sftx.config.other_tools.rules import ANY, EACH_SOURCE, Answer, Given, Row, Rule, brief, is_quantized, to
from sftx.config.other_tools.table import TABLE
from sftx.config.other_tools.tools import TOOLS

__all__ = ["ANY", "EACH_SOURCE", "TABLE", "TOOLS", "Answer", "Given", "Row", "Rule", "answer", "is_quantized", "names"]

_OFF: Final = frozenset({"no", "none", "off", "false", "null", "disabled"})


def answer(name: str, value: Any, given: Given, *, tool: str | None = None) -> Answer | None:
    """Return what the option `name` of another tool becomes, None if no tool in the table has it.

    An option of sftx that stands in no section, or in a wrong one, is answered with its section. `given` are the
    other options of the same file and command line. `tool` is a key of TOOLS, whose own rows come first.
    """
    made = _answer(name, value, given, tool)
    if made is None or made.kind != "write":
        return made
    options, lost = dict(made.write), list(made.lost)
    for inner_name, setting in made.inner.items():
        inner = answer(inner_name, setting, {**given, **made.inner}, tool=tool)
        if inner is None or inner.kind == "not here":
            lost.append(f"{inner_name}: {inner.why if inner else 'there is nothing like it'}")
        options |= inner.write if inner else {}
        lost += inner.lost if inner else ()
    if lost and not options:
        return Answer("not here", why="; ".join(lost))
    if is_quantized(given):
        options = {re.sub(r"^plugins\.lora(?=\.|$)", "plugins.qlora", name): value for name, value in options.items()}
    return replace(made, write=_without_empty(options), lost=tuple(lost), inner={})


def _without_empty(options: Mapping[str, Any]) -> dict[str, Any]:
    """Leave out `plugins.lora: {}` where an option of the plugin adds it anyway."""
    return {
        name: value
        for name, value in options.items()
        if value != {} or not any(other.startswith(f"{name}.") for other in options)
    }


def _answer(name: str, value: Any, given: Given, tool: str | None) -> Answer | None:
    rules = _rules_of(name, tool)
    if rules is None:
        section = _sections().get(name)
        rules = ((ANY, to(f"{section}.{name}")),) if section else None
    if rules is None:
        return None
    chosen = next((rule for key, rule in rules if key is not ANY and _is(value, key)), None)
    if chosen is not None:
        return _made_of(chosen, value, given)
    rest = next((rule for key, rule in rules if key is ANY), None)
    is_empty = value is None or value in ("", [], {})
    is_off = value in (False, 0) or (isinstance(value, str) and value.lower() in _OFF)
    if is_empty or (is_off and (rest is None or rest.kind == "not here")):
        return Answer("leave out")
    if rest is None:
        return Answer("not here", why=f"{brief(value)} has no counterpart")
    return _made_of(rest, value, given)


def _made_of(rule: Rule, value: Any, given: Given) -> Answer:
    """Apply a rule. A value that the other tool would not take either is said not to be understood."""
    try:
        return rule.make(value, given)
    except (TypeError, ValueError, AttributeError, LookupError, ArithmeticError):
        return Answer("not here", why=f"{brief(value)} is not understood")


def names() -> Iterable[str]:
    """Return the names in the table that are no patterns."""
    return [name for rows in TABLE.values() for row in rows for name in row.names if "*" not in name]


@lru_cache
def _rules_of(name: str, tool: str | None) -> tuple[tuple[Any, Rule], ...] | None:
    """Return the rules of the row with that name, or else of the first whose pattern matches; the tool's own first."""
    own = TOOLS[tool].rows if tool else ()
    rows = [*own, *(row for rows in TABLE.values() for row in rows)]
    exact = next((row for row in rows if name in row.names), None)
    matching = (row for row in rows if any(fnmatch.fnmatchcase(name, pattern) for pattern in row.names))
    row = exact or next(matching, None)
    return row.rules if row else None


@lru_cache
def _sections() -> dict[str, str]:
    """Return the section of each option of sftx that has one, for names that are in one section alone."""
    found: dict[str, list[str]] = {}
    for section, cls in SECTION_CLASSES.items():
        for option in dataclasses.fields(cls):
            if option.name not in SECTION_CLASSES:
                found.setdefault(option.name, []).append(section)
    return {name: sections[0] for name, sections in found.items() if len(sections) == 1}


def _is(value: Any, key: Any) -> bool:
    """Return whether a rule's key stands for the value. `1` is not `true`, and text is compared without its case."""
    if isinstance(key, type):
        return isinstance(value, key) and not isinstance(value, bool)
    if isinstance(key, bool) or isinstance(value, bool):
        return key is value
    if isinstance(key, str) and isinstance(value, str):
        return key.lower() == value.lower()
    return bool(key == value)
