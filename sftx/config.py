"""A run file and a command line become one frozen RunConfig.

Every option is a dataclass field with its type, bounds and help in `Annotated[...]`; the same function validates the
sections of a run file and the options of a plugin. Nothing here imports torch.
"""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Annotated, Any, Literal, TypeAlias, TypeVar, cast

from pydantic import BeforeValidator, Field, TypeAdapter, ValidationError
from pydantic_core import ErrorDetails

from sftx import run_file
from sftx.errors import ConfigError, did_you_mean
from sftx.hookspecs import DEFAULTS

T = TypeVar("T")


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


@dataclass(frozen=True)
class TrainConfig:
    """How it is trained. The names are those of transformers' TrainingArguments."""

    learning_rate: Annotated[float, Field(gt=0, description="Peak learning rate.")] = 2e-4
    num_train_epochs: Annotated[float, Field(gt=0, le=1e9, description="Passes over the data; max_steps wins.")] = 1.0
    max_steps: Annotated[int | None, Field(ge=1, description="Optimizer steps in all.")] = None
    per_device_train_batch_size: Annotated[int, Field(ge=1, description="Rows of a micro-batch.")] = 8
    gradient_accumulation_steps: Annotated[int, Field(ge=1, description="Micro-batches of a step.")] = 1
    per_device_eval_batch_size: Annotated[int, Field(ge=1, description="Rows evaluated at once.")] = 16
    lr_scheduler_type: Annotated[
        Literal["cosine", "linear", "constant"],
        Field(description="Shape of the learning rate after warm-up."),
    ] = "cosine"
    warmup_steps: Annotated[
        float, Field(ge=0, description="Steps of linear warm-up; below 1 it is a share of all steps.")
    ] = 0.0
    weight_decay: Annotated[float, Field(ge=0, description="Of AdamW; not on norms and biases.")] = 0.0
    adam_beta1: Annotated[float, Field(ge=0, lt=1, description="AdamW's first decay rate.")] = 0.9
    adam_beta2: Annotated[float, Field(ge=0, lt=1, description="AdamW's second decay rate.")] = 0.999
    adam_epsilon: Annotated[float, Field(gt=0, description="AdamW's epsilon.")] = 1e-8
    max_grad_norm: Annotated[float, Field(ge=0, description="Clip the global norm to this; 0 does not clip.")] = 1.0
    bf16: Annotated[
        bool | None, Field(description="Compute in bfloat16; by default on a GPU that can, not on a CPU.")
    ] = None
    gradient_checkpointing: Annotated[
        bool,
        Field(description="Recompute each layer in the backward pass: less memory, more time."),
    ] = False
    use_cpu: Annotated[bool, Field(description="Stay on the CPU even where there is a GPU.")] = False
    seed: Annotated[int, Field(ge=0, lt=2**32, description="Of data order, initialisation and dropout.")] = 42
    logging_steps: Annotated[int, Field(ge=1, description="Steps between two lines on the terminal.")] = 10
    save_steps: Annotated[int | None, Field(ge=1, description="Steps between two checkpoints.")] = None
    save_total_limit: Annotated[int | None, Field(ge=1, description="Checkpoints kept; the oldest goes.")] = None
    eval_steps: Annotated[
        int | None,
        Field(ge=1, description="Steps between two evaluations; the first and last state always are."),
    ] = None


@dataclass(frozen=True)
class GenerationConfig:
    """How held-out rows are answered when a metric is in the run."""

    max_new_tokens: Annotated[int, Field(ge=1, description="Longest answer, in tokens.")] = 256
    max_rows: Annotated[
        int | None, Field(ge=1, description="Most held-out rows that are answered, evenly spread; by default all.")
    ] = None
    num_samples: Annotated[int, Field(ge=0, description="Answers shown before and after training.")] = 3


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
    values: dict[str, Any] = json.loads(_adapter(RunConfig).dump_json(config))
    return values


