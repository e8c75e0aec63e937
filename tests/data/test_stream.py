"""Training on rows that are read meanwhile: window by window, every row accounted for, the same every time."""

from __future__ import annotations

import json
from collections import Counter
from itertools import islice
from pathlib import Path
from typing import Any

import pytest

from sftx.assembly.stages.data_stages import CollatorStage, ParserStage
from sftx.config.options import DataConfig, Filters, RunConfig, Source, TrainConfig
from sftx.data.row_encoder import RowEncoder
from sftx.data.sampler import StreamSampler
from sftx.data.sources import check_data_config
from sftx.data.stream import Stream
from sftx.errors import ConfigError, DataError
from sftx.testing.kit import Kit
from sftx_plugins.collators.packed import Packed
from sftx_plugins.collators.padded import Padded
from sftx_plugins.parsers.prompt_completion import PromptCompletion
from sftx_plugins.templates.chatml import ChatML


@pytest.fixture(scope="module")
def kit() -> Kit:
    return Kit(ChatML())


def write(path: Path, name: str, num: int) -> str:
    rows = [{"prompt": f"{name} {n}", "completion": "word " * (1 + n % 9)} for n in range(num)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def stream(kit: Kit, sources: list[Source], **options: Any) -> Stream:
    config = DataConfig(**options)
    return Stream(sources, RowEncoder({"pc": ParserStage("pc", PromptCompletion())}, kit.encoder, config), seed=3)


def rows(plan: StreamSampler) -> list[str]:
    return [examples[at].row_id for _, step, examples, *_ in plan for row in step for at in row]


@pytest.mark.parametrize("collator", [Padded(), Packed().sftx_collator(64)])
def test_every_row_is_seen_once_a_pass_and_the_same_in_every_run(kit: Kit, tmp_path: Path, collator: Any) -> None:
    path = write(tmp_path / "a.jsonl", "a", 50)

    def seen() -> list[str]:
        config = TrainConfig(max_steps=40, per_device_train_batch_size=3)
        return rows(
            StreamSampler(stream(kit, [Source(path)]), CollatorStage("collator", collator), config, window_size=17)
        )

    first = seen()
    assert first == seen()
    counts = Counter(first)
    assert len(counts) == 50
    # What is in the last windows and not yet used may be one short.
    assert max(counts.values()) - min(counts.values()) <= 1


def test_sources_come_by_weight_and_begin_anew(kit: Kit, tmp_path: Path) -> None:
    paths = [write(tmp_path / f"{name}.jsonl", name, 10) for name in "ab"]
    found = stream(kit, [Source(paths[0], weight=3), Source(paths[1])])
    examples = [example for _ in range(200) for example in found.window(50)]
    assert len(examples) > 4000
    share = sum("a.jsonl" in example.row_id for example in examples) / len(examples)
    assert abs(share - 0.75) < 0.03  # four standard deviations
    assert found.passes[0] > found.passes[1] > 50
    assert found.ledger.num_rows == 20  # each row is accounted for once


def test_dropped_rows_stop_a_stream_too(kit: Kit, tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    good, bad = ({"prompt": "x", "completion": text} for text in ("y", ""))
    path.write_text("".join(json.dumps(row) + "\n" for row in [good, bad] * 20))
    with pytest.raises(DataError, match="rows train nothing or were dropped"):
        stream(kit, [Source(str(path))]).window(10)
    path.write_text(json.dumps(bad) + "\n")
    with pytest.raises(DataError, match=r"a\.jsonl: no row of it gives an example: every trained turn is empty"):
        stream(kit, [Source(str(path))]).window(10)


def test_a_stream_whose_rows_train_no_stop_token_does_not_begin(kit: Kit, tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps({"prompt": "x", "completion": "word " * 100}) + "\n")
    with pytest.raises(DataError, match=r"no row trains the stop token <\|im_end\|>"):
        stream(kit, [Source(str(path))], max_length=40).window(5)


def test_a_window_is_read_when_it_is_needed(kit: Kit, tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", "a", 1000)
    found = stream(kit, [Source(path)])
    config = TrainConfig(max_steps=100, per_device_train_batch_size=4)
    plan = StreamSampler(found, CollatorStage("padded", Padded()), config, window_size=20)
    assert found.ledger.num_rows == 20
    list(islice(plan, 6))
    assert found.ledger.num_rows == 40
    assert (plan.scope.num_examples, plan.scope.num_steps) == (20, 5)


@pytest.mark.parametrize(
    ("data", "train", "message"),
    [
        (DataConfig(streaming=True), TrainConfig(), "a stream has no end; say how many steps with --max-steps"),
        (
            DataConfig(streaming=True, filters=Filters(duplicates="drop")),
            TrainConfig(max_steps=1),
            "filters.duplicates=drop needs all rows",
        ),
    ],
)
def test_what_a_stream_cannot_do_is_said_first(data: DataConfig, train: TrainConfig, message: str) -> None:
    import dataclasses

    data = dataclasses.replace(data, train=(Source("sftx:demo/train.jsonl"),))
    with pytest.raises(ConfigError, match=message):
        check_data_config(RunConfig(data=data, train=train))
