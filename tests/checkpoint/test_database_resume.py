"""A run on the rows of a database that is killed in the middle and resumed ends like one that was not: bit for bit."""

from __future__ import annotations

import json
import signal
import sqlite3
import subprocess
import sys
import time
from contextlib import closing
from pathlib import Path

import pytest

from killing import Case, Runs, case
from resuming import Sftx, interrupted, only_shared
from sftx.verify.run_differences import differences

_COMMON = (
    "--plugin chatml --plugin lora --set lora.lora_dropout=0.2 --learning-rate 1e-2 --eval-steps 3 --save-steps 2 "
    "--gradient-accumulation-steps 2 --per-device-train-batch-size 2 --max-steps 12 --max-dropped 0.2 "
    "--data sqlite:{data}/chats.db?table=train:2 --eval-data sqlite:{data}/chats.db?table=held "
)
EPOCHS = case("database-epochs", _COMMON)
_CHATS = (
    "sqlite:{data}/chats.db?query="
    "SELECT json_group_array(json_object('role', role, 'content', content)) AS messages FROM "
    "(SELECT * FROM messages ORDER BY conversation_id, position) GROUP BY conversation_id ORDER BY conversation_id"
)
STREAM = Case(
    "database-stream",
    (*_COMMON.split(), "--streaming", "--plan-window", "6", "--data", "{data}/more.jsonl", "--data", _CHATS),
)


@pytest.fixture(scope="module")
def runs(runs: Runs) -> Runs:
    """The runs of the package, with a database beside the files of rows."""
    with closing(sqlite3.connect(runs.root / "chats.db")) as database:
        for name in ("train", "held"):
            rows = [json.loads(line) for line in (runs.root / f"{name}.jsonl").read_text().splitlines()]
            database.execute(f"CREATE TABLE {name} (id INTEGER PRIMARY KEY, prompt TEXT, completion TEXT)")
            database.executemany(f"INSERT INTO {name} (prompt, completion) VALUES (:prompt, :completion)", rows)
        database.execute("CREATE TABLE messages (conversation_id INT, position INT, role TEXT, content TEXT)")
        turns = [(n, place, role, f"{role} {n}") for place, role in enumerate(("user", "assistant")) for n in range(7)]
        database.executemany("INSERT INTO messages VALUES (?, ?, ?, ?)", turns)
        database.commit()
    return runs


def test_a_stream_of_a_table_and_a_query_goes_on_where_it_was(runs: Runs, sftx: Sftx) -> None:
    directory, whole = interrupted(runs, sftx, STREAM, step=6)
    result = sftx(STREAM, directory, "--resume")
    assert result.exit_code == 0, result.output
    assert not only_shared(whole, directory / "out")


@pytest.mark.slow
@pytest.mark.parametrize("wanted", [EPOCHS, STREAM], ids=lambda wanted: wanted.name)
def test_a_run_on_a_database_is_killed_and_ends_the_same(runs: Runs, wanted: Case) -> None:
    """The installed command in a process of its own gets kill -9 after some steps, not at a checkpoint."""
    directory = runs.directory(wanted.name)
    command = [sys.executable, "-m", "sftx", *wanted.command(runs.root, runs.model)]
    metrics = directory / "out" / "metrics.jsonl"
    with subprocess.Popen(command, cwd=directory, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE) as process:
        while process.poll() is None and not (metrics.exists() and '"step": 5' in metrics.read_text(encoding="utf-8")):
            time.sleep(0.0005)
        process.kill()
    assert process.returncode == -signal.SIGKILL
    assert not (directory / "out" / "summary.json").exists()
    done = subprocess.run([*command, "--resume"], cwd=directory, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found = differences(runs.undisturbed(wanted)[0], directory / "out")
    assert not found, found
    weights = [path.name for path in (directory / "out" / "adapter").iterdir()]
    assert "adapter_model.safetensors" in weights
    assert not list(Path(runs.root).glob("chats.db-*"))
