"""Every option of a run: a dataclass field with its type, bounds and help in `Annotated[...]`.

Nothing here imports torch.
"""

from __future__ import annotations

import dataclasses
import json
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any, Final, Literal, TypeAlias

from pydantic import BeforeValidator, Field

from sftx.config.validation import adapter
from sftx.errors import ConfigError


@dataclass(frozen=True)
class Filters:
    """Which rows are kept; the ledger has those that are not, and they are no fault of the data."""

    min_length: Annotated[int, Field(ge=0, description="Fewest tokens of an example.")] = 0
    max_length: Annotated[
        int | None, Field(ge=2, description="Most tokens of an example, whatever long_rows would do with it.")
    ] = None
    min_turns: Annotated[int, Field(ge=0, description="Fewest turns of a conversation, the system's not counted.")] = 0
    max_turns: Annotated[
        int | None, Field(ge=1, description="Most turns of a conversation, the system's not counted.")
    ] = None
    duplicates: Annotated[
        Literal["keep", "drop"], Field(description="Rows that give the very tokens of an earlier one.")
    ] = "keep"


@dataclass(frozen=True)
class Source:
    """Where rows come from, and how they are read."""

    path: Annotated[
        str, Field(min_length=1, description="File or directory of rows, directory of a saved dataset, or hub dataset.")
    ]
    weight: Annotated[
        float,
        Field(
            gt=0, le=1000, description="How often a row is seen in an epoch; when interleaving, this source's share."
        ),
    ] = 1.0
    format: Annotated[
        str | None, Field(min_length=1, description="Parser plugin of these rows, in place of data.format.")
    ] = None
    columns: Annotated[
        dict[str, str],
        Field(description="Fields that the format wants, by the columns that hold them: {prompt: question}."),
    ] = field(default_factory=dict)
    subset: Annotated[str | None, Field(description="Configuration of a hub dataset.")] = None
    split: Annotated[str | None, Field(description="Split of a hub or saved dataset; by default train.")] = None
    limit: Annotated[
        int | None, Field(ge=1, le=10**15, description="Read at most this many rows, from the first on.")
    ] = None
    filters: Annotated[Filters | None, Field(description="Which rows are kept, in place of data.filters.")] = None


def _as_source(value: Any) -> Any:
    """`PATH` or `PATH:WEIGHT`, as the command line has it, in the long form."""
    if isinstance(value, dict | Source):
        return value
    if not isinstance(value, str):
        raise ValueError("a path, or an object such as {path: a.jsonl, weight: 2}")
    path, colon, weight = value.rpartition(":")
    return {"path": path, "weight": float(weight)} if colon and _WEIGHT.fullmatch(weight) else {"path": value}


_WEIGHT = re.compile(r"\d+(\.\d*)?|\.\d+")


def _as_sources(value: Any) -> Any:
    items = value if isinstance(value, list | tuple) else (value,)
    return tuple(_as_source(item) for item in items)


Sources = Annotated[
    tuple[Source, ...],
    BeforeValidator(_as_sources, json_schema_input_type=str | Source | list[str | Source]),
]
"""One source or several, each a path or all that is to say of it."""


Role: TypeAlias = Literal["system", "user", "assistant", "tool"]


def _as_roles(value: Any) -> Any:
    """Roles one by one, or several between commas as a command line has them."""
    items = value if isinstance(value, list | tuple) else [value]
    parts = (item.split(",") if isinstance(item, str) else [item] for item in items)
    return tuple(role for roles in parts for role in roles)


