"""A count agrees with its noun, and with the verb after it, in everything that is printed."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

import sftx
from sftx.errors import counted


@pytest.mark.parametrize(
    ("number", "several", "text"),
    [
        (0, "", "0 rows"),
        (1, "", "1 row"),
        (2000, "", "2,000 rows"),
        (1, "rows are", "1 row"),
        (2, "rows are", "2 rows are"),
    ],
)
def test_a_noun_has_the_form_of_its_number(number: int, several: str, text: str) -> None:
    assert counted(number, "row", several) == text


def test_no_module_has_its_own_plural() -> None:
    """`"1 row" if n == 1 else f"{n} rows"` and `'s' * (n != 1)` are written once."""
    own = re.compile(r'"1 (row|line|step|example|token)s?( \w+)?" if|\'s\' \* \(')
    places = [
        f"{file.name}:{number}"
        for file in Path(sftx.__file__).parent.rglob("*.py")
        for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), 1)
        if own.search(line) and "counted" not in line
    ]
    assert places == []
