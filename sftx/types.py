"""The types that the stages of a run hand to one another, in the order in which data meets them.

record -> Parsed -> Segment -> Example -> Batch -> HiddenOut -> LossSum. Data never flows back.

Dimensions, as suffixes of tensor names: B rows, T tokens, N = B*T, D hidden, V vocabulary.
Importing this module imports neither torch nor numpy: tensors and arrays below are annotations only.
"""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol, TypeAlias, runtime_checkable

if TYPE_CHECKING:
    import numpy as np
    import torch
    from numpy.typing import NDArray
    from torch import Tensor, nn
    from torch.optim import Optimizer
    from transformers import GenerationConfig, PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

    from sftx.events import Decision, EvalReport, StartReport, StepReport
    from sftx_kernels import LinearCrossEntropyOutput

IGNORE_INDEX = -100
"""The label of a position that is not trained."""

Record: TypeAlias = Mapping[str, Any]
"""One raw row of a source, as JSON values."""


# --- from a record to an example ----------------------------------------------------------------


LEDGER_KEYS = ("where", "source", "action", "reason", "length", "kept")
"""The keys of an entry of the ledger beside its row's number, whose key is the unit of the location."""


@dataclass(frozen=True)
class Location:
    """The place of a record in its source, shown in every error and every entry of the ledger."""

    path: str
    number: int
    """Line (jsonl, json) or row, counted from 1; or another number by which the row is found, such as a rowid."""
    unit: str = "line"
    """What is numbered; it is the number's key in the ledger, and none of `LEDGER_KEYS`."""

    def __str__(self) -> str:
        return f"{self.path}:{self.number}" if self.unit == "line" else f"{self.path} {self.unit} {self.number}"


@dataclass(frozen=True)
class ToolCall:
    """A call of a function that the assistant requests."""

    name: str
    arguments: Mapping[str, Any]
    """JSON values by parameter name."""
    id: str | None = None
    """Identifier that the message with the call's result refers to."""


@dataclass(frozen=True)
class Message:
    """One turn; `role` is system, user, assistant or tool (the result of a call)."""

    role: str
    content: str
    trainable: bool | None = None
    """True or False overrides the run's options; None leaves it to them (by default the assistant's turns)."""
    weight: float = 1.0
    """Loss weight of the turn's label tokens."""
    reasoning: str = ""
    """The assistant's reasoning before `content`, without the tags that a template writes around it."""
    tool_calls: tuple[ToolCall, ...] = ()
    """Calls that the assistant requests after `content`."""
    name: str | None = None
    """Name of the function whose result this message is."""
    tool_call_id: str | None = None
    """Identifier of the call whose result this message is."""

    @property
    def trained(self) -> bool:
        return self.role == "assistant" if self.trainable is None else self.trainable


@dataclass(frozen=True)
class Conversation:
    """Messages that a template renders."""

    messages: tuple[Message, ...]
    tools: tuple[Mapping[str, Any], ...] = ()
    """Functions that may be called, in OpenAI's form: `{"type": "function", "function": {"name": ..., ...}}`."""
    extras: Mapping[str, Any] = field(default_factory=dict)
    """What a collator or a metric of the same plugin needs: a dict of JSON values, in which tuples are refused."""


@dataclass(frozen=True)
class PlainText:
    """Text for continued pre-training. It needs no template, and every token of it is a label token."""

    text: str
    extras: Mapping[str, Any] = field(default_factory=dict)
    """As those of a `Conversation`."""


@dataclass(frozen=True)
class Tokens:
    """A record that was tokenised elsewhere. It needs no template."""

    token_ids: tuple[int, ...]
    loss_mask: tuple[bool, ...]
    """True for each token that is trained; as long as `token_ids`."""
    extras: Mapping[str, Any] = field(default_factory=dict)
    """As those of a `Conversation`."""


Parsed: TypeAlias = Conversation | PlainText | Tokens
"""What a parser makes of a record."""


@dataclass(frozen=True)
class Segment:
    """A piece of rendered text. With `control=True` the text is exactly one control token, encoded by its id."""

    text: str
    trainable: bool = False
    control: bool = False
    weight: float = 1.0
    role: str = ""
    """Role of the turn that the segment belongs to. `sftx inspect` shows it; training ignores it."""


@dataclass(frozen=True, eq=False)
class Example:
    """One encoded conversation, from the encoder to the collator. Lists given for arrays are converted."""

    token_ids: NDArray[np.int32]
    """[T]"""
    loss_mask: NDArray[np.bool_]
    """[T]; True where the model is trained to produce `token_ids[i]`"""
    row_id: str
    """Place of the record, with `#n` appended where a record became several examples."""
    group: int
    """Examples of one group (a preference pair) always share a micro-batch."""
    weights: NDArray[np.float32] | None = None
    """[T], loss weight of each token; None stands for all ones."""
    extras: Mapping[str, Any] = field(default_factory=dict)
    """What the parser gave the conversation; each piece of a row that is cut or split has all of them."""

    def __post_init__(self) -> None:
        import numpy as np

        object.__setattr__(self, "token_ids", np.asarray(self.token_ids, np.int32))
        object.__setattr__(self, "loss_mask", np.asarray(self.loss_mask, np.bool_))
        if self.weights is not None:
            object.__setattr__(self, "weights", np.asarray(self.weights, np.float32))

    def __eq__(self, other: object) -> bool:
        """Compare every field, arrays by their elements."""
        if not isinstance(other, Example):
            return NotImplemented
        plain = [
            [value.tolist() if hasattr(value, "tolist") else value for value in vars(example).values()]
            for example in (self, other)
        ]
        return plain[0] == plain[1]

    @property
    def num_label_tokens(self) -> int:
        """Number of trained tokens. The first token is never one: no token before it could predict it."""
        import numpy as np

        return int(np.count_nonzero(self.loss_mask[1:]))


