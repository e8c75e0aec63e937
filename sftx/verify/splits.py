"""The same rows split in several ways: one micro-batch, several, each example alone, two processes.

All of it is computed with the run's own model, loss, collator and precision, on a window of its training examples.
Dropout is off, since its masks depend on the place of a row. Parameters of adapters that begin at 0, such as LoRA's B,
are moved a little: the gradient of A would be 0.

Dimensions: E examples.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from sftx.config.loading import LoadedConfig
from sftx.data.collate import groups_of, pad, sum_by_example
from sftx.data.example_values import Values, places_of
from sftx.data.sampler import PlannedStep
from sftx.distributed.dtensor import full_tensor
from sftx.errors import SftxError, counted, one_line
from sftx.trainer.layers import decoder_layers
from sftx.trainer.session import Session
from sftx.trainer.trainer import MicroBatch
from sftx.training import assembled
from sftx.types import Batch, Example
from sftx.verify.findings import FailedError, Finding, NotCheckedError

_MAX_GROUPS: Final = 8
_UNEVEN: Final = 2.0
_LOOKED_AT: Final = 256
"""So many groups of examples at the beginning of the data are looked at for the window."""
_MOVED: Final = 0.02
"""The standard deviation that parameters of adapters get which begin at 0."""

TOLERANCES: Final[Mapping[torch.dtype, tuple[float, float]]] = {
    torch.float32: (1e-5, 1e-4),
    torch.bfloat16: (2e-2, 8e-2),
    torch.float16: (2e-3, 1e-2),
}
"""The largest differences that are rounding: of a loss, relative to it, and of a gradient, relative to its norm.

They differ by the order of additions alone. docs/verify.md says what was measured.
"""


@dataclass(frozen=True)
class _Sums:
    """Loss and gradient of the window, computed in one way."""

    loss: float
    gradients: dict[str, Tensor]
    """By the names of the parameters, fp32, on the CPU."""


def compare_splits(loaded: LoadedConfig, reference: Path) -> dict[str, Any]:
    """Assemble the run in this process; return its start report, its warnings and the findings about splits.

    `reference` gets the loss and the gradient of the window, for `compare_processes`. Raises SftxError when the run
    does not start.
    """
    warnings = _Warnings()
    logging.getLogger("sftx").addHandler(warnings)
    with assembled(loaded) as session:
        findings = [
            _finding("accumulation", lambda: _check_accumulation(_Window.of(session), reference)),
            _finding("packing", lambda: _check_packing(_Window.of(session))),
        ]
        return {
            "report": dataclasses.asdict(session.start_report),
            "warnings": warnings.messages,
            "findings": [dataclasses.asdict(finding) for finding in findings],
        }


class _Warnings(logging.Handler):
    """Collects the warnings of a run."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.messages: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.messages.append(record.getMessage())


def _finding(check: str, make: Callable[[], Finding]) -> Finding:
    try:
        return make()
    except NotCheckedError as error:
        return Finding(check, "not checked", str(error))
    except FailedError as error:
        return Finding(check, "failed", str(error), error.figures)
    except SftxError as error:
        return Finding(check, "failed", one_line(error))


