"""The contract of a loss: a sum over trained tokens, the same however they are batched, with the right gradient.

It is checked on the tiny model with LoRA and a trained head, both a little away from where they began, so that the
model and what it was before training differ.

Dimensions: B rows, T tokens, D hidden.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from sftx.assembly.stages import make
from sftx.data.collate import groups_of
from sftx.model.language_model import CausalLM
from sftx.testing.batches import copy_of, differences, varied, widened
from sftx.testing.clauses import ClauseError, Suite
from sftx.testing.kit import Kit, built_in
from sftx.testing.numeric import norm, slope
from sftx.testing.process import random_states, random_states_kept
from sftx.types import IGNORE_INDEX, Batch, Example, Loss, LossSum

# Invariances are checked in fp64: right losses differ by 1e-15 there, those with logits in fp32 by 1e-8.
_TOLERANCE: Final = 1e-5
_MORE_PADDING: Final = 5
_GROUPS: Final = 4

# Central differences of fourth order, errors relative to the gradient's norm. The tiny model's norms, and many losses,
# go through fp32, which adds noise that grows as steps shrink; curvature adds an error that grows with the fourth power
# of the step. Measured on cross-entropy (in fp64, and with logits in fp32), on it with label smoothing and z-loss, and
# on a DPO loss (both ways): along the gradient (of length 1) 1e-4 at most at a step of 3e-3, and ten times that at 1e-2
# or 3e-4; along random directions (of mean square 1, which the gradient of a right loss projects on with about its own
# norm) 4e-4 at 6e-4. A gradient that is wrong by 1 % gives 1e-2 along itself, so the tolerance has room on both sides.
# A model that curves more (a Gemma-2 of random weights: 5e-3) is asked again at a third of the step.
_GRADIENT_STEP: Final = 3e-3
_RANDOM_STEP: Final = 6e-4
_GRADIENT_TOLERANCE: Final = 3e-3


class _Case:
    def __init__(self, kit: Kit) -> None:
        self.loss: Loss = make(kit.plugin, "sftx_loss")
        self._kit = kit

    @cached_property
    def groups(self) -> list[list[Example]]:
        """Some of the kit's examples, in micro-batches; every second one with loss weights."""
        groups = groups_of(self._kit.examples)[:_GROUPS]
        return [group if n % 2 else varied(group, self._kit.tokenizer) for n, group in enumerate(groups)]

    def batch_of(self, groups: Sequence[Sequence[Example]]) -> Batch:
        return self._kit.collator.collate([example for group in groups for example in group])

    @cached_property
    def batch(self) -> Batch:
        return self.batch_of(self.groups)

    @cached_property
    def lm(self) -> CausalLM:
        return self._model(torch.float32)

    @cached_property
    def exact(self) -> CausalLM:
        """The same model in fp64."""
        return self._model(torch.float64).double()

    @cached_property
    def _lora(self) -> object:
        return built_in("lora", r=4, modules_to_save=_head(self._kit.spec.skeleton))

    def _model(self, dtype: torch.dtype) -> CausalLM:
        adapter = make(self._lora, "sftx_adapter", spec=self._kit.spec)
        lm = self._kit.language_model({"lora": adapter}, dtype=dtype)
        embedding = lm.model.get_input_embeddings()
        if isinstance(embedding, nn.Embedding):
            # torch gives the input of this id no gradient, which is no fault of a loss.
            embedding.padding_idx = None
        modules: Iterator[Any] = lm.modules()
        for module in modules:
            # The model's own dropout makes of every forward another one, which is no fault of a loss either.
            if isinstance(module, nn.Dropout):
                module.p = 0.0
            elif hasattr(module, "attention_dropout"):
                module.attention_dropout = 0.0
        numbers = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for parameter in _trained(lm):
                parameter.add_(0.02 * torch.randn(parameter.shape, generator=numbers))
        return lm

    def run(self, lm: CausalLM, batch: Batch) -> LossSum:
        """The loss as the engine asks for it, seeds set before, on a copy that it may spoil."""
        lm.train()
        with random_states_kept():
            _seed(lm)
            return self.loss(lm, copy_of(batch))

    @cached_property
    def whole(self) -> LossSum:
        """Of the whole batch, in fp64."""
        return self.run(self.exact, self.batch)

    @cached_property
    def gradient(self) -> list[Tensor]:
        """Of `whole`, in each trained parameter."""
        return _gradient(self.whole, self.exact)

    def slope(self, direction: Sequence[Tensor], step: float) -> float:
        """How `whole` changes along `direction`."""
        return slope(lambda: self.run(self.exact, self.batch).sum.item(), _trained(self.exact), direction, step)


