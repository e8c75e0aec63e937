"""linear_kl against dense logits in torch, in both implementations; then its memory, its products and its errors.

Shape suffixes as in sftx_kernels/linear_kl.py.
"""

import itertools
import math
import sys
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.autograd import gradcheck

from devices import DEVICE, DTYPES, covering, error
from recording import Recorder, peak_bytes
from sftx_kernels import IGNORE_INDEX, TeacherHead, TopK, linear_cross_entropy, linear_kl

BETAS = [0.0, 0.3, 1.0]
EVERYTHING = {
    "temperature": 1.7, "alpha": 0.3, "softcap": 2.5, "logit_scale": 0.7, "teacher_softcap": 3.0,
    "teacher_logit_scale": 0.8,
}  # fmt: skip
EACH_OPTION = [{}, *({name: value} for name, value in EVERYTHING.items()), EVERYTHING]
ODD_SHAPES = [(0, 5, 7), (1, 5, 1), (1, 5, 7), (37, 16, 7), (20, 33, 1023), (9, 4, 32003), (70, 8, 129)]


class Case:
    """Inputs of one call. The teacher's hidden size is one more than the student's."""

    def __init__(self, N: int, D: int, V: int, *, dtype=torch.float64, ignored=0.4, bias=True, weighted=True, seed=0):
        generator = torch.Generator().manual_seed(seed)

        def normal(*shape: int, scale: float = 1.0) -> Tensor:
            return (torch.randn(shape, generator=generator, dtype=torch.float64) * scale).to(dtype)

        H = D + 1
        self.hidden_ND, self.weight_VD = normal(N, D), normal(V, D, scale=2 / D**0.5)
        self.bias_V = normal(V) if bias else None
        self.teacher_NH, self.teacher_VH = normal(N, H), normal(V, H, scale=2 / H**0.5)
        self.teacher_V = normal(V) if bias else None
        self.token_weights_N = (torch.rand(N, generator=generator) + 0.5) if weighted else None
        self.labels_N = torch.randint(V, (N,), generator=generator)
        self.labels_N[torch.rand(N, generator=generator) < ignored] = IGNORE_INDEX

    def to(self, like: torch.dtype | torch.device) -> "Case":
        """The same numbers in another dtype, or on another device; labels and weights keep their dtype."""
        other = object.__new__(Case)
        kept = ("labels_N", "token_weights_N") if isinstance(like, torch.dtype) else ()
        other.__dict__ = {
            name: value.to(like) if isinstance(value, Tensor) and name not in kept else value
            for name, value in self.__dict__.items()
        }
        return other

    @property
    def num_valid(self) -> int:
        return int((self.labels_N != IGNORE_INDEX).sum())

    def leaves(self, *, trained: bool = True) -> list[Tensor]:
        head = [self.weight_VD] if self.bias_V is None else [self.weight_VD, self.bias_V]
        return [
            self.hidden_ND.detach().requires_grad_(),
            *(tensor.detach().requires_grad_(trained) for tensor in head),
        ]

    def fused(
        self, hidden_ND: Tensor, weight_VD: Tensor, bias_V: Tensor | None = None, *, top_k: int | None = None,
        teacher_softcap: float | None = None, teacher_logit_scale: float = 1.0, **options: Any,
    ) -> Any:  # fmt: skip
        head = (self.teacher_NH, self.teacher_VH, self.teacher_V, teacher_softcap, teacher_logit_scale)
        teacher: Any = TeacherHead(*head)
        if top_k is not None:
            u_MV = final_logits(*head)[self.labels_N != IGNORE_INDEX] / options.get("temperature", 1.0)
            teacher = TopK(*u_MV.log_softmax(1).topk(top_k))
        return linear_kl(
            hidden_ND, weight_VD, self.labels_N, teacher, bias_V=bias_V, token_weights_N=self.token_weights_N, **options
        )

    def dense(
        self, hidden_ND: Tensor, weight_VD: Tensor, bias_V: Tensor | None = None, *, top_k: int | None = None,
        beta: float = 0.0, temperature: float = 1.0, alpha: float = 0.0, softcap: float | None = None,
        logit_scale: float = 1.0, teacher_softcap: float | None = None, teacher_logit_scale: float = 1.0,
    ) -> Tensor:  # fmt: skip
        """Loss per row, by the definition, from all logits at once; softmax in fp32 at least."""
        z_NV = final_logits(hidden_ND, weight_VD, bias_V, softcap, logit_scale)
        u_NV = final_logits(self.teacher_NH, self.teacher_VH, self.teacher_V, teacher_softcap, teacher_logit_scale)
        log_p, log_q = ((logits / temperature).log_softmax(1) for logits in (z_NV, u_NV))
        if top_k is not None:  # the other classes as one
            ids_NK = log_q.topk(top_k).indices
            rest_NV = torch.ones_like(log_q, dtype=torch.bool).scatter(1, ids_NK, value=False)
            log_p, log_q = (
                torch.cat((x.gather(1, ids_NK), x.masked_fill(~rest_NV, -torch.inf).logsumexp(1, keepdim=True)), 1)
                for x in (log_p, log_q)
            )
        if beta == 0:
            divergence_N = (log_q.exp() * (log_q - log_p)).sum(1)
        elif beta == 1:
            divergence_N = (log_p.exp() * (log_p - log_q)).sum(1)
        else:
            log_m = torch.logaddexp(log_q + math.log(beta), log_p + math.log(1 - beta))
            to_p, to_q = ((x.exp() * (x - log_m)).sum(1) for x in (log_p, log_q))
            divergence_N = beta * to_q + (1 - beta) * to_p
        valid_N = self.labels_N != IGNORE_INDEX
        loss_N = (1 - alpha) * divergence_N * valid_N + alpha * F.cross_entropy(z_NV, self.labels_N, reduction="none")
        return loss_N if self.token_weights_N is None else loss_N * self.token_weights_N

    def differentiate(self, how: str, *, trained: bool = True, **options: Any) -> list[Tensor]:
        """[loss, gradient of each leaf], with an upstream gradient that is not 1."""
        leaves = self.leaves(trained=trained)
        if how == "fused":
            loss = self.fused(*leaves, chunk_rows=16, **options).loss
        else:
            loss = self.dense(*leaves, **options).sum()
        (loss * 0.37).backward()
        return [loss.detach(), *(leaf.grad for leaf in leaves if leaf.requires_grad)]


