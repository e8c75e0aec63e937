"""The shipped rows are the generator's output, and the held-out rows use values and phrasings unknown to training."""

import json
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

import sftx.demo
from sftx.demo import generate

DEMO = Path(sftx.demo.__file__).parent
SPLITS: list[generate.Split] = ["train", "held_out"]
# The arguments whose values occur in both splits; every other argument's values are disjoint.
CLOSED = {"day", "state", "currency", "source", "target"}


def shipped_rows(split: generate.Split) -> list[generate.Row]:
    return [json.loads(line) for line in (DEMO / f"{split}.jsonl").read_text(encoding="utf-8").splitlines()]


def requests(split: generate.Split) -> list[str]:
    return [row["messages"][0]["content"] for row in shipped_rows(split)]


def answers(split: generate.Split) -> list[dict[str, Any]]:
    return [json.loads(row["messages"][1]["content"]) for row in shipped_rows(split)]


def arguments(split: generate.Split) -> Iterator[tuple[str, Any]]:
    for answer in answers(split):
        yield from answer["arguments"].items()


@pytest.mark.parametrize("split", SPLITS)
def test_shipped_files_are_what_the_generator_writes(split: generate.Split, tmp_path: Path) -> None:
    generate.main(tmp_path)
    assert (tmp_path / f"{split}.jsonl").read_bytes() == (DEMO / f"{split}.jsonl").read_bytes()
    assert generate.rows(split, generate.NUM_ROWS[split]) == shipped_rows(split)


def test_numbers_of_rows() -> None:
    assert 1000 <= len(shipped_rows("train")) <= 1200
    assert len(shipped_rows("held_out")) == 200


@pytest.mark.parametrize("split", SPLITS)
def test_a_row_is_one_request_and_one_answer(split: generate.Split) -> None:
    for row in shipped_rows(split):
        assert list(row) == ["messages"]
        assert [message["role"] for message in row["messages"]] == ["user", "assistant"]
        for message in row["messages"]:
            assert message["content"] == message["content"].strip()
            assert "\n" not in message["content"]


def test_no_request_occurs_twice() -> None:
    assert len(set(requests("train") + requests("held_out"))) == sum(generate.NUM_ROWS.values())


@pytest.mark.parametrize("split", SPLITS)
def test_an_answer_calls_a_known_function_with_its_arguments_in_order(split: generate.Split) -> None:
    declared = {function.name: function.arguments for function in generate.FUNCTIONS}
    for row, answer in zip(shipped_rows(split), answers(split), strict=True):
        assert list(answer) == ["function", "arguments"]
        names = list(answer["arguments"])
        assert names
        assert names == [name for name in declared[answer["function"]] if name in names]
        assert json.dumps(answer) == row["messages"][1]["content"]


@pytest.mark.parametrize("split", SPLITS)
def test_functions_have_equal_shares(split: generate.Split) -> None:
    counts = Counter(answer["function"] for answer in answers(split))
    assert set(counts) == {function.name for function in generate.FUNCTIONS}
    assert max(counts.values()) - min(counts.values()) <= 1


def test_free_values_of_held_out_rows_are_unknown_to_training() -> None:
    known = set(arguments("train"))
    for name, value in arguments("held_out"):
        assert ((name, value) in known) == (name in CLOSED), (name, value)


def test_the_generator_has_the_same_closed_arguments() -> None:
    assert set(generate.CLOSED) == CLOSED
    assert not CLOSED & set(generate.FREE)
    assert {name for function in generate.FUNCTIONS for name in function.arguments} == CLOSED | set(generate.FREE)


def test_every_value_can_be_read_in_the_request() -> None:
    """The request has a free value literally and a closed value by its wording."""
    for split in SPLITS:
        for request, answer in zip(requests(split), answers(split), strict=True):
            for name, value in answer["arguments"].items():
                wordings = generate.CLOSED[name][value] if name in CLOSED else [str(value)]
                assert any(wording in request for wording in wordings), (request, name, value)


def test_some_held_out_phrasings_are_unknown_to_training() -> None:
    for function in generate.FUNCTIONS:
        assert function.new_phrasings
        assert not set(function.phrasings) & set(function.new_phrasings)
        used = {name for name in function.arguments if any(f"{{{name}}}" in text for text in function.phrasings)}
        assert used == set(function.arguments)


def test_run_file_trains_on_the_shipped_files() -> None:
    run = yaml.safe_load((DEMO / "run.yaml").read_text(encoding="utf-8"))
    assert run["data"]["train"].endswith("demo/train.jsonl")
    assert run["data"]["eval"].endswith("demo/held_out.jsonl")
    num_rows_seen = run["train"]["max_steps"] * run["train"]["per_device_train_batch_size"]
    assert num_rows_seen <= generate.NUM_ROWS["train"]  # the default run is less than one epoch