SUITE: Suite[_Case] = Suite("loss", _Case)


@SUITE.clause("A loss leaves the model, its adapters, the batch and the global random numbers as they were.")
def leaves_the_model(case: _Case) -> None:
    _run_and_look(case, training=True)


@SUITE.clause(
    "A loss returns a LossSum: a finite scalar in fp32 that depends on what is trained, and metrics that are scalars.",
    needs=["leaves-the-model"],
)
def returns_a_sum(case: _Case) -> None:
    out: object = case.run(case.lm, case.batch)
    if not isinstance(out, LossSum):
        raise ClauseError(f"it returned {type(out).__name__}; return LossSum(sum, aux_loss, metrics)")
    for name, value in _tensors(out).items():
        if not isinstance(value, Tensor) or value.ndim:
            seen = f"shape {list(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
            raise ClauseError(f"{name} is of {seen}; return a tensor without dimensions, left on its device")
        if not value.isfinite():
            raise ClauseError(f"{name} is {value.item()}; an update by it would destroy the model")
    if out.sum.dtype not in (torch.float32, torch.float64):
        raise ClauseError(f"sum is {out.sum.dtype}; add up in fp32, since thousands of tokens are summed")
    if not out.sum.requires_grad or not any(bool(gradient.any()) for gradient in _gradient(out, case.lm)):
        raise ClauseError("sum has no gradient in any trained parameter; compute it from lm, and do not detach it")


@SUITE.clause("The denominator is a finite number above 0, known from the batch alone.")
def knows_its_denominator(case: _Case) -> None:
    for batch in (case.batch, *(case.batch_of([group]) for group in case.groups)):
        first, again = (_number(case.loss.denominator(copy_of(batch))) for _ in range(2))
        if not 0 < first < math.inf:
            raise ClauseError(
                f"the denominator of {len(batch.row_ids)} examples, {batch.num_label_tokens} label tokens is {first}; "
                "return how many tokens, or pairs, the sum is of"
            )
        if first != again:
            raise ClauseError(f"the denominator of one batch was {first} and then {again}; count it from the batch")


@SUITE.clause(
    "Under torch.no_grad() and lm.eval() a loss gives finite numbers without a graph, and leaves all as it was.",
    needs=["returns-a-sum"],
)
def evaluates(case: _Case) -> None:
    out = _run_and_look(case, training=False)
    for name, value in _tensors(out).items():
        if not value.isfinite():
            raise ClauseError(f"{name} is {value.item()} in evaluation; it must be finite there too")
        if value.requires_grad:
            raise ClauseError(
                f"{name} keeps a graph under torch.no_grad(), and with it the memory of a whole forward; leave "
                "torch.enable_grad() to whoever calls the loss"
            )


@SUITE.clause(
    "More padding at the right changes neither sum nor denominator nor gradient.",
    needs=["returns-a-sum", "knows-its-denominator"],
)
def padding_changes_nothing(case: _Case) -> None:
    if case.batch.lengths_B is None:
        return  # packed: documents follow one another, and no row has an end at which padding could stand
    wide = widened(case.batch, _MORE_PADDING)
    out = case.run(case.exact, wide)
    seen, right = out.sum.item(), case.whole.sum.item()
    advice = "mask by labels_BT or lengths_B, and divide by nothing that grows with the padding"
    if not _close(seen, right):
        raise ClauseError(f"with {_MORE_PADDING} more columns of padding sum is {seen:.6g}, not {right:.6g}; {advice}")
    counted, expected = case.loss.denominator(wide), case.loss.denominator(case.batch)
    if counted != expected:
        raise ClauseError(f"with more padding the denominator is {counted:g}, not {expected:g}; {advice}")
    off = norm([a - b for a, b in zip(_gradient(out, case.exact), case.gradient, strict=True)])
    if not off <= _TOLERANCE * norm(case.gradient):
        raise ClauseError(f"with more padding the gradient is off by {off / norm(case.gradient):.1e}; {advice}")


