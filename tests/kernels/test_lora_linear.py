"""lora_linear against its formula in plain torch, its dropout, and what it keeps for backward.

Shape suffixes: K in, O out, R rank.
"""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.autograd import gradcheck
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import checkpoint

from sftx_kernels import lora_linear

SCALING = 0.75


def make(
    *rows: int, K: int = 6, out: int = 5, R: int = 2, dtype=torch.float64, bias=True, seed=0
) -> dict[str, Tensor | None]:
    """Leaves x, weight, lora_A, lora_B, bias; base frozen, the rest requires grad."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int, scale: float, dtype: torch.dtype, trained: bool) -> Tensor:
        values = torch.randn(shape, generator=generator, dtype=torch.float64) * scale
        return values.to(dtype).requires_grad_(trained)

    return {
        "x": normal(*rows, K, scale=1, dtype=dtype, trained=True),
        "weight": normal(out, K, scale=K**-0.5, dtype=dtype, trained=False),
        "lora_A": normal(R, K, scale=K**-0.5, dtype=dtype, trained=True),
        "lora_B": normal(out, R, scale=R**-0.5, dtype=dtype, trained=True),
        "bias": normal(out, scale=1, dtype=dtype, trained=False) if bias else None,
    }


def cast(
    leaves: dict[str, Tensor | None], base: torch.dtype, lora: torch.dtype | None = None
) -> dict[str, Tensor | None]:
    """New leaves of another dtype; A and B may have their own."""
    dtypes = {"lora_A": lora or base, "lora_B": lora or base}
    return {
        name: None if t is None else t.detach().to(dtypes.get(name, base)).requires_grad_(t.requires_grad)
        for name, t in leaves.items()
    }


def formula(x: Tensor, weight: Tensor, lora_A: Tensor, lora_B: Tensor, bias: Tensor | None) -> Tensor:
    """As PEFT has it: A and B in their own dtype, the sum in the base's."""
    y = F.linear(x, weight, bias)
    return (y + SCALING * F.linear(F.linear(x.to(lora_A.dtype), lora_A), lora_B)).to(y.dtype)


def differentiate(function: Any, leaves: dict[str, Tensor | None], **options: Any) -> dict[str, Tensor]:
    y = function(**leaves, **options)
    upstream = torch.randn(y.shape, generator=torch.Generator().manual_seed(9), dtype=torch.float64)
    names = [name for name, t in leaves.items() if t is not None and t.requires_grad]
    grads = torch.autograd.grad(y, [leaves[name] for name in names], upstream.to(y.dtype))
    return {"y": y.detach(), **dict(zip(names, grads, strict=True))}


def ours(leaves: dict[str, Tensor | None], **options: Any) -> dict[str, Tensor]:
    return differentiate(lora_linear, leaves, scaling=SCALING, **options)


def error(actual: Tensor, exact: Tensor) -> float:
    return ((actual.double() - exact).norm() / exact.norm()).item()


@pytest.mark.parametrize("dropout_p", [0.0, 0.4])
@pytest.mark.parametrize("base_trained", [False, True])
def test_gradcheck(dropout_p: float, base_trained: bool) -> None:
    leaves = make(2, 3)
    for name in ("weight", "bias"):
        leaves[name].requires_grad_(base_trained)
    seed = torch.tensor(3)

    def function(*inputs: Tensor) -> Tensor:
        given = dict(zip(leaves, inputs, strict=True))
        return lora_linear(**given, scaling=SCALING, dropout_p=dropout_p, seed=seed)

    assert gradcheck(function, tuple(leaves.values()))


@settings(deadline=None, derandomize=True, max_examples=60)
@given(
    rows=st.lists(st.integers(0, 5), max_size=3),
    K=st.integers(1, 20),
    out=st.integers(1, 20),
    R=st.integers(1, 24),
    bias=st.booleans(),
)
def test_any_shape_equals_the_formula(rows: list[int], K: int, out: int, R: int, bias: bool) -> None:
    leaves = make(*rows, K=K, out=out, R=R, bias=bias)
    actual, expected = ours(leaves), differentiate(formula, leaves)
    assert actual["y"].shape == (*rows, out)
    for name in expected:
        torch.testing.assert_close(actual[name], expected[name], rtol=1e-10, atol=1e-10)


