"""The commands in docs/remote-files.md run, and its run file and options exist."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path

import pytest
from click.testing import CliRunner

from sftx import atomic_files
from sftx.checkpoint import layout
from sftx.checkpoint.uploading import UploadError
from sftx.cli import BUILT_IN, main
from sftx.config.loading import load
from sftx.config.options import RunConfig

PAGE = (Path(__file__).parents[2] / "docs" / "remote-files.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", PAGE, re.DOTALL)


def test_the_run_file_is_one(tmp_path: Path) -> None:
    (text,) = blocks("yaml")
    (tmp_path / "run.yaml").write_text(text, encoding="utf-8")
    config = load(tmp_path / "run.yaml").config
    addresses = [config.model, *(source.path for source in (*config.data.train, *config.data.eval)), config.output_dir]
    assert [str(address).partition("://")[0] for address in addresses] == ["s3", "s3", "hf", "https", "s3"]


def test_the_names_of_the_page_exist() -> None:
    assert atomic_files.CHECKSUMS in PAGE
    assert layout.SUMMARY in PAGE
    assert f"the exit code is {UploadError.exit_code}" in PAGE
    assert f"--upload-timeout` seconds ({RunConfig().upload_timeout:g})" in PAGE
    (commands,) = re.findall(r"`sftx (chat`.*?`report`) take", PAGE, re.DOTALL)
    assert set(re.findall(r"(\w+)`", commands)) <= set(BUILT_IN)


def test_the_commands_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("SFTX_CACHE", str(tmp_path / "cache"))
    rows = [{"prompt": f"count to {n}", "completion": " ".join(map(str, range(n)))} for n in range(2, 12)]
    Path("rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    (text,) = blocks("console")
    for line in text.splitlines():
        command = shlex.split(line.removeprefix("$ sftx ").replace("/tmp/store", str(tmp_path / "store")))
        result = CliRunner().invoke(main, command, catch_exceptions=False)
        assert result.exit_code == 0, result.output
    assert (tmp_path / "store" / "x" / layout.SUMMARY).is_file()
    assert Path("report.html").is_file()