def final_logits(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, softcap: float | None, logit_scale: float
) -> Tensor:
    logits = F.linear(hidden, weight, bias)
    logits = (logits if logits.dtype == torch.float64 else logits.float()) * logit_scale
    return logits if softcap is None else softcap * torch.tanh(logits / softcap)


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


# ---- values and gradients


@pytest.mark.parametrize(("beta", "top_k", "options"), covering(BETAS, [None, 2, 5], EACH_OPTION), ids=str)
def test_gradcheck(beta: float, top_k: int | None, options: dict[str, float]) -> None:
    case = Case(7, 3, 5, seed=1)
    assert 0 < case.num_valid < 7
    for trained in (True, False):
        assert gradcheck(
            lambda *x: case.fused(*x, beta=beta, top_k=top_k, chunk_rows=3, **options).loss,
            case.leaves(trained=trained),
        )


@pytest.mark.parametrize(("shape", "beta", "options"), covering(ODD_SHAPES, BETAS, [{}, EVERYTHING]), ids=str)
def test_fp64_equals_torch(shape: tuple[int, int, int], beta: float, options: dict[str, float]) -> None:
    case = Case(*shape)
    for top_k in (None, min(4, shape[2])):
        if top_k == shape[2]:
            continue
        ours = case.differentiate("fused", beta=beta, top_k=top_k, **options)
        theirs = case.differentiate("dense", beta=beta, top_k=top_k, **options)
        for actual, expected in zip(ours, theirs, strict=True):
            torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-10)


def check_precision(shape: tuple[int, int, int], num_seeds: int, dtype: torch.dtype, **options: Any) -> None:
    """At most twice as far from fp64 as torch's own; the error of a few numbers is luck, so over several seeds."""
    results = []
    numbers = {name: value for name, value in options.items() if name != "backend"}
    for seed in range(num_seeds):
        case = Case(*shape, dtype=dtype, seed=seed).to(DEVICE)
        results.append(
            (
                case.differentiate("fused", **options),
                case.differentiate("dense", **numbers),
                case.to(torch.float64).differentiate("dense", **numbers),
            )
        )
    for gathered in zip(*(zip(*result, strict=True) for result in results), strict=True):
        ours, torchs, exact = (torch.stack(values) for values in zip(*gathered, strict=True))
        assert ours.dtype == torchs.dtype
        assert error(ours, exact) <= 2 * error(torchs, exact) + 1e-6


