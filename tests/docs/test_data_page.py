"""docs/data.md is complete: its run files load, and it has every option, policy, format and kind of file."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path
from typing import Any, get_args, get_type_hints

import pytest

from sftx.config import options, run_file, validation
from sftx.config.default_plugins import DEFAULT_PLUGINS
from sftx.data import readers

PAGE = (Path(__file__).parents[2] / "docs" / "data.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("text", re.findall(r"^```yaml\n(.*?)^```$", PAGE, flags=re.MULTILINE | re.DOTALL))
def test_a_run_file_of_the_page_loads(text: str) -> None:
    values: dict[str, Any] = run_file.parse(text)[0]
    assert validation.validate(options.RunConfig, values, origins=run_file.Origins()).data.train


def test_the_page_has_every_option_of_data() -> None:
    blocks = re.findall(r"^```\w*\n(.*?)^```$|^    (.*)$", PAGE, flags=re.MULTILINE | re.DOTALL)
    text = re.sub(r"^```.*?^```$", "", PAGE, flags=re.MULTILINE | re.DOTALL)
    shown = set(re.findall(r"[a-z_]+", " ".join([*re.findall(r"`[^`]+`", text), *map(str, blocks)])))
    for cls in (options.DataConfig, options.Source, options.Filters):
        missing = {field.name for field in dataclasses.fields(cls)} - shown - {"train", "eval"}
        assert not missing, cls


def test_the_page_has_every_policy_and_strategy() -> None:
    hints = get_type_hints(options.DataConfig)
    for option in ("long_rows", "mix_strategy"):
        assert all(value in PAGE for value in get_args(hints[option])), option


def test_the_page_has_every_format_and_kind_of_file() -> None:
    for name in DEFAULT_PLUGINS["sftx_parser"]:
        assert f"| `{name}` |" in PAGE
    for suffix in re.findall(r"\.[a-z]+\w*", readers.known()):
        assert f"`{suffix}`" in PAGE, suffix


def test_the_line_of_a_ledger_on_the_page_is_valid() -> None:
    import json

    from sftx.data.ledger import Entry

    (line,) = re.findall(r"^```json\n(.*?)\n```$", PAGE, flags=re.MULTILINE)
    assert Entry.of(json.loads(line)).as_dict() == json.loads(line)