@lru_cache
def _adapter(cls: Any) -> TypeAdapter[Any]:
    return TypeAdapter(cls)


def validate(
    cls: type[T], values: Mapping[str, Any], *, who: str = "", prefix: str = "", origins: run_file.Origins
) -> T:
    """An instance of the dataclass `cls` from JSON values, strictly: no unknown key, no bool or text for a number.

    Raises ConfigError: one line that names `who` (a plugin), the option and where it was set, what was got, and what
    would do. `prefix` is the dotted name under which `origins` knows these options.
    """
    try:
        # JSON mode is the strict one that still takes a list for a tuple and an int for a float.
        built: T = _adapter(cast(Any, cls)).validate_json(
            json.dumps(values, allow_nan=False), strict=True, extra="forbid"
        )
        return built
    except ValidationError as error:
        raise ConfigError(_explain(error.errors(), cls, who, prefix, origins)) from None
    except (TypeError, ValueError) as error:  # not JSON: a YAML tag's own type, a number out of range, a cycle
        raise ConfigError(f"{who or 'run file'}: {error}") from None


def _explain(errors: Sequence[ErrorDetails], cls: type, who: str, prefix: str, origins: run_file.Origins) -> str:
    """One line on the first wrong option; what a union would take is joined by 'or'."""
    schema = _adapter(cls).json_schema()
    path = _option_path([str(part) for part in errors[0]["loc"]], schema)
    same = [e for e in errors if [str(part) for part in e["loc"]][: len(path)] == path]
    # Of a list, the item that is wrong; not also that the list is no text.
    same = [e for e in same if len(e["loc"]) == max(len(e["loc"]) for e in same)]
    name = ".".join(path)
    if not name:  # a dataclass's own check of its options together
        return ": ".join(part for part in (origins.of(prefix.rstrip(".")), who, _expectation(same[0])) if part)
    start = ": ".join(part for part in (origins.of(prefix + name), who, f"option {name!r}") if part)
    if same[0]["type"] == "missing":
        given = f"; give it with --set {prefix.removeprefix('plugins.')}{name}=..." if prefix else ""
        return f"{start} is missing; it has no default{given}"
    if same[0]["type"] == "unexpected_keyword_argument":
        names = _names_at(path[:-1], schema)
        hint = did_you_mean(path[-1], names) or ("; known are " + ", ".join(names) if names else "; it takes none")
        return f"{start} does not exist{hint}"
    wanted = " or ".join(dict.fromkeys(_expectation(e) for e in same))
    return f"{start}: got {json.dumps(same[0]['input'], ensure_ascii=False)}, expected {wanted}"


def _expectation(error: ErrorDetails) -> str:
    message = error["msg"].removeprefix("Input should be ").removeprefix("Value error, ")
    message = message.replace("String should have ", "a string of ")
    message = message[:1].lower() + message[1:]
    return f"a number {message}" if message.startswith(("greater", "less")) else message


def _option_path(location: Sequence[str], schema: Mapping[str, Any]) -> list[str]:
    """The leading parts of pydantic's location that name options; the rest are union members and indices."""
    depth = 1
    while depth < len(location) and (location[depth].isdigit() or _names_at(location[:depth], schema)):
        depth += 1
    path = list(location[:depth])
    return path[:-1] if path and path[-1].isdigit() else path  # an item of a list is named where its own options are


def _names_at(path: Sequence[str], schema: Mapping[str, Any]) -> list[str]:
    nodes = [schema]
    for part in path:
        nodes = [child for node in nodes for child in _children(node, part, schema)]
    return [name for node in nodes for name in node.get("properties", {})]


