"""What `sftx inspect` shows, on a terminal: trained tokens in colour, or between «» where there are no colours."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from itertools import groupby
from typing import Final

from rich.cells import cell_len
from rich.console import Console
from rich.style import Style
from rich.text import Text

from sftx.errors import printable
from sftx.inspection.figures import Figures, Lengths
from sftx.inspection.token_report.inspect import Inspection, ShownExample, ShownRow
from sftx.inspection.token_report.tokens import Token

_BARS: Final = " ▁▂▃▄▅▆▇█"
_MOST_TOKENS: Final = 4000
"""Of one example; --json has them all."""
_LONGEST_REASON: Final = 120
_ROLE_CELLS: Final = 11

# Dark on light greens: legible on dark terminals and light ones. Neighbours differ, so that borders show; what is not
# trained keeps the terminal's own colours, for which no second one is legible everywhere.
_TRAINED: Final = (Style(color="#06210e", bgcolor="#a5dfb4"), Style(color="#06210e", bgcolor="#7fcf95"))
_CONTROL: Final = Style(bold=True)
_MARGIN: Final = Style(color="cyan")
_CONTINUED: Final = "…"

_SEEN: Final = str.maketrans({"\n": "⏎", "\t": "⇥", "\r": "␍", "\N{NO-BREAK SPACE}": "⍽"})


def visible(text: str) -> str:
    """A token's text on one line: white space that would not be seen has a sign, what controls a terminal is gone."""
    if not text:
        return _CONTINUED
    if text.isspace():
        text = text.replace(" ", "·")
    return printable(text.translate(_SEEN))


def show(inspection: Inspection, console: Console, *, ids: bool) -> None:
    """Prints all of it."""
    _print_figures(inspection.figures, console)
    for row in inspection.rows:
        console.print()
        _print_row(row, console, ids=ids)
    console.print()
    console.print(_legend(console, ids=ids), soft_wrap=True)
    if not inspection.rows:
        console.print(f"no rows are {inspection.chosen}", highlight=False)


def _legend(console: Console, *, ids: bool) -> Text:
    text = Text()
    if _has_colours(console):
        text.append(" trained ", _TRAINED[0]).append("  ")
        text.append(" not trained ").append("  ")
    else:
        text.append("«trained»  not trained  ")
    text.append("control token", _CONTROL).append(
        "  ⏎ line break  ⇥ tab  · a token of spaces  … more of a character  ×0.5 weight"
    )
    return text if ids else text.append("  (--ids: token ids)")


# --- figures ------------------------------------------------------------------------------------


def shorten(reason: str) -> str:
    """Some reasons name every format that there is."""
    return reason if len(reason) <= _LONGEST_REASON else f"{reason[:_LONGEST_REASON]} ..."


def _print_figures(figures: Figures, console: Console) -> None:
    for name, value in summary(figures):
        hang(console, Text(name, "bold"), value)
    for change in figures.changes:
        rows = "row" if change.count == 1 else "rows"
        text = f"{change.count:,} {rows}: {shorten(change.reason)} (first: {change.first})"
        hang(console, Text(change.action, Style(color="yellow", bold=True)), text)
    for problem in figures.problems:
        hang(console, Text("stops", Style(color="red", bold=True)), f"the run: {problem}")


def hang(console: Console, name: Text, value: str, *, indent: int = 10) -> None:
    """A value beside its name, folded under itself."""
    lines = Text(printable(value)).wrap(console, max(20, console.width - indent)) if value else [Text()]
    for number, line in enumerate(lines):
        line.rstrip()
        start = Text().append_text(name) if number == 0 else Text()
        start.pad_right(max(0, indent - cell_len(start.plain)))
        console.print(start.append_text(line), soft_wrap=True)


def summary(figures: Figures) -> Iterator[tuple[str, str]]:
    """The figures in words: a name and its value."""
    formats = ", ".join(f"{number:,} {name}" for name, number in figures.formats.items())
    yield "model", f"{figures.model}, template {figures.template}"
    yield "rows", f"{figures.num_rows:,} of data.{figures.split} ({formats}), {figures.num_examples:,} examples"
    if figures.note:
        yield "", figures.note
    share = f"trained {figures.num_label_tokens:,} ({figures.trained_share:.1%})"
    yield "tokens", f"{figures.num_input_tokens:,}, {share}"
    if (found := figures.lengths) is not None:
        yield (
            "lengths",
            f"min {found.min:,}, median {found.median:,}, 90% up to {found.p90:,}, max {found.max:,}  "
            f"{sparkline(found)}  (max_length {figures.max_length:,})",
        )
    if figures.num_steps is not None:
        mixed = figures.num_epoch_examples != figures.num_examples
        epoch = f"; an epoch takes {figures.num_epoch_examples:,} examples" if mixed else ""
        yield "steps", f"{figures.num_steps:,} of {figures.rows_per_step:,} rows{epoch}"
    if figures.filling is not None:
        yield "batches", f"{figures.collator}: {figures.filling}"


