"""The ledger counts, shows and writes every row that is dropped or cut, and refuses too many dropped rows."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from sftx.data.ledger import Entry, Ledger
from sftx.errors import DataError
from sftx.types import Location


def line(number: int) -> Location:
    return Location("rows.jsonl", number)


@pytest.fixture
def ledger() -> Ledger:
    """Return a ledger of 10 rows: 2 dropped for one reason, 1 dropped for another, 1 cut."""
    ledger = Ledger(num_rows=10)
    ledger.entries.append(Entry(line(3), "dropped", "no trained token", 12, 0))
    ledger.entries.append(Entry(line(4), "cut", "longer than max_length", 99, 64))
    ledger.entries.append(Entry(line(5), "dropped", "no assistant turn", 0, 0))
    ledger.entries.append(Entry(line(8), "dropped", "no trained token", 9, 0))
    return ledger


def test_the_summary_has_one_line_for_each_reason_the_most_frequent_first(ledger: Ledger) -> None:
    assert ledger.summary() == [
        "2 of 10 rows dropped: no trained token (first: rows.jsonl:3)",
        "1 of 10 rows cut: longer than max_length (first: rows.jsonl:4)",
        "1 of 10 rows dropped: no assistant turn (first: rows.jsonl:5)",
    ]
    assert Ledger(num_rows=5).summary() == []


def test_dropped_rows_up_to_max_dropped_are_accepted_and_cut_rows_do_not_count(ledger: Ledger) -> None:
    ledger.check(0.3)
    Ledger(num_rows=5).check(0.0)
    Ledger().check(0.0)
    cut = Ledger(num_rows=1)
    cut.entries.append(Entry(line(1), "cut", "longer than max_length", 99, 64))
    cut.check(0.0)


def test_more_dropped_rows_are_an_error_with_the_first_row_the_share_and_the_reasons(ledger: Ledger) -> None:
    with pytest.raises(DataError) as caught:
        ledger.check(0.25)
    assert str(caught.value) == (
        "rows.jsonl:3: no trained token (the row has 12 tokens); "
        "3 of 10 rows train nothing or were dropped, more than data.max_dropped=0.25 "
        "allows (2x for this reason; 1x no assistant turn); correct the rows, or raise data.max_dropped"
    )


def test_a_single_reason_is_not_repeated() -> None:
    ledger = Ledger(num_rows=2)
    ledger.entries.append(Entry(line(2), "dropped", "no trained token", 0, 0))
    with pytest.raises(DataError) as caught:
        ledger.check(0.0)
    assert "reasons" not in str(caught.value)


@pytest.mark.parametrize("max_dropped", [0.05, 1.0])
def test_dropping_every_row_is_an_error_whatever_max_dropped_is(max_dropped: float) -> None:
    ledger = Ledger(num_rows=2)
    ledger.entries.append(Entry(line(1), "dropped", "no trained token", 0, 0))
    ledger.entries.append(Entry(line(2), "dropped", "no trained token", 0, 0))
    with pytest.raises(DataError) as caught:
        ledger.check(max_dropped)
    assert str(caught.value) == (
        "rows.jsonl:1: no trained token; 2 of 2 rows train nothing or were dropped; correct the rows"
    )


def test_it_is_written_with_one_line_for_each_entry_in_the_order_of_the_rows(ledger: Ledger, tmp_path: Path) -> None:
    ledger.entries.append(Entry(Location("数据.parquet", 2, "row"), "dropped", "grund", 0, 0))
    ledger.write(tmp_path / "ledger.jsonl")
    written = [json.loads(text) for text in (tmp_path / "ledger.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [entry["where"] for entry in written] == [
        "rows.jsonl:3",
        "rows.jsonl:4",
        "rows.jsonl:5",
        "rows.jsonl:8",
        "数据.parquet row 2",
    ]
    assert written[1] == {
        "where": "rows.jsonl:4",
        "source": "rows.jsonl",
        "line": 4,
        "action": "cut",
        "reason": "longer than max_length",
        "length": 99,
        "kept": 64,
    }
    assert (written[4]["source"], written[4]["row"]) == ("数据.parquet", 2)
    assert Ledger.read((tmp_path / "ledger.jsonl").read_text(encoding="utf-8").splitlines()) == ledger.entries


def test_filtered_rows_do_not_count_unless_no_row_is_left() -> None:
    filtered = [Entry(line(n), "filtered", "filters.min_turns=4", 0, 0) for n in range(1, 10)]
    Ledger(filtered, num_rows=10).check(0.0)
    with pytest.raises(DataError, match=r"rows.jsonl:1: filters.min_turns=4; the filters leave none of 9 rows"):
        Ledger(filtered, num_rows=9).check(1.0)


def test_the_summary_of_a_thousand_reasons_has_eleven_lines() -> None:
    entries = [Entry(line(n), "dropped", f"reason {n // 2 if n < 4 else n}", 0, 0) for n in range(1000)]
    shown = Ledger(entries, num_rows=2000).summary()
    assert shown[0] == "2 of 2,000 rows dropped: reason 0 (first: rows.jsonl:0)"
    assert (len(shown), shown[-1]) == (11, "988 more rows for 988 other reasons: see the ledger")


def test_a_path_with_a_lone_surrogate_can_be_written(tmp_path: Path) -> None:
    Ledger([Entry(Location("a\udcff.jsonl", 1), "dropped", "x", 0, 0)], 2).write(tmp_path / "ledger.jsonl")
    assert "a\\udcff.jsonl:1" in (tmp_path / "ledger.jsonl").read_text(encoding="utf-8")
