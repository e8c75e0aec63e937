"""`sftx inspect --html`: the token report as one HTML file, `token_page.html` filled with its data as JSON."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any, Final

from sftx.inspection.html_page import fill_template
from sftx.inspection.token_report.explained_rows import ExplainedExample, TokenReport
from sftx.inspection.token_report.terminal import summary

_TEMPLATE: Final = Path(__file__).with_name("token_page.html")
_MAX_TOKENS: Final = 4000
"""At most so many tokens of an example are shown; the page says how many it omits."""


def token_page(report: TokenReport) -> str:
    """Return the HTML page.

    Its JSON is that of `--json`, except that a token is a list, whose role and reason are indices into `words`.
    """
    words: dict[str, int] = {}
    figures = report.figures
    data = {
        "figures": dataclasses.asdict(figures),
        "summary": [list(line) for line in summary(figures)],
        "label_share": figures.label_share,
        "chosen": report.chosen,
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
            for row in report.rows
        ],
        "words": list(words),
    }
    return fill_template(_TEMPLATE, data)


def _example(example: ExplainedExample, words: dict[str, int]) -> dict[str, Any]:
    def index(text: str) -> int:
        return words.setdefault(text, len(words))

    return {
        "name": example.name,
        "num_label_tokens": example.num_label_tokens,
        "length": len(example.tokens),
        "tokens": [
            [t.id, t.text, index(t.role), index(t.why), int(t.trained) + 2 * int(t.control)]
            for t in example.tokens[:_MAX_TOKENS]
        ],
    }
