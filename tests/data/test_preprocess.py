"""Rows read, marked, filtered and encoded: by one process or several, from the files or from the cache."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from encoding import prepared
from sftx.assembly.stages.data_stages import ParserStage
from sftx.config.options import DataConfig, Filters, Source
from sftx.data import preprocess as prepare_module
from sftx.data.dataset import Dataset
from sftx.data.export import export_lines
from sftx.data.ledger import Ledger
from sftx.data.preprocess import load_dataset
from sftx.data.row_encoder import RowEncoder
from sftx.errors import DataError, PluginError
from sftx.testing.kit import Kit
from sftx.types import Conversation
from sftx_plugins.parsers.messages import Messages
from sftx_plugins.parsers.prompt_completion import PromptCompletion
from sftx_plugins.templates.chatml import ChatML

PARSERS: Any = {"messages": Messages(), "prompt-completion": PromptCompletion()}
STAGES = {name: ParserStage(name, parser) for name, parser in PARSERS.items()}


@pytest.fixture(scope="module")
def kit() -> Kit:
    return Kit(ChatML())


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("SFTX_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "encoded"


def write(path: Path, rows: list[Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def talk(*contents: str, **first: Any) -> dict[str, Any]:
    roles = ("user", "assistant")
    return {"messages": [{"role": roles[n % 2], "content": text} for n, text in enumerate(contents)], **first}


def trained(kit: Kit, data: Dataset) -> list[str]:
    return [
        kit.tokenizer.decode([t for t, on in zip(e.token_ids, e.loss_mask, strict=True) if on]) for e in data.examples
    ]


def same(one: Dataset, other: Dataset) -> bool:
    return (
        list(one.examples) == list(other.examples)
        and one.questions == other.questions
        and one.ledger == other.ledger
        and one.formats == other.formats
        and (one.trains_stop, one.has_turns) == (other.trains_stop, other.has_turns)
    )


def many(path: Path, num: int = 1200) -> Path:
    """Rows of which every eleventh is dropped and every seventh is too long."""
    rows = [{"prompt": f"ask {n}", "completion": "" if n % 11 == 0 else f"answer {n} " * (40 if n % 7 == 0 else 2)}
            for n in range(num)]  # fmt: skip
    return write(path, rows)


# --- what is trained ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, ["b<|im_end|>\nd<|im_end|>\n"]),
        ({"train_turns": "last"}, ["d<|im_end|>\n"]),
        ({"train_roles": ("user",)}, ["a<|im_end|>\nc<|im_end|>\n"]),
        ({"train_roles": ("user", "assistant"), "train_turns": "last"}, ["d<|im_end|>\n"]),
        ({"train_turn_end": False}, ["bd"]),
        (
            {"train_turn_end": False, "train_on_prompt": True},
            ["<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\nb<|im_start|>user\nc<|im_end|>\n"
             "<|im_start|>assistant\nd"],
        ),
        (
            {"train_on_prompt": True},
            ["<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\nb<|im_end|>\n"
             "<|im_start|>user\nc<|im_end|>\n<|im_start|>assistant\nd<|im_end|>\n"],
        ),
    ],
)  # fmt: skip
def test_the_options_say_which_tokens_are_trained(
    kit: Kit, tmp_path: Path, options: dict[str, Any], expected: list[str]
) -> None:
    path = write(tmp_path / "a.jsonl", [talk("a", "b", "c", "d")])
    assert trained(kit, prepared([path], DataConfig(**options), PARSERS, kit.encoder)) == expected


def test_what_a_row_says_of_its_turns_goes_before_the_options(kit: Kit, tmp_path: Path) -> None:
    row = talk("a", "b", "c", "d")
    row["messages"][1]["weight"] = 0
    path = write(tmp_path / "a.jsonl", [row])
    both = DataConfig(train_roles=("user", "assistant"))
    assert trained(kit, prepared([path], both, PARSERS, kit.encoder)) == ["a<|im_end|>\nc<|im_end|>\nd<|im_end|>\n"]


@pytest.mark.parametrize(("system", "begins"), [("Other.", "system\nOther."), ("", "user\n"), (None, "system\nMine.")])
def test_the_system_text_can_be_replaced_or_taken_out(
    kit: Kit, tmp_path: Path, system: str | None, begins: str
) -> None:
    row = talk("a", "b")
    row["messages"].insert(0, {"role": "system", "content": "Mine."})
    path = write(tmp_path / "a.jsonl", [row])
    data = prepared([path], DataConfig(system=system), PARSERS, kit.encoder, questions=True)
    for ids in (data.examples[0].token_ids, data.questions[0].prompt_ids):
        text = kit.tokenizer.decode(ids)
        assert text.startswith(f"<|im_start|>{begins}")
        assert text.count("<|im_start|>system") == (1 if system != "" else 0)


# --- filters and mending ------------------------------------------------------------------------


def test_filters_leave_rows_out_and_say_so(kit: Kit, tmp_path: Path) -> None:
    rows = [
        talk("a", "b"),
        talk("a", "b", "c", "d"),
        talk("a", "b"),
        talk("a " * 50, "b"),
        talk("a", "b", "c", "d", "e", "f"),
    ]
    path = write(tmp_path / "a.jsonl", rows)
    filters = Filters(max_turns=4, max_length=60, duplicates="drop")
    data = prepared([path], DataConfig(filters=filters, max_dropped=0), PARSERS, kit.encoder)
    assert [(e.where.number, e.action, e.reason) for e in data.ledger.entries] == [
        (3, "filtered", "the same tokens as an earlier row"),
        (4, "filtered", "filters.max_length=60"),
        (5, "filtered", "filters.max_turns=4"),
    ]
    assert len(data.examples) == 2


def test_each_source_has_its_own_filters_format_columns_and_limit(kit: Kit, tmp_path: Path) -> None:
    first = write(tmp_path / "a.jsonl", [talk("a", "b"), talk("a", "b", "c", "d")])
    second = write(tmp_path / "b.jsonl", [{"question": f"q{n}", "answer": f"r{n}"} for n in range(5)])
    wanted = [
        Source(str(first), filters=Filters(min_turns=4)),
        Source(
            str(second), columns={"prompt": "question", "completion": "answer"}, format="prompt-completion", limit=2
        ),
    ]
    data = load_dataset(wanted, RowEncoder(STAGES, kit.encoder, DataConfig()))
    assert trained(kit, data) == ["b<|im_end|>\nd<|im_end|>\n", "r0<|im_end|>\n", "r1<|im_end|>\n"]
    assert data.examples.sources.tolist() == [0, 1, 1]
    assert data.formats == {"messages": 2, "prompt-completion": 2}


def test_rows_that_no_format_can_read_stop_the_run_or_are_dropped(kit: Kit, tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", [talk("a", "b"), {"strange": 1}, talk("a", "b", messages=7)])
    with pytest.raises(DataError, match=r"a\.jsonl:2: no format has the fields"):
        prepared([path], DataConfig(max_dropped=1), PARSERS, kit.encoder)
    data = prepared([path], DataConfig(max_dropped=1, invalid_rows="drop"), PARSERS, kit.encoder)
    assert [e.where.number for e in data.ledger.entries] == [2, 3]
    assert "messages is a number, expected a list" in data.ledger.entries[1].reason
    with pytest.raises(DataError, match="2 of 3 rows train nothing or were dropped"):
        prepared([path], DataConfig(invalid_rows="drop"), PARSERS, kit.encoder)


# --- several processes, and the cache -----------------------------------------------------------


def test_two_processes_give_what_one_gives(kit: Kit, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither runs the user's script again, as multiprocessing would: it may call `sftx.run` at its top level."""
    script = tmp_path / "script.py"
    script.write_text(f"open({str(tmp_path / 'began')!r}, 'w')")
    monkeypatch.setattr(sys.modules["__main__"], "__spec__", None)
    monkeypatch.setattr(sys.modules["__main__"], "__file__", str(script), raising=False)
    path = many(tmp_path / "a.jsonl")
    config = DataConfig(max_length=64, max_dropped=0.2)
    one = prepared([path], config, PARSERS, kit.encoder, questions=True)
    assert (one.ledger.num_rows, len(one.ledger.entries) > 200) == (1200, True)
    two = prepared([path], DataConfig(max_length=64, max_dropped=0.2, num_proc=2), PARSERS, kit.encoder, questions=True)
    assert same(one, two)
    assert not (tmp_path / "began").exists()


