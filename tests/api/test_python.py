"""`sftx.run` and its like take rows and options as Python has them, and refuse wrong ones as the command line does."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import yaml

import sftx
from sftx.data.python_rows import save_rows

ROWS = [
    {"messages": [{"role": "user", "content": f"say {i} ä"}, {"role": "assistant", "content": str(i)}]}
    for i in range(12)
]
OPTIONS: dict[str, Any] = {"model": "sftx:tiny", "plugins": ["chatml"], "add_tokens": True, "max_steps": 2}


class Indexed:
    """A dataset as torch has them: with a length and an index, which no IndexError ends."""

    def __init__(self, rows: list[dict[str, Any]]) -> None:
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, number: int) -> dict[str, Any]:
        return self.rows[number % len(self)]


def broken() -> Iterator[dict[str, Any]]:
    yield ROWS[0]
    raise KeyError("answer\nmissing")


@pytest.fixture(autouse=True)
def _places(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("SFTX_CACHE", str(tmp_path / "cache"))


@pytest.mark.parametrize(
    "give",
    [
        list,
        tuple,
        lambda rows: (row for row in rows),
        lambda rows: datasets.Dataset.from_list(rows),
        lambda rows: datasets.Dataset.from_list(rows).to_iterable_dataset(),
        lambda rows: {"train": rows},
        lambda rows: Indexed(rows),
    ],
    ids=["list", "tuple", "generator", "Dataset", "IterableDataset", "section", "torch"],
)
def test_rows_train_as_the_same_rows_in_a_file(give: Callable[[Any], Any], tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    expected = sftx.run(data="rows.jsonl", output_dir="file", **OPTIONS)
    result = sftx.run(data=give(ROWS), output_dir="rows", **OPTIONS)
    losses = [[line["loss"] for line in run.history if line["event"] == "step"] for run in (expected, result)]
    assert losses[0] == losses[1]
    assert len(losses[0]) == 2


def test_the_run_file_of_rows_works_again_and_resumes() -> None:
    first = sftx.run(data=iter(ROWS), output_dir="one", **OPTIONS)
    again = sftx.run("one/run.yaml", output_dir="two")
    assert first.summary["loss"] == again.summary["loss"]
    assert sftx.resume("one") == first
    (first.output_dir / "summary.json").unlink()
    assert sftx.resume("one", logging_steps=1).summary["loss"] == first.summary["loss"]


def test_options_are_named_flat_or_in_their_section() -> None:
    result = sftx.run(
        data=ROWS,
        model="sftx:tiny",
        add_tokens=True,
        plugins={"chatml": None, "lora": {"r": np.int64(2)}},
        learning_rate=np.float32(0.25),
        train={"max_steps": 1, "optim": "sgd"},
        generation_batch_size=3,
        max_length=64,
        output_dir=Path("run"),
    )
    values = yaml.safe_load((result.output_dir / "run.yaml").read_text())
    assert values["train"]["learning_rate"] == 0.25
    assert values["train"]["optim"] == "sgd"
    assert values["data"]["max_length"] == 64
    assert values["generation"]["batch_size"] == 3
    assert values["plugins"]["lora"]["r"] == 2
    assert result.metrics == {}


@pytest.mark.parametrize(
    ("wrong", "error", "parts"),
    [
        ({"learning_rte": 1e-4}, sftx.ConfigError, ["learning_rte=", "learning_rate"]),
        ({"learning_rate": "fast"}, sftx.ConfigError, ["learning_rate='fast'", "number"]),
        ({"train": {"seeed": 1}}, sftx.ConfigError, ["train['seeed']", "seed"]),
        ({"plugins": {"chatml": {}, "lora": {"rank": 4}}}, sftx.ConfigError, ["plugins['lora']", "rank"]),
        ({"plugins": ["chatml", "lorra"]}, sftx.PluginError, ["lorra", "lora"]),
        ({"data": []}, sftx.DataError, ["data: holds no rows"]),
        ({"data": ROWS, "eval_data": [ROWS[0], "x"]}, sftx.DataError, ["eval_data[1]", "str", "dict"]),
        ({"data": [{"text": b"x"}]}, sftx.DataError, ["data[0]", "bytes"]),
        ({"data": 5}, sftx.DataError, ["data", "int", "list"]),
        ({"data": "missing.jsonl"}, sftx.DataError, ["missing.jsonl"]),
        ({"data": [{"txt": "x"}]}, sftx.DataError, [".jsonl:1", "txt"]),
        ({"data": datasets.DatasetDict(a=datasets.Dataset.from_list(ROWS))}, sftx.DataError, ["splits (a)"]),
        ({"data": {"train": ROWS, "max_len": 3}}, sftx.ConfigError, ["data['max_len']", "max_length"]),
        ({"run_file": "none.yaml"}, sftx.ConfigError, ["none.yaml"]),
        ({"run_file": {"model": "sftx:tiny"}}, sftx.ConfigError, ["run_file", "dict", "keywords"]),
        ({"run_file": ROWS}, sftx.ConfigError, ["run_file", "list", "data"]),
        ({"data": broken()}, sftx.DataError, ["data[1]: raised KeyError", "answer"]),
        ({"data": datasets.Dataset.from_list(ROWS).select([])}, sftx.DataError, ["data: holds no rows"]),
        ({"data": datasets.Dataset.from_list(ROWS).to_pandas()}, sftx.DataError, ["DataFrame", "from_pandas"]),
        ({"data": {"prompt": ["a"], "completion": ["b"]}}, sftx.DataError, ["columns", "from_dict"]),
        ({"data": json.dumps(ROWS[0])}, sftx.DataError, ["text of rows", "json.loads"]),
        ({"data": [json.dumps(row) for row in ROWS]}, sftx.DataError, ["text of rows", "json.loads"]),
        ({"data": "[" + "x" * 5000}, sftx.DataError, ["cannot be read", "File name too long"]),
        ({"learning_rate": np.ones(2)}, sftx.ConfigError, ["learning_rate=[1.0, 1.0]", "number"]),
        ({"train": {"seed": 1}, "seed": 2}, sftx.ConfigError, ["seed: train['seed'] sets the same option"]),
        ({"plugins": 3}, sftx.ConfigError, ["plugins=3", "names"]),
        ({"plugins": ["chatml", {"lora": {"r": 8}}]}, sftx.ConfigError, ["plugins=", "mapping"]),
        ({"plugins": {"chatml": "x"}}, sftx.ConfigError, ["plugins['chatml']='x'", "mapping of options"]),
        ({"without": 3}, sftx.ConfigError, ["without=3"]),
        ({"resume": "runs/one"}, sftx.ConfigError, ["resume='runs/one'", "output_dir"]),
    ],
)
def test_a_wrong_argument_is_one_line_that_names_it(
    wrong: dict[str, Any], error: type[sftx.SftxError], parts: list[str]
) -> None:
    with pytest.raises(error) as caught:
        sftx.run(**(OPTIONS | {"data": ROWS} | wrong))
    message = str(caught.value)
    assert "\n" not in message, message
    assert all(part in message for part in parts), message


@pytest.mark.parametrize(
    ("call", "wrong", "named"),
    [
        (sftx.inspect, {"rows": -1}, "rows=-1"),
        (sftx.inspect, {"rows": "all"}, "rows='all'"),
        (sftx.inspect, {"split": "test"}, "split='test'"),
        (sftx.inspect, {"split": "eval"}, "split='eval': the run has no held-out rows"),
        (sftx.plan, {"gpu": 24}, "gpu=24"),
        (sftx.plan, {"nproc": 0}, "nproc=0"),
        (sftx.plan, {"nproc": "2"}, "nproc='2'"),
    ],
)
def test_a_wrong_argument_of_inspect_and_plan_is_refused(
    call: Callable[..., Any], wrong: dict[str, Any], named: str
) -> None:
    with pytest.raises(sftx.ConfigError) as caught:
        call(data=ROWS, **OPTIONS, **wrong)
    assert str(caught.value).startswith(named)


def test_one_process_has_one_run_at_a_time_in_whatever_thread() -> None:
    def rows() -> Iterator[dict[str, Any]]:
        yield from ROWS

    with pytest.raises(sftx.ConfigError, match="another run is at work in this process"), sftx.api._running:
        sftx.run(data=rows(), output_dir="one", **OPTIONS)

    async def cell() -> sftx.api.TrainedRun:  # a cell of a notebook runs within an event loop
        inside = sftx.run(data=rows(), output_dir="one", **OPTIONS)
        beside = await asyncio.to_thread(lambda: sftx.run(data=rows(), output_dir="two", **OPTIONS))
        assert inside.summary["loss"] == beside.summary["loss"]
        return inside

    assert asyncio.run(cell()).summary["num_steps"] == 2


def test_resume_wants_a_run_directory() -> None:
    with pytest.raises(sftx.ConfigError, match="no run directory"):
        sftx.resume("nothing")
    with pytest.raises(sftx.ConfigError, match="run_dir: is of type int"):
        sftx.resume(3)  # type: ignore[arg-type]
    (Path("one")).mkdir()
    Path("one/run.yaml").touch()
    for name in ("output_dir", "resume", "run_file"):
        with pytest.raises(sftx.ConfigError, match=f"{name}: has no meaning for sftx.resume"):
            sftx.resume("one", **{name: "two"})


def test_inspect_and_plan_take_the_same_arguments() -> None:
    seen = sftx.inspect(data=ROWS, rows=1, **OPTIONS)
    assert len(seen.report.rows) == 1
    assert seen.report.figures.num_rows == len(ROWS)
    plan = sftx.plan(data=ROWS, gpu="24GB", max_length=64, **OPTIONS)
    assert plan.fits
    assert plan.need.max_length == 64


def test_rows_are_saved_under_the_hash_of_their_content() -> None:
    rows: list[dict[str, Any]] = [{"text": "a\ud800", "score": np.float64(0.5), "ids": np.arange(3), "none": None}]
    path = save_rows(rows, "data")
    assert json.loads(path.read_text()) == {"text": "a\ud800", "score": 0.5, "ids": [0, 1, 2], "none": None}
    assert save_rows(iter(rows), "data") == path
    assert [file.name for file in path.parent.iterdir()] == [path.name]
    with pytest.raises(sftx.DataError):
        save_rows([*rows, 1], "data")
    assert [file.name for file in path.parent.iterdir()] == [path.name], "a failure leaves no file behind"
