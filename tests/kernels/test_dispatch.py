"""The choice of an implementation, and the messages about it."""

import logging

import pytest
import torch

from sftx_kernels import dispatch
from sftx_kernels.dispatch import decide

CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)


@pytest.fixture(autouse=True)
def no_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SFTX_KERNELS", raising=False)
    dispatch._decide.cache_clear()


def test_the_device_decides() -> None:
    assert decide("cross_entropy", CPU, torch.float32).backend == "torch"
    assert "CPU" in decide("cross_entropy", CPU, torch.float32).reason
    assert decide("cross_entropy", CUDA, torch.bfloat16).backend == "triton"
    assert decide("lora_linear", CUDA, torch.bfloat16).backend == "triton"


def test_what_a_gpu_cannot_run_is_torch_and_said_once(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "sftx_kernels"):
        for _ in range(3):
            assert decide("cross_entropy", CUDA, torch.float64).backend == "torch"
            assert decide("lora_linear", CUDA, torch.float64).backend == "torch"
    assert [record.getMessage() for record in caplog.records] == [
        "cross_entropy runs in plain torch on this GPU: torch.float64 has no kernel",
        "lora_linear runs in plain torch on this GPU: torch.float64 has no kernel",
    ]


def test_what_is_asked_for_is_done_or_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    assert decide("cross_entropy", CUDA, torch.bfloat16, requested="torch") == ("torch", "requested by backend", True)
    with pytest.raises(
        ValueError, match=r"^backend: expected 'torch' \(torch.float64 has no.*got 'triton' from backend"
    ):
        decide("lora_linear", CUDA, torch.float64, requested="triton")
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    with pytest.raises(ValueError, match=r"^backend: expected 'torch' \(CPU tensors, and TRITON_INTERPRET is not set"):
        decide("cross_entropy", CPU, torch.float32, requested="triton")
    with pytest.raises(ValueError, match=r"^backend: expected one of auto, torch, triton, got 'cuda'"):
        decide("cross_entropy", CUDA, torch.float32, requested="cuda")


@pytest.mark.parametrize(
    ("value", "cross_entropy", "lora_linear"),
    [
        ("torch", "torch", "torch"),
        ("auto", "triton", "triton"),
        ("triton", "triton", "triton"),
        ("cross_entropy=torch", "torch", "triton"),
        ("torch, lora_linear=triton", "torch", "triton"),
        ("lora_linear=torch,triton", "triton", "triton"),
    ],
)
def test_the_environment(value: str, cross_entropy: str, lora_linear: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SFTX_KERNELS", value)
    assert decide("cross_entropy", CUDA, torch.bfloat16).backend == cross_entropy
    assert decide("lora_linear", CUDA, torch.bfloat16).backend == lora_linear
    assert decide("cross_entropy", CUDA, torch.bfloat16, requested="torch").backend == "torch"  # the argument wins


@pytest.mark.parametrize("value", ["cuda", "cross_entropy=cuda", "cross_entropy="])
def test_the_environment_is_read_with_care(value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SFTX_KERNELS", value)
    with pytest.raises(ValueError, match=r"^SFTX_KERNELS: expected a backend, or operation=backend"):
        decide("cross_entropy", CUDA, torch.bfloat16)


def test_a_misspelt_operation_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SFTX_KERNELS", "torch,lora_linaer=auto")
    with pytest.raises(ValueError, match=r"^SFTX_KERNELS: expected an operation of cross_entropy, .*got 'lora_linaer'"):
        decide("cross_entropy", CUDA, torch.bfloat16)


def test_labels_are_checked_on_an_accelerator_when_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    from sftx_kernels.cross_entropy import check_labels

    class OnDevice(torch.Tensor):
        is_cpu = False

    labels_N = torch.tensor([0, 9, 1]).as_subclass(OnDevice)
    check_labels(labels_N, -100, 5)
    monkeypatch.setenv("SFTX_CHECK_LABELS", "1")
    with pytest.raises(ValueError, match=r"^labels_N: expected -100 or in \[0, 5\), got 9 at row 1"):
        check_labels(labels_N, -100, 5)
