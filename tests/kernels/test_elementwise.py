"""rms_norm, swiglu and rotary against transformers' modules, and in both implementations against fp64.

Shape suffixes: B rows, T tokens, H heads, D hidden or a head's dimensions.
"""

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
import torch._dynamo.testing
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import gradcheck
from transformers.models.gemma.modeling_gemma import GemmaRMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm, apply_rotary_pos_emb
from transformers.models.mistral.modeling_mistral import MistralRMSNorm
from transformers.models.qwen2.modeling_qwen2 import Qwen2RMSNorm
from transformers.models.qwen3.modeling_qwen3 import Qwen3RMSNorm

from devices import BACKENDS, DEVICE, error
from devices import DTYPES as KERNEL_DTYPES
from sftx_kernels import rms_norm, rotary, swiglu

EPS = 1e-5
GEMMA = {"weight_offset": 1.0, "cast_before_weight": False}
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
IMPLEMENTATIONS = [
    pytest.param(backend, dtype, id=f"{backend}-{str(dtype)[6:]}")
    for backend in BACKENDS
    for dtype in DTYPES
    if backend == "torch" or dtype in KERNEL_DTYPES
]
Operation = Callable[..., Any]


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32, std: float = 1.0) -> Tensor:
    """Values that every dtype of the tests holds, so that what is compared is the arithmetic."""
    values = torch.randn(shape, generator=torch.Generator().manual_seed(seed + sum(shape)))
    return (values * std).bfloat16().to(DEVICE, dtype)