@dataclass(frozen=True)
class Question:
    """A conversation up to an assistant's turn, which the model is to answer, and the answer that is expected.

    Metrics and evaluators get those of the held-out rows, a rollout those of the training rows.
    """

    row_id: str
    """Place of the record in its source."""
    prompt: str
    """Content of the last turn before the answer, as a person reads it."""
    prompt_ids: list[int]
    """[T], token ids after which the model is to answer, rendered by the run's template."""
    reference: str
    """The expected answer, decoded as generated answers are; empty where a training row ends with a user's turn."""
    format: str = ""
    """Name of the parser that read the record."""
    messages: tuple[Message, ...] = ()
    """The turns before the answer."""
    tools: tuple[Mapping[str, Any], ...] = ()
    """Functions that may be called, as in `Conversation.tools`."""
    extras: Mapping[str, Any] = field(default_factory=dict)
    """What the parser added to the conversation, as JSON values."""


# --- from examples to a loss --------------------------------------------------------------------

Row: TypeAlias = tuple[int, ...]
"""Indices of the examples that share a row of a batch: one when padded, several when packed or paired."""
Step: TypeAlias = tuple[Row, ...]
"""The rows of one optimizer step, ordered so that neighbours are cheap to batch together."""


@dataclass(frozen=True)
class Window:
    """Examples that a collator plans together: those of an epoch, or the next ones of a stream."""

    lengths: Sequence[int]
    """Tokens of each example."""
    groups: Sequence[int]
    """Group of each example, ascending. Examples of one group share a row or at least a micro-batch."""
    rows_per_step: int
    """Rows of an optimizer step, over all processes."""
    seed: int = 0
    epoch: int = 0
    index: int = 0
    """Number of the window within a stream; 0 for an epoch."""
    is_last: bool = True
    """Whether nothing may be carried over to a next window."""


Attention: TypeAlias = Literal["varlen", "mask", "mask4d"]
"""`varlen`: attention within the documents of `cu_seqlens`; `mask`: transformers' own mask, made from the position ids;
`mask4d`: a ready-made block-diagonal mask, [1, 1, T, T]."""


@dataclass(frozen=True)
class SharedPrefixes:
    """How the examples of a packed row share the tokens that all examples of their group begin with.

    The row consists of pieces, which `Batch.cu_seqlens` delimits. An example is a piece of its own, or a prefix, which
    its group has in common, and a branch: the prefix stands in the row once, before the branches. A branch begins with
    the last token that is common to all, so that each has a position of its own for its first label.

    Dimensions: P pieces, E examples, K keys of all pieces.
    """

    prefix_P: Tensor
    """int32, the number of the piece that is the prefix of each piece; -1 for a piece without one"""
    piece_E: Tensor
    """int64, the piece of each example that is its own"""
    keys_K: Tensor
    """int64, for each piece the positions in the row that it may attend to: those of its prefix, then its own"""
    cu_seqlens_k: Tensor
    """int32 [P + 1], boundaries of the pieces in `keys_K`"""
    max_seqlen_k: int
    """The most tokens that a piece may attend to."""


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
    """int64, non-padding tokens of each row when padded at the right; None when packed"""
    cu_seqlens: Tensor | None
    """int32, document boundaries of a packed row, or those of its pieces with `shared`; None when padded"""
    max_seqlen: int
    """Length of the longest document or piece, in tokens."""
    row_ids: tuple[str, ...]
    """`row_id` of each example, in the order of the rows, or of the documents of a packed row."""
    num_label_tokens: int
    """Number of labels that are not IGNORE_INDEX. Kept on the host, so that nothing waits for the device."""
    num_input_tokens: int
    """Number of non-padding tokens of all examples; a shared prefix counts for each of them."""
    token_weights_BT: Tensor | None = None
    """fp32, loss weight of each label; None stands for all ones"""
    attention: Attention = "varlen"
    """How the documents of a packed row are kept from attending to one another."""
    extras: dict[str, Tensor] = field(default_factory=dict)
    """Tensors by name that a collator, or the loss's own `extras`, makes of the examples, for the loss and for an
    adapter's `embed`."""
    statistics: Mapping[str, Tensor] = field(default_factory=dict)
    """fp32 scalars on the model's device: what `Loss.statistics` returned for all micro-batches of the step in all
    processes, added up. Empty for a loss without that method."""
    examples: tuple[Example, ...] = ()
    """The examples themselves, on the host, in the order of `row_ids`. `pad` and `pack` fill it, and a run does where
    a collator leaves it empty."""
    shared: SharedPrefixes | None = None
    """Where examples of a packed row share their prefixes: which ones; else None."""

    def to(self, device: torch.device) -> Batch:
        """Return the same batch with every tensor on `device`.

        What goes to a GPU is pinned first: a copy from other memory of the host may wait for all that the GPU does.
        """
        from torch import Tensor

        def move(tensor: Tensor) -> Tensor:
            if device.type == "cuda" and tensor.device.type == "cpu":
                tensor = tensor.pin_memory()
            return tensor.to(device, non_blocking=True)

        moved: dict[str, Any] = {
            f.name: move(value) for f in dataclasses.fields(self) if isinstance(value := getattr(self, f.name), Tensor)
        }
        moved["extras"] = {name: move(value) for name, value in self.extras.items()}
        if self.shared is not None:
            tensors: dict[str, Any] = {
                n: move(value) for n, value in vars(self.shared).items() if isinstance(value, Tensor)
            }
            moved["shared"] = dataclasses.replace(self.shared, **tensors)
        return dataclasses.replace(self, **moved)