@SUITE.clause(
    "Sums, denominators and metrics of micro-batches add up to those of the whole batch.",
    needs=["padding-changes-nothing"],
)
def splits(case: _Case) -> None:
    parts = [case.batch_of([group]) for group in case.groups]
    outs = [case.run(case.exact, part) for part in parts]
    found = {"sum": ([out.sum.item() for out in outs], case.whole.sum.item())}
    counted = [float(case.loss.denominator(part)) for part in parts]
    found["denominator"] = (counted, float(case.loss.denominator(case.batch)))
    for name in sorted({name for out in (*outs, case.whole) for name in out.metrics}):
        values = [float(out.metrics[name].detach()) if name in out.metrics else 0.0 for out in (*outs, case.whole)]
        found[f"metrics[{name!r}]"] = (values[:-1], values[-1])
    for what, (pieces, whole) in found.items():
        if not _close(sum(pieces), whole, scale=sum(map(abs, pieces))):
            raise ClauseError(
                f"{what} is {whole:.6g} for {len(parts)} groups of examples in one batch, and {sum(pieces):.6g} when "
                "each is a batch of its own; return sums and not means, and let no example depend on its neighbours"
            )


@SUITE.clause("What the model says where a label is ignored counts nothing.", needs=["returns-a-sum"])
def trains_only_labels(case: _Case) -> None:
    with _noise_where_ignored(case.exact, case.batch.labels_BT):
        seen = case.run(case.exact, case.batch).sum.item()
    right = case.whole.sum.item()
    if not _close(seen, right):
        raise ClauseError(
            f"other hidden states where labels_BT is IGNORE_INDEX (prompts, padding) change sum from {right:.6g} to "
            f"{seen:.6g}; take only the positions that have a label"
        )


@SUITE.clause("The gradient in what is trained is that of the sum, by central differences.", needs=["returns-a-sum"])
def right_gradient(case: _Case) -> None:
    length = norm(case.gradient)
    numbers = torch.Generator().manual_seed(0)
    directions = [("along itself", [gradient / length for gradient in case.gradient], _GRADIENT_STEP)]
    for _ in range(2):
        random = [torch.randn(g.shape, generator=numbers, dtype=g.dtype) for g in case.gradient]
        directions.append(("along a random direction", random, _RANDOM_STEP))
    for name, direction, step in directions:
        expected = math.fsum(float((g * d).sum()) for g, d in zip(case.gradient, direction, strict=True))
        seen = case.slope(direction, step)
        if not abs(seen - expected) <= _GRADIENT_TOLERANCE * length:
            seen = case.slope(direction, step / 3)
        if not abs(seen - expected) <= _GRADIENT_TOLERANCE * length:
            raise ClauseError(
                f"{name} the gradient (of norm {length:.4g}) says {expected:.4g}, and the sum changes by {seen:.4g}; "
                "look for a detach(), a no_grad() or an own backward that leaves something out"
            )


@SUITE.clause("A token's weight counts: with other weights the sum is another.", needs=["right-gradient"])
def obeys_the_weights(case: _Case) -> None:
    shape = case.batch.labels_BT.shape
    weights_BT = torch.linspace(0.5, 2.0, shape.numel()).view(shape)
    seen, plain = (
        case.run(case.exact, dataclasses.replace(case.batch, token_weights_BT=weights)).sum.item()
        for weights in (weights_BT, None)
    )
    if _close(seen, plain):
        raise ClauseError(
            f"sum is {seen:.6g} whatever token_weights_BT says, so that weights in the data are ignored in silence; "
            "multiply each token's loss by its weight"
        )


def check_loss(plugin: object, *, model: Path | None = None) -> None:
    """Holds the plugin's loss against each clause. Raises ContractError, naming those that it breaks.

    `model`: a directory with a model and tokenizer to check with, instead of the tiny one.
    """
    SUITE.check(plugin, model=model)


def _head(model: PreTrainedModel) -> tuple[str, ...]:
    """The output head's path, and the embedding's where they are one tensor."""
    trained = [model.get_output_embeddings()]
    if model.config.get_text_config().tie_word_embeddings:
        trained.append(model.get_input_embeddings())
    return tuple(name for name, module in model.named_modules() if any(module is one for one in trained))


