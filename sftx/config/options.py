"""Declares every option of a run: a dataclass field with its type, bounds and help text in `Annotated[...]`.

Nothing here imports torch.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from enum import Enum
from functools import lru_cache
from typing import Annotated, Any, Final, Literal, TypeAlias, get_type_hints

from pydantic import AfterValidator, BeforeValidator, Field, TypeAdapter

from sftx.config.default_plugins import SCHEME
from sftx.config.launch_options import LaunchConfig
from sftx.config.named_plugins import LR_SCHEDULER_TYPE, OPTIM
from sftx.errors import ConfigError
from sftx.stores import is_address, mask


class OnResume(Enum):
    """Says what another value of an option changes when a run is resumed. An option without one changes weights."""

    NOTHING = "nothing"
    EVALUATIONS = "when held-out rows are evaluated"
    ANSWERS = "the answers to held-out rows"
    ROUNDING = "the order of floating-point additions"
    SPLIT = "how the rows of an optimizer step are divided"
    LENGTH = "how long the run trains"


MAX_COUNT: Final = 10**9
MAX_ROWS: Final = 10**6
MAX_TOKENS: Final = 2**24
"""Bounds of counts of anything, of rows that are computed together, and of the tokens of a row: more is a slip."""


@dataclass(frozen=True)
class Filters:
    """Conditions that a row must meet to be kept. The ledger counts those that do not; they are not errors."""

    min_length: Annotated[int, Field(ge=0, le=MAX_COUNT, description="Least number of tokens of an example.")] = 0
    max_length: Annotated[
        int | None,
        Field(ge=2, le=MAX_TOKENS, description="Largest number of tokens of an example, before long_rows shortens it."),
    ] = None
    min_turns: Annotated[
        int,
        Field(ge=0, le=MAX_COUNT, description="Least number of turns of a conversation, without the system message."),
    ] = 0
    max_turns: Annotated[
        int | None,
        Field(ge=1, le=MAX_COUNT, description="Largest number of turns of a conversation, without the system message."),
    ] = None
    duplicates: Annotated[
        Literal["keep", "drop"], Field(description="Rows with exactly the tokens of an earlier row.")
    ] = "keep"


def _check_encoding(name: str | None) -> str | None:
    """Raise ValueError for a name that is no encoding of text."""
    if name is not None:
        try:
            "".encode(name)
        except (LookupError, ValueError):  # unknown, or a codec that turns bytes into bytes, or one that always fails
            raise ValueError(
                "an encoding of text that Python knows, such as utf-8, cp1252, utf-16 or gb18030"
            ) from None
    return name


def _check_delimiter(mark: str | None) -> str | None:
    """Raise ValueError for what cannot separate the fields of a CSV file."""
    if mark is not None and (len(mark) != 1 or mark in '"\r\n'):
        raise ValueError("one character, which is no quote and ends no line")
    return mark


@dataclass(frozen=True)
class Source:
    """A source of rows, and how it is read."""

    path: Annotated[
        str,
        Field(
            min_length=1,
            description="File or directory of rows, pattern such as data/*.jsonl, each also in a store "
            "(s3://bucket/rows.jsonl), directory of a saved dataset, id of a hub dataset, or SCHEME:ADDRESS for a "
            "source plugin, such as sqlite:chats.db.",
        ),
        AfterValidator(mask),
    ]
    weight: Annotated[
        float,
        Field(
            gt=0,
            le=1000,
            description="How often each row is used in an epoch; with interleaving, the share of this source.",
        ),
    ] = 1.0
    format: Annotated[
        str | None, Field(min_length=1, description="Parser plugin for these rows, instead of data.format.")
    ] = None
    columns: Annotated[
        dict[str, str],
        Field(
            description="Columns to read the fields of the format from, as field: column, such as {prompt: question}."
        ),
    ] = field(default_factory=dict)
    subset: Annotated[str | None, Field(description="Configuration of a hub dataset.")] = None
    split: Annotated[str | None, Field(description="Split of a hub or saved dataset; train by default.")] = None
    limit: Annotated[int | None, Field(ge=1, le=10**15, description="Read only this many rows, from the start.")] = None
    filters: Annotated[Filters | None, Field(description="Filters of this source, instead of data.filters.")] = None
    encoding: Annotated[
        str | None,
        AfterValidator(_check_encoding),
        Field(description="Encoding of these text files, instead of data.encoding."),
    ] = None
    delimiter: Annotated[
        str | None,
        AfterValidator(_check_delimiter),
        Field(
            description="Character between the fields of these CSV files; by default it is taken from the first line.",
        ),
    ] = None

    @property
    def scheme(self) -> str | None:
        """The part before the colon of `SCHEME:ADDRESS`; None for a path, which a file of that very name is as well."""
        scheme, _, address = self.path.partition(":")
        is_path = not (address and SCHEME.fullmatch(scheme)) or scheme == "sftx" or os.path.lexists(self.path)
        return None if is_path else scheme

    @property
    def address(self) -> str:
        """The path without its scheme."""
        return self.path if self.scheme is None else self.path.partition(":")[2]


def _as_source(value: Any) -> Any:
    """Turn `PATH` or `PATH:WEIGHT`, the form of the command line, into a mapping."""
    if isinstance(value, dict | Source):
        return value
    if not isinstance(value, str):
        raise ValueError("a path, or an object such as {path: a.jsonl, weight: 2}")
    path, colon, weight = value.rpartition(":")
    return {"path": path, "weight": float(weight)} if colon and _WEIGHT.fullmatch(weight) else {"path": value}


_WEIGHT = re.compile(r"\d+(\.\d*)?|\.\d+")


def _as_sources(value: Any) -> Any:
    items = value if isinstance(value, list | tuple) else (value,)
    sources = tuple(_as_source(item) for item in items)
    given: dict[str, str] = {}
    for path in (source.get("path") for source in sources if isinstance(source, dict)):
        if isinstance(path, str) and given.setdefault(mask(path), path) != path:
            raise ValueError(f"addresses that differ in more than their secrets: {mask(path)} is there twice")
    return sources


Sources = Annotated[
    tuple[Source, ...],
    BeforeValidator(_as_sources, json_schema_input_type=str | Source | list[str | Source]),
]
"""One source or several; each is a path or a mapping of the fields of Source."""

Role: TypeAlias = Literal["system", "user", "assistant", "tool"]


def _as_roles(value: Any) -> Any:
    """Split roles at commas, the form of the command line."""
    items = value if isinstance(value, list | tuple) else [value]
    parts = (item.split(",") if isinstance(item, str) else [item] for item in items)
    return tuple(role for roles in parts for role in roles)


def _check_fraction(value: float | None) -> float | None:
    """Raise ValueError for what is neither a share nor a number of rows."""
    if value is not None and value >= 1 and value != int(value):
        raise ValueError("a share below 1, or a whole number of rows")
    return value


@dataclass(frozen=True)
class DataConfig:
    """The data of a run."""

    train: Annotated[
        Sources,
        Field(
            description="Training rows: file, pattern, directory or hub dataset, as PATH or PATH:WEIGHT; may be "
            "repeated."
        ),
    ] = ()
    eval: Annotated[
        Sources, Field(description="Held-out rows: file, pattern, directory or hub dataset; may be repeated.")
    ] = ()
    eval_fraction: Annotated[
        float | None,
        Field(
            gt=0,
            description="Share of the training rows that is held out for evaluation, or from 1 on their number; rows "
            "with the same content stay together.",
        ),
        AfterValidator(_check_fraction),
    ] = None
    eval_group: Annotated[
        str | None,
        Field(min_length=1, description="With eval_fraction: field whose equal values are held out together or not."),
    ] = None
    eval_seed: Annotated[
        int, Field(ge=0, lt=2**32, description="With eval_fraction: random seed by which rows are chosen.")
    ] = 42
    max_overlap: Annotated[
        float,
        Field(
            ge=0,
            le=1,
            description="Largest share of held-out examples that are also trained on; above it the run stops.",
        ),
        OnResume.NOTHING,
    ] = 0.1
    format: Annotated[
        str | None,
        Field(description="Parser plugin that reads every row; by default it is chosen by the fields of each row."),
    ] = None
    encoding: Annotated[
        str,
        AfterValidator(_check_encoding),
        Field(description="Encoding of text files; a byte order mark of UTF-16 is recognised by itself."),
    ] = "utf-8"
    mix_strategy: Annotated[
        Literal["concat", "interleave_under", "interleave_over"],
        Field(
            description="How several sources make an epoch: concat repeats each source by its weight; interleave "
            "draws from them in proportion to weight, until the first (under) or every source (over) is used up."
        ),
    ] = "concat"
    max_length: Annotated[int, Field(ge=2, le=MAX_TOKENS, description="Largest length of an example, in tokens.")] = (
        2048
    )
    long_rows: Annotated[
        Literal["cut_end", "cut_oldest", "cut_proportional", "split", "drop", "error"],
        Field(
            description="What to do with a row of more than max_length tokens: truncate its end, remove its oldest "
            "turns, truncate prompts and answers in proportion, split it into several examples, drop it, or stop."
        ),
    ] = "cut_end"
    invalid_rows: Annotated[
        Literal["error", "drop"], Field(description="What to do with a row that no format can read: stop, or drop it.")
    ] = "error"
    max_dropped: Annotated[
        float,
        Field(ge=0, le=1, description="Largest share of rows that may be dropped; above it the run stops."),
        OnResume.NOTHING,
    ] = 0.05
    filters: Annotated[Filters, Field(description="Conditions that a row must meet to be kept.")] = Filters()
    train_roles: Annotated[
        tuple[Role, ...],
        BeforeValidator(_as_roles, json_schema_input_type=Role | list[Role]),
        Field(description="Roles whose turns are trained, unless the row itself says so."),
    ] = ("assistant",)
    train_turns: Annotated[
        Literal["all", "last"],
        Field(description="Train every turn of these roles, or only the last one of a conversation."),
    ] = "all"
    train_on_prompt: Annotated[bool, Field(description="Train every token, including prompts and control tokens.")] = (
        False
    )
    train_turn_end: Annotated[
        bool, Field(description="Train the token that ends a trained turn, so that the model learns to stop.")
    ] = True
    system: Annotated[
        str | None,
        Field(description="System message of every conversation, instead of its own; an empty text removes it."),
    ] = None
    streaming: Annotated[
        bool, Field(description="Read rows while training, plan_window examples ahead; needs max_steps.")
    ] = False
    plan_window: Annotated[int, Field(ge=1, le=10**9, description="Examples in the shuffle buffer when streaming.")] = (
        10_000
    )
    num_proc: Annotated[
        int | None,
        Field(
            ge=1,
            le=1024,
            description="Processes that tokenize; by default one for each core when there are many rows, else one.",
        ),
        OnResume.NOTHING,
    ] = None
    cache: Annotated[
        bool | None,
        Field(description="Keep tokenized rows on disk for the next run; by default when there are many rows."),
        OnResume.NOTHING,
    ] = None

    @property
    def has_eval(self) -> bool:
        """Return whether the run has held-out rows."""
        return bool(self.eval) or self.eval_fraction is not None


def _resolve_alias(names: Mapping[str, str]) -> Callable[[Any], Any]:
    """Return a validator that replaces transformers' names by the ones used here."""
    return lambda value: names.get(value, value) if isinstance(value, str) else value