@dataclass
class HiddenOut:
    """Output of the decoder: the states that the head reads, and a router's auxiliary loss if the model has one."""

    hidden_BTD: Tensor
    aux_loss: Tensor | None = None
    """fp32 scalar, already multiplied by the architecture's own coefficient"""


@dataclass
class LossSum:
    """The loss of one micro-batch as a sum; the trainer divides by the denominators of the whole step."""

    sum: Tensor
    """fp32 scalar"""
    aux_loss: Tensor | None = None
    """fp32 scalar, weighted by this micro-batch's share of the step's denominator"""
    metrics: Mapping[str, Tensor | tuple[Tensor, Tensor]] = field(default_factory=dict)
    """Sums, divided by the same denominator (`token_accuracy`: the number of correct tokens), or pairs (sum, count),
    which are divided by their own count over the step; a count of 0 over a whole step leaves the metric out.

    `nll`, the negative log-likelihood of the label tokens in nats, is reported as `perplexity`, its exponential.
    """


class LanguageModel(Protocol):
    """The model of a run as losses and adapters see it: `sftx.model.language_model.CausalLM` implements it."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    adapters: dict[str, Adapter]
    """Attached adapters by plugin name; empty in full fine-tuning."""
    loss_module: nn.Module | None
    """What `Loss.module` returned; None for a loss without that method, and where a model is used without a loss."""
    seed: Tensor
    """0-d int64 on the CPU: the seed of the coming forward, which every random number in a module derives from."""

    @property
    def device(self) -> torch.device: ...

    @property
    def head_weight(self) -> Tensor:
        """[V, D]; requires a gradient when the head is trained."""

    @property
    def head_bias(self) -> Tensor | None:
        """[V]"""

    @property
    def logit_scale(self) -> float:
        """Factor of the head's product."""

    @property
    def softcap(self) -> float | None:
        """Bound of the logits: softcap * tanh(logits / softcap), applied after the scale."""

    def hidden(self, batch: Batch) -> HiddenOut:
        """Run the decoder without the head."""

    def cross_entropy(
        self,
        hidden_BTD: Tensor,
        labels_BT: Tensor,
        *,
        token_weights_BT: Tensor | None = None,
        num_valid: int | None = None,
        label_smoothing: float = 0.0,
        z_loss: float = 0.0,
        workspace_bytes: int | None = None,
        reduction: Literal["sum", "none"] = "sum",
        stats: bool = False,
        temperature: float = 1.0,
    ) -> LinearCrossEntropyOutput:
        """Compute head and cross-entropy together, in chunks; the logits are never materialised.

        Logits are divided by `temperature`.
        """

    def without_adapters(self) -> AbstractContextManager[None]:
        """Return a context in which the model computes what it did before training."""


# --- what plugins return ------------------------------------------------------------------------


@runtime_checkable
class RowSource(Protocol):
    """Reads rows from anywhere: `SCHEME:ADDRESS` stands in a run file where the path of a file may stand.

    The order of the rows is the same in every reading and every process, because a resumed run goes on after the rows
    that it had read. A source opens what it reads in `rows`, and closes it when the iterator ends or is closed.

    It may have a method `num_bytes(address: str) -> int`: the size of the data, by which a run decides whether to
    encode the rows in several processes and to cache them. For `sftx.testing.check_source` it has a method
    `example(directory: Path, texts: Sequence[str]) -> str`, which writes a small source into the directory, in place of
    an earlier one there, and returns its address. It has one row for each text, in this order, that contains the text
    and that a parser of sftx or of the plugin reads.
    """

    @property
    def scheme(self) -> str:
        """The part of a path before the colon: at least two lower-case letters, digits, `+` or `-`."""

    def check(self, address: str) -> None:
        """Raise DataError unless the address can be read. It is quick: called before torch is imported."""

    def rows(self, address: str, start: int) -> Iterator[tuple[Location, Record]]:
        """Yield the rows after the first `start`, each with a place of its own; none when there are no more.

        A row holds JSON values only. Raises DataError, which names the place.
        """

    def fingerprint(self, address: str) -> str | None:
        """Return a text that changes whenever the rows do, such as a hash; None when that cannot be known.

        Without one the rows are not cached, and a resumed run cannot tell whether they are still the same.
        """


