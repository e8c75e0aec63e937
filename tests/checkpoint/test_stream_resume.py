"""A stream that is stopped after any step and resumed gives the same rows, groups, ledger, passes and epochs."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sftx.assembly.stages.data_stages import CollatorStage, ParserStage
from sftx.config.options import DataConfig, Source, TrainConfig
from sftx.data.row_encoder import EncodedRow, RowEncoder
from sftx.data.sampler import PlannedStep, StreamSampler
from sftx.data.stream import Stream
from sftx.errors import DataError, ModelError
from sftx.testing.kit import Kit
from sftx.types import Collator, Conversation, Example, Location, Message, Record
from sftx_plugins.collators.packed import Packed
from sftx_plugins.collators.padded import Padded
from sftx_plugins.templates.chatml import ChatML

NUM_STEPS = 60


class Turns:
    """A parser of rows with a question and one or two answers (a pair), with weights and extras."""

    fields = samples = ()

    def accepts(self, record: Record) -> bool:
        return True

    def parse(self, record: Record, where: Location) -> tuple[Conversation, ...]:
        question = Message("user", record["question"])
        return tuple(
            Conversation(
                (question, Message("assistant", answer, weight=record.get("weight", 1.0))),
                extras={"answer": n, "of": [where.number, None, 0.1]} if len(record["answers"]) > 1 else {},
            )
            for n, answer in enumerate(record["answers"])
        )


@dataclass(frozen=True)
class Remembering(RowEncoder):
    """Encodes each row once, however many samplers read it: the result depends on the row alone."""

    encoded: dict[str, EncodedRow] = field(default_factory=dict)

    def __call__(self, where: Location, record: Record, source: Source) -> EncodedRow:
        if (row := self.encoded.get(str(where))) is None:
            row = self.encoded[str(where)] = super().__call__(where, record, source)
        return row


@pytest.fixture(scope="module")
def kit() -> Kit:
    return Kit(ChatML())


def write(path: Path, num: int) -> str:
    """Write rows of several lengths; some are pairs, some weighted, some too long and cut, one dropped."""
    rows = []
    for n in range(num):
        row: dict[str, Any] = {"question": f"{path.stem} {n}", "answers": ["word " * (1 + n % 5)]}
        if n % 5 == 1:
            row["answers"] += ["no"]
        elif n % 7 == 2:
            row["weight"] = 0.1 * (n + 1)
        elif n % 7 == 4:
            row["answers"] = ["long " * 60]
        elif n == num // 2:
            row["answers"] = [""]
        rows.append(row)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.fixture
def sources(tmp_path: Path) -> list[Source]:
    """Three sources: the first is read many times in a run, the last not even once."""
    sizes, weights = (9, 31, 500), (3.0, 1.0, 2.0)
    return [
        Source(write(tmp_path / f"{name}.jsonl", num), weight=weight, limit=400 if num > 400 else None)
        for name, num, weight in zip("abc", sizes, weights, strict=True)
    ]


Make = Callable[[], StreamSampler]


def maker(kit: Kit, sources: list[Source], collator: Collator, window: int) -> Make:
    stage = CollatorStage("the collator", collator)
    encode = Remembering(
        {"turns": ParserStage("plugin 'turns'", Turns())}, kit.encoder, DataConfig(max_length=48, max_dropped=0.5)
    )

    def make() -> StreamSampler:
        config = TrainConfig(max_steps=NUM_STEPS, per_device_train_batch_size=4)
        return StreamSampler(Stream(sources, encode, seed=3), stage, config, window)

    return make


def account(plan: StreamSampler) -> Any:
    """Return everything that is recorded about the rows read so far."""
    stream = plan._stream
    return (
        [entry.as_dict() for entry in stream.ledger.entries],
        stream.ledger.num_rows,
        dict(stream.formats),
        stream.passes,
        (stream.has_turns, stream.trains_stop),
    )


def of_step(planned: PlannedStep) -> Any:
    """Return a step as it is trained: every value of every example of it."""
    return planned.epoch, [[_values(planned.examples[index]) for index in row] for row in planned.rows]


def _values(example: Example) -> dict[str, Any]:
    """Return the fields of an example, with lists for arrays, which can be compared."""
    fields = dataclasses.fields(example)
    values = {field.name: getattr(example, field.name) for field in fields}
    return {name: value.tolist() if isinstance(value, np.ndarray) else value for name, value in values.items()}


def resumed(make: Make, state: dict[str, Any]) -> StreamSampler:
    plan = make()
    plan.load_state_dict(json.loads(json.dumps(state)))
    return plan


@pytest.mark.parametrize(
    ("collator", "window"),
    [(Padded(), 6), (Padded(), 50), (Packed().sftx_collator(64), 3), (Packed().sftx_collator(96), 40)],
    ids=["padded-small", "padded", "packed-small", "packed"],
)
def test_a_stream_goes_on_after_any_step(kit: Kit, sources: list[Source], collator: Collator, window: int) -> None:
    make = maker(kit, sources, collator, window)
    plan = make()
    running, steps, states, accounts = iter(plan), [], [plan.state_dict(0)], [account(plan)]
    unfinished = []
    for done in range(1, NUM_STEPS + 1):
        steps.append(of_step(next(running)))
        unfinished.append(plan.state_dict(done - 1))
        states.append(plan.state_dict(done))
        accounts.append(account(plan))
    assert next(running, None) is None
    assert_covers_much(plan, steps, states)

    for done, state in enumerate(states):
        again = resumed(make, state)
        assert again.state_dict(done) == state
        assert account(again) == accounts[done]
        assert [of_step(planned) for planned in again] == steps[done:]
        assert account(again) == accounts[-1]
    for done, state in enumerate(unfinished):
        assert [of_step(planned) for planned in islice(resumed(make, state), 3)] == steps[done : done + 3]


def assert_covers_much(plan: StreamSampler, steps: list[Any], states: list[dict[str, Any]]) -> None:
    """Check that the stream has everything that a resumed one could get wrong."""
    entries, num_rows, _, passes, _ = account(plan)
    examples = [example for _, rows in steps for row in rows for example in row]
    assert passes[0] > passes[1] >= 1
    assert passes[2] == 0
    assert {entry["action"] for entry in entries} == {"dropped", "cut"}
    assert num_rows > 40
    assert any(example["extras"] for example in examples)
    assert any(example["weights"] for example in examples)
    assert len({example["group"] for example in examples}) < len(examples)
    assert any(state["carried"] for state in states)
    assert len({state["window"] for state in states}) > 2
    assert any(reader["num_read"] for reader in states[-1]["stream"]["readers"])


def test_a_stream_that_is_stopped_after_every_step_is_the_stream_that_is_not(kit: Kit, sources: list[Source]) -> None:
    make = maker(kit, sources, Packed().sftx_collator(64), 15)
    steps, state = [], make().state_dict(0)
    for done in range(1, NUM_STEPS + 1):
        plan = resumed(make, state)
        steps.append(of_step(next(iter(plan))))
        state = plan.state_dict(done)
    whole = make()
    assert steps == [of_step(planned) for planned in whole]
    assert state == whole.state_dict(NUM_STEPS)
    finished = resumed(make, state)
    assert not list(finished)
    assert account(finished) == account(whole)


def test_a_plan_whose_next_window_cannot_be_read_still_has_a_state(kit: Kit, tmp_path: Path) -> None:
    path = Path(write(tmp_path / "a.jsonl", 60))
    good = path.read_text()
    make = maker(kit, [Source(str(path))], Padded(), 20)
    whole = [of_step(planned) for planned in make()]
    lines = good.splitlines(keepends=True)
    path.write_text("".join([*lines[:30], "{\n", *lines[31:]]))
    plan, steps = make(), []
    with pytest.raises(DataError, match=r"a\.jsonl:31: not valid JSON"):
        steps.extend(map(of_step, plan))
    done = len(steps)
    assert steps == whole[:done] != []
    path.write_text(good)
    state = plan.state_dict(done)
    assert [of_step(planned) for planned in resumed(make, state)] == whole[done:]


def test_sources_that_have_changed_are_refused(kit: Kit, sources: list[Source]) -> None:
    plan = maker(kit, sources, Padded(), 50)()
    state = plan.state_dict(len([None for _ in islice(plan, 40)]))
    with pytest.raises(DataError, match=r"data\.train: the run that is resumed reads .*a\.jsonl, .*b\.jsonl, .*; give"):
        resumed(maker(kit, sources[:1], Padded(), 50), state)
    last = Path(sources[2].path)
    last.write_text("".join(last.read_text().splitlines(keepends=True)[:20]))
    with pytest.raises(DataError, match=r"c\.jsonl: holds fewer than the \d+ rows that were read .* it has changed"):
        resumed(maker(kit, sources, Padded(), 50), state)


def test_an_id_without_an_embedding_is_told_with_its_row_in_a_later_window_too(kit: Kit, sources: list[Source]) -> None:
    make = maker(kit, sources, Padded(), 10)
    examples = [example for planned in make() for row in of_step(planned)[1] for example in row]
    largest = max(max(example["token_ids"]) for example in examples)
    plan = make()
    plan.num_embeddings = largest + 1
    assert len(list(plan)) == NUM_STEPS
    plan = make()
    plan.num_embeddings = largest
    with pytest.raises(
        ModelError, match=rf"\.jsonl:\d+.*: gives the token id {largest}, .* embedding has {largest} rows"
    ):
        list(plan)
