"""Layers that are computed again, compiled, or both: the same numbers, in one graph."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch._dynamo.utils import counters
from torch.utils._python_dispatch import TorchDispatchMode

from sftx.errors import ModelError
from sftx.trainer import layers
from trainers import answers_in_order, batches_of, denominator, gradients, planned, rows, small_model, trainer_of

# torch hides this warning itself, from a user's filters and not from one that makes errors of warnings.
# The other one is of a module of torch's that the compiler imports.
pytestmark = [
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning"),
    pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning"),
]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(autouse=True)
def _nothing_compiled_yet() -> Iterator[None]:
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


# --- gradient checkpointing ---------------------------------------------------------------------


@pytest.mark.parametrize("selective", [False, True])
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize(("lora", "dropout"), [(True, 0.2), (False, 0.0)])
@pytest.mark.parametrize("bf16", [False, True])
def test_checkpointing_gives_the_same_gradients(
    model: Path, packed: bool, lora: bool, dropout: float, bf16: bool, selective: bool
) -> None:
    kept = trainer_of(model, packed=packed, lora=lora, dropout=dropout, bf16=bf16)
    again = trainer_of(
        model, packed=packed, lora=lora, dropout=dropout, bf16=bf16,
        gradient_checkpointing=True, selective_checkpointing=selective,
    )  # fmt: skip
    batches = batches_of(kept)
    expected, got = gradients(kept, batches), gradients(again, batches)
    assert expected.keys() == got.keys()
    assert all(torch.equal(expected[name], got[name]) for name in expected)


def test_selective_checkpointing_keeps_products_and_computes_the_rest_again(model: Path) -> None:
    """Counted by torch itself: how often a forward and its backward multiply, and how often they normalise."""

    class Counting(TorchDispatchMode):
        def __init__(self) -> None:
            super().__init__()
            self.counts: Counter[str] = Counter()

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            self.counts[func.name()] += 1
            return func(*args, **(kwargs or {}))

    counted = {}
    for kind in ("none", "full", "selective"):
        options = {"gradient_checkpointing": kind != "none", "selective_checkpointing": kind == "selective"}
        trainer = trainer_of(model, lora=False, packed=True, **options)
        with Counting() as mode:
            first = batches_of(trainer)[:1]
            trainer.accumulate(first, denominator(first), 0)
        counted[kind] = mode.counts
    products = {kind: counts["aten::mm"] for kind, counts in counted.items()}
    norms = {kind: counts["sftx::rms_norm"] for kind, counts in counted.items()}
    attentions = {kind: counts["sftx::document_attention"] for kind, counts in counted.items()}
    num_layers = 3
    assert products["selective"] == products["none"] < products["full"]
    assert attentions == {"none": num_layers, "selective": num_layers, "full": 2 * num_layers}
    assert norms["selective"] == norms["full"] == norms["none"] + 2 * num_layers


# --- torch.compile ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("backend", "packed", "options"),
    [
        ("aot_eager", True, {"gradient_checkpointing": True, "selective_checkpointing": True}),
        pytest.param("inductor", True, {"gradient_checkpointing": True}, marks=pytest.mark.slow),
        pytest.param("aot_eager", True, {}, marks=pytest.mark.slow),
        pytest.param("aot_eager", False, {"gradient_checkpointing": True}, marks=pytest.mark.slow),
        pytest.param("aot_eager", False, {"bf16": True}, marks=pytest.mark.slow),
    ],
)
def test_compiled_layers_train_alike_in_one_graph(
    model: Path, backend: str, packed: bool, options: dict[str, bool]
) -> None:
    eager, compiled = (trainer_of(model, packed=packed, dropout=0.1, **options) for _ in range(2))
    names = list(compiled.lm.state_dict())
    layers.compile_layers(compiled.lm.model, backend=backend)
    assert list(compiled.lm.state_dict()) == names
    tolerance = 1e-2 if options.get("bf16") else 1e-4
    for number in range(1, 5):
        batches = batches_of(eager, number)
        if number == 3:
            batches = eager.micro_batches(
                planned(((0,), (1,), (2,)), rows(3, seed=9))
            )  # an epoch's end: one row is left over
        if number == 4:
            batches = batches_of(compiled, 4)[:1]
            with torch.no_grad():
                compiled.lm.eval()
                compiled.strategy.module(batches[0].batch)  # as an evaluation between two steps
                compiled.lm.train()
        right, got = eager.train_step(number, 0, batches), compiled.train_step(number, 0, batches)
        assert got.loss == pytest.approx(right.loss, rel=tolerance)
        assert got.grad_norm == pytest.approx(right.grad_norm, rel=10 * tolerance)
    assert not counters["graph_break"]
    assert 1 <= counters["stats"]["unique_graphs"] <= 3, "recompiled twice at most"
    if packed:
        assert counters["stats"]["unique_graphs"] == 1


def test_generation_and_evaluation_run_what_is_not_compiled(model: Path) -> None:
    trainer = trainer_of(model, torch_compile=True)
    trainer.lm.eval()
    plain = trainer_of(model)
    plain.lm.eval()
    prompts = [row.token_ids[:5] for row in rows(3)]
    answers = [answers_in_order(t.lm, prompts, max_new_tokens=6, stop_ids=[2], batch_size=2) for t in (trainer, plain)]
    assert answers[0] == answers[1]
    assert not counters["stats"]


def test_a_layer_that_cannot_be_compiled_whole_is_an_error(model: Path) -> None:
    trainer = trainer_of(model)
    first = layers.decoder_layers(trainer.lm.model)[0]
    inner = first.mlp.forward

    def breaks(x: torch.Tensor) -> torch.Tensor:
        torch._dynamo.graph_break()
        return inner(x)

    first.mlp.forward = breaks
    layers.compile_layers(trainer.lm.model, backend="eager")
    with pytest.raises(ModelError, match=r"torch.compile does not take its layers: .*--compile\) out"):
        trainer.train_step(1, 0, batches_of(trainer))


def test_layers_are_found_in_a_model_that_brings_its_own(model: Path) -> None:
    class Decoder(torch.nn.Module):
        def __init__(self, depth: int) -> None:
            super().__init__()
            self.blocks = torch.nn.ModuleList(torch.nn.Linear(2, 2) for _ in range(depth))

    class Own(torch.nn.Module):
        def __init__(self, depth: int) -> None:
            super().__init__()
            self.config = trainer_of(model).lm.model.config
            self.decoder = Decoder(depth)

        def get_decoder(self) -> torch.nn.Module:
            return self.decoder

    own = Own(3)
    assert layers.decoder_layers(own) == list(own.decoder.blocks)  # type: ignore[arg-type]
    with pytest.raises(ModelError, match=r"^Own: .* layers of its decoder"):
        layers.decoder_layers(Own(5))  # type: ignore[arg-type]
