"""grouped_lora_linear against its formula, group by group, in both of its implementations.

Torch's grouped products run on CPUs too, so that the implementation for GPUs is tested here.

Shape suffixes: M rows, E groups, K in, O out, R rank.
"""

import contextlib
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.autograd import gradcheck
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from devices import DEVICE, covering
from sftx_kernels import Int8Weight, dequantize, grouped_lora, quantize_int8, quantize_nf4, quantize_stack
from sftx_kernels.grouped_lora import grouped_lora_linear

SCALING = 0.75
UNEVEN = (3, 0, 5, 1)
"""Rows of each group; one has none, one has a single row."""


def make(
    rows: Sequence[int] = UNEVEN, K: int = 8, out: int = 16, R: int = 2, *, dtype=torch.float64, transposed=False
) -> dict[str, Any]:
    """Return x, offsets, frozen base, and A and B that require a gradient."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int, scale: float = 1.0, trained: bool = False) -> Tensor:
        values = torch.randn(shape, generator=generator, dtype=torch.float64) * scale
        return values.to(DEVICE, dtype).requires_grad_(trained)

    E = len(rows)
    return {
        "x": normal(sum(rows), K, trained=True),
        "weight": normal(*((E, K, out) if transposed else (E, out, K)), scale=K**-0.5),
        "lora_A": normal(E, R, K, scale=K**-0.5, trained=True),
        "lora_B": normal(E, out, R, scale=max(1, R) ** -0.5, trained=True),
        "bias": normal(E, out),
        "offsets": torch.tensor(rows, device=DEVICE).cumsum(0),
    }


def cast(leaves: dict[str, Any], dtype: torch.dtype) -> dict[str, Any]:
    def new(tensor: Tensor) -> Tensor:
        wanted = tensor.requires_grad
        return (tensor.detach().to(dtype) if tensor.is_floating_point() else tensor).requires_grad_(wanted)

    return {name: tensor if tensor is None else new(tensor) for name, tensor in leaves.items()}


def formula(
    x: Tensor, weight: Tensor, lora_A: Tensor, lora_B: Tensor, bias: Tensor | None, offsets: Tensor, *, transposed=False
) -> Tensor:
    parts, ends = [], offsets.tolist()
    for e, (start, end) in enumerate(zip([0, *ends], ends, strict=False)):
        x_e, W = x[start:end], weight[e] if transposed else weight[e].T
        y = x_e @ W + SCALING * (x_e @ lora_A[e].T @ lora_B[e].T)
        parts.append(y if bias is None else y + bias[e])
    return torch.cat(parts)


def differentiate(function: Any, leaves: dict[str, Any], **options: Any) -> dict[str, Tensor]:
    y = function(**leaves, **options)
    upstream = torch.randn(y.shape, generator=torch.Generator().manual_seed(9), dtype=torch.float64)
    names = [name for name, t in leaves.items() if isinstance(t, Tensor) and t.requires_grad]
    grads = torch.autograd.grad(y, [leaves[name] for name in names], upstream.to(DEVICE, y.dtype))
    return {"y": y.detach(), **dict(zip(names, grads, strict=True))}


def ours(leaves: dict[str, Any], **options: Any) -> dict[str, Tensor]:
    return differentiate(grouped_lora_linear, leaves, scaling=SCALING, **options)


def error(actual: Tensor, exact: Tensor) -> float:
    return ((actual.double() - exact).norm() / exact.norm()).item()


@pytest.fixture(params=["loop", "grouped_mm"])
def products(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setattr(grouped_lora, "_takes_grouped_mm", lambda *_: request.param == "grouped_mm")
    return request.param


@pytest.mark.parametrize(
    ("dropout_p", "base_trained", "transposed", "bias"), covering([0.0, 0.4], *[[False, True]] * 3)
)
def test_gradcheck(dropout_p: float, base_trained: bool, transposed: bool, bias: bool) -> None:
    leaves = make(K=3, out=5, transposed=transposed)
    leaves["bias"] = leaves["bias"] if bias else None
    for name in ("weight", "bias"):
        if leaves[name] is not None:
            leaves[name].requires_grad_(base_trained)
    options = {"dropout_p": dropout_p, "seed": torch.tensor(3), "transposed": transposed}

    def function(*inputs: Any) -> Tensor:
        return grouped_lora_linear(**dict(zip(leaves, inputs, strict=True)), scaling=SCALING, **options)

    assert gradcheck(function, tuple(leaves.values()))


@settings(deadline=None, derandomize=True, max_examples=60)
@given(
    rows=st.lists(st.integers(0, 4), min_size=1, max_size=6),
    K=st.integers(1, 20),
    out=st.integers(1, 20),
    R=st.integers(0, 24),
    transposed=st.booleans(),
)
def test_any_shape_equals_the_formula(rows: list[int], K: int, out: int, R: int, transposed: bool) -> None:
    leaves = make(rows, K, out, R, transposed=transposed)
    actual = ours(leaves, transposed=transposed)
    expected = differentiate(formula, leaves, transposed=transposed)
    assert actual["y"].shape == (sum(rows), out)
    for name in expected:
        torch.testing.assert_close(actual[name], expected[name], rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("rows", [UNEVEN, (0, 1, 0), (0, 0), (40, 33, 7)], ids=str)
@pytest.mark.parametrize("R", [0, 2, 16])
@pytest.mark.parametrize("transposed", [False, True])
def test_fp32_equals_the_formula_to_1e5(rows: tuple[int, ...], R: int, transposed: bool, products: str) -> None:
    leaves = make(rows, K=64, out=96, R=R, dtype=torch.float32, transposed=transposed)
    leaves["weight"].requires_grad_()
    leaves["bias"].requires_grad_()
    exact = differentiate(formula, cast(leaves, torch.float64), transposed=transposed)
    for name, actual in ours(leaves, transposed=transposed).items():
        assert actual.dtype == torch.float32
        assert actual.is_contiguous()
        torch.testing.assert_close(actual.double(), exact[name], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_is_at_most_twice_as_far_from_fp64_as_torch(dtype: torch.dtype, products: str) -> None:
    leaves = make((40, 0, 33, 1), K=64, out=96, R=16, dtype=dtype)
    exact, torchs = differentiate(formula, cast(leaves, torch.float64)), differentiate(formula, leaves)
    wide = {**leaves, **{name: cast(leaves, torch.float32)[name] for name in ("lora_A", "lora_B")}}
    for chosen in (leaves, wide):
        actual = ours(chosen)
        assert actual["y"].dtype == dtype
        for name in exact:
            assert name == "y" or actual[name].dtype == chosen[name].dtype
            assert error(actual[name], exact[name]) <= 2 * error(torchs[name], exact[name])


def test_autocast_gives_the_numbers_of_the_cast_base(products: str) -> None:
    leaves = make(dtype=torch.float32)
    with torch.autocast(DEVICE.type, torch.bfloat16):
        inside = ours(leaves)
    base = {name: cast(leaves, torch.bfloat16)[name] for name in ("x", "weight", "bias")}
    outside = ours({**leaves, **base})
    assert inside["y"].dtype == torch.bfloat16
    assert inside["lora_A"].dtype == torch.float32
    for name in inside:
        assert inside[name].equal(outside[name].to(inside[name].dtype))


def test_nothing_is_overwritten_and_only_adapters_train(products: str) -> None:
    leaves = make(dtype=torch.float32)
    expected = ours(leaves)
    frozen = {**leaves, "x": leaves["x"].detach()}
    actual = ours(frozen)
    assert set(actual) == {"y", "lora_A", "lora_B"}
    assert all(actual[name].equal(expected[name]) for name in actual)
    assert all(tensor._version == 0 for tensor in leaves.values())


def test_backward_keeps_x_and_the_low_rank_product_only(products: str) -> None:
    leaves = make((40, 0, 80, 8), K=64, out=96, R=4, dtype=torch.float32)
    sizes: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        sizes[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes() // 4
        return tensor

    with saved_tensors_hooks(keep, lambda tensor: tensor):
        y = grouped_lora_linear(**leaves, scaling=SCALING)
    assert y.grad_fn is not None
    given = {tensor.untyped_storage().data_ptr() for name, tensor in leaves.items() if name != "x"}
    assert sorted(size for pointer, size in sizes.items() if pointer not in given) == [128 * 4, 128 * 64]


def test_dropout_is_that_of_one_linear_layer(products: str) -> None:
    """With one group it is lora_linear: the same mask, scale and gradients."""
    from sftx_kernels import lora_linear

    leaves = make((50,), dtype=torch.float32)
    options = {"dropout_p": 0.4, "seed": torch.tensor(7)}
    actual = ours(leaves, **options)
    names = ("weight", "lora_A", "lora_B", "bias")

    def one_layer(x: Tensor, **tensors: Tensor) -> Tensor:
        given = {name: tensors[name][0] for name in names}
        return lora_linear(x, **given, scaling=SCALING, backend="torch", **options)

    for name, expected in differentiate(one_layer, leaves).items():
        torch.testing.assert_close(actual[name], expected)
    assert not actual["y"].equal(ours(leaves)["y"])


def test_checkpointing_recomputes_the_same_mask() -> None:
    leaves = make()

    def layer(x: Tensor) -> Tensor:
        options = {"dropout_p": 0.5, "seed": torch.tensor(5)}
        return grouped_lora_linear(**{**leaves, "x": x}, scaling=SCALING, **options).tanh()

    trained = [leaves[name] for name in ("x", "lora_A", "lora_B")]
    plain = torch.autograd.grad(layer(leaves["x"]).square().sum(), trained)
    # The global generator is not restored on purpose: the mask must not need it.
    y = checkpoint(layer, leaves["x"], use_reentrant=False, preserve_rng_state=False)
    assert all(map(torch.equal, plain, torch.autograd.grad(y.square().sum(), trained)))


# ---- torch.compile and fake tensors


def test_compiles_whole_and_once_for_all_group_sizes() -> None:
    leaves = make(dtype=torch.float32)
    trained = [leaves[name] for name in ("x", "lora_A", "lora_B")]
    graphs = 0

    def count(graph: Any, _: Any) -> Any:
        nonlocal graphs
        graphs += 1
        return graph

    def function(offsets: Tensor) -> Tensor:
        return grouped_lora_linear(**{**leaves, "offsets": offsets}, scaling=SCALING).square().sum()

    torch._dynamo.reset()
    counting = torch.compile(function, fullgraph=True, backend=count)
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    for rows in (UNEVEN, (9, 0, 0, 0), (0, 4, 4, 1)):
        offsets = torch.tensor(rows, device=DEVICE).cumsum(0)
        counting(offsets)
        actual, expected = compiled(offsets), function(offsets)
        torch.testing.assert_close(actual, expected)
        for one, two in zip(*(torch.autograd.grad(y, trained) for y in (actual, expected)), strict=True):
            torch.testing.assert_close(one, two)
    assert graphs == 1


def test_fake_tensors_need_no_sizes_of_groups() -> None:
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        actual = ours(make(dtype=torch.float32), dropout_p=0.1, seed=torch.tensor(1))
    expected = ours(make(dtype=torch.float32))
    assert {name: (t.shape, t.dtype) for name, t in actual.items()} == {
        name: (t.shape, t.dtype) for name, t in expected.items()
    }


@pytest.mark.parametrize(("transposed", "trained"), [(False, True), (True, False)])
@pytest.mark.parametrize("R", [2, 16])
def test_op(transposed: bool, trained: bool, R: int, products: str) -> None:
    leaves = make(R=R, dtype=torch.float32, transposed=transposed)
    leaves["weight"].requires_grad_(trained)
    fields = [leaves[name] for name in ("x", "weight", "lora_A", "lora_B", "offsets", "bias")]
    no_scales: list[torch.Tensor] = []  # the weight is not quantised
    rest = (no_scales, torch.tensor(3), 0.5, transposed, 0.2, torch.float32, list(leaves["weight"].shape))
    torch.library.opcheck(torch.ops.sftx.grouped_lora_linear, (*fields, *rest))
    # What the compiler would not notice before inductor: the sizes and strides of the gradients.
    fields = [field.detach() for field in fields]
    y_MO, s_MR = torch.ops.sftx.grouped_lora_linear(*fields, *rest)
    wanted = [True, trained, True, True, False, trained]
    torch.library.opcheck(torch.ops.sftx.grouped_lora_linear_backward, (y_MO, s_MR, *fields, *rest, wanted))


def test_a_second_derivative_is_refused() -> None:
    leaves = make()
    y = grouped_lora_linear(**leaves, scaling=SCALING)
    with pytest.raises(RuntimeError, match="differentiable once; create_graph=True asks"):
        torch.autograd.grad(y.sum(), leaves["x"], create_graph=True)


# ---- what is refused


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.zeros(9, 2, 8)}, r"x: expected shape \[M, K\], got shape \[9, 2, 8\]"),
        ({"x": torch.zeros(9, 0)}, r"x: expected at least one column, got shape \[9, 0\]"),
        ({"weight": torch.zeros(4, 8, 16)}, r"weight: expected shape \[E, O, 8\], got shape \[4, 8, 16\]"),
        ({"transposed": True}, r"weight: expected shape \[E, 8, O\], got shape \[4, 16, 8\]"),
        ({"weight": torch.zeros(0, 16, 8)}, r"weight: expected at least one group, got"),
        ({"lora_A": torch.zeros(3, 2, 8)}, r"lora_A: expected shape \[4, R, 8\], got shape \[3, 2, 8\]"),
        ({"lora_B": torch.zeros(4, 16, 3)}, r"lora_B: expected shape \[4, 16, 2\], got shape \[4, 16, 3\]"),
        ({"lora_B": torch.zeros(4, 16, 2).half()}, r"lora_B: expected dtype torch.float32, got dtype torch.float16"),
        ({"bias": torch.zeros(16)}, r"bias: expected shape \[4, 16\], got shape \[16\]"),
        ({"offsets": torch.zeros(4)}, r"offsets: expected int32 or int64 of shape \[4\] on cpu, got torch.float32"),
        ({"offsets": torch.tensor([9])}, r"offsets: expected .* of shape \[4\] on cpu, got torch.int64 of shape \[1\]"),
        ({"offsets": torch.tensor([3, 3, 8, 8])}, r"offsets: expected ascending ends.* 9, got \[3, 3, 8, 8\]"),
        ({"offsets": torch.tensor([3, 2, 8, 9])}, r"offsets: expected ascending ends.* 9, got \[3, 2, 8, 9\]"),
        ({"offsets": torch.tensor([3, 3, 12, 9])}, r"offsets: expected ascending ends.* 9, got \[3, 3, 12, 9\]"),
        ({"scaling": float("inf")}, r"scaling: expected a finite number, got inf"),
        ({"dropout_p": 1.0}, r"dropout_p: expected a number in \[0, 1\), got 1.0"),
        ({"dropout_p": 0.1}, r"seed: expected a 0-d int64 tensor, since dropout_p is 0.1, got None"),
    ],
)
@pytest.mark.skipif(DEVICE.type != "cpu", reason="the messages name the CPU")
def test_refuses(change: dict[str, Any], message: str) -> None:
    good = {**make(dtype=torch.float32), "scaling": SCALING}
    grouped_lora_linear(**good)
    with pytest.raises(ValueError, match=f"^{message}"):
        grouped_lora_linear(**{**good, **change})


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("how", ["nf4", "nf4 twice", "int8"])
def test_a_quantised_weight_computes_what_the_dequantised_one_does(how: str, transposed: bool) -> None:
    """Each matrix has the codes that it has by itself, also under the compiler's view of the operation."""
    leaves = make(K=64, out=32, dtype=torch.float32, transposed=transposed)
    quantize: Any = quantize_int8 if how == "int8" else lambda w: quantize_nf4(w, double=how == "nf4 twice")
    stack = quantize_stack(leaves["weight"], quantize)
    alone = [quantize(matrix) for matrix in leaves["weight"]]
    for index, matrix in enumerate(alone):
        found = stack.matrix(index)
        assert torch.equal(found.codes, matrix.codes)
        assert all(map(torch.equal, found.scales, matrix.scales))
        assert isinstance(found, Int8Weight) == (how == "int8")
    dense = torch.stack([dequantize(matrix, torch.float32) for matrix in alone])
    assert (dense - leaves["weight"]).abs().max() > 1e-4
    expected = differentiate(grouped_lora_linear, leaves | {"weight": dense}, transposed=transposed, scaling=SCALING)
    for scope in (contextlib.nullcontext, lambda: _Watching()):
        with scope():
            found = differentiate(
                grouped_lora_linear, leaves | {"weight": stack}, transposed=transposed, scaling=SCALING
            )
        assert found.keys() == expected.keys()
        for name, tensor in found.items():
            torch.testing.assert_close(tensor, expected[name], rtol=1e-6, atol=1e-6)


def test_a_quantised_weight_is_not_kept_dense() -> None:
    leaves = make((40, 24), K=64, out=64, dtype=torch.float32)
    stack = quantize_stack(leaves["weight"], quantize_nf4)
    kept: list[Tensor] = []
    with saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        grouped_lora_linear(**leaves | {"weight": stack}, scaling=SCALING)
    assert sum(tensor.nbytes for tensor in kept) < leaves["weight"].nbytes


class _Watching(TorchDispatchMode):
    """Looks on, as the compiler and selective checkpointing do."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*args, **(kwargs or {}))
