"""The contract of a loss: a sum over label tokens that does not depend on the batching, with a correct gradient.

The model is the tiny one with LoRA and a trained head. Both are moved a little away from their initial values, so that
the model differs from the base model.

Dimensions: B rows, T tokens, D hidden.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor, nn

from sftx.assembly.stages.data_stages import CollatorStage
from sftx.assembly.stages.loss_stage import LossStage
from sftx.data.collate import groups_of
from sftx.data.example_values import Values, places_of
from sftx.model.language_model import CausalLM
from sftx.testing.batches import copy_of, differences, identical, norm, precomputed, varied, widened
from sftx.testing.clauses import ClauseError, ExemptError, Suite
from sftx.testing.kit import Kit, built_in, make_stage
from sftx.testing.process import changed_random_states, random_states, random_states_kept
from sftx.types import IGNORE_INDEX, Batch, Example, Loss, LossSum

# Invariances are checked in fp64: correct losses differ by 1e-15 there, those with logits in fp32 by 1e-8.
_TOLERANCE: Final = 1e-5
_MORE_PADDING: Final = 5
_GROUPS: Final = 4

# Gradients are checked by central differences of fourth order; errors are relative to the gradient's norm. The tiny
# model's norms, and many losses, compute in fp32, which adds noise that grows as steps shrink; curvature adds an error
# that grows with the fourth power of the step. Measured on cross-entropy (in fp64, and with logits in fp32), with label
# smoothing and z-loss, and on a DPO loss (both ways): along the gradient (of length 1) at most 1e-4 at a step of 3e-3,
# and ten times that at 1e-2 or 3e-4; along random directions (of mean square 1, on which the gradient of a correct loss
# projects with about its own norm) 4e-4 at 6e-4. A gradient that is wrong by 1 % has an error of 1e-2 along itself, so
# the tolerance leaves room on both sides. A model with more curvature (a Gemma-2 of random weights: 5e-3) is measured
# again at a third of the step.
_GRADIENT_STEP: Final = 3e-3
_RANDOM_STEP: Final = 6e-4
_GRADIENT_TOLERANCE: Final = 3e-3


class _Case:
    def __init__(self, kit: Kit) -> None:
        self.loss: Loss = make_stage(kit.plugin, "sftx_loss")
        self._kit = kit
        self._stage = LossStage("the loss", self.loss)
        self.collator = CollatorStage("the collator", kit.collator)

    @cached_property
    def groups(self) -> list[list[Example]]:
        """A few groups of examples, every second one with loss weights.

        Answers of a rollout are those of the case's own model: ratios to it begin at 1, where clipping has no kinks,
        which central differences cannot pass over.
        """
        groups = groups_of(self._kit.examples_for(self.lm_fp32))[:_GROUPS]
        return [group if n % 2 else varied(group, self._kit.tokenizer) for n, group in enumerate(groups)]

    @cached_property
    def batches(self) -> list[Batch]:
        """One batch for each group, as micro-batches of one step."""
        return self._as_a_step([self.collated(group) for group in self.groups])

    @cached_property
    def batch(self) -> Batch:
        """All groups in one batch, which is a whole step."""
        return self._as_a_step([self.collated(self.examples)])[0]

    @cached_property
    def examples(self) -> list[Example]:
        """The examples of all groups, which the loss has been prepared with."""
        examples = [example for group in self.groups for example in group]
        self._stage.prepare(examples)
        return examples

    @cached_property
    def precomputed(self) -> Values | None:
        """Return what the loss computes of the examples before training, None for a loss that computes nothing."""
        assert self.examples
        return precomputed(self._stage, self.collator, self.lm, self.groups)

    def plain(self, examples: Sequence[Example]) -> Batch:
        """Return the batch of these examples before the loss's own extras are made."""
        places = {example.row_id: place for place, example in enumerate(self.examples)}
        batch = self.collator.collate(examples)
        if self.precomputed is None:
            return batch
        return self.precomputed.add_to(batch, [places[example.row_id] for example in examples], examples)

    def collated(self, examples: Sequence[Example]) -> Batch:
        """Return the batch of these examples as a run makes it, with all of its extras."""
        return self._stage.with_extras(self.plain(examples))

    def _as_a_step(self, batches: Sequence[Batch]) -> list[Batch]:
        """Return the micro-batches of one step with the statistics of that step, where the loss has any.

        They are taken from the fp64 model and stay as they are while a clause moves the parameters: the loss gets them
        without a gradient.
        """
        compute: Any = getattr(self.loss, "statistics", None)
        if compute is None:
            return list(batches)
        totals: dict[str, Tensor] = {}
        self.lm.train()
        for batch in batches:
            with torch.no_grad(), random_states_kept():
                _seed(self.lm)
                for name, value in compute(self.lm, copy_of(batch)).items():
                    totals[name] = totals.get(name, 0.0) + value
        return [dataclasses.replace(batch, statistics=totals) for batch in batches]

    @cached_property
    def lm_fp32(self) -> CausalLM:
        return self._model(torch.float32)

    @cached_property
    def lm(self) -> CausalLM:
        """The same model in fp64."""
        return self._model(torch.float64).double()

    @cached_property
    def _lora(self) -> object:
        model = self._kit.spec.skeleton
        trained = [model.get_output_embeddings()]
        if model.config.get_text_config().tie_word_embeddings:
            trained.append(model.get_input_embeddings())
        names = [name for name, module in model.named_modules() if any(module is other for other in trained)]
        return built_in("lora", r=4, modules_to_save=tuple(names))

    def _model(self, dtype: torch.dtype) -> CausalLM:
        adapter = make_stage(self._lora, "sftx_adapter", spec=self._kit.spec)
        lm = self._kit.language_model({"lora": adapter}, dtype=dtype)
        embedding = lm.model.get_input_embeddings()
        if isinstance(embedding, nn.Embedding):
            embedding.padding_idx = None  # torch gives the row of this id no gradient, which is not the loss's fault
        make_module: Any = getattr(self.loss, "module", None)
        lm.loss_module = None if make_module is None else make_module(lm)
        modules: list[Any] = list(lm.modules())
        for module in modules:  # dropout of the model itself would make every forward different
            if isinstance(module, nn.Dropout):
                module.p = 0.0
            elif hasattr(module, "attention_dropout"):
                module.attention_dropout = 0.0
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for parameter in _trained(lm):
                parameter.add_(0.02 * torch.randn(parameter.shape, generator=generator))
        return lm

    def run(self, lm: CausalLM, batch: Batch) -> LossSum:
        """Compute the loss as the trainer does, after seeding, on a copy of the batch."""
        lm.train()
        with random_states_kept():
            _seed(lm)
            return self.loss(lm, copy_of(batch))

    def run_step(self, batches: Sequence[Batch]) -> list[LossSum]:
        """Compute the loss in fp64 on the micro-batches of one step, with the statistics of that step if it has any."""
        compute: Any = getattr(self.loss, "statistics", None)
        totals: dict[str, Tensor] = {}
        if compute is not None:
            self.lm.train()
            for batch in batches:
                with torch.no_grad(), random_states_kept():
                    _seed(self.lm)
                    for name, value in compute(self.lm, copy_of(batch)).items():
                        totals[name] = totals.get(name, 0.0) + value
        return [self.run(self.lm, dataclasses.replace(batch, statistics=totals)) for batch in batches]

    @cached_property
    def out(self) -> LossSum:
        """The loss of the whole batch in fp64."""
        return self.run(self.lm, self.batch)

    @cached_property
    def gradient(self) -> list[Tensor]:
        """The gradient of `out` in each trained parameter."""
        return _gradient(self.out, self.lm)


