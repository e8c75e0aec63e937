"""cross_entropy in both implementations against torch's own, in fp64; then its operations under torch.compile.

Shape suffixes: N rows, V vocabulary.
"""

from typing import Any

import pytest
import torch
import torch._dynamo.testing
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.autograd import gradcheck

from devices import BACKENDS, DEVICE, DTYPES, covering, error
from sftx_kernels import IGNORE_INDEX, cross_entropy, linear_cross_entropy
from sftx_kernels.triton import cross_entropy as kernels
from sftx_kernels.triton.launch import CHIPS

EVERYTHING = {"label_smoothing": 0.1, "z_loss": 1e-2, "softcap": 2.5, "logit_scale": 0.7}
EACH_OPTION = [{}, *({name: value} for name, value in EVERYTHING.items()), EVERYTHING]
ODD_SHAPES = [(0, 7), (1, 1), (1, 7), (37, 1), (37, 7), (5, 1023), (5, 1024), (2, 32003)]


class Case:
    def __init__(self, N: int, V: int, dtype: torch.dtype, *, ignored: float = 0.3, seed: int = 0) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.logits_NV = (torch.randn(N, V, generator=generator) * 3).to(DEVICE, dtype)
        labels_N = torch.randint(V, (N,), generator=generator)
        labels_N[torch.rand(N, generator=generator) < ignored] = IGNORE_INDEX
        self.labels_N = labels_N.to(DEVICE)
        self.weights_N = (torch.rand(N, generator=generator) + 0.5).to(DEVICE)
        # Powers of 2: a gradient made in place is rounded before it is scaled, which these leave exact.
        self.upstream_N = torch.tensor([0.5, 1.0, 2.0])[torch.randint(3, (N,), generator=generator)].to(DEVICE)

    def dense(self, dtype: torch.dtype, reduction: str, **options: Any) -> dict[str, Tensor]:
        """By torch: logits in `dtype`, softmax in fp32 at least."""
        logits_NV = self.logits_NV.to(dtype).detach().requires_grad_()
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        z_NV = logits_NV.to(wide) * options.get("logit_scale", 1.0)
        if cap := options.get("softcap"):
            z_NV = cap * torch.tanh(z_NV / cap)
        trained_N = self.labels_N != IGNORE_INDEX
        loss_N = F.cross_entropy(
            z_NV, self.labels_N, reduction="none", label_smoothing=options.get("label_smoothing", 0.0)
        )
        lse_N = z_NV.logsumexp(1) * trained_N
        loss_N = (loss_N + options.get("z_loss", 0.0) * lse_N.square()) * self.weights_N.to(wide)
        loss = self.finish(loss_N if reduction == "none" else loss_N.sum(), logits_NV)
        entropy_N = torch.special.entr(z_NV.softmax(1)).sum(1) * trained_N
        return {**loss, "lse_N": lse_N.detach(), "entropy_N": entropy_N.detach()}

    def ours(self, reduction: str, **options: Any) -> dict[str, Tensor]:
        # With inplace the leaf itself would be overwritten.
        logits_NV = self.logits_NV.detach().clone().requires_grad_()
        out = cross_entropy(
            logits_NV.clone(), self.labels_N, token_weights_N=self.weights_N, reduction=reduction, stats=True, **options
        )
        assert int(out.num_tokens) == int((self.labels_N != IGNORE_INDEX).sum())
        assert not out.lse_N.requires_grad
        assert not out.correct_N[self.labels_N == IGNORE_INDEX].any()
        return {**self.finish(out.loss, logits_NV), "lse_N": out.lse_N, "entropy_N": out.entropy_N}

    def finish(self, loss: Tensor, logits_NV: Tensor) -> dict[str, Tensor]:
        (loss * (self.upstream_N if loss.dim() else 1.0)).sum().backward()
        assert logits_NV.grad is not None
        return {"loss": loss.detach(), "grad": logits_NV.grad}