def sparkline(lengths: Lengths) -> str:
    """The histogram, one character a bin; a bin with anything in it shows."""
    counts = [one.count for one in lengths.histogram]
    top = max(counts)
    return "".join(_BARS[-(-count * (len(_BARS) - 1) // top)] for count in counts)


# --- rows ---------------------------------------------------------------------------------------


def _print_row(row: ShownRow, console: Console, *, ids: bool) -> None:
    head = Text().append(printable(row.where), "bold")
    parts = [f"row {row.number:,}", row.format, f"{row.length:,} tokens" if row.length else ""]
    head.append("  " + ", ".join(part for part in parts if part))
    if row.status != "kept":
        head.append(f"  {row.status}", Style(color="red" if row.status == "dropped" else "yellow", bold=True))
        head.append(printable(": " + "; ".join(map(shorten, row.reasons))))
    console.print(head)
    for example in row.examples:
        if len(row.examples) > 1:
            console.print(Text(f"example {printable(example.name.rpartition('#')[2])}", "italic"))
        _print_turns(example, console, ids=ids)
    if row.record:
        console.print(Text(printable(row.record)))


def _print_turns(example: ShownExample, console: Console, *, ids: bool) -> None:
    """Each turn beside its role, wrapped between tokens where that can be."""
    width = max(20, console.width - _ROLE_CELLS - 1)
    shown = example.tokens[:_MOST_TOKENS]
    before = Token(0, "", "", False, False, 1.0, "")
    for role, turn in groupby(shown, key=lambda token: token.role):
        tokens = list(turn)
        name = Text(printable(role), _MARGIN)
        name.truncate(_ROLE_CELLS)
        for line in _lines(tokens, before, width, colours=_has_colours(console), ids=ids):
            start = Text(" " * (_ROLE_CELLS - cell_len(name.plain))).append_text(name).append(" ")
            console.print(start.append_text(line), soft_wrap=True)
            name = Text()
        before = tokens[-1]
    if len(shown) < len(example.tokens):
        rest = len(example.tokens) - len(shown)
        console.print(Text(f"{'':{_ROLE_CELLS}} … {rest:,} more tokens; --json has them", "italic"))


def _has_colours(console: Console) -> bool:
    return console.color_system is not None and not console.no_color


def _lines(tokens: Sequence[Token], before: Token, width: int, *, colours: bool, ids: bool) -> Iterator[Text]:
    """The lines of one turn. A line break of the text breaks the line here too."""
    line, cells = Text(), 0
    for number, token in enumerate(tokens):
        nxt = tokens[number + 1] if number + 1 < len(tokens) else None
        for text, style in _written(token, before, nxt, number, colours=colours, ids=ids):
            for piece in re.split(r"(?<=⏎)(?!»)", text) if "\n" in token.text else [text]:
                for part in _folded(piece, width):
                    if cells + cell_len(part) > width:
                        yield line
                        line, cells = Text(), 0
                    line.append(part, style)
                    cells += cell_len(part)
                if piece.endswith(("⏎", "⏎»")) and "\n" in token.text:
                    yield line
                    line, cells = Text(), 0
        before = token
    if cells:
        yield line


def _folded(text: str, width: int) -> Iterator[str]:
    """The text in parts that fit a line."""
    part = ""
    for character in text:
        if cell_len(part + character) > width:
            yield part
            part = ""
        part += character
    if part:
        yield part


def _written(
    token: Token, before: Token, after: Token | None, number: int, *, colours: bool, ids: bool
) -> Iterator[tuple[str, Style]]:
    """A token's text with its signs: weight where a weighted stretch begins, «» where there are no colours."""
    if token.trained and token.weight != 1 and not (before.trained and before.weight == token.weight):
        yield f"×{token.weight:g}", Style(dim=True)
    style = _TRAINED[number % 2] if token.trained and colours else Style()
    if token.control:
        style += _CONTROL
    text = visible(token.text)
    if not colours:
        begins = token.trained and (number == 0 or not before.trained)
        ends = token.trained and not (after and after.trained)
        text = f"{'«' if begins else ''}{text}{'»' if ends else ''}"
    yield text, style
    if ids:
        yield f"⟨{token.id}⟩", Style(dim=True)