def test_fp32_equals_the_formula_to_1e5() -> None:
    leaves = make(3, 67, K=129, out=65, R=16, dtype=torch.float32)
    exact = differentiate(formula, cast(leaves, torch.float64))
    for name, actual in ours(leaves).items():
        assert actual.dtype == torch.float32
        assert error(actual, exact[name]) <= 1e-5


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_is_at_most_twice_as_far_from_fp64_as_torch(dtype: torch.dtype, autocast: bool) -> None:
    """Outside of autocast, with A and B of the base's dtype and of fp32; under it, with all in fp32."""
    wide = torch.float32
    for base, lora in [(wide, wide)] if autocast else [(dtype, dtype), (dtype, wide)]:
        # Values that the half dtype holds, so that what is measured is the arithmetic.
        leaves = make(3, 67, K=129, out=65, R=16, dtype=dtype)
        exact, torchs = differentiate(formula, cast(leaves, torch.float64)), differentiate(formula, leaves)
        given = cast(leaves, base, lora)
        with torch.autocast("cpu", dtype, enabled=autocast):
            actual = ours(given)
        assert actual["y"].dtype == dtype
        for name in exact:
            assert name == "y" or actual[name].dtype == given[name].dtype
            assert error(actual[name], exact[name]) <= 2 * error(torchs[name], exact[name])


def test_autocast_gives_the_numbers_of_the_cast_base() -> None:
    """fp32 A and B on a bf16 base: the same with autocast as without, and as with bf16 A and B."""
    leaves = make(7, dtype=torch.bfloat16)
    mixed = cast(leaves, torch.bfloat16, torch.float32)
    plain, outside = ours(leaves), ours(mixed)
    with torch.autocast("cpu", torch.bfloat16):
        inside = ours(mixed)
    for name in plain:
        assert outside[name].equal(inside[name])
        assert outside[name].equal(plain[name].to(outside[name].dtype))


def test_autocast_leaves_fp64_alone() -> None:
    leaves = make(7)
    with torch.autocast("cpu", torch.bfloat16):
        actual = ours(leaves)
    assert actual["y"].dtype == torch.float64
    assert actual["y"].equal(ours(leaves)["y"])


def test_any_strides_and_nothing_is_overwritten() -> None:
    leaves = make(4, 3)
    expected = ours(leaves)
    strided = dict(leaves)
    for name, tensor in leaves.items():
        copy = torch.stack([tensor.detach()] * 2, -1)[..., 0]
        strided[name] = copy.requires_grad_(tensor.requires_grad)
        assert not copy.is_contiguous()
    actual = ours(strided)
    for name in expected:
        torch.testing.assert_close(actual[name], expected[name])
    for name, tensor in leaves.items():
        assert tensor.equal(strided[name])
        assert tensor._version == 0


def test_only_adapters_train() -> None:
    """The first layer of a model: x needs no gradient, and the base's output is not part of the graph."""
    leaves = make(7)
    expected = differentiate(formula, leaves)
    leaves["x"] = leaves["x"].detach()
    actual = ours(leaves)
    assert set(actual) == {"y", "lora_A", "lora_B"}
    for name in actual:
        torch.testing.assert_close(actual[name], expected[name])