@dataclass(frozen=True)
class DataConfig:
    """What is trained on."""

    train: Annotated[
        Sources,
        Field(description="File, directory or hub dataset of training rows, as PATH or PATH:WEIGHT; repeat for more."),
    ] = ()
    eval: Annotated[
        Sources, Field(description="File, directory or hub dataset of held-out rows; repeat for more.")
    ] = ()
    format: Annotated[
        str | None,
        Field(description="Parser plugin that reads every row; by default each row's fields decide."),
    ] = None
    mix_strategy: Annotated[
        Literal["concat", "interleave_under", "interleave_over"],
        Field(
            description="An epoch of several sources: each as often as its weight says; or shares by weight, until the "
            "first source is used up, or until every one is."
        ),
    ] = "concat"
    max_length: Annotated[int, Field(ge=2, description="Longest example, in tokens.")] = 2048
    long_rows: Annotated[
        Literal["cut_end", "cut_oldest", "cut_proportional", "split", "drop", "error"],
        Field(
            description="A row of more than max_length tokens: cut its end off, leave out its oldest turns, cut "
            "prompts and answers in proportion, make several examples of it, drop it, or stop."
        ),
    ] = "cut_end"
    invalid_rows: Annotated[
        Literal["error", "drop"], Field(description="A row that no format can read: stop, or drop it.")
    ] = "error"
    max_dropped: Annotated[
        float,
        Field(ge=0, le=1, description="Largest share of rows that may be dropped before the run stops."),
    ] = 0.05
    filters: Annotated[Filters, Field(description="Which rows are kept.")] = Filters()
    train_roles: Annotated[
        tuple[Role, ...],
        BeforeValidator(_as_roles, json_schema_input_type=Role | list[Role]),
        Field(description="Roles whose turns are trained, where the row itself does not say."),
    ] = ("assistant",)
    train_turns: Annotated[
        Literal["all", "last"], Field(description="Train every turn of these roles, or a conversation's last one only.")
    ] = "all"
    train_on_prompt: Annotated[bool, Field(description="Train every token, of prompts and control tokens too.")] = False
    train_turn_end: Annotated[bool, Field(description="Train the token that ends a trained turn.")] = True
    system: Annotated[
        str | None, Field(description="System text of every conversation, in place of its own; empty for none.")
    ] = None
    streaming: Annotated[
        bool, Field(description="Read while training, plan_window examples ahead; needs max_steps.")
    ] = False
    plan_window: Annotated[
        int, Field(ge=1, le=10**9, description="Examples that are shuffled together when streaming.")
    ] = 10_000
    num_proc: Annotated[
        int | None, Field(ge=1, description="Processes that encode; by default one a core for many rows, else one.")
    ] = None
    cache: Annotated[
        bool | None, Field(description="Keep the encoded rows on disk for the next run; by default when they are many.")
    ] = None


def _known_by(names: Mapping[str, str]) -> Callable[[Any], Any]:
    """Takes transformers' name of a thing for ours."""
    return lambda value: names.get(value, value) if isinstance(value, str) else value


_MICRO_BATCH_SIZE: Final = 8

_ONLY_FOR: Final = {
    "min_lr_ratio": ("cosine", "linear", "polynomial", "warmup_stable_decay"),
    "lr_power": ("polynomial",),
    "lr_decay_steps": ("warmup_stable_decay",),
    "lr_decay_type": ("warmup_stable_decay",),
}
"""Options of a schedule, and the schedules that have them."""


