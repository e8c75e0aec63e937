"""`sftx inspect` on a terminal: label tokens have a green background, or «» around them where there are no colours."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from itertools import groupby
from typing import Final

from rich.cells import cell_len
from rich.console import Console
from rich.style import Style
from rich.text import Text

from sftx.errors import counted, printable
from sftx.inspection.dataset_statistics import DatasetStatistics, LengthStatistics
from sftx.inspection.token_report.explained_rows import ExplainedExample, ExplainedRow, TokenReport
from sftx.inspection.token_report.explained_tokens import ExplainedToken

_BARS: Final = " ▁▂▃▄▅▆▇█"
_MAX_TOKENS: Final = 4000
"""At most so many tokens of an example are shown; --json has them all."""
_MAX_REASON_CHARS: Final = 120
"""Some reasons name every known format."""
_ROLE_CELLS: Final = 11
_MAX_REASONS: Final = 5
"""At most so many reasons for which rows were dropped or truncated are printed."""

# Dark text on light greens is legible on dark and on light terminals. The greens alternate to show where tokens begin.
# Other tokens keep the terminal's own colours, for which no second background is legible everywhere.
_LABEL: Final = (Style(color="#06210e", bgcolor="#a5dfb4"), Style(color="#06210e", bgcolor="#7fcf95"))
_CONTROL: Final = Style(bold=True)
_MARGIN: Final = Style(color="cyan")
_CONTINUED: Final = "…"

_VISIBLE: Final = str.maketrans({"\n": "⏎", "\t": "⇥", "\r": "␍", "\N{NO-BREAK SPACE}": "⍽"})


def print_report(report: TokenReport, console: Console, *, ids: bool) -> None:
    """Print statistics, rows and a legend; `ids` adds the id of each token."""
    figures = report.figures
    for name, value in summary(figures):
        print_labelled(console, Text(name, "bold"), value)
    for number, line in enumerate(report.coverage):
        print_labelled(console, Text("" if number else "weights", "bold"), line)
    for change in figures.changes[:_MAX_REASONS]:
        text = f"{counted(change.count, 'row')}: {_shorten(change.reason)} (first: {change.first})"
        print_labelled(console, Text(change.action, Style(color="yellow", bold=True)), text)
    if rest := figures.changes[_MAX_REASONS:]:
        num_rows = sum(change.count for change in rest)
        print_labelled(
            console,
            Text(),
            f"{counted(num_rows, 'more row')} for {counted(len(rest), 'other reason')}; --html lists them",
        )
    said = {f"{change.first}: {change.reason}": change.first for change in figures.changes[:_MAX_REASONS]}
    for problem in figures.problems:
        what = f"the run at {said[problem]}" if problem in said else f"the run: {problem}"
        print_labelled(console, Text("stops", Style(color="red", bold=True)), what)
    for row in report.rows:
        console.print()
        _print_row(row, console, ids=ids)
    if not report.chosen:
        return
    console.print()
    legend = Text()
    if _has_colours(console):
        legend.append(" trained ", _LABEL[0]).append("   not trained   ")
    else:
        legend.append("«trained»  not trained  ")
    legend.append("control token", _CONTROL)
    legend.append("  ⏎ line break  ⇥ tab  · a token of spaces  … more of a character  ×0.5 weight")
    console.print(legend if ids else legend.append("  (--ids: token ids)"), soft_wrap=True)
    if not report.rows:
        console.print(f"no rows are {report.chosen}", highlight=False)


def print_labelled(console: Console, name: Text, value: str, *, indent: int = 10) -> None:
    """Print a value beside its name, its line breaks as blanks; further lines are indented to the value's column."""
    lines = Text(_one_line(value)).wrap(console, max(20, console.width - indent)) if value else [Text()]
    for number, line in enumerate(lines):
        line.rstrip()
        start = Text().append_text(name) if number == 0 else Text()
        start.pad_right(max(0, indent - cell_len(start.plain)))
        console.print(start.append_text(line), soft_wrap=True)


def summary(figures: DatasetStatistics) -> Iterator[tuple[str, str]]:
    """Yield the statistics as pairs of a name and a text."""
    formats = ", ".join(f"{number:,} {name}" for name, number in figures.formats.items())
    yield "model", f"{figures.model}, template {figures.template}"
    yield (
        "rows",
        f"{figures.num_rows:,} of data.{figures.split} ({formats}), {counted(figures.num_examples, 'example')}",
    )
    if figures.note:
        yield "", figures.note
    labels = f"{counted(figures.num_label_tokens, 'label token')} ({figures.label_share:.1%})"
    yield "tokens", f"{figures.num_input_tokens:,}, {labels}"
    if (lengths := figures.lengths) is not None:
        yield (
            "lengths",
            f"min {lengths.min:,}, median {lengths.median:,}, 90% up to {lengths.p90:,}, max {lengths.max:,}  "
            f"{sparkline(lengths)}  (max_length {figures.max_length:,})",
        )
    if figures.num_steps is not None:
        is_weighted = figures.num_epoch_examples != figures.num_examples
        epoch = f"; an epoch takes {counted(figures.num_epoch_examples or 0, 'example')}" if is_weighted else ""
        yield "steps", f"{figures.num_steps:,} of {counted(figures.rows_per_step or 0, 'row')}{epoch}"
    if figures.filling is not None:
        yield "batches", f"{figures.collator}: {figures.filling}"


