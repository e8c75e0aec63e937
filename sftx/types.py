"""The types that the stages of a run hand to one another, in the order in which data meets them.

record -> Parsed -> Segment -> Example -> Batch -> HiddenOut -> LossSum. Nothing goes back.

Dimensions, as suffixes of tensor names: B rows, T tokens, N = B*T, D hidden, V vocabulary.
Importing this module imports no torch: the tensors below are annotations only.
"""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol, TypeAlias, runtime_checkable

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn
    from transformers import PretrainedConfig, PreTrainedModel

    from sftx.events import EvalReport, StartReport, StepReport
    from sftx.model.language_model import LanguageModel

IGNORE_INDEX = -100
"""The label of a position that is not trained."""

Record: TypeAlias = Mapping[str, Any]
"""One raw row of a source, as JSON values."""


# --- from a record to an example ----------------------------------------------------------------


@dataclass(frozen=True)
class Location:
    """Where a record stands: shown in every error and every entry of the ledger."""

    path: str
    number: int
    """Line (jsonl, json) or row, counted from 1."""
    unit: str = "line"

    def __str__(self) -> str:
        return f"{self.path}:{self.number}" if self.unit == "line" else f"{self.path} {self.unit} {self.number}"


@dataclass(frozen=True)
class ToolCall:
    """A function that the assistant asks to be called."""

    name: str
    arguments: Mapping[str, Any]
    """JSON values by the names of the function's parameters."""
    id: str | None = None
    """What the turn with its result is known by."""


@dataclass(frozen=True)
class Message:
    """One turn of `role` system, user, assistant or tool (the result of a call).

    `trainable=None` leaves it to the run which roles are trained; without further options the assistant's.
    """

    role: str
    content: str
    trainable: bool | None = None
    weight: float = 1.0
    reasoning: str = ""
    """What the assistant thought before `content`, without the tags that a template writes around it."""
    tool_calls: tuple[ToolCall, ...] = ()
    """What the assistant asks for after `content`."""
    name: str | None = None
    """Of the function whose result this is."""
    tool_call_id: str | None = None
    """Of the call whose result this is."""

    @property
    def trained(self) -> bool:
        return self.role == "assistant" if self.trainable is None else self.trainable


@dataclass(frozen=True)
class Conversation:
    """Turns to be rendered by a template."""

    messages: tuple[Message, ...]
    tools: tuple[Mapping[str, Any], ...] = ()
    """Functions that may be called, in OpenAI's form: `{"type": "function", "function": {"name": ..., ...}}`."""
    extras: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class PlainText:
    """Text of continued pre-training; needs no template, every token of it is trained."""

    text: str
    extras: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Tokens:
    """A row that was tokenised elsewhere; needs no template."""

    token_ids: tuple[int, ...]
    loss_mask: tuple[bool, ...]
    extras: Mapping[str, Any] = field(default_factory=dict)


Parsed: TypeAlias = Conversation | PlainText | Tokens


@dataclass(frozen=True)
class Segment:
    """A piece of rendered text. `control=True`: the text is one control token, taken by its id."""

    text: str
    trainable: bool = False
    control: bool = False
    weight: float = 1.0
    role: str = ""
    """Whose turn it is part of; shown by `sftx inspect`, of no effect on training."""


@dataclass(frozen=True)
class Example:
    """One encoded conversation. `loss_mask[i]` says whether the model is trained to produce `token_ids[i]`."""

    token_ids: list[int]
    loss_mask: list[bool]
    row_id: str
    group: int
    """Examples of one group (a preference pair) always share a micro-batch."""
    weights: list[float] | None = None
    """Loss weight of each token; None: all 1."""
    extras: Mapping[str, Any] = field(default_factory=dict)

    @property
    def num_label_tokens(self) -> int:
        """Trained tokens. The first token has nothing before it that could predict it."""
        return sum(self.loss_mask[1:])


# --- from examples to a loss --------------------------------------------------------------------

Row: TypeAlias = tuple[int, ...]
"""Indices of the examples that share a row of a batch: one when padded, several when packed or paired."""
Step: TypeAlias = tuple[Row, ...]
"""The rows of one optimizer step, in an order in which neighbours are good to batch together."""