@dataclass(frozen=True)
class TrainConfig:
    """How it is trained. The names are those of transformers' TrainingArguments where it has the thing."""

    learning_rate: Annotated[float, Field(gt=0, description="Peak learning rate.")] = 2e-4
    embedding_learning_rate: Annotated[
        float | None, Field(gt=0, description="Peak learning rate of embedding and output head, where they train.")
    ] = None
    num_train_epochs: Annotated[float, Field(gt=0, le=1e9, description="Passes over the data; max_steps wins.")] = 1.0
    max_steps: Annotated[int | None, Field(ge=1, description="Optimizer steps in all.")] = None
    train_batch_size: Annotated[
        int | None,
        Field(
            ge=1,
            description="Rows of an optimizer step, over all processes; by default per_device_train_batch_size times "
            "gradient_accumulation_steps times the number of processes.",
        ),
    ] = None
    per_device_train_batch_size: Annotated[
        int | None, Field(ge=1, description="Rows that a process computes at once; by default 8.")
    ] = None
    gradient_accumulation_steps: Annotated[
        int | None,
        Field(
            ge=1,
            description="Micro-batches that each process computes in a step; by default as many as train_batch_size "
            "needs, or 1.",
        ),
    ] = None
    per_device_eval_batch_size: Annotated[int, Field(ge=1, description="Rows evaluated at once.")] = 16
    lr_scheduler_type: Annotated[
        Literal["cosine", "linear", "constant", "polynomial", "warmup_stable_decay", "minimind"],
        BeforeValidator(_known_by({"cosine_with_min_lr": "cosine", "constant_with_warmup": "constant"})),
        Field(description="Shape of the learning rate after warm-up."),
    ] = "cosine"
    warmup_steps: Annotated[
        float, Field(ge=0, description="Steps of linear warm-up; below 1 it is a share of all steps.")
    ] = 0.0
    min_lr_ratio: Annotated[float, Field(ge=0, le=1, description="Where the rate ends, as a share of the peak.")] = 0.0
    lr_decay_steps: Annotated[
        float, Field(ge=0, description="Last steps of warmup_stable_decay, which decay; below 1 a share of all steps.")
    ] = 0.1
    lr_decay_type: Annotated[
        Literal["linear", "cosine", "1-sqrt"], Field(description="Shape of the decay of warmup_stable_decay.")
    ] = "linear"
    lr_power: Annotated[float, Field(gt=0, description="Exponent of the polynomial schedule.")] = 1.0
    optim: Annotated[
        Literal[
            "adamw", "adamw_8bit", "paged_adamw", "paged_adamw_8bit", "adafactor", "lion", "sgd", "muon", "adamw_bf16"
        ],
        BeforeValidator(
            _known_by(
                {"adamw_torch": "adamw", "adamw_torch_fused": "adamw", "adamw_bnb_8bit": "adamw_8bit"}
                | {"paged_adamw_32bit": "paged_adamw", "lion_32bit": "lion"}
            )
        ),
        Field(
            description="Optimizer; those of 8 bits and paged ones are bitsandbytes'; muon trains matrices, and AdamW "
            "the rest; adamw_bf16 keeps weights in bfloat16 and the bits that they lack beside them."
        ),
    ] = "adamw"
    weight_decay: Annotated[float, Field(ge=0, description="Decoupled weight decay; not on norms and biases.")] = 0.0
    adam_beta1: Annotated[float, Field(ge=0, lt=1, description="AdamW's and Lion's first decay rate.")] = 0.9
    adam_beta2: Annotated[
        float | None, Field(ge=0, lt=1, description="Second decay rate of AdamW (by default 0.999) and Lion (0.99).")
    ] = None
    adam_epsilon: Annotated[float, Field(gt=0, description="AdamW's epsilon.")] = 1e-8
    momentum: Annotated[
        float | None, Field(ge=0, lt=1, description="Of sgd (by default 0) and muon (by default 0.95).")
    ] = None
    max_grad_norm: Annotated[float, Field(ge=0, description="Clip the global norm to this; 0 does not clip.")] = 1.0
    bf16: Annotated[
        bool | None, Field(description="Compute in bfloat16; by default on a GPU that can, not on a CPU.")
    ] = None
    fp16: Annotated[bool, Field(description="Compute in float16, with a loss scale that adapts itself.")] = False
    tf32: Annotated[
        bool, Field(description="Let a GPU round the factors of fp32 products to TensorFloat-32: faster, less exact.")
    ] = False
    gradient_checkpointing: Annotated[
        bool,
        Field(description="Recompute each layer in the backward pass: less memory, more time."),
    ] = False
    selective_checkpointing: Annotated[
        bool,
        Field(description="With gradient_checkpointing: keep what products and attention gave, recompute the rest."),
    ] = False
    torch_compile: Annotated[bool, Field(description="Compile the decoder's layers with torch.compile.")] = False
    use_cpu: Annotated[bool, Field(description="Stay on the CPU even where there is a GPU.")] = False
    distributed: Annotated[
        Literal["ddp", "fsdp2"],
        Field(
            description="Of several processes: each holds the whole model (ddp), or its share of every layer (fsdp2)."
        ),
    ] = "ddp"
    fsdp_offload: Annotated[
        bool, Field(description="With fsdp2: keep the shares, and the optimizer's state, in the host's memory.")
    ] = False
    seed: Annotated[int, Field(ge=0, lt=2**32, description="Of data order, initialisation and dropout.")] = 42
    logging_steps: Annotated[int, Field(ge=1, description="Steps between two lines on the terminal.")] = 10
    save_steps: Annotated[int | None, Field(ge=1, description="Steps between two checkpoints.")] = None
    save_minutes: Annotated[
        float | None, Field(gt=0, description="Minutes between two checkpoints; by default 30 without save_steps.")
    ] = None
    save_total_limit: Annotated[
        int | None,
        Field(
            ge=1,
            description="Newest checkpoints kept, besides the best; by default all of save_steps, 2 of save_minutes.",
        ),
    ] = None
    eval_steps: Annotated[
        int | None,
        Field(ge=1, description="Steps between two evaluations; the first and last state always are."),
    ] = None
    metric_for_best_model: Annotated[
        str | None,
        Field(
            min_length=1,
            description="Held-out metric that decides which checkpoint is the best, saved and kept; loss where needed.",
        ),
    ] = None
    greater_is_better: Annotated[
        bool | None,
        Field(description="Whether that metric is to be high; by default unless its name ends in loss or perplexity."),
    ] = None
    load_best_model_at_end: Annotated[
        bool, Field(description="Make the result of the best checkpoint instead of the last step.")
    ] = False
    early_stopping_patience: Annotated[
        int | None, Field(ge=1, description="Stop after this many evaluations in a row that are no better.")
    ] = None
    early_stopping_threshold: Annotated[
        float, Field(ge=0, description="By how much an evaluation must be better to count.")
    ] = 0.0

    def __post_init__(self) -> None:
        if self.fp16 and self.bf16:
            raise ValueError("bf16 and fp16 exclude each other; leave one of them out")
        if self.fsdp_offload and self.distributed != "fsdp2":
            raise ValueError("fsdp_offload has no effect without distributed: fsdp2; set both")
        if self.selective_checkpointing and not self.gradient_checkpointing:
            raise ValueError("selective_checkpointing is a kind of gradient_checkpointing; set both")
        for name, schedules in _ONLY_FOR.items():
            default = type(self).__dataclass_fields__[name].default
            if getattr(self, name) != default and self.lr_scheduler_type not in schedules:
                raise ValueError(
                    f"{name} has no effect with lr_scheduler_type {self.lr_scheduler_type}; leave it out, or choose "
                    f"{' or '.join(schedules)}"
                )
        if self.early_stopping_threshold and self.early_stopping_patience is None:
            raise ValueError("early_stopping_threshold has no effect without early_stopping_patience; set both")
        if self.eval_steps is None and (self.load_best_model_at_end or self.early_stopping_patience):
            name = "load_best_model_at_end" if self.load_best_model_at_end else "early_stopping_patience"
            raise ValueError(f"{name} needs eval_steps: without them there is one evaluation, at the end")

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
        return dataclasses.replace(
            self,
            train_batch_size=rows,
            per_device_train_batch_size=size,
            gradient_accumulation_steps=math.ceil(rows / world_size / size),
        )

    @property
    def checkpoints_kept(self) -> int | None:
        """The newest so many; None: all."""
        by_clock = self.save_steps is None or self.save_minutes is not None
        return self.save_total_limit or (2 if by_clock else None)

    @property
    def best_metric(self) -> str | None:
        """`metric_for_best_model` as it is reported here; transformers puts `eval_` before the name. By default the
        loss, where something depends on what is best."""
        by_default = "loss" if self.load_best_model_at_end or self.early_stopping_patience else None
        return by_default if self.metric_for_best_model is None else self.metric_for_best_model.removeprefix("eval_")

    @property
    def is_greater_better(self) -> bool:
        """Of `best_metric`."""
        if self.greater_is_better is not None:
            return self.greater_is_better
        return not str(self.best_metric).endswith(("loss", "perplexity"))


