"""Compares an export, loaded back by a reader that is not its writer, with the run: prompts, stop tokens, answers.

The run answers a few questions greedily. The export then computes logits along these answers (teacher forcing), so that
one other token does not make all later ones differ, and a rounded model is compared position by position.

Dimensions: A tokens of an answer, V vocabulary, T tokens.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

import torch
from torch import Tensor

from sftx.assembly.stages.exporter_stages import ExportedStage
from sftx.checkpoint.load_run import LoadedRun
from sftx.checkpoint.questions import ComparedPrompt
from sftx.errors import PluginError, counted
from sftx.types import Rounding

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

MAX_NEW_TOKENS: Final = 64
"""Most tokens of an answer that is compared."""
_NUM_CONTEXT_CHARS: Final = 40


@dataclass(frozen=True)
class Bound:
    """How near an export must be to the run."""

    tie: float
    """A token may be another one where the run prefers its own by less than this, in logits: a tie of rounding."""
    divergence: float
    """Largest mean of KL(run || export) over the tokens, in nats."""
    agreement: float
    """Smallest share of tokens, ties left out, that are chosen as by the run."""


BOUNDS: Final[Mapping[Rounding, Bound]] = {
    "none": Bound(tie=1e-3, divergence=1e-6, agreement=1.0),
    "half": Bound(tie=0.1, divergence=1e-3, agreement=1.0),
    "8-bit": Bound(tie=0.25, divergence=5e-3, agreement=0.98),
    "4-bit": Bound(tie=0.5, divergence=0.5, agreement=0.75),
}
"""Measured on SmolLM2-135M with LoRA after 30 steps of the demo and without, over 415 tokens: docs/exporting.md."""


@dataclass(frozen=True)
class ComparedAnswer:
    """The run's greedy answer to a question, and what it computed along it."""

    question: ComparedPrompt
    token_ids: list[int]
    """Its tokens, with the stop token where it came to one."""
    logits_AV: Tensor
    """fp32, after which each of the tokens was chosen."""
    base_logits_AV: Tensor | None
    """Those of the model without its adapters, along the same tokens; None where it has none."""


@dataclass(frozen=True)
class Verification:
    """A Verification says what was compared, and how near the export is."""

    reader: str
    kind: str
    """Of the questions: `held-out rows`, `training rows` or `sample questions`."""
    rounding: Rounding
    num_questions: int
    num_tokens: int
    num_agreeing: int
    """Tokens that the export chooses too."""
    ties: tuple[str, ...]
    """Tokens that it chooses otherwise, where the run's own margin is one of rounding."""
    largest_difference: float
    """Of two logits."""
    divergence: float
    """Mean of KL(run || export) over the tokens, in nats."""

    def __str__(self) -> str:
        same = "all" if self.num_agreeing == self.num_tokens else f"{self.num_agreeing:,} of"
        ties = f"; {counted(len(self.ties), 'tie')} of rounding" if self.ties else ""
        return (
            f"read by {self.reader}: the run's prompts and stop tokens, and {same} {counted(self.num_tokens, 'token')} "
            f"of its {counted(self.num_questions, 'answer')} ({self.kind}{ties}); largest difference of a logit "
            f"{self.largest_difference:.1e}, mean KL divergence {self.divergence:.1e}"
        )


@torch.no_grad()
def ask(run: LoadedRun, questions: Sequence[ComparedPrompt]) -> list[ComparedAnswer]:
    """Return the run's answers, computed with its adapters attached."""
    prompts = [question.token_ids for question in questions]
    answers = []
    for question, ids in zip(questions, run.answer(prompts, max_new_tokens=MAX_NEW_TOKENS), strict=True):
        logits_AV = _logits(run, question, ids)
        token_ids = list(ids)
        if len(ids) < MAX_NEW_TOKENS:  # it came to a stop token, which `answer` leaves out
            stop_ids = torch.tensor(run.stop_ids)
            token_ids.append(int(stop_ids[logits_AV[-1, stop_ids].argmax()]))
        base_logits_AV = None
        if run.lm.adapters:
            with run.lm.without_adapters():
                base_logits_AV = _logits(run, question, ids)[: len(token_ids)]
        answers.append(ComparedAnswer(question, token_ids, logits_AV[: len(token_ids)], base_logits_AV))
    return answers


