"""`sftx run` in a new process, with the real model and real rows."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

from sftx.data import sources


def test_the_real_model_trains_from_the_command_line(real_model_dir: Path, tmp_path: Path) -> None:
    """The command names no model; `real_model_dir` has converted the embedded one."""
    shipped = sources.resolve("sftx:demo/train.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
    (tmp_path / "rows.jsonl").write_text("".join(sorted(shipped, key=len)[:8]), encoding="utf-8")
    (tmp_path / "held.jsonl").write_text("".join(sorted(shipped, key=len)[8:10]), encoding="utf-8")
    command = "run --plugin chatml --plugin lora --plugin exact-match --data rows.jsonl --eval-data held.jsonl"
    steps = "--max-steps 3 --learning-rate 1e-3 --per-device-train-batch-size 4 --max-new-tokens 4 --logging-steps 1"
    done = subprocess.run(
        [sys.executable, "-m", "sftx", *command.split(), *steps.split()],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    out = done.stdout
    assert re.search(r"^template +chatml ", out, flags=re.MULTILINE)
    assert "4,884,480 (3.50%)" in out
    assert "8 (8 messages), held out 2" in out
    assert [f"step {n}/3  loss " in out for n in (1, 2, 3)] == [True] * 3
    assert "held-out, step 0: loss " in out
    assert "\x1b" not in out, "no colours and no bar where there is no terminal"
    assert out.rstrip().endswith("result: runs/rows-1/adapter")
    assert "\r" not in done.stderr
    assert "importing torch and transformers ...\n" in done.stderr, "what takes long is said"

    run = tmp_path / "runs" / "rows-1"
    summary = json.loads((run / "summary.json").read_text())
    assert summary["held_out"]["after"]["loss"] < summary["held_out"]["before"]["loss"]
    assert (run / "adapter" / "adapter_model.safetensors").stat().st_size > 4_884_480 * 4