SUITE: Suite[_Case] = Suite("loss", _Case)


@SUITE.clause(
    "What `extras` returns depends on the batch alone, and neither the batch nor the global random state is changed."
)
def makes_its_extras(case: _Case) -> None:
    compute: Any = getattr(case.loss, "extras", None)
    if compute is None:
        return
    plain = case.plain(case.examples)
    with random_states_kept():
        made = []
        for seed in range(2):
            torch.manual_seed(seed)
            batch, before = copy_of(plain), random_states()
            made.append(compute(batch))
            if drawn := changed_random_states(before):
                raise ClauseError(f"extras drew from or seeded {drawn}; compute them from batch.examples alone")
            if fields := differences(batch, plain):
                raise ClauseError(f"extras wrote into the batch's {', '.join(fields)}; return what is new in a dict")
    first, second = made
    if different := [name for name in first.keys() | second.keys() if not identical(first.get(name), second.get(name))]:
        raise ClauseError(
            f"extras[{min(different)!r}] of one batch were different the second time; keep no state in it"
        )


@SUITE.clause("What `precompute` returns of an example, one finite number, does not depend on the others of its batch.")
def precomputes_by_example(case: _Case) -> None:
    compute: Any = getattr(case.loss, "precompute", None)
    if compute is None or case.precomputed is None:
        return
    batch = case.collated(case.examples)
    names = case.precomputed.by_name.keys()
    batch = dataclasses.replace(batch, extras={n: value for n, value in batch.extras.items() if n not in names})
    case.lm.eval()
    with torch.no_grad(), random_states_kept(), case.lm.without_adapters():
        together = compute(case.lm, copy_of(batch))
    for name, expected in case.precomputed.by_name.items():
        expected_E = torch.from_numpy(expected)[places_of(batch, case.examples)].double()
        error = float((together[name].double() - expected_E).abs().max())
        if not error <= _TOLERANCE * float(expected_E.abs().max().clamp(min=1)):
            raise ClauseError(
                f"precompute[{name!r}] is off by {error:.1e} when {len(case.groups)} groups of examples are in one "
                "batch; compute each example's number of its own positions, as sftx.sum_by_example does"
            )


