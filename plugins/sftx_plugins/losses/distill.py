"""Distillation: the divergence of the label tokens' distribution from a teacher's; no logits are materialised.

Dimensions: B rows, T tokens, N = B*T, L tokens with stored log-probabilities, M label tokens, K log-probabilities each.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Final, Literal, overload

from pydantic import Field

from sftx import (
    IGNORE_INDEX,
    Batch,
    ConfigError,
    DataError,
    Loss,
    LossSum,
    Parser,
    RunInfo,
    hookimpl,
    per_label,
)
from sftx_plugins.parsers._teacher import IDS, TeacherRows, stored

if TYPE_CHECKING:
    from torch import Tensor

    from sftx import LanguageModel
    from sftx_kernels import TeacherHead, TopK

_IDS: Final = "teacher_ids_MK"
_LOG_PROBS: Final = "teacher_log_probs_MK"
"""Keys of a batch's extras."""


@dataclass(frozen=True, eq=False)
class Distill:
    """Trains a student to predict what a teacher predicts: a second model, or log-probabilities stored with the rows.

    The loss of a label token is (1 - alpha) * divergence + alpha * cross-entropy on the label.
    """

    teacher: Annotated[
        str | None,
        Field(
            description="The model to learn from, with the same tokenizer: a directory, a hub id or a run directory; "
            "by default the log-probabilities in the rows."
        ),
    ] = None
    divergence: Annotated[
        Literal["forward", "reverse", "jsd"],
        Field(description="KL(teacher || student), KL(student || teacher), or the generalised Jensen-Shannon."),
    ] = "forward"
    beta: Annotated[
        float, Field(gt=0, lt=1, description="Of jsd: the teacher's share in the mixture that both are compared with.")
    ] = 0.5
    temperature: Annotated[
        float, Field(gt=0, description="Divides the logits of both; above 1, unlikely tokens count for more.")
    ] = 1.0
    alpha: Annotated[
        float, Field(ge=0, le=1, description="Weight of the cross-entropy on the labels, at temperature 1.")
    ] = 0.0
    workspace_mb: Annotated[
        int | None,
        Field(ge=1, le=2**20, description="Largest chunk of the logits of both, in MiB; by default 256 rows on a CPU."),
    ] = None

    @hookimpl
    def sftx_parser(self) -> Parser:
        return TeacherRows()

    @hookimpl
    def sftx_loss(self, run: RunInfo) -> Loss:
        return DistillLoss(self, trust_remote_code=bool(run.config.get("trust_remote_code")))


