"""What is measured: the least work of each operation by hand, the inputs, their references, and shapes files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from sftx_kernels import IGNORE_INDEX, dequantize_nf4
from sftx_kernels.bench import BenchError
from sftx_kernels.bench.cases import DTYPES, Case, make_problem
from sftx_kernels.bench.cross_entropy import UPSTREAM, LossProblem
from sftx_kernels.bench.lora import SCALING, LoraProblem
from sftx_kernels.bench.operations import (
    OPERATIONS,
    PROVIDERS,
    CrossEntropyShape,
    GroupedLoraShape,
    LinearCrossEntropyShape,
    LinearKLShape,
    LoraShape,
    RmsNormShape,
    RotaryShape,
    SwigluShape,
    default_shapes,
    expand,
    read_shapes,
    shape_entry,
    shape_from,
)

CPU = torch.device("cpu")


def work(case: Case) -> dict[str, tuple[int, int]]:
    return {name: (least.flops, least.num_bytes) for name, least in case.least().items()}


def test_least_work_of_cross_entropy() -> None:
    # 8 rows of 100 bf16 logits, 2 of them ignored: 6 rows read, 8 rows of gradient written, 8 labels of 8 bytes.
    case = Case(CrossEntropyShape(8, 100), "bf16", 0.25)
    assert work(case) == {
        "forward": (1800, 6 * 100 * 2 + 64),
        "backward": (1800, 6 * 100 * 2 + 8 * 100 * 2 + 64),
        "both": (3600, 6 * 100 * 2 + 8 * 100 * 2 + 64),
    }


def test_least_work_of_linear_cross_entropy_with_a_frozen_and_a_trained_head() -> None:
    # Half of 8 rows ignored: one product is 2 * 4 * 10 * 100. The head has 1000 weights of 4 bytes.
    frozen = Case(LinearCrossEntropyShape(8, 10, 100), "fp32", 0.5)
    read, d_hidden, d_weight = 4 * 10 * 4 + 4000 + 64, 8 * 10 * 4, 4000
    assert work(frozen) == {
        "forward": (8000, read),
        "backward": (8000, read + d_hidden),
        "both": (16_000, read + d_hidden),
    }
    trained = Case(LinearCrossEntropyShape(8, 10, 100, trained=True), "fp32", 0.5)
    assert work(trained) == {
        "forward": (8000, read),
        "backward": (16_000, read + d_hidden + d_weight),
        "both": (24_000, read + d_hidden + d_weight),
    }


def test_least_work_of_a_divergence_has_the_products_of_both_heads() -> None:
    # Of 8 rows 4 count: 2 * 4 * 10 * 100 for the student's logits and dX, 2 * 4 * 30 * 100 for the teacher's.
    both = work(Case(LinearKLShape(8, 10, 30, 100), "fp32", 0.5))["both"]
    assert both == (8000 + 24_000 + 8000, (4 + 100) * 40 * 4 + 64 + 8 * 10 * 4)
    trained = work(Case(LinearKLShape(8, 10, 30, 100, trained=True), "fp32", 0.5))["both"]
    assert trained == (both[0] + 8000, both[1] + 4000)


def test_least_work_of_the_goal_in_the_anchors() -> None:
    """G = 2 M H V = 8.6 TFLOP at the Llama 3 head, twice that with a frozen head: 17.4 ms at 989 TFLOP/s."""
    both = Case(LinearCrossEntropyShape(8192, 4096, 128256), "bf16").least()["both"]
    assert both.flops == 4 * 8192 * 4096 * 128256
    assert both.flops / 989e12 * 1e3 == pytest.approx(17.4, abs=0.05)


def test_least_work_of_lora_for_one_linear_and_a_group() -> None:
    # M 5, K 7, R 2, O 3, in fp32.
    base, down, up = 2 * 5 * 7 * 3, 2 * 5 * 7 * 2, 2 * 5 * 2 * 3
    x, y, weight, lora = 5 * 7, 5 * 3, 3 * 7, 2 * 7 + 3 * 2
    found = work(Case(LoraShape(5, 7, (3,), rank=2), "fp32"))
    assert found["forward"] == (base + down + up, 4 * (x + weight + lora + y))
    assert found["backward"] == (base + 2 * down + 2 * up, 4 * (y + weight + lora + x + x + lora))
    assert found["both"] == tuple(map(sum, zip(found["forward"], found["backward"], strict=True)))
    # A group of two: x is read once, and has one A for each.
    group = work(Case(LoraShape(5, 7, (3, 3), rank=2), "fp32"))
    assert group["forward"] == (2 * (base + down + up), 4 * (x + 2 * (weight + lora + y)))


def test_a_weight_in_four_bits_is_half_a_byte_with_quantised_scales_and_the_same_for_every_provider() -> None:
    plain, quantised = (work(Case(LoraShape(5, 128, (64,), rank=2, nf4=nf4), "bf16")) for nf4 in (False, True))
    codes, absmax, nested = 128 * 64 // 2, 128 * 64 // 64, 4 * 128 * 64 // (64 * 256)
    assert plain["forward"][1] - quantised["forward"][1] == 2 * 128 * 64 - codes - absmax - nested
    problem = make_problem(Case(LoraShape(5, 128, (64,), rank=2, nf4=True), "bf16"), CPU)
    assert isinstance(problem, LoraProblem)
    assert problem.quantized is not None
    assert dequantize_nf4(problem.quantized[0], torch.bfloat16).equal(problem.weights[0])
    sftx, floor = (
        provider for provider in PROVIDERS if provider.name in ("sftx", "torch-eager") and provider.op == "lora"
    )
    one, other = (provider.prepare(problem).forward() for provider in (sftx, floor))
    torch.testing.assert_close(one, other, rtol=2e-2, atol=2e-2)


def test_least_work_of_grouped_lora_reads_the_experts_that_have_rows() -> None:
    # M 3, E 8, K 7, R 2, O 4, in bf16. By rounded shares of 1, 1/2, 1/3, ..., experts 0, 1 and 4 have a row each.
    shape = GroupedLoraShape(3, 8, 7, 4, rank=2)
    assert shape.ends() == [1, 2, 2, 2, 3, 3, 3, 3]
    base, down, up = 2 * 3 * 7 * 4, 2 * 3 * 7 * 2, 2 * 3 * 2 * 4
    x, y, weight, lora = 3 * 7, 3 * 4, 3 * 4 * 7, 3 * 2 * (7 + 4)
    found = work(Case(shape, "bf16"))
    assert found["forward"] == (base + down + up, 2 * (x + weight + lora + y))
    assert found["backward"] == (base + 2 * down + 2 * up, 2 * (y + weight + lora + x + x + lora))


def test_least_work_of_what_multiplies_no_matrices_is_each_input_read_and_each_output_written() -> None:
    """5 rows in bf16; 7 columns, or 3 heads of 8 with one of keys. An fp32 number a row, and half of cos and sin."""
    norm = work(Case(RmsNormShape(5, 7), "bf16"))
    assert norm["forward"] == (7 * 35, 4 * 70 + 14 + 20)
    assert norm["backward"] == (10 * 35, 4 * 70 + 14 + 20)
    assert norm["both"] == (17 * 35, 2 * (4 * 70 + 14 + 20))
    assert work(Case(SwigluShape(5, 7), "bf16"))["both"] == (18 * 35, 8 * 70)
    assert work(Case(RotaryShape(5, 3, 1, 8), "bf16"))["forward"] == (3 * 160, 2 * 320 + 2 * 5 * 4 * 2)


@pytest.mark.parametrize("mask", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("logits", ["random", "zipf"])
@pytest.mark.parametrize("trained", [None, False, True])
def test_a_loss_problem_and_its_reference(mask: float, logits: str, trained: bool | None) -> None:
    shape = (
        CrossEntropyShape(40, 50, logits) if trained is None else LinearCrossEntropyShape(40, 6, 50, trained, logits)
    )
    case = Case(shape, "fp32", mask)
    problem = make_problem(case, CPU)
    assert isinstance(problem, LossProblem)
    assert problem.num_valid == case.num_valid == int((problem.labels_N != IGNORE_INDEX).sum())
    again = make_problem(case, CPU)
    assert isinstance(again, LossProblem)
    assert torch.equal(problem.input_NE, again.input_NE)
    input_NE = problem.input_NE.double().requires_grad_()
    weight_VD = None if problem.weight_VD is None else problem.weight_VD.double().requires_grad_()
    logits_NV = input_NE if weight_VD is None else input_NE @ weight_VD.T
    loss = F.cross_entropy(logits_NV, problem.labels_N, reduction="sum")
    (UPSTREAM * loss).backward()
    expected = {"loss": loss.detach(), "d_input": input_NE.grad}
    if trained:
        assert weight_VD is not None
        expected["d_weight"] = weight_VD.grad
    reference = problem.reference(1e15)
    assert reference.values.keys() == expected.keys()
    assert reference.error(expected)[0] < 1e-12  # type: ignore[arg-type]
    if logits == "zipf" and trained is None and mask == 0:
        ranked = logits_NV.softmax(1).mean(0).sort(descending=True).values
        assert ranked[0] > 5 * ranked[9]


@pytest.mark.parametrize("mask", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("divergence", ["forward", "reverse", "jsd"])
@pytest.mark.parametrize("trained", [False, True])
def test_a_divergence_and_its_reference(mask: float, divergence: str, trained: bool) -> None:
    problem: Any = make_problem(Case(LinearKLShape(40, 6, 9, 50, divergence, trained), "fp32", mask), CPU)
    valid_N = problem.labels_N != IGNORE_INDEX
    assert int(valid_N.sum()) == problem.case.num_valid
    hidden_ND, weight_VD = problem.hidden_ND.double().requires_grad_(), problem.weight_VD.double().requires_grad_()
    p_NV, q_NV = (
        (hidden_ND @ weight_VD.T).softmax(1),
        (problem.teacher_NH.double() @ problem.teacher_VH.double().T).softmax(1),
    )
    beta = {"forward": 0.0, "reverse": 1.0, "jsd": 0.5}[divergence]
    m_NV = {"forward": p_NV, "reverse": q_NV, "jsd": (p_NV + q_NV) / 2}[divergence]
    of_q, of_p = ((x_NV * (x_NV / m_NV).log()).sum(1)[valid_N].sum() for x_NV in (q_NV, p_NV))
    loss = of_q + of_p if beta in (0, 1) else beta * of_q + (1 - beta) * of_p
    (UPSTREAM * loss).backward()
    expected = {"loss": loss.detach(), "d_input": hidden_ND.grad, "d_weight": weight_VD.grad}
    reference = problem.reference(1e15)
    assert reference.values.keys() == (expected.keys() if trained else {"loss", "d_input"})
    assert reference.error(expected)[0] < 1e-12
    few = problem.reference(case_rate(problem, 0.25))
    if mask < 1:
        assert few.values.keys() == {"d_input"}
        assert few.error(expected)[0] < 1e-12


def test_a_lora_problem_and_its_reference() -> None:
    problem = make_problem(Case(LoraShape(9, 7, (5, 4), rank=3), "fp32"), CPU)
    assert isinstance(problem, LoraProblem)
    x_MK = problem.x_MK.double().requires_grad_()
    actual = {}
    total = torch.zeros((), dtype=torch.float64)
    leaves = []
    for number in range(2):
        weight_OK = problem.weights[number].double()
        A_RK, B_OR = (tensors[number].double().requires_grad_() for tensors in (problem.lora_As, problem.lora_Bs))
        y_MO = x_MK @ weight_OK.T + SCALING * x_MK @ A_RK.T @ B_OR.T
        total = total + (y_MO * problem.upstreams[number]).sum()
        actual[f"y{number}"] = y_MO.detach()
        leaves.append((A_RK, B_OR))
    total.backward()
    for number, (A_RK, B_OR) in enumerate(leaves):
        assert A_RK.grad is not None
        assert B_OR.grad is not None
        actual |= {f"d_A{number}": A_RK.grad, f"d_B{number}": B_OR.grad}
    assert x_MK.grad is not None
    actual["d_x"] = x_MK.grad
    reference = problem.reference(1e15)
    assert reference is not None
    assert reference.values.keys() == actual.keys()
    assert reference.error(actual)[0] < 1e-12
    # Where fp64 is too slow for all of it, a few rows, and only what belongs to a row.
    few = problem.reference(case_rate(problem, 0.5))
    assert few is not None
    assert few.rows is not None
    assert few.note == "4 rows"
    assert few.values.keys() == {"y0", "y1", "d_x"}
    assert few.error(actual)[0] < 1e-12
    wrong = actual | {"d_x": actual["d_x"] * 1.01}
    assert few.error(wrong) == (pytest.approx(0.01), "d_x")
    assert few.error(actual | {"y1": actual["y1"] * float("nan")})[1] == "y1"
    assert make_problem(Case(LoraShape(9, 7, (5,), dropout=0.1), "fp32"), CPU).reference(1e15) is None


def case_rate(problem: Any, share: float) -> float:
    """The speed at which a reference may be made for this share of the rows, in the 10 seconds it has."""
    return float(problem.case.least()["both"].flops * share / 10.0)


def test_few_rows_of_a_loss() -> None:
    problem = make_problem(Case(LinearCrossEntropyShape(40, 6, 50, trained=True), "fp32", 0.5), CPU)
    whole, few = problem.reference(1e15), problem.reference(case_rate(problem, 0.25))
    assert whole is not None
    assert few is not None
    assert few.values.keys() == {"d_input"}
    assert few.note == "d_input of 5 rows"
    assert few.error(whole.values)[0] < 1e-12


def test_default_shapes_hold_every_operation_and_come_back_from_a_file(tmp_path: Path) -> None:
    for device in ("cpu", "cuda"):
        shapes = default_shapes(device)
        assert {shape.op for shape in shapes} == set(OPERATIONS)
        path = tmp_path / f"{device}.json"
        path.write_text(json.dumps([shape_entry(shape) for shape in shapes]))
        assert read_shapes(path) == shapes


def test_cases_are_every_dtype_and_mask_and_lora_has_no_mask() -> None:
    found = list(expand(default_shapes("cpu"), OPERATIONS, ("fp32", "bf16"), (0.0, 0.5)))
    assert [sum(case.op == op for case in found) for op in OPERATIONS] == [4, 4, 8, 2, 2, 2, 2, 2]
    assert {case.dtype for case in found} == {"fp32", "bf16"} <= set(DTYPES)
    assert str(found[1]) == "linear-cross-entropy 1024x1024x32000 frozen, fp32, 50% masked"
    assert str(found[4]) == "lora 2048x576x1536 r16, fp32"


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        (
            [],
            'expected an object with "op", one of cross-entropy, linear-cross-entropy, linear-kl, lora, '
            "grouped-lora, rms-norm, swiglu, rotary; got []",
        ),
        ({"op": "gelu"}, 'expected an object with "op", one of'),
        ({"op": "cross-entropy", "rows": 8}, "cross-entropy needs 'vocab'"),
        ({"op": "cross-entropy", "rows": 8, "vocab": 9, "hidden": 1}, "cross-entropy has no 'hidden'; it has rows,"),
        ({"op": "cross-entropy", "rows": 0, "vocab": 9}, "rows: expected a count >= 1 and < 2**63, got 0"),
        ({"op": "cross-entropy", "rows": True, "vocab": 9}, "rows: expected a count >= 1 and < 2**63, got true"),
        ({"op": "cross-entropy", "rows": 8, "vocab": 2**63}, "vocab: expected a count >= 1 and < 2**63, got 92233"),
        ({"op": "cross-entropy", "rows": 8, "vocab": 9, "logits": "flat"}, 'logits: expected "random" or "zipf"'),
        ({"op": "linear-cross-entropy", "rows": 1, "hidden": 1, "vocab": 1, "trained": 1}, "trained: expected true"),
        ({"op": "lora", "rows": 8, "in_features": 8, "out_features": []}, "out_features: expected a count"),
        ({"op": "lora", "rows": 8, "in_features": 8, "out_features": 8, "dropout": 1}, "dropout: expected a number in"),
    ],
)
def test_a_wrong_entry_is_told_with_its_place(entry: Any, message: str) -> None:
    with pytest.raises(BenchError) as caught:
        shape_from(entry, "f.json: entry 1")
    assert str(caught.value).startswith(f"f.json: entry 1: {message}")


@pytest.mark.parametrize("content", ["", "{", "[]", '{"op": "lora"}', "3", "[" * 200_000])
def test_a_shapes_file_that_is_none(content: str, tmp_path: Path) -> None:
    path = tmp_path / "shapes.json"
    path.write_text(content)
    with pytest.raises(BenchError, match=r"shapes\.json: (cannot be read|expected a list of shapes)"):
        read_shapes(path)


def test_a_shapes_file_of_an_editor_that_marks_utf_8(tmp_path: Path) -> None:
    path = tmp_path / "shapes.json"
    path.write_text(json.dumps([shape_entry(CrossEntropyShape(8, 9))]), encoding="utf-8-sig")
    assert read_shapes(path) == (CrossEntropyShape(8, 9),)