Attention: TypeAlias = Literal["varlen", "mask", "mask4d"]
"""`varlen`: attention within the borders of `cu_seqlens`; `mask`: transformers' own mask, made from the position ids;
`mask4d`: a ready-made block-diagonal mask, [1, 1, T, T]."""


@dataclass
class Batch:
    """One micro-batch. Labels are already shifted: `labels_BT[b, t]` is the token after position t."""

    input_ids_BT: Tensor
    """int64"""
    labels_BT: Tensor
    """int64, IGNORE_INDEX where nothing is trained"""
    position_ids_BT: Tensor
    """int64"""
    lengths_B: Tensor | None
    """int64, real tokens of each row when padded at the right; None when packed"""
    cu_seqlens: Tensor | None
    """int32, borders of the documents of a packed row; None when padded"""
    max_seqlen: int
    """Length of the longest document, in tokens."""
    row_ids: tuple[str, ...]
    num_label_tokens: int
    """Trained tokens: labels that are not IGNORE_INDEX. On the host, so that nothing waits for the device."""
    num_input_tokens: int
    """Tokens that are not padding."""
    token_weights_BT: Tensor | None = None
    """fp32, loss weight of each label; None: all 1"""
    attention: Attention = "varlen"
    """How the documents of a packed row are kept from seeing one another."""
    extras: dict[str, Tensor] = field(default_factory=dict)

    def to(self, device: torch.device) -> Batch:
        """The same batch with every tensor on `device`."""
        from torch import Tensor

        moved: dict[str, Any] = {
            f.name: value.to(device, non_blocking=True)
            for f in dataclasses.fields(self)
            if isinstance(value := getattr(self, f.name), Tensor)
        }
        moved["extras"] = {name: value.to(device, non_blocking=True) for name, value in self.extras.items()}
        return dataclasses.replace(self, **moved)


@dataclass
class HiddenOut:
    """What the decoder gives: the states that the head reads, and a router's auxiliary loss if it has one."""

    hidden_BTD: Tensor
    aux_loss: Tensor | None = None
    """fp32 scalar, already times the architecture's own coefficient"""


@dataclass
class LossSum:
    """The loss of one micro-batch as a sum; the engine divides by the denominators of the whole step."""

    sum: Tensor
    """fp32 scalar"""
    aux_loss: Tensor | None = None
    """fp32 scalar; counts by this micro-batch's share of the step's denominator"""
    metrics: dict[str, Tensor] = field(default_factory=dict)
    """Sums, to be divided by the same denominator (`token_accuracy`: the number of right tokens).

    `nll`, the negative log-likelihood of the trained tokens in nats, is reported as `perplexity`, its exponential.
    """


# --- what plugins return ------------------------------------------------------------------------


@runtime_checkable
class Parser(Protocol):
    """Recognises records of one format and turns each into what it holds."""

    @property
    def fields(self) -> str:
        """What a record of this format looks like, for the error that lists the known formats."""

    @property
    def samples(self) -> Sequence[Record]:
        """A few small records of this format: shown to users, and what the format's contract is checked with."""

    def accepts(self, record: Record) -> bool:
        """Whether the record's fields are those of this format; its values are judged by `parse`."""

    def parse(self, record: Record, where: Location) -> tuple[Parsed, ...]:
        """What the record holds. Raises DataError, naming `where`.

        Several are one group (a preference pair), whose first member is the one that is asked for in evaluation.
        """


@runtime_checkable
class Template(Protocol):
    """Writes a conversation as text, segment by segment, and says which segments are trained."""

    @property
    def controls(self) -> frozenset[str]:
        """The control tokens it writes; user text can never become one of them."""

    @property
    def stop(self) -> tuple[str, ...]:
        """The tokens that end the assistant's turn: trained, and stopping generation."""

    @property
    def rewrites_history(self) -> bool:
        """Whether earlier turns render differently once later ones follow: one example a trained turn then."""

    @property
    def chat_template(self) -> str | None:
        """The same in Jinja, saved with the tokenizer so that who serves the result asks as it was trained.

        None leaves the tokenizer's own.
        """

    def render(self, conversation: Conversation) -> tuple[Segment, ...]:
        """The whole conversation."""

    def generation_prompt(self, conversation: Conversation) -> tuple[Segment, ...]:
        """The conversation so far and the opening of the assistant's next turn."""


