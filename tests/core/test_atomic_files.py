"""What is written whole is there whole or as it was before, wherever the writer stops."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from sftx import atomic_files
from sftx.errors import OutputError


def fill(part: Path, text: str = "new") -> None:
    (part / "inner").mkdir()
    (part / "a.json").write_text(json.dumps({"text": text}))
    (part / "inner" / "b.safetensors").write_bytes(text.encode() * 1000)


def test_a_directory_is_described_file_by_file(tmp_path: Path) -> None:
    place = tmp_path / "deep" / "step-1"
    with atomic_files.atomic_directory(place, checksums=True) as part:
        assert not place.exists()
        fill(part)
    described = json.loads((place / atomic_files.CHECKSUMS).read_text())
    assert set(described) == {"a.json", "inner/b.safetensors"}
    assert atomic_files.find_damage(place) is None
    assert [p.name for p in place.parent.iterdir()] == ["step-1"], "nothing lies beside it"
    assert {p.stat().st_mode & 0o777 for p in place.rglob("*") if p.is_file()} == {0o644}


@pytest.mark.parametrize(
    ("harm", "told"),
    [
        (lambda d: (d / "a.json").unlink(), "a.json is missing"),
        (
            lambda d: os.truncate(d / "inner/b.safetensors", 2000),
            "inner/b.safetensors has 2000 bytes, 3000 were written",
        ),
        (lambda d: (d / "inner/b.safetensors").write_bytes(b"neW" * 1000), "has another SHA-256 than was written"),
        (lambda d: (d / atomic_files.CHECKSUMS).unlink(), "checksums.json is missing"),
        (lambda d: os.truncate(d / atomic_files.CHECKSUMS, 20), "cannot be read"),
        (lambda d: (d / atomic_files.CHECKSUMS).write_text("{}"), "names no file"),
        (lambda d: (d / atomic_files.CHECKSUMS).write_text('{"a.json": 1}'), "cannot be read"),
    ],
)
def test_damage_is_told(tmp_path: Path, harm: Any, told: str) -> None:
    with atomic_files.atomic_directory(tmp_path / "d", checksums=True) as part:
        fill(part)
    harm(tmp_path / "d")
    assert told in str(atomic_files.find_damage(tmp_path / "d"))


class PowerCutError(BaseException):
    pass


CALLS = ("fsync", "rename", "replace", "mkdir", "chmod")


@pytest.mark.parametrize("exists", [False, True])
def test_whenever_the_writer_dies_the_old_or_the_new_is_there(
    tmp_path: Path, exists: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Dies at each call to the system in turn, with no clean-up, as a process that is killed."""
    real = {name: getattr(os, name) for name in CALLS}
    monkeypatch.setattr(atomic_files.shutil, "rmtree", _rmtree := atomic_files.shutil.rmtree)
    outcomes = set()
    for number in range(1000):
        place = tmp_path / str(number) / "d"
        if exists:
            with atomic_files.atomic_directory(place, checksums=True) as part:
                fill(part, "old")
        count = 0

        def dying(name: str) -> Any:
            def call(*args: Any, **kwargs: Any) -> Any:
                nonlocal count
                count += 1
                if count > number:  # noqa: B023
                    raise PowerCutError
                return real[name](*args, **kwargs)

            return call

        def dead(*args: Any, **kwargs: Any) -> None:
            if count <= number:  # noqa: B023
                _rmtree(*args, **kwargs)

        with monkeypatch.context() as patch:
            for name in CALLS:
                patch.setattr(os, name, dying(name))
            patch.setattr(atomic_files.shutil, "rmtree", dead)
            try:
                with atomic_files.atomic_directory(place, checksums=True) as part:
                    fill(part)
                finished = True
            except PowerCutError:
                finished = False
        if place.parent.exists():
            atomic_files.remove_leftovers(place.parent)
            assert not [p.name for p in place.parent.iterdir() if p.name.startswith(".")]
        found = json.loads((place / "a.json").read_text())["text"] if place.exists() else None
        assert found in (("old", "new") if exists else (None, "new"))
        assert not place.exists() or atomic_files.find_damage(place) is None
        outcomes.add(found)
        if finished:
            break
    assert outcomes == ({"old", "new"} if exists else {None, "new"})
    assert number > 5


def test_a_foreign_error_is_told_with_the_room_that_is_left(tmp_path: Path) -> None:
    class SafetensorError(Exception):
        pass

    def write() -> None:
        with atomic_files.atomic_directory(tmp_path / "d") as part:
            fill(part)
            raise SafetensorError("No space left on device")

    with pytest.raises(
        OutputError, match=r"d: cannot be written: No space left on device \(\d+ MB free there\); make room"
    ):
        write()
    assert not list(tmp_path.iterdir())


def test_text_is_replaced_or_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.json"
    atomic_files.write_text(path, "old")

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OutputError, match="No space left on device"):
        atomic_files.write_text(path, "new")
    assert path.read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["a.json"]


def test_what_is_removed_is_gone_or_has_another_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with atomic_files.atomic_directory(tmp_path / "step-1") as part:
        fill(part)
    with monkeypatch.context() as patch:
        patch.setattr(atomic_files.shutil, "rmtree", lambda *args, **kwargs: None)
        atomic_files.remove(tmp_path / "step-1")
    assert not (tmp_path / "step-1").exists()
    atomic_files.remove_leftovers(tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="a file system that refuses new files")
def test_an_error_does_not_name_the_file_that_is_written_beside_its_place() -> None:
    for write in (lambda path: atomic_files.write_text(path, ""), _make_directory):
        with pytest.raises(OutputError, match=r"^/proc/x\.json: cannot be written: [^/]+$"):
            write(Path("/proc/x.json"))


def _make_directory(path: Path) -> None:
    with atomic_files.atomic_directory(path):
        pass
