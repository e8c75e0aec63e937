"""Models over one base have its weights in memory once, and each answers as it does alone."""

from __future__ import annotations

import queue
import shutil
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from sftx.checkpoint.load_run import LoadedRun, build_model, load_run
from sftx.model import tiny
from sftx.model.decoding import Decoder, Request, Sampling
from sftx.model.load import load_spec
from sftx.model.shared_bases import SharedBases
from sftx.model.text_stream import TextStream
from sftx.serving.worker import Job, Worker
from sftx.testing.kit import Kit
from sftx.testing.runs import run_tiny
from sftx.types import Adapter, Conversation, LanguageModel, Message

ADAPTERS: dict[str, Mapping[str, Any]] = {
    "lora": {"lora.r": 4},
    "dora": {"lora.r": 4, "lora.use_dora": True},
    "head": {"lora.r": 4, "lora.modules_to_save": ["lm_head", "embed_tokens"]},
    "tokens": {"lora.r": 4, "lora.trainable_token_indices": [5, 6, 7]},
    "vera": {"vera.r": 8},
    "qlora": {"qlora.load_in_8bit": True},
    "other qlora": {"qlora.load_in_8bit": True, "qlora.r": 4},
}
QUESTION = Conversation((Message("user", "Hello!"),))


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("base") / "base"
    shutil.copytree(tiny.model_dir(), directory)
    Kit(None).tokenizer.save_pretrained(directory)
    return directory


@pytest.fixture(scope="module")
def places(base: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Return a run of each adapter that has clearly changed the model, and the base."""
    places = {}
    for name, settings in ADAPTERS.items():
        plugin = next(iter(settings)).partition(".")[0]
        chosen = {"train.learning_rate": 0.05, "train.max_steps": 4, **settings}
        places[name] = run_tiny([plugin], tmp_path_factory.mktemp("run"), model=base, settings=chosen).output_dir
    return {**places, "base": base}


@pytest.fixture(scope="module")
def alone(places: dict[str, Path]) -> dict[str, Tensor]:
    return {name: logits(load_run(place, device="cpu")) for name, place in places.items()}


def logits(loaded: LoadedRun) -> Tensor:
    with torch.no_grad(), loaded.autocast():
        return loaded.lm.model(torch.tensor([loaded.prompt(QUESTION)])).logits


def weights(loaded: Iterable[LoadedRun]) -> int:
    """Return the bytes of the distinct memory of parameters and buffers."""
    tensors = [tensor for run in loaded for tensor in (*run.lm.parameters(), *run.lm.buffers())]
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values())


def test_each_adapter_computes_as_it_does_alone(places: dict[str, Path], alone: dict[str, Tensor]) -> None:
    bases = SharedBases()
    shared = {name: load_run(place, device="cpu", bases=bases) for name, place in places.items()}
    assert len({float(expected.sum()) for expected in alone.values()}) == len(alone)
    for name in (*shared, *reversed(shared)):
        torch.testing.assert_close(logits(shared[name]), alone[name], rtol=0, atol=0, msg=name)
        with shared[name].lm.without_adapters():
            original = logits(shared[name])
        if "qlora" not in name:
            torch.testing.assert_close(original, alone["base"], rtol=1e-4, atol=1e-5)
    groups = [{name for name, run in shared.items() if run.lm.model in models} for _, models in bases.users]
    assert groups == [shared.keys() - {"qlora", "other qlora"}, {"qlora", "other qlora"}]
    together = weights(shared[name] for name in ("base", "lora", "dora", "vera"))
    assert weights([shared["base"]]) < together < 1.5 * weights([shared["base"]])


def test_what_was_loaded_otherwise_is_not_shared(places: dict[str, Path], tmp_path: Path) -> None:
    bases = SharedBases()
    copied = Path(shutil.copytree(places["base"], tmp_path / "base"))
    first = load_run(places["base"], device="cpu", bases=bases)
    for directory, dtype in ((copied, None), (places["base"], torch.bfloat16)):
        other = load_run(directory, device="cpu", dtype=dtype, bases=bases)
        assert weights([first, other]) == weights([first]) + weights([other])
    assert [len(models) for _, models in bases.users] == [1, 1, 1]


class TrainsNorms(Adapter):
    """Trains parameters of the model itself, in place."""

    def attach(self, lm: LanguageModel) -> None:
        self._trained = [p for name, p in lm.model.named_parameters() if "norm" in name]
        for parameter in self._trained:
            parameter.requires_grad_()

    @torch.no_grad()
    def load(self, directory: Path) -> None:
        for parameter in self._trained:
            parameter.mul_(2)

    disabled = save = merge = None  # type: ignore[assignment]


def test_an_adapter_that_trains_the_models_own_weights_changes_no_other(
    places: dict[str, Path], alone: dict[str, Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    bases, spec = SharedBases(), load_spec(str(places["base"]))
    loaded = load_run(places["base"], device="cpu", bases=bases)
    monkeypatch.setattr(
        "sftx.checkpoint.load_run.load_weights", lambda lm, saved, **_: lm.adapters["norms"].load(saved)
    )
    changed = build_model(
        spec, {"norms": TrainsNorms()}, loaded.tokenizer, dtype=torch.float32, device=torch.device("cpu"),
        stop_ids=loaded.stop_ids, saved=places["lora"], bases=bases,
    )  # fmt: skip
    assert len(bases.users) == 1
    torch.testing.assert_close(logits(loaded), alone["base"], rtol=0, atol=0)
    assert not torch.equal(changed.model(torch.tensor([loaded.prompt(QUESTION)])).logits, alone["base"])


def test_models_of_one_base_take_turns_and_give_their_own_answers(places: dict[str, Path]) -> None:
    bases = SharedBases()
    names = ("lora", "vera", "base")
    shared = {name: load_run(places[name], device="cpu", bases=bases) for name in names}
    worker = Worker(shared, max_rows=4, max_waiting=100)
    ends: queue.Queue[str] = queue.Queue()
    jobs = [
        Job(
            name,
            Request(shared[name].prompt(QUESTION), Sampling(length, temperature=1.0, seed=number)),
            TextStream(shared[name].tokenizer, skip_special_tokens=False),
            lambda _, __, reason, name=name: ends.put(name) if reason else None,  # type: ignore[misc]
            time.monotonic() + 100,
        )
        for name, length, count in (("lora", 40, 8), ("vera", 4, 2), ("base", 4, 2))
        for number in range(count)
    ]
    assert all(worker.submit(job) for job in jobs)
    worker.start()
    order = [ends.get(timeout=100) for _ in jobs]
    worker.close()
    assert order.index("lora") > max(at for at, name in enumerate(order) if name != "lora")
    for job in jobs:
        own = Request(job.request.prompt_ids, job.request.sampling)
        run = load_run(places[job.model], device="cpu")
        list(Decoder(run.lm, stop_ids=run.stop_ids, max_rows=1).run([own]))
        assert job.request.answer_ids == own.answer_ids
