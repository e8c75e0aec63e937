"""The tools whose options are known, and what each does without being asked where sftx does something else."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from sftx.config.other_tools.conversions import base, factory_packing, objective, to_objective
from sftx.config.other_tools.datasets import swift_columns, swift_dataset
from sftx.config.other_tools.rules import (
    Given,
    Row,
    is_quantized,
    leave_out,
    made,
    not_here,
    plugin,
    row,
    stage,
    to,
    write,
)


def _always(_: Given) -> bool:
    return True


@dataclass(frozen=True)
class Default:
    """The value that an option of a tool has where none is given. It is answered like one that is given."""

    option: str
    value: Any
    when: Callable[[Given], bool] = _always


@dataclass(frozen=True)
class Habit:
    """Something that a tool does and that none of its options says, in options of sftx."""

    write: Mapping[str, Any]
    why: str
    unless: tuple[str, ...] = ()
    """Options of the tool that say something else."""
    when: Callable[[Given], bool] = _always


@dataclass(frozen=True)
class Tool:
    """A tool whose configurations become run files."""

    title: str
    version: str
    """The version whose options are in the tables."""
    trains_lora: Callable[[Given], bool]
    """Whether these options train an adapter; where they don't, those of LoRA have no effect."""
    defaults: tuple[Default, ...] = ()
    habits: tuple[Habit, ...] = ()
    rows: tuple[Row, ...] = ()
    """Options that mean something else than in other tools, or that no other tool has."""


def _is_stage(*names: str) -> Callable[[Given], bool]:
    return lambda given: stage(given) in names


def _both(*conditions: Callable[[Given], bool]) -> Callable[[Given], bool]:
    return lambda given: all(condition(given) for condition in conditions)


# --- TRL, with transformers, PEFT and Unsloth ---------------------------------------------------------

SCRIPT: Final = "script"
"""The pseudo-option `source` of a Python script, where PEFT's defaults count and not those of TRL's command line."""


def _peft(given: Given) -> bool:
    return bool(given.get("use_peft") or given.get("peft_config"))


def _from_script(given: Given) -> bool:
    return _peft(given) and given.get("source") == SCRIPT


def _from_command(given: Given) -> bool:
    return _peft(given) and given.get("source") != SCRIPT


def _unsloth(given: Given) -> bool:
    return given.get("unsloth") is True


def _cuts_rows(given: Given) -> bool:
    """Return whether TRL's default length holds: `max_length: null` says that rows are not cut."""
    return _trl_class(given) and stage(given) != "grpo" and not _unsloth(given) and "max_length" not in given


def _evaluates_a_split(given: Given) -> bool:
    """Return whether TRL's commands evaluate another split of the data; a file has no other."""
    is_evaluated = given.get("eval_strategy", given.get("evaluation_strategy")) not in (None, False, "no")
    name = given.get("dataset_name")
    return is_evaluated and given.get("source") != SCRIPT and isinstance(name, str) and not Path(name).is_file()


def _simpo_of_cpo(given: Given) -> bool:
    return stage(given) == "cpo" and given.get("loss_type") == "simpo"


def _trl_class(given: Given) -> bool:
    """Return whether the options are those of a class of TRL; else of transformers' TrainingArguments."""
    return given.get("class") != "TrainingArguments"


