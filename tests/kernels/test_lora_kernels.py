"""The Triton kernels of lora_linear against fp64, each alone and all together; dropout's mask bit by bit.

On a GPU where there is one; else under Triton's interpreter, which gets bf16 arithmetic wrong, so without bf16.
Shape suffixes: M rows, K in, O out, R rank.
"""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import triton
import triton.language as tl
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from devices import covering
from sftx_kernels.dropout import keep_scale, threshold_of
from sftx_kernels.lora import lora_linear, lora_linears
from sftx_kernels.nf4 import dequantize_nf4, quantize_nf4
from sftx_kernels.triton.dropout import keep_mask
from sftx_kernels.triton.launch import Work, chip_of
from sftx_kernels.triton.lora import down_launch, grad_a_launch, outer_launch, shrink_launch, sum_parts_launch

DEVICE = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
CHIP = chip_of(DEVICE)
DTYPES = [torch.float32, torch.float16, *([torch.bfloat16] if DEVICE.type == "cuda" else [])]
SCALING = 0.75


# ---- the mask


def philox4x32(counter: Tensor, key: tuple[int, int], rounds: int) -> Tensor:
    """[..., 4] -> [..., 4]: Salmon et al. 2011, section 3.3, in int64."""
    low_bits = (1 << 32) - 1
    c0, c1, c2, c3 = counter.unbind(-1)
    k0, k1 = key
    for _ in range(rounds):
        products = [
            (c & 0xFFFF) * m + (((c >> 16) * m & low_bits) << 16) for c, m in ((c0, 0xD2511F53), (c2, 0xCD9E8D57))
        ]
        # The high halves without overflowing int64: (low 16 bits * m >> 16) + high 16 bits * m, >> 16.
        highs = [(((c & 0xFFFF) * m >> 16) + (c >> 16) * m) >> 16 for c, m in ((c0, 0xD2511F53), (c2, 0xCD9E8D57))]
        (low0, low1), (high0, high1) = [p & low_bits for p in products], highs
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0, k1 = (k0 + 0x9E3779B9) & low_bits, (k1 + 0xBB67AE85) & low_bits
    return torch.stack((c0, c1, c2, c3), -1)


