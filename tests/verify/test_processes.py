"""The processes of `sftx verify` have the memory of processes that `sftx run` starts."""

from __future__ import annotations

import functools
from multiprocessing import forkserver
from pathlib import Path

import psutil
import pytest

from sftx.config.loading import load
from sftx.verify import runs
from sftx.verify.processes import Processes


def test_a_plan_in_a_forked_process_counts_the_libraries(tmp_path: Path) -> None:
    """A fork has not touched the pages of their files: 160 MB, by which the plan of a small run was too low."""
    (tmp_path / "rows.jsonl").write_text('{"prompt": "2 + 2", "completion": "4"}\n' * 4, encoding="utf-8")
    values = {"model": "sftx:tiny", "data.train": [str(tmp_path / "rows.jsonl")], "train.max_steps": 2}
    loaded = load(None, add=["chatml", "lora"], assignments=[(name, value, name) for name, value in values.items()])
    with Processes(tmp_path, on_gpu=False) as processes:
        if not processes.are_forked:
            pytest.skip("processes are started anew on this system")
        planned = processes.run("plan", functools.partial(runs.plan_memory, is_forked=True), loaded, "cpu")
        server = psutil.Process(forkserver._forkserver._forkserver_pid)  # type: ignore[attr-defined]
        assert planned["kinds"]["process"] == pytest.approx(server.memory_info().rss, rel=0.02)