_TRL: Final = Tool(
    title="TRL",
    version="1.16",
    trains_lora=_peft,
    defaults=(
        Default("learning_rate", 5e-5, lambda given: not _trl_class(given)),
        Default("learning_rate", 2e-5, _both(_trl_class, _is_stage("sft", "gkd"))),
        Default("learning_rate", 1e-6, _both(_trl_class, _is_stage("dpo", "kto", "orpo", "cpo", "simpo", "grpo"))),
        Default("num_train_epochs", 3.0),
        Default("lr_scheduler_type", "linear"),
        Default("max_length", 1024, _cuts_rows),
        Default("max_completion_length", 512, _is_stage("grpo")),
        Default("lora_r", 16, _from_command),
        Default("lora_alpha", 32, _from_command),
        Default("lora_dropout", 0.05, _from_command),
        Default("r", 8, _both(_from_script, lambda given: not _unsloth(given))),
        Default("lora_alpha", 8, _both(_from_script, lambda given: not _unsloth(given))),
        Default("lora_alpha", 16, _unsloth),
        Default("use_bnb_nested_quant", False, is_quantized),
        Default("dataset_test_split", "test", _evaluates_a_split),
        Default("beta", 0.1, _simpo_of_cpo),
        Default("simpo_gamma", 0.5, _simpo_of_cpo),
        Default("cpo_alpha", 1.0, _simpo_of_cpo),
        Default("beta", 0.5, _is_stage("gkd")),
        Default("lmbda", 0.5, _is_stage("gkd")),
    ),
    habits=(
        Habit(
            {"plugins.lora.target_modules": ["q_proj", "v_proj"]},
            "PEFT's choice for most models where none is named; all-linear is the default here",
            ("target_modules", "lora_target_modules", "target_parameters", "lora_target_parameters"),
            _both(_peft, lambda given: not _unsloth(given)),
        ),
        Habit(
            {"plugins.tokenizer": {}},
            "the chat template that the tokenizer brings",
            ("chat_template_path",),
            lambda given: given.get("rows") not in ("text", "prompt"),
        ),
        Habit(
            {"plugins.tokenizer": {}},
            "TRL joins a prompt and a completion that are texts; here they are turns of the tokenizer's template",
            ("chat_template_path",),
            lambda given: given.get("rows") == "prompt",
        ),
        Habit(
            {"data.train_on_prompt": True},
            "TRL trains every token of rows with messages; without this only answers are trained",
            ("assistant_only_loss", "completion_only_loss", "train_on_responses_only"),
            _both(_is_stage("sft"), lambda given: given.get("rows") in (None, "messages"), _trl_class),
        ),
    ),
    rows=(
        row("source class rows unsloth train_on_responses_only", leave_out()),
        row("processing_class tokenizer", leave_out("the tokenizer is that of the model's directory")),
        row("random_state", to("train.seed")),
        row(
            "max_length max_seq_length",
            (None, not_here("rows are not cut there; here data.max_length is 2048, unless you write another")),
            to("data.max_length"),
        ),
        row(
            "use_gradient_checkpointing",
            (True, write({"train.gradient_checkpointing": True})),
            ("unsloth", write({"train.gradient_checkpointing": True})),
            (False, leave_out()),
        ),
        row("full_finetuning", (True, plugin("full")), (False, leave_out())),
        row("instruction_part response_part", leave_out("only answers are trained")),
        row(
            "args data_collator callbacks formatting_func compute_metrics preprocess_logits_for_metrics optimizers "
            "compute_loss_func",
            not_here("code does not go into a run file; see docs/plugins.md"),
        ),
        row("fast_inference max_lora_rank float8_kv_cache", leave_out()),
    ),
)


# --- LLaMA-Factory -------------------------------------------------------------------------------------


def _factory_lora(given: Given) -> bool:
    return bool(given.get("finetuning_type", "lora") == "lora")


def _factory_simpo(given: Given) -> bool:
    return stage(given) == "dpo" and given.get("pref_loss") == "simpo"


_LLAMA_FACTORY: Final = Tool(
    title="LLaMA-Factory",
    version="0.9.5",
    trains_lora=_factory_lora,
    defaults=(
        Default("learning_rate", 5e-5),
        Default("num_train_epochs", 3.0),
        Default("lr_scheduler_type", "linear"),
        Default("cutoff_len", 2048),
        Default("finetuning_type", "lora"),
        Default("lora_rank", 8, _factory_lora),
        Default("lora_target", "all", _factory_lora),
        Default("template", "tokenizer_default", lambda given: stage(given) != "pt"),
        Default("double_quantization", True, is_quantized),
        Default("pref_beta", 0.1, _factory_simpo),
        Default("simpo_gamma", 0.5, _factory_simpo),
    ),
    habits=(
        Habit(
            {"data.long_rows": "cut_proportional"},
            "prompt and answer of a row that is too long are cut in proportion",
            when=lambda given: stage(given) != "pt",
        ),
        Habit(
            {"plugins.packed.strategy": "wrapped"},
            "texts are joined and cut into rows of cutoff_len",
            ("packing",),
            _is_stage("pt"),
        ),
    ),
    rows=(
        row(
            "packing neat_packing",
            (False, leave_out()),
            made(
                factory_packing,
                "plugins.packed",
                why="documents of a packed row never attend to one another; texts of pre-training are joined and cut "
                "(strategy: wrapped)",
            ),
        ),
    ),
)