class DistillLoss:
    """The loss of a run. The teacher is loaded at the first batch, in each process, and never trained or saved."""

    def __init__(self, options: Distill, *, trust_remote_code: bool) -> None:
        self._options = options
        self._trust_remote_code = trust_remote_code
        self._beta = {"forward": 0.0, "reverse": 1.0, "jsd": options.beta}[options.divergence]
        self._student: LanguageModel | None = None
        self._teacher: LanguageModel | None = None

    def denominator(self, batch: Batch) -> float:
        return float(batch.num_label_tokens)

    def extras(self, batch: Batch) -> dict[str, Tensor]:
        """Return the stored log-probabilities of the label tokens, in order; nothing where a model is the teacher.

        Raises ConfigError for rows without them, and DataError for those that do not fit.
        """
        import numpy as np
        import torch

        if self._options.teacher is not None:
            return {}
        places, ids, log_probs = [], [], []
        num_before = 0
        for example in batch.examples:
            kept = stored(example)
            if kept is None:
                raise ConfigError(
                    f"{example.row_id}: has no log-probabilities of a teacher; name a model (distill.teacher), or give "
                    f"rows with {IDS} (sftx data distill writes them)"
                )
            if kept.temperature != self._options.temperature:
                raise ConfigError(
                    f"{example.row_id}: its log-probabilities are of temperature {kept.temperature:g}, and "
                    f"distill.temperature is {self._options.temperature:g}; set it to that of the rows"
                )
            num_tokens = len(example.token_ids)
            if len(kept.places) != num_tokens:
                raise DataError(
                    f"{example.row_id}: was cut to {num_tokens} tokens, and its log-probabilities are of more; raise "
                    "data.max_length, or drop long rows (data.long_rows: drop)"
                )
            if num_tokens == kept.num_tokens and example.num_label_tokens != len(kept.ids_LK):
                raise DataError(
                    f"{example.row_id}: trains {example.num_label_tokens} tokens, and has log-probabilities for "
                    f"{len(kept.ids_LK)}; give {IDS} for every trained token"
                )
            places.append([num_before + place for place in kept.places])
            num_before += len(kept.ids_LK)
            ids.append(kept.ids_LK)
            log_probs.append(kept.log_probs_LK)
            if ids[0].shape[1] != ids[-1].shape[1]:
                raise DataError(
                    f"{example.row_id}: has {ids[-1].shape[1]} log-probabilities for each token, and "
                    f"{batch.examples[0].row_id} has {ids[0].shape[1]}; give each row as many"
                )
        index_M = per_label(batch, places)[batch.labels_BT != IGNORE_INDEX].long()
        ids_LK, log_probs_LK = (torch.from_numpy(np.concatenate(one)) for one in (ids, log_probs))
        return {_IDS: ids_LK[index_M], _LOG_PROBS: log_probs_LK[index_M]}

    def __call__(self, lm: LanguageModel, batch: Batch) -> LossSum:
        import torch

        from sftx_kernels import TeacherHead, linear_kl

        options = self._options
        teacher = self._teacher_of(lm, batch)
        hidden = lm.hidden(batch)
        evaluating = not torch.is_grad_enabled()
        weight_VD, bias_V = lm.head_weight, lm.head_bias
        if isinstance(teacher, TeacherHead):  # one of the heads may have more rows than the tokenizer has tokens
            num_rows = min(len(weight_VD), len(teacher.weight_VH))
            weight_VD, bias_V = _first(weight_VD, num_rows), _first(bias_V, num_rows)
            teacher = teacher._replace(
                weight_VH=_first(teacher.weight_VH, num_rows), bias_V=_first(teacher.bias_V, num_rows)
            )
        out = linear_kl(
            hidden.hidden_BTD.flatten(0, 1),
            weight_VD,
            batch.labels_BT.flatten(),
            teacher,
            bias_V=bias_V,
            token_weights_N=None if batch.token_weights_BT is None else batch.token_weights_BT.flatten(),
            num_valid=batch.num_label_tokens,
            beta=self._beta,
            temperature=options.temperature,
            alpha=options.alpha,
            softcap=lm.softcap,
            logit_scale=lm.logit_scale,
            workspace_bytes=None if options.workspace_mb is None else options.workspace_mb * 2**20,
            stats=evaluating,
        )
        metrics = {"divergence": out.divergence_N.sum()}
        if out.correct_N is not None and out.nll_N is not None:
            metrics |= {"token_accuracy": out.correct_N.sum(), "nll": out.nll_N.sum()}
        return LossSum(out.loss, hidden.aux_loss, metrics)

    def _teacher_of(self, lm: LanguageModel, batch: Batch) -> TeacherHead | TopK:
        """Return what the teacher says of the batch: its hidden states and head, or its stored log-probabilities."""
        import torch

        from sftx import load_model
        from sftx_kernels import TeacherHead, TopK

        if self._options.teacher is None:
            return TopK(batch.extras[_LOG_PROBS], batch.extras[_IDS])
        if self._teacher is None or self._student is not lm:  # in a run the student is one and the same
            self._student = lm
            with torch.random.fork_rng(devices=[]):  # the student's forward is seeded already
                self._teacher = load_model(self._options.teacher, like=lm, trust_remote_code=self._trust_remote_code)
        teacher = self._teacher
        with torch.no_grad():
            hidden_NH = teacher.hidden(batch).hidden_BTD.flatten(0, 1)
        return TeacherHead(hidden_NH, teacher.head_weight, teacher.head_bias, teacher.softcap, teacher.logit_scale)


@overload
def _first(rows: Tensor, num_rows: int) -> Tensor: ...
@overload
def _first(rows: None, num_rows: int) -> None: ...
def _first(rows: Tensor | None, num_rows: int) -> Tensor | None:
    """Return the first rows of a head, the head itself where it has no more."""
    return rows if rows is None or len(rows) == num_rows else rows[:num_rows]
