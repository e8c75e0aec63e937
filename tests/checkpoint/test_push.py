"""`sftx push` against a stand-in for the hub: what arrives there, what is left out, and what is refused."""

from __future__ import annotations

import base64
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from sftx.cli import main

TOKEN = "hf_secretsecretsecret"
WEIGHTS, EARLIER_WEIGHTS = "\x02" + 7 * "\0" + "{}", "\x07" + 7 * "\0" + "{     }"
"""Files of no tensors: the length of the header, and the header."""


class Hub(ThreadingHTTPServer):
    """Speaks as much of the hub's protocol as huggingface_hub needs for an upload, and keeps what it got."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Answering)
        self.files: dict[str, bytes] = {}
        self.stored: dict[str, bytes] = {}
        self.created: list[dict[str, Any]] = []
        self.refusals: dict[str, tuple[int, str]] = {}
        """Status and message, by a part of the path."""
        self.is_private = False

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class Answering(BaseHTTPRequestHandler):
    server: Hub

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def answer(self, value: Any, status: int = 200, **headers: str) -> None:
        body = json.dumps(value).encode()
        self.send_response(status)
        for name, text in {**headers, "Content-Length": str(len(body))}.items():
            self.send_header(name.replace("_", "-"), text)
        self.end_headers()
        self.wfile.write(body)

    def refused(self) -> bool:
        for part, (status, message) in self.server.refusals.items():
            if part in self.path:
                self.answer({"error": message}, status, X_Error_Message=message)
                return True
        if self.headers.get("authorization") != f"Bearer {TOKEN}":
            self.answer({"error": "Invalid credentials"}, 401, X_Error_Message="Invalid credentials in Authorization")
            return True
        return False

    def do_GET(self) -> None:
        if not self.refused():
            self.answer({"id": self.path.removeprefix("/api/models/"), "private": self.server.is_private})

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        if self.refused():
            return
        if self.path == "/api/repos/create":
            self.server.created.append(json.loads(body))
            self.answer({"url": f"{self.server.url}/me/model", "id": "me/model"})
        elif self.path == "/api/validate-yaml":
            self.answer({"warnings": [], "errors": []})
        elif "/preupload/" in self.path:
            files = json.loads(body)["files"]
            modes = [(f["path"], "lfs" if f["path"].endswith(".safetensors") else "regular") for f in files]
            self.answer({"files": [{"path": p, "uploadMode": mode, "shouldIgnore": False} for p, mode in modes]})
        elif self.path.endswith("/info/lfs/objects/batch"):
            objects = json.loads(body)["objects"]
            action = {"actions": {"upload": {"href": f"{self.server.url}/put/"}}}
            for one in objects:
                one |= {"actions": {"upload": {"href": action["actions"]["upload"]["href"] + one["oid"]}}}
            self.answer({"transfer": "basic", "objects": objects})
        elif "/commit/" in self.path:
            for line in map(json.loads, body.splitlines()):
                if line["key"] == "file":
                    self.server.files[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
                elif line["key"] == "lfsFile":
                    self.server.files[line["value"]["path"]] = self.server.stored[line["value"]["oid"]]
            self.answer({"commitUrl": f"{self.server.url}/me/model/commit/1", "commitOid": "1", "success": True})

    def do_PUT(self) -> None:
        self.server.stored[self.path.rpartition("/")[2]] = self.rfile.read(int(self.headers["Content-Length"]))
        self.answer({})


@pytest.fixture
def hub() -> Iterator[Hub]:
    with Hub() as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server
        server.shutdown()


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    """Return the files of a run as far as they are looked at."""
    run = tmp_path / "run"
    for name, content in {
        "run.yaml": "model: x\n",
        "adapter/adapter_config.json": json.dumps({"base_model_name_or_path": str(tmp_path / "base"), "r": 4}),
        "adapter/adapter_model.safetensors": WEIGHTS,
        "adapter/README.md": f"---\nbase_model: {tmp_path / 'base'}\ntags:\n- lora\n---\n# Of {tmp_path / 'base'}\n",
        "adapter/tokenizer.json": "{}",
        "checkpoints/step-2/optimizer.safetensors": "state",
        "checkpoints/step-2/run_state.json": "{}",
        "checkpoints/step-2/trainer_state.json": "{}",
        "checkpoints/step-2/adapter_config.json": json.dumps({"base_model_name_or_path": "me/base"}),
        "checkpoints/step-2/adapter_model.safetensors": EARLIER_WEIGHTS,
        "checkpoints/step-2/.tokenizer.json.part": "{",
    }.items():
        (run / name).parent.mkdir(parents=True, exist_ok=True)
        (run / name).write_text(content)
    return run


def push(hub: Hub | None, *arguments: str | Path, token: str = TOKEN) -> tuple[int, str]:
    """Run the command in a process of its own, since huggingface_hub reads its environment when it is imported."""
    environment = {**os.environ, "HF_ENDPOINT": hub.url if hub else "http://127.0.0.1:9", "HF_HUB_DISABLE_XET": "1"}
    environment |= {"HF_TOKEN": token, "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
    command = [sys.executable, "-m", "sftx", "push", *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300)
    assert TOKEN not in done.stdout + done.stderr
    return done.returncode, done.stdout + done.stderr


def test_the_result_of_a_run_arrives(hub: Hub, run_dir: Path, tmp_path: Path) -> None:
    code, said = push(hub, run_dir, "me/model", "--base", "them/base")
    assert code == 0, said
    assert f"uploaded 4 files, 0.0 MB to {hub.url}/me/model" in said.splitlines()
    assert hub.created == [{"name": "model", "organization": "me"}]
    assert hub.files.keys() == {"adapter_config.json", "adapter_model.safetensors", "README.md", "tokenizer.json"}
    assert hub.files["adapter_model.safetensors"] == WEIGHTS.encode()
    assert json.loads(hub.files["adapter_config.json"]) == {"base_model_name_or_path": "them/base", "r": 4}
    assert hub.files["README.md"].decode().startswith("---\nbase_model: them/base\n")
    assert str(tmp_path).encode() not in b"".join(hub.files.values())


def test_what_the_hub_refuses_is_one_sentence(hub: Hub, run_dir: Path) -> None:
    checkpoint = run_dir / "checkpoints" / "step-2"
    for part, status, message, expected in (
        ("/repos/create", 403, "You don't have the rights to create a model under the namespace me", "the token may"),
        ("/preupload/", 400, "No such mode", "the hub refuses the upload: No such mode"),
        ("/commit/", 413, "", "the hub refuses the upload: status 413"),
    ):
        hub.refusals = {part: (status, message)}
        if part == "/repos/create":  # else huggingface_hub goes on with the one that is there
            hub.refusals["/api/models/me/model"] = (404, "Repository not found")
        code, said = push(hub, checkpoint, "me/model")
        assert code == 1
        assert expected in said
        assert "Traceback" not in said
        assert len([line for line in said.splitlines() if "me/model" in line]) == 1, said
    hub.refusals = {}
    code, said = push(hub, checkpoint, "me/model", token="hf_another")
    assert (code, "hf auth login" in said) == (1, True), said
    assert not hub.files
    code, said = push(hub, checkpoint, "me/model", "--private")
    assert (code, "is there already, and is public" in said) == (1, True), said
    hub.is_private = True
    assert push(hub, checkpoint, "me/model", "--private")[0] == 0
    assert hub.files.keys() == {"adapter_config.json", "adapter_model.safetensors"}
    code, said = push(None, checkpoint, "me/model")
    assert (code, "cannot be uploaded" in said) == (1, True), said


def invoked(*arguments: str | Path) -> tuple[int, str]:
    done = CliRunner().invoke(main, ["push", *map(str, arguments)])
    return done.exit_code, done.output


def test_a_dry_run_lists_files_and_asks_nobody(run_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sftx.checkpoint.pushing.push", None)
    code, said = invoked(run_dir / "checkpoints" / "step-2", "me/model", "--dry-run", "--private")
    assert code == 0, said
    lines = [line.split() for line in said.splitlines()]
    assert lines[:-1] == [["38", "adapter_config.json"], ["15", "adapter_model.safetensors"]]
    assert said.splitlines()[-1].endswith("to me/model, made private if it is new")


def test_what_is_not_complete_is_refused(run_dir: Path, tmp_path: Path) -> None:
    def refusal(place: Path, name: str = "me/model", *options: str) -> str:
        code, said = invoked(place, name, "--dry-run", *options)
        assert code == 1, said
        return said

    assert "nobody else has; give the base's hub id with --base" in refusal(run_dir)
    assert "is no name of a repository" in refusal(run_dir, "me/model/more")
    assert "is no name of a repository" in refusal(run_dir, "me/model", "--base", "/a/directory")
    assert "no such directory" in refusal(tmp_path / "nothing")
    (tmp_path / "empty").mkdir()
    assert "holds no adapter" in refusal(tmp_path / "empty")
    (run_dir / "adapter" / "adapter_model.safetensors").unlink()
    assert "has no weights" in refusal(run_dir / "adapter")
    (run_dir / "adapter").rename(tmp_path / "elsewhere")
    assert "has no result yet; finish it with sftx run --resume" in refusal(run_dir)
    model = tmp_path / "model"
    model.mkdir()
    (model / "config.json").write_text("{}")
    index = {"weight_map": {"a": "model-1.safetensors", "b": "model-2.safetensors"}}
    (model / "model.safetensors.index.json").write_text(json.dumps(index))
    (model / "model-1.safetensors").write_text(WEIGHTS)
    assert "model-2.safetensors is missing" in refusal(model)
    (model / "model-2.safetensors").write_text(WEIGHTS)
    assert invoked(model, "me/model", "--dry-run")[0] == 0
