"""Without what Python lacks on Windows, all that one process does works, and several processes are refused."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

FAKE_WINDOWS = Path(__file__).parents[1] / "helpers" / "fake_windows.py"

RUN_FILE = """\
model: sftx:tiny
data: {train: rows.jsonl, eval: rows.jsonl, max_overlap: 1, max_length: 256, cache: true}
plugins: {chatml: {}, lora: {r: 4}, exact-match: {}}
train: {max_steps: 2, per_device_train_batch_size: 2, save_steps: 1, save_total_limit: 1, lr_scheduler_type: constant,
        use_cpu: true}
generation: {max_new_tokens: 4}
output_dir: runs/lora
"""


def on_windows(directory: Path, *commands: str) -> list[tuple[int, str]]:
    """Run the commands as on Windows; return the exit code and the output of each."""
    file = directory / "commands.json"
    file.write_text(json.dumps([command.split() for command in commands]), encoding="utf-8")
    environment = os.environ | {"SFTX_CACHE": str(directory / "cache"), "OMP_NUM_THREADS": "1"}
    subprocess.run([sys.executable, str(FAKE_WINDOWS), str(file)], cwd=directory, env=environment, check=True)
    return [(code, said) for code, said in json.loads((directory / "OUTPUT.json").read_text(encoding="utf-8"))]


@pytest.mark.slow
def test_one_process_needs_nothing_that_windows_lacks(tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text(RUN_FILE, encoding="utf-8")
    turns = [{"role": "user", "content": "2 + 2"}, {"role": "assistant", "content": "4"}]
    (tmp_path / "rows.jsonl").write_text((json.dumps({"messages": turns}) + "\n") * 8, encoding="utf-8")
    commands = (
        "inspect run.yaml --html page.html",
        "doctor run.yaml",
        "plan run.yaml",
        "run run.yaml",
        "run run.yaml --resume --max-steps 4",
        "run run.yaml --no-plugin lora --output-dir runs/full",
        "report runs/lora runs/full",
        "chat runs/lora --max-new-tokens 4",
        "generate runs/lora --data rows.jsonl --out answers.jsonl --max-new-tokens 4",
        "merge runs/lora",
        "evaluate runs/lora",
        "export runs/lora --to safetensors --into exported",
    )
    done = dict(zip(commands, on_windows(tmp_path, *commands), strict=True))
    assert {command: said for command, (code, said) in done.items() if code != 0} == {}
    assert (tmp_path / "runs/lora/merged/model.safetensors").is_file()
    assert [path.name for path in (tmp_path / "runs/lora/checkpoints").iterdir()] == ["step-4"]
    assert list((tmp_path / "cache").rglob("dataset.json"))
    # Windows has no files with these characters.
    assert [path for path in tmp_path.rglob("*") if re.search(r'[<>:"\\|?*]|[. ]$', path.name)] == []


def test_several_processes_are_refused(tmp_path: Path) -> None:
    [(code, said)] = on_windows(tmp_path, "run --model sftx:tiny --data sftx:demo/train.jsonl --nproc 2")
    assert code == 1
    assert said == (
        "sftx: error: --nproc: this system cannot start several processes as one run; on Windows run sftx in WSL, "
        "or leave --nproc out\n"
    )
