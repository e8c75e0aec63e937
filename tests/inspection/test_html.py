"""The page of `sftx inspect` is complete, fetches nothing, and never parses the text of a row as HTML."""

from __future__ import annotations

import base64
import hashlib
import json
import re
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from inspected_rows import ROWS

HOSTILE: list[dict[str, Any]] = [
    {"text": "</script><script>window.hacked = 1</script>"},
    {"text": "<!-- <script> --> <img src=x onerror=alert(1)> {{data}} {{policy}} \u2028"},
    {"</script>": "<svg onload=alert(2)>"},
]


class Page(HTMLParser):
    """The elements of a page with their attributes, and the text of scripts and styles."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.inline: list[tuple[str, dict[str, str | None], str]] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        if self.elements and self.elements[-1][0] in ("script", "style") and data.strip():
            self.inline.append((*self.elements[-1], data))

    @property
    def policy(self) -> str:
        found = [a["content"] for _, a in self.elements if a.get("http-equiv") == "Content-Security-Policy"]
        assert len(found) == 1
        return str(found[0])

    @property
    def data(self) -> Any:
        (text,) = [text for _, attributes, text in self.inline if attributes.get("id") == "data"]
        return json.loads(text)


@pytest.fixture
def page_of(make_view: Callable[..., Any]) -> Callable[..., tuple[str, Page, Any]]:
    from sftx.inspection.token_report.explained_rows import sample_rows
    from sftx.inspection.token_report.token_page import token_page

    def make(rows: list[dict[str, Any]], most: int = 200, **options: Any) -> tuple[str, Page, Any]:
        report = sample_rows(make_view(rows, **options), "train", most)
        text = token_page(report)
        return text, Page(text), report

    return make


def test_what_rows_say_is_data_and_nothing_else(page_of: Callable[..., tuple[str, Page, Any]]) -> None:
    _, harmless, _ = page_of([{"text": "harmless"}])
    text, page, report = page_of([*ROWS, *HOSTILE])
    assert page.elements == harmless.elements, "rows make no element and no attribute"
    assert "hacked" not in text.replace("window.hacked = 1\\u003c/script>", "")
    block = text.partition('id="data">')[2].partition("</script>")[0]
    assert "<" not in block
    assert page.data["rows"][len(ROWS)]["examples"][0]["tokens"], "and it is all there"
    shown = ["".join(t[1] for e in row["examples"] for t in e["tokens"]) + row["record"] for row in page.data["rows"]]
    assert HOSTILE[0]["text"] in shown[len(ROWS)]
    assert HOSTILE[1]["text"] in shown[len(ROWS) + 1]
    assert json.loads(shown[len(ROWS) + 2]) == HOSTILE[2]
    assert len(shown) == len(report.rows)


def test_the_page_holds_the_report(page_of: Callable[..., tuple[str, Page, Any]]) -> None:
    _, page, report = page_of(ROWS, max_length=100)
    data = page.data
    for row, was in zip(data["rows"], report.rows, strict=True):
        assert (row["where"], row["status"], row["reasons"]) == (was.where, was.status, list(was.reasons))
        for example, shown in zip(row["examples"], was.examples, strict=True):
            assert [
                (id, text, data["words"][role], data["words"][why], bool(flags & 1), bool(flags & 2))
                for id, text, role, why, flags in example["tokens"]
            ] == [(t.id, t.text, t.role, t.why, t.trained, t.control) for t in shown.tokens]
    assert data["figures"]["num_label_tokens"] == report.figures.num_label_tokens
    assert data["figures"]["lengths"]["max"] == report.figures.lengths.max


def test_nothing_is_fetched_and_only_its_own_script_may_run(page_of: Callable[..., tuple[str, Page, Any]]) -> None:
    _, page, _ = page_of([*ROWS, *HOSTILE])
    for tag, attributes in page.elements:
        assert tag not in ("link", "img", "iframe", "object", "embed", "base", "form", "a")
        assert not {"src", "href", "style", "action", "data"} & set(attributes)
        assert not any(name.startswith("on") for name in attributes)
    directives = dict(part.strip().split(" ", 1) for part in page.policy.split(";"))
    assert directives["default-src"] == "'none'"
    assert directives["base-uri"] == directives["form-action"] == "'none'"
    for tag, name in (("style", "style-src"), ("script", "script-src")):
        (text,) = [text for of, attributes, text in page.inline if of == tag and not attributes]
        digest = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
        assert directives[name] == f"'sha256-{digest}'"
        assert not re.search(r"https?:(?!//www\.w3\.org/2000/svg)|url\(|@import|innerHTML|eval\(|fetch\(", text)


def _colours(css: str) -> dict[str, str]:
    return dict(re.findall(r"--([\w-]+): (#[0-9a-f]{6})", css))


def _luminance(colour: str) -> float:
    """Relative luminance as WCAG 2.1 defines it."""
    parts = [int(colour[n : n + 2], 16) / 255 for n in (1, 3, 5)]
    linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
    return sum(weight * part for weight, part in zip((0.2126, 0.7152, 0.0722), linear, strict=True))


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_colours_are_legible(page_of: Callable[..., tuple[str, Page, Any]], scheme: str) -> None:
    _, page, _ = page_of(ROWS[:1])
    (css,) = [text for tag, _, text in page.inline if tag == "style"]
    light, _, dark = css.partition("@media (prefers-color-scheme: dark)")
    colour = _colours(light if scheme == "light" else dark.partition("\n}")[0])
    papers = {
        "trained-ink": ("trained", "trained-2"),
        "ink": ("page", "card", "plain-2", "button"),
        "soft": ("page", "card", "plain-2"),
        "warn": ("card",),
        "stop": ("card",),
        "page": ("ink",),
    }
    for ink, backgrounds in papers.items():
        for background in backgrounds:
            low, high = sorted((_luminance(colour[ink]), _luminance(colour[background])))
            assert (high + 0.05) / (low + 0.05) >= 4.5, f"{ink} on {background}"


def test_the_command_writes_it(tmp_path: Path, make_view: Callable[..., Any]) -> None:
    from sftx.cli import main

    make_view([{"text": f"row {n}"} for n in range(30)])
    target = tmp_path / "page.html"
    common = ["inspect", "--model", "sftx:tiny", "--plugin", "chatml", "--data", str(tmp_path / "rows.jsonl")]
    done = CliRunner().invoke(main, [*common, "--html", str(target), "--max-rows", "10"])
    assert done.exit_code == 0, done.output
    assert "(10 of 30 rows)" in done.stderr
    data = Page(target.read_text(encoding="utf-8")).data
    assert len(data["rows"]) == 10
    assert data["figures"]["num_rows"] == 30
    done = CliRunner().invoke(main, [*common, "--html", str(tmp_path / "new" / "page.html"), "--max-rows", "10"])
    assert done.exit_code == 0, "directories are made, as by every command"
    assert (tmp_path / "new" / "page.html").read_bytes() == target.read_bytes()
    done = CliRunner().invoke(main, [*common, "--html", str(tmp_path / "rows.jsonl" / "page.html")])
    assert done.exit_code == 1
    assert "cannot be written" in done.stderr