def angles(B: int, T: int, R: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    angle_BTr = torch.rand(B, T, R // 2, generator=torch.Generator().manual_seed(R)) * 6
    angle_BTR = torch.cat((angle_BTr, angle_BTr), -1).to(DEVICE)
    return angle_BTR.cos().bfloat16().to(dtype), angle_BTR.sin().bfloat16().to(dtype)


def differentiate(operation: Operation, leaves: Sequence[Tensor], upstreams: Sequence[Tensor]) -> list[Tensor]:
    """Return the outputs of an operation of `leaves`, then the leaves' gradients."""
    leaves = [leaf.detach().requires_grad_() for leaf in leaves]
    outputs = operation(*leaves)
    outputs = [outputs] if isinstance(outputs, Tensor) else list(outputs)
    upstreams = [up.to(y.dtype) for up, y in zip(upstreams, outputs, strict=True)]
    gradients = torch.autograd.grad(outputs, leaves, upstreams)
    return [*(y.detach() for y in outputs), *gradients]


def assert_as_good(ours: Operation, theirs: Operation, leaves: Sequence[Tensor], upstreams: Sequence[Tensor]) -> None:
    """Outputs and gradients have the dtypes of `theirs`, and at most twice its distance from itself in fp64."""
    wide = [[t.double() for t in tensors] for tensors in (leaves, upstreams)]
    values = (
        differentiate(ours, leaves, upstreams), differentiate(theirs, leaves, upstreams), differentiate(theirs, *wide)
    )  # fmt: skip
    for index, (actual, eager, exact) in enumerate(zip(*values, strict=True)):
        assert actual.dtype == eager.dtype, index
        assert error(actual, exact) <= 2 * error(eager, exact) + 1e-6, index


# ---- rms_norm


def formula_of_norm(x: Tensor, weight: Tensor, residual: Tensor | None = None, **options: Any) -> Any:
    """The modules of transformers, without their cast to fp32 in fp64."""
    total = x if residual is None else x + residual
    wide = total if total.dtype == torch.float64 else total.float()
    hat = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + EPS)
    if options.get("cast_before_weight", True):
        y = weight * hat.to(total.dtype)
    else:
        y = (hat * (weight.to(wide.dtype) + options["weight_offset"])).to(total.dtype)
    return y if residual is None else (y, total)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("module", [LlamaRMSNorm, MistralRMSNorm, Qwen2RMSNorm, Qwen3RMSNorm, GemmaRMSNorm])
def test_norms_of_transformers(module: type[nn.Module], dtype: torch.dtype) -> None:
    """All but some elements in a million are equal: the fp32 sum of squares is in another order."""
    norm = module(96, eps=EPS).to(DEVICE, dtype)
    options = GEMMA if module is GemmaRMSNorm else {}
    norm.weight.data.copy_(normal(96))
    x = normal(2, 300, 96, dtype=dtype, std=3.0)
    y, expected = rms_norm(x, norm.weight, EPS, **options), norm(x)
    assert y.dtype == expected.dtype == dtype
    if dtype != torch.float32:
        assert (y != expected).float().mean() < 1e-3
    torch.testing.assert_close(y, expected, rtol=torch.finfo(dtype).eps * 2, atol=1e-6)


@pytest.mark.parametrize(("backend", "dtype"), IMPLEMENTATIONS)
@pytest.mark.parametrize("options", [{}, GEMMA], ids=["llama", "gemma"])
@pytest.mark.parametrize("has_residual", [False, True], ids=["", "residual"])
def test_norm(backend: str, dtype: torch.dtype, options: dict[str, Any], has_residual: bool) -> None:
    for shape in [(3, 5, 7), (2, 64), (1, 1), (37, 130)]:
        x, residual = normal(*shape, dtype=dtype), normal(*shape, dtype=dtype, seed=1)
        weight = normal(shape[-1], dtype=dtype, seed=2)
        upstreams = [normal(*shape, seed=seed) for seed in (3, 4)]
        leaves = [x, weight, residual] if has_residual else [x, weight]

        def ours(x: Tensor, weight: Tensor, residual: Tensor | None = None) -> Any:
            return rms_norm(x, weight, EPS, residual=residual, backend=backend, **options)

        def theirs(x: Tensor, weight: Tensor, residual: Tensor | None = None) -> Any:
            return formula_of_norm(x, weight, residual, **options)

        assert_as_good(ours, theirs, leaves, upstreams[: 1 + has_residual])


@pytest.mark.parametrize("backend", BACKENDS)
def test_norm_of_mixed_dtypes(backend: str) -> None:
    """As under autocast: fp32 rows, a half-precision branch, an fp32 or a half-precision weight."""
    for x_dtype, residual_dtype, weight_dtype in [
        (torch.float16, torch.float32, torch.float32),
        (torch.float16, torch.float16, torch.float32),
        (torch.float32, torch.float16, torch.float16),
    ]:
        leaves = [
            normal(9, 40, dtype=x_dtype), normal(40, dtype=weight_dtype), normal(9, 40, dtype=residual_dtype, seed=1)
        ]  # fmt: skip
        assert_as_good(
            lambda x, weight, residual: rms_norm(x, weight, EPS, residual=residual, backend=backend),
            formula_of_norm, leaves, [normal(9, 40, seed=3), normal(9, 40, seed=4)],
        )  # fmt: skip
    x, weight = normal(9, 40), normal(40)
    _, total = rms_norm(x, weight, EPS, residual=normal(9, 40, dtype=torch.float64, seed=1))
    assert total.dtype == torch.float64  # for which there is no kernel
    y = rms_norm(x, weight, EPS, dtype=torch.float16, backend=backend)
    assert y.dtype == torch.float16
    torch.testing.assert_close(y, rms_norm(x, weight, EPS, backend=backend).half())


def test_norm_keeps_its_rows_and_a_number_for_each_and_nothing_for_a_frozen_weight() -> None:
    x, residual = (normal(8, 32, seed=seed).requires_grad_() for seed in (0, 1))
    weight = normal(32)
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        y, total = rms_norm(x, weight, EPS, residual=residual)
    assert sorted(t.numel() for t in kept) == [8, 32, 8 * 32]
    assert any(t.data_ptr() == total.data_ptr() for t in kept)
    gradients = torch.autograd.grad([y, total], [x, residual], [torch.ones_like(y)] * 2)
    torch.testing.assert_close(*gradients)
    assert torch.equal(
        torch.autograd.grad(rms_norm(x, weight, EPS, residual=residual)[1].sum(), x)[0], torch.ones(8, 32)
    )


# ---- swiglu


def formula_of_swiglu(gate: Tensor, up: Tensor, activation: str = "silu") -> Tensor:
    return (F.silu(gate) if activation == "silu" else F.gelu(gate, approximate="tanh")) * up


@pytest.mark.parametrize(("backend", "dtype"), IMPLEMENTATIONS)
@pytest.mark.parametrize("activation", ["silu", "gelu_tanh"])
@pytest.mark.filterwarnings("ignore:overflow encountered in exp")  # of Triton's interpreter: 1 / (1 + inf) is 0
def test_swiglu(backend: str, dtype: torch.dtype, activation: Any) -> None:
    for shape in [(3, 5, 7), (37, 130), (1, 1), (1030,)]:
        gate, up = normal(*shape, dtype=dtype, std=4.0), normal(*shape, dtype=dtype, seed=1)
        assert_as_good(
            lambda gate, up: swiglu(gate, up, activation=activation, backend=backend),
            lambda gate, up: formula_of_swiglu(gate, up, activation), [gate, up], [normal(*shape, seed=2)],
        )  # fmt: skip


@pytest.mark.parametrize("activation", ["silu", "gelu_tanh"])
def test_swiglu_of_plain_torch_has_the_bits_of_eager_torch(activation: Any) -> None:
    leaves, upstreams = [normal(300, 50, dtype=torch.bfloat16, seed=seed) for seed in (0, 1)], [normal(300, 50, seed=2)]
    ours = differentiate(lambda g, u: swiglu(g, u, activation=activation, backend="torch"), leaves, upstreams)
    assert all(
        map(torch.equal, ours, differentiate(lambda g, u: formula_of_swiglu(g, u, activation), leaves, upstreams))
    )


@pytest.mark.parametrize("backend", BACKENDS)
def test_swiglu_of_halves_of_one_product(backend: str) -> None:
    both = normal(2, 9, 48).requires_grad_()
    gate, up = both.chunk(2, -1)
    (gradient,) = torch.autograd.grad(swiglu(gate, up, backend=backend).square().sum(), both)
    gate, up = both.chunk(2, -1)
    (expected,) = torch.autograd.grad(formula_of_swiglu(gate, up).square().sum(), both)
    torch.testing.assert_close(gradient, expected)


# ---- rotary


def formula_of_rotary(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    R = cos.shape[-1]
    rotated = apply_rotary_pos_emb(q[..., :R], k[..., :R], cos.to(q.dtype), sin.to(q.dtype))
    return torch.cat((rotated[0], q[..., R:]), -1), torch.cat((rotated[1], k[..., R:]), -1)


@pytest.mark.parametrize(("backend", "dtype"), IMPLEMENTATIONS)
@pytest.mark.parametrize("is_transposed", [False, True], ids=["", "transposed"])
def test_rotary(backend: str, dtype: torch.dtype, is_transposed: bool) -> None:
    for B, H, H2, T, D, R in [(2, 3, 1, 5, 8, 8), (1, 4, 4, 6, 64, 64), (2, 5, 2, 3, 24, 10), (1, 1, 1, 1, 2, 2)]:
        heads = [(B, T, n, D) if is_transposed else (B, n, T, D) for n in (H, H2)]
        q, k, *upstreams = (normal(*heads[seed % 2], dtype=dtype, seed=seed) for seed in range(4))
        for rows in {1, B}:
            cos, sin = angles(rows, T, R)

            def ours(q: Tensor, k: Tensor, cos: Tensor = cos, sin: Tensor = sin) -> Any:
                pair = (q.transpose(1, 2), k.transpose(1, 2)) if is_transposed else (q, k)
                out = rotary(*pair, cos, sin, backend=backend)
                return [y.transpose(1, 2) for y in out] if is_transposed else out

            def theirs(q: Tensor, k: Tensor, cos: Tensor = cos, sin: Tensor = sin) -> Any:
                pair = (q.transpose(1, 2), k.transpose(1, 2)) if is_transposed else (q, k)
                out = formula_of_rotary(*pair, cos, sin)
                return [y.transpose(1, 2) for y in out] if is_transposed else out

            assert_as_good(ours, theirs, [q, k], upstreams)


def test_rotary_keeps_only_cos_and_sin_and_returns_the_dtype_and_layout_of_q() -> None:
    cos, sin = angles(1, 6, 8)
    q, k = (normal(2, 6, heads, 8, dtype=torch.bfloat16).transpose(1, 2).requires_grad_() for heads in (4, 2))
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        rotated = rotary(q, k, cos, sin)
    assert {t.data_ptr() for t in kept} == {cos.data_ptr(), sin.data_ptr()}
    for x, y in zip((q, k), rotated, strict=True):
        assert (y.dtype, y.stride()) == (torch.bfloat16, x.stride())
    assert apply_rotary_pos_emb(q, k, cos, sin)[0].dtype == torch.float32


# ---- all three

COS_AND_SIN = angles(1, 3, 4)
CALLS: dict[str, tuple[Operation, list[Tensor]]] = {
    "rms_norm": (
        lambda x, r, w: rms_norm(x, w, EPS, residual=r),
        [normal(2, 3, 8), normal(2, 3, 8, seed=1), normal(8)],
    ),
    "swiglu": (swiglu, [normal(2, 3, 8), normal(2, 3, 8, seed=1)]),
    "rotary": (lambda q, k: rotary(q, k, *COS_AND_SIN), [normal(2, 4, 3, 8), normal(2, 2, 3, 8, seed=1)]),
}


@pytest.mark.parametrize("name", CALLS)
def test_gradcheck(name: str) -> None:
    operation, leaves = CALLS[name]
    assert gradcheck(operation, [leaf.cpu().double().requires_grad_() for leaf in leaves])


@pytest.mark.parametrize("name", CALLS)
def test_a_second_derivative_is_refused(name: str) -> None:
    operation, leaves = CALLS[name]
    leaves = [leaf.clone().requires_grad_() for leaf in leaves]
    outputs = operation(*leaves)
    first = outputs if isinstance(outputs, Tensor) else outputs[0]
    with pytest.raises(RuntimeError, match="differentiable once; create_graph=True asks"):
        torch.autograd.grad(first.sum(), leaves[0], create_graph=True)


@pytest.mark.parametrize("name", CALLS)
def test_chunks_change_nothing(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    operation, leaves = CALLS[name]
    outputs = operation(*leaves)
    outputs = [outputs] if isinstance(outputs, Tensor) else outputs
    upstreams = [normal(*y.shape, seed=9) for y in outputs]
    whole = differentiate(operation, leaves, upstreams)
    monkeypatch.setattr("sftx_kernels.chunks._CACHED_ELEMENTS", 48)
    for actual, expected in zip(differentiate(operation, leaves, upstreams), whole, strict=True):
        torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize("name", CALLS)
def test_autocast_changes_nothing(name: str) -> None:
    operation, leaves = CALLS[name]
    outputs = operation(*leaves)
    upstreams = [normal(*y.shape, seed=9) for y in ([outputs] if isinstance(outputs, Tensor) else outputs)]
    expected = differentiate(operation, leaves, upstreams)
    with torch.autocast(DEVICE.type, torch.bfloat16):
        actual = differentiate(operation, leaves, upstreams)
    assert all(map(torch.equal, actual, expected))


@pytest.mark.parametrize("name", CALLS)
def test_under_torch_compile(name: str) -> None:
    """One graph, the numbers of eager mode, and no gradient where none is wanted."""
    operation, leaves = CALLS[name]
    outputs = operation(*leaves)
    upstreams = [normal(*y.shape, seed=9) for y in ([outputs] if isinstance(outputs, Tensor) else outputs)]
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(operation, backend=counter, fullgraph=True)
    torch._dynamo.reset()
    for actual, expected in zip(
        differentiate(compiled, leaves, upstreams), differentiate(operation, leaves, upstreams), strict=True
    ):
        torch.testing.assert_close(actual, expected)
    assert counter.frame_count == 1


def test_custom_ops() -> None:
    x, r, w, dy = (normal(*shape, seed=i).requires_grad_() for i, shape in enumerate([(3, 8), (3, 8), (8,), (3, 8)]))
    q, k = normal(2, 4, 3, 8).requires_grad_(), normal(2, 2, 3, 8).requires_grad_()
    ops = torch.ops.sftx
    spec = (EPS, 0.0, True, torch.float32, None)
    for op, arguments in [
        (ops.rms_norm, (x, r, w, *spec)),
        (ops.rms_norm, (x, None, w.detach(), *spec)),
        (ops.rms_norm_backward, (*(t.detach() for t in (dy, dy, x, x[:, 0].contiguous(), w)), *spec, True)),
        (ops.swiglu, (x, r, "silu", None)),
        (ops.swiglu_backward, (*(t.detach() for t in (dy, x, r)), "gelu_tanh", None)),
        (ops.rotary, (q, k, *COS_AND_SIN, False, None)),
    ]:
        torch.library.opcheck(op, arguments)


X, COS = torch.ones(2, 3, 4), torch.ones(1, 3, 4)
Q = torch.ones(1, 2, 3, 4)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: rms_norm(X, torch.ones(5), EPS), r"^weight: expected shape \[4\], got shape \[5\]"),
        (lambda: rms_norm(X, torch.ones(4), 0.0), r"^eps: expected a number > 0, got 0.0"),
        (lambda: rms_norm(X, torch.ones(4), EPS, residual=X[0]), r"^residual: expected shape \[2, 3, 4\]"),
        (lambda: rms_norm(X, torch.ones(4), EPS, weight_offset=float("nan")), r"^weight_offset: expected a finite"),
        (lambda: rms_norm(X, torch.ones(4), EPS, dtype=torch.int8), r"^dtype: expected None or a floating dtype"),
        (lambda: rms_norm(X.long(), torch.ones(4), EPS), r"^x: expected a floating dtype"),
        (lambda: swiglu(X, X[0]), r"^up: expected shape \[2, 3, 4\]"),
        (lambda: swiglu(X, X.half()), r"^up: expected dtype torch.float32, as gate"),
        (lambda: swiglu(X, X, activation="relu"), r"^activation: expected one of silu, gelu_tanh, got 'relu'"),  # type: ignore[arg-type]
        (lambda: rotary(X, Q, COS, COS), r"^q: expected shape \[B, H, T, D\]"),
        (lambda: rotary(Q, Q[:, :, :2], COS, COS), r"^k: expected shape \[1, H', 3, 4\]"),
        (lambda: rotary(Q, Q.half(), COS, COS), r"^k: expected dtype torch.float32, as q"),
        (
            lambda: rotary(Q, Q, COS[..., :3], COS[..., :3]),
            r"^cos: expected shape \[1 or 1, 3, R\], R even",
        ),
        (lambda: rotary(Q, Q, COS, COS[:, :, :2]), r"^sin: expected shape \[1, 3, 4\]"),
    ],
)
def test_wrong_arguments(call: Operation, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()