_MICRO_BATCH_SIZE: Final = 8


@dataclass(frozen=True)
class TrainConfig:
    """The training of a run. Options have the names of transformers' TrainingArguments where it has them."""

    learning_rate: Annotated[float, Field(gt=0, description="Peak learning rate.")] = 2e-4
    embedding_learning_rate: Annotated[
        float | None,
        Field(gt=0, description="Peak learning rate of the input embedding and the output head, if they are trained."),
    ] = None
    num_train_epochs: Annotated[
        float,
        Field(gt=0, le=1e9, description="Passes over the training data; max_steps overrides it."),
        OnResume.LENGTH,
    ] = 1.0
    max_steps: Annotated[
        int | None, Field(ge=1, le=MAX_COUNT, description="Optimizer steps in all."), OnResume.LENGTH
    ] = None
    train_batch_size: Annotated[
        int | None,
        Field(
            ge=1,
            le=MAX_ROWS,
            description="Rows of an optimizer step, over all processes; by default per_device_train_batch_size times "
            "gradient_accumulation_steps times the number of processes.",
        ),
    ] = None
    per_device_train_batch_size: Annotated[
        int | None,
        Field(ge=1, le=MAX_ROWS, description="Rows that a process computes at once; by default 8."),
        OnResume.SPLIT,
    ] = None
    gradient_accumulation_steps: Annotated[
        int | None,
        Field(
            ge=1,
            le=MAX_ROWS,
            description="Micro-batches that each process computes in a step; by default as many as train_batch_size "
            "needs, or 1.",
        ),
        OnResume.SPLIT,
    ] = None
    per_device_eval_batch_size: Annotated[
        int, Field(ge=1, le=MAX_ROWS, description="Rows evaluated at once."), OnResume.ROUNDING
    ] = 16
    lr_scheduler_type: Annotated[
        str,
        BeforeValidator(_resolve_alias(LR_SCHEDULER_TYPE.aliases)),
        Field(
            min_length=1,
            description="Learning rate schedule after the warm-up: a plugin, of which those built in are "
            f"{', '.join(LR_SCHEDULER_TYPE.built_in)}.",
        ),
    ] = "cosine"
    warmup_steps: Annotated[
        float, Field(ge=0, description="Steps of linear warm-up; a value below 1 is a share of all steps.")
    ] = 0.0
    min_lr_ratio: Annotated[float, Field(ge=0, le=1, description="Final learning rate, as a share of the peak.")] = 0.0
    lr_decay_steps: Annotated[
        float,
        Field(ge=0, description="Steps of the decay of warmup_stable_decay; a value below 1 is a share of all steps."),
    ] = 0.1
    lr_decay_type: Annotated[
        Literal["linear", "cosine", "1-sqrt"], Field(description="Shape of the decay of warmup_stable_decay.")
    ] = "linear"
    lr_power: Annotated[float, Field(gt=0, description="Exponent of the polynomial schedule.")] = 1.0
    optim: Annotated[
        str,
        BeforeValidator(_resolve_alias(OPTIM.aliases)),
        Field(
            min_length=1,
            description=f"Optimizer: a plugin, of which those built in are {', '.join(OPTIM.built_in)}. The 8-bit and "
            "paged ones are from bitsandbytes; muon trains the matrices of the layers and AdamW the rest; adamw_bf16 "
            "keeps weights in bfloat16 and their missing bits as state.",
        ),
    ] = "adamw"
    weight_decay: Annotated[
        float, Field(ge=0, description="Decoupled weight decay; norm weights and biases do not decay.")
    ] = 0.0
    adam_beta1: Annotated[float, Field(ge=0, lt=1, description="Beta1 of AdamW and Lion.")] = 0.9
    adam_beta2: Annotated[
        float | None, Field(ge=0, lt=1, description="Beta2 of AdamW (0.999 by default) and Lion (0.99 by default).")
    ] = None
    adam_epsilon: Annotated[float, Field(gt=0, description="Epsilon of AdamW.")] = 1e-8
    momentum: Annotated[
        float | None, Field(ge=0, lt=1, description="Momentum of sgd (0 by default) and muon (0.95 by default).")
    ] = None
    max_grad_norm: Annotated[
        float, Field(ge=0, description="Largest global gradient norm, to which gradients are clipped; 0 does not clip.")
    ] = 1.0
    bf16: Annotated[
        bool | None,
        Field(
            description="Compute in bfloat16; by default on a GPU or CPU that multiplies it faster (false, or "
            "SFTX_BF16=0 in the environment, is float32 there)."
        ),
    ] = None
    fp16: Annotated[bool, Field(description="Compute in float16, with dynamic loss scaling.")] = False
    tf32: Annotated[
        bool, Field(description="Use TensorFloat-32 for fp32 matrix products on a GPU: faster, less exact.")
    ] = False
    gradient_checkpointing: Annotated[
        bool | None,
        Field(
            description="Recompute the activations of each layer in the backward pass: less memory, more time; by "
            "default where a step would not fit into the free memory without it."
        ),
        OnResume.ROUNDING,
    ] = None
    selective_checkpointing: Annotated[
        bool,
        Field(description="With gradient_checkpointing: keep the outputs of matrix products and attention."),
        OnResume.ROUNDING,
    ] = False
    torch_compile: Annotated[
        bool, Field(description="Compile the decoder layers with torch.compile."), OnResume.ROUNDING
    ] = False
    use_cpu: Annotated[bool, Field(description="Use the CPU even if there is a GPU."), OnResume.ROUNDING] = False
    distributed: Annotated[
        Literal["ddp", "fsdp2"],
        Field(
            description="With several processes: each holds the whole model (ddp) or a shard of every layer (fsdp2)."
        ),
        OnResume.ROUNDING,
    ] = "ddp"
    fsdp_offload: Annotated[
        bool,
        Field(description="With fsdp2: keep the shards and the optimizer state in host memory."),
        OnResume.ROUNDING,
    ] = False
    seed: Annotated[
        int, Field(ge=0, lt=2**32, description="Random seed of data order, initialisation and dropout.")
    ] = 42
    logging_steps: Annotated[
        int, Field(ge=1, le=MAX_COUNT, description="Optimizer steps between two log lines."), OnResume.NOTHING
    ] = 10
    save_steps: Annotated[
        int | None, Field(ge=1, le=MAX_COUNT, description="Optimizer steps between two checkpoints."), OnResume.NOTHING
    ] = None
    save_minutes: Annotated[
        float | None,
        Field(gt=0, description="Minutes between two checkpoints; 30 by default, if save_steps is not set."),
        OnResume.NOTHING,
    ] = None
    save_total_limit: Annotated[
        int | None,
        Field(
            ge=1,
            le=MAX_COUNT,
            description="Number of newest checkpoints kept, besides the best; by default all with save_steps, "
            "2 with save_minutes.",
        ),
        OnResume.NOTHING,
    ] = None
    save_dtype: Annotated[
        Literal["auto", "float32", "bfloat16", "float16"],
        Field(description="Dtype of the weights of a full model that is the result; auto: that of the base model."),
        OnResume.NOTHING,
    ] = "auto"
    eval_steps: Annotated[
        int | None,
        Field(
            ge=1,
            le=MAX_COUNT,
            description="Optimizer steps between two evaluations, besides those before and after training.",
        ),
        OnResume.EVALUATIONS,
    ] = None
    metric_for_best_model: Annotated[
        str | None,
        Field(
            min_length=1,
            description="Held-out metric by which a checkpoint is the best, which is saved and kept; loss if an option "
            "needs one.",
        ),
    ] = None
    greater_is_better: Annotated[
        bool | None,
        Field(description="Whether a greater metric is better; by default unless its name ends in loss or perplexity."),
    ] = None
    load_best_model_at_end: Annotated[
        bool, Field(description="Make the result of the run from the best checkpoint instead of the last step.")
    ] = False
    early_stopping_patience: Annotated[
        int | None,
        Field(
            ge=1,
            le=MAX_COUNT,
            description="Stop after this many evaluations in a row that are not better than the best.",
        ),
    ] = None
    early_stopping_threshold: Annotated[
        float, Field(ge=0, description="Least improvement of the metric that counts as better.")
    ] = 0.0

    def __post_init__(self) -> None:
        if self.fp16 and self.bf16:
            raise ValueError("bf16 and fp16 exclude each other; leave one of them out")
        if self.fsdp_offload and self.distributed != "fsdp2":
            raise ValueError("fsdp_offload has no effect without distributed: fsdp2; set both")
        if self.selective_checkpointing and not self.gradient_checkpointing:
            raise ValueError("selective_checkpointing is a kind of gradient_checkpointing; set both")
        if self.early_stopping_threshold and self.early_stopping_patience is None:
            raise ValueError("early_stopping_threshold has no effect without early_stopping_patience; set both")
        if self.eval_steps is None and (self.load_best_model_at_end or self.early_stopping_patience):
            name = "load_best_model_at_end" if self.load_best_model_at_end else "early_stopping_patience"
            raise ValueError(f"{name} needs eval_steps: without it there is one evaluation, at the end")

    @property
    def micro_batch_size(self) -> int:
        """Rows that one process computes at once."""
        return self.per_device_train_batch_size or _MICRO_BATCH_SIZE

    @property
    def rows_per_step(self) -> int:
        """Rows of an optimizer step, over all processes; those of one process until `resolve_batch_size` was called."""
        return self.train_batch_size or self.micro_batch_size * (self.gradient_accumulation_steps or 1)

    def resolve_batch_size(self, world_size: int) -> TrainConfig:
        """Return the options with the three batch sizes filled in for so many processes.

        Raises ConfigError when they contradict one another, or the processes cannot divide a step evenly.
        """
        rows, size, steps = self.train_batch_size, self.per_device_train_batch_size, self.gradient_accumulation_steps
        if rows is None:
            size = size or _MICRO_BATCH_SIZE
            rows = size * (steps or 1) * world_size
        elif rows % world_size:
            numbers = [n for n in range(1, min(rows, 64) + 1) if rows % n == 0]
            fitting = f"{', '.join(map(str, numbers[:-1]))} or {numbers[-1]}" if numbers[1:] else "1"
            raise ConfigError(
                f"option 'train.train_batch_size': {world_size} processes cannot divide {rows} rows evenly; start "
                f"{fitting}, or change it"
            )
        elif size is not None and steps is not None and size * steps * world_size != rows:
            raise ConfigError(
                f"option 'train.train_batch_size': {rows} rows a step are not per_device_train_batch_size {size} times "
                f"gradient_accumulation_steps {steps} times {world_size} process{'es' * (world_size > 1)} "
                f"({size * steps * world_size}); leave gradient_accumulation_steps out, or correct one of them"
            )
        elif size is None:
            size = math.ceil(rows / world_size / steps) if steps else min(_MICRO_BATCH_SIZE, rows // world_size)
            if steps and (num := math.ceil(rows / world_size / size)) != steps:
                raise ConfigError(
                    f"option 'train.gradient_accumulation_steps': the {rows // world_size} rows that a process has of "
                    f"a step make no {steps} micro-batches of equal size, but {num} of {size}; give {num}, another "
                    "train_batch_size, or leave it out"
                )
        return dataclasses.replace(
            self,
            train_batch_size=rows,
            per_device_train_batch_size=size,
            gradient_accumulation_steps=math.ceil(rows / world_size / size),
        )

    @property
    def checkpoints_kept(self) -> int | None:
        """Return how many of the newest checkpoints are kept; None means all."""
        saves_by_time = self.save_steps is None or self.save_minutes is not None
        return self.save_total_limit or (2 if saves_by_time else None)

    @property
    def best_metric(self) -> str | None:
        """Return `metric_for_best_model` without the prefix `eval_` of transformers; loss if an option needs a best
        checkpoint and none is named."""
        if self.metric_for_best_model is not None:
            return self.metric_for_best_model.removeprefix("eval_")
        return "loss" if self.load_best_model_at_end or self.early_stopping_patience else None

    @property
    def is_greater_better(self) -> bool:
        """Return whether a greater `best_metric` is better."""
        if self.greater_is_better is not None:
            return self.greater_is_better
        return not str(self.best_metric).endswith(("loss", "perplexity"))


@dataclass(frozen=True)
class GenerationConfig:
    """Generation of answers to held-out rows, for metrics and samples."""

    max_new_tokens: Annotated[
        int, Field(ge=1, le=MAX_TOKENS, description="Largest length of an answer, in tokens."), OnResume.ANSWERS
    ] = 256
    max_rows: Annotated[
        int | None,
        Field(
            ge=1,
            le=MAX_COUNT,
            description="Largest number of held-out rows to answer, evenly spread over them; all by default.",
        ),
        OnResume.ANSWERS,
    ] = None
    num_samples: Annotated[
        int, Field(ge=0, le=MAX_COUNT, description="Answers to show before and after training."), OnResume.ANSWERS
    ] = 3
    batch_size: Annotated[
        int | None,
        Field(ge=1, le=MAX_ROWS, description="Rows of a generation batch; per_device_eval_batch_size by default."),
        OnResume.ROUNDING,
    ] = None


EMBEDDED_MODEL = "sftx:smollm2-135m-instruct"


def _check_upload(address: str | None) -> str | None:
    """Raise ValueError for what no run can be uploaded to."""
    if address is not None and not is_address(address):
        raise ValueError("an address in a store, such as s3://bucket/runs/x")
    return _check_output(address)


def _check_output(place: str | None) -> str | None:
    """Raise ValueError for an address that cannot be written to, or has a secret in it, which would be recorded."""
    if place is not None and is_address(place):
        if place.startswith(("http://", "https://")):
            raise ValueError("a place that can be written to, such as s3://bucket/runs/x")
        if mask(place) != place:
            raise ValueError("an address without a password, which belongs into the environment")
    return place


@dataclass(frozen=True)
class RunConfig:
    """All options of a run."""

    model: Annotated[
        str,
        Field(min_length=1, description="Directory or hub id of a causal language model, or its address in a store."),
        AfterValidator(mask),
    ] = EMBEDDED_MODEL
    trust_remote_code: Annotated[
        bool, Field(description="Run Python code from the directory or repository of the model.")
    ] = False
    add_tokens: Annotated[
        bool,
        Field(description="Add control tokens that the template needs and the tokenizer lacks, and train them."),
    ] = False
    data: DataConfig = DataConfig()
    plugins: Annotated[
        dict[str, dict[str, Any]],
        Field(description="Plugins with their options, in the order in which they are applied."),
    ] = field(default_factory=dict)
    train: TrainConfig = TrainConfig()
    generation: GenerationConfig = GenerationConfig()
    output_dir: Annotated[
        str | None,
        Field(
            min_length=1,
            description="Output directory of this run, which may be in a store; runs/<name>-<n> by default.",
        ),
        AfterValidator(_check_output),
        OnResume.NOTHING,
    ] = None
    upload_to: Annotated[
        str | None,
        Field(
            min_length=1,
            description="Address of the directory in a store that becomes a copy of output_dir while the run trains, "
            "such as s3://bucket/runs/x; output_dir may be such an address too.",
        ),
        AfterValidator(_check_upload),
        OnResume.NOTHING,
    ] = None
    upload_timeout: Annotated[
        float,
        Field(
            gt=0,
            le=1e9,
            description="Seconds without progress after which the end of a run waits no longer for an upload.",
        ),
        OnResume.NOTHING,
    ] = 300.0
    without: Annotated[
        tuple[str, ...],
        Field(description="Default plugins that are left out of this run (`--no-plugin`)."),
        OnResume.NOTHING,
    ] = ()
    launch: Annotated[
        LaunchConfig | None,
        Field(description="How a scheduler starts the run (`--launch`): nodes, GPUs, image, mounts and the like."),
        OnResume.NOTHING,
    ] = None


SECTIONS = frozenset(f.name for f in dataclasses.fields(RunConfig))
"""The options and sections at the top of a run file; no plugin may have such a name."""

SECTION_CLASSES: Final = {"data": DataConfig, "train": TrainConfig, "generation": GenerationConfig}
"""The sections of a run file whose options also have a flag on the command line."""


_FLAGS: Final = {
    "data.train": "data",
    "data.eval": "eval-data",
    "train.torch_compile": "compile",
    "generation.batch_size": "generation-batch-size",
}
"""Options of a run file whose flag on the command line has another name."""


def flag(dotted: str) -> str:
    """Return the flag of an option on the command line, by the option's dotted name."""
    return f"--{_FLAGS.get(dotted, dotted.rpartition('.')[2]).replace('_', '-')}"


@lru_cache
def effects_on_resume() -> dict[str, OnResume]:
    """Return what options change when a run is resumed with another value, by dotted name; no option of weights."""
    effects: dict[str, OnResume] = {}
    for section, cls in {"": RunConfig, **SECTION_CLASSES}.items():
        for name, hint in get_type_hints(cls, include_extras=True).items():
            found = [part for part in getattr(hint, "__metadata__", ()) if isinstance(part, OnResume)]
            effects |= {f"{section}.{name}".removeprefix("."): effect for effect in found}
    return effects


@lru_cache
def adapter(cls: Any) -> TypeAdapter[Any]:
    """Return pydantic's type adapter of an options dataclass, which is built once."""
    return TypeAdapter(cls)


def as_dict(config: RunConfig) -> dict[str, Any]:
    """Return the run as the values of a run file, with every default written out."""
    values: dict[str, Any] = json.loads(adapter(RunConfig).dump_json(config))
    return values
