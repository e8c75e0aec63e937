"""lora_linear and lora_linears against their formula in plain torch, dropout, what is kept, torch.compile.

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

from devices import BACKENDS, DEVICE, covering
from sftx_kernels.int8 import quantize_int8
from sftx_kernels.lora import lora_linear, lora_linears
from sftx_kernels.nf4 import NF4Weight, quantize_nf4
from sftx_kernels.quantized import dequantize

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


def test_autocast_gives_the_numbers_of_the_cast_base(monkeypatch: pytest.MonkeyPatch) -> None:
    """fp32 A and B on a bf16 base: the same with autocast as without; and as with bf16 A and B, but unrounded.

    The products run in fp32, as on a CPU without bf16 instructions; one that has them rounds each product to bf16.
    """
    monkeypatch.setattr("sftx_kernels.gemm.cpu_multiplies", lambda dtype: dtype == torch.float32)
    leaves = make(7, dtype=torch.bfloat16)
    mixed = cast(leaves, torch.bfloat16, torch.float32)
    plain, outside = ours(leaves), ours(mixed)
    with torch.autocast("cpu", torch.bfloat16):
        inside = ours(mixed)
    for name in plain:
        assert outside[name].equal(inside[name])
        assert outside[name].to(torch.bfloat16).equal(plain[name])
        assert name not in ("lora_A", "lora_B") or not outside[name].equal(plain[name].float())


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
    # The probability is rounded to 16 bits, and the scale is that of the rounded one.
    rounded_p = round(dropout_p * 65536) / 65536
    torch.testing.assert_close(dropped[kept], (x / (1 - rounded_p))[kept])
    assert abs(kept.double().mean().item() - (1 - rounded_p)) < 5 * (rounded_p * (1 - rounded_p) / x.numel()) ** 0.5
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


# ---- layers that share x


def make_group(dtype: torch.dtype = torch.float64, bias: bool = True) -> tuple[list[dict[str, Any]], Tensor]:
    """Three layers of one x, of different widths and ranks; and that x."""
    layers = [make(9, K=64, out=out, R=R, dtype=dtype, bias=bias, seed=R) for out, R in ((8, 2), (5, 3), (16, 1))]
    x = layers[0]["x"]
    return [{**layer, "x": x} for layer in layers], x


def grouped(layers: list[dict[str, Any]], **options: Any) -> tuple[Tensor, ...]:
    columns = {name: [layer[name] for layer in layers] for name in ("weight", "lora_A", "lora_B", "bias")}
    biases = None if columns["bias"][0] is None else columns["bias"]
    x, weights = layers[0]["x"], columns["weight"]
    return lora_linears(x, weights, columns["lora_A"], columns["lora_B"], biases=biases, **options)


@pytest.mark.parametrize(
    ("bias", "dropout_p", "kind"), covering([False, True], [0.0, 0.4], ["plain", "trained", "nf4", "nf4-double"])
)
def test_a_group_equals_its_layers(kind: str, dropout_p: float, bias: bool) -> None:
    layers, x = make_group(torch.float32 if kind == "nf4" else torch.float64, bias)
    trained = [x, *(layer[name] for layer in layers for name in ("lora_A", "lora_B"))]
    for layer in layers:
        if kind == "trained":
            trained += [layer[name].requires_grad_() for name in ("weight", "bias") if layer[name] is not None]
        elif kind == "nf4":
            layer["weight"] = quantize_nf4(layer["weight"])
    scalings = (0.5, 2.0, 1.25)
    options = {"dropout_p": dropout_p, "seed": torch.tensor(4)}
    together = grouped(layers, scaling=scalings, **options)
    apart = [lora_linear(**layer, scaling=s, **options) for layer, s in zip(layers, scalings, strict=True)]
    for one, two in zip(together, apart, strict=True):
        torch.testing.assert_close(one, two)
    upstream = [torch.randn_like(y) for y in apart]
    for used in ([0, 1, 2], [1], [0, 2]):  # an output that nothing uses has no gradient to give
        found, expected = (
            torch.autograd.grad([ys[i] for i in used], trained, [upstream[i] for i in used], True, allow_unused=True)
            for ys in (together, apart)
        )
        for one, two in zip(found, expected, strict=True):
            torch.testing.assert_close(one, torch.zeros_like(one) if two is None and one is not None else two)


def test_one_scaling_serves_all() -> None:
    layers, _ = make_group()
    assert all(map(torch.equal, grouped(layers, scaling=2.0), grouped(layers, scaling=(2.0, 2.0, 2.0))))


def test_gradcheck_of_a_group() -> None:
    layers, x = make_group()
    trained = (x.detach()[:2].requires_grad_(), layers[0]["lora_A"], layers[2]["lora_B"])

    def function(x: Tensor, A: Tensor, B: Tensor) -> tuple[Tensor, ...]:
        given = [{**layers[0], "x": x, "lora_A": A}, layers[1], {**layers[2], "lora_B": B}]
        return grouped(given, scaling=SCALING, dropout_p=0.3, seed=torch.tensor(1))

    assert gradcheck(function, trained)


@pytest.mark.parametrize("kind", ["nf4", "nf4-double", "int8"])
def test_a_quantised_weight_is_the_layer_of_the_dequantized_weight(kind: str) -> None:
    layer = make(7, K=64, dtype=torch.bfloat16)
    weight = layer["weight"]
    quantized = quantize_int8(weight) if kind == "int8" else quantize_nf4(weight, double=kind == "nf4-double")
    expected = ours({**layer, "weight": dequantize(quantized, torch.bfloat16)})
    given = {name: tensor for name, tensor in layer.items() if name != "weight"}
    actual = differentiate(lora_linear, given, weight=quantized, scaling=SCALING)
    assert all(actual[name].equal(expected[name]) for name in expected)


# ---- torch.compile


@pytest.mark.parametrize("kind", ["plain", "nf4", "nf4-double"])
def test_compiles_whole_and_once_for_all_seeds(kind: str) -> None:
    layers, x = make_group(torch.float32)
    trained = [x, *(layer[name] for layer in layers for name in ("lora_A", "lora_B"))]
    if kind != "plain":
        layers = [{**layer, "weight": quantize_nf4(layer["weight"], double=kind == "nf4-double")} for layer in layers]
    graphs = 0

    def count(graph: Any, _: Any) -> Any:
        nonlocal graphs
        graphs += 1
        return graph

    def function(seed: Tensor) -> Tensor:
        outputs = grouped(layers, scaling=SCALING, dropout_p=0.3, seed=seed)
        return sum(y.square().sum() for y in outputs) + lora_linear(**layers[0], scaling=1.0).sum()

    torch._dynamo.reset()
    counting = torch.compile(function, fullgraph=True, backend=count)
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    for seed in range(10):
        counting(torch.tensor(seed))
        actual, expected = compiled(torch.tensor(seed)), function(torch.tensor(seed))
        torch.testing.assert_close(actual, expected)
        for one, two in zip(*(torch.autograd.grad(y, trained) for y in (actual, expected)), strict=True):
            torch.testing.assert_close(one, two)
    assert graphs == 1


@pytest.mark.parametrize(
    ("backend", "kind", "dropout_p"),
    covering(
        BACKENDS if DEVICE.type == "cpu" else ["torch"],
        ["plain", "trained", "nf4", "nf4-double"],
        [0.0, 0.4],
        strength=1,
    ),
)
def test_op(backend: str, kind: str, dropout_p: float) -> None:
    layers, x = make_group(torch.float32)
    columns = [[layer[name] for layer in layers] for name in ("weight", "lora_A", "lora_B", "bias")]
    weights, lora_As, lora_Bs, biases = columns
    scales = []
    if kind.startswith("nf4"):
        quantized = [quantize_nf4(weight, double=kind == "nf4-double") for weight in weights]
        weights, scales = [q.codes for q in quantized], [scale for q in quantized for scale in q.scales]
    elif kind == "trained":
        weights = [weight.requires_grad_() for weight in weights]
    seed = torch.tensor(3) if dropout_p else None
    arguments = (
        x,
        weights,
        scales,
        lora_As,
        lora_Bs,
        biases,
        seed,
        [1.0, 2.0, 0.5],
        dropout_p,
        torch.float32,
        backend,
    )
    torch.library.opcheck(torch.ops.sftx.lora_linear, arguments)
    # What the compiler would not notice before inductor: the sizes and strides of the gradients.
    arguments = tuple(
        [t.detach() for t in a] if isinstance(a, list) and a is not arguments[7] else a for a in arguments
    )
    *outputs, s_MR = torch.ops.sftx.lora_linear(x.detach(), *arguments[1:])
    wanted = [True, *[kind == "trained"] * 3, *[False] * len(scales), *[True] * 6, *[kind == "trained"] * 3]
    torch.library.opcheck(torch.ops.sftx.lora_linear_backward, (outputs, s_MR, x.detach(), *arguments[1:], wanted))


def test_a_second_derivative_is_refused() -> None:
    leaves = make(7)
    y = lora_linear(**leaves, scaling=SCALING)
    with pytest.raises(RuntimeError, match="differentiable once; create_graph=True asks"):
        torch.autograd.grad(y.sum(), leaves["x"], create_graph=True)


def test_each_gradient_of_a_group_has_the_digits_of_its_own_dtype() -> None:
    layers, _ = make_group(torch.float32)
    grads = []
    for first in (torch.bfloat16, torch.float32):
        for name in ("lora_A", "lora_B"):
            layers[0][name] = layers[0][name].detach().to(torch.bfloat16).to(first).requires_grad_()
        y = grouped(layers, scaling=SCALING)
        grads.append(torch.autograd.grad(sum(one.sum() for one in y), layers[1]["lora_A"])[0])
    assert grads[0].equal(grads[1])


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
        ({"dropout_p": 0.1, "seed": 3}, r"seed: expected a 0-d int64 tensor, .* got 3"),
        ({"x": torch.zeros(7, 0), "weight": torch.zeros(5, 0)}, r"x: expected at least one column, got shape \[7, 0\]"),
        ({"scaling": float("nan")}, r"scaling: expected a finite number, got nan"),
        ({"scaling": "2"}, r"scaling: expected a finite number, got '2'"),
    ],
)
def test_refuses(change: dict[str, Any], message: str) -> None:
    good = {**make(7, dtype=torch.float32), "scaling": SCALING}
    lora_linear(**good)
    with pytest.raises(ValueError, match=f"^{message}"):
        lora_linear(**{**good, **change})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"weights": []}, r"lora_As: expected at least one layer, got 1"),
        ({"lora_As": []}, r"lora_As: expected one for each of 1 weights, got 0"),
        ({"scaling": (1.0, 2.0)}, r"scaling: expected one for each of 1 weights, got 2"),
        ({"biases": []}, r"biases: expected one for each of 1 weights, got 0"),
        ({"biases": [None]}, r"bias: expected a tensor for each layer, or no biases, got None"),
        (
            {"weights": [NF4Weight(torch.zeros(15).byte(), torch.zeros(3), (5, 6))] * 2},
            r"lora_As: expected one for each",
        ),
        ({"weights": [NF4Weight(torch.zeros(15).byte(), torch.zeros(3).half(), (5, 6))]}, r"weight.absmax: expected"),
        ({"weights": [NF4Weight(torch.zeros(15).byte(), torch.zeros(3), (6, 5))]}, r"weight: expected shape \[O, 6\]"),
        ({"backend": "cuda"}, r"backend: expected one of auto, torch, triton, got 'cuda'"),
    ],
)
def test_group_refuses(change: dict[str, Any], message: str) -> None:
    leaf = make(7, dtype=torch.float32)
    good = {
        "x": leaf["x"],
        "weights": [leaf["weight"]],
        "lora_As": [leaf["lora_A"]],
        "lora_Bs": [leaf["lora_B"]],
        "scaling": SCALING,
    }
    lora_linears(**good)
    with pytest.raises(ValueError, match=f"^{message}"):
        lora_linears(**{**good, **change})


def test_a_group_says_which_layer_is_wrong() -> None:
    layers, _ = make_group()
    layers[1]["lora_B"] = torch.zeros(5, 7, dtype=torch.float64)
    with pytest.raises(ValueError, match=r"^layer 1 of 3: lora_B: expected shape \[5, 3\], got shape \[5, 7\]"):
        grouped(layers, scaling=SCALING)


def test_refuses_plain_and_quantized_weights_together() -> None:
    layers, _ = make_group(torch.float32)
    layers[1]["weight"] = quantize_nf4(layers[1]["weight"])
    with pytest.raises(
        ValueError, match=r"^weights: expected all tensors, or all quantised alike, got \['Tensor', 'NF4W"
    ):
        grouped(layers, scaling=SCALING)
    weight = torch.zeros(5, 64)
    layers = [{**layers[0], "weight": quantize_nf4(weight, double=double)} for double in (True, False)]
    with pytest.raises(
        ValueError, match=r"^weights: expected all tensors, or all quantised alike, got \['NF4Weight with"
    ):
        grouped(layers, scaling=SCALING)