@runtime_checkable
class Parser(Protocol):
    """Recognises records of one format and converts them.

    A parser has an attribute `has_rejected` that is True where some of its answers are worse than others and must not
    be imitated (preference pairs): a run then needs a loss that declares `answers_only`.
    """

    @property
    def fields(self) -> str:
        """Describes the fields of a record, for the error that lists the known formats."""

    @property
    def samples(self) -> Sequence[Record]:
        """A few small records of this format: shown to users, and used to check the format's contract."""

    def accepts(self, record: Record) -> bool:
        """Return whether the record has the fields of this format; `parse` judges their values."""

    def parse(self, record: Record, where: Location) -> tuple[Parsed, ...]:
        """Converts the record. Raises DataError, naming `where`.

        Several results are one group (a preference pair); evaluation asks for the answer of the first.
        """


@runtime_checkable
class Template(Protocol):
    """Renders a conversation as segments of text, and says which of them are trained."""

    @property
    def controls(self) -> frozenset[str]:
        """The control tokens that it writes; user text can never become one of them."""

    @property
    def stop(self) -> tuple[str, ...]:
        """The tokens that end the assistant's turn: trained, and stopping generation."""

    @property
    def rewrites_history(self) -> bool:
        """True when earlier turns render differently once later ones follow: each trained turn is one example then."""

    @property
    def chat_template(self) -> str | None:
        """The same template in Jinja, saved with the tokenizer so that a server prompts as the model was trained.

        None keeps the tokenizer's own.
        """

    def render(self, conversation: Conversation) -> tuple[Segment, ...]:
        """Renders the whole conversation."""

    def generation_prompt(self, conversation: Conversation) -> tuple[Segment, ...]:
        """Renders the conversation so far and the opening of the assistant's next turn."""


@runtime_checkable
class Collator(Protocol):
    """Decides which examples share a step and a row, and makes the tensors of one micro-batch.

    A collator that packs may have an attribute `row_length: int`, the tokens that a row holds, for reports.
    It may have an attribute `wrap_length: int | None`. Where it is a number, the examples are first cut where
    their concatenation passes a multiple of it, so that neighbouring pieces fill rows of that many tokens.
    It may have a method `sharing(shared: bool) -> Collator | None`, which returns the collator that packs as it does
    and shares the prefixes of a group (`pack(..., share_prefixes=True)`), or shares none; None where it cannot. A run
    asks for it where the loss declares `shares_prefixes`. An attribute `share_prefixes: bool` says whether it does
    already.
    """

    def plan(self, window: Window) -> tuple[list[Step], Row]:
        """Return the steps of one window, and the indices of examples that are carried over to the next one.

        A pure function of its argument. Each step has `rows_per_step` rows; in the last window one step may have fewer
        and nothing is carried over. No example is lost or repeated.
        """

    def collate(self, examples: Sequence[Example]) -> Batch:
        """Make one micro-batch; this is the one place where labels are shifted."""


@runtime_checkable
class Loss(Protocol):
    """Computes a sum over one micro-batch, and the number that it is to be divided by.

    A loss declares what sets it apart by attributes that are True, so that the contract checks what holds for its kind
    and a run refuses what cannot be right: `detached`, its gradient is on purpose not that of its value (a factor
    without a gradient); `batch_statistic`, the loss of an example depends on the others of its micro-batch (in-batch
    negatives), which must then be a whole step; `needs_adapter`, it compares with the model without its adapters;
    `answers_only`, its label tokens are an answer (a preference loss), so prompts must not be trained;
    `shares_prefixes`, the examples of a group have a prompt in common, which is computed once where the collator packs.

    A loss that needs a number of the whole step (a mean over all its rows) may have a method
    `statistics(lm: LanguageModel, batch: Batch) -> dict[str, Tensor]`. It is called without gradients for every
    micro-batch of a step, before the first backward; the scalars that it returns are added up over micro-batches and
    processes, and each call of the loss finds the totals in `batch.statistics`.

    A loss that needs more of its examples than tokens and labels may have a method
    `extras(batch: Batch) -> dict[str, Tensor]`. It is called on the host for every micro-batch, right after it is
    collated and before its denominator is asked for; what it returns is in `batch.extras`, and moves to the device
    with the batch. It depends on the batch alone: on `batch.examples` with their `group`, `extras` and `loss_mask`.

    A loss that trains parameters of its own beside the model's (PPO's value head) may have a method
    `module(lm: LanguageModel) -> nn.Module`. It is called once, before the optimizer is made; the loss then finds what
    it returned in `lm.loss_module`. Its parameters are fp32, and train as those of the model do. They are saved with
    each checkpoint and with the result, in a directory `loss` beside the weights, and are no part of the model: it
    answers, merges and is exported without them.

    What stays the same in every epoch is computed once by a method
    `precompute(lm: LanguageModel, batch: Batch) -> dict[str, Tensor]`, each [E], fp32. It is called before the first
    step for every training and held-out example, without gradients, in eval mode and in the run's dtype, with the model
    as it is before training (the adapters are attached and new). Every later batch has the values in `batch.extras`
    by their names, in the order of its examples. They depend on the model, the examples and the options of the loss
    alone: they are kept in the run directory and in the cache. A loss that can do without sets `precompute = None` on
    the instance. Not for a stream.

    A method `prepare(examples: Sequence[Example]) -> None` is called once with all training examples and once with the
    held-out ones, if there are any, before any batch is made. It may remember something of them; it changes none.
    """

    def denominator(self, batch: Batch) -> float:
        """Return the denominator, known before the forward: label tokens, or pairs for a preference loss."""

    def __call__(self, lm: LanguageModel, batch: Batch) -> LossSum:
        """Compute the loss. It gets the model, not logits, so that fused heads and losses of two passes fit."""