def expected_mask(seed: int, rows: int, columns: int, threshold: int) -> Tensor:
    """keep_mask in plain torch."""
    eighths = -(-columns // 8)
    counter = torch.zeros(rows, eighths, 4, dtype=torch.int64)
    counter[..., 0] = torch.arange(eighths)
    counter[..., 1] = torch.arange(rows)[:, None]
    words = philox4x32(counter, (seed & 0xFFFFFFFF, seed >> 32 & 0xFFFFFFFF), 7)
    halves = torch.cat((words & 0xFFFF, words >> 16), -1)
    return halves.reshape(rows, eighths * 8)[:, :columns] >= threshold


@triton.jit
def _store_mask_kernel(
    out_ptr, seed_ptr, threshold, first_m, first_n, stride, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr
):
    rows, columns = first_m + tl.arange(0, BLOCK_M), first_n + tl.arange(0, BLOCK_N)
    mask = keep_mask(tl.load(seed_ptr), first_m, first_n, threshold, BLOCK_M, BLOCK_N)
    tl.store(out_ptr + rows[:, None] * stride + columns[None, :], mask.to(tl.int8))


@pytest.mark.parametrize(
    ("key", "counter", "words"),
    [  # kat_vectors of Random123, its authors' library
        (0, 0, (0x5F6FB709, 0x0D893F64, 0x4F121F81, 0x4F730A48)),
        (0xFFFFFFFF, 0xFFFFFFFF, (0x5207DDC2, 0x45165E59, 0x4D8EE751, 0x8C52F662)),
    ],
)
def test_the_reference_is_philox(key: int, counter: int, words: tuple[int, ...]) -> None:
    assert tuple(philox4x32(torch.full((4,), counter), (key, key), 7).tolist()) == words


@pytest.mark.parametrize(
    ("seed", "tile"),
    covering([0, 1, 123456789012345678, (1 << 63) - 1, -1], [(16, 64), (64, 16), (32, 8)], strength=1),
    ids=str,
)
def test_mask_is_philox_whatever_the_tile(seed: int, tile: tuple[int, int]) -> None:
    threshold = threshold_of(0.3)
    out = torch.zeros(64, 64, dtype=torch.int8, device=DEVICE)
    on_device = torch.tensor(seed, device=DEVICE)
    for first_m in range(0, 64, tile[0]):
        for first_n in range(0, 64, tile[1]):
            _store_mask_kernel[(1,)](out, on_device, threshold, first_m, first_n, 64, BLOCK_M=tile[0], BLOCK_N=tile[1])
    assert out.bool().cpu().equal(expected_mask(seed, 64, 64, threshold))


@pytest.mark.parametrize("dropout_p", [0.0, 1e-6, 0.05, 0.1, 0.5, 0.9, 0.999999])
def test_mean_of_the_mask(dropout_p: float) -> None:
    threshold = threshold_of(dropout_p)
    assert abs(threshold / 65536 - dropout_p) <= 2**-16
    scale = keep_scale(threshold)
    assert scale * (65536 - threshold) / 65536 == 1
    kept = expected_mask(7, 1000, 400, threshold).double()
    deviation = math.sqrt(max(threshold / 65536 / (1 - threshold / 65536), 1e-12) / kept.numel())
    assert abs(kept.mean().item() * scale - 1) < 5 * deviation
    # no correlation between neighbours in a row, in a column, or between seeds
    centred = kept - kept.mean()
    other = expected_mask(8, 1000, 400, threshold).double()
    variance = max(centred.square().mean().item(), 1e-12)
    for one, two in [(centred[1:], centred[:-1]), (centred[:, 1:], centred[:, :-1]), (centred, other - other.mean())]:
        assert abs((one * two).mean().item()) / variance < 5 / math.sqrt(one.numel()) + 1e-9


# ---- each kernel alone


def normal(*shape: int, dtype: torch.dtype, seed: int = 0) -> Tensor:
    """Values that the dtype holds, so that what is measured is the arithmetic."""
    values = torch.randn(shape, generator=torch.Generator().manual_seed(seed + sum(shape)), dtype=torch.float64)
    return (values / math.sqrt(max(1, shape[-1]))).to(DEVICE, dtype)


def with_gaps(matrix: Tensor) -> Tensor:
    """The same values in rows that lie further apart."""
    wide = matrix.new_zeros(matrix.shape[0], matrix.shape[1] + 3)
    wide[:, : matrix.shape[1]] = matrix
    return wide[:, : matrix.shape[1]]


def distance(actual: Tensor, exact: Tensor) -> float:
    return ((actual.double() - exact).norm() / exact.norm().clamp(min=1e-30)).item() if exact.numel() else 0.0


def assert_as_good(actual: Tensor, torchs: Tensor, exact: Tensor) -> None:
    assert actual.shape == exact.shape
    assert distance(actual, exact) <= 2 * distance(torchs, exact) + 1e-6


SHAPES = [(1, 7, 5, 1), (37, 33, 129, 5), (37, 64, 24, 33), (130, 64, 130, 16), (5, 128, 24, 3), (0, 33, 5, 5)]
DROPOUTS = [0.0, 0.4]


@pytest.mark.parametrize(("dtype", "shape", "dropout_p"), covering(DTYPES, SHAPES, DROPOUTS), ids=str)
def test_shrink_and_grad_a(dtype: torch.dtype, shape: tuple[int, int, int, int], dropout_p: float) -> None:
    M, K, _, R = shape
    threshold = threshold_of(dropout_p)
    keep_MK = expected_mask(5, M, K, threshold).to(DEVICE)
    seed = torch.tensor(5, device=DEVICE) if dropout_p else None
    x_MK, A_RK, dS_MR = (normal(*s, dtype=dtype) for s in ((M, K), (R, K), (M, R)))
    dropped_MK = x_MK * keep_MK
    s_MR = x_MK.new_full((M, R), math.nan)
    shrink_launch(with_gaps(x_MK), A_RK, s_MR, CHIP, seed=seed, threshold=threshold).run()
    assert_as_good(s_MR, dropped_MK @ A_RK.T, dropped_MK.double() @ A_RK.double().T)

    launch, dA_PRK = grad_a_launch(with_gaps(dS_MR), with_gaps(x_MK), CHIP, seed=seed, threshold=threshold)
    launch.run()
    dA_RK = dA_PRK.new_full((R, K), math.nan)
    sum_parts_launch(dA_PRK, dA_RK).run()
    assert dA_RK.dtype == torch.float32
    assert_as_good(dA_RK, dS_MR.T @ dropped_MK, dS_MR.double().T @ dropped_MK.double())


@pytest.mark.parametrize(("dtype", "shape"), covering(DTYPES, [*SHAPES, (70, 8, 300, 32)], strength=1), ids=str)
def test_down(dtype: torch.dtype, shape: tuple[int, int, int, int]) -> None:
    M, _, O, R = shape  # noqa: E741
    R = min(R, 32)
    dy_MO, B_OR, s_MR = (normal(*s, dtype=dtype) for s in ((M, O), (O, R), (M, R)))
    launch, dS_PMR, dB_POR = down_launch(with_gaps(dy_MO), with_gaps(B_OR), with_gaps(s_MR), CHIP, alpha=SCALING)
    launch.run()
    dS_MR, dB_OR = dy_MO.new_full((M, R), math.nan), dy_MO.new_full((O, R), math.nan)
    sum_parts_launch(dS_PMR, dS_MR).run()
    sum_parts_launch(dB_POR, dB_OR).run()
    assert_as_good(dS_MR, dy_MO @ B_OR * SCALING, dy_MO.double() @ B_OR.double() * SCALING)
    assert_as_good(dB_OR, dy_MO.T @ s_MR * SCALING, dy_MO.double().T @ s_MR.double() * SCALING)


@pytest.mark.parametrize(
    ("dtype", "shape", "transposed", "dropout_p"),
    covering(DTYPES, [*SHAPES, (17, 8, 24, 70)], [False, True], DROPOUTS),
    ids=str,
)
def test_outer(dtype: torch.dtype, shape: tuple[int, int, int, int], transposed: bool, dropout_p: float) -> None:
    M, _, O, R = shape  # noqa: E741
    threshold = threshold_of(dropout_p)
    mask = {"seed": torch.tensor(-9, device=DEVICE), "threshold": threshold} if dropout_p else {}
    keep_MO = expected_mask(-9, M, O, threshold).to(DEVICE)
    l_MR, rt_RO = (normal(*s, dtype=dtype) for s in ((M, R), (R, O)))
    exact_MO = SCALING * keep_MO * (l_MR.double() @ rt_RO.double())
    given_rt = rt_RO.T.contiguous().T if transposed else rt_RO
    out_MO = l_MR.new_full((M, O), math.nan)
    outer_launch(with_gaps(l_MR), given_rt, out_MO, CHIP, alpha=SCALING, **mask).run()
    assert_as_good(out_MO, SCALING * keep_MO * (l_MR @ rt_RO), exact_MO)


def test_work_is_what_the_formulas_move() -> None:
    """M 1024, K 512, O 256, R 8 in fp16: by hand."""
    x_MK, A_RK, B_OR, y_MO, s_MR = (
        torch.empty(shape, dtype=torch.float16, device="meta")
        for shape in ((1024, 512), (8, 512), (256, 8), (1024, 256), (1024, 8))
    )
    x, A, B, y, s = 1048576, 8192, 4096, 524288, 16384  # bytes
    assert shrink_launch(x_MK, A_RK, s_MR, CHIP).work == Work(8388608, x + A + s)
    assert grad_a_launch(s_MR, x_MK, CHIP)[0].work == Work(8388608, s + x + 2 * A)
    assert down_launch(y_MO, B_OR, s_MR, CHIP, alpha=1.0)[0].work == Work(8388608, y + B + s + 2 * s + 2 * B)
    assert outer_launch(s_MR, A_RK, x_MK, CHIP).work == Work(8388608, s + A + x)


# ---- together


def make_group(M: int, K: int, outs: tuple[int, ...], ranks: tuple[int, ...], dtype: torch.dtype) -> dict[str, Any]:
    return {
        "x": normal(M, K, dtype=dtype),
        "weights": [normal(O, K, dtype=dtype, seed=i) for i, O in enumerate(outs)],  # noqa: E741
        "lora_As": [normal(R, K, dtype=dtype, seed=i) for i, R in enumerate(ranks)],
        "lora_Bs": [normal(O, R, dtype=dtype, seed=i) for i, (O, R) in enumerate(zip(outs, ranks, strict=True))],  # noqa: E741
        "biases": [normal(O, dtype=dtype, seed=i) for i, O in enumerate(outs)],  # noqa: E741
    }


def evaluate(group: dict[str, Any], keep: Tensor | None, dtype: torch.dtype, function: Any = None) -> list[Tensor]:
    """[outputs, then gradients of x, A, B], by our function, or by the formula in plain torch in `dtype`."""
    cast = {n: [t.to(dtype) for t in v] if isinstance(v, list) else v.to(dtype) for n, v in group.items()}
    trained = [cast["x"], *cast["lora_As"], *cast["lora_Bs"]]
    for leaf in trained:
        leaf.requires_grad_()
    if function is not None:
        outputs = function(cast)
    else:
        x = cast["x"]
        dropped = x if keep is None else x * keep[0] * keep[1]
        zipped = zip(cast["weights"], cast["lora_As"], cast["lora_Bs"], cast["biases"], strict=True)
        outputs = [x @ W.T + b + SCALING * (dropped @ A.T @ B.T) for W, A, B, b in zipped]
    upstream = [normal(*y.shape, dtype=group["x"].dtype, seed=7).to(dtype) for y in outputs]
    gradients = torch.autograd.grad(list(outputs), trained, upstream)
    for leaf in trained:
        leaf.requires_grad_(False)
    return [*(y.detach() for y in outputs), *gradients]


@pytest.mark.parametrize("dropout_p", DROPOUTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_layers_that_share_x(dtype: torch.dtype, dropout_p: float) -> None:
    """Outputs and gradients of three layers of different widths and ranks; forward and backward see one mask."""
    group = make_group(37, 33, (20, 129, 5), (5, 33, 16), dtype)
    seed = torch.tensor(11)
    threshold = threshold_of(dropout_p)
    keep = (expected_mask(11, 37, 33, threshold).to(DEVICE), keep_scale(threshold)) if dropout_p else None

    def ours(given: dict[str, Any]) -> Any:
        return lora_linears(**given, scaling=SCALING, dropout_p=dropout_p, seed=seed, backend="triton")

    exact, torchs = evaluate(group, keep, torch.float64), evaluate(group, keep, dtype)
    for actual, torch_value, exact_value in zip(evaluate(group, keep, dtype, ours), torchs, exact, strict=True):
        assert actual.dtype == dtype
        assert_as_good(actual, torch_value, exact_value)


@settings(deadline=None, derandomize=True, max_examples=12)
@given(
    M=st.integers(0, 70), K=st.integers(1, 70), O=st.integers(1, 140), R=st.integers(1, 40),
    dropout_p=st.sampled_from(DROPOUTS),
)  # fmt: skip
def test_any_shape(M: int, K: int, O: int, R: int, dropout_p: float) -> None:  # noqa: E741
    group = make_group(M, K, (O,), (R,), torch.float32)
    threshold = threshold_of(dropout_p)
    keep = (expected_mask(3, M, K, threshold).to(DEVICE), keep_scale(threshold)) if dropout_p else None

    def ours(given: dict[str, Any]) -> Any:
        seed = torch.tensor(3)
        return lora_linears(**given, scaling=SCALING, dropout_p=dropout_p, seed=seed, backend="triton")

    exact, torchs = evaluate(group, keep, torch.float64), evaluate(group, keep, torch.float32)
    for actual, torch_value, exact_value in zip(evaluate(group, keep, torch.float32, ours), torchs, exact, strict=True):
        assert_as_good(actual, torch_value, exact_value)


@pytest.mark.parametrize("is_native", [False, True])
def test_fp32_adapters_on_a_half_base_get_gradients_that_only_native_products_round(
    is_native: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sftx_kernels.gemm.cpu_multiplies", lambda dtype: is_native or dtype == torch.float32)
    group = make_group(37, 33, (20,), (5,), torch.float16)
    exact = evaluate(group, None, torch.float64)
    A, B = (group[name][0].float().requires_grad_() for name in ("lora_As", "lora_Bs"))
    y = lora_linear(group["x"], group["weights"][0], A, B, scaling=SCALING, bias=group["biases"][0], backend="triton")
    upstream = normal(*y.shape, dtype=torch.float16, seed=7)
    for gradient, expected in zip(torch.autograd.grad(y, [A, B], upstream), exact[2:], strict=True):
        assert gradient.dtype == torch.float32
        assert distance(gradient, expected) < 1e-3
        assert is_native or not gradient.half().float().equal(gradient)


def test_same_bits_again_and_for_a_seed_on_the_device() -> None:
    group = make_group(70, 64, (129,), (16,), torch.float16)

    def run(seed: Tensor) -> list[Tensor]:
        options = {"scaling": SCALING, "dropout_p": 0.4, "seed": seed, "backend": "triton"}
        return evaluate(group, None, torch.float16, lambda given: lora_linears(**given, **options))

    once = run(torch.tensor(1 << 40))
    assert all(map(torch.equal, once, run(torch.tensor(1 << 40))))
    assert all(map(torch.equal, once, run(torch.tensor(1 << 40, device=DEVICE))))
    assert not any(map(torch.equal, once, run(torch.tensor(2))))


def test_nf4_base() -> None:
    group = make_group(20, 32, (24, 8), (5, 3), torch.float32)
    quantized = [quantize_nf4(weight) for weight in group["weights"]]
    group["weights"] = [dequantize_nf4(weight, torch.float32) for weight in quantized]

    def ours(given: dict[str, Any]) -> Any:
        return lora_linears(**{**given, "weights": quantized}, scaling=SCALING, backend="triton")

    exact, torchs = evaluate(group, None, torch.float64), evaluate(group, None, torch.float32)
    for actual, torch_value, exact_value in zip(evaluate(group, None, torch.float32, ours), torchs, exact, strict=True):
        assert_as_good(actual, torch_value, exact_value)


@pytest.mark.parametrize("name", ["weight", "lora_A", "lora_B"])
def test_refuses_rows_with_gaps(name: str) -> None:
    shapes = {"x": (7, 6), "weight": (5, 6), "lora_A": (2, 6), "lora_B": (5, 2)}
    given = {n: normal(*shape, dtype=torch.float32) for n, shape in shapes.items()}
    given[name] = given[name].T.contiguous().T
    with pytest.raises(ValueError, match=rf"^{name}: expected rows without gaps, of stride 1, got strides \(1, "):
        lora_linear(**given, scaling=SCALING, backend="triton")


def test_any_strides_of_x_and_an_expanded_gradient() -> None:
    group = make_group(12, 9, (10,), (3,), torch.float32)
    x, W, A, B = group["x"], group["weights"][0], group["lora_As"][0], group["lora_Bs"][0]
    strided = x.T.contiguous().T.view(3, 4, 9).requires_grad_()
    A.requires_grad_()
    y = lora_linear(strided, W, A, B, scaling=SCALING, dropout_p=0.3, seed=torch.tensor(1), backend="triton")
    gradients = torch.autograd.grad(y.sum(), [strided, A])
    plain = x.clone().requires_grad_()
    z = lora_linear(plain, W, A, B, scaling=SCALING, dropout_p=0.3, seed=torch.tensor(1), backend="triton")
    torch.testing.assert_close(z, y.view(12, 10))  # torch's product may add up other strides in another order
    expected = torch.autograd.grad(z, [plain, A], torch.ones_like(z))
    torch.testing.assert_close(gradients[0].reshape(12, 9), expected[0])
    torch.testing.assert_close(gradients[1], expected[1])
