"""The pages for users of other tools show what `sftx migrate` writes, and have every option of these tools."""

from __future__ import annotations

import re

import migrating_pages
from sftx.config.other_tools import TOOLS


def test_run_files_and_tables_of_the_pages_are_those_of_today() -> None:
    made = migrating_pages.all_pages()
    assert {path.stem for path in made} == {*TOOLS, "unsloth"}
    stale = [path.name for path, text in made.items() if path.read_text(encoding="utf-8") != text]
    assert not stale, "run `python tests/helpers/migrating_pages.py`"
    for path, text in made.items():
        assert len(migrating_pages._COMMAND.findall(text)) >= 1, path.name
        assert text.count("# Written by `sftx migrate` from ") >= 1, path.name
        assert text.count("\n| `") > 10, path.name


def test_the_table_of_real_configurations_is_that_of_today() -> None:
    made = migrating_pages.entry_page()
    assert made == migrating_pages.ENTRY.read_text(encoding="utf-8"), "run `python tests/helpers/migrating_pages.py`"
    rows = re.findall(r"^\| (LLaMA-Factory|Axolotl|TRL): ", made, flags=re.MULTILINE)
    assert [rows.count(tool) >= number for tool, number in (("LLaMA-Factory", 10), ("Axolotl", 5), ("TRL", 5))] == [
        True, True, True]  # fmt: skip


def test_the_entry_page_names_each_tools_page() -> None:
    text = migrating_pages.ENTRY.read_text(encoding="utf-8")
    assert set(re.findall(r"\(migrating/([\w-]+)\.md\)", text)) == {*TOOLS, "unsloth"}