class Adapter(ABC):
    """Makes a frozen model trainable in part, or changes it while it loads.

    An adapter whose model reads more than text (features, images) may have a method
    `embed(batch: Batch, embeds_BTD: Tensor) -> Tensor`. It gets the embeddings of `batch.input_ids_BT` as the model's
    own embedding returns them, before the first layer, and returns them with what `batch.extras` put in their place:
    in the same shape and dtype, and each document by its own extras alone. It is called in each forward of a loss, and
    for the prompts of generated answers, which the collator makes a batch of; not within `lm.without_adapters()`.
    """

    def quantize(self, name: str, module: nn.Module) -> nn.Module | None:
        """Return a quantised replacement for the module of that path; None keeps it.

        It is asked about each module on the meta device, before weights are read and by `sftx plan`, and once more
        about those that it replaces, on the run's device, as soon as their weights are read. So the answer depends on
        path, class and shapes alone. The replacement's parameters require no gradient; its buffers are persistent.
        """
        return None

    @abstractmethod
    def attach(self, lm: LanguageModel) -> None:
        """Adds the trainable parameters. All others are frozen already; the model's output must not change."""

    def rate_scale(self, name: str) -> float:
        """Return the factor of the learning rate of a parameter, by its name in the model (LoRA+)."""
        return 1.0

    @abstractmethod
    def disabled(self) -> AbstractContextManager[None]:
        """Return a context in which the model computes what it did before training."""

    @abstractmethod
    def save(self, directory: Path) -> None:
        """Writes the trained parameters into an empty directory, as safetensors and JSON."""

    @abstractmethod
    def load(self, directory: Path) -> None:
        """Read what `save` wrote; a tensor that is missing or left over is an error."""

    @abstractmethod
    def merge(self, lm: LanguageModel) -> None:
        """Folds the trained parameters into the model's weights and removes the adapter."""


@dataclass(frozen=True)
class TrainableParam:
    """A trainable parameter, and what an optimizer must know of its place in the model."""

    name: str
    parameter: nn.Parameter
    """With fsdp2 and no adapter a DTensor, of which this process has a shard."""
    scale: float
    """The factor on the learning rate."""
    is_embedding: bool
    """True for the input embedding: only its rows of the batch's tokens get gradients."""
    is_head: bool


@runtime_checkable
class OptimizerBuilder(Protocol):
    """Makes the torch optimizers of a run, and says what memory plan and precision must know of them.

    It may have attributes that are True: `bf16_weights`, it trains a whole model whose weights are bfloat16;
    `needs_gpu`, its contract can be checked on a GPU only (`build` raises ConfigError for parameters elsewhere).
    """

    @property
    def state_bytes(self) -> float:
        """Bytes of state for each trained parameter; of most parameters, where it treats some differently."""

    @property
    def elementwise(self) -> bool:
        """True when each element of a parameter is updated from its own gradient and state alone, so that FSDP's
        shards of a parameter can be updated one by one."""

    def build(self, params: Sequence[TrainableParam]) -> Sequence[Optimizer]:
        """Return one optimizer or several, in which each parameter stands once. Raises ConfigError.

        Each parameter group has `scale` beside `lr`, as those of `sftx.parameter_groups` have: before each step its
        `lr` is set to `scale` times the learning rate of the step. Gradients are clipped already, and `step()` gets no
        closure. State is in `optimizer.state[parameter]`, as tensors and numbers, by which checkpoints save it.
        """


@runtime_checkable
class Schedule(Protocol):
    """The learning rate after warm-up, as a factor of its peak.

    It may have an attribute `warmup_start: float`: the factor with which the linear warm-up begins, as a share of the
    factor at its end; 0 by default.
    """

    def factor(self, step: int, num_steps: int) -> float:
        """Return the factor of the peak learning rate, at least 0: a pure function of its arguments.

        `step` is counted from 0 at the end of warm-up, and may pass `num_steps`, the number of optimizer steps after
        warm-up, which is at least 1.
        """


@runtime_checkable
class Metric(Protocol):
    """Scores generated answers. The mean over the held-out rows is reported; several scores by their names.

    It is asked for rows of every format. A metric that is not meant for all of them takes a third parameter
    `row: Question` and returns None for a row that it declines: means are over the other rows.

    A metric whose score of a whole set is not the mean of its rows' (BLEU) may have a method
    `corpus(predictions: Sequence[str], references: Sequence[str]) -> float | Mapping[str, float] | None`, whose score
    is reported in place of the mean. It may take a third parameter `rows: Sequence[Question]`.
    """

    def __call__(
        self, prediction: str, reference: str, *args: Any, **kwargs: Any
    ) -> float | Mapping[str, float] | None:
        """Score one answer. `row` is passed by its name, to a metric that has a parameter of that name."""