def _children(node: Mapping[str, Any], part: str, schema: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """What a schema says of an option, or of an item of a list: each of the forms that it may take."""
    child = node.get("items") if part.isdigit() else node.get("properties", {}).get(part)
    found, open_ones = [], [child] if child is not None else []
    while open_ones:
        one = open_ones.pop()
        open_ones += one.get("anyOf", [])
        if "$ref" in one:
            open_ones.append(schema["$defs"][one["$ref"].rsplit("/", 1)[1]])
        found.append(one)
    return found


@dataclass(frozen=True)
class Loaded:
    """A run, and where each of its values was set, for errors that can only be seen later."""

    config: RunConfig
    origins: run_file.Origins


def load(
    path: Path | None,
    *,
    add: Sequence[str] = (),
    remove: Sequence[str] = (),
    assignments: Sequence[tuple[str, Any, str]] = (),
) -> Loaded:
    """The run that a file and a command line describe together; the command line wins.

    `add` and `remove` are the names after `--plugin` and `--no-plugin`; `assignments` are (dotted name, JSON value,
    what the user typed). With neither a file nor `data.train` it is the embedded default, `sftx/demo/run.yaml`.
    Raises ConfigError.
    """
    if path is None and not any(name == "data.train" for name, _, _ in assignments):
        path = run_file.EMBEDDED
    values, origins = run_file.read(path) if path is not None else ({}, run_file.Origins())
    sections = ("data", "train", "generation", "plugins")
    values = {name: value for name, value in values.items() if value is not None or name not in sections}
    values["plugins"] = plugins = _plugin_table(values, origins)
    wanted = {name: f"--plugin {name}" for name in add}
    for name in add:
        plugins.setdefault(name, {})
    named = set(plugins)
    for name, value, typed in assignments:
        parts = _path(name, plugins)
        run_file.assign(values, parts, value, typed)
        origins.set(".".join(parts), typed)
        if parts[0] == "plugins" and len(parts) > 1:
            wanted.setdefault(parts[1], typed)
    _refuse_strangers({name: typed for name, typed in wanted.items() if name not in named}, named)
    for name in remove:
        if name in wanted:
            raise ConfigError(f"--no-plugin {name}: contradicts {wanted[name]}; leave one of them out")
        plugins.pop(name, None)
    if isinstance(without := values.setdefault("without", []), list):
        values["without"] = [*without, *(name for name in dict.fromkeys(remove) if name not in without)]
    return Loaded(validate(RunConfig, values, origins=origins), origins)


def _path(name: str, plugins: Collection[str]) -> list[str]:
    """The sections that a dotted name goes through; a plugin's own name may have dots, as qwen2.5 has."""
    if name.partition(".")[0] not in SECTIONS:
        name = f"plugins.{name}"
    section, _, rest = name.partition(".")
    owners = [plugin for plugin in plugins if rest.startswith(f"{plugin}.")] if section == "plugins" else []
    if not owners:
        return name.split(".")
    owner = max(owners, key=len)
    return [section, owner, *rest.removeprefix(f"{owner}.").split(".")]


def _refuse_strangers(wanted: Mapping[str, str], named: Collection[str]) -> None:
    """An option alone brings no plugin in: it would turn full fine-tuning into LoRA. The defaults are there already."""
    for name, typed in wanted.items():
        if not any(name in names for names in DEFAULTS.values()):
            hint = did_you_mean(name, named) or f"; add --plugin {name}"
            raise ConfigError(f"{typed}: plugin {name!r} is not in this run{hint}")


def _plugin_table(values: Mapping[str, Any], origins: run_file.Origins) -> dict[str, Any]:
    """`plugins:` as a mapping; a list of names and an empty entry are the same without options."""
    table = values.get("plugins")
    if table is None:
        return {}
    if isinstance(table, list) and all(isinstance(name, str) for name in table):
        return {name: {} for name in table}
    if not isinstance(table, dict):
        raise ConfigError(
            f"{origins.of('plugins') or 'plugins'}: got {json.dumps(table, default=str)}, expected a mapping of "
            "plugin names to options, such as {chatml: {}, lora: {r: 16}}"
        )
    return {name: {} if options is None else options for name, options in table.items()}