def sparkline(lengths: LengthStatistics) -> str:
    """Return the histogram with one character for each bin; only an empty bin is a space."""
    counts = [one.count for one in lengths.histogram]
    return "".join(_BARS[-(-count * (len(_BARS) - 1) // max(counts))] for count in counts)


def _one_line(text: str) -> str:
    """Return text with blanks for line breaks, which the names of files may hold."""
    return printable(" ".join(text.splitlines()))


def _shorten(reason: str) -> str:
    return reason if len(reason) <= _MAX_REASON_CHARS else f"{reason[:_MAX_REASON_CHARS]} ..."


def _has_colours(console: Console) -> bool:
    return console.color_system is not None and not console.no_color


# --- rows ---------------------------------------------------------------------------------------


def _print_row(row: ExplainedRow, console: Console, *, ids: bool) -> None:
    head = Text().append(_one_line(row.where), "bold")
    parts = [f"row {row.number:,}", row.format, counted(row.length, "token") if row.length else ""]
    head.append("  " + ", ".join(part for part in parts if part))
    if row.status != "kept":
        head.append(f"  {row.status}", Style(color="red" if row.status == "dropped" else "yellow", bold=True))
        head.append(_one_line(": " + "; ".join(map(_shorten, row.reasons))))
    console.print(head)
    for example in row.examples:
        if len(row.examples) > 1:
            console.print(Text(f"example {printable(example.name.rpartition('#')[2])}", "italic"))
        _print_turns(example, console, ids=ids)
    if row.record:
        console.print(Text(printable(row.record)))


def _print_turns(example: ExplainedExample, console: Console, *, ids: bool) -> None:
    """Print each turn beside its role; lines are wrapped between tokens where possible."""
    width = max(20, console.width - _ROLE_CELLS - 1)
    shown = example.tokens[:_MAX_TOKENS]
    before: ExplainedToken | None = None
    for role, turn in groupby(shown, key=lambda token: token.role):
        tokens = list(turn)
        name = Text(printable(role), _MARGIN)
        name.truncate(_ROLE_CELLS)
        for line in _wrapped_lines(tokens, before, width, colours=_has_colours(console), ids=ids):
            start = Text(" " * (_ROLE_CELLS - cell_len(name.plain))).append_text(name).append(" ")
            console.print(start.append_text(line), soft_wrap=True)
            name = Text()
        before = tokens[-1]
    if len(shown) < len(example.tokens):
        rest = len(example.tokens) - len(shown)
        console.print(Text(f"{'':{_ROLE_CELLS}} … {counted(rest, 'more token')}; --json has them", "italic"))


def _wrapped_lines(
    tokens: Sequence[ExplainedToken], before: ExplainedToken | None, width: int, *, colours: bool, ids: bool
) -> Iterator[Text]:
    """Yield the lines of one turn, of at most `width` cells. A line break in the text ends the line here too."""
    line, cells = Text(), 0
    for number, token in enumerate(tokens):
        after = tokens[number + 1] if number + 1 < len(tokens) else None
        for text, style in _token_texts(token, before, after, number, colours=colours, ids=ids):
            for piece in re.split(r"(?<=⏎)(?!»)", text) if "\n" in token.text else [text]:
                for part in _split_to_width(piece, width):
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


def _split_to_width(text: str, width: int) -> Iterator[str]:
    part = ""
    for character in text:
        if cell_len(part + character) > width:
            yield part
            part = ""
        part += character
    if part:
        yield part


def _token_texts(
    token: ExplainedToken,
    before: ExplainedToken | None,
    after: ExplainedToken | None,
    number: int,
    *,
    colours: bool,
    ids: bool,
) -> Iterator[tuple[str, Style]]:
    """Yield a token's text and marks on one line with their styles.

    White space that would not be seen gets a sign, and characters that control a terminal are replaced. A weight other
    than 1 is written where a stretch of that weight begins. Without colours, « and » enclose label tokens of a turn.
    """
    is_after_label = before is not None and before.trained
    if token.trained and token.weight != 1 and not (before and before.trained and before.weight == token.weight):
        yield f"×{token.weight:g}", Style(dim=True)
    style = _LABEL[number % 2] if token.trained and colours else Style()
    if token.control:
        style += _CONTROL
    text = token.text.replace(" ", "·") if token.text.isspace() else token.text
    text = printable(text.translate(_VISIBLE)) if text else _CONTINUED
    if not colours and token.trained:
        opening = "«" if number == 0 or not is_after_label else ""
        closing = "" if after and after.trained else "»"
        text = f"{opening}{text}{closing}"
    yield text, style
    if ids:
        yield f"⟨{token.id}⟩", Style(dim=True)