@dataclass(frozen=True)
class GenerationConfig:
    """How held-out rows are answered when a metric is in the run."""

    max_new_tokens: Annotated[int, Field(ge=1, description="Longest answer, in tokens.")] = 256
    max_rows: Annotated[
        int | None, Field(ge=1, description="Most held-out rows that are answered, evenly spread; by default all.")
    ] = None
    num_samples: Annotated[int, Field(ge=0, description="Answers shown before and after training.")] = 3
    batch_size: Annotated[
        int | None, Field(ge=1, description="Rows answered at once; by default per_device_eval_batch_size.")
    ] = None


EMBEDDED_MODEL = "sftx:smollm2-135m-instruct"


@dataclass(frozen=True)
class RunConfig:
    """All that a run is."""

    model: Annotated[str, Field(min_length=1, description="Directory or hub id of a causal language model.")] = (
        EMBEDDED_MODEL
    )
    trust_remote_code: Annotated[
        bool, Field(description="Run Python code that the model's directory or repository brings along.")
    ] = False
    add_tokens: Annotated[
        bool,
        Field(description="Add the control tokens that the template needs and the tokenizer lacks, and train them."),
    ] = False
    data: DataConfig = DataConfig()
    plugins: Annotated[
        dict[str, dict[str, Any]],
        Field(description="Plugins in the order of their application, with options."),
    ] = field(default_factory=dict)
    train: TrainConfig = TrainConfig()
    generation: GenerationConfig = GenerationConfig()
    output_dir: Annotated[
        str | None, Field(min_length=1, description="Directory of this run; by default runs/<name>-<n>.")
    ] = None
    without: Annotated[
        tuple[str, ...], Field(description="Default plugins that this run does without (`--no-plugin`).")
    ] = ()


SECTIONS = frozenset(f.name for f in dataclasses.fields(RunConfig))
"""The first words of dotted names that no plugin may be called."""


def as_dict(config: RunConfig) -> dict[str, Any]:
    """The run file that says the same: plain JSON values, every default written out."""
    values: dict[str, Any] = json.loads(adapter(RunConfig).dump_json(config))
    return values