def _logits(run: LoadedRun, question: ComparedPrompt, answer_ids: Sequence[int]) -> Tensor:
    """Return the logits from the last token of the prompt to the last of the answer, [A + 1, V]."""
    ids_BT = torch.tensor([[*question.token_ids, *answer_ids]], device=run.lm.device)
    with run.lm.ignoring_extras(), run.autocast():
        model: Any = run.lm.model
        logits_TV: Tensor = model(input_ids=ids_BT, use_cache=False).logits[0]
    return logits_TV[len(question.token_ids) - 1 :].float().cpu().clone()


@torch.no_grad()
def verify(
    kind: str,
    answers: Sequence[ComparedAnswer],
    exported: ExportedStage,
    tokenizer: PreTrainedTokenizerBase,
    stop_ids: Sequence[int],
    rounding: Rounding,
) -> Verification:
    """Compare an export with the run's `answers`, to questions of this `kind`. Raises PluginError when it differs.

    `tokenizer` and `stop_ids` are the run's; `rounding` is that of the weights, which decides the bound.
    """

    def text(token_id: int) -> str:
        return repr(tokenizer.decode([token_id])) if token_id < len(tokenizer) else f"the token {token_id}"

    if lost := [text(token_id) for token_id in stop_ids if token_id not in exported.stop_ids]:
        raise _refuse(exported, f"a stop token is missing, {', '.join(lost)}: its answers would not end")
    for answer in answers:
        _check_prompt(answer.question, exported, tokenizer)

    bound, found = BOUNDS[rounding], _Found()
    for answer in answers:
        ids = [*answer.question.token_ids, *answer.token_ids[:-1]]
        logits_AV = exported.logits(ids)[len(answer.question.token_ids) - 1 :]
        V = answer.logits_AV.shape[1]
        if logits_AV.shape[1] < V:
            raise _refuse(
                exported, f"it has logits of {logits_AV.shape[1]:,} tokens, the run of {V:,}: another vocabulary"
            )
        found.add(answer, logits_AV[:, :V], bound, text)
    share = 1 - len(found.others) / found.num_tokens
    divergence = max(0.0, found.divergence) / found.num_tokens  # below 0 by rounding alone
    if share < bound.agreement or not divergence <= bound.divergence:
        first = f"; {found.others[0]}" if found.others else ""
        raise _refuse(
            exported,
            f"{_cause(found, rounding)}: of {counted(found.num_tokens, 'token')} it chooses {found.num_agreeing:,} as "
            f"the run, mean KL divergence {divergence:.1e} (with rounding {rounding!r} at most {bound.divergence:.0e})"
            f"{first}",
        )
    return Verification(
        reader=exported.reader,
        kind=kind,
        rounding=rounding,
        num_questions=len(answers),
        num_tokens=found.num_tokens,
        num_agreeing=found.num_agreeing,
        ties=tuple(found.ties),
        largest_difference=found.largest,
        divergence=divergence,
    )


def _refuse(exported: ExportedStage, what: str) -> PluginError:
    return PluginError(
        f"{exported}: what it wrote does not answer as the run does, read back by {exported.reader}: {what}; nothing "
        "is kept, and --no-verify would keep it all the same"
    )


