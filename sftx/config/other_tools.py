"""This table says what to write here for an option of TRL, transformers, PEFT, LLaMA-Factory or Axolotl.

The table is imported when a run has an option that sftx does not know. `answer` looks an option up together with its
value, since `packing: false` asks for nothing and `packing: true` for a plugin. docs/migrating.md is made of it.
"""

from __future__ import annotations

import dataclasses
import fnmatch
import json
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any, Final, Literal

from sftx.config.named_plugins import LR_SCHEDULER_TYPE, OPTIM
from sftx.config.options import SECTION_CLASSES

Given = Mapping[str, Any]
"""All options of other tools that stand beside the one in question, by their names."""

EACH_SOURCE: Final = "data.train.*."
"""Begins the name of an option that every source of `data.train` gets."""


@dataclass(frozen=True)
class Answer:
    """Says what an option of another tool becomes here, with a certain value."""

    kind: Literal["write", "leave out", "not here"]
    write: Mapping[str, Any] = field(default_factory=dict)
    """The options to write instead, by dotted names, with their values; `plugins.packed: {}` adds a plugin."""
    why: str = ""


@dataclass(frozen=True)
class Rule:
    """How a value becomes an Answer."""

    kind: Literal["write", "leave out", "not here"]
    make: Callable[[Any, Given], Answer]
    targets: tuple[str, ...] = ()
    """The options that it may write, for the documentation."""
    why: str = ""


class _Any:
    """The key of the rule for every value that has no rule of its own."""


ANY: Final = _Any()


@dataclass(frozen=True)
class Row:
    """Options of other tools that are answered alike. A name may be a pattern, such as `ddp_*`."""

    names: tuple[str, ...]
    rules: tuple[tuple[Any, Rule], ...]


# --- rules ----------------------------------------------------------------------------------------


def _to(target: str, convert: Callable[[Any], Any] | None = None, *, why: str = "") -> Rule:
    """The value, converted if need be, is written to one option here."""
    return Rule(
        "write", lambda value, _: Answer("write", {target: convert(value) if convert else value}, why), (target,), why
    )


def _write(options: Mapping[str, Any], *, why: str = "") -> Rule:
    """The same is written whatever the value."""
    answer = Answer("write", options, why)
    targets = tuple(name if value == {} else f"{name}: {_brief(value)}" for name, value in options.items())
    return Rule("write", lambda *_: answer, targets, why)


def _plugin(name: str, *, why: str = "") -> Rule:
    return _write({f"plugins.{name}": {}}, why=why)


def _made(make: Callable[[Any, Given], Answer], *targets: str, why: str = "") -> Rule:
    """A function decides."""
    return Rule("write", make, targets, why)


def _leave_out(why: str = "") -> Rule:
    return Rule("leave out", lambda *_: Answer("leave out", why=why), why=why)


def _not_here(why: str) -> Rule:
    return Rule("not here", lambda *_: Answer("not here", why=why), why=why)


def _row(names: str, *rules: Rule | tuple[Any, Rule]) -> Row:
    """A rule without a value is for every value that has none of its own."""
    return Row(tuple(names.split()), tuple(rule if isinstance(rule, tuple) else (ANY, rule) for rule in rules))