@runtime_checkable
class Collator(Protocol):
    """Decides which examples share a step and a row, and makes tensors of one micro-batch.

    A collator that packs may have an attribute `row_length: int`, the tokens that a row holds, for reports.
    It may have an attribute `wrap_length: int | None`. Where it is a number, the examples are first cut where
    their concatenation passes a multiple of it, so that neighbouring pieces fill rows of that many tokens.
    """

    def plan(
        self,
        lengths: Sequence[int],
        groups: Sequence[int],
        *,
        seed: int,
        epoch: int,
        window: int,
        examples_per_step: int,
        final: bool,
    ) -> tuple[list[Step], Row]:
        """The steps of one window of examples, and the indices carried over to the next one.

        A pure function of its arguments. Each step has `examples_per_step` rows; when `final`, one of them may have
        fewer and nothing is carried over. Loses and repeats no example.
        """

    def collate(self, examples: Sequence[Example]) -> Batch:
        """One micro-batch. The one place where labels are shifted."""


@runtime_checkable
class Loss(Protocol):
    """A sum over one micro-batch, and what it is to be divided by."""

    def denominator(self, batch: Batch) -> float:
        """Known on the host before the forward: trained tokens, or pairs for a preference loss."""

    def __call__(self, lm: LanguageModel, batch: Batch) -> LossSum:
        """Gets the model, not logits, so that fused heads and losses of two passes fit."""


class Adapter(ABC):
    """Makes a frozen model trainable in part, or changes it while it loads."""

    def quantize(self, name: str, module: nn.Module) -> nn.Module | None:
        """A replacement for the module of that path, whose weights have just been read; None leaves it."""
        return None

    @abstractmethod
    def attach(self, lm: LanguageModel) -> None:
        """Adds what trains. Everything else is frozen already; the model's output must not change."""

    def rate_scale(self, name: str) -> float:
        """What the learning rate of a parameter, by its name in the model, is multiplied with (LoRA+)."""
        return 1.0

    @abstractmethod
    def disabled(self) -> AbstractContextManager[None]:
        """Within it the model computes what it did before training."""

    @abstractmethod
    def save(self, directory: Path) -> None:
        """Writes what it trained into an empty directory, as safetensors and JSON."""

    @abstractmethod
    def load(self, directory: Path) -> None:
        """Reads what `save` wrote; every tensor must be there and none be left over."""

    @abstractmethod
    def merge(self, lm: LanguageModel) -> None:
        """Folds what it trained into the model's weights and takes itself off."""


@runtime_checkable
class Metric(Protocol):
    """Scores generated answers; the mean over the held-out rows is reported, of several scores by their names.

    A metric whose score of a whole set is not the mean of its rows' (BLEU) may have a method
    `corpus(predictions: Sequence[str], references: Sequence[str]) -> float | Mapping[str, float]`, whose score is
    reported in place of the mean.
    """

    def __call__(self, prediction: str, reference: str) -> float | Mapping[str, float]: ...


class Observer:
    """Told what happens in a run; changes nothing. Override what you need.

    An observer that raises is named once and switched off; it never stops a run.
    """

    def on_start(self, report: StartReport) -> None:
        """Everything is loaded and derived; the run directory exists."""

    def on_step(self, report: StepReport) -> None:
        """An optimizer step is done."""

    def on_evaluate(self, report: EvalReport) -> None:
        """An evaluation is done."""

    def on_save(self, step: int, directory: Path) -> None:
        """An artefact lies complete in `directory`."""

    def on_end(self, summary: Mapping[str, Any]) -> None:
        """The run is over; `summary` is what summary.json holds."""

    def close(self) -> None:
        """Called exactly once, last, also when the run failed."""


@dataclass(frozen=True)
class ModelSpec:
    """What an adapter may know before weights are read."""

    name: str
    config: PretrainedConfig
    skeleton: PreTrainedModel
    """The whole model on the meta device: names, shapes, no values."""
    trust_remote_code: bool = False
    """Whether Python code that comes with the model may run."""
    new_token_ids: tuple[int, ...] = ()
    """Ids of tokens that were added to the tokenizer, whose rows are to be trained; ascending."""
