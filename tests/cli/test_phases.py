"""What takes long says so: a line before torch is imported, plain lines where nothing is redrawn, times by phase."""

from __future__ import annotations

import io
import logging
import os
import pty
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

from sftx import cli, display
from sftx.display import shown_phases
from sftx.phases import PhaseTimes, listening, phase

_CONTROL = re.compile(r"\x1b\[[0-9;?]*[a-zA-Z]")


def read(descriptor: int) -> str:
    """Everything that was written to a terminal until it was closed."""
    chunks = []
    with os.fdopen(descriptor, "rb", buffering=0) as stream:
        while True:
            try:
                chunk = stream.read(65536)
            except OSError:  # the other side is closed
                break
            if not chunk:
                break
            chunks.append(chunk)
    return b"".join(chunks).decode()


@contextmanager
def terminal(monkeypatch: pytest.MonkeyPatch, term: str = "xterm") -> Iterator[list[str]]:
    """Make stdout and stderr one terminal; the list gets what it showed."""
    ours, theirs = pty.openpty()
    shown: list[str] = []
    monkeypatch.setenv("TERM", term)
    with os.fdopen(theirs, "w", encoding="utf-8") as stream, monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", stream)
        patch.setattr(sys, "stderr", stream)
        yield shown
        stream.flush()
    shown.append(read(ours))


def test_times_are_those_of_the_innermost_phase(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0.0
    monkeypatch.setattr(time, "monotonic", lambda: now)
    times = PhaseTimes()
    with listening(times):
        now = 1.0
        with phase("training", total=3, done=1) as training:
            now = 3.0
            training.update()
            assert training.rate == 0.5
            with phase("saving"):
                now = 7.0
                assert times.seconds() == {"other": 1.0, "training": 2.0, "saving": 4.0}
            now = 8.0
        with suppress(KeyError), phase("saving"):
            now = 10.0
            raise KeyError
        now = 10.5
    assert times.seconds() == {"other": 1.5, "training": 3.0, "saving": 6.0}
    with phase("training"):
        now = 20.0
    assert times.seconds()["training"] == 3.0, "nobody listens any more"


def test_a_terminal_has_one_line_that_is_drawn_in_place(monkeypatch: pytest.MonkeyPatch) -> None:
    import rich

    log = logging.getLogger("sftx.a_test")
    monkeypatch.setattr(rich, "_console", None)
    assert not rich.get_console().is_terminal, "made before stdout is one"
    with terminal(monkeypatch) as shown, shown_phases():
        cli._configure_logging()
        with phase("training", total=1200, unit="steps", done=300) as training:
            training.update(note="loss 1.5")
            time.sleep(0.5)
            print("printed")
            log.warning("warned")
            rich.get_console().print("by an observer", soft_wrap=True)
            with phase("saving", "step-\x1b[31m1"):
                time.sleep(0.5)
        print("after")
    cli._configure_logging()
    text = _CONTROL.sub("", shown[0])
    assert "training 301/1,200 steps" in text
    assert "loss 1.5" in text
    assert "training 301/1,200 steps: saving step-?[31m1" in text
    lines = [line.rpartition("\r")[2] for line in text.replace("\r\n", "\n").split("\n")]
    assert [line for line in lines if line] == ["printed", "warned", "by an observer", "after"]
    assert shown[0].rindex("\x1b[?25h") > shown[0].rindex("\x1b[?25l"), "the cursor is shown"


def test_elsewhere_there_are_plain_lines(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(display, "_QUIET_S", 0.01)
    monkeypatch.setattr(display, "_LONG_S", 0.1)
    with shown_phases():
        with phase("encoding", "rows", unit="rows") as encoding:
            encoding.update(1234)
            time.sleep(0.3)
        with phase("loading", "nothing"):
            pass
    with terminal(monkeypatch, "dumb") as shown, shown_phases(), phase("encoding", "rows"):
        time.sleep(0.3)
    assert shown[0].replace("\r\n", "\n") == "encoding rows ...\nencoding rows: 0 s\n"
    assert capsys.readouterr() == ("", "encoding rows ...\nencoding rows: 1,234 rows, 0 s\n")


def test_a_closed_terminal_stops_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    stream = io.StringIO()
    stream.close()
    monkeypatch.setattr(display, "_QUIET_S", 0.0)
    monkeypatch.setattr(display, "_LONG_S", 0.0)
    for closed in (stream, None):
        monkeypatch.setattr(sys, "stderr", closed)
        monkeypatch.setattr(sys, "stdout", None)
        if closed is None:
            with shown_phases(), phase("loading"):
                time.sleep(0.05)
    failed: list[logging.LogRecord] = []
    monkeypatch.setattr(logging.Handler, "handleError", lambda handler, record: failed.append(record))
    log = logging.getLogger("sftx.a_test")
    cli._configure_logging()
    log.warning("to nobody")
    assert failed == []


@pytest.mark.parametrize("command", ["run", "inspect", "doctor", "plan"])
def test_the_first_line_comes_before_torch_is_imported(command: str, tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text('{"prompt": "a", "completion": "b"}\n', encoding="utf-8")
    code = (
        "import sys\n"
        "sys.modules['torch'] = None\n"
        "from sftx.cli import main\n"
        f"main(['{command}', '--model', 'sftx:tiny', '--plugin', 'chatml', '--data', 'rows.jsonl'])\n"
    )
    ours, theirs = pty.openpty()
    environment = os.environ | {"TERM": "xterm"}
    process = subprocess.Popen(
        [sys.executable, "-c", code], cwd=tmp_path, env=environment, stdout=theirs, stderr=theirs, stdin=theirs
    )
    os.close(theirs)
    text = _CONTROL.sub("", read(ours))
    assert process.wait() != 0
    assert "reading options" in text
    assert "importing torch and transformers" in text
    assert "No module named 'torch'" in text or "import of torch halted" in text