# --- Axolotl ---------------------------------------------------------------------------------------------

_AXOLOTL: Final = Tool(
    title="Axolotl",
    version="0.19",
    trains_lora=lambda given: given.get("adapter") in ("lora", "qlora"),
    defaults=(
        Default("sequence_len", 512),
        Default("micro_batch_size", 1),
        Default("excess_length_strategy", "drop"),
        Default("lr_scheduler", "cosine"),
        Default("num_epochs", 1.0),
        Default("lora_dropout", 0.0, lambda given: given.get("adapter") in ("lora", "qlora")),
        Default("rl_beta", 0.1, _is_stage("simpo")),
        Default("cpo_alpha", 1.0, _is_stage("simpo")),
        Default("max_completion_length", 512, _is_stage("grpo")),
    ),
    habits=(
        Habit(
            {"train.warmup_steps": 0.03},
            "Axolotl warms up for 3 % of the steps, at most 100, where nothing is said",
            ("warmup_steps", "warmup_ratio"),
        ),
        Habit(
            {"plugins.lora.target_modules": ["q_proj", "v_proj"]},
            "PEFT's choice for most models where none is named",
            ("lora_target_modules", "lora_target_linear", "lora_target_parameters"),
            lambda given: given.get("adapter") in ("lora", "qlora"),
        ),
    ),
)


# --- ms-swift ------------------------------------------------------------------------------------------


def _swift_tuner(given: Given) -> str:
    return str(given.get("tuner_type", given.get("train_type", given.get("sft_type", "lora"))))


def _swift_lora(given: Given) -> bool:
    return _swift_tuner(given) == "lora"


_SWIFT: Final = Tool(
    title="ms-swift",
    version="4",
    trains_lora=_swift_lora,
    defaults=(
        Default("learning_rate", 1e-4, lambda given: _swift_tuner(given) != "full"),
        Default("learning_rate", 1e-5, lambda given: _swift_tuner(given) == "full"),
        Default("num_train_epochs", 3.0),
        Default("per_device_train_batch_size", 1),
        Default("weight_decay", 0.1),
        Default("adam_beta2", 0.95),
        Default("tuner_type", "lora"),
        Default("lora_rank", 8, _swift_lora),
        Default("lora_dropout", 0.05, _swift_lora),
        Default("truncation_strategy", "delete"),
    ),
    habits=(
        Habit(
            {"train.train_batch_size": 16},
            "ms-swift accumulates to 16 rows a step where nothing is said",
            ("gradient_accumulation_steps",),
        ),
        Habit({"plugins.tokenizer": {}}, "ms-swift has a template of its own for each kind of model", ("template",)),
    ),
    rows=(
        row("model model_id_or_path", made(base, "model")),
        row("dataset", swift_dataset("data.train")),
        row("val_dataset", swift_dataset("data.eval")),
        row("split_dataset_ratio", (0, leave_out()), to("data.eval_fraction")),
        row(
            "tuner_type train_type sft_type",
            ("lora", plugin("lora")),
            ("full", plugin("full")),
            ("vera", plugin("vera")),
            not_here("the adapters here are lora, qlora and vera"),
        ),
        row("lora_rank", to("plugins.lora.r")),
        row("lora_bias", ("none", leave_out()), to("plugins.lora.bias")),
        row("init_weights", ("true", leave_out()), to("plugins.lora.init_lora_weights")),
        row("lorap_lr_ratio", to("plugins.lora.loraplus_lr_ratio")),
        row("target_regex", to("plugins.lora.target_modules")),
        row("vera_rank", to("plugins.vera.r")),
        row("vera_dropout vera_d_initial", leave_out("plugins.vera has it under the same name")),
        row("adapters", to("plugins.lora.init_from", lambda value: value[-1] if isinstance(value, list) else value)),
        row("system", to("data.system")),
        row("max_length", to("data.max_length")),
        row(
            "truncation_strategy",
            ("delete", write({"data.long_rows": "drop"}, why="rows that are too long are left out")),
            ("left", write({"data.long_rows": "cut_oldest"}, why="removes the oldest turns")),
            ("right", write({"data.long_rows": "cut_end"})),
            ("split", write({"data.long_rows": "split"})),
        ),
        row(
            "loss_scale",
            ("default", leave_out()),
            ("last_round", write({"data.train_turns": "last"})),
            ("all", write({"data.train_on_prompt": True})),
            not_here("turns and tokens have weights in the rows themselves: docs/data.md"),
        ),
        row("packing_length", to("plugins.packed.length")),
        row("packing_strategy", leave_out("plugins.packed chooses the rows that share one")),
        row("streaming", (True, write({"data.streaming": True})), (False, leave_out())),
        row("shuffle_buffer_size", to("data.plan_window")),
        row("columns", swift_columns()),
        row("early_stop_interval", to("train.early_stopping_patience")),
        row("max_epochs", to("train.num_train_epochs")),
        row("label_smoothing", (0, leave_out()), to_objective("label_smoothing")),
        row("model_name model_author", not_here("rows that say who the model is are written by you")),
        row("strict", leave_out()),
        row(
            "attn_impl experts_impl device_map lazy_tokenize use_hf check_model load_from_cache_file "
            "load_args load_data_args add_version create_checkpoint_symlink dataset_shuffle val_dataset_shuffle "
            "train_dataloader_shuffle packing_num_proc model_kwargs tuner_backend ddp_timeout acc_strategy "
            "use_logits_to_keep safe_serialization max_shard_size agent_template response_prefix template_backend "
            "use_chat_template padding_side norm_bbox max_pixels freeze_vit freeze_aligner ignore_args_error "
            "add_non_thinking_prefix dataset_num_proc max_new_tokens lora_dtype truncation_side is_binary_loss_scale "
            "vit_gradient_checkpointing disable_auto_column_mapping eval_limit logprobs stream",
            leave_out(),
        ),
        row(
            "custom_register_path external_plugins callbacks",
            not_here("code does not go into a run file; see docs/plugins.md"),
        ),
        row(
            "freeze_parameters freeze_parameters_ratio freeze_parameters_regex freeze_llm trainable_parameters "
            "trainable_parameters_regex",
            not_here("plugins.freeze chooses layers and modules"),
        ),
        row("cached_dataset cached_val_dataset", not_here("encoded rows are kept by sftx itself; give the rows")),
        row("resume_only_model", not_here("plugins.lora.init_from trains an adapter on")),
    ),
)


