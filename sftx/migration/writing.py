"""Writes a translation as a commented run file, and says in words what was carried over and what was not."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator
from typing import Any, Final

from sftx.config.options import SECTIONS
from sftx.config.run_file import flow
from sftx.migration.translation import Translation, Written

_ORDER: Final = ("model", "trust_remote_code", "add_tokens", "data", "plugins", "train", "generation", "output_dir")
_WIDTH: Final = 120


def run_file_text(made: Translation, *, checked: str = "") -> str:
    """Return the text of the run file. `checked` is an error of the file, which is to be corrected first."""
    lines = [
        f"# Written by `sftx migrate` from {made.reading.title}.",
        f"# Options with sftx's defaults are left out; a comment names the option of {made.title}, and what differs.",
    ]
    if checked:
        lines += _comment(f"To be corrected before it runs: {checked}")
    sections = made.sections
    for name in (*_ORDER, *sorted(SECTIONS - set(_ORDER))):
        value = sections.get(name)
        if isinstance(value, Written):
            lines.append(_line(name, value, ""))
        elif value is not None:
            lines.append(f"{name}:")
            lines += _section(value, "  ")
    if made.lost:
        lines += ["", "# Not carried over:"]
        for lost in made.lost:
            place = f" ({lost.place})" if lost.place else ""
            lines += _comment(f"- {lost.name}{place}: {lost.advice}", indent="  ")
    return "\n".join(lines) + "\n"


def _section(values: dict[str, Any], indent: str) -> Iterator[str]:
    for name, value in values.items():
        if isinstance(value, Written):
            yield from _option(name, value, indent)
            continue
        alone = value.get("", Written({}))  # what adds the plugin itself
        if list(value) in ([], [""]):
            yield _line(name, alone, indent)
            continue
        yield f"{indent}{name}:{_note(alone.comments)}"
        yield from _section({option: written for option, written in value.items() if option}, f"{indent}  ")


def _option(name: str, written: Written, indent: str) -> Iterator[str]:
    if isinstance(written.value, list) and name in ("train", "eval"):
        yield f"{indent}{name}:{_note(written.comments)}"
        for item in written.value:
            yield f"{indent}  - {flow(item)}"
    else:
        yield _line(name, written, indent)


def _line(name: str, written: Written, indent: str) -> str:
    return f"{indent}{name}: {flow(written.value)}{_note(written.comments)}"


def _note(comments: list[str]) -> str:
    return f"  # {'; '.join(comments)}" if comments else ""


def _comment(text: str, indent: str = "") -> list[str]:
    first = f"# {indent}"
    return textwrap.wrap(text, _WIDTH, initial_indent=first, subsequent_indent=f"{first}  ", break_long_words=False)


def summary(made: Translation, path: str, *, checked: str = "") -> str:
    """Return what a person is told: what was carried over, what means something else, what was not and what to do."""
    lines = [f"{made.reading.title}: {len(made.carried)} options carried over into {path}"]
    notes = [
        (name, "; ".join(written.comments))
        for name, written in made.written.items()
        if written.comments and not all(_is_name(comment) for comment in written.comments)
    ]
    if notes:
        lines.append(f"what differs, and what {made.title} does without being asked:")
        lines += [f"  {name}: {_short(made.written[name].value)}  {text}" for name, text in notes]
    if made.lost:
        lines.append("not carried over:")
        for lost in made.lost:
            lines.append(f"  {lost.name}{f' ({lost.place})' if lost.place else ''}: {lost.advice}")
    elif not checked:
        lines.append("everything was carried over")
    for why, names in made.not_needed.items():
        lines.append(f"not needed: {', '.join(names)}{f' ({why})' if why else ''}")
    if checked:
        lines.append(f"to be corrected before it runs: {checked}")
    return "\n".join(lines)


def _is_name(comment: str) -> bool:
    """Return whether a comment says only which option of the other tool it was."""
    return " " not in comment.partition(": ")[0]


def _short(value: Any) -> str:
    text = flow(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
