"""Every code block of every page is valid; the commands of the pages named here are run, those of others elsewhere."""

from __future__ import annotations

from pathlib import Path

import pytest

import pages
from pages import DOCS, ROOT, blocks

NOT_RUN = (
    "a drawing",
    "a formula",
    "needs several GPUs",
    "needs ollama",
    "needs the configuration of a model of the hub",
    "takes a file of another tool",
    "takes a run of the demo",
    "takes an exporter with a fault",
)
"""Reasons for which the commands of a block may be checked without being run."""
RUN_ELSEWHERE: dict[str, str] = {}
SELF_CONTAINED = sorted(DOCS.glob("howto/*.md"))


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with the run file that pages name without showing it."""
    directory = tmp_path_factory.mktemp("pages")
    (directory / "run.yaml").write_text("data: {train: chats.jsonl}\nplugins: {chatml: {}, lora: {}}\n")
    return directory


@pytest.mark.parametrize("page", pages.pages(), ids=lambda page: page.relative_to(ROOT).as_posix())
def test_the_blocks_of_a_page_are_valid(page: Path, directory: Path) -> None:
    wrong = []
    for block in blocks(page):
        assert block.not_run is None or block.not_run in NOT_RUN, (
            f"{block}: {block.not_run}: is no reason that is known"
        )
        try:
            pages.check(block, directory)
        except AssertionError as error:
            wrong.append(str(error))
    assert not wrong, "\n" + "\n".join(wrong)