@pytest.mark.parametrize(
    ("dtype", "beta", "options"),
    covering([torch.float32, torch.bfloat16, torch.float16], BETAS, [{}, {"alpha": 0.5}, EVERYTHING]),
    ids=str,
)
def test_precision_in_plain_torch(dtype: torch.dtype, beta: float, options: dict[str, float]) -> None:
    for shape, num_seeds in (
        ((0, 5, 7), 1),
        ((20, 5, 1), 8),
        ((20, 5, 7), 8),
        ((20, 16, 1023), 4),
        ((37, 4, 32003), 2),
    ):
        check_precision(shape, num_seeds, dtype, backend="torch", beta=beta, **options)


@pytest.mark.parametrize(
    ("dtype", "beta", "options"), covering(DTYPES, BETAS, [{}, {"alpha": 0.5}, EVERYTHING], strength=1), ids=str
)
def test_precision_of_the_kernel(dtype: torch.dtype, beta: float, options: dict[str, float]) -> None:
    # The last shape has several blocks a row, too slow an interpretation for as many rows as half precision needs.
    shapes = [((0, 5, 7), 1), ((6, 5, 1), 5), ((8, 5, 7), 8), ((6, 16, 1023), 3), ((2, 4, 5003), 1)]
    for shape, num_seeds in shapes if dtype == torch.float32 else shapes[:-1]:
        check_precision(shape, num_seeds, dtype, backend="triton", beta=beta, **options)


