"""Hub datasets are read at one commit, or raise an error of one line. The hub is mocked, the network is not used."""

from __future__ import annotations

import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from sftx import DataError, hub_lookup
from sftx.config.options import DataConfig, RunConfig, Source
from sftx.data import sources


@pytest.fixture(autouse=True)
def _in_an_empty_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.fixture(autouse=True)
def _fresh_hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    hub_lookup._ask.cache_clear()
    yield
    hub_lookup._ask.cache_clear()


def error_of(source: Source) -> str:
    with pytest.raises(DataError) as caught:
        list(sources.read(source))
    message = str(caught.value)
    assert "\n" not in message
    return message


def hub_raises(monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    import huggingface_hub

    def dataset_info(self: object, repo_id: str, **options: Any) -> None:
        assert options["timeout"] <= 10
        raise error

    hub_lookup._ask.cache_clear()
    monkeypatch.setattr(huggingface_hub.HfApi, "dataset_info", dataset_info)


def answer(status: int) -> Any:
    return types.SimpleNamespace(headers={}, request=None, status_code=status)


def test_a_hub_dataset_that_cannot_be_downloaded_is_reported_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import errors

    sources.check(Source("owner/name"))  # the hub is not asked yet
    assert sources.num_bytes(Source("owner/name")) == 0
    here = f"owner/name: no such file or directory (looked in {Path.cwd()})"
    hub_raises(monkeypatch, OSError("Name or service not known"))
    assert error_of(Source("owner/name")) == (
        f"{here}, and the hub cannot be reached (Name or service not known); HF_HUB_OFFLINE=1 uses what was "
        "downloaded before"
    )
    hub_raises(monkeypatch, errors.RepositoryNotFoundError("404", response=answer(404)))
    assert error_of(Source("owner/name")) == (
        f"{here}, and no such dataset on the hub; a private one needs `hf auth login`"
    )
    hub_raises(monkeypatch, errors.HfHubHTTPError("503 busy", response=answer(503)))
    assert error_of(Source("owner/name")) == f"{here}, and the hub answers: 503 busy"
    with pytest.raises(DataError, match=r"and the hub answers: 503 busy"):
        sources.fingerprint(Source("owner/name"))


def test_a_missing_source_names_the_nearest_one(monkeypatch: pytest.MonkeyPatch) -> None:
    Path("owner").mkdir()
    Path("owner/rows-v2").mkdir()
    Path("train.jsonl").touch()
    hub_raises(monkeypatch, OSError("no network"))
    here = f"(looked in {Path.cwd()}; did you mean 'rows-v2'?)"
    assert error_of(Source("owner/rows-v1")) == (
        f"owner/rows-v1: no such file or directory {here}, and the hub cannot be reached (no network); "
        "HF_HUB_OFFLINE=1 uses what was downloaded before"
    )
    assert error_of(Source("trian.jsonl")).endswith("; did you mean 'train.jsonl'?")


def test_the_hub_is_asked_before_anything_is_imported_or_read(monkeypatch: pytest.MonkeyPatch) -> None:
    config = RunConfig(data=DataConfig(train=(Source("owner/rows"),)))
    hub_raises(monkeypatch, OSError("no network"))
    with pytest.raises(DataError, match=r"^owner/rows: no such file or directory .* cannot be reached \(no network\)"):
        sources.check_data_config(config)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    sources.check_data_config(config)


def test_a_hub_dataset_is_read_at_the_commit_that_its_fingerprint_names(monkeypatch: pytest.MonkeyPatch) -> None:
    """A local directory, which `datasets` loads by the same call, takes the place of the hub."""
    import datasets
    import huggingface_hub

    commits = iter(["abc", "def"])
    calls: list[dict[str, Any]] = []
    load = datasets.load_dataset

    def load_dataset(path: str, name: str | None, **options: Any) -> Any:
        calls.append({"path": path, "name": name, **options})
        return load("there", name, split=options["split"], streaming=options["streaming"], cache_dir="cache")

    Path("there").mkdir()
    Path("there/train-00000-of-00001.jsonl").write_text('{"a": 1}\n{"a": 2}\n')
    monkeypatch.setattr(
        huggingface_hub.HfApi, "dataset_info", lambda self, path, timeout: types.SimpleNamespace(sha=next(commits))
    )
    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    datasets.disable_progress_bars()
    try:
        source = Source("owner/name")
        assert [(str(w), r) for w, r in sources.read(source)] == [
            ("owner/name row 1", {"a": 1}),
            ("owner/name row 2", {"a": 2}),
        ]
        first = sources.fingerprint(source)
        assert [str(w) for w, _ in sources.read(Source("owner/name", split="train", limit=1))] == [
            "owner/name[train] row 1"
        ]
        assert len(list(sources.read(source, streaming=True))) == 2
    finally:
        datasets.enable_progress_bars()
    assert [(a["revision"], a["streaming"], a["split"]) for a in calls] == [
        ("abc", False, "train"),
        ("abc", True, "train"),
        ("abc", True, "train"),
    ]
    hub_lookup._ask.cache_clear()
    assert sources.fingerprint(source) != first


def test_offline_the_hub_is_not_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    hub_raises(monkeypatch, AssertionError("the hub was asked"))
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    calls: list[dict[str, Any]] = []

    def load_dataset(path: str, name: str | None, **options: Any) -> Any:
        calls.append(options)
        raise ConnectionError("Couldn't reach 'owner/name' on the Hub (OfflineModeIsEnabled)")

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    with pytest.raises(DataError, match=r"^owner/name: cannot be read: Couldn't reach 'owner/name' on the Hub"):
        list(sources.read(Source("owner/name", limit=3)))
    assert calls == [{"split": "train", "streaming": False, "revision": None}]
