"""The generated pages of the site say what the code says."""

from __future__ import annotations

import pytest

import site_pages
from site_pages import DOCS, PAGES, REWRITE


@pytest.mark.parametrize("name", PAGES)
def test_a_generated_page_is_that_of_the_code(name: str) -> None:
    assert (DOCS / name).read_text(encoding="utf-8") == PAGES[name](), REWRITE


def test_every_extra_is_on_the_page_of_installing() -> None:
    page = (DOCS / "installing.md").read_text(encoding="utf-8")
    table = page.partition("| extra | for |")[2].partition("\n\n")[0]
    assert {
        name for line in table.splitlines() for name in line.split(" | ")[0].split("`")[1::2]
    } == site_pages.extras()
