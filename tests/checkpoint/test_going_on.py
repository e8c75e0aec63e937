"""Training goes on from an adapter: of a run, of a directory, of PEFT."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

import sftx
from sftx.errors import ConfigError, ModelError
from sftx.testing.runs import run_tiny

ROWS = [
    {"messages": [{"role": "user", "content": f"say {n}"}, {"role": "assistant", "content": str(n)}]} for n in range(8)
]


@pytest.fixture(scope="module")
def first(tmp_path_factory: pytest.TempPathFactory) -> Path:
    settings = {"lora.r": 4, "lora.target_modules": ["q_proj", "down_proj"], "train.learning_rate": 0.01}
    return run_tiny(["lora"], tmp_path_factory.mktemp("first"), settings=settings).output_dir


def go_on(tmp_path: Path, model: Path | str, plugins: dict[str, Any] | None = None, **options: Any) -> Any:
    return sftx.run(
        data=ROWS,
        model=str(model),
        plugins={"chatml": {}, "lora": {}} if plugins is None else plugins,
        output_dir=str(tmp_path / "second"),
        max_steps=1,
        learning_rate=1e-12,  # so that what it began with is still there
        use_cpu=True,
        **options,
    )


def weights(run: Path) -> dict[str, Any]:
    return load_file(run / "adapter" / "adapter_model.safetensors")


@pytest.mark.parametrize("place", ["", "adapter"])
def test_training_goes_on_from_a_run_and_from_its_adapter(tmp_path: Path, first: Path, place: str) -> None:
    second = go_on(tmp_path, first / place)
    config = json.loads((second.output_dir / "adapter" / "adapter_config.json").read_text())
    assert (config["r"], sorted(config["target_modules"])) == (4, ["down_proj", "q_proj"])
    assert (
        config["base_model_name_or_path"]
        == json.loads((first / "adapter" / "adapter_config.json").read_text())["base_model_name_or_path"]
    )
    before, after = weights(first), weights(second.output_dir)
    assert before.keys() == after.keys()
    for name, tensor in after.items():
        assert (tensor - before[name]).abs().max() < 1e-9
    assert any(tensor.abs().max() > 1e-3 for name, tensor in after.items() if "lora_B" in name)
    # The recorded run can be repeated.
    recorded = (second.output_dir / "run.yaml").read_text()
    assert f"init_from: {first / 'adapter'}" in recorded


def test_init_from_alone_begins_with_its_weights_and_options(tmp_path: Path, first: Path) -> None:
    base = json.loads((first / "adapter" / "adapter_config.json").read_text())["base_model_name_or_path"]
    second = go_on(tmp_path, base, {"chatml": {}, "lora": {"init_from": str(first)}})
    assert all(
        (tensor - weights(first)[name]).abs().max() < 1e-9 for name, tensor in weights(second.output_dir).items()
    )


def test_another_option_than_the_adapters_is_refused(tmp_path: Path, first: Path) -> None:
    with pytest.raises(ConfigError, match=r"the adapter .*adapter has r=4; leave it out, or begin a new adapter"):
        go_on(tmp_path, first, {"chatml": {}, "lora": {"r": 8}})
    go_on(tmp_path, first, {"chatml": {}, "lora": {"r": 4}})  # the same is no contradiction


def test_without_an_adapter_plugin_it_says_what_to_do(tmp_path: Path, first: Path) -> None:
    with pytest.raises(ModelError, match="whose result is an adapter; add --plugin lora to train that on"):
        go_on(tmp_path, first, {"chatml": {}})
    with pytest.raises(ModelError, match=r"is an adapter of .*; add --plugin lora to train it on"):
        go_on(tmp_path, first / "adapter", {"chatml": {}})


def test_weights_that_do_not_fit_are_named(tmp_path: Path, first: Path) -> None:
    copy = tmp_path / "copy"
    copy.mkdir()
    for file in (first / "adapter").iterdir():
        (copy / file.name).write_bytes(file.read_bytes())
    config = json.loads((copy / "adapter_config.json").read_text())
    (copy / "adapter_config.json").write_text(json.dumps(config | {"target_modules": ["q_proj"]}))
    with pytest.raises(ModelError, match=r"0 tensors of this adapter are missing and \d+ are not part of it \(first: "):
        go_on(tmp_path, copy)


def test_a_full_result_is_the_model_to_go_on_from(tmp_path: Path) -> None:
    full = run_tiny([], tmp_path / "full").output_dir
    second = go_on(tmp_path, full)
    recorded = (second.output_dir / "run.yaml").read_text()
    assert f"model: {full / 'model'}" in recorded


def test_the_result_loads_when_what_it_began_with_is_gone(tmp_path: Path, first: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(first / "adapter", copy)
    second = go_on(tmp_path, copy)
    shutil.rmtree(copy)
    assert sftx.load_run(second.output_dir).lm.adapters