class Evaluation(Protocol):
    """One evaluation of the model of a run, as evaluators see it.

    An evaluator runs in every process of a run. Each must call the methods below in the same order with the same
    arguments: the work is divided among the processes, and each gets all results. No gradients are computed, and the
    model is in evaluation mode.
    """

    @property
    def lm(self) -> LanguageModel:
        """The model. Under FSDP2 all its parameters are gathered for the time of the evaluation."""

    @property
    def step(self) -> int:
        """Optimizer steps done; 0 is the model before training."""

    @property
    def rows(self) -> Sequence[Question]:
        """The held-out conversations that end with an assistant's turn; empty without held-out rows."""

    @property
    def examples(self) -> Sequence[Example]:
        """All held-out rows, encoded; empty without held-out rows."""

    def encode(self, prompt: str | Conversation, continuation: str = "") -> tuple[list[int], list[int]]:
        """Return the token ids of a prompt, and those of `continuation` right after it.

        A conversation, whose last turn is to be answered, is rendered by the run's template, and the continuation is
        encoded as its answer, without the stop token. A text is encoded as it is, after the tokenizer's first token
        (bos) where it has one; there, a space between the two belongs to the continuation. Raises DataError.
        """

    def generate(
        self,
        prompts: Sequence[str | Conversation | Sequence[int]],
        *,
        max_new_tokens: int | None = None,
        stop: Sequence[str] = (),
    ) -> list[str]:
        """Answer each prompt with the most likely tokens, up to the template's stop token or one of the texts `stop`.

        `max_new_tokens` is the run's `generation.max_new_tokens` by default. The answers have no control tokens.
        """

    def log_likelihoods(self, pairs: Sequence[tuple[Sequence[int], Sequence[int]]]) -> list[tuple[float, bool]]:
        """Return how likely the second token ids of each pair are after the first, which are at least one.

        That is the sum of their log-probabilities in nats, and whether each of them is the most likely token. At most
        one chunk of logits exists at a time.
        """


@runtime_checkable
class Evaluator(Protocol):
    """Scores the model itself, by whatever it asks of it: a benchmark, a task, an attack."""

    def evaluate(self, evaluation: Evaluation) -> Mapping[str, float]:
        """Return scores by name, finite numbers, which are reported beside the loss and the metrics.

        Called at each evaluation, in every process; the scores of rank 0 are reported. It must leave the model as it
        is. One that raises ends the run: a score that is missing could select no checkpoint.
        """


# --- answers of the policy ----------------------------------------------------------------------


@dataclass(frozen=True)
class Answer:
    """An answer of the policy, the model as it is now, to a question of the training rows."""

    question: Question
    number: int
    """Counts the answers to this question, from 0."""
    text: str
    """The answer, decoded without control tokens."""
    token_ids: tuple[int, ...]
    """[T], with the stop token that ended it; at least one."""
    log_probs: tuple[float, ...]
    """[T], log-probability of each token in nats, at temperature 1 and before `top_p` and its like chose from them."""
    finish_reason: Literal["stop", "length"]
    """`stop`: a stop token ended it; `length`: it was cut off after `max_new_tokens`."""
    rewards: Mapping[str, float] = field(default_factory=dict)
    """By the name of the reward plugin; one that declined the answer has none."""
    reward: float = 0.0
    """The sum of `rewards`, each times its weight."""

    def example(self, group: int, extras: Mapping[str, Any] | None = None) -> Example:
        """Return question and answer as an example whose label tokens are those of the answer.

        `group` is the question's position in its window; `extras` are what the loss needs, as JSON values.
        """
        num_prompt, num_answer = len(self.question.prompt_ids), len(self.token_ids)
        return Example(
            [*self.question.prompt_ids, *self.token_ids],  # type: ignore[arg-type]
            [False] * num_prompt + [True] * num_answer,  # type: ignore[arg-type]
            f"{self.question.row_id} answer {self.number + 1}",
            group,
            extras={**self.question.extras, **(extras or {})},
        )


@runtime_checkable
class Reward(Protocol):
    """Scores answers of the policy. A rollout trains on the sum of all rewards of a run, each times its weight.

    It is called in every process of a run, with the answers to some of the questions: all answers to one question are
    in the same call. A reward that computes with a model may have a method `prepare(lm: LanguageModel) -> None`, called
    once before the first answers, which gets the model of the run (for `sftx.load_model(name, like=lm)`).
    """

    def __call__(self, answers: Sequence[Answer]) -> Sequence[float | None]:
        """Return a score for each answer, or None for one that it declines, which counts as 0 in the sum.

        The same answers get the same scores, or a resumed run would not go on as the first one did.
        """