def compare_processes(loaded: LoadedConfig, reference: Path) -> dict[str, Any] | None:
    """Compute the window as a rank of several, and return the finding; only that of rank 0 is looked at."""
    torch.set_num_threads(max(1, torch.get_num_threads() // 2))
    with assembled(loaded) as session:
        described = json.loads(reference.with_suffix(".json").read_text(encoding="utf-8"))
        window = _Window(session, described["indices"])
        window.settle()
        sums = window.sums(1)
        if not session.process_group.is_rank0:
            return None
        expected = _Sums(described["loss"], load_file(reference))
        size = session.process_group.world_size
        kind = f"{session.config.train.distributed}, {session.lm.device.type}"
        what = f"{counted(len(window.groups), 'row')} in {size} processes ({kind}) and in one"
        return dataclasses.asdict(
            _finding("processes", lambda: _compared("processes", what, window, {f"{size} processes": sums}, expected))
        )


@dataclass
class _Window:
    """A few groups of examples that fit into the memory of one micro-batch of the run, as a step."""

    session: Session
    indices: list[list[int]]
    """Of each group, the places of its examples among those of the sampler."""

    @classmethod
    def of(cls, session: Session) -> _Window:
        """Choose groups whose padded tokens are at most those of the run's largest micro-batch. Raises NotCheckedError.

        Those that are taken differ in their label tokens, by a factor of two at least where there are such: of equal
        ones the mean of means is the mean.
        """
        if session.rollout is not None:
            raise NotCheckedError("the examples of a rollout are answers that the model samples while it trains")
        if session.trainer.loss.batch_statistic:
            raise NotCheckedError(
                f"{session.trainer.loss} compares the examples of a step with one another, and computes them at once"
            )
        examples = session.sampler.examples
        groups: dict[int, list[int]] = {}
        for index in range(min(len(examples), _LOOKED_AT)):
            groups.setdefault(examples[index].group, []).append(index)
        if len(examples) > _LOOKED_AT and len(groups) > 1:
            groups.popitem()  # it may go on
        lengths = {group: max(len(examples[n].token_ids) for n in of) * len(of) for group, of in groups.items()}
        row_length = session.trainer.collator.row_length or max(lengths.values(), default=0)
        budget = session.config.train.micro_batch_size * max(row_length, *lengths.values(), 1)
        if len(groups) < 2:
            raise NotCheckedError("there is one training example, which cannot be split")
        num_labels = {group: sum(examples[n].num_label_tokens for n in of) for group, of in groups.items()}
        best, best_factor = sorted(lengths, key=lambda group: lengths[group])[:2], 0.0  # of any size
        for num in range(min(_MAX_GROUPS, len(groups)), 1, -1):
            fitting = [group for group, length in lengths.items() if length * num <= budget]
            if len(fitting) < num:
                continue
            fitting.sort(key=lambda group: num_labels[group])
            chosen = [fitting[n * (len(fitting) - 1) // (num - 1)] for n in range(num)]
            factor = num_labels[chosen[-1]] / max(1, num_labels[chosen[0]])
            if factor > best_factor:
                best, best_factor = chosen, factor
            if factor >= _UNEVEN:
                break
        return cls(session, [groups[group] for group in sorted(best)])

    def __post_init__(self) -> None:
        examples = self.session.sampler.examples
        self.examples: list[Example] = [examples[index] for of in self.indices for index in of]
        self.groups = groups_of(self.examples)

    @property
    def num_label_tokens(self) -> list[int]:
        """Label tokens of each group."""
        return [sum(example.num_label_tokens for example in group) for group in self.groups]

    def settle(self) -> None:
        """Turn off what is random, move adapters away from 0, and compute what the loss computes before training."""
        session = self.session
        lm, trainer = session.lm, session.trainer
        lm.eval()
        if session.config.train.gradient_checkpointing:
            for layer in decoder_layers(lm.model):
                layer.training = True  # layers are recomputed in training mode alone; dropout is in modules within
        if lm.has_router_loss:
            lm.config.output_router_logits = False  # the loss depends on which tokens share a micro-batch
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for parameter in trainer.parameters if lm.adapters else ():
                if not parameter.any():
                    parameter.copy_(torch.randn(parameter.shape, generator=generator) * _MOVED)
        trainer.precomputed = None
        if trainer.loss.has_precompute:
            trainer.precomputed = trainer.strategy.step.call_in_forward(self._precompute)

    def _precompute(self) -> Values:
        """Return what the loss computes of the examples with the model as it was before its adapters were moved."""
        trainer, columns = self.session.trainer, dict[str, list[Any]]()
        lm = trainer.lm
        with torch.no_grad(), trainer.precision.autocast(), lm.without_adapters():
            for group in self.groups:
                batch = trainer.loss.with_extras(trainer.collator.collate(group))
                places = places_of(batch, group)
                for name, value_E in trainer.loss.precompute(lm, batch.to(lm.device)).items():
                    column = np.empty(len(group), np.float32)
                    column[places] = value_E.cpu().numpy()
                    columns.setdefault(name, []).append(column)
        return Values({name: np.concatenate(parts) for name, parts in columns.items()})

    def micro_batches(self, groups_at_once: int) -> list[MicroBatch]:
        """Return this process's micro-batches of the window, as the trainer makes those of a step."""
        trainer, at, rows = self.session.trainer, 0, []
        for group in self.groups:
            rows.append(tuple(range(at, at + len(group))))
            at += len(group)
        lengths = np.array([len(example.token_ids) for example in self.examples], np.int64)
        trainer.config = dataclasses.replace(trainer.config, per_device_train_batch_size=groups_at_once)
        return trainer.micro_batches(PlannedStep(0.0, tuple(rows), self.examples, lengths))

    def sums(self, groups_at_once: int) -> _Sums:
        return self.sums_of(self.micro_batches(groups_at_once))

    def sums_of(self, micro_batches: Sequence[MicroBatch]) -> _Sums:
        """Return loss and gradient of the window, over all processes. Raises SftxError."""
        trainer = self.session.trainer
        total = trainer.process_group.all_reduce_sum([sum(one.denominator for one in micro_batches)])[0]
        trainer.loss.check_total(total)
        trainer.optimizer.zero_grad()
        loss, _ = trainer.accumulate(micro_batches, total, 0)
        scale = trainer.scaler.get_scale() if trainer.scaler.is_enabled() else 1.0
        named = [(name, p) for name, p in trainer.lm.named_parameters() if p.grad is not None]
        gradients = {name: full_tensor(p.grad).float().cpu() / scale for name, p in named if p.grad is not None}
        trainer.optimizer.zero_grad()
        return _Sums(loss.item(), gradients)


def _check_accumulation(window: _Window, reference: Path) -> Finding:
    """Compare the window in one micro-batch with the same in several."""
    window.settle()
    num = len(window.groups)
    together = window.sums(num)
    flat = {"indices": window.indices, "loss": together.loss}
    reference.with_suffix(".json").write_text(json.dumps(flat), encoding="utf-8")
    save_file({name: gradient.contiguous() for name, gradient in together.gradients.items()}, reference)
    sizes = sorted({max(1, num // 2), 1}, reverse=True)
    several = {f"micro-batches of {size}": window.sums(size) for size in sizes}
    *some, most = [str(-(-num // size)) for size in (num, *sizes)]
    labels = window.num_label_tokens
    what = (
        f"{counted(num, 'row')} of {min(labels)} to {max(labels)} label tokens in {', '.join(some)} and {most} "
        "micro-batches"
    )
    return _compared("accumulation", what, window, several, together)


def _check_packing(window: _Window) -> Finding:
    """Compare the run's own batch with each group alone, padded by `pad`."""
    window.settle()
    trainer = window.session.trainer
    together = window.micro_batches(len(window.groups))
    batch = together[0].batch
    plain = trainer.collator.collate(window.examples)
    alone, at = [], 0
    for group in window.groups:
        # What a collator adds to its batches, only it can add to those of a group.
        one = trainer.collator.collate(group) if plain.extras else pad(group)
        if trainer.precomputed is not None:
            one = trainer.precomputed.add_to(one, range(at, at + len(group)), group)
        one = trainer.loss.with_extras(one)
        alone.append(MicroBatch(one, trainer.loss.denominator(one)))
        at += len(group)
    how = "packed" if batch.cu_seqlens is not None else "padded"
    what = f"{counted(len(window.examples), 'example')} {how} into one batch, and each alone"
    finding = _compared("packing", what, window, {f"{how} together": window.sums_of(together)}, window.sums_of(alone))
    losses = _losses(window.session, batch)
    expected = {row: loss for one in alone for row, loss in _losses(window.session, one.batch).items()}
    worst, difference = max(
        ((row, abs(losses[row] - loss) / max(1.0, abs(loss))) for row, loss in expected.items()),
        key=lambda pair: pair[1],
    )
    figures = {**finding.figures, "example_loss_difference": difference}
    allowed = _tolerances(window.session)[0]
    if not difference <= allowed:
        raise FailedError(
            f"{what}: the loss of {worst} is {losses[worst]:.5g} in the batch and {expected[worst]:.5g} alone, "
            f"{difference:.1e} apart, at most {allowed:.0e} is rounding",
            **figures,
        )
    return dataclasses.replace(
        finding, seen=f"{finding.seen}, losses of single examples {_shown(difference)}", figures=figures
    )


@torch.no_grad()
def _losses(session: Session, batch: Batch) -> dict[str, float]:
    """Return the cross-entropy of the label tokens of each example by its row id, summed."""
    lm = session.lm
    batch = batch.to(lm.device)
    with session.trainer.precision.autocast():
        hidden_BTD = lm.hidden(batch).hidden_BTD
        out = lm.cross_entropy(hidden_BTD, batch.labels_BT, num_valid=batch.num_label_tokens, reduction="none")
    losses_E = sum_by_example(batch, out.loss)
    return dict(zip(batch.row_ids, losses_E.tolist(), strict=True))


def _compared(check: str, what: str, window: _Window, ways: Mapping[str, _Sums], expected: _Sums) -> Finding:
    """Return the finding about ways to compute the window. Raises FailedError for more than rounding."""
    norm = _norm(expected.gradients)
    if not (math.isfinite(expected.loss) and math.isfinite(norm) and norm > 0):
        raise FailedError(f"{what}: the loss is {expected.loss:g} and the norm of its gradient {norm:g}")
    allowed_loss, allowed = _tolerances(window.session)
    worst_loss = worst = 0.0
    for way, sums in ways.items():
        loss = abs(sums.loss - expected.loss) / max(abs(expected.loss), 1e-12)
        gradient = _distance(sums.gradients, expected.gradients) / norm
        if not (loss <= allowed_loss and gradient <= allowed):
            raise FailedError(
                f"{what}: {way} give the loss {sums.loss:.6g} for {expected.loss:.6g}, and a gradient that is "
                f"{gradient:.1e} of its norm away; at most {allowed_loss:.0e} and {allowed:.0e} are rounding",
                loss_difference=loss,
                gradient_difference=gradient,
                tolerance=allowed,
            )
        worst_loss, worst = max(worst_loss, loss), max(worst, gradient)
    return Finding(
        check,
        "passed",
        f"{what}: losses {_shown(worst_loss)} apart, gradients {_shown(worst)} (rounding: at most {allowed_loss:.0e} "
        f"and {allowed:.0e})",
        {"loss_difference": worst_loss, "gradient_difference": worst, "tolerance": allowed},
    )


def _shown(difference: float) -> str:
    return f"{difference:.1e}" if difference else "0"


def _tolerances(session: Session) -> tuple[float, float]:
    return TOLERANCES[session.trainer.precision.dtype]


def _norm(gradients: Mapping[str, Tensor]) -> float:
    return math.sqrt(sum(float(gradient.double().square().sum()) for gradient in gradients.values()))


def _distance(ours: Mapping[str, Tensor], theirs: Mapping[str, Tensor]) -> float:
    """Return the norm of the difference; a parameter without a gradient has one of 0."""
    total = 0.0
    for name in ours.keys() | theirs.keys():
        pair = [gradients[name].double() for gradients in (ours, theirs) if name in gradients]
        total += float((pair[0] - pair[1] if len(pair) == 2 else pair[0]).square().sum())
    return math.sqrt(total)