def _check_prompt(question: ComparedPrompt, exported: ExportedStage, tokenizer: PreTrainedTokenizerBase) -> None:
    """Raise PluginError where the export's template or tokenizer give another prompt than the run's."""
    if question.messages:
        ids = exported.prompt(question.messages, question.tools)
    elif exported.can_encode:
        text = str(tokenizer.decode(question.token_ids, skip_special_tokens=True))
        ids, expected = exported.encode(text), list(tokenizer(text).input_ids)
        if ids != expected:
            raise _refuse(exported, f"another vocabulary or tokenizer: {text!r} has the ids {ids}, expected {expected}")
        return
    else:
        return
    if ids == question.token_ids:
        return
    at = next((n for n, (a, b) in enumerate(zip(ids, question.token_ids, strict=False)) if a != b), None)
    at = min(len(ids), len(question.token_ids)) if at is None else at
    probe = "".join(str(message.get("content") or "") for message in question.messages)
    part = "template or tokenizer"
    if exported.can_encode:
        is_same = exported.encode(probe) == list(tokenizer(probe).input_ids)
        part = "chat template" if is_same else "vocabulary or tokenizer"
    before = str(tokenizer.decode(question.token_ids[:at]))[-_NUM_CONTEXT_CHARS:]
    own, other = (
        repr(str(tokenizer.decode(rest[at : at + 8]))) if rest[at:] else "nothing"
        for rest in (question.token_ids, [i for i in ids if i < len(tokenizer)])
    )
    raise _refuse(
        exported,
        f"another {part}: the prompt of {question.name} differs from token {at} on, after {before!r}, where the run "
        f"has {own} and the export {other}",
    )


class _Found:
    """Adds up what the comparison of several answers finds."""

    def __init__(self) -> None:
        self.num_tokens = self.num_agreeing = 0
        self.divergence = self.largest = 0.0
        self.is_finite = True
        self.ties: list[str] = []
        self.others: list[str] = []
        """Tokens that are chosen otherwise and are no ties, each as half a sentence."""
        self.size = self.effect = self.rest = 0.0
        """Of what the adapters change by the run: its square, its product with what the export changes, and the square
        of that."""

    def add(self, answer: ComparedAnswer, logits_AV: Tensor, bound: Bound, text: Any) -> None:
        own_AV = answer.logits_AV
        self.is_finite = self.is_finite and bool(logits_AV.isfinite().all())
        self.largest = max(self.largest, float((logits_AV - own_AV).abs().max()))
        # In fp64: rounding in fp32 would be as large as what is compared, where the vocabulary is.
        own_log_AV, log_AV = own_AV.double().log_softmax(-1), logits_AV.double().log_softmax(-1)
        self.divergence += float((own_log_AV.exp() * (own_log_AV - log_AV)).sum())
        for n, (token, other) in enumerate(zip(answer.token_ids, logits_AV.argmax(-1).tolist(), strict=True)):
            self.num_tokens += 1
            if token == other:
                self.num_agreeing += 1
                continue
            margin = float(own_AV[n, token] - own_AV[n, other])
            what = (
                f"{answer.question.name}, token {n + 1} of the answer: {text(token)} by the run, {text(other)} by the "
                f"export, which the run rates {margin:.2g} lower"
            )
            (self.ties if margin < bound.tie else self.others).append(what)
        if answer.base_logits_AV is not None:
            trained_AV, other_AV = own_AV - answer.base_logits_AV, logits_AV - answer.base_logits_AV
            self.effect += float((trained_AV * other_AV).sum())
            self.size += float((trained_AV * trained_AV).sum())
            self.rest += float((other_AV * other_AV).sum())


def _cause(found: _Found, rounding: Rounding) -> str:
    """Return which kind of fault the logits look like.

    What the adapters change of the base's logits is compared: by the run, and by the export. The second is taken apart
    into a multiple of the first, and a rest that has nothing to do with it.
    """
    if not found.is_finite:
        return "its logits are not finite, as with a weight too large for float16; take bfloat16"
    too_far = f"weights that are rounded too far ({rounding}), or " if rounding in ("8-bit", "4-bit") else ""
    if found.size > 0:
        if found.rest < 0.01 * found.size:
            return "it answers as the base model does, without the adapters"
        if found.rest - found.effect**2 / found.size < 0.25 * found.size:
            return (
                f"the adapters have another effect than in the run, as with {too_far}a scaling (lora_alpha / r) that "
                "is missing or wrong, or with layers whose update is missing or transposed"
            )
    return (
        f"other weights, as with {too_far}updates that are transposed, or a head that is tied to the embedding or "
        "untied from it wrongly"
    )