def test_backward_keeps_x_and_the_low_rank_product_only() -> None:
    leaves = make(8, 16, K=64, out=48, R=4, dtype=torch.float32)
    sizes: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        sizes[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes() // 4
        return tensor

    with saved_tensors_hooks(keep, lambda tensor: tensor):
        y = lora_linear(**leaves, scaling=SCALING)
    assert y.grad_fn is not None
    parameters = {leaves[name].untyped_storage().data_ptr() for name in ("weight", "lora_A", "lora_B", "bias")}
    activations = sorted(size for pointer, size in sizes.items() if pointer not in parameters)
    assert activations == [128 * 4, 128 * 64]


# ---- dropout


def drop(x: Tensor, dropout_p: float, seed: int) -> Tensor:
    """What dropout makes of x: A, B the identity, no base."""
    eye = torch.eye(x.shape[-1], dtype=x.dtype)
    return lora_linear(x, torch.zeros_like(eye), eye, eye, scaling=1.0, dropout_p=dropout_p, seed=torch.tensor(seed))


@pytest.mark.parametrize("dropout_p", [0.1, 0.5, 0.9])
def test_dropout_keeps_the_mean(dropout_p: float) -> None:
    x = torch.rand(500, 80, generator=torch.Generator().manual_seed(0)) + 1
    dropped = drop(x, dropout_p, 5)
    kept = dropped != 0
    torch.testing.assert_close(dropped[kept], (x / (1 - dropout_p))[kept])
    deviation = (dropout_p * (1 - dropout_p) / x.numel()) ** 0.5
    assert abs(kept.double().mean().item() - (1 - dropout_p)) < 5 * deviation
    # neither rows nor columns share a mask
    assert kept.unique(dim=0).shape[0] > 490
    assert kept.unique(dim=1).shape[1] == 80


def test_dropout_spares_the_base() -> None:
    leaves = make(50)
    leaves["lora_B"] = torch.zeros_like(leaves["lora_B"])
    actual = lora_linear(**leaves, scaling=SCALING, dropout_p=0.5, seed=torch.tensor(1))
    torch.testing.assert_close(actual, F.linear(leaves["x"], leaves["weight"], leaves["bias"]))


def test_mask_is_a_function_of_the_seed_alone() -> None:
    x = torch.ones(40, 8)
    mask = drop(x, 0.5, 7)
    state = torch.get_rng_state()
    assert drop(x, 0.5, 7).equal(mask)
    assert torch.get_rng_state().equal(state)
    torch.rand(3)
    assert drop(x, 0.5, 7).equal(mask)
    assert drop(x.double(), 0.5, 7).equal(mask.double())
    for other in (-1, 0, 8, 1 << 40, (1 << 63) - 1):
        assert not drop(x, 0.5, other).equal(mask)


def test_without_dropout_the_seed_does_nothing() -> None:
    leaves = make(7)
    assert ours(leaves, seed=torch.tensor(1))["y"].equal(ours(leaves)["y"])


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpointing_recomputes_the_same_mask(use_reentrant: bool) -> None:
    """Two layers with their own seeds, whose recomputation runs in another order of calls than the forward."""
    one, two = make(9, K=6, out=6), make(9, K=6, out=6, seed=1)
    trained = [one["x"], one["lora_A"], one["lora_B"], two["lora_A"], two["lora_B"]]

    def layer(x: Tensor, leaves: dict[str, Any], seed: int) -> Tensor:
        return lora_linear(**{**leaves, "x": x}, scaling=SCALING, dropout_p=0.5, seed=torch.tensor(seed)).tanh()

    def run(wrap: Any) -> list[Tensor]:
        hidden = wrap(layer, one["x"], one, 11)
        hidden = wrap(layer, hidden, two, 12)
        loss = hidden.square().sum()
        for leaf in trained:
            leaf.grad = None
        loss.backward()
        return [loss.detach(), *(leaf.grad for leaf in trained)]

    plain = run(lambda function, *args: function(*args))
    # The global generator is not restored on purpose: the mask must not need it.
    again = run(lambda *args: checkpoint(*args, use_reentrant=use_reentrant, preserve_rng_state=False))
    assert all(tensor.any() for tensor in plain)
    assert all(map(torch.equal, plain, again))


# ---- what is refused


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.tensor(1.0)}, r"x: expected shape \[K\], got shape \[\]"),
        ({"x": torch.zeros(7, 6).long()}, r"x: expected a floating dtype, got torch.int64"),
        ({"weight": torch.zeros(5, 7)}, r"weight: expected shape \[O, 6\], got shape \[5, 7\]"),
        ({"weight": torch.zeros(5, 6).bfloat16()}, r"weight: expected dtype torch.float32, got dtype torch.bfloat16"),
        ({"weight": torch.zeros(5, 6, device="meta")}, r"weight: expected device cpu, got device meta"),
        ({"lora_A": torch.zeros(2, 5)}, r"lora_A: expected shape \[R, 6\], got shape \[2, 5\]"),
        ({"lora_A": torch.zeros(2, 6).int()}, r"lora_A: expected a floating dtype, got torch.int32"),
        ({"lora_A": torch.zeros(0, 6), "lora_B": torch.zeros(5, 0)}, r"lora_A: expected at least one row, got shape"),
        ({"lora_B": torch.zeros(5, 3)}, r"lora_B: expected shape \[5, 2\], got shape \[5, 3\]"),
        ({"lora_B": torch.zeros(5, 2).half()}, r"lora_B: expected dtype torch.float32, got dtype torch.float16"),
        ({"bias": torch.zeros(6)}, r"bias: expected shape \[5\], got shape \[6\]"),
        ({"bias": torch.zeros(5).double()}, r"bias: expected dtype torch.float32, got dtype torch.float64"),
        ({"dropout_p": 1.0}, r"dropout_p: expected a number in \[0, 1\), got 1.0"),
        ({"dropout_p": -0.1}, r"dropout_p: expected a number in \[0, 1\), got -0.1"),
        ({"dropout_p": 0.1}, r"seed: expected a 0-d int64 tensor, since dropout_p is 0.1, got None"),
        ({"dropout_p": 0.1, "seed": torch.zeros(1).long()}, r"seed: .* got torch.int64 of shape \[1\]"),
        ({"dropout_p": 0.1, "seed": torch.tensor(1.0)}, r"seed: .* got torch.float32 of shape \[\]"),
    ],
)
def test_refuses(change: dict[str, Any], message: str) -> None:
    good = {**make(7, dtype=torch.float32), "scaling": SCALING}
    lora_linear(**good)
    with pytest.raises(ValueError, match=f"^{message}"):
        lora_linear(**{**good, **change})
