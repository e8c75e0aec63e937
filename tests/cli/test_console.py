"""Every command on a console that is not UTF-8, without one, and on a system without POSIX's own modules."""

from __future__ import annotations

import ast
import io
import json
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner

import sftx
from sftx.cli import main

ROOT = Path(sftx.__file__).parents[1]
NAME = "żółw.jsonl"
POSIX_ONLY = {"fcntl", "grp", "pwd", "resource", "termios"}


@pytest.fixture
def rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    text = {"messages": [{"role": "user", "content": "Ż«\n"}, {"role": "assistant", "content": "你\n\tthe end"}]}
    Path(NAME).write_text(json.dumps(text, ensure_ascii=False) + "\n", encoding="utf-8")
    return tmp_path


@pytest.mark.parametrize("charset", ["ascii", "cp1252"])
def test_every_command_prints_what_the_console_can_show(rows: Path, charset: str) -> None:
    options = ["--model", "sftx:tiny", "--plugin", "chatml", "--data", NAME]
    training = [
        "--eval-data",
        NAME,
        "--max-overlap",
        "1",
        "--plugin",
        "exact-match",
        "--max-new-tokens",
        "2",
        "--max-steps",
        "1",
    ]
    shown: dict[str, str] = {}
    for number, arguments in enumerate(
        (
            ["inspect", *options],
            ["inspect", *options, "--html", f"ó{charset}.html"],
            ["doctor", *options],
            ["plan", *options],
            ["data", "export", "--data", NAME, "--output", f"ó{charset}.jsonl"],
            ["run", *options, *training, "--output-dir", f"ó{charset}"],
            ["report", f"ó{charset}"],
            ["plugins", "info", "lora"],
            ["plugins", "schema", "lora"],
        )
    ):
        done = CliRunner(charset=charset).invoke(main, arguments)
        assert done.exit_code == 0, (arguments, done.output, done.exception)
        shown[f"{number} {arguments[0]}"] = done.stdout
    assert "»" not in shown["0 inspect"] if charset == "ascii" else "»" in shown["0 inspect"]
    assert "$ line break" in shown["0 inspect"]
    assert "result: " in shown["5 run"]
    assert "held-out" in shown["5 run"]
    for file in (f"ó{charset}.html", f"ó{charset}/report.html", f"ó{charset}.jsonl"):
        assert "你" in (rows / file).read_text(encoding="utf-8")
    failed = CliRunner(charset=charset).invoke(main, ["run", "--plugin", "chatml", "--data", "ż.jsonl"])
    assert failed.exit_code == 1
    assert ".jsonl: no such file" in failed.stderr


def test_a_strict_console_gets_signs_that_it_has(monkeypatch: pytest.MonkeyPatch) -> None:
    stream = io.TextIOWrapper(io.BytesIO(), encoding="latin-1", errors="strict")
    monkeypatch.setattr(sys, "stdout", stream)
    with pytest.raises(SystemExit):
        main(["--version"])
    print("«a⏎» ▁█ \ud800你", file=stream, flush=True)
    assert stream.buffer.getvalue().decode("latin-1").endswith("«a$» _# ??\n")  # type: ignore[attr-defined]


def test_an_export_without_standard_output_is_refused(rows: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdout", None)
    with pytest.raises(SystemExit) as stopped:
        main(["data", "export", "--data", NAME, "--output", "-"])
    assert stopped.value.code == 1


def test_a_closed_pipe_ends_a_command_without_a_traceback() -> None:
    command = subprocess.Popen(
        [sys.executable, "-m", "sftx", "plugins", "list"], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    assert command.stdout is not None
    assert command.stderr is not None
    command.stdout.close()
    assert command.stderr.read() == b""
    assert command.wait() == 1
    command.stderr.close()


# --- systems that are not POSIX -----------------------------------------------------------------


def test_help_needs_no_module_and_no_signal_of_posix() -> None:
    code = (
        "import signal, sys\n"
        "for name in ('SIGHUP', 'SIGUSR1', 'SIGUSR2', 'SIGKILL'): delattr(signal, name)\n"
        f"sys.modules.update(dict.fromkeys({sorted(POSIX_ONLY)}))\n"
        "import sftx.training\n"
        "from sftx.cli import main\n"
        "for arguments in (['--version'], ['--help'], ['run', '--help'], ['plugins', 'list']):\n"
        "    try: main(arguments)\n"
        "    except SystemExit as end: assert not end.code, arguments\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("package", ["sftx", "plugins/sftx_plugins", "kernels/sftx_kernels"])
def test_no_module_imports_one_of_posix_when_it_is_imported(package: str) -> None:
    files = sorted((ROOT / package).rglob("*.py"))
    assert files
    for file in files:
        for node in ast.parse(file.read_text(encoding="utf-8")).body:
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            assert not POSIX_ONLY & set(names), f"{file}:{node.lineno}"
