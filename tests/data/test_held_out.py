"""Rows that are held out of the training data: which ones, on which side the others are, and what is both."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest

from sftx.assembly.stages.data_stages import ParserStage
from sftx.config.options import DataConfig, Filters, Source
from sftx.data import held_out, sources
from sftx.data.dataset import Dataset
from sftx.data.preprocess import Part, load_dataset
from sftx.data.row_encoder import RowEncoder
from sftx.errors import DataError
from sftx.testing.kit import Kit
from sftx_plugins.parsers.alpaca import Alpaca
from sftx_plugins.parsers.messages import Messages
from sftx_plugins.parsers.prompt_completion import PromptCompletion
from sftx_plugins.parsers.text import Text
from sftx_plugins.templates.chatml import ChatML

PARSERS: Any = {"messages": Messages(), "alpaca": Alpaca(), "prompt-completion": PromptCompletion(), "text": Text()}
STAGES = {name: ParserStage(name, parser) for name, parser in PARSERS.items()}


@pytest.fixture(scope="module")
def kit() -> Kit:
    return Kit(ChatML())


@pytest.fixture(autouse=True)
def _in_an_empty_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("SFTX_CACHE", str(tmp_path / "cache"))


def write(name: str, rows: Iterable[Any]) -> Source:
    Path(name).write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return Source(name)


def pair(n: int, **more: Any) -> dict[str, Any]:
    return {"prompt": f"question {n}", "completion": f"answer {n}", **more}


def chosen(data_sources: list[Source], fraction: float, **options: Any) -> list[dict[str, Any]]:
    """Return the records that are held out."""
    config = DataConfig(eval_fraction=fraction, **options)
    places = held_out.choose(data_sources, config, STAGES)
    return [
        dict(record)
        for number, source in enumerate(data_sources)
        for index, (_, record) in enumerate(sources.read(source))
        if (number, index) in places
    ]


def asked(question: str, answer: str, **of_answer: Any) -> dict[str, Any]:
    return {
        "messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer, **of_answer}],
    }


def split(kit: Kit, data_sources: list[Source], **options: Any) -> tuple[Dataset, Dataset]:
    """Encode the rows to train on, and those that are held out of them."""
    config = DataConfig(**options)
    encode = RowEncoder(STAGES, kit.encoder, config)
    parts = (Part(lambda: held_out.choose(data_sources, config, STAGES), is_held_out) for is_held_out in (False, True))
    train, evaluated = (load_dataset(data_sources, encode, identity={}, part=part) for part in parts)
    return train, evaluated


def names(data: Dataset) -> set[str]:
    return {example.row_id for example in data.examples}


@pytest.mark.parametrize(("fraction", "number"), [(0.1, 10), (0.25, 25), (0.001, 1), (7, 7), (1, 1), (99, 99)])
def test_as_many_rows_are_held_out_as_are_asked_for(fraction: float, number: int) -> None:
    source = write("a.jsonl", map(pair, range(100)))
    rows = chosen([source], fraction)
    assert len(rows) == number
    assert chosen([source], fraction) == rows
    others = chosen([source], fraction, eval_seed=1)
    assert (others == rows) is (number == 99 and others == rows), "another seed chooses other rows"


def test_what_is_held_out_does_not_depend_on_files_order_formats_and_options() -> None:
    rows = [pair(n) for n in range(100)]
    whole = chosen([write("a.jsonl", rows)], 0.2)
    parts = [write("b.jsonl", rows[60:]), write("c.jsonl", reversed(rows[:60]))]
    key = str
    assert sorted(chosen(parts, 0.2), key=key) == sorted(whole, key=key)
    assert sorted(chosen(parts[::-1], 0.2, max_length=4, num_proc=2), key=key) == sorted(whole, key=key)
    as_messages = [asked(row["prompt"], row["completion"]) | {"id": n} for n, row in enumerate(rows)]
    texts = {row["messages"][1]["content"] for row in chosen([write("d.jsonl", as_messages)], 0.2)}
    assert texts == {row["completion"] for row in whole}


def test_equal_rows_are_never_cut_apart(kit: Kit) -> None:
    rows = [
        *(pair(n, id=n) for n in range(40)),
        *({"instruction": f"question {n}", "output": f"answer {n} "} for n in range(40)),
        *(asked(f"question {n}", f"answer {n}", name="x") for n in range(10)),
    ]
    columns = Source(str(Path("c.jsonl")), columns={"prompt": "q", "completion": "a"})
    write("c.jsonl", ({"q": f"question {n}", "a": f"answer {n}"} for n in range(20, 40)))
    data_sources = [write("a.jsonl", rows), columns]
    for seed in range(5):
        train, evaluated = split(kit, data_sources, eval_fraction=0.3, eval_seed=seed)
        assert len(evaluated.examples) + len(train.examples) == 110
        assert 31 <= len(evaluated.examples) <= 35
        assert not held_out.find_overlap(train, evaluated)


def test_rows_of_a_group_stay_together(kit: Kit) -> None:
    rows = [pair(n, meta={"user": n % 10}) for n in range(50)] + [pair(n, meta={"user": 10 + n}) for n in range(2)]
    held = chosen([write("a.jsonl", rows)], 0.2, eval_group="meta.user")
    users = {row["meta"]["user"] for row in held}
    assert held == [row for row in rows if row["meta"]["user"] in users]
    assert 8 <= len(held) <= 13
    # Row 0 of user 0 is also a row of user 10, and row 1 of user 1 of user 11: they are held out together or not.
    for seed in range(8):
        users = {
            row["meta"]["user"] for row in chosen([Source("a.jsonl")], 0.5, eval_group="meta.user", eval_seed=seed)
        }
        assert [(0 in users) == (10 in users), (1 in users) == (11 in users)] == [True, True]
    large = chosen([write("b.jsonl", (pair(n, user=n // 50) for n in range(150)))], 0.01, eval_group="user")
    assert len(large) == 50, "one group at least"


def test_rows_that_train_nothing_are_neither_counted_nor_held_out(kit: Kit) -> None:
    rows = [pair(n) for n in range(20)] + [pair(n, completion="") for n in range(20, 30)] + [{"unknown": 1}]
    options: dict[str, Any] = {"invalid_rows": "drop", "max_dropped": 1.0}
    assert len(chosen([write("a.jsonl", rows)], 0.5, **options)) == 10
    train, evaluated = split(kit, [Source("a.jsonl")], eval_fraction=0.5, **options)
    assert (len(train.examples), len(evaluated.examples)) == (10, 10)
    assert (train.ledger.num_rows, evaluated.ledger.num_rows) == (31, 10)
    assert [entry.action for entry in train.ledger.entries] == ["dropped"] * 11 + ["held out"] * 10
    assert {str(entry.where) for entry in train.ledger.entries[11:]} == names(evaluated)
    assert names(train) | names(evaluated) == {f"a.jsonl:{n}" for n in range(1, 21)}
    assert train.ledger.summary()[1].startswith("10 of 31 rows held out: data.eval_fraction=0.5 (first: a.jsonl:")
    with pytest.raises(
        DataError, match=r"11 of 21 rows train nothing or were dropped, more than data.max_dropped=0.52"
    ):
        train.ledger.check(0.52)
    train.ledger.check(0.53)


def test_the_cache_keeps_both_sides_and_spares_the_choice(kit: Kit, monkeypatch: pytest.MonkeyPatch) -> None:
    data_sources = [write("a.jsonl", map(pair, range(30)))]
    first = split(kit, data_sources, eval_fraction=0.2, cache=True)
    assert [len(data.examples) for data in first] == [24, 6]
    assert len(names(first[0]) | names(first[1])) == 30
    with monkeypatch.context() as patch:
        patch.setattr(held_out, "choose", None)
        again = split(kit, data_sources, eval_fraction=0.2, cache=True)
    assert [list(data.examples) for data in again] == [list(data.examples) for data in first]
    assert [data.ledger for data in again] == [data.ledger for data in first]
    for changed in ({"eval_fraction": 0.3}, {"eval_fraction": 0.2, "eval_seed": 7}):
        assert names(split(kit, data_sources, cache=True, **changed)[1]) != names(first[1])


@pytest.mark.slow
def test_the_sides_do_not_depend_on_the_number_of_processes(kit: Kit) -> None:
    data_sources = [write("a.jsonl", map(pair, range(1200))), write("b.jsonl", map(pair, range(1100, 1300)))]
    one, two = (split(kit, data_sources, eval_fraction=0.3, num_proc=number) for number in (1, 2))
    for of_one, of_two in zip(one, two, strict=True):
        assert list(of_one.examples) == list(of_two.examples)
        assert of_one.ledger == of_two.ledger
    assert 0 < len(one[1].examples) < len(one[0].examples)


@pytest.mark.parametrize(
    ("rows", "options", "message"),
    [
        ([pair(1)] * 9, {"eval_fraction": 0.5}, "data.eval_fraction=0.5: the 9 rows that train something all belong"),
        ([pair(1)], {"eval_fraction": 0.5}, "data.eval_fraction=0.5: leaves no row to train on of 1 that train"),
        ([pair(1), pair(2)], {"eval_fraction": 2}, "data.eval_fraction=2: leaves no row to train on of 2"),
        ([pair(1), pair(2)], {"eval_fraction": 0.99}, "data.eval_fraction=0.99: leaves no row to train on of 2"),
        ([pair(1, u=1), pair(2)], {"eval_fraction": 1, "eval_group": "u"}, "a.jsonl:2: data.eval_group: no field 'u'"),
        ([pair(1, u=1), pair(2, u=1)], {"eval_fraction": 1, "eval_group": "u"}, "data.eval_fraction=1: the 2 rows"),
        ([{"x": 1}], {"eval_fraction": 0.5}, "a.jsonl:1: no format has the fields 'x'"),
    ],
)
def test_a_split_that_leaves_nothing_is_an_error(rows: list[Any], options: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError) as caught:
        held_out.choose([write("a.jsonl", rows)], DataConfig(**options), STAGES)
    assert str(caught.value).startswith(message)


# --- held-out rows that are trained on ------------------------------------------------------------


def encoded(kit: Kit, name: str, rows: Iterable[Any], **options: Any) -> Dataset:
    return load_dataset([write(name, rows)], RowEncoder(STAGES, kit.encoder, DataConfig(**options)))


def test_held_out_examples_that_are_trained_on_are_counted(kit: Kit, caplog: pytest.LogCaptureFixture) -> None:
    train = encoded(kit, "a.jsonl", [pair(n) for n in (0, 1, 2, 3, 2)])
    held = encoded(kit, "b.jsonl", [pair(n) for n in (9, 2, 8, 3, 2)])
    assert held_out.find_overlap(train, held) == [(1, 2), (3, 3), (4, 2)]
    found = "3 of 5 held-out examples (60.0%) are trained on (first: b.jsonl:2 is a.jsonl:3)"
    with pytest.raises(DataError) as caught:
        held_out.check_overlap(train, held, 0.59)
    assert str(caught.value).startswith(f"{found}, more than data.max_overlap=0.59 allows")
    assert not caplog.records
    held_out.check_overlap(train, held, 0.6)
    assert [record.message for record in caplog.records] == [
        f"{found}: a score on them says nothing; remove them from one of the two"
    ]
    caplog.clear()
    held_out.check_overlap(train, encoded(kit, "c.jsonl", [pair(7)]), 0.0)
    held_out.check_overlap(train, Dataset(), 0.0)
    held_out.check_overlap(Dataset(), held, 0.0)
    assert not caplog.records


def test_rows_are_compared_before_their_concatenation_is_cut(kit: Kit) -> None:
    texts = [{"text": f"a text of some length, number {n}"} for n in range(6)]
    train = encoded(kit, "a.jsonl", texts)
    train.examples = train.examples.wrapped(16)
    held = encoded(kit, "b.jsonl", texts[4:])
    assert held_out.find_overlap(train, held) == [(0, 4), (1, 5)]
    assert "(first: b.jsonl:1 is a.jsonl:5)" in held_out.describe_overlap([(0, 4)], train, held)


def test_duplicates_are_dropped_by_the_same_measure(kit: Kit) -> None:
    rows = [pair(1), pair(2), pair(1)]
    assert len(encoded(kit, "a.jsonl", rows, filters=Filters(duplicates="drop")).examples) == 2
    assert len(set(encoded(kit, "a.jsonl", rows).examples.digests())) == 2