def assert_close(N: int, V: int, dtype: torch.dtype, reduction: str, *, ignored: float = 0.3, **options: Any) -> None:
    """At most twice torch's own error in this dtype; over several cases where few numbers would make it luck."""
    numbers = {name: value for name, value in options.items() if name not in ("backend", "inplace")}
    cases = [
        Case(N, V, dtype, ignored=ignored, seed=seed)
        for seed in range(max(1, min(30, 60 // max(1, N), 600 // max(1, N * V))))
    ]

    def gather(results: list[dict[str, Tensor]]) -> dict[str, Tensor]:
        return {name: torch.stack([result[name] for result in results]) for name in results[0]}

    ours = gather([case.ours(reduction, **options) for case in cases])
    torchs = gather([case.dense(dtype, reduction, **numbers) for case in cases])
    exact = gather([case.dense(torch.float64, reduction, **numbers) for case in cases])
    for name, value in ours.items():
        assert error(value, exact[name]) <= 2 * error(torchs[name], exact[name]) + 1e-6, name


@pytest.mark.parametrize(
    ("backend", "inplace", "dtype", "reduction", "options"),
    covering(BACKENDS, [False, True], DTYPES, ["sum", "none"], [{}, EVERYTHING]),
    ids=str,
)
def test_values_and_gradients(backend: str, inplace: bool, dtype: torch.dtype, reduction: str, options: Any) -> None:
    for shape in ODD_SHAPES:
        assert_close(*shape, dtype, reduction, backend=backend, inplace=inplace, **options)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("options", EACH_OPTION, ids=str)
def test_each_option(backend: str, options: dict[str, float]) -> None:
    assert_close(20, 50, torch.float32, "sum", backend=backend, **options)


@settings(deadline=None, derandomize=True, max_examples=25)
@given(
    N=st.integers(0, 6),
    V=st.integers(1, 5000),
    ignored=st.sampled_from([0.0, 0.5, 1.0]),
    options=st.sampled_from(EACH_OPTION),
    dtype=st.sampled_from(DTYPES),
    inplace=st.booleans(),
)
def test_any_shape(N: int, V: int, ignored: float, options: Any, dtype: torch.dtype, inplace: bool) -> None:
    assert_close(N, V, dtype, "none", ignored=ignored, backend="triton", inplace=inplace, **options)


@pytest.mark.parametrize("reduction", ["sum", "none"])
def test_gradcheck(reduction: str) -> None:
    logits_NV = torch.randn(6, 5, dtype=torch.float64, requires_grad=True)
    labels_N = torch.tensor([0, 4, IGNORE_INDEX, 2, 2, 1])
    assert gradcheck(lambda z: cross_entropy(z, labels_N, reduction=reduction, **EVERYTHING).loss, (logits_NV,))


@pytest.mark.parametrize("inplace", [False, True])
def test_a_second_derivative_is_refused(inplace: bool) -> None:
    leaf = torch.randn(6, 5, requires_grad=True)
    loss = cross_entropy(leaf * 1.0, torch.zeros(6).long(), inplace=inplace).loss
    with pytest.raises(RuntimeError, match="differentiable once; create_graph=True asks"):
        torch.autograd.grad(loss, leaf, create_graph=True)


@pytest.mark.parametrize(
    ("splits", "options", "dtype"), covering([1, 2, 8], [{}, EVERYTHING], DTYPES, strength=1), ids=str
)
def test_programs_that_share_a_row_agree(splits: int, options: dict[str, float], dtype: torch.dtype) -> None:
    case = Case(3, 40_000, dtype, ignored=0.0)
    case.labels_N[1] = IGNORE_INDEX
    exact = case.dense(torch.float64, "none", **options)
    torchs = case.dense(dtype, "none", **options)
    floats = [torch.full((3,), torch.nan, device=DEVICE) for _ in range(3)]
    grad_NV = case.logits_NV.clone()
    loss_N, lse_N, entropy_N = floats
    for launch in kernels.launches(
        grad_NV, case.labels_N, lse_N, CHIPS["sm_90"], token_weights_N=case.weights_N, loss_N=loss_N,
        entropy_N=entropy_N, correct_N=torch.zeros(3, dtype=torch.bool, device=DEVICE), grad_NV=grad_NV,
        ignore_index=IGNORE_INDEX, splits=splits, **options,
    ):  # fmt: skip
        launch.run()
    ours = dict(zip(("loss", "lse_N", "entropy_N", "grad"), (*floats, grad_NV), strict=True))
    exact["grad"], torchs["grad"] = (g["grad"] / case.upstream_N[:, None] for g in (exact, torchs))
    for name, value in ours.items():
        assert error(value, exact[name]) <= 2 * error(torchs[name], exact[name]) + 1e-6, name


def test_programs_share_rows_only_where_rows_are_few() -> None:
    chip = CHIPS["sm_90"]
    assert kernels.num_splits(8192, 128_256, chip) == 1
    assert kernels.num_splits(132, 128_256, chip) == 2
    assert kernels.num_splits(1, 128_256, chip) == 8  # at least two blocks a program
    assert kernels.num_splits(1, 1000, chip) == 1


@pytest.mark.parametrize("backend", BACKENDS)
def test_ties_and_extremes(backend: str) -> None:
    logits_NV = torch.tensor([[1.0, 3.0, 3.0], [1e4, -1e4, 0.0], [-1e4, 1e4, 0.0], [5.0, 5.0, 5.0]], device=DEVICE)
    labels_N = torch.tensor([1, 0, 0, 2], device=DEVICE)
    out = cross_entropy(logits_NV, labels_N, stats=True, reduction="none", backend=backend)
    assert out.correct_N.tolist() == [True, True, False, False]  # the first of equals, as torch.argmax on CPU
    torch.testing.assert_close(out.loss, F.cross_entropy(logits_NV, labels_N, reduction="none"))


@pytest.mark.parametrize("backend", BACKENDS)
def test_ignored_rows_may_hold_anything(backend: str) -> None:
    case = Case(20, 9, torch.float32)
    clean = case.ours("none", backend=backend)
    case.logits_NV[case.labels_N == IGNORE_INDEX] = torch.nan
    case.weights_N[case.labels_N == IGNORE_INDEX] = torch.nan
    dirty = case.ours("none", backend=backend)
    for name, value in clean.items():
        assert value.equal(dirty[name]), name


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("inplace", [False, True], ids=["", "inplace"])
def test_strides(backend: str, inplace: bool) -> None:
    case = Case(9, 40, torch.float32)
    wide_NV = torch.randn(9, 60, device=DEVICE)
    wide_NV[:, 3:43] = case.logits_NV
    labels_N = case.labels_N.repeat_interleave(2)[::2]
    wide_NV.requires_grad_()
    copy_NV = wide_NV * 1.0
    cross_entropy(copy_NV[:, 3:43], labels_N, inplace=inplace, backend=backend).loss.backward()
    assert wide_NV.grad is not None
    torch.testing.assert_close(wide_NV.grad[:, 3:43], case_gradient(case), atol=1e-6, rtol=1e-5)
    assert copy_NV[:, :3].equal(wide_NV[:, :3])
    assert copy_NV[:, 43:].equal(wide_NV[:, 43:])
    if not inplace:
        across = case.logits_NV.t().contiguous().t().requires_grad_()
        cross_entropy(across, labels_N, backend=backend).loss.backward()
        torch.testing.assert_close(across.grad, case_gradient(case), atol=1e-6, rtol=1e-5)


def case_gradient(case: Case) -> Tensor:
    logits_NV = case.logits_NV.detach().clone().requires_grad_()
    F.cross_entropy(logits_NV, case.labels_N, reduction="sum").backward()
    assert logits_NV.grad is not None
    return logits_NV.grad


# ---- in place


@pytest.mark.parametrize("backend", BACKENDS)
def test_in_place_makes_no_second_tensor_of_the_logits_size_and_runs_backward_once(backend: str) -> None:
    case = Case(20, 64, torch.float32)
    leaf = case.logits_NV.detach().clone().requires_grad_()
    logits_NV = leaf * 1.0
    out = cross_entropy(logits_NV, case.labels_N, inplace=True, backend=backend)
    (grad_NV,) = torch.autograd.grad(out.loss, logits_NV, retain_graph=True)
    assert grad_NV.data_ptr() == logits_NV.data_ptr()
    with pytest.raises(RuntimeError, match=r"inplace=True\): backward ran already"):
        torch.autograd.grad(out.loss, logits_NV)


def test_in_place_tells_those_who_saved_the_logits() -> None:
    leaf = torch.randn(4, 6, device=DEVICE, requires_grad=True)
    logits_NV = leaf.exp()  # saves its output
    loss = cross_entropy(logits_NV, torch.zeros(4, dtype=torch.int64, device=DEVICE), inplace=True).loss
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_in_place_without_gradient_leaves_the_logits_alone() -> None:
    logits_NV = torch.randn(4, 6, device=DEVICE)
    before = logits_NV.clone()
    cross_entropy(logits_NV, torch.zeros(4, dtype=torch.int64, device=DEVICE), inplace=True)
    assert logits_NV.equal(before)


def test_in_place_is_scaled_by_what_comes_from_above() -> None:
    for backend in BACKENDS:
        grads = []
        for upstream in (1.0, 0.37):
            leaf = Case(20, 64, torch.float32).logits_NV.requires_grad_()
            labels_N = torch.arange(20, device=DEVICE)
            (cross_entropy(leaf * 1.0, labels_N, inplace=True, backend=backend).loss * upstream).backward()
            grads.append(leaf.grad)
        assert grads[1].equal(grads[0] * 0.37)


@pytest.mark.parametrize("stride", [0, 1])
def test_scale_kernel(stride: int) -> None:
    grad_NV = torch.randn(3, 5000, device=DEVICE)
    factor_N = torch.tensor([0.5, 1.0, 3.0], device=DEVICE)
    factor_N = factor_N[:1].expand(3) if stride == 0 else factor_N
    expected = grad_NV * factor_N[:, None]
    kernels.scale_launch(grad_NV, factor_N).run()
    assert grad_NV.equal(expected)


# ---- as operations


def test_opcheck() -> None:
    logits_NV = torch.randn(5, 7, device=DEVICE, requires_grad=True)
    labels_N = torch.tensor([0, IGNORE_INDEX, 6, 2, 2], device=DEVICE)
    ops = torch.ops.sftx
    for stats in (False, True):
        for weights_N in (None, torch.rand(5, device=DEVICE)):
            numbers = (0.1, 1e-3, 3.0, 0.5, IGNORE_INDEX)
            torch.library.opcheck(ops.cross_entropy, (logits_NV, labels_N, weights_N, *numbers, stats, None))
    lse_N, grad_N = torch.rand(5, device=DEVICE), torch.rand(5, device=DEVICE)
    torch.library.opcheck(ops.cross_entropy_backward, (logits_NV.detach(), labels_N, lse_N, grad_N, *numbers, None))


def test_opcheck_of_the_linear_operation() -> None:
    hidden_ND = torch.randn(6, 4, device=DEVICE, requires_grad=True)
    weight_VD = torch.randn(5, 4, device=DEVICE, requires_grad=True)
    bias_V = torch.randn(5, device=DEVICE, requires_grad=True)
    rows_M, labels_M = torch.tensor([0, 2, 3], device=DEVICE), torch.tensor([4, 0, 1], device=DEVICE)
    for per_row, stats in ((False, False), (True, True)):
        for wants in ((True, True, True), (True, False, False), (False, False, False)):
            torch.library.opcheck(
                torch.ops.sftx.linear_cross_entropy,
                (hidden_ND, weight_VD, bias_V, rows_M, labels_M, None, 0.1, 1e-3, 3.0, 0.5, 2, None, torch.float32,
                 per_row, stats, None, *wants),
                test_utils=("test_schema", "test_faketensor", "test_aot_dispatch_dynamic"),
            )  # fmt: skip
    torch.library.opcheck(torch.ops.sftx.trained_rows, (labels_M, 3, IGNORE_INDEX, 5))


@pytest.mark.parametrize(
    ("chunk", "reduction"),
    covering([{}, {"chunk_rows": 5}, {"workspace_bytes": 1000}], ["sum", "none"], strength=1),
    ids=str,
)
def test_compiles_whole_and_again_at_most_twice(reduction: str, chunk: dict[str, int]) -> None:
    """With as many trained tokens as each batch happens to have."""
    torch._dynamo.reset()
    weight_VD = torch.randn(50, 8, device=DEVICE, requires_grad=True)
    weights_N = torch.rand(12, device=DEVICE)
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")

    def step(hidden_ND: Tensor, labels_N: Tensor, num_valid: int) -> Tensor:
        linear = linear_cross_entropy(
            hidden_ND * 2, weight_VD, labels_N, num_valid=num_valid, token_weights_N=weights_N, reduction=reduction,
            **chunk, **EVERYTHING,
        ).loss  # fmt: skip
        logits = cross_entropy(hidden_ND @ weight_VD.T, labels_N, reduction=reduction, inplace=True).loss
        return (linear + logits).sum()

    compiled = torch.compile(step, backend=counter, fullgraph=True)
    for num_valid in (12, 3, 7, 9, 1, 5):
        hidden_ND = torch.randn(12, 8, device=DEVICE, requires_grad=True)
        labels_N = torch.full((12,), IGNORE_INDEX, device=DEVICE)
        labels_N[torch.randperm(12)[:num_valid]] = torch.randint(50, (num_valid,), device=DEVICE)
        ours = torch.autograd.grad(compiled(hidden_ND, labels_N, num_valid), (hidden_ND, weight_VD))
        eager = torch.autograd.grad(step(hidden_ND, labels_N, num_valid), (hidden_ND, weight_VD))
        for actual, expected in zip(ours, eager, strict=True):
            torch.testing.assert_close(actual, expected)
    assert counter.frame_count <= 3
    torch._dynamo.reset()


# ---- what it refuses


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"logits_NV": torch.zeros(6)}, r"logits_NV: expected shape \[N, V\], got shape \[6\]"),
        ({"logits_NV": torch.zeros(6, 0)}, r"logits_NV: expected at least one column, got shape \[6, 0\]"),
        ({"logits_NV": torch.zeros(6, 5).int()}, r"logits_NV: expected a floating dtype, got torch.int32"),
        ({"labels_N": torch.zeros(5).long()}, r"labels_N: expected shape \[6\], got shape \[5\]"),
        ({"labels_N": torch.zeros(6).int()}, r"labels_N: expected dtype torch.int64, got dtype torch.int32"),
        ({"labels_N": torch.tensor([0, 1, -100, 5, 2, -3])}, r"labels_N: expected -100 or in \[0, 5\), got 5 at row 3"),
        ({"labels_N": torch.zeros(6, device="meta").long()}, r"labels_N: expected device cpu, got device meta"),
        ({"token_weights_N": torch.ones(5)}, r"token_weights_N: expected shape \[6\], got shape \[5\]"),
        ({"label_smoothing": 1.0}, r"label_smoothing: expected a number in \[0, 1\), got 1.0"),
        ({"z_loss": -1.0}, r"z_loss: expected a number >= 0, got -1.0"),
        ({"softcap": 0.0}, r"softcap: expected None or a number > 0, got 0.0"),
        ({"reduction": "mean"}, r"reduction: expected 'sum' or 'none', got 'mean'"),
        ({"backend": "cuda"}, r"backend: expected one of auto, torch, triton, got 'cuda'"),
        ({"logits_NV": torch.zeros(6, 5).double(), "backend": "triton"}, r"backend: expected 'torch' \(torch.float64"),
        (
            {"logits_NV": torch.zeros(6, 5).requires_grad_(), "inplace": True},
            r"logits_NV: .* no leaf, .* got a leaf",
        ),
        (
            {"logits_NV": torch.zeros(5, 6, requires_grad=True).t() * 1, "inplace": True},
            r"logits_NV: expected strides \[>= 5, 1\] where inplace=True, got strides \[1, 6\]",
        ),
        (
            {"logits_NV": (torch.zeros(1, 5, requires_grad=True) * 1).expand(6, 5), "inplace": True},
            r"logits_NV: expected strides \[>= 5, 1\] where inplace=True, got strides \[0, 1\]",
        ),
        ({"logit_scale": float("nan")}, r"logit_scale: expected a finite number, got nan"),
        ({"softcap": float("inf")}, r"softcap: expected None or a number > 0, got inf"),
        ({"ignore_index": None}, r"ignore_index: expected an int, got None"),
    ],
)
def test_refuses(change: dict[str, Any], message: str) -> None:
    good = {"logits_NV": torch.zeros(6, 5), "labels_N": torch.zeros(6).long()}
    cross_entropy(**good)
    with pytest.raises(ValueError, match=f"^{message}"):
        cross_entropy(**{**good, **change})
