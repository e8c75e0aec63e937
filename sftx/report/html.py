"""What `sftx inspect` shows, as one page that fetches nothing: a template, its data as JSON, a policy that allows both.

The page's own script builds everything with text nodes, so that what a row says is never read as HTML; the policy
allows that script by its hash and nothing else.
"""

from __future__ import annotations

import base64
import dataclasses
import hashlib
import json
import re
from pathlib import Path
from typing import Any, Final

from sftx.report.inspect import Inspection, ShownExample
from sftx.report.terminal import summary

_PAGE: Final = Path(__file__).with_name("page.html")
_MOST_TOKENS: Final = 4000
"""Of one example; the page says how many more there are."""


def page(inspection: Inspection) -> str:
    """The whole page."""
    template = _PAGE.read_text(encoding="utf-8")
    policy = (
        f"default-src 'none'; style-src '{_hash(template, 'style')}'; script-src '{_hash(template, 'script')}'; "
        "base-uri 'none'; form-action 'none'"
    )
    # A row that spells </script> or <!-- must not end the block that holds it.
    data = json.dumps(_data(inspection), ensure_ascii=False, separators=(",", ":")).replace("<", "\\u003c")
    head, middle, tail = re.split(r"\{\{policy\}\}|\{\{data\}\}", template)
    return f"{head}{policy}{middle}{data}{tail}"


def _hash(template: str, tag: str) -> str:
    """The source expression of the inline element `tag`, as Content Security Policy has it."""
    found = re.search(rf"<{tag}>(.*?)</{tag}>", template, flags=re.DOTALL)
    assert found is not None
    return "sha256-" + base64.b64encode(hashlib.sha256(found[1].encode()).digest()).decode()


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
        "num_tokens": example.num_tokens,
        "length": len(example.tokens),
        "tokens": [
            [t.id, t.text, word(t.role), word(t.why), int(t.trained) + 2 * int(t.control)]
            for t in example.tokens[:_MOST_TOKENS]
        ],
    }