@settings(deadline=None, derandomize=True, max_examples=60)
@given(
    N=st.integers(0, 40),
    D=st.integers(1, 20),
    V=st.integers(1, 50),
    chunk_rows=st.integers(1, 50),
    ignored=st.sampled_from([0.0, 0.3, 0.9, 1.0]),
    bias=st.booleans(),
    weighted=st.booleans(),
    trained=st.booleans(),
    beta=st.sampled_from(BETAS),
    options=st.sampled_from(EACH_OPTION),
)
def test_any_shape_equals_torch_in_fp64(N, D, V, chunk_rows, ignored, bias, weighted, trained, beta, options) -> None:
    case = Case(N, D, V, ignored=ignored, bias=bias, weighted=weighted)
    leaves = case.leaves(trained=trained)
    output = case.fused(*leaves, chunk_rows=chunk_rows, num_valid=case.num_valid, beta=beta, **options)
    (output.loss * 0.37).backward()
    ours = [output.loss.detach(), *(leaf.grad for leaf in leaves if leaf.requires_grad)]
    theirs = case.differentiate("dense", trained=trained, beta=beta, **options)
    assert output.num_tokens == case.num_valid
    for actual, expected in zip(ours, theirs, strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_a_student_that_equals_its_teacher_has_no_divergence_and_no_gradient(backend: str) -> None:
    case = Case(12, 6, 300, dtype=torch.float32, ignored=0.0)
    case.teacher_NH, case.teacher_VH, case.teacher_V = case.hidden_ND, case.weight_VD, case.bias_V
    for beta in BETAS:
        loss, *grads = (x.abs().max().item() for x in case.differentiate("fused", beta=beta, backend=backend))
        assert loss < 1e-5
        assert max(grads) < 1e-5


def test_alpha_1_is_cross_entropy_and_stats_are_those_of_the_labels() -> None:
    case = Case(40, 6, 9)
    leaves = case.leaves()
    ours = case.fused(*leaves, chunk_rows=16, alpha=1.0, stats=True, temperature=3.0)
    theirs = linear_cross_entropy(
        *leaves[:2], case.labels_N, bias_V=leaves[2], token_weights_N=case.token_weights_N, stats=True
    )
    torch.testing.assert_close(ours.loss, theirs.loss)
    for actual, expected in zip(*(torch.autograd.grad(x.loss, leaves) for x in (ours, theirs)), strict=True):
        torch.testing.assert_close(actual, expected)
    assert ours.correct_N.equal(theirs.correct_N)
    nll_N = linear_cross_entropy(*leaves[:2], case.labels_N, bias_V=leaves[2], reduction="none").loss
    torch.testing.assert_close(ours.nll_N, nll_N.detach())
    unweighted = Case(40, 6, 9, weighted=False)
    out = unweighted.fused(*unweighted.leaves(), beta=0.3)
    torch.testing.assert_close(out.divergence_N, unweighted.dense(*unweighted.leaves(), beta=0.3).detach())
    assert out.divergence_N[unweighted.labels_N == IGNORE_INDEX].eq(0).all()
    assert out[3:] == (None, None)
    assert not out.divergence_N.requires_grad


@pytest.mark.filterwarnings("ignore:invalid value encountered")  # by numpy, as it interprets inf - inf
@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("beta", BETAS)
def test_classes_that_both_bar_add_nothing_and_those_that_one_bars_what_they_are_worth(
    backend: str, beta: float
) -> None:
    case = Case(20, 4, 7, dtype=torch.float32, weighted=False)
    case.labels_N[case.labels_N == 3] = 2
    case.bias_V[3] = case.teacher_V[3] = -torch.inf
    ours = case.differentiate("fused", beta=beta, backend=backend)
    kept = torch.arange(7) != 3
    fewer = Case(20, 4, 7, dtype=torch.float32, weighted=False)
    fewer.labels_N = torch.where(case.labels_N > 3, case.labels_N - 1, case.labels_N)
    for name in ("weight_VD", "bias_V", "teacher_VH", "teacher_V"):
        setattr(fewer, name, getattr(case, name)[kept])
    theirs = fewer.differentiate("dense", beta=beta)
    for actual, expected in zip(ours[:2], theirs[:2], strict=True):
        assert error(actual, expected) <= 1e-5
    case.bias_V = torch.zeros(7)  # a class that only the teacher bars: fine for the forward KL and the JSD
    loss = case.differentiate("fused", beta=beta, backend=backend)[0]
    assert loss.isfinite() == (beta < 1)
    case.bias_V, case.teacher_V = case.teacher_V, case.bias_V
    loss = case.differentiate("fused", beta=beta, backend=backend)[0]
    assert loss.isfinite() == (beta > 0)


@pytest.mark.parametrize("beta", BETAS)
def test_fewer_stored_classes_give_a_smaller_divergence(beta: float) -> None:
    case = Case(30, 6, 50, ignored=0.0, weighted=False)
    divergences = [case.fused(*case.leaves(), beta=beta, top_k=k).divergence_N for k in (1, 5, 20, 50)]
    divergences.append(case.fused(*case.leaves(), beta=beta).divergence_N)
    for fewer, more in itertools.pairwise(divergences):
        assert (fewer <= more + 1e-6).all()
    torch.testing.assert_close(divergences[-2], divergences[-1])
    assert (divergences[0] > 0).all()


@pytest.mark.parametrize("top_k", [None, 3])
@pytest.mark.parametrize("N", [0, 9])
def test_nothing_to_train_on_is_zero_and_connected(N: int, top_k: int | None) -> None:
    case = Case(N, 4, 7, dtype=torch.float32, ignored=1.0)
    leaves = case.leaves()
    output = case.fused(*leaves, top_k=top_k, stats=True, **EVERYTHING)
    assert output.num_tokens == 0
    assert not output.loss.any()
    assert all(not stat.any() and stat.shape == (N,) for stat in output[2:])
    output.loss.backward()
    assert all(leaf.grad is not None and not leaf.grad.any() for leaf in leaves)


def test_ignored_rows_may_hold_anything() -> None:
    case = Case(20, 4, 7)
    clean = case.differentiate("fused", **EVERYTHING)
    ignored_N = case.labels_N == IGNORE_INDEX
    for tensor in (case.hidden_ND, case.teacher_NH, case.token_weights_N):
        tensor[ignored_N] = torch.nan
    for actual, expected in zip(case.differentiate("fused", **EVERYTHING), clean, strict=True):
        torch.testing.assert_close(actual, expected)


def test_backward_twice_gives_the_same_and_twice_differentiable_is_refused() -> None:
    case = Case(20, 4, 7)
    leaves = case.leaves()
    loss = case.fused(*leaves).loss
    first, second = (torch.autograd.grad(loss, leaves, retain_graph=True) for _ in range(2))
    assert all(map(torch.equal, first, second))
    with pytest.raises(RuntimeError, match="differentiable once; create_graph=True asks"):
        torch.autograd.grad(loss, leaves[:1], create_graph=True)


@pytest.mark.parametrize("hidden_dtype", [torch.float32, torch.bfloat16], ids=str)
def test_autocast_casts_both_heads_once(hidden_dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sftx_kernels.gemm.cpu_multiplies", lambda dtype: True)
    case = Case(40, 8, 101, dtype=torch.bfloat16)
    cast = case.differentiate("fused", beta=0.5, **EVERYTHING)
    wide = case.to(torch.float32)
    wide.hidden_ND = wide.hidden_ND.to(hidden_dtype)
    with torch.autocast("cpu", torch.bfloat16), Recorder() as recorder:
        ours = wide.differentiate("fused", beta=0.5, **EVERYTHING)
    assert recorder.dtypes == {torch.bfloat16}
    assert recorder.casts.count((101, 8)) == recorder.casts.count((101, 9)) == 1
    assert [grad.dtype for grad in ours] == [torch.float32, hidden_dtype, torch.float32, torch.float32]
    assert ours[0].equal(cast[0])


@pytest.mark.parametrize("top_k", [None, 4])
def test_torch_compile_traces_it_whole(top_k: int | None) -> None:
    case = Case(40, 6, 9, dtype=torch.float32)
    num_valid = case.num_valid
    teacher: Any = TeacherHead(case.teacher_NH, case.teacher_VH, case.teacher_V)
    if top_k is not None:
        teacher = TopK(torch.full((num_valid, top_k), -2.0), torch.arange(top_k).repeat(num_valid, 1))

    def loss(*leaves: Tensor) -> Tensor:
        return linear_kl(*leaves[:2], case.labels_N, teacher, bias_V=leaves[2], num_valid=num_valid, beta=0.5).loss

    eager, compiled = case.leaves(), case.leaves()
    loss(*eager).backward()
    torch.compile(loss, fullgraph=True, backend="aot_eager")(*compiled).backward()
    for ours, theirs in zip(compiled, eager, strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad)


# ---- what it costs


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("top_k", [None, 3])
def test_no_tensor_is_larger_than_one_chunk_of_logits(dtype: torch.dtype, top_k: int | None) -> None:
    case = Case(64, 5, 999, dtype=dtype, ignored=0.3)
    leaves = case.leaves()
    M = case.num_valid
    with Recorder() as recorder:
        if top_k is None:
            case.fused(*leaves, chunk_rows=16, beta=0.3, stats=True, **EVERYTHING).loss.backward()
        else:
            teacher = TopK(torch.full((M, top_k), -2.0), torch.arange(top_k).expand(M, top_k))
            linear_kl(*leaves[:2], case.labels_N, teacher, bias_V=leaves[2], chunk_rows=16).loss.backward()
    assert max(torch.Size(shape).numel() for shape in recorder.made) == 16 * 999


def test_peak_is_two_chunks_of_logits_and_the_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.modules["sftx_kernels.cross_entropy"], "_SLICE_ELEMENTS_CPU", 40_000)  # one of 8 rows
    case = Case(64, 8, 20_000, dtype=torch.float32, ignored=0.0, bias=False, weighted=False)
    leaves = case.leaves(trained=False)
    chunk_bytes, grad_bytes = 8 * 20_000 * 4, 64 * 8 * 4
    case.fused(*leaves, chunk_rows=8).loss.backward()
    for beta, num_slices in ((0.0, 3), (1.0, 4), (0.5, 5)):
        peak = peak_bytes(lambda beta=beta: case.fused(*leaves, chunk_rows=8, beta=beta).loss.backward())
        assert 2 * chunk_bytes <= peak <= 2.04 * chunk_bytes + num_slices * chunk_bytes / 8 + 3 * grad_bytes


def test_ignored_rows_reach_no_product_and_the_frozen_head_none_of_its_own() -> None:
    case = Case(64, 5, 11, ignored=0.5)
    assert 20 < case.num_valid < 44
    for trained in (True, False):
        with Recorder() as recorder:
            case.differentiate("fused", trained=trained)
        student, teacher, back = (
            sum(left[0] for left, right in recorder.products if right == shape) for shape in ((5, 11), (6, 11), (11, 5))
        )
        weight = sum(right[0] for left, right in recorder.products if left[0] == 11)
        assert (student, teacher, back, weight) == (*(case.num_valid,) * 3, case.num_valid * trained)
    with torch.no_grad(), Recorder() as recorder:
        case.fused(*case.leaves(), chunk_rows=64)
    assert len(recorder.products) == 2


def test_a_workspace_holds_the_logits_of_both() -> None:
    case = Case(600, 3, 5, dtype=torch.float32, ignored=0.0)

    def chunks(**options: Any) -> list[int]:
        with Recorder() as recorder:
            case.fused(*case.leaves(trained=False), **options)
        return [left[0] for left, right in recorder.products if right == (3, 5)]

    assert chunks(workspace_bytes=200 * 40 + 39) == [200, 200, 200]
    assert chunks(workspace_bytes=40, chunk_rows=500) == [500, 100]
    assert chunks() == [256, 256, 88]


def test_off_the_cpu_nothing_waits_for_the_device() -> None:
    """Meta tensors have no values: anything that asks for one raises."""
    hidden_ND = torch.empty(6000, 3, device="meta", requires_grad=True)
    weight_VD, labels_N = torch.empty(5, 3, device="meta"), torch.empty(6000, dtype=torch.int64, device="meta")
    teacher = TeacherHead(torch.empty(6000, 4, device="meta"), torch.empty(5, 4, device="meta"))
    output = linear_kl(hidden_ND, weight_VD, labels_N, teacher, num_valid=4500, stats=True, alpha=0.5, beta=0.5)
    output.loss.backward()
    assert hidden_ND.grad.shape == (6000, 3)
    assert output.num_tokens == 4500


# ---- what is refused


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"weight_VD": torch.zeros(0, 4)}, r"weight_VD: expected at least one row, got shape \[0, 4\]"),
        ({"bias_V": torch.zeros(4)}, r"bias_V: expected shape \[5\], got shape \[4\]"),
        (
            {"teacher": TeacherHead(torch.zeros(5, 3), torch.zeros(5, 3))},
            r"teacher.hidden_NH: expected shape \[6, H\], got shape \[5, 3\]",
        ),
        (
            {"teacher": TeacherHead(torch.zeros(6, 3), torch.zeros(7, 3))},
            r"teacher.weight_VH: expected shape \[5, 3\], got shape \[7, 3\]",
        ),
        (
            {"teacher": TeacherHead(torch.zeros(6, 3).double(), torch.zeros(5, 3))},
            r"teacher.hidden_NH: expected dtype torch.float32, got dtype torch.float64",
        ),
        (
            {"teacher": TeacherHead(torch.zeros(6, 3), torch.zeros(5, 3), torch.zeros(3))},
            r"teacher.bias_V: expected shape \[5\], got shape \[3\]",
        ),
        (
            {"teacher": TeacherHead(torch.zeros(6, 3), torch.zeros(5, 3), softcap=0.0)},
            r"teacher.softcap: expected None or a number > 0, got 0.0",
        ),
        (
            {"teacher": TopK(torch.zeros(6, 2), torch.zeros(6, 3).long())},
            r"teacher.ids_MK: expected shape \[6, 2\], got shape \[6, 3\]",
        ),
        (
            {"teacher": TopK(torch.zeros(5, 2), torch.zeros(5, 2).long())},
            r"teacher.log_probs_MK: expected shape \[6, K\], got shape \[5, 2\]",
        ),
        (
            {"teacher": TopK(torch.zeros(6, 2), torch.full((6, 2), 5))},
            r"teacher.ids_MK: expected classes in \[0, 5\), got 5",
        ),
        (
            {"teacher": TopK(torch.zeros(6, 6), torch.zeros(6, 6).long())},
            r"teacher.log_probs_MK: expected 1 to 5 columns, got 6 columns",
        ),
        (
            {"teacher": TopK(torch.zeros(6, 2), torch.zeros(6, 2).long()), "backend": "triton"},
            r"backend: expected 'torch' for stored log-probabilities",
        ),
        ({"teacher": torch.zeros(6, 3)}, r"teacher: expected a TeacherHead or a TopK, got Tensor"),
        ({"beta": 1.5}, r"beta: expected a number in \[0, 1\], got 1.5"),
        ({"alpha": -0.1}, r"alpha: expected a number in \[0, 1\], got -0.1"),
        ({"temperature": 0}, r"temperature: expected a number > 0, got 0"),
        ({"softcap": 0.0}, r"softcap: expected None or a number > 0, got 0.0"),
        ({"num_valid": 5}, r"num_valid: expected 6, the number of labels other than -100, got 5"),
        ({"workspace_bytes": 39}, r"workspace_bytes: expected at least 40, one row of logits of each model, got 39"),
    ],
)
def test_refuses(change: dict[str, Any], message: str) -> None:
    good = {
        "hidden_ND": torch.zeros(6, 4),
        "weight_VD": torch.zeros(5, 4),
        "labels_N": torch.zeros(6).long(),
        "teacher": TeacherHead(torch.zeros(6, 3), torch.zeros(5, 3)),
    }
    linear_kl(**good)
    with pytest.raises(ValueError, match=f"^{message}"):
        linear_kl(**{**good, **change})