def _brief(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


# --- conversions ----------------------------------------------------------------------------------


def _names(value: Any) -> Any:
    """LLaMA-Factory writes lists as `q_proj,v_proj`."""
    return [part.strip() for part in value.split(",")] if isinstance(value, str) and "," in value else value


def _name_list(value: Any) -> Any:
    return [value] if isinstance(value, str) and "," not in value else _names(value)


def _rank(value: Any, given: Given) -> Answer:
    """LLaMA-Factory's lora_alpha is twice the rank where none is given; here it has a default of its own."""
    options: dict[str, Any] = {"plugins.lora.r": value}
    if "lora_alpha" not in given and "plugins.lora.lora_alpha" not in given and type(value) is int:
        return Answer(
            "write", {**options, "plugins.lora.lora_alpha": 2 * value}, "LLaMA-Factory's lora_alpha is twice the rank"
        )
    return Answer("write", options)


def _pissa(value: Any, given: Given) -> Answer:
    """LLaMA-Factory finds the singular values in 16 iterations, or exactly with -1."""
    iterations = given.get("pissa_iter", 16)
    init = "pissa" if iterations == -1 else f"pissa_niter_{int(iterations)}"
    return Answer("write", {"plugins.lora.init_lora_weights": init})


def _adapters(value: Any, given: Given) -> Answer:
    """LLaMA-Factory merges all adapters but the last, which it trains on; or all of them, below a new one."""
    names = _name_list(value)
    below = names if given.get("create_new_adapter") else names[:-1]
    options = {"plugins.lora.base_adapters": below} if below else {}
    return Answer("write", options if below == names else {"plugins.lora.init_from": names[-1], **options})


_DATASETS: Final = (
    "dataset",
    "train_dataset",
    "dataset_name",
    "dataset_path",
    "data_path",
    "train_file",
    "train_files",
)


def _of_source(field: str, convert: Callable[[Any], Any] = lambda value: value) -> Rule:
    """An option that every source gets: written where the sources are, if another option names them."""

    def make(value: Any, given: Given) -> Answer:
        if any(name in given for name in _DATASETS):
            return Answer("not here", why="data.train says it of each source")
        return Answer("write", {f"{EACH_SOURCE}{field}": convert(value)}, "of each source")

    return _made(make, f"{EACH_SOURCE}{field}", why="of each source")


_SOURCE_FIELDS: Final = {"limit": "max_samples", "subset": "dataset_config", "split": "dataset_train_split"}


def _with_fields(source: Any, given: Given) -> Any:
    """A source with the values that other options give to each."""
    values = {
        here: given[there] for here, there in _SOURCE_FIELDS.items() if given.get(there) not in (None, "train", "")
    }
    if given.get("dataset_text_field") not in (None, "text"):
        values["columns"] = {"text": given["dataset_text_field"]}
    return {"path": source, **values} if values else source


def _sources(value: Any, given: Given) -> list[Any]:
    """The sources that LLaMA-Factory's `dataset: identity,alpaca_en_demo` names, in files of its dataset_info.json."""
    names = value if isinstance(value, list) else [part.strip() for part in str(value).split(",")]
    directory = Path(str(given.get("dataset_dir") or "data"))
    try:
        known = json.loads((directory / "dataset_info.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        known = {}
    sources: list[Any] = []
    for name in names:
        entry = known.get(name) if isinstance(known, dict) and isinstance(name, str) else None
        if isinstance(entry, dict) and "file_name" in entry:
            sources.append(str(directory / str(entry["file_name"])))
        else:
            sources.append(entry["hf_hub_url"] if isinstance(entry, dict) and "hf_hub_url" in entry else name)
    return [_with_fields(source, given) for source in sources]


def _dataset(target: str) -> Rule:
    why = "the path of each file (LLaMA-Factory's names are those of its dataset_info.json), or a hub id"
    return _made(lambda value, given: Answer("write", {target: _sources(value, given)}, why), target, why=why)


_AXOLOTL_TYPES: Final = {"alpaca": "alpaca", "sharegpt": "sharegpt", "completion": "text"}


_SOURCE_KEYS: Final = ("path", "data_files", "name", "subset", "split", "type", "field_messages", "field", "ds_type")


def _axolotl_source(entry: Any) -> Any:
    """A source of Axolotl's `datasets`, or of TRL's."""
    if not isinstance(entry, dict):
        return entry
    source: dict[str, Any] = {}
    files = entry.get("data_files")
    source["path"] = (files[0] if isinstance(files, list) and files else files) or entry.get("path")
    for here, names in (("subset", ("name", "subset")), ("split", ("split",))):
        value = next((entry[name] for name in names if entry.get(name) is not None), None)
        if value is not None and value != "train":
            source[here] = value
    if isinstance(entry.get("type"), str) and entry["type"] in _AXOLOTL_TYPES:
        source["format"] = _AXOLOTL_TYPES[entry["type"]]
    if entry.get("field_messages") not in (None, "messages", "conversations"):
        source["columns"] = {"messages": entry["field_messages"]}
    if entry.get("field") not in (None, "text"):
        source["columns"] = {"text": entry["field"]}
    return source["path"] if list(source) == ["path"] else source


def _source_list(target: str) -> Rule:
    why = "a path or a mapping for each; the format of a row is recognised by its fields"

    def make(value: Any, _: Given) -> Answer:
        entries = value if isinstance(value, list) else [value]
        lost = {
            key
            for entry in entries
            if isinstance(entry, dict)
            for key, setting in entry.items()
            if key not in _SOURCE_KEYS or (key == "type" and isinstance(setting, dict))
        }
        lost_text = f"; not carried over: {', '.join(sorted(lost))}" if lost else ""
        return Answer("write", {target: [_axolotl_source(entry) for entry in entries]}, f"{why}{lost_text}")

    return _made(make, target, why=why)


def _all_tokens(why: str) -> Rule:
    """TRL trains every token of a row, unless the other of its two options says otherwise."""

    def make(_: Any, given: Given) -> Answer:
        if True in (given.get("completion_only_loss"), given.get("assistant_only_loss")):
            return Answer("leave out", why="only answers are trained")
        return Answer("write", {"data.train_on_prompt": True}, why)

    return _made(make, "data.train_on_prompt: true", why=why)


def _is_packed(given: Given) -> bool:
    return any(given.get(name) for name in ("packing", "sample_packing", "neat_packing")) or "plugins.packed" in given


def _padded(option: str) -> Rule:
    """An option of the plugin `padded`, which packed rows do without."""

    def make(value: Any, given: Given) -> Answer:
        if _is_packed(given):
            return Answer("leave out", why="packed rows have no padding")
        return Answer("write", {f"plugins.padded.{option}": value})

    return _made(make, f"plugins.padded.{option}")


def _tokenizer_template(option: str, why: str) -> Rule:
    """An option of the tokenizer's own template, which a template by a plugin of its own has not."""

    def make(value: Any, given: Given) -> Answer:
        named = given.get("template", given.get("chat_template"))
        if named is not None and _template(named, given).write != {"plugins.tokenizer": {}}:
            return Answer("not here", why=why)
        return Answer("write", {f"plugins.tokenizer.{option}": value})

    return _made(make, f"plugins.tokenizer.{option}", why=f"with the tokenizer's own template; else {why}")


def _of_tracker(plugin: str, option: str) -> Rule:
    """An option of a tracker, which means nothing where the run does not report to it."""

    def make(value: Any, given: Given) -> Answer:
        if plugin in str(given.get("report_to")) or given.get("report_to") == "all" or f"plugins.{plugin}" in given:
            return Answer("write", {f"plugins.{plugin}.{option}": value})
        return Answer("leave out", why=f"without report_to: {plugin} it has no effect")

    return _made(make, f"plugins.{plugin}.{option}")


_FUNCTIONS: Final = "a function here has the parameters prompts, answers and rows"
_KNOWN_FUNCTIONS: Final[Mapping[str, Mapping[str, Any]]] = {
    "accuracy_reward": {"plugins.reward-exact-match": {}},
    "reasoning_accuracy_reward": {
        "plugins.reward-regex.pattern": r"(?s).*</think>(.*)",
        "plugins.reward-regex.group": 1,
    },
    "think_format_reward": {"plugins.reward-regex.pattern": r"(?s)<think>(?!.*<think>)(.*?)</think>.*"},
    "get_soft_overlong_punishment": {
        "plugins.reward-length.max_completion_len": 1280,
        "plugins.reward-length.soft_punish_cache": 256,
    },
}
"""What stands for the functions that TRL's own script knows by name."""


def _reward_functions(value: Any, given: Given) -> Answer:
    """TRL's names, or `my_lib.rewards.custom_reward`, which is a function in a file here."""
    options: dict[str, Any] = {}
    for name in _name_list(value):
        module, _, function = str(name).rpartition(".")
        found = _KNOWN_FUNCTIONS.get(str(name))
        if found is None and not module:
            return Answer("not here", why=f"{_brief(name)} is not known; give a function of a file of yours")
        if found is None and "plugins.reward-function.function" in options:
            return Answer("not here", why="a run has one reward-function; let one function call the others")
        options |= found or {"plugins.reward-function.function": f"{module.replace('.', '/')}.py:{function}"}
    return Answer("write", options, _FUNCTIONS)


def _save_best(_: Any, given: Given) -> Answer:
    if "metric_for_best_model" in given or "train.metric_for_best_model" in given:
        return Answer("leave out", why="train.metric_for_best_model has the best checkpoint saved")
    return Answer("write", {"train.metric_for_best_model": "loss"})


def _test_split(value: Any, given: Given) -> Answer:
    strategy = given.get("eval_strategy", given.get("evaluation_strategy"))
    if strategy in (None, False, "no") or not isinstance(given.get("dataset_name"), str):
        return Answer("leave out", why="TRL reads it only when eval_strategy is set")
    return Answer("write", {"data.eval": [{"path": given["dataset_name"], "split": value}]})


def _packing_strategy(value: Any, given: Given) -> Answer:
    if not given.get("packing"):
        return Answer("leave out", why="without packing it has no effect")
    if value in ("bfd", "wrapped"):
        return Answer("write", {"plugins.packed.strategy": value})
    return Answer("not here", why="a row longer than plugins.packed.length is cut as data.long_rows says")


_TEMPLATES: Final = {
    **dict.fromkeys(("chatml", "chatml_de", "qwen3_nothink", "hermes2"), "chatml"),
    **dict.fromkeys(("qwen", "qwen2", "qwen2.5", "qwen_25", "qwen25"), "qwen2.5"),
    **dict.fromkeys(("llama3", "llama-3"), "llama3"),
    **dict.fromkeys(("gemma", "gemma2"), "gemma"),
    **dict.fromkeys(("mistral", "mistral_v1", "mistral_v2v3", "mistral_v3_tekken"), "mistral"),
    **dict.fromkeys(("phi", "phi_3", "phi_35", "phi3"), "phi"),
    **dict.fromkeys(("deepseek3", "deepseek_v3"), "deepseek3"),
    **{name: name for name in ("qwen3", "gemma3", "llama2", "vicuna", "zephyr")},
    "alpaca": "alpaca-template",
}
"""Templates of LLaMA-Factory and Axolotl that a plugin here renders."""


def _template(value: Any, _: Given) -> Answer:
    if isinstance(value, str) and (name := _TEMPLATES.get(value.lower())) is not None:
        return Answer("write", {f"plugins.{name}": {}})
    return Answer("write", {"plugins.tokenizer": {}}, "the template that the tokenizer brings")


def _dtype(value: Any, given: Given) -> Answer:
    if {"bf16", "fp16", "train.bf16", "train.fp16"} & set(given):
        return Answer("leave out", why="bf16 and fp16 say what is computed in; trained weights are in fp32")
    name = str(value).removeprefix("torch.").lower()
    if name in ("bfloat16", "bf16"):
        return Answer("write", {"train.bf16": True})
    if name in ("float16", "fp16", "half"):
        return Answer("write", {"train.fp16": True})
    if name in ("float32", "fp32", "float"):
        return Answer("write", {"train.bf16": False})
    if name == "auto":
        return Answer("leave out", why="bfloat16 is the default on a GPU that supports it")
    return Answer("not here", why="train.bf16 or train.fp16 sets what is computed in; trained weights are in fp32")


def _trackers(value: Any, given: Given) -> Answer:
    names = [str(name) for name in (value if isinstance(value, list) else _names(value) or [])] or ["none"]
    names = [value] if isinstance(value, str) and "," not in value else names
    plugins = [name for name in names if name in ("wandb", "tensorboard", "mlflow")]
    others = [name for name in names if name not in plugins and name not in ("none", "all", "jsonl")]
    if others and not plugins:
        return Answer("not here", why=f"trackers here are wandb, tensorboard and mlflow, not {', '.join(others)}")
    if plugins:
        return Answer("write", {f"plugins.{name}": {} for name in plugins})
    return Answer("leave out", why="metrics.jsonl and report.html are written without a tracker")


def _run_name(value: Any, given: Given) -> Answer:
    tracker = str(given.get("report_to"))
    for name, option in (("wandb", "plugins.wandb.name"), ("mlflow", "plugins.mlflow.run_name")):
        if name in tracker:
            return Answer("write", {option: value})
    return Answer("leave out", why="a run is named after its output directory")


_OPTIMIZERS: Final = f"optimizers here are {', '.join(OPTIM.built_in)}, and plugins (docs/hooks/optimizer.md)"


def _optimizer(value: Any, _: Given) -> Answer:
    known = {"adamw_hf": "adamw", "adamw_torch_8bit": "adamw_8bit", "adamw_apex_fused": "adamw"}
    name = known.get(str(value), str(value))
    name = OPTIM.aliases.get(name, name)
    if name in OPTIM.built_in:
        return Answer("write", {"train.optim": name})
    return Answer("not here", why=_OPTIMIZERS)


def _schedule(value: Any, _: Given) -> Answer:
    name = LR_SCHEDULER_TYPE.aliases.get(value, value) if isinstance(value, str) else None
    if name in LR_SCHEDULER_TYPE.built_in:
        return Answer("write", {"train.lr_scheduler_type": name})
    built_in = ", ".join(LR_SCHEDULER_TYPE.built_in)
    return Answer("not here", why=f"schedules here are {built_in}, and plugins (docs/hooks/schedule.md)")


def _schedule_options(value: Any, given: Given) -> Answer:
    options: dict[str, Any] = {}
    peak = given.get("learning_rate", given.get("train.learning_rate"))
    for name, number in (value if isinstance(value, dict) else {"": value}).items():
        if name in ("min_lr_rate", "min_lr_ratio"):
            options["train.min_lr_ratio"] = number
        elif name == "min_lr" and isinstance(peak, float) and peak > 0 and isinstance(number, float):
            options["train.min_lr_ratio"] = number / peak
        elif name == "num_decay_steps":
            options["train.lr_decay_steps"] = number
        elif name == "decay_type":
            options["train.lr_decay_type"] = number
        elif name == "power":
            options["train.lr_power"] = number
        else:
            return Answer("not here", why="options of a schedule here are min_lr_ratio, lr_decay_steps and lr_power")
    return Answer("write", options)


def _sharding(value: Any, _: Given) -> Answer:
    """FSDP and DeepSpeed, as a switch, a list of words, or a configuration."""
    text = json.dumps(value).lower()
    if any(word in text for word in ("z0", "zero0", "no_shard")):
        return Answer("leave out", why="several processes hold the whole model each by default: sftx run --nproc N")
    options: dict[str, Any] = {"train.distributed": "fsdp2"}
    settings = (
        {**value, **(value.get("zero_optimization") or {})} if isinstance(value, dict) else {text: "offload" in text}
    )
    if any("offload" in name and setting not in (False, None) for name, setting in settings.items()):
        options["train.fsdp_offload"] = True
    return Answer("write", options, "shards of every layer, with sftx run --nproc N")


def _sharding_options(value: Any, given: Given) -> Answer:
    if not isinstance(value, dict) or not ("fsdp" in given or value.get("name") == "fsdp2" or "fsdp_version" in value):
        return Answer("leave out", why="train.distributed: fsdp2 needs no options of its own")
    answer = _sharding(value, given)
    return dataclasses.replace(answer, why="")


def _adapter_options(value: Any, given: Given) -> Answer:
    """A mapping of PEFT's options under one name, each of which has a row of its own."""
    if not isinstance(value, dict):
        return Answer("not here", why="the options of LoRA are those of plugins.lora")
    if str(value.get("name", value.get("peft_type", "lora"))).lower() != "lora":
        return Answer("not here", why=_LORA_ONLY)
    options: dict[str, Any] = {"plugins.lora": {}}
    lost: list[str] = []
    for name, setting in value.items():
        if name == "name":
            continue
        inner = answer(name, setting, {**given, **value})
        if inner is not None and inner.kind == "write":
            options.pop("plugins.lora", None)
            options |= inner.write
        elif inner is None or inner.kind == "not here":
            lost.append(name)
    return Answer("write", options, f"not carried over: {', '.join(lost)}" if lost else "")


def _of_freeze(option: str, convert: Callable[[Any], Any] = lambda value: value) -> Rule:
    """An option of LLaMA-Factory's partial fine-tuning, which it reads for that alone."""

    def make(value: Any, given: Given) -> Answer:
        if given.get("finetuning_type", "freeze") != "freeze":
            return Answer("leave out", why="without finetuning_type: freeze it has no effect")
        return Answer("write", {f"plugins.freeze.{option}": convert(value)})

    return _made(make, f"plugins.freeze.{option}")


def _unfrozen(value: Any, _: Given) -> Answer:
    """Axolotl's regular expressions match from the start of a parameter's name, and may end before its end."""
    patterns = [value] if isinstance(value, str) else list(value)
    if ranges := [pattern for pattern in patterns if re.search(r"\[\d*:\d*\]$", pattern)]:
        return Answer("not here", why=f"{ranges[0]} trains some rows of a parameter; freeze trains whole parameters")
    whole = [
        pattern
        if re.fullmatch(r"\^[^|]*\$", pattern)
        else f"^(?:{pattern}).*"
        if "|" in pattern
        else f"^{pattern.lstrip('^')}.*"
        for pattern in patterns
    ]
    return Answer("write", {"plugins.freeze.trainable_layers": 0, "plugins.freeze.extra_modules": whole})


def _special_tokens(value: Any, _: Given) -> Answer:
    usual = {"pad_token", "eos_token", "bos_token", "unk_token"}
    if isinstance(value, dict) and set(value) <= usual:
        return Answer("leave out", why="padding is masked by its length, and the template names the token that stops")
    return Answer("write", {"add_tokens": True}, "adds the control tokens of the template that the tokenizer lacks")


def _whole_number(target: str) -> tuple[tuple[Any, Rule], ...]:
    return (
        (float, _not_here("a number of steps is understood, a share of them is not")),
        (ANY, _to(target)),
    )


def _eval_by_steps(_: Any, given: Given) -> Answer:
    if "eval_steps" in given or "train.eval_steps" in given:
        return Answer("leave out", why="train.eval_steps turns it on")
    steps = given.get("logging_steps", given.get("train.logging_steps", 10))
    return Answer("write", {"train.eval_steps": steps}, "transformers takes logging_steps where it is not set")


def _objective(given: Given) -> str:
    """Return the plugin of a preference run: LLaMA-Factory's stage and pref_loss, Axolotl's rl; dpo where none says."""
    for option in ("pref_loss", "stage", "rl"):
        if (name := given.get(option)) in ("kto", "orpo", "simpo"):
            return str(name)
    named = [name for name in ("kto", "orpo", "simpo") if f"plugins.{name}" in given]
    return named[0] if named else "dpo"


def _stage_dpo(_: Any, given: Given) -> Answer:
    """LLaMA-Factory trains orpo and simpo in the stage dpo, by pref_loss."""
    return Answer("write", {f"plugins.{_objective(given)}": {}})


def _to_objective(option: str) -> Rule:
    """The value is written to an option of the run's preference loss."""
    return _made(
        lambda value, given: Answer("write", {f"plugins.{_objective(given)}.{option}": value}), f"plugins.dpo.{option}"
    )


_TEACHERS: Final = ("teacher_model_name_or_path", "teacher_model", "plugins.distill.teacher")


def _beta(value: Any, given: Given) -> Answer:
    """TRL's beta is the teacher's share in a generalised JSD where there is a teacher, else that of an objective."""
    if not any(name in given for name in _TEACHERS):
        return Answer("write", {f"plugins.{_objective(given)}.beta": value})
    if value in (0, 1):
        return Answer("write", {"plugins.distill.divergence": "reverse" if value else "forward"})
    return Answer("write", {"plugins.distill.divergence": "jsd", "plugins.distill.beta": value})


def _precompute(_: Any, given: Given) -> Answer:
    return Answer("write", {f"plugins.{_objective(given)}.reference": "precompute"})


# --- the table ------------------------------------------------------------------------------------

_QUANTIZED: Final = (
    "for a base in 4 or 8 bits name the plugin qlora in place of lora; it has the same options and its own"
)
_PREFERENCE: Final = "objectives are plugins: dpo, kto, orpo, simpo and others (docs/preference.md, docs/plugins.md)"
_ENGINE: Final = "sftx trains; the result is served by any program that reads PEFT's or transformers' files"
_LORA_ONLY: Final = "the adapters here are lora, qlora and vera"
_NO_SUCH_INIT: Final = "A and B begin as true, gaussian, orthogonal, pissa, pissa_niter_N or olora"
_FULL: Final = "gradients of all parameters, or LoRA's"
_VISION: Final = "text models only"
_OTHER_TRACKER: Final = "trackers here are wandb, tensorboard and mlflow"
_UPLOAD: Final = "nothing is uploaded: give the result's directory to `hf upload`"

TABLE: Final[Mapping[str, tuple[Row, ...]]] = {
    "Model": (
        _row(
            "model_name_or_path base_model model_id base_model_name_or_path pretrained_model_name_or_path",
            _to("model"),
        ),
        _row("torch_dtype dtype infer_dtype compute_dtype", _made(_dtype, "train.bf16", "train.fp16")),
        _row(
            "model_revision revision revision_of_model",
            ("main", _leave_out()),
            _not_here("download that revision, and name its directory as the model"),
        ),
        _row(
            (
                "attn_implementation flash_attn flash_attention flash_attention_2 sdp_attention "
                "xformers_attention eager_attention flex_attention flex_attn_compile_kwargs "
                "sage_attention attention fused_attn_kernel sdpa_varlen flash_attn_cross_entropy "
                "flash_attn_fuse_mlp flash_attn_rms_norm large_head_attention flash_attn_d512 "
                "gemma4_hybrid_attn_impl experts_implementation"
            ),
            _leave_out("attention is chosen by what the model and the device support"),
        ),
        _row(
            (
                "use_liger_kernel enable_liger_kernel liger_kernel_config liger_* lora_mlp_kernel "
                "lora_qkv_kernel lora_o_kernel lora_embedding_kernel chunked_cross_entropy "
                "chunked_cross_entropy_num_chunks use_kernels use_v1_kernels kernel_config tiled_mlp "
                "tiled_mlp_num_shards tiled_mlp_use_original_mlp"
            ),
            _leave_out("fused kernels are used where they are measured to be faster"),
        ),
        _row(
            "axolotl.integrations.liger.* axolotl.integrations.cut_cross_entropy.* axolotl.integrations.kernels.*",
            _leave_out("fused kernels are used where they are measured to be faster"),
        ),
        _row("axolotl.*", _not_here("it is a plugin of Axolotl; plugins of sftx have other hooks: docs/plugins.md")),
        _row(
            (
                "low_cpu_mem_usage use_cache use_kv_cache use_fast_tokenizer tokenizer_use_fast "
                "tokenizer_type tokenizer_legacy model_type type_of_model model_class cls_model_config "
                "is_falcon_derived_model is_llama_derived_model is_mistral_derived_model "
                "is_qwen_derived_model device_map device max_memory gpu_memory_limit "
                "tokenizer_save_jinja_files experimental_skip_move_to_device mean_resizing_embeddings "
                "embeddings_skip_upcast upcast_layernorm upcast_lmhead_output print_param_status "
                "fix_untrained_tokens"
            ),
            _leave_out(),
        ),
        _row(
            "base_model_config tokenizer_config",
            _leave_out("configuration and tokenizer are those of the model's directory"),
        ),
        _row("tokenizer_name tokenizer_name_or_path", _not_here("the tokenizer is that of the model's directory")),
        _row("bnb_4bit_* quantization_type use_bnb_nested_quant", _leave_out("without load_in_4bit it has no effect")),
        _row(
            (
                "load_in_4bit load_in_8bit bnb_* quantization_* double_quantization "
                "quant_config quantization gptq model_quantization_config "
                "model_quantization_config_kwargs qlora_sharded_model_loading use_onebitllms qat "
                "quantize_moe_experts"
            ),
            (False, _leave_out()),
            _not_here(_QUANTIZED),
        ),
        _row(
            (
                "model_init_kwargs overrides_of_model_config overrides_of_model_kwargs rope_scaling "
                "shift_attn s2_attention mixture_of_depths train_from_scratch reinit_weights "
                "block_diag_attn scaling_softmax* llama4_linearized_experts ple_cpu_offload "
                "layer_offloading tokenizer_use_mistral_common"
            ),
            _not_here("the model is taken as its directory has it"),
        ),
        _row("router_aux_loss_coef moe_aux_loss_coef", _not_here("no auxiliary loss of the router is added")),
        _row(
            "cache_dir hf_hub_token hub_token ms_hub_token om_hub_token hf_use_auth_token",
            _not_here("set HF_HOME or HF_TOKEN in the environment"),
        ),
        _row(
            "resize_vocab resize_token_embeddings_to_32x shrink_embeddings",
            (
                True,
                _write({"add_tokens": True}, why="adds the control tokens of the template that the tokenizer lacks"),
            ),
        ),
        _row(
            "add_special_tokens new_special_tokens_config init_special_tokens tokens added_tokens_overrides",
            _write(
                {"add_tokens": True}, why="adds the control tokens of the template that the tokenizer lacks, no others"
            ),
        ),
        _row("split_special_tokens", (False, _leave_out()), _leave_out("text of a row never becomes a control token")),
        _row("eos_token", _leave_out("the template names the token that stops, which is trained and saved")),
        _row("pad_token", _leave_out("padding is masked by its length, whatever its token")),
        _row("special_tokens", _made(_special_tokens, "add_tokens")),
    ),
    "Data": (
        _row("dataset train_dataset", _dataset("data.train")),
        _row("eval_dataset", _dataset("data.eval")),
        _row(
            "dataset_name dataset_path data_path train_file train_files",
            _made(
                lambda value, given: Answer("write", {"data.train": [_with_fields(value, given)]}),
                "data.train",
            ),
        ),
        _row("validation_file eval_file val_files", _to("data.eval")),
        _row("datasets pretraining_dataset", _source_list("data.train")),
        _row("test_datasets", _source_list("data.eval")),
        _row("dataset_config", _of_source("subset")),
        _row("dataset_train_split", ("train", _leave_out()), _of_source("split")),
        _row("dataset_test_split", _made(_test_split, "data.eval")),
        _row("dataset_streaming", (True, _write({"data.streaming": True})), (False, _leave_out())),
        _row("buffer_size streaming_multipack_buffer_size pretrain_multipack_buffer_size", _to("data.plan_window")),
        _row("dataset_dir media_dir", _leave_out("data.train has the paths of the files")),
        _row(
            "dataset_text_field text_column",
            ("text", _leave_out()),
            _of_source("columns", lambda value: {"text": value}),
        ),
        _row("field_messages", _of_source("columns", lambda value: {"messages": value})),
        _row("max_samples", _of_source("limit")),
        _row(
            "val_size val_set_size test_split_size",
            (0, _leave_out()),
            _to("data.eval_fraction"),
        ),
        _row(
            "mix_strategy",
            ("interleave_once", _not_here("data.mix_strategy is concat, interleave_under or interleave_over")),
            _to("data.mix_strategy"),
        ),
        _row("interleave_probs", _not_here("write a weight for each source of data.train: {path: ..., weight: 0.3}")),
        _row(
            "max_length cutoff_len max_seq_length max_seq_len seq_len seq_length sequence_len "
            "model_max_length max_tokens",
            _to("data.max_length"),
        ),
        _row(
            "truncation_mode",
            ("keep_start", _leave_out()),
            ("keep_end", _write({"data.long_rows": "cut_oldest"}, why="removes the oldest turns")),
        ),
        _row(
            "excess_length_strategy",
            ("drop", _write({"data.long_rows": "drop"})),
            ("truncate", _write({"data.long_rows": "cut_end"})),
            ("raise", _write({"data.long_rows": "error"})),
        ),
        _row("min_sample_len", _to("data.filters.min_length")),
        _row("dataset_exact_deduplication", (True, _write({"data.filters.duplicates": "drop"})), (False, _leave_out())),
        _row(
            "packing sample_packing neat_packing",
            (False, _leave_out()),
            ("bfd", _plugin("packed")),
            ("wrapped", _write({"plugins.packed.strategy": "wrapped"})),
            _plugin("packed", why="documents of a packed row never attend to one another"),
        ),
        _row("max_packed_sequence_len", _to("plugins.packed.length")),
        _row("packing_strategy", _made(_packing_strategy, "plugins.packed.strategy")),
        _row("eval_packing eval_sample_packing", _leave_out("rows are evaluated alike, packed or not")),
        _row(
            (
                "sample_packing_* multipack_real_batches pretraining_sample_concatenation "
                "pretrain_multipack_attn batching_strategy curriculum_sampling"
            ),
            _leave_out("plugins.packed chooses the rows that share one"),
        ),
        _row(
            "padding_free batch_flattening",
            (True, _padded("padding_free")),
            ("auto", _leave_out()),
            (False, _leave_out()),
        ),
        _row("pad_to_multiple_of", ("auto", _leave_out()), _padded("pad_to_multiple_of")),
        _row("pad_to_sequence_len", _leave_out("rows are padded to the longest of a micro-batch")),
        _row(
            "group_by_length",
            (True, _leave_out("rows of similar length share a step by default")),
            (False, _leave_out("plugins.padded.group_by_length: false turns it off")),
        ),
        _row(
            "train_sampling_strategy",
            ("random", _leave_out()),
            ("group_by_length", _leave_out("rows of similar length share a step by default")),
            _not_here("each epoch has another order, which follows from train.seed"),
        ),
        _row(
            "completion_only_loss",
            (True, _leave_out("only answers are trained")),
            (False, _all_tokens("trains prompts too; leave it out to train answers only")),
        ),
        _row(
            "assistant_only_loss",
            (True, _leave_out("only answers are trained")),
            (
                False,
                _all_tokens(
                    "where rows have messages, of which TRL trains every token; leave it out where they have prompt "
                    "and completion, of which TRL trains the completion"
                ),
            ),
        ),
        _row(
            "train_on_inputs",
            (True, _write({"data.train_on_prompt": True})),
            (False, _leave_out("only answers are trained")),
        ),
        _row(
            "mask_history train_on_last_step_only", (True, _write({"data.train_turns": "last"})), (False, _leave_out())
        ),
        _row("roles_to_train", _to("data.train_roles", _name_list)),
        _row(
            "train_on_eos train_on_eot",
            ("none", _write({"data.train_turn_end": False})),
            _leave_out("the end of each trained turn is trained"),
        ),
        _row(
            "template chat_template",
            ("tokenizer_default", _plugin("tokenizer")),
            (dict, _not_here("write the name of a template as a plugin")),
            _made(
                _template,
                "plugins.<template>",
                "plugins.tokenizer",
                why="a plugin of the template's name, or else the tokenizer's own",
            ),
        ),
        _row("chat_template_path", _to("plugins.tokenizer.template")),
        _row("chat_template_jinja", _not_here("write it into a file and name that: plugins.tokenizer.template")),
        _row(
            "chat_template_kwargs",
            _tokenizer_template("template_kwargs", "a template that is a plugin has options of its own"),
        ),
        _row(
            "enable_thinking preserve_thinking",
            (True, _leave_out("reasoning in the rows is trained")),
            (False, _tokenizer_template("enable_thinking", "plugins.qwen3.thinking says what becomes of reasoning")),
        ),
        _row("eot_tokens tool_format", _leave_out("the template says how turns end and tools are written")),
        _row(
            "default_system default_system_message system_prompt",
            _to("data.system", why="replaces the system messages of the rows, too"),
        ),
        _row("dataset_num_proc preprocessing_num_workers dataset_processes", _to("data.num_proc")),
        _row(
            (
                "dataset_prepared_path dataset_kwargs overwrite_cache tokenized_path "
                "preprocessing_batch_size skip_prepare_dataset dataset_keep_in_memory "
                "num_dataset_shards_to_save data_shared_file_system is_preprocess preprocess_iterable "
                "total_num_tokens total_supervised_tokens sample_packing_eff_est max_prompt_len "
                "eval_sequence_len"
            ),
            _leave_out("encoded rows are kept by a hash of what made them (data.cache)"),
        ),
        _row("dataset_shard_num dataset_shard_idx", _not_here("divide the files")),
        _row(
            "shuffle_dataset shuffle_merged_datasets shuffle_before_merging_datasets",
            (True, _leave_out("rows are shuffled anew in each epoch")),
            (False, _leave_out("rows are shuffled anew in each epoch")),
        ),
        _row(
            "disable_shuffling",
            (False, _leave_out()),
            _not_here("each epoch has another order, which follows from train.seed"),
        ),
        _row(
            "remove_unused_columns label_names length_column_name ignore_pad_token_for_loss eval_num_beams",
            _leave_out(),
        ),
        _row(
            "dataloader_drop_last",
            (False, _leave_out()),
            _not_here("the last, smaller step of an epoch is trained too"),
        ),
        _row("dataloader_* loader_*", _leave_out("batches are made while the device computes")),
        _row("push_dataset_to_hub", _not_here("sftx data export writes the rows to a file")),
        _row("use_pose pose_*", _not_here("positions are those of the rows")),
        _row(
            (
                "image_* crop_to_patches video_* audio_* use_audio_in_video freeze_mm_modules "
                "freeze_vision_tower freeze_multi_modal_projector freeze_language_model processor_type "
                "processor_kwargs role_boundaries"
            ),
            _not_here(_VISION),
        ),
    ),
    "Adapters": (
        _row("use_peft", (True, _plugin("lora")), (False, _leave_out())),
        _row(
            "finetuning_type adapter peft_type",
            ("lora", _plugin("lora")),
            ("full", _plugin("full", why="without an adapter everything is trained anyway")),
            ("freeze", _plugin("freeze")),
            ("qlora", _not_here(_QUANTIZED)),
            _not_here(_LORA_ONLY),
        ),
        _row("peft_config peft lora_config", _made(_adapter_options, "plugins.lora")),
        _row("r lora_r rank", _to("plugins.lora.r")),
        _row(
            "lora_rank",
            _made(
                _rank,
                "plugins.lora.r",
                "plugins.lora.lora_alpha",
                why="LLaMA-Factory's lora_alpha is twice the rank where none is given",
            ),
        ),
        _row("lora_alpha", _to("plugins.lora.lora_alpha")),
        _row("lora_dropout", _to("plugins.lora.lora_dropout")),
        _row(
            "target_modules lora_target lora_target_modules",
            *((all_of, _write({"plugins.lora.target_modules": "all-linear"})) for all_of in ("all", "all-linear")),
            _to("plugins.lora.target_modules", _names),
        ),
        _row(
            "lora_target_linear", (True, _write({"plugins.lora.target_modules": "all-linear"})), (False, _leave_out())
        ),
        _row("modules_to_save lora_modules_to_save additional_target", _to("plugins.lora.modules_to_save", _name_list)),
        _row("loraplus_lr_ratio", _to("plugins.lora.loraplus_lr_ratio")),
        _row("loraplus_lr_embedding embedding_lr", _to("train.embedding_learning_rate")),
        _row("embedding_lr_scale lr_groups", _not_here("train.embedding_learning_rate is a rate, not a factor")),
        _row("task_type lora_task_type", ("CAUSAL_LM", _leave_out()), _not_here("causal language models only")),
        _row("bias", ("none", _leave_out()), _to("plugins.lora.bias")),
        _row(
            "init_lora_weights peft_init_lora_weights",
            (True, _leave_out()),
            ("default", _leave_out()),
            *((name, _not_here(_NO_SUCH_INIT)) for name in ("eva", "loftq", "corda", "lora_ga", "mica", False)),
            _to("plugins.lora.init_lora_weights"),
        ),
        _row("use_rslora peft_use_rslora", (False, _leave_out()), _to("plugins.lora.use_rslora")),
        _row("use_dora peft_use_dora", (False, _leave_out()), _to("plugins.lora.use_dora")),
        _row("lora_bias", (False, _leave_out()), _to("plugins.lora.lora_bias")),
        _row(
            "pissa_init",
            (False, _leave_out()),
            _made(
                _pissa,
                "plugins.lora.init_lora_weights",
                why="with pissa_iter: -1 it is pissa, LLaMA-Factory's default is pissa_niter_16",
            ),
        ),
        _row("pissa_iter", _leave_out("belongs to pissa_init")),
        _row("pissa_convert", _leave_out("the base keeps its weights, and the saved adapter is a plain LoRA")),
        _row("exclude_modules", _to("plugins.lora.exclude_modules", _names)),
        _row("target_parameters lora_target_parameters", _to("plugins.lora.target_parameters", _name_list)),
        _row(
            "layers_to_transform peft_layers_to_transform",
            _to("plugins.lora.layers_to_transform", lambda value: value if isinstance(value, list) else [value]),
        ),
        _row("layers_pattern peft_layers_pattern", _to("plugins.lora.layers_pattern", _name_list)),
        _row("rank_pattern lora_rank_pattern", _to("plugins.lora.rank_pattern")),
        _row("alpha_pattern lora_alpha_pattern", _to("plugins.lora.alpha_pattern")),
        _row(
            "trainable_token_indices peft_trainable_token_indices",
            _to("plugins.lora.trainable_token_indices"),
        ),
        _row(
            (
                "inference_mode auto_mapping peft_version fan_in_fan_out lora_fan_in_fan_out "
                "runtime_config lora_on_cpu peft_autocast_adapter_dtype megatron_core "
                "ensure_weight_tying peft_ensure_weight_tying merge_lora"
            ),
            _leave_out(),
        ),
        _row(
            "adapter_name_or_path",
            _made(
                _adapters,
                "plugins.lora.init_from",
                "plugins.lora.base_adapters",
                why="the last of several trains on, those before it stay as they are",
            ),
        ),
        _row("create_new_adapter", _leave_out("belongs to adapter_name_or_path")),
        _row("lora_model_dir", _to("plugins.lora.init_from")),
        _row("adapter_folder", (False, _leave_out()), _not_here("lora.init_from takes the whole path")),
        _row(
            (
                "loftq_config loftq_bits megatron_config eva_config "
                "corda_config lora_ga_config velora_config alora_invocation_tokens use_qalora "
                "monteclora_config layer_replication peft_layer_replication "
                "use_bdlora arrow_config kasa_config "
                "bnb_config_kwargs merge_method relora relora_* jagged_* oft_* module_dropout"
            ),
            (False, _leave_out()),
            _not_here(_LORA_ONLY),
        ),
        _row(
            "unfrozen_parameters",
            _made(
                _unfrozen,
                "plugins.freeze.trainable_layers: 0",
                "plugins.freeze.extra_modules",
                why="regular expressions of names, without ranges of rows",
            ),
        ),
        _row("freeze_trainable_layers", _of_freeze("trainable_layers")),
        _row("freeze_trainable_modules", ("all", _leave_out()), _of_freeze("trainable_modules", _names)),
        _row("freeze_extra_modules", _of_freeze("extra_modules", _name_list)),
        _row(
            "use_llama_pro lisa_*",
            (False, _leave_out()),
            _not_here("LoRA, chosen layers (freeze), or everything trains"),
        ),
    ),
    "Steps, rates and optimizers": (
        _row("num_epochs epochs", _to("train.num_train_epochs")),
        _row("max_steps", (-1, _leave_out()), (0, _leave_out()), _to("train.max_steps")),
        _row("micro_batch_size per_gpu_train_batch_size", _to("train.per_device_train_batch_size")),
        _row(
            "batch_size global_batch_size",
            _to("train.train_batch_size", why="rows of an optimizer step, over all processes"),
        ),
        _row("eval_batch_size per_gpu_eval_batch_size", _to("train.per_device_eval_batch_size")),
        _row(
            "auto_find_batch_size",
            (False, _leave_out()),
            _not_here("sftx plan estimates what fits; train_batch_size keeps the rows of a step"),
        ),
        _row("lr", _to("train.learning_rate")),
        _row(
            "warmup_ratio", (0, _leave_out()), _to("train.warmup_steps", why="a value below 1 is a share of all steps")
        ),
        _row("lr_scheduler_type lr_scheduler", _made(_schedule, "train.lr_scheduler_type")),
        _row(
            "lr_scheduler_kwargs",
            _made(_schedule_options, "train.min_lr_ratio", "train.lr_decay_steps", "train.lr_power"),
        ),
        _row("cosine_min_lr_ratio", _to("train.min_lr_ratio")),
        _row(
            "lr_quadratic_warmup cosine_constant_lr_ratio lr_div_factor",
            _not_here("warm-up is linear, and a cosine begins at its end"),
        ),
        _row("optim optimizer", _made(_optimizer, "train.optim")),
        _row("use_muon", (True, _write({"train.optim": "muon"})), (False, _leave_out())),
        _row(
            (
                "optim_args optim_target_modules torchdistx_path adam_beta3 adam_epsilon2 dion_* "
                "qgalore_* galore_* use_galore apollo_* use_apollo badam_* use_badam use_adam_mini "
                "flash_optimum"
            ),
            (False, _leave_out()),
            _not_here(_OPTIMIZERS),
        ),
        _row("label_smoothing_factor", (0, _leave_out()), _to("plugins.masked-ce.label_smoothing")),
        _row(
            "loss_type",
            ("nll", _leave_out()),
            ("chunked_nll", _leave_out("logits are never materialised")),
            _not_here("a loss is a plugin: docs/plugins.md"),
        ),
        _row("qalora_group_size", _leave_out("without use_qalora it has no effect")),
        _row("asft_alpha eaft_alpha eaft_k", _leave_out("without its loss it has no effect")),
        _row(
            "use_dft_loss use_asft_loss use_eaft_loss use_eaft",
            (False, _leave_out()),
            _not_here("a loss is a plugin: docs/plugins.md"),
        ),
        _row("neftune_noise_alpha noisy_embedding_alpha", _not_here("no noise is added to embeddings")),
        _row(
            "average_tokens_across_devices",
            (True, _leave_out("each trained token of a step counts the same")),
            _not_here("each trained token of a step counts the same, over all processes"),
        ),
        _row("data_seed", _not_here("order and dropout follow from one seed, train.seed")),
        _row(
            "full_determinism",
            (False, _leave_out()),
            _not_here(
                "order, dropout and initialisation follow from train.seed; kernels of a GPU may not be deterministic"
            ),
        ),
        _row("ignore_data_skip", (False, _leave_out()), _not_here("a resumed run goes on where it was in its data")),
        _row("loss_watchdog_threshold loss_watchdog_patience", _leave_out("a run stops at a loss that is not finite")),
    ),
    "Precision and memory": (
        _row(
            "bf16 bfloat16",
            ("auto", _leave_out("the default on a GPU that supports it")),
            ("full", _write({"train.bf16": True})),
            _to("train.bf16"),
        ),
        _row("fp16 float16", ("auto", _leave_out()), _to("train.fp16")),
        _row("float32", (True, _write({"train.bf16": False})), (False, _leave_out())),
        _row("tf32", ("auto", _leave_out()), _to("train.tf32")),
        _row(
            "pure_bf16",
            (
                True,
                _write(
                    {"train.bf16": True},
                    why="trained weights stay in fp32; train.optim: adamw_bf16 keeps them in bfloat16",
                ),
            ),
            (False, _leave_out()),
        ),
        _row(
            (
                "bf16_full_eval fp16_full_eval fp16_opt_level half_precision_backend fp16_backend "
                "fp32_norms fp32_norm_classes"
            ),
            _leave_out("evaluation and norms have the precision of training"),
        ),
        _row("fp8 fp8_* activation_dtype weight_dtype", (False, _leave_out()), _not_here("bfloat16, float16 and fp32")),
        _row(
            "gradient_checkpointing",
            ("true", _write({"train.gradient_checkpointing": True})),
            (str, _write({"train.gradient_checkpointing": True})),
            _to("train.gradient_checkpointing"),
        ),
        _row(
            "activation_checkpointing",
            (True, _write({"train.gradient_checkpointing": True})),
            (False, _leave_out()),
            _write({"train.gradient_checkpointing": True}),
        ),
        _row(
            "disable_gradient_checkpointing",
            (True, _leave_out()),
            (False, _write({"train.gradient_checkpointing": True}, why="LLaMA-Factory's default")),
        ),
        _row(
            "use_reentrant_gc gradient_checkpointing_kwargs activation_checkpointing_kwargs",
            _leave_out("layers are recomputed without reentrant autograd"),
        ),
        _row(
            "activation_offloading use_unsloth_gc",
            (False, _leave_out()),
            _write({"train.gradient_checkpointing": True}, why="layers are recomputed, not moved to the host"),
        ),
        _row(
            "use_unsloth use_kt kt_* use_mca use_hyper_parallel hyper_parallel_args",
            (False, _leave_out()),
            _not_here("kernels here are sftx's own"),
        ),
        _row(
            "torch_compile_backend torch_compile_mode torch_compile_options deepcompile",
            ("inductor", _leave_out()),
            _not_here("train.torch_compile compiles the decoder layers with inductor"),
        ),
        _row("torch_empty_cache_steps gc_steps gc_collect_steps", _leave_out()),
        _row("no_cuda", (True, _write({"train.use_cpu": True})), (False, _leave_out())),
        _row("use_mps_device", _leave_out()),
    ),
    "Evaluation and generation": (
        _row(
            "eval_strategy evaluation_strategy",
            ("no", _leave_out()),
            (False, _leave_out()),
            ("steps", _made(_eval_by_steps, "train.eval_steps")),
            ("epoch", _not_here("train.eval_steps takes a number of steps")),
            ("best", _not_here("train.eval_steps takes a number of steps")),
        ),
        _row("eval_steps", *_whole_number("train.eval_steps")),
        _row("evals_per_epoch", _not_here("train.eval_steps takes a number of steps")),
        _row("eval_delay", _not_here("evaluation begins before the first step")),
        _row(
            (
                "eval_on_start eval_do_concat_batches eval_use_gather_object eval_accumulation_steps "
                "include_for_metrics batch_eval_metrics prediction_loss_only do_eval "
                "include_inputs_for_metrics compute_accuracy eval_on_each_dataset eval_table_size"
            ),
            _leave_out("held-out rows are evaluated before the first step, every train.eval_steps, and at the end"),
        ),
        _row("metric_for_best_model", _to("train.metric_for_best_model")),
        _row("early_stopping_steps", _to("train.early_stopping_patience")),
        _row(
            "predict_with_generate do_predict",
            (True, _write({"plugins.rouge": {}, "plugins.bleu": {}}, why="a metric has the held-out rows answered")),
            (False, _leave_out()),
        ),
        _row(
            "do_causal_lm_eval eval_causal_lm_metrics do_bench_eval bench_dataset bench_split",
            (False, _leave_out()),
            _not_here("metrics here are exact-match, rouge, bleu and json-valid, or plugins of your own"),
        ),
        _row("generate_samples", _leave_out("generation.num_samples answers are shown before and after")),
        _row("num_generation_samples", _to("generation.num_samples")),
        _row("generation_max_new_tokens eval_max_new_tokens generation_max_length", _to("generation.max_new_tokens")),
        _row(
            "do_sample generation_do_sample",
            _leave_out("answers are greedy, so that they can be compared"),
        ),
        _row(
            (
                "temperature top_p top_k num_beams repetition_penalty length_penalty skip_special_tokens "
                "generation_temperature generation_top_p generation_top_k generation_prompt_ratio "
                "generation_num_beams generation_config"
            ),
            _leave_out("answers are greedy"),
        ),
        _row(
            "task_dir lang n_shot save_dir download_mode",
            _not_here("sftx trains; use an evaluation harness for benchmarks"),
        ),
    ),
    "Logging": (
        _row("report_to", _made(_trackers, "plugins.wandb", "plugins.tensorboard", "plugins.mlflow")),
        _row(
            "run_name mlflow_run_name wandb_name wandb_run_name",
            _made(_run_name, "plugins.wandb.name", "plugins.mlflow.run_name"),
        ),
        _row("use_wandb", (True, _plugin("wandb")), (False, _leave_out())),
        _row("wandb_project", _to("plugins.wandb.project")),
        _row("wandb_entity", _to("plugins.wandb.entity")),
        _row("wandb_mode", _to("plugins.wandb.mode")),
        _row("wandb_watch wandb_log_model wandb_run_id", _not_here("W&B gets the metrics and the options of a run")),
        _row("use_mlflow", (True, _plugin("mlflow")), (False, _leave_out())),
        _row("mlflow_tracking_uri", _to("plugins.mlflow.tracking_uri")),
        _row("mlflow_experiment_name", _to("plugins.mlflow.experiment")),
        _row("use_tensorboard", (True, _plugin("tensorboard")), (False, _leave_out())),
        _row("logging_dir", _of_tracker("tensorboard", "log_dir")),
        _row(
            (
                "hf_mlflow_log_artifacts use_comet comet_* use_trackio trackio_* use_swanlab swanlab_* "
                "use_otel_metrics otel_*"
            ),
            (False, _leave_out()),
            _not_here(_OTHER_TRACKER),
        ),
        _row("project", ("huggingface", _leave_out()), _of_tracker("wandb", "project")),
        _row("logging_steps", *_whole_number("train.logging_steps")),
        _row(
            "logging_strategy",
            ("steps", _leave_out()),
            ("no", _leave_out()),
            _not_here("train.logging_steps takes a number of steps"),
        ),
        _row(
            (
                "logging_first_step log_on_each_node logging_nan_inf_filter "
                "include_num_input_tokens_seen include_tokens_per_second include_tkps "
                "include_effective_tokens_per_second log_level log_level_replica disable_tqdm "
                "skip_memory_metrics plot_loss debug verbosity"
            ),
            _leave_out("metrics.jsonl has every step, report.html the curves"),
        ),
        _row(
            "profiler_steps profiler_steps_start enable_torch_profiler profiler_* profile_modules",
            (False, _leave_out()),
            _not_here("use torch's profiler on a step of your own"),
        ),
    ),
    "Saving and resuming": (
        _row(
            "save_strategy",
            ("steps", _leave_out()),
            ("no", _leave_out("a checkpoint is saved every 30 minutes, and the result at the end")),
            ("best", _made(_save_best, "train.metric_for_best_model: loss")),
            _not_here("train.save_steps takes a number of steps"),
        ),
        _row("save_steps", *_whole_number("train.save_steps")),
        _row(
            "saves_per_epoch save_first_step",
            (False, _leave_out()),
            _not_here("train.save_steps takes a number of steps"),
        ),
        _row("save_total_limit", (0, _leave_out()), _to("train.save_total_limit")),
        _row(
            (
                "save_only_model save_on_each_node save_safetensors enable_jit_checkpoint "
                "dynamic_checkpoint restore_callback_states_from_checkpoint"
            ),
            _leave_out("a checkpoint holds safetensors and all that a resumed run needs"),
        ),
        _row(
            "overwrite_output_dir",
            (False, _leave_out()),
            _leave_out("a run directory is never written over: choose one that does not exist"),
        ),
        _row(
            "resume_from_checkpoint auto_resume_from_checkpoints",
            (False, _leave_out()),
            _not_here("resume with the same command and --resume"),
        ),
        _row("hub_strategy hub_revision hub_always_push hub_private_repo", _leave_out()),
        _row("push_to_hub hub_*", (False, _leave_out()), _not_here(_UPLOAD)),
        _row("export_*", _not_here(_ENGINE)),
    ),
    "Several processes": (
        _row(
            "fsdp deepspeed use_fsdp",
            (False, _leave_out()),
            _made(
                _sharding,
                "train.distributed: fsdp2",
                "train.fsdp_offload",
                why="shards of every layer, with sftx run --nproc N",
            ),
        ),
        _row("fsdp_config dist_config", _made(_sharding_options, "train.fsdp_offload")),
        _row(
            "fsdp_version fsdp_final_state_dict_type fsdp_min_num_params fsdp_transformer_layer_cls_to_wrap",
            _leave_out("train.distributed: fsdp2 needs no options of its own"),
        ),
        _row(
            "ddp ddp_* local_rank world_size tpu_* ray_scope past_index mp_parameters",
            _leave_out("sftx run --nproc N, or torchrun, starts the processes"),
        ),
        _row(
            (
                "accelerator_config parallelism_config sequence_parallel_degree context_parallel_size "
                "tensor_parallel_size dp_shard_size dp_replicate_size heads_k_stride ring_attn_func "
                "use_ray ray_* resources_per_worker master_addr master_port"
            ),
            (1, _leave_out()),
            _not_here("processes share the rows (ddp), or the shards of every layer too (fsdp2)"),
        ),
        _row("num_processes num_machines", _not_here("sftx run --nproc N; docs/distributed.md for several hosts")),
    ),
    "Rewards and PPO": (
        _row("num_ppo_epochs ppo_epochs", _to("plugins.ppo.num_ppo_epochs")),
        _row("num_mini_batches ppo_buffer_size", _to("plugins.ppo.steps_per_rollout")),
        _row("whiten_rewards ppo_whiten_rewards", _to("plugins.ppo.whiten_rewards")),
        _row(
            "ppo_score_norm",
            (False, _leave_out()),
            _not_here("scores stay as they are; advantages are whitened (plugins.ppo.whiten_advantages)"),
        ),
        _row("kl_coef init_kl_coef", _to("plugins.ppo.kl_coef")),
        _row("kl_estimator", _to("plugins.ppo.kl_estimator")),
        _row("ppo_target", _to("plugins.ppo.kl_target")),
        _row(
            "adap_kl_ctrl",
            (False, _leave_out("kl_coef stays as it is by default")),
            _write({"plugins.ppo.kl_target": 6.0}, why="TRL's default target"),
        ),
        *(
            _row(name, _to(f"plugins.ppo.{name}"))
            for name in ("cliprange", "cliprange_value", "vf_coef", "gamma", "lam", "missing_eos_penalty")
        ),
        _row("response_length", _to("plugins.ppo.response_length")),
        _row("stop_token stop_token_id", _leave_out("an answer ends at the stop token of the template")),
        _row("total_episodes", _not_here("set train.max_steps: the episodes divided by the prompts of a step")),
        _row("local_rollout_forward_batch_size", _to("train.per_device_eval_batch_size")),
        _row("num_sample_generations", _leave_out("rollouts.jsonl of the run has every answer")),
        _row("sft_model_path", _to("model")),
        _row("reward_model_path reward_model_name_or_path reward_model", _to("plugins.reward-model.model")),
        _row(
            "reward_model_type",
            ("full", _leave_out()),
            _not_here("plugins.reward-model.model is a whole model; merge the adapter into its base"),
        ),
        _row("reward_funcs", _made(_reward_functions, "plugins.reward-function.function", why=_FUNCTIONS)),
        _row(
            "reward_weights",
            _not_here("plugins.grpo.reward_weights or plugins.ppo.reward_weights: a mapping by the names of plugins"),
        ),
    ),
    "The rest": (
        _row(
            "stage rl",
            ("sft", _leave_out()),
            ("pt", _leave_out("rows with a text are trained as they are")),
            ("dpo", _made(_stage_dpo, "plugins.dpo", why="or the plugin that pref_loss names; docs/preference.md")),
            ("ipo", _write({"plugins.dpo.loss_type": "ipo"})),
            ("kto", _plugin("kto")),
            ("orpo", _plugin("orpo")),
            ("simpo", _plugin("simpo")),
            ("ppo", _plugin("ppo", why="with a reward, such as plugins.reward-model.model")),
            _not_here(_PREFERENCE),
        ),
        _row(
            "pref_loss",
            ("sigmoid", _write({"plugins.dpo.loss_type": "sigmoid"})),
            ("hinge", _write({"plugins.dpo.loss_type": "hinge"})),
            ("ipo", _write({"plugins.dpo.loss_type": "ipo"})),
            ("kto_pair", _plugin("kto", why="it takes pairs too")),
            ("orpo", _plugin("orpo")),
            ("simpo", _plugin("simpo")),
            _not_here(_PREFERENCE),
        ),
        _row("pref_beta rl_beta", _to_objective("beta")),
        _row(
            "beta",
            _made(
                _beta, "plugins.dpo.beta", why="with a teacher `plugins.distill.divergence`: 0 is forward, 1 reverse"
            ),
        ),
        _row("teacher_model_name_or_path teacher_model", _to("plugins.distill.teacher")),
        _row("kd_temperature", _to("plugins.distill.temperature")),
        _row(
            "lmbda",
            (0, _leave_out("the student learns on the rows")),
            _not_here("distill trains on the rows, as with lmbda 0; `sftx generate` answers their prompts first"),
        ),
        _row(
            "seq_kd",
            (False, _leave_out()),
            _not_here("let the teacher answer the prompts (`sftx generate`), and train on its answers"),
        ),
        _row("pref_ftx rpo_alpha", (0, _leave_out()), _to("plugins.dpo.rpo_alpha")),
        _row("ld_alpha", _to("plugins.dpo.ld_alpha")),
        _row("dpo_label_smoothing", (0, _leave_out()), _to("plugins.dpo.label_smoothing")),
        _row("kto_chosen_weight kto_desirable_weight desirable_weight", _to("plugins.kto.desirable_weight")),
        _row("kto_rejected_weight kto_undesirable_weight undesirable_weight", _to("plugins.kto.undesirable_weight")),
        _row("orpo_alpha", _to("plugins.orpo.beta")),
        _row("simpo_gamma", _to("plugins.simpo.gamma")),
        _row("cpo_alpha", (0, _leave_out()), _to("plugins.simpo.cpo_alpha")),
        _row("ref_model", _to_objective("reference_model")),
        _row(
            "precompute_ref_log_probs",
            (True, _made(_precompute, "plugins.dpo.reference: precompute")),
            (False, _leave_out()),
        ),
        _row("trl", _not_here(_PREFERENCE)),
        _row(
            "do_train", (True, _leave_out()), _not_here("sftx run trains; sftx doctor and sftx plan look at a run only")
        ),
        _row("config", _not_here("name the run file alone: sftx run FILE")),
        _row("env", _not_here("set environment variables before the command")),
        _row(
            "strict ignore_bias_buffers axolotl_config_path sample_backend infer_backend offload_folder plugins_dir",
            _leave_out(),
        ),
        _row(
            (
                "pref_* dpo_* kto_* simpo_* ppo_* cpo_* orpo_* ref_model_* "
                "reward_model* process_reward_model center_rewards_coefficient num_labels ebft"
            ),
            (False, _leave_out()),
            _not_here(_PREFERENCE),
        ),
        _row("trainer_cls", _not_here("a plugin changes what a stage does: docs/plugins.md")),
        _row("vllm* sglang_* gradio_*", _not_here(_ENGINE)),
        _row("task", ("sft", _leave_out()), _not_here(_PREFERENCE)),
    ),
}


# --- looking up -----------------------------------------------------------------------------------

_OFF: Final = frozenset({"no", "none", "off", "false", "null", "disabled"})


def answer(name: str, value: Any, given: Given) -> Answer | None:
    """Return what the option `name` of another tool becomes, None if no tool in the table has it.

    An option of sftx that stands in no section, or in a wrong one, is answered with its section. `given` are the
    other options of the same file and command line.
    """
    rules = _rules_of(name)
    if rules is None:
        section = _sections().get(name)
        rules = ((ANY, _to(f"{section}.{name}")),) if section else None
    if rules is None:
        return None
    chosen = next((rule for key, rule in rules if key is not ANY and _is(value, key)), None)
    if chosen is not None:
        return _made_of(chosen, value, given)
    rest = next((rule for key, rule in rules if key is ANY), None)
    is_empty = value is None or value in ("", [], {})
    is_off = value in (False, 0) or (isinstance(value, str) and value.lower() in _OFF)
    if is_empty or (is_off and (rest is None or rest.kind == "not here")):
        return Answer("leave out")
    if rest is None:
        return Answer("not here", why=f"{_brief(value)} has no counterpart")
    return _made_of(rest, value, given)


def _made_of(rule: Rule, value: Any, given: Given) -> Answer:
    """Apply a rule. A value that the other tool would not take either is said not to be understood."""
    try:
        return rule.make(value, given)
    except (TypeError, ValueError, AttributeError, LookupError, ArithmeticError):
        return Answer("not here", why=f"{_brief(value)} is not understood")


def names() -> Iterable[str]:
    """Return the names in the table that are no patterns."""
    return [name for rows in TABLE.values() for row in rows for name in row.names if "*" not in name]


@lru_cache
def _rules_of(name: str) -> tuple[tuple[Any, Rule], ...] | None:
    """Return the rules of the row with that name, or else of the first whose pattern matches."""
    rows = [row for rows in TABLE.values() for row in rows]
    exact = next((row for row in rows if name in row.names), None)
    matching = (row for row in rows if any(fnmatch.fnmatchcase(name, pattern) for pattern in row.names))
    row = exact or next(matching, None)
    return row.rules if row else None


@lru_cache
def _sections() -> dict[str, str]:
    """Return the section of each option of sftx that has one, for names that are in one section alone."""
    found: dict[str, list[str]] = {}
    for section, cls in SECTION_CLASSES.items():
        for option in dataclasses.fields(cls):
            if option.name not in SECTION_CLASSES:
                found.setdefault(option.name, []).append(section)
    return {name: sections[0] for name, sections in found.items() if len(sections) == 1}


def _is(value: Any, key: Any) -> bool:
    """Return whether a rule's key stands for the value. `1` is not `true`, and text is compared without its case."""
    if isinstance(key, type):
        return isinstance(value, key) and not isinstance(value, bool)
    if isinstance(key, bool) or isinstance(value, bool):
        return key is value
    if isinstance(key, str) and isinstance(value, str):
        return key.lower() == value.lower()
    return bool(key == value)