# --- MiniMind ------------------------------------------------------------------------------------------

_MINIMIND: Final = Tool(
    title="MiniMind",
    version="of July 2026",
    trains_lora=lambda _: False,
    defaults=(
        Default("learning_rate", 1e-5),
        Default("epochs", 2),
        Default("batch_size", 16),
        Default("max_seq_len", 768),
    ),
    habits=(
        Habit({"train.lr_scheduler_type": "minimind"}, "a cosine from the first step that ends at a tenth of the peak"),
        Habit({"train.weight_decay": 0.01}, "torch's AdamW decays by 0.01 where nothing is said"),
        Habit({"plugins.minimind": {}}, "MiniMind's template"),
    ),
    rows=(
        row("batch_size", to("train.per_device_train_batch_size")),
        row("accumulation_steps", to("train.gradient_accumulation_steps")),
        row("grad_clip", to("train.max_grad_norm")),
        row("save_dir", to("output_dir")),
        row("log_interval", to("train.logging_steps")),
        row("save_interval", to("train.save_steps")),
        row("from_weight", not_here("write `model:` with the directory that scripts/convert_model.py makes of it")),
        row("from_resume", (0, leave_out()), not_here("resume with the same command and --resume")),
        row("use_compile", (1, write({"train.torch_compile": True})), (0, leave_out())),
        row("use_wandb", (True, not_here("MiniMind reports to SwanLab; trackers here are wandb, tensorboard, mlflow"))),
        row(
            "save_weight hidden_size num_hidden_layers use_moe num_workers device",
            leave_out("sizes and weights are those of the model's directory"),
        ),
    ),
)


TOOLS: Final[Mapping[str, Tool]] = {
    "trl": _TRL,
    "llama-factory": _LLAMA_FACTORY,
    "axolotl": _AXOLOTL,
    "ms-swift": _SWIFT,
    "minimind": _MINIMIND,
}
__all__ = ["TOOLS", "Default", "Habit", "Tool", "objective"]
