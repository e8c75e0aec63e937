"""Memory that runs out: one line that says what to lower, and by how much."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from sftx.config.options import TrainConfig
from sftx.data.collate import pack, pad
from sftx.errors import TrainingError, is_out_of_memory
from sftx.trainer import memory_advice
from trainers import batches_of, rows, small_model, trainer_of


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_model(tmp_path_factory.mktemp("model"))


def wrapped(cause: BaseException) -> BaseException:
    error = ValueError("a library's own words")
    error.__cause__ = cause
    return error


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (MemoryError(), True),
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"), True),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 4 bytes"), True),
        (RuntimeError("DefaultCPUAllocator: not enough memory: you tried to allocate 4 bytes"), True),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"), True),
        (wrapped(MemoryError()), True),
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), False),
        (ValueError("out of memory"), False),
    ],
)
def test_errors_of_memory_are_told_from_others(error: BaseException, expected: bool) -> None:
    assert is_out_of_memory(error) is expected


BATCH, LONG, PACKED = pad(rows(4)), pad(rows(1)), pack(rows(6))


@pytest.mark.parametrize(
    ("options", "batch", "expected"),
    [
        (
            {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2},
            BATCH,
            "set --train-batch-size 8 --per-device-train-batch-size 2 (now 4), half the memory for rows, "
            "and leave gradient_accumulation_steps out: the update stays the same",
        ),
        (
            {"per_device_train_batch_size": 9},
            BATCH,
            "set --train-batch-size 9 --per-device-train-batch-size 3 (now 9), 1/3 of the memory",
        ),
        ({"per_device_train_batch_size": 7}, BATCH, "--train-batch-size 7 --per-device-train-batch-size 1 (now 7)"),
        ({}, LONG, "set --gradient-checkpointing"),
        ({"gradient_checkpointing": True, "selective_checkpointing": True}, LONG, "leave selective_checkpointing out"),
        ({"gradient_checkpointing": True}, LONG, f"--max-length {LONG.input_ids_BT.shape[1] // 2}"),
        ({"gradient_checkpointing": True}, PACKED, f"--set packed.length={PACKED.input_ids_BT.shape[1] // 2}"),
    ],
)
def test_what_to_lower_is_said_with_numbers(options: dict[str, Any], batch: Any, expected: str) -> None:
    config = TrainConfig(**{"per_device_train_batch_size": 1} | options)
    told = memory_advice.step_advice(config, [batch, pad(rows(1, longest=5))])
    num_rows, length = batch.input_ids_BT.shape
    assert told.startswith(f"a micro-batch of {num_rows} row{'s' if num_rows > 1 else ''} of {length} tokens; ")
    assert expected in told


def test_an_optimizer_without_room_for_its_state_says_so(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = trainer_of(model)
    trainer.last_saved = "runs/x/checkpoints/step-1"

    def fails() -> None:
        raise RuntimeError("[enforce fail at alloc_cpu.cpp:127] DefaultCPUAllocator: can't allocate memory")

    monkeypatch.setattr(trainer.optimizer, "step", fails)
    with pytest.raises(TrainingError) as caught:
        trainer.train_step(2, 0, batches_of(trainer))
    assert "the state of optim adamw" in str(caught.value)
    assert "--optim adafactor" in str(caught.value)
    assert str(caught.value).endswith("last saved: runs/x/checkpoints/step-1")


def test_other_errors_stay_what_they_are(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = trainer_of(model)

    def fails() -> None:
        raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")

    monkeypatch.setattr(trainer.optimizer, "step", fails)
    with pytest.raises(RuntimeError, match="mat1 and mat2"):
        trainer.train_step(1, 0, batches_of(trainer))


LIMITED = """
import resource, sys
from pathlib import Path
import torch
torch.set_num_threads(1)
from sftx.errors import SftxError
sys.path.insert(0, "tests/helpers")
from trainers import planned, rows, trainer_of
from sftx.model.load import load_model, load_spec

where, model = sys.argv[1], Path(sys.argv[2])
trainer = trainer_of(model)
trainer.train_step(1, 0, trainer.micro_batches(planned(((0,), (1,)), rows(2))))  # libraries allocate now
spec = load_spec(str(model))
used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
room = 64 << 20
resource.setrlimit(resource.RLIMIT_AS, (used + room, -1))
try:
    if where == "step":
        trainer.train_step(2, 0, trainer.micro_batches(planned(((0,), (1,)), rows(2, longest=30_000))))
    else:
        load_model(spec, [], dtype=torch.float32, device=torch.device("cpu"))
    print("there was room")
except SftxError as error:
    print(f"{type(error).__name__}: {error}")
"""


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="limits a process by Linux's own count")
@pytest.mark.parametrize(
    ("where", "expected"),
    [
        ("step", "TrainingError: step 2: cpu .* a micro-batch of 2 rows of "),
        ("load", "memory for its weights, 0.1 GiB in float32; set --bf16"),
    ],
)
def test_a_process_without_room_says_what_to_do(tmp_path: Path, where: str, expected: str) -> None:
    directory = small_model(tmp_path, intermediate_size=64 if where == "step" else 1 << 17)
    done = subprocess.run(
        [sys.executable, "-c", LIMITED, where, str(directory)],
        capture_output=True,
        text=True,
        check=False,
        cwd=Path(__file__).parents[2],
        env={"PATH": "/usr/bin:/bin", "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
    )
    assert re.search(expected, done.stdout), done.stderr[-2000:]
    if where == "step":
        assert "set --train-batch-size 2 --per-device-train-batch-size 1 (now 2)" in done.stdout