class Policy(Protocol):
    """The model of a run as a rollout sees it.

    A rollout runs in every process of a run. Each must call the methods below in the same order with the same
    arguments: the work is divided among the processes, and each gets all results. No gradients are computed, and the
    model is in evaluation mode. Under FSDP2 all its parameters are gathered for the time of the rollout.
    """

    @property
    def lm(self) -> LanguageModel: ...

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase: ...

    @property
    def step(self) -> int:
        """Optimizer steps done."""

    def generate(
        self,
        questions: Sequence[Question],
        *,
        num_answers: int = 1,
        max_new_tokens: int,
        temperature: float = 1.0,
        top_p: float = 1.0,
        top_k: int = 0,
        min_p: float = 0.0,
    ) -> list[list[Answer]]:
        """Return `num_answers` sampled answers to each question, with their rewards.

        What an answer draws depends on the run's seed, the step, the question's `row_id` and the answer's number alone.
        The options mean what they mean in transformers' GenerationConfig; `top_k` 0 draws from all tokens, and
        temperature 0 takes the most likely one. Raises ConfigError for one out of range.
        """

    def log_probs(
        self,
        examples: Sequence[Example],
        *,
        temperature: float = 1.0,
        lm: LanguageModel | None = None,
        without_adapters: bool = False,
    ) -> list[NDArray[np.float32]]:
        """Return the log-probability of each label token after the tokens before it, in nats, [T] for each example.

        It stands at the token's own place; tokens that are not trained have 0. They are computed by the forward that
        trains. `temperature`: logits are divided by it. `lm`: another model, such as a reference, in place of the
        policy. `without_adapters`: the policy as it was before training.
        """

    def per_token(
        self,
        examples: Sequence[Example],
        compute: Callable[[LanguageModel, Batch], Mapping[str, Tensor]],
        *,
        lm: LanguageModel | None = None,
        without_adapters: bool = False,
    ) -> list[dict[str, NDArray[np.float32]]]:
        """Return what `compute` makes of the examples, by its names: [T] for each example.

        `compute` gets a model and a batch, and returns tensors [B, T] that are laid out as the labels are: the number
        of a label is returned at its token's own place, and that of the first token is 0. It is called for several
        examples at once, and what it computes of one depends on that example alone. `lm` and `without_adapters` are
        those of `log_probs`.
        """


@dataclass(frozen=True)
class Rollouts:
    """The examples that a rollout made of the questions of one window, with their answers."""

    examples: Sequence[Example]
    """To train on. `group` is the position of the example's question among the questions, so that examples of one
    question share a row, and the questions of a step are those that it was planned with; ascending. What the loss
    needs is in `extras`, as JSON values: one number, or a list with one number for each token."""
    answers: Sequence[Answer]
    """All answers, for the run directory and the report."""
    metrics: Mapping[str, float] = field(default_factory=dict)
    """Finite numbers by name, which are reported with each step of the window."""


@runtime_checkable
class Rollout(Protocol):
    """Makes the examples of a window of questions from the current policy.

    It may have an attribute `reward_weights: Mapping[str, float]`, weights of rewards by the name of their plugin; a
    reward that is not named there has the weight 1. One whose attribute `needs_reward` is True is refused in a run
    without a reward.

    A rollout that remembers something between two windows (the coefficient of a penalty) has methods
    `state_dict() -> Mapping[str, Any]`, of JSON values, and `load_state_dict(state: Mapping[str, Any]) -> None`. The
    state is saved in each checkpoint.
    """

    @property
    def steps_per_rollout(self) -> int:
        """Optimizer steps that the questions of a window are divided into, `train_batch_size` questions each."""

    @property
    def num_iterations(self) -> int:
        """How often the steps of a window are trained before the next one."""

    @property
    def num_answers(self) -> int:
        """The most examples that come of one question, for the plan of memory."""

    @property
    def max_new_tokens(self) -> int:
        """Tokens of the longest answer: a question that leaves less room within `data.max_length` is left out."""

    def __call__(self, policy: Policy, questions: Sequence[Question]) -> Rollouts:
        """Answer the questions and return examples. It returns the same in every process."""


# --- what steers and watches a run -------------------------------------------------------------


class Observer:
    """Receives the events of a run and changes nothing. Override the methods you need.

    An observer that raises is named once and switched off; it never stops a run.
    """

    def on_start(self, report: StartReport) -> None:
        """Called when everything is loaded and the run directory exists."""

    def on_step(self, report: StepReport) -> None:
        """Called after an optimizer step."""

    def on_log(self, report: StepReport) -> None:
        """Called after the first, each `logging_steps`-th and the last step, with the steps since the last call as one.

        Losses and metrics are means over those steps, tokens and seconds are their sums; the rest is the last step's.
        """

    def on_evaluate(self, report: EvalReport) -> None:
        """Called after an evaluation."""

    def on_save(self, step: int, directory: Path) -> None:
        """Called when an artefact is complete in `directory`."""

    def on_end(self, summary: Mapping[str, Any]) -> None:
        """Called when the run is over; `summary` is the content of summary.json."""

    def on_fail(self, error: BaseException) -> None:
        """Called when the run ends without a result: by an error, or by a signal, which is a KeyboardInterrupt."""

    def close(self) -> None:
        """Called exactly once, last, also when the run failed."""