@SUITE.clause("A loss does not change the model, its adapters, the batch or the global random state.")
def leaves_the_model(case: _Case) -> None:
    _run_and_compare(case, training=True)


@SUITE.clause(
    "A loss returns a LossSum: a finite fp32 scalar with a gradient in the trained parameters, and scalar metrics.",
    needs=["leaves-the-model"],
)
def returns_a_sum(case: _Case) -> None:
    out: object = case.run(case.lm_fp32, case.batch)
    if not isinstance(out, LossSum):
        raise ClauseError(f"it returned {type(out).__name__}; return LossSum(sum, aux_loss, metrics)")
    for name, value in _tensors(out).items():
        if not isinstance(value, Tensor) or value.ndim:
            seen = f"shape {list(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
            raise ClauseError(f"{name} is of {seen}; return a tensor without dimensions, left on its device")
        if not value.isfinite():
            raise ClauseError(f"{name} is {value.item()}; an update with it would destroy the model")
    if out.sum.dtype not in (torch.float32, torch.float64):
        raise ClauseError(f"sum is {out.sum.dtype}; add up in fp32, since thousands of tokens are summed")
    if not out.sum.requires_grad or not any(bool(gradient.any()) for gradient in _gradient(out, case.lm_fp32)):
        raise ClauseError("sum has no gradient in any trained parameter; compute it from lm, and do not detach it")


@SUITE.clause("The denominator is a finite number above 0 that depends on the batch alone.")
def knows_its_denominator(case: _Case) -> None:
    for batch in (case.batch, *case.batches):
        values: list[object] = [case.loss.denominator(copy_of(batch)) for _ in range(2)]
        for value in values:
            if isinstance(value, bool) or not isinstance(value, int | float):
                raise ClauseError(
                    f"the denominator is a {type(value).__name__}; return a float that is known without waiting for a "
                    "device"
                )
            if not 0 < value < math.inf:
                raise ClauseError(
                    f"the denominator of {len(batch.row_ids)} examples with {batch.num_label_tokens} label tokens is "
                    f"{value}; return the number of tokens, or pairs, that the sum runs over"
                )
        if values[0] != values[1]:
            raise ClauseError(f"the denominator of a batch was {values[0]} and then {values[1]}; count only the batch")


@SUITE.clause(
    "Under torch.no_grad() and lm.eval() a loss returns finite numbers without a graph, and changes nothing either.",
    needs=["returns-a-sum"],
)
def evaluates(case: _Case) -> None:
    for name, value in _tensors(_run_and_compare(case, training=False)).items():
        if not value.isfinite():
            raise ClauseError(f"{name} is {value.item()} in evaluation; it must be finite there too")
        if value.requires_grad:
            raise ClauseError(
                f"{name} keeps a graph under torch.no_grad(), and with it the memory of a forward; do not use "
                "torch.enable_grad()"
            )


@SUITE.clause(
    "More padding on the right changes neither the sum nor the denominator nor the gradient.",
    needs=["returns-a-sum", "knows-its-denominator"],
)
def padding_changes_nothing(case: _Case) -> None:
    if case.batch.lengths_B is None:
        return  # a packed batch has no rows to pad
    batch = widened(case.batch, _MORE_PADDING)
    out = case.run(case.lm, batch)
    total, expected = out.sum.item(), case.out.sum.item()
    advice = "mask by labels_BT or lengths_B, and divide by nothing that grows with the padding"
    if not _close(total, expected):
        raise ClauseError(f"with more columns of padding sum is {total:.6g}, not {expected:.6g}; {advice}")
    denominator, expected = case.loss.denominator(batch), case.loss.denominator(case.batch)
    if denominator != expected:
        raise ClauseError(f"with more padding the denominator is {denominator:g}, not {expected:g}; {advice}")
    error = norm([a - b for a, b in zip(_gradient(out, case.lm), case.gradient, strict=True)]) / norm(case.gradient)
    if not error <= _TOLERANCE:
        raise ClauseError(f"with more padding the gradient is off by {error:.1e}; {advice}")