def _trained(lm: CausalLM) -> list[nn.Parameter]:
    return [parameter for parameter in lm.parameters() if parameter.requires_grad]


def _seed(lm: CausalLM) -> None:
    lm.seed.fill_(1)
    torch.manual_seed(1)


def _gradient(out: LossSum, lm: CausalLM) -> list[Tensor]:
    return list(torch.autograd.grad(out.sum, _trained(lm), retain_graph=True, materialize_grads=True))


def _state(lm: CausalLM, batch: Batch) -> dict[str, object]:
    """What a loss may not change, by its name in an error."""
    state: dict[str, object] = {
        f"the training mode of {name or 'lm'}": module.training for name, module in lm.named_modules()
    }
    for name, parameter in lm.named_parameters():
        state[f"requires_grad of {name}"] = parameter.requires_grad
        state[f"the gradient of {name}"] = None if parameter.grad is None else parameter.grad.clone()
        state[f"the parameter {name}"] = parameter.detach().clone()
    with torch.no_grad(), random_states_kept():
        _seed(lm)
        state["what the model computes (are its adapters on?)"] = lm.hidden(copy_of(batch)).hidden_BTD
    return state


def _equal(one: object, other: object) -> bool:
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        return torch.equal(one, other)
    return type(one) is type(other) and one == other


@contextlib.contextmanager
def _noise_where_ignored(lm: CausalLM, labels_BT: Tensor) -> Iterator[None]:
    """Within it the decoder's last states are others wherever no label is.

    A forward over rows that the loss has put together itself, of another shape, has labels that nobody here knows; it
    is left as it is.
    """
    ignored_BT1 = (labels_BT == IGNORE_INDEX)[..., None]

    def add_noise(_: nn.Module, __: Any, out: Any) -> Any:
        hidden_BTD: Tensor = out.last_hidden_state
        if hidden_BTD.shape[:2] == labels_BT.shape:
            numbers = torch.Generator().manual_seed(0)
            noise_BTD = torch.randn(hidden_BTD.shape, generator=numbers, dtype=hidden_BTD.dtype)
            out.last_hidden_state = torch.where(ignored_BT1, hidden_BTD + noise_BTD, hidden_BTD)
        return out

    handle = lm.model.get_decoder().register_forward_hook(add_noise)
    try:
        yield
    finally:
        handle.remove()


def _run_and_look(case: _Case, *, training: bool) -> LossSum:
    """The loss of the batch. Raises ClauseError when anything is not as it was afterwards."""
    with random_states_kept(), torch.set_grad_enabled(training):
        case.lm.train(training)
        _seed(case.lm)
        batch, before, numbers = copy_of(case.batch), _state(case.lm, case.batch), random_states()
        out = case.loss(case.lm, batch)
        drawn = [name for name, state in random_states().items() if state != numbers[name]]
        after = _state(case.lm, case.batch)
    changed = [name for name in before if not _equal(before[name], after[name])]
    if changed:
        raise ClauseError(
            f"after the loss, {changed[0]} is not what it was; put back what you switch, best by a `with` as in "
            "lm.without_adapters(), and leave backward() and updates to the engine"
        )
    fields = differences(batch, case.batch)
    if fields:
        raise ClauseError(f"it wrote into the batch's {', '.join(fields)}, which is used again; copy it first")
    if drawn:
        raise ClauseError(
            f"it drew from or seeded {', '.join(drawn)}; derive what is random from "
            "lm.seed, so that a recomputed forward draws the same"
        )
    return out


def _tensors(out: LossSum) -> dict[str, Any]:
    """What should be scalars, by its name in an error."""
    aux_loss = {} if out.aux_loss is None else {"aux_loss": out.aux_loss}
    return {"sum": out.sum, **aux_loss, **{f"metrics[{name!r}]": value for name, value in out.metrics.items()}}


def _number(value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ClauseError(
            f"the denominator is a {type(value).__name__}; return a float, which is known without waiting for a device"
        )
    return float(value)


def _close(one: float, other: float, *, scale: float = 0.0) -> bool:
    return abs(one - other) <= _TOLERANCE * max(abs(other), scale)
