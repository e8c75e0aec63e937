"""Kahneman-Tversky optimisation (Ethayarajh et al. 2024, https://arxiv.org/abs/2402.01306): answers good or bad."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, ClassVar, Final

from pydantic import Field

from sftx import Batch, DataError, Example, Loss, LossSum, Parser, RunInfo, hookimpl, pack, pad, sum_by_example
from sftx_plugins.preference.pairs import negative_log_probs
from sftx_plugins.preference.records import CHOSEN, PREFERENCE, REJECTED, PreferenceParser
from sftx_plugins.preference.reference import Kind, Reference, check_reference, reference_of

if TYPE_CHECKING:
    from torch import Tensor

    from sftx import LanguageModel

_IS_CHOSEN: Final = "kto_is_chosen_E"
"""The key of a batch's extras that says of each answer whether it is good: [E] bool."""
_REFERENCE: Final = "reference_logps"
_REFERENCE_KL: Final = "reference_kl_logps"
"""The keys of a batch's extras with the reference's log-probability of each answer, and of its mismatched one: [E]."""


@dataclass(frozen=True, eq=False)
class KTO:
    """Trains the model to make good answers more likely and bad ones less, compared with the reference.

    An answer is good or bad by its label; of a pair, the chosen one is good and the rejected one bad.
    """

    beta: Annotated[
        float, Field(gt=0, description="How close the model stays to the reference; lower lets it move further.")
    ] = 0.1
    desirable_weight: Annotated[
        float,
        Field(
            gt=0,
            description="Weight of good answers. Together with undesirable_weight it makes up for unequal numbers: "
            "the paper advises that weight times number of good ones is 1 to 4/3 of that of bad ones.",
        ),
    ] = 1.0
    undesirable_weight: Annotated[float, Field(gt=0, description="Weight of bad answers.")] = 1.0
    reference: Annotated[
        Kind | None,
        Field(
            description="adapters: further forwards of each step, without the adapters; precompute: the reference's "
            "log-probabilities are computed once, before the first step. By default adapters, where lora, qlora or "
            "vera is in the run, else precompute."
        ),
    ] = None
    reference_model: Annotated[
        str | None,
        Field(
            description="Directory or name of another model that is the reference; precomputed. By default the model "
            "itself, as it is before training."
        ),
    ] = None

    @hookimpl
    def sftx_validate(self) -> None:
        check_reference(self.reference, self.reference_model)

    @hookimpl
    def sftx_parser(self) -> Parser:
        return PreferenceParser(labelled=True)

    @hookimpl
    def sftx_loss(self, run: RunInfo) -> Loss:
        reference = reference_of(self.reference, self.reference_model, run)
        return KTOLoss(self, reference, max_length=run.config["data"]["max_length"])


