"""A MODEL of the commands that answer may be one of the hub."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from click.testing import CliRunner

from sftx import ModelError, hub_lookup
from sftx.cli import main
from sftx.cli.answering import load_model
from sftx.model import names, tiny
from sftx.testing.kit import Kit


def test_a_model_of_the_hub_is_loaded_from_its_download(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    repository = tmp_path / "models--me--model"
    snapshot = repository / "snapshots" / ("0" * 40)
    shutil.copytree(tiny.model_dir(), snapshot)
    Kit(None).tokenizer.save_pretrained(snapshot)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("0" * 40)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    hub_lookup._ask.cache_clear()
    try:
        loaded = load_model("me/model", device="cpu", trust_remote_code=False)
        assert loaded.directory == snapshot
        with pytest.raises(ModelError, match=r"^model me/other: no such directory"):
            load_model("me/other", device="cpu", trust_remote_code=False)
        with pytest.raises(ModelError, match=r"^model me/other: cannot be downloaded: "):
            names.files_of("me/other")
    finally:
        hub_lookup._ask.cache_clear()


@pytest.mark.parametrize("model", ["=runs/a", "a="])
def test_a_served_model_has_a_name_and_a_place(model: str) -> None:
    result = CliRunner().invoke(main, ["serve", model])
    assert (result.exit_code, result.stderr) == (
        1, f"sftx: error: {model}: is not of the form NAME=MODEL, such as first=runs/a\n",
    )  # fmt: skip