@SUITE.clause(
    "Sums, gradients, denominators, metrics and statistics of micro-batches add up to those of the whole batch.",
    needs=["padding-changes-nothing"],
)
def splits(case: _Case) -> None:
    if getattr(case.loss, "batch_statistic", False):
        raise ExemptError(
            "the loss declares batch_statistic: it depends on the whole micro-batch, which a run never splits"
        )
    outs = [case.run(case.lm, batch) for batch in case.batches]
    values = {
        "sum": ([out.sum.item() for out in outs], case.out.sum.item()),
        "denominator": (
            [float(case.loss.denominator(batch)) for batch in case.batches],
            float(case.loss.denominator(case.batch)),
        ),
    }
    for name in sorted({name for out in (*outs, case.out) for name in out.metrics}):
        reported = [_parts(out.metrics[name]) if name in out.metrics else () for out in (*outs, case.out)]
        for number, what in enumerate(("", " (count)")[: max(map(len, reported))]):
            *parts, total = (float(one[number].detach()) if one else 0.0 for one in reported)
            values[f"metrics[{name!r}]{what}"] = (parts, total)
    for name, total_of_step in case.batch.statistics.items():
        values[f"statistics[{name!r}]"] = ([float(case.batches[0].statistics[name])], float(total_of_step))
    for name, (parts, total) in values.items():
        if not _close(sum(parts), total, scale=sum(map(abs, parts))):
            raise ClauseError(
                f"{name} is {total:.6g} for {len(parts)} groups of examples in one batch, and {sum(parts):.6g} in all "
                "when each group is a batch; return sums and not means, and let no example depend on the others, or "
                "only through `statistics`"
            )
    gradients = [_gradient(out, case.lm) for out in outs]
    summed = [torch.stack(parts).sum(0) for parts in zip(*gradients, strict=True)]
    error = norm([a - b for a, b in zip(summed, case.gradient, strict=True)]) / norm(case.gradient)
    if not error <= _TOLERANCE:
        raise ClauseError(
            f"the gradients of {len(outs)} micro-batches add up to that of the whole batch with an error of "
            f"{error:.1e}; let no example depend on the others, not even without a gradient"
        )


@SUITE.clause("Hidden states at positions whose label is ignored do not matter.", needs=["returns-a-sum"])
def trains_only_labels(case: _Case) -> None:
    labels_BT = case.batch.labels_BT
    ignored_BT1 = (labels_BT == IGNORE_INDEX)[..., None]

    def add_noise(module: nn.Module, args: Any, out: Any) -> Any:
        hidden_BTD: Tensor = out.last_hidden_state
        if hidden_BTD.shape[:2] == labels_BT.shape:  # not for rows that the loss itself has rearranged
            generator = torch.Generator().manual_seed(0)
            noise_BTD = torch.randn(hidden_BTD.shape, generator=generator, dtype=hidden_BTD.dtype)
            out.last_hidden_state = torch.where(ignored_BT1, hidden_BTD + noise_BTD, hidden_BTD)
        return out

    handle = case.lm.model.get_decoder().register_forward_hook(add_noise)
    try:
        total = case.run(case.lm, case.batch).sum.item()
    finally:
        handle.remove()
    expected = case.out.sum.item()
    if not _close(total, expected):
        raise ClauseError(
            f"other hidden states where labels_BT is IGNORE_INDEX (prompts, padding) change sum from {expected:.6g} to "
            f"{total:.6g}; take only the positions that have a label"
        )


@SUITE.clause(
    "The gradient of the trained parameters is that of the sum, by central differences.", needs=["returns-a-sum"]
)
def right_gradient(case: _Case) -> None:
    if getattr(case.loss, "detached", False):
        raise ExemptError("the loss declares detached: its gradient is on purpose not that of its value")
    length = norm(case.gradient)
    generator = torch.Generator().manual_seed(0)
    directions = [("along itself", [gradient / length for gradient in case.gradient], _GRADIENT_STEP)]
    for _ in range(2):
        random = [torch.randn(g.shape, generator=generator, dtype=g.dtype) for g in case.gradient]
        directions.append(("along a random direction", random, _RANDOM_STEP))
    for name, direction, step in directions:
        expected = math.fsum(float((g * d).sum()) for g, d in zip(case.gradient, direction, strict=True))
        slope = _slope(case, direction, step)
        if not abs(slope - expected) <= _GRADIENT_TOLERANCE * length:
            slope = _slope(case, direction, step / 3)
        if not abs(slope - expected) <= _GRADIENT_TOLERANCE * length:
            raise ClauseError(
                f"{name} the gradient (of norm {length:.4g}) is {expected:.4g}, and the sum changes by {slope:.4g}; "
                "look for a detach(), a no_grad() or a custom backward that leaves something out"
            )


