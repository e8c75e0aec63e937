"""The plugin `tensorboard`: its event files as TensorBoard's own reader reads them."""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path
from typing import Any

import pytest

from observing import HOSTILE, SAVED, STEPS, STOPPED, InterruptedRunError, logged, play, stop_in, train
from sftx.assembly.registry import activate
from sftx.config.loading import load
from sftx.errors import ConfigError
from sftx_plugins.observers.tensorboard import TensorBoard


def read(directory: Path) -> Any:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    return EventAccumulator(str(directory), size_guidance={"scalars": 0, "tensors": 0}).Reload()


def scalars(reader: Any, name: str) -> list[tuple[int, float]]:
    return [(event.step, event.value) for event in reader.Scalars(name)]


def text(reader: Any, name: str) -> dict[int, str]:
    """Return a text by the steps at which it was written."""
    events = reader.Tensors(f"{name}/text_summary")
    return {event.step: event.tensor_proto.string_val[0].decode() for event in events}


@pytest.fixture(scope="module")
def run_directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory of a run that is interrupted two steps after a checkpoint and then resumed."""
    directory = tmp_path_factory.mktemp("tensorboard")
    out = directory / "run"

    def look() -> None:
        """Check the files as a process that is killed here would leave them."""
        reader = read(out / "tensorboard")
        assert scalars(reader, "train/loss") == near(logged(out, "step", "loss"))
        assert [step for step, _ in scalars(reader, "train/loss")] == list(range(1, STOPPED))

    patch = stop_in(STOPPED, InterruptedRunError(), look)
    with pytest.raises(InterruptedRunError):
        train("tensorboard", directory)
    patch.undo()
    train("tensorboard", directory, resume=True)
    return out


def near(values: dict[int, float]) -> list[Any]:
    """Return the values for a comparison with event files, which hold float32."""
    return [(step, pytest.approx(value, rel=1e-7)) for step, value in values.items()]


def test_every_step_and_evaluation_is_there_once(run_directory: Path) -> None:
    reader = read(run_directory / "tensorboard")
    for name in ("loss", "grad_norm", "learning_rate", "epoch", "num_label_tokens", "peak_bytes"):
        expected = logged(run_directory, "step", name)
        assert list(expected) == list(range(1, STEPS + 1))
        assert scalars(reader, f"train/{name}") == near(expected)
    for name in ("loss", "exact-match"):
        expected = logged(run_directory, "evaluate", name)
        assert list(expected) == [0, SAVED, STEPS]
        assert scalars(reader, f"eval/{name}") == near(expected)


def test_answers_options_table_and_result_are_there(run_directory: Path) -> None:
    from tensorboard.plugins.hparams import metadata

    reader = read(run_directory / "tensorboard")
    samples = text(reader, "eval/samples")
    assert list(samples) == [0, SAVED, STEPS]
    assert samples[0].count("prediction:") == 2  # generation.num_samples
    assert "    count to 0" in samples[0]
    assert "lora" in text(reader, "run/assembled")[0]
    assert "num_trainable: " in text(reader, "run/derived")[0]
    assert f"summary/artefact: {run_directory / 'adapter'}" in text(reader, "run/summary")[STEPS]
    content = reader.SummaryMetadata(metadata.SESSION_START_INFO_TAG).plugin_data.content
    options = metadata.parse_session_start_info_plugin_data(content).hparams
    assert options["train.learning_rate"].number_value == 1e-2
    assert options["plugins.lora.target_modules"].string_value == "all-linear"


def test_a_new_run_in_a_directory_replaces_the_old_one(tmp_path: Path) -> None:
    for loss in (9.0, 3.0):

        def change(name: str, arguments: tuple[Any, ...], loss: float = loss) -> tuple[Any, ...]:
            return (dataclasses.replace(arguments[0], loss=loss),) if name in ("on_step", "on_log") else arguments

        info = play(TensorBoard(log_dir=str(tmp_path / "logs")), tmp_path, change)
    assert scalars(read(tmp_path / "logs" / info.output_dir.name), "train/loss") == [(1, 3.0), (2, 3.0)]


def test_any_name_and_text_is_written(tmp_path: Path) -> None:
    def change(name: str, arguments: tuple[Any, ...]) -> tuple[Any, ...]:
        if name in ("on_step", "on_log"):
            return (dataclasses.replace(arguments[0], metrics={HOSTILE: 0.5}),)
        if name == "on_evaluate":
            sample = dataclasses.replace(arguments[0].samples[0], prediction=f"{HOSTILE}\n# no heading")
            return (dataclasses.replace(arguments[0], metrics={HOSTILE: 0.5}, samples=(sample,)),)
        return arguments

    reader = read(play(TensorBoard(), tmp_path, change).output_dir / "tensorboard")
    shown = HOSTILE.replace("\ud800", "?")
    assert scalars(reader, f"train/{shown}") == [(1, 0.5), (2, 0.5)]
    assert scalars(reader, f"eval/{shown}") == [(0, 0.5), (1, 0.5), (2, 0.5)]
    assert "\n    # no heading" in text(reader, "eval/samples")[0]


def test_a_missing_library_is_named_with_what_installs_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.startswith("torch.utils.tensorboard")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "tensorboard", None)
    assembly = activate(load(None, add=["chatml", "tensorboard"], assignments=[]))
    said = r"^plugin 'tensorboard' .*: .*tensorboard.*pip install 'sftx\[tensorboard\]'"
    with pytest.raises(ConfigError, match=said):
        assembly.observers()


def test_an_empty_directory_is_refused() -> None:
    given = [("tensorboard.log_dir", "", "--set tensorboard.log_dir=")]
    with pytest.raises(ConfigError, match=r"tensorboard\.log_dir"):
        activate(load(None, add=["chatml", "tensorboard"], assignments=given))