def test_an_error_in_another_process_is_the_same_error(kit: Kit, tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", [talk("a", "b")] * 600 + [{"strange": 1}])
    with pytest.raises(DataError, match=r"a\.jsonl:601: no format has the fields 'strange'; known are"):
        prepared([path], DataConfig(num_proc=2), PARSERS, kit.encoder)


def test_a_cache_that_was_damaged_is_made_anew(kit: Kit, tmp_path: Path, cache: Path) -> None:
    path = many(tmp_path / "a.jsonl", 30)
    first = cached(kit, path)
    (entry,) = cache.iterdir()
    for name in ("token_ids.bin", "dataset.json", "examples.json", "ledger.jsonl"):
        (entry / name).write_bytes((entry / name).read_bytes()[:-3] if name != "ledger.jsonl" else b"{")
        assert same(first, cached(kit, path))
    (entry / "loss_mask.bin").unlink()
    assert same(first, cached(kit, path))


class ChangesItsData(PromptCompletion):
    """Appends to the file while it is read, as another process may."""

    def parse(self, record: Any, where: Any) -> Any:
        with Path(where.path).open("a") as file:
            file.write("\n")
        return super().parse(record, where)


def test_data_that_change_while_they_are_read_are_not_kept(kit: Kit, tmp_path: Path, cache: Path) -> None:
    path = many(tmp_path / "a.jsonl", 10)
    encode = RowEncoder({"pc": ChangesItsData()}, kit.encoder, DataConfig(cache=True))
    with pytest.raises(DataError, match=r"a\.jsonl: the data changed while they were read; start again"):
        load_dataset([Source(str(path))], encode, identity={})
    assert list(cache.iterdir()) == []


def test_an_edited_file_of_a_plugin_s_package_is_another_version(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from sftx.data.cache import code_digest

    package = tmp_path / "acme_forms"
    package.mkdir()
    (package / "__init__.py").write_text("")
    (package / "form.jinja").write_text("a")
    monkeypatch.syspath_prepend(tmp_path)
    __import__("acme_forms")
    before = code_digest("acme_forms")
    assert before == code_digest("acme_forms")
    (package / "form.jinja").write_text("b")
    assert before != code_digest("acme_forms")
    monkeypatch.delitem(sys.modules, "acme_forms")


def test_a_pair_is_never_made_into_three(kit: Kit, tmp_path: Path) -> None:
    class Pairs(PromptCompletion):
        def parse(self, record: Any, where: Any) -> Any:
            return super().parse(record, where) * 2

    path = write(tmp_path / "a.jsonl", [{"prompt": "x", "completion": "word " * 30}])
    with pytest.raises(DataError, match=r"its 2 parts belong together, and \d+ examples came of them"):
        prepared([path], DataConfig(max_length=30, long_rows="split"), {"pairs": Pairs()}, kit.encoder)


def test_a_row_that_lacks_a_column_is_a_row_that_cannot_be_read(kit: Kit, tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", [{"q": "x", "a": "y"}, {"q": "x"}])
    source = Source(str(path), columns={"prompt": "q", "completion": "a"})
    with pytest.raises(DataError, match=r"a\.jsonl:2: columns: no column 'a'; there are q"):
        load_dataset([source], RowEncoder(STAGES, kit.encoder, DataConfig()))
    data = load_dataset([source], RowEncoder(STAGES, kit.encoder, DataConfig(invalid_rows="drop")))
    assert [e.reason for e in data.ledger.entries] == ["columns: no column 'a'; there are q"]


class Unsendable(Messages):
    def __reduce__(self) -> Any:
        raise TypeError("no, thanks")


def test_a_plugin_that_cannot_be_sent_says_so(kit: Kit, tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", [talk("a", "b")])
    with pytest.raises(PluginError, match=r"no, thanks; set data\.num_proc=1"):
        prepared([path], DataConfig(num_proc=2), {"messages": Unsendable()}, kit.encoder)


def cached(kit: Kit, path: Path, *, identity: Any = None, source: Any = None, **options: Any) -> Dataset:
    config = DataConfig(**{"max_length": 64, "max_dropped": 0.2, "cache": True, **options})
    encode = RowEncoder(STAGES, kit.encoder, config, questions=True)
    data = load_dataset([Source(str(path), **(source or {}))], encode, identity=identity or {})
    data.check(encode)
    return data


def test_a_second_start_reads_the_cache(kit: Kit, tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = many(tmp_path / "a.jsonl", 300)
    first = cached(kit, path)
    assert len(list(cache.iterdir())) == 1
    monkeypatch.setattr(prepare_module, "_encode_all", None)  # nothing is encoded again
    assert same(first, cached(kit, path))


@pytest.mark.parametrize(
    "change",
    [
        {"options": {"max_length": 65}},
        {"options": {"train_turns": "last"}},
        {"options": {"filters": Filters(min_turns=1)}},
        {"identity": {"sftx_template chatml": ["another version"]}},
        {"source": {"limit": 3}},
        {"content": '{"prompt": "new", "completion": "row"}\n'},
        {"tokenizer": "<|another|>"},
    ],
    ids=lambda change: next(iter(change)),
)
def test_anything_that_could_change_a_row_makes_another_cache(
    tmp_path: Path, cache: Path, change: dict[str, Any]
) -> None:
    kit = Kit(ChatML())
    path = many(tmp_path / "a.jsonl", 30)
    cached(kit, path)
    if "content" in change:
        path.write_text(change["content"] * 3, encoding="utf-8")
    if "tokenizer" in change:
        kit.tokenizer.add_tokens([change["tokenizer"]])
    options = {"max_dropped": 0.5, **change.get("options", {})}
    cached(kit, path, identity=change.get("identity"), source=change.get("source"), **options)
    assert len(list(cache.iterdir())) == 2


def test_what_does_not_change_a_row_keeps_the_cache(kit: Kit, tmp_path: Path, cache: Path) -> None:
    path = many(tmp_path / "a.jsonl", 30)
    cached(kit, path)
    cached(kit, path, source={"weight": 2.0}, num_proc=1, plan_window=5)
    assert len(list(cache.iterdir())) == 1


def test_a_cached_set_is_checked_as_a_fresh_one(kit: Kit, tmp_path: Path, cache: Path) -> None:
    path = many(tmp_path / "a.jsonl", 30)
    cached(kit, path)
    with pytest.raises(DataError, match="rows train nothing or were dropped"):
        cached(kit, path, max_dropped=0.01)


_ENCODE = """
import sys
from pathlib import Path
from sftx.config.options import DataConfig, Source
from sftx.data.preprocess import load_dataset
from sftx.assembly.stages.data_stages import ParserStage
from sftx.data.row_encoder import RowEncoder
from sftx.testing.kit import Kit
from sftx_plugins.templates.chatml import ChatML
from sftx_plugins.parsers.prompt_completion import PromptCompletion

if __name__ == "__main__":
    config = DataConfig(cache=True, num_proc=int(sys.argv[2]), max_dropped=0.5)
    encode = RowEncoder({"pc": ParserStage("pc", PromptCompletion())}, Kit(ChatML()).encoder, config)
    load_dataset([Source(sys.argv[1])], encode, identity={})
    print("done")
"""


@pytest.mark.parametrize("num_proc", [pytest.param(1, marks=pytest.mark.slow), 2])
def test_a_killed_encode_leaves_no_half_cache(tmp_path: Path, cache: Path, num_proc: int) -> None:
    """Killed with -9 in the midst; the next start sweeps what it left, and its workers are gone too."""
    script = tmp_path / "encode.py"
    script.write_text(_ENCODE)
    path = many(tmp_path / "a.jsonl", 60_000)
    command = [sys.executable, str(script), str(path), str(num_proc)]
    with subprocess.Popen(command, stderr=subprocess.DEVNULL, start_new_session=True) as process:
        part = _wait_for_part(cache)
        process.send_signal(signal.SIGKILL)
    assert {p.name for p in cache.iterdir()} == {part.name, part.name.replace(".part-", ".lock-")}
    assert part.name.startswith(".part-")
    _wait_until_gone(process.pid)
    old = time.time() - 60
    os.utime(part, (old, old))
    write(path, [{"prompt": "a", "completion": "b"}])
    assert subprocess.run(command, check=True, capture_output=True, text=True).stdout == "done\n"
    (left,) = cache.iterdir()
    assert not left.name.startswith(".")


def _wait_for_part(cache: Path) -> Path:
    """The half-written directory, as soon as it holds something."""
    for _ in range(2400):
        for part in cache.glob(".part-*"):
            file = part / "token_ids.bin"
            if file.exists() and file.stat().st_size:
                return part
        time.sleep(0.05)
    raise AssertionError("nothing was written within 120 s")


def _wait_until_gone(session: int) -> None:
    """The workers of a killed process end by themselves."""
    for _ in range(200):
        alive = subprocess.run(["ps", "-o", "stat=", "-s", str(session)], capture_output=True, text=True).stdout.split()
        if all(state.startswith("Z") for state in alive):
            return
        time.sleep(0.05)
    raise AssertionError("workers of a killed process are still there after 10 s")


def test_plain_text_alone_needs_no_stop_token_of_the_template(kit: Kit, tmp_path: Path) -> None:
    from sftx_plugins.parsers.text import Text

    path = write(tmp_path / "a.jsonl", [{"text": "Once upon a time."}] * 3)
    data = prepared([path], DataConfig(), {"text": Text()}, kit.encoder)
    assert (len(data.examples), data.has_turns) == (3, False)
    assert not isinstance(data.examples[0], Conversation)


def test_an_export_leaves_out_the_rows_that_a_run_leaves_out(kit: Kit, tmp_path: Path) -> None:
    call = {"function": {"name": "f", "arguments": {}}}
    rows = [
        talk("Q", "A"),
        talk("Q", " \n"),
        talk("Q"),
        {"messages": []},
        talk("Q", "", "Q", "A"),
        {"messages": [{"role": "user", "content": "Q"}, {"role": "assistant", "content": "", "tool_calls": [call]}]},
        {"messages": [{"role": "user", "content": "Q"}, {"role": "assistant", "content": "A", "train": False}]},
        {"messages": [{"role": "user", "content": "Q", "train": True}, {"role": "assistant", "content": ""}]},
        {"prompt": "Q", "completion": ""},
        {"unknown": 1},
    ]
    path = write(tmp_path / "rows.jsonl", rows)
    variants: list[dict[str, Any]] = [
        {},
        {"train_on_prompt": True},
        {"train_turns": "last"},
        {"train_roles": ("user",)},
    ]
    for options in [*variants, {"system": "S"}, {"filters": Filters(min_turns=2)}]:
        config = DataConfig(invalid_rows="drop", max_dropped=1.0, **options)
        ledger = Ledger()
        lines = list(export_lines([Source(str(path))], config, STAGES, ledger))
        data = load_dataset([Source(str(path))], RowEncoder(STAGES, kit.encoder, config))
        reasons = [(entry.where, entry.action, entry.reason) for entry in data.ledger.entries]
        assert [(entry.where, entry.action, entry.reason) for entry in ledger.entries] == reasons, options
        assert len(lines) == len(data.examples) == len(rows) - len(reasons), options
        assert 1 < len(lines) < len(rows)