def _slope(case: _Case, direction: Sequence[Tensor], step: float) -> float:
    """Return the derivative of the sum: (8 (f(h) - f(-h)) - (f(2h) - f(-2h))) / 12h, whose error is of order h^4.

    Abramowitz and Stegun, table 25.2. The parameters are restored bit for bit.
    """
    parameters = _trained(case.lm)
    original = [parameter.detach().clone() for parameter in parameters]

    def move(distance: float) -> None:
        with torch.no_grad():
            for parameter, start, along in zip(parameters, original, direction, strict=True):
                parameter.copy_(start + distance * along if distance else start)

    def value(distance: float) -> float:
        move(distance)
        return case.run(case.lm, case.batch).sum.item()

    try:
        return (8 * (value(step) - value(-step)) - (value(2 * step) - value(-2 * step))) / (12 * step)
    finally:
        move(0)


@SUITE.clause("The weights of tokens matter: with other weights the sum is different.", needs=["right-gradient"])
def obeys_the_weights(case: _Case) -> None:
    shape = case.batch.labels_BT.shape
    weights_BT = torch.linspace(0.5, 2.0, shape.numel()).view(shape)
    weighted, plain = (
        case.run(case.lm, dataclasses.replace(case.batch, token_weights_BT=weights)).sum.item()
        for weights in (weights_BT, None)
    )
    if _close(weighted, plain):
        raise ClauseError(
            f"sum is {weighted:.6g} whatever token_weights_BT says, so that weights in the data are silently ignored; "
            "multiply each token's loss by its weight"
        )


def check_loss(plugin: object, *, model: Path | None = None) -> None:
    """Check the plugin's loss. Raises ContractError, which names the broken clauses.

    `model` is a directory with a model and tokenizer to use instead of the tiny ones.
    """
    SUITE.check(plugin, model=model)


def _trained(lm: CausalLM) -> list[nn.Parameter]:
    return [parameter for parameter in lm.parameters() if parameter.requires_grad]


def _seed(lm: CausalLM) -> None:
    lm.seed.fill_(1)
    torch.manual_seed(1)


def _gradient(out: LossSum, lm: CausalLM) -> list[Tensor]:
    return list(torch.autograd.grad(out.sum, _trained(lm), retain_graph=True, materialize_grads=True))


def _run_and_compare(case: _Case, *, training: bool) -> LossSum:
    """Return the loss of the batch in fp32. Raises ClauseError when the loss changed something."""
    lm = case.lm_fp32
    with random_states_kept(), torch.set_grad_enabled(training):
        lm.train(training)
        _seed(lm)
        batch, before, random_before = copy_of(case.batch), _state(lm, case.batch), random_states()
        out = case.loss(lm, batch)
        drawn = changed_random_states(random_before)
        after = _state(lm, case.batch)
    if changed := [name for name in before if not identical(before[name], after[name])]:
        raise ClauseError(
            f"after the loss, {changed[0]} is not what it was; undo what you switch, best in a `with` block such as "
            "lm.without_adapters(), and leave backward() and updates to the trainer"
        )
    if fields := differences(batch, case.batch):
        raise ClauseError(f"it wrote into the batch's {', '.join(fields)}, which is used again; copy it first")
    if drawn:
        raise ClauseError(
            f"it drew from or seeded {drawn}; derive random numbers from lm.seed, so that a recomputed forward draws "
            "the same ones"
        )
    return out


def _state(lm: CausalLM, batch: Batch) -> dict[str, object]:
    """Return everything that a loss must not change, by its name in an error message."""
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


def _tensors(out: LossSum) -> dict[str, Any]:
    """Return what must be scalars, by its name in an error message."""
    aux_loss = {} if out.aux_loss is None else {"aux_loss": out.aux_loss}
    metrics = {
        f"metrics[{name!r}]" + f"[{number}]" * (len(_parts(value)) > 1): part
        for name, value in out.metrics.items()
        for number, part in enumerate(_parts(value))
    }
    return {"sum": out.sum, **aux_loss, **metrics}


def _parts(metric: Any) -> tuple[Any, ...]:
    """Return a metric's sum, and its count if it has one of its own."""
    return metric if isinstance(metric, tuple) else (metric,)


def _close(value: float, expected: float, *, scale: float = 0.0) -> bool:
    return abs(value - expected) <= _TOLERANCE * max(abs(expected), scale)