class KTOLoss:
    """Computes 1 - sigmoid(beta (r - z)) for a good answer and 1 - sigmoid(beta (z - r)) for a bad one, times a weight.

    r is log(p(y|x) / p_ref(y|x)) and z an estimate of the distance to the reference, at least 0, without a gradient
    (equation 7): the mean of r over mismatched pairs, each question with the answer to another one, in the whole
    step. Which answer that is does not depend on the step: that of the example half the data away. So the estimate is
    the same however a step is split into micro-batches and among processes. (TRL pairs the questions and answers of one
    micro-batch, where the estimate is that of the micro-batch.)
    """

    answers_only: ClassVar[bool] = True
    shares_prefixes: ClassVar[bool] = True

    def __init__(self, options: KTO, reference: Reference, *, max_length: int) -> None:
        """`max_length`: of an example, to which mismatched ones are cut, in tokens."""
        self._options = options
        self._reference = reference
        self._max_length = max_length
        self._partners: dict[str, tuple[Sequence[Example], int]] = {}
        """By `row_id`, the examples and the number of the one whose answer stands after its question."""
        self.needs_adapter = not reference.is_precomputed
        self.precompute = self._precompute if reference.is_precomputed else None

    def prepare(self, examples: Sequence[Example]) -> None:
        """Choose the partner of each example; one that is alone is its own. Raises DataError for a missing label."""
        num = len(examples)
        for number, example in enumerate(examples):
            _is_chosen(example)
            self._partners[example.row_id] = (examples, (number + num // 2) % num)

    def extras(self, batch: Batch) -> dict[str, Tensor]:
        """Return which answers are good. Raises DataError for a row that does not say."""
        import torch

        return {_IS_CHOSEN: torch.tensor([_is_chosen(example) for example in batch.examples])}

    def denominator(self, batch: Batch) -> float:
        """Return the number of answers."""
        return float(len(batch.examples))

    def _precompute(self, lm: LanguageModel, batch: Batch) -> dict[str, Tensor]:
        mismatched = self._mismatched(batch)
        with self._reference.computing(lm) as reference:
            return {_REFERENCE: _log_probs(reference, batch), _REFERENCE_KL: _log_probs(reference, mismatched)}

    def statistics(self, lm: LanguageModel, batch: Batch) -> dict[str, Tensor]:
        """Return the sum of r over the mismatched pairs, and the numbers of answers and of good ones."""
        self._reference.release()
        mismatched = self._mismatched(batch)
        log_probs_E = _log_probs(lm, mismatched)
        if self._reference.is_precomputed:
            reference_E = batch.extras[_REFERENCE_KL]
        else:
            with self._reference.computing(lm) as reference:
                reference_E = _log_probs(reference, mismatched)
        is_chosen_E = batch.extras[_IS_CHOSEN].to(log_probs_E)
        return {
            "kl": (log_probs_E - reference_E).sum(),
            "num": is_chosen_E.new_tensor(float(len(is_chosen_E))),
            "num_chosen": is_chosen_E.sum(),
        }

    def __call__(self, lm: LanguageModel, batch: Batch) -> LossSum:
        import torch

        options, totals = self._options, batch.statistics
        kl = (totals["kl"] / totals["num"]).clamp(min=0)
        if self._reference.is_precomputed:
            reference_E = batch.extras[_REFERENCE]
        else:
            with self._reference.computing(lm) as reference:
                reference_E = _log_probs(reference, batch)
        nll_N, hidden = negative_log_probs(lm, batch)
        log_probs_E = -sum_by_example(batch, nll_N)
        ratios_E = log_probs_E - reference_E
        is_chosen_E = batch.extras[_IS_CHOSEN]
        distance_E = torch.where(is_chosen_E, ratios_E - kl, kl - ratios_E)
        weights_E = torch.where(is_chosen_E, options.desirable_weight, options.undesirable_weight).to(ratios_E)
        loss_E = weights_E * (1 - torch.sigmoid(options.beta * distance_E))
        return LossSum(loss_E.sum(), hidden.aux_loss, self._metrics(batch, ratios_E, log_probs_E, kl))

    def _metrics(
        self, batch: Batch, ratios_E: Tensor, log_probs_E: Tensor, kl: Tensor
    ) -> dict[str, Tensor | tuple[Tensor, Tensor]]:
        """Return TRL's metrics, each with the number of answers that it is a mean of."""
        totals = batch.statistics
        chosen_E = batch.extras[_IS_CHOSEN].to(ratios_E)
        rewards_E, log_probs_E = self._options.beta * ratios_E.detach(), log_probs_E.detach()
        num = chosen_E.new_tensor(float(len(chosen_E)))
        metrics: dict[str, Tensor | tuple[Tensor, Tensor]] = {"kl": (kl * num, num)}
        for name, own_E in (("chosen", chosen_E), ("rejected", 1 - chosen_E)):
            metrics[f"rewards/{name}"] = ((rewards_E * own_E).sum(), own_E.sum())
            metrics[f"logps/{name}"] = ((log_probs_E * own_E).sum(), own_E.sum())
        # The difference of the two means of the step, of which this micro-batch has a part.
        num_rejected = totals["num"] - totals["num_chosen"]
        has_both = (totals["num_chosen"] > 0) & (num_rejected > 0)
        shares_E = chosen_E / totals["num_chosen"].clamp(min=1) - (1 - chosen_E) / num_rejected.clamp(min=1)
        metrics["rewards/margins"] = ((rewards_E * shares_E).sum() * has_both, num / totals["num"] * has_both)
        return metrics

    def _mismatched(self, batch: Batch) -> Batch:
        """Return the questions of a batch with the answers to others, laid out as the batch is."""
        examples = [self._with_other_answer(example) for example in batch.examples]
        is_padded = batch.cu_seqlens is None
        made = pad(examples) if is_padded else pack(examples, attention=batch.attention)
        return made.to(batch.input_ids_BT.device)

    def _with_other_answer(self, example: Example) -> Example:
        import numpy as np

        examples, number = self._partners[example.row_id]
        partner = examples[number]
        question, answer = _answer_begins(example), _answer_begins(partner)
        token_ids = np.concatenate([example.token_ids[:question], partner.token_ids[answer:]])[: self._max_length]
        loss_mask = np.concatenate([np.zeros(question, np.bool_), partner.loss_mask[answer:]])[: self._max_length]
        weights = None
        if partner.weights is not None:
            weights = np.concatenate([np.ones(question, np.float32), partner.weights[answer:]])[: self._max_length]
        return dataclasses.replace(example, token_ids=token_ids, loss_mask=loss_mask, weights=weights)


def _log_probs(lm: LanguageModel, batch: Batch) -> Tensor:
    """Return the log-probability of each answer: [E]."""
    return -sum_by_example(batch, negative_log_probs(lm, batch)[0])


def _answer_begins(example: Example) -> int:
    """Return the number of the first label token."""
    return 1 + int(example.loss_mask[1:].argmax())


def _is_chosen(example: Example) -> bool:
    side = example.extras.get(PREFERENCE)
    if side not in (CHOSEN, REJECTED):
        raise DataError(
            f"{example.row_id}: does not say whether its answer is good or bad, and kto trains on nothing else; give "
            "it prompt, completion and label, or pairs of chosen and rejected"
        )
    return bool(side == CHOSEN)
