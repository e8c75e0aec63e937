"""A source as a package of a stranger: from its wheel it keeps its contract, and every command reads its rows."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from environments import Environment, build_wheel, make_environment

PACKAGE = Path(__file__).parents[1] / "packages" / "sftx-ini"


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory) -> Environment:
    made = make_environment(tmp_path_factory.mktemp("environment"))
    made.install(build_wheel(PACKAGE, tmp_path_factory.mktemp("wheels")))
    return made


def write(path: Path, numbers: range) -> None:
    rows = "".join(f"[q{n}]\nprompt = Question {n}?\ncompletion = {'yes ' * (1 + n % 5)}\n" for n in numbers)
    path.write_text(f"[about]\nprompt = no row\n{rows}", encoding="utf-8")


def sftx(environment: Environment, here: Path, command: str, *, code: int = 0) -> str:
    done = environment.run("sftx", *command.split(), cwd=here)
    assert done.returncode == code, done.stdout + done.stderr
    return done.stdout + done.stderr


@pytest.mark.slow
def test_no_clause_is_broken(environment: Environment, tmp_path: Path) -> None:
    done = environment.run("sftx", "plugins", "check", "ini", "--json", cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert {finding["status"] for finding in json.loads(done.stdout)} == {"ok"}


@pytest.mark.slow
def test_every_command_reads_its_rows(environment: Environment, tiny_model: Path, tmp_path: Path) -> None:
    shutil.copytree(tiny_model, tmp_path / "tiny")
    write(tmp_path / "faq.ini", range(1, 13))
    write(tmp_path / "held.ini", range(20, 24))
    data = "--plugin ini --data ini:faq.ini:2 --eval-data ini:held.ini"
    run = f"{data} --plugin chatml --plugin lora --model tiny --max-steps 4 --use-cpu"
    sftx(environment, tmp_path, f"run {run} --output-dir out")
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text(encoding="utf-8"))
    assert [entry["path"] for entry in manifest["data"] + manifest["eval_data"]] == ["ini:faq.ini", "ini:held.ini"]
    assert {line["plugin"]: line["version"] for line in manifest["plugins"] if line["stage"] == "source"} == {
        "ini": "0.1.0"
    }
    assert "12 of 12 rows" in sftx(environment, tmp_path, f"data export {data} --output -")
    shown = sftx(environment, tmp_path, f"inspect {data} --plugin chatml --model tiny --row faq.ini[q7]:7")
    assert "faq.ini[q7] section 7" in shown
    assert "checks on 12 rows: 0 errors" in sftx(environment, tmp_path, f"doctor {data} --plugin chatml --model tiny")
    said = sftx(environment, tmp_path, f"run {run.replace('--plugin ini', '')}", code=1)
    assert "ini:faq.ini: no such file, and no plugin of this run reads ini:...; add --plugin ini\n" in said
    (tmp_path / "faq.ini").write_text("[a]\nprompt = p\ncompletion = c\n[a]\n", encoding="utf-8")
    assert "section 'a' already exists" in sftx(environment, tmp_path, f"data export {data} --output -", code=1)
