"""Tests of what a plugin knows of the run: its options, a refusal before torch is imported, and secrets."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import sftx
from sftx.assembly.hookspecs import RETURNS
from sftx.assembly.registry import activate
from sftx.config.loading import load
from sftx.errors import ConfigError, PluginError
from sftx.secret import MASK
from sftx.testing.runs import run_tiny

HEAD = "from dataclasses import dataclass\nfrom typing import Annotated\nfrom pydantic import Field\nimport sftx\n"
ACME = f"""{HEAD}
@dataclass(frozen=True, eq=False)
class Acme:
    token: Annotated[sftx.Secret, Field(description="Token.")] = sftx.Secret("env:ACME_TOKEN")

    @sftx.hookimpl
    def sftx_observer(self, run):
        return Watch(self.token.reveal(), run)

class Watch(sftx.Observer):
    seen = []
    def __init__(self, token, run):
        self.seen.append((token, run))
"""
VALIDATES = f"""{HEAD}
@dataclass(frozen=True, eq=False)
class Acme:
    @sftx.hookimpl
    def sftx_validate(self, run):
        if run.config["data"]["max_length"] > run.config["plugins"]["padded"]["pad_to_multiple_of"]:
            raise sftx.ConfigError("option 'data.max_length': is over one multiple of the padding")

    @sftx.hookimpl
    def sftx_metric(self):
        return lambda prediction, reference: 1.0
"""


def loaded(settings: dict[str, Any]) -> Any:
    given = [("data.train", ["rows.jsonl"], "--data"), *((name, value, "--set") for name, value in settings.items())]
    return load(None, add=["acme"], assignments=given)


@pytest.mark.parametrize("hook", RETURNS)
def test_every_hook_may_ask_for_the_run(hook: str) -> None:
    from sftx.assembly import hookspecs
    from sftx.assembly.stages.stage import arguments_of

    assert "run" in arguments_of(getattr(hookspecs, hook))


def test_a_plugin_refuses_a_combination_before_torch_is_imported(install_plugin: Any) -> None:
    install_plugin("acme", VALIDATES, {"acme": "Acme"})
    activate(loaded({"data.max_length": 8, "padded.pad_to_multiple_of": 8}))
    with pytest.raises(ConfigError, match=r"^plugin 'acme' \(acme 1\.0\): option 'data\.max_length': is over one"):
        activate(loaded({"data.max_length": 16, "padded.pad_to_multiple_of": 8}))
    code = (
        f"import sys; sys.path[:] = {sys.path!r}; from sftx.cli import main\n"
        "try:\n    main(['run', '--data', 'sftx:demo/train.jsonl', '--plugin', 'acme', '--max-length', '16'])\n"
        "except SystemExit as end:\n    print(end.code, 'torch' in sys.modules)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stdout.strip() == "1 False", done.stderr
    assert done.stderr.startswith("sftx: error: plugin 'acme' (acme 1.0): option 'data.max_length'")


def test_a_plugin_that_only_validates_is_refused(install_plugin: Any) -> None:
    code = (
        f"{HEAD}@dataclass(frozen=True, eq=False)\nclass Acme:\n    @sftx.hookimpl\n    def sftx_validate(self): pass\n"
    )
    install_plugin("acme", code, {"acme": "Acme"})
    with pytest.raises(PluginError, match="implements sftx_validate alone, which makes no stage"):
        activate(loaded({}))


@pytest.mark.parametrize("given", ["env:ACME_TOKEN", "hunter-2"])
def test_a_secret_reaches_its_plugin_and_no_file(
    install_plugin: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], given: str
) -> None:
    install_plugin("acme", ACME, {"acme": "Acme"})
    monkeypatch.setenv("ACME_TOKEN", "hunter-2")
    done = run_tiny(["acme", "lora"], tmp_path, settings={"acme.token": given})
    import acme

    token, info = acme.Watch.seen[-1]
    assert token == "hunter-2"
    shown = given if given.startswith("env:") else MASK
    assert info.config["plugins"]["acme"] == {"token": shown}
    written = [file for file in done.output_dir.rglob("*") if file.is_file()]
    assert [str(file) for file in written if b"hunter-2" in file.read_bytes()] == []
    assert any(shown.encode() in file.read_bytes() for file in written if file.name == "run.yaml")
    assert "hunter-2" not in "".join(capfd.readouterr())
    manifest = json.loads((done.output_dir / "manifest.json").read_text())
    assert [p["options"] for p in manifest["plugins"] if p["plugin"] == "acme"] == [{"token": shown}]


def test_a_secret_that_is_not_known_ends_a_run_at_its_start(
    install_plugin: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    install_plugin("acme", ACME, {"acme": "Acme"})
    monkeypatch.delenv("ACME_TOKEN", raising=False)
    with pytest.raises(ConfigError, match=r"option 'token': the environment variable 'ACME_TOKEN' is not set; export"):
        run_tiny(["acme", "lora"], tmp_path / "1")
    with pytest.raises(ConfigError, match="option 'token': the secret was masked when the run file was written"):
        run_tiny(["acme", "lora"], tmp_path / "2", settings={"acme.token": MASK})
    assert not list(tmp_path.glob("*/run"))


def test_a_wrong_secret_is_not_shown(install_plugin: Any) -> None:
    install_plugin("acme", ACME, {"acme": "Acme"})
    with pytest.raises(ConfigError) as caught:
        activate(loaded({"acme.token": 123456}))
    assert "got a value that is not shown, expected text, in quotes where it looks like a number" in str(caught.value)
    assert "123456" not in str(caught.value)


def test_a_secret_shows_itself_to_nobody() -> None:
    secret = sftx.Secret("hunter-2")
    assert (str(secret), repr(secret), f"{secret}") == (MASK, "Secret('***')", MASK)
    assert secret.reveal() == "hunter-2"
    assert secret == sftx.Secret("another")  # as they are written
    assert secret != sftx.Secret("env:A")


LEAKY = ACME.replace(
    "seen = []", "def on_step(self, report):\n        raise ValueError(f'posting with {self.token} failed')\n"
).replace("self.seen.append((token, run))", "self.token = token")


def test_no_error_of_a_plugin_shows_its_secret(
    install_plugin: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    install_plugin("acme", LEAKY, {"acme": "Acme"})
    monkeypatch.setenv("ACME_TOKEN", "correct-horse")
    run_tiny(["acme", "lora"], tmp_path)
    assert "failed and is switched off: ValueError: posting with *** failed" in caplog.text
    assert "correct-horse" not in caplog.text


def test_wrong_options_beside_a_secret_are_refused_without_it(install_plugin: Any, tmp_path: Path) -> None:
    install_plugin("acme", ACME, {"acme": "Acme"})
    with pytest.raises(ConfigError) as caught:
        sftx.run(
            data=[{"prompt": "a", "completion": "b"}],
            model="sftx:tiny",
            plugins={"chatml": {}, "acme": {"token": "battery-staple", "were": 1}},
            output_dir=str(tmp_path / "run"),
        )
    assert "option 'were' does not exist" in str(caught.value)
    assert "battery-staple" not in str(caught.value)
    code = (
        f"import sys; sys.path[:] = {sys.path!r}; from sftx.cli import main\n"
        "main(['run', '--data', 'sftx:demo/train.jsonl', '--plugin', 'acme', '--set', 'acme.token=987654321'])\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert "option 'token': got a value that is not shown" in done.stderr
    assert "987654321" not in done.stderr
