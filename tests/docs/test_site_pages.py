"""The generated pages of the site say what the code says, and the record of the plugins' checks has all of them."""

from __future__ import annotations

import json

import pytest

import sftx
import site_pages
from site_pages import CHECKS, DOCS, PAGES, REWRITE


@pytest.mark.parametrize("name", PAGES)
def test_a_generated_page_is_that_of_the_code(name: str) -> None:
    assert (DOCS / name).read_text(encoding="utf-8") == PAGES[name](), REWRITE


def test_the_recorded_checks_are_those_of_these_plugins_with_these_contracts() -> None:
    """Whether a plugin keeps its contract is tested with the plugins; here, that the record is not an old one."""
    record = json.loads(CHECKS.read_text(encoding="utf-8"))
    assert record["sftx"] == sftx.__version__, "run `make plugin-checks`"
    assert list(record["plugins"]) == [info.name for info in site_pages.built_in()], "run `make plugin-checks`"
    for info in site_pages.built_in():
        check = record["plugins"][info.name]
        if info.name in site_pages.OWN_TESTS:
            assert (site_pages.ROOT / check["tests"]).is_file()
            continue
        assert check["broken"] == []
        assert check["kept"] + len(check["exempt"]) == site_pages.number_of_clauses(info), "run `make plugin-checks`"


def test_every_extra_is_on_the_page_of_installing() -> None:
    page = (DOCS / "installing.md").read_text(encoding="utf-8")
    table = page.partition("| extra | for |")[2].partition("\n\n")[0]
    assert {
        name for line in table.splitlines() for name in line.split(" | ")[0].split("`")[1::2]
    } == site_pages.extras()