class ExportSource(Protocol):
    """The result of a run as an exporter gets it: a model in fp32 on the CPU, and what is needed to prompt it."""

    @property
    def lm(self) -> LanguageModel:
        """The model, with its adapters attached until `merge`; nothing requires a gradient."""

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The tokenizer that the run saved; its `chat_template` is the template of the run in Jinja."""

    @property
    def template(self) -> Template | None:
        """The template of the run, None when it was trained on plain text."""

    @property
    def stop_ids(self) -> tuple[int, ...]:
        """Ids of the tokens that end an answer."""

    @property
    def generation_config(self) -> GenerationConfig:
        """The model's generation settings, which stop at `stop_ids` too."""

    @property
    def base_model(self) -> str:
        """Directory or hub id of the model under the adapters; the result's own directory for a full model."""

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the base model's files, in which a result is written unless the user wants another one."""

    def merge(self) -> PreTrainedModel:
        """Fold the adapters into the weights, in fp32, and return the plain transformers model.

        It changes the model of `lm`. Further calls return the same model.
        """

    def save_adapter(self, directory: Path) -> None:
        """Write the adapter as the run has it, in PEFT's files where it is one of PEFT's, with tokenizer, chat template
        and generation settings. Raises ConfigError when there is none, or `merge` has folded it in, or several.
        """

    def save_pretrained(
        self, directory: Path, *, dtype: torch.dtype | None = None, max_shard_size: str = "5GB"
    ) -> None:
        """Write the merged model, its tokenizer with the chat template, and its generation settings.

        `directory` exists, and is then a model directory of transformers, from which most other formats can be made.
        `dtype`: of the weights in the files, by default `self.dtype`.
        """


Rounding: TypeAlias = Literal["none", "half", "8-bit", "4-bit"]
"""How far an exporter rounds weights: not beyond the dtype of the base; to float16 or bfloat16; to so many bits."""


class ExportedModel(Protocol):
    """A model that an exporter has loaded back from a directory that it wrote, by a reader that is not its writer.

    It may have a method `encode(text: str) -> list[int]`: the token ids of a text that begins a document. They are
    compared where a run has no template.
    """

    @property
    def reader(self) -> str:
        """Return the name of what reads the directory, with its version, such as "transformers 5.24.0"."""

    @property
    def stop_ids(self) -> Collection[int]:
        """Ids of the tokens that end an answer, by what stands in the directory."""

    def prompt(self, messages: Sequence[Mapping[str, Any]], tools: Sequence[Mapping[str, Any]]) -> list[int]:
        """Return the token ids of a conversation by the directory's own template and tokenizer, up to the answer.

        `messages` and `tools` are in OpenAI's form, but that the arguments of a call are an object, as templates of
        transformers expect them. `tools` may be empty.
        """

    def logits(self, token_ids: Sequence[int]) -> Tensor:
        """Return fp32 logits [T, V] on the CPU, of one forward over the T tokens. V may be padded."""


@runtime_checkable
class Exporter(Protocol):
    """Writes the result of a run in another format. `sftx export RUN --to NAME` calls its methods in this order.

    An exporter that can load what it wrote has a method `load(directory: Path) -> ExportedModel`, which may also ask
    for `trust_remote_code: bool`. An export is then compared with the run before it takes its place: prompts, stop
    tokens, and the tokens that it chooses along the run's own answers. An attribute `rounding` (`Rounding`, "none"
    where there is none) says how far weights are rounded, which decides how near the answers must be.
    """

    def check(self, config: PretrainedConfig) -> None:
        """Raise ConfigError for a model that it cannot write, and list those that it knows. No weight is read yet."""

    def export(self, source: ExportSource, directory: Path) -> None:
        """Write into an empty directory, which takes its place at the end, once it is complete."""

    def usage(self, directory: Path) -> str:
        """Return how to load what was written there: a command, or lines of Python, which are shown at the end."""


class Control:
    """Steers a run by decisions. Override the methods you need; each returns a Decision, or None to go on.

    It is called on rank 0 and its decisions are broadcast. They are recorded with the run, so that a resumed run goes
    on as if it had never been interrupted. A control that remembers something overrides `state_dict` and
    `load_state_dict`.
    """

    def after_step(self, report: StepReport) -> Decision | None:
        """Called after each optimizer step, before an evaluation that is due."""
        return None

    def after_evaluate(self, report: EvalReport) -> Decision | None:
        """Called after each evaluation; step 0 is the model before training."""
        return None

    def state_dict(self) -> Mapping[str, Any]:
        """Return what it remembers as JSON values; it is saved in each checkpoint."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from what `state_dict` returned when the checkpoint was saved."""


@dataclass(frozen=True)
class ModelSpec:
    """Facts about the model that a plugin may know before weights are read."""

    name: str
    config: PretrainedConfig
    skeleton: PreTrainedModel
    """The whole model on the meta device: names and shapes, no values."""
    trust_remote_code: bool = False
    """Whether Python code that comes with the model may run."""
    new_token_ids: tuple[int, ...] = ()
    """Ids of tokens that were added to the tokenizer, whose embedding rows are to be trained; ascending."""

    @property
    def parameter_names(self) -> tuple[str, ...]:
        """The names of the language model's parameters, as the model has them; of tied weights both names.

        Those of a multimodal model's other towers are not among them: rows are text, which gives them no gradient.
        """
        model: Any = self.skeleton
        parts = (model.get_decoder(), model.get_input_embeddings(), model.get_output_embeddings())
        own = {id(parameter) for part in parts if part is not None for parameter in part.parameters()}
        named = model.named_parameters(remove_duplicate=False)
        return tuple(name for name, parameter in named if id(parameter) in own)
