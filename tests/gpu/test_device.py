"""Properties that only a GPU can show: the host never waits for it, and offsets past 2^31 are right."""

import contextlib
from collections.abc import Iterator

import pytest
import torch

from sftx_kernels import IGNORE_INDEX, cross_entropy, linear_cross_entropy, lora_linear

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


@contextlib.contextmanager
def waiting_is_an_error() -> Iterator[None]:
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def labels(num_rows: int, V: int, *, every: int = 2) -> torch.Tensor:
    labels_N = torch.randint(V, (num_rows,))
    labels_N[::every] = IGNORE_INDEX
    return labels_N.cuda()


@pytest.mark.parametrize("trained", [False, True])
@pytest.mark.parametrize("reduction", ["sum", "none"])
def test_linear_cross_entropy_never_waits(trained: bool, reduction: str) -> None:
    hidden_ND = torch.randn(256, 64, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    weight_VD = torch.randn(1000, 64, device="cuda", dtype=torch.bfloat16, requires_grad=trained)
    labels_N = labels(256, 1000)
    with waiting_is_an_error():
        linear_cross_entropy(hidden_ND, weight_VD, labels_N, num_valid=128, reduction=reduction).loss.sum().backward()
    assert hidden_ND.grad is not None
    assert hidden_ND.grad.isfinite().all()


@pytest.mark.parametrize("inplace", [False, True])
def test_cross_entropy_never_waits(inplace: bool) -> None:
    leaf = torch.randn(64, 1000, device="cuda", requires_grad=True)
    labels_N = labels(64, 1000)
    with waiting_is_an_error():
        (cross_entropy(leaf * 1.0, labels_N, inplace=inplace).loss * 0.5).backward()
    assert leaf.grad is not None
    assert leaf.grad.isfinite().all()


def test_lora_linear_never_waits_with_a_seed_on_the_host() -> None:
    x = torch.randn(256, 128, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    weight = torch.randn(256, 128, device="cuda", dtype=torch.bfloat16)
    lora_A = torch.randn(8, 128, device="cuda", requires_grad=True)
    lora_B = torch.randn(256, 8, device="cuda", requires_grad=True)
    with waiting_is_an_error():
        y = lora_linear(x, weight, lora_A, lora_B, scaling=2.0, dropout_p=0.1, seed=torch.tensor(5))
        y.sum().backward()
    assert lora_A.grad is not None
    assert lora_A.grad.isfinite().all()


def test_offsets_past_two_to_the_31() -> None:
    num_rows, V = 20_000, 128_256
    if torch.cuda.mem_get_info()[0] < 2.5 * num_rows * V * 2:
        pytest.skip("needs 13 GB of free memory")
    logits_NV = torch.zeros(num_rows, V, device="cuda", dtype=torch.bfloat16)
    logits_NV[-1] = torch.randn(V, device="cuda")
    labels_N = labels(num_rows, V, every=3)
    labels_N[-1] = 7
    last = logits_NV[-1:].float().requires_grad_()
    expected = torch.nn.functional.cross_entropy(last, labels_N[-1:], reduction="none")
    expected.sum().backward()
    leaf = logits_NV.requires_grad_()
    loss_N = cross_entropy(leaf, labels_N, reduction="none").loss
    loss_N.sum().backward()
    torch.testing.assert_close(loss_N[-1:].detach(), expected.detach(), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(leaf.grad[-1].float(), last.grad[0], rtol=1e-2, atol=1e-5)
    assert not leaf.grad[0].any()
