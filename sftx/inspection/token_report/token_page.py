"""What `sftx inspect` shows, as one page that fetches nothing: a template and its data as JSON."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any, Final

from sftx.inspection.html_page import filled
from sftx.inspection.token_report.inspect import Inspection, ShownExample
from sftx.inspection.token_report.terminal import summary

_PAGE: Final = Path(__file__).with_name("page.html")
_MOST_TOKENS: Final = 4000
"""Of one example; the page says how many more there are."""


def page(inspection: Inspection) -> str:
    """The whole page."""
    return filled(_PAGE, _data(inspection))


def _data(inspection: Inspection) -> dict[str, Any]:
    """The page's JSON: as `--json`, but that each token is a list whose words are numbers into `words`."""
    words: dict[str, int] = {}
    figures = inspection.figures
    return {
        "figures": dataclasses.asdict(figures),
        "summary": [list(line) for line in summary(figures)],
        "trained_share": figures.trained_share,
        "chosen": inspection.chosen,
        "rows": [
            {
                "number": row.number,
                "where": row.where,
                "format": row.format,
                "status": row.status,
                "reasons": row.reasons,
                "length": row.length,
                "record": row.record,
                "examples": [_example(example, words) for example in row.examples],
            }
            for row in inspection.rows
        ],
        "words": list(words),
    }


def _example(example: ShownExample, words: dict[str, int]) -> dict[str, Any]:
    def word(text: str) -> int:
        return words.setdefault(text, len(words))

    return {
        "name": example.name,
        "num_label_tokens": example.num_label_tokens,
        "length": len(example.tokens),
        "tokens": [
            [t.id, t.text, word(t.role), word(t.why), int(t.trained) + 2 * int(t.control)]
            for t in example.tokens[:_MOST_TOKENS]
        ],
    }
