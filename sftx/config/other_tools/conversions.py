"""Converts values of other tools' options that need more than another name."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Callable, Mapping
from typing import Any, Final

from sftx.config.named_plugins import LR_SCHEDULER_TYPE, OPTIM
from sftx.config.other_tools.rules import (
    ANY,
    Answer,
    Given,
    Rule,
    brief,
    is_quantized,
    made,
    not_here,
    stage,
    to,
)

ENGINE: Final = "`sftx serve`, `sftx chat` and `sftx generate` answer; `sftx export` writes for other programs"
LORA_ONLY: Final = "the adapters here are lora, qlora and vera"


def base(value: Any, _: Given) -> Answer:
    """A model, of which the name may say that its weights are quantised so that they are not trained on here."""
    found = re.search(r"[-_.](gptq|awq|aqlm|exl2|hqq)\b", str(value), re.IGNORECASE)
    lost = f"{value}: by its name its weights are in {found[1].upper()}, which sftx does not train on" if found else ""
    return Answer("write", {"model": value}, lost=(f"{lost}; take the original, with plugins.qlora",) if lost else ())


def split_names(value: Any) -> Any:
    """LLaMA-Factory writes lists as `q_proj,v_proj`."""
    return [part.strip() for part in value.split(",")] if isinstance(value, str) and "," in value else value


def name_list(value: Any) -> Any:
    return [value] if isinstance(value, str) and "," not in value else split_names(value)


def rank(value: Any, given: Given) -> Answer:
    """LLaMA-Factory's lora_alpha is twice the rank where none is given; here it has a default of its own."""
    options: dict[str, Any] = {"plugins.lora.r": value}
    if "lora_alpha" not in given and "plugins.lora.lora_alpha" not in given and type(value) is int:
        return Answer(
            "write", {**options, "plugins.lora.lora_alpha": 2 * value}, "LLaMA-Factory's lora_alpha is twice the rank"
        )
    return Answer("write", options)


def pissa(value: Any, given: Given) -> Answer:
    """LLaMA-Factory finds the singular values in 16 iterations, or exactly with -1."""
    iterations = given.get("pissa_iter", 16)
    init = "pissa" if iterations == -1 else f"pissa_niter_{int(iterations)}"
    return Answer("write", {"plugins.lora.init_lora_weights": init})


def adapters(value: Any, given: Given) -> Answer:
    """LLaMA-Factory merges all adapters but the last, which it trains on; or all of them, below a new one."""
    names = name_list(value)
    below = names if given.get("create_new_adapter") else names[:-1]
    options = {"plugins.lora.base_adapters": below} if below else {}
    return Answer("write", options if below == names else {"plugins.lora.init_from": names[-1], **options})


def all_tokens(why: str) -> Rule:
    """TRL trains every token of a row, unless the other of its two options says otherwise."""

    def make(_: Any, given: Given) -> Answer:
        if True in (given.get("completion_only_loss"), given.get("assistant_only_loss")):
            return Answer("leave out", why="only answers are trained")
        return Answer("write", {"data.train_on_prompt": True}, why)

    return made(make, "data.train_on_prompt: true", why=why)


def _is_packed(given: Given) -> bool:
    return any(given.get(name) for name in ("packing", "sample_packing", "neat_packing")) or "plugins.packed" in given


def padded(option: str) -> Rule:
    """An option of the plugin `padded`, which packed rows do without."""

    def make(value: Any, given: Given) -> Answer:
        if _is_packed(given):
            return Answer("leave out", why="packed rows have no padding")
        return Answer("write", {f"plugins.padded.{option}": value})

    return made(make, f"plugins.padded.{option}")


def tokenizer_template(option: str, why: str) -> Rule:
    """An option of the tokenizer's own template, which a template by a plugin of its own has not."""

    def make(value: Any, given: Given) -> Answer:
        named = given.get("template", given.get("chat_template"))
        if named is not None and template(named, given).write != {"plugins.tokenizer": {}}:
            return Answer("not here", why=why)
        return Answer("write", {f"plugins.tokenizer.{option}": value})

    return made(make, f"plugins.tokenizer.{option}", why=f"with the tokenizer's own template; else {why}")


def of_tracker(plugin: str, option: str) -> Rule:
    """An option of a tracker, which means nothing where the run does not report to it."""

    def make(value: Any, given: Given) -> Answer:
        if plugin in str(given.get("report_to")) or given.get("report_to") == "all" or f"plugins.{plugin}" in given:
            return Answer("write", {f"plugins.{plugin}.{option}": value})
        return Answer("leave out", why=f"without report_to: {plugin} it has no effect")

    return made(make, f"plugins.{plugin}.{option}")


FUNCTIONS: Final = "a function here has the parameters prompts, answers and rows"
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


def reward_functions(value: Any, given: Given) -> Answer:
    """TRL's names, or `my_lib.rewards.custom_reward`, which is a function in a file here."""
    options: dict[str, Any] = {}
    for name in name_list(value):
        module, _, function = str(name).rpartition(".")
        found = _KNOWN_FUNCTIONS.get(str(name))
        if found is None and not module:
            return Answer("not here", why=f"{brief(name)} is not known; give a function of a file of yours")
        if found is None and "plugins.reward-function.function" in options:
            return Answer("not here", why="a run has one reward-function; let one function call the others")
        options |= found or {"plugins.reward-function.function": f"{module.replace('.', '/')}.py:{function}"}
    return Answer("write", options, FUNCTIONS)


def save_best(_: Any, given: Given) -> Answer:
    if "metric_for_best_model" in given or "train.metric_for_best_model" in given:
        return Answer("leave out", why="train.metric_for_best_model has the best checkpoint saved")
    return Answer("write", {"train.metric_for_best_model": "loss"})


def test_split(value: Any, given: Given) -> Answer:
    strategy = given.get("eval_strategy", given.get("evaluation_strategy"))
    if strategy in (None, False, "no") or not isinstance(given.get("dataset_name"), str):
        return Answer("leave out", why="TRL reads it only when eval_strategy is set")
    return Answer("write", {"data.eval": [{"path": given["dataset_name"], "split": value}]})


def factory_packing(_: Any, given: Given) -> Answer:
    """LLaMA-Factory joins texts of pre-training and cuts them into rows; rows of other stages are packed whole."""
    if stage(given) == "pt":
        return Answer("write", {"plugins.packed.strategy": "wrapped"}, "texts are joined and cut into rows")
    return Answer("write", {"plugins.packed": {}}, "documents of a packed row never attend to one another")


def packing_strategy(value: Any, given: Given) -> Answer:
    if not given.get("packing"):
        return Answer("leave out", why="without packing it has no effect")
    if value in ("bfd", "wrapped"):
        return Answer("write", {"plugins.packed.strategy": value})
    if value == "bfd_split":
        return Answer("write", {"plugins.packed": {}, "data.long_rows": "split"}, "splits a row that is too long")
    return Answer("not here", why="plugins.packed.strategy is bfd or wrapped")


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


def template(value: Any, _: Given) -> Answer:
    if isinstance(value, str) and (name := _TEMPLATES.get(value.lower())) is not None:
        return Answer("write", {f"plugins.{name}": {}})
    return Answer("write", {"plugins.tokenizer": {}}, "the template that the tokenizer brings")


def dtype(value: Any, given: Given) -> Answer:
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


def trackers(value: Any, given: Given) -> Answer:
    names = [str(name) for name in (value if isinstance(value, list) else split_names(value) or [])] or ["none"]
    names = [value] if isinstance(value, str) and "," not in value else names
    plugins = [name for name in names if name in ("wandb", "tensorboard", "mlflow")]
    others = [name for name in names if name not in plugins and name not in ("none", "all", "jsonl")]
    if others and not plugins:
        return Answer("not here", why=f"trackers here are wandb, tensorboard and mlflow, not {', '.join(others)}")
    if plugins:
        return Answer("write", {f"plugins.{name}": {} for name in plugins})
    return Answer("leave out", why="metrics.jsonl and report.html are written without a tracker")


def run_name(value: Any, given: Given) -> Answer:
    tracker = str(given.get("report_to"))
    for name, option in (("wandb", "plugins.wandb.name"), ("mlflow", "plugins.mlflow.run_name")):
        if name in tracker:
            return Answer("write", {option: value})
    return Answer("leave out", why="a run is named after its output directory")


OPTIMIZERS: Final = f"optimizers here are {', '.join(OPTIM.built_in)}, and plugins (docs/hooks/optimizer.md)"


def optimizer(value: Any, _: Given) -> Answer:
    known = {"adamw_hf": "adamw", "adamw_torch_8bit": "adamw_8bit", "adamw_apex_fused": "adamw"}
    name = known.get(str(value), str(value))
    name = OPTIM.aliases.get(name, name)
    if name in OPTIM.built_in:
        return Answer("write", {"train.optim": name})
    return Answer("not here", why=OPTIMIZERS)


def schedule(value: Any, _: Given) -> Answer:
    name = LR_SCHEDULER_TYPE.aliases.get(value, value) if isinstance(value, str) else None
    if name in LR_SCHEDULER_TYPE.built_in:
        return Answer("write", {"train.lr_scheduler_type": name})
    built_in = ", ".join(LR_SCHEDULER_TYPE.built_in)
    return Answer("not here", why=f"schedules here are {built_in}, and plugins (docs/hooks/schedule.md)")


def schedule_options(value: Any, given: Given) -> Answer:
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


def sharding(value: Any, _: Given) -> Answer:
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


def sharding_options(value: Any, given: Given) -> Answer:
    if not isinstance(value, dict) or not ("fsdp" in given or value.get("name") == "fsdp2" or "fsdp_version" in value):
        return Answer("leave out", why="train.distributed: fsdp2 needs no options of its own")
    answer = sharding(value, given)
    return dataclasses.replace(answer, why="")


def adapter_options(value: Any, given: Given) -> Answer:
    """A mapping of PEFT's options under one name, each of which has a row of its own."""
    if not isinstance(value, dict):
        return Answer("not here", why="the options of LoRA are those of plugins.lora")
    if str(value.get("name", value.get("peft_type", "lora"))).lower() != "lora":
        return Answer("not here", why=LORA_ONLY)
    inner = {name: setting for name, setting in value.items() if name not in ("name", "peft_type")}
    return Answer("write", {"plugins.lora": {}}, inner=inner)


def of_freeze(option: str, convert: Callable[[Any], Any] = lambda value: value) -> Rule:
    """An option of LLaMA-Factory's partial fine-tuning, which it reads for that alone."""

    def make(value: Any, given: Given) -> Answer:
        if given.get("finetuning_type", "freeze") != "freeze":
            return Answer("leave out", why="without finetuning_type: freeze it has no effect")
        return Answer("write", {f"plugins.freeze.{option}": convert(value)})

    return made(make, f"plugins.freeze.{option}")


def unfrozen(value: Any, _: Given) -> Answer:
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


def special_tokens(value: Any, _: Given) -> Answer:
    usual = {"pad_token", "eos_token", "bos_token", "unk_token"}
    if isinstance(value, dict) and set(value) <= usual:
        return Answer("leave out", why="padding is masked by its length, and the template names the token that stops")
    return Answer("write", {"add_tokens": True}, "adds the control tokens of the template that the tokenizer lacks")


def whole_number(target: str) -> tuple[tuple[Any, Rule], ...]:
    return (
        (float, not_here("a number of steps is understood, a share of them is not")),
        (ANY, to(target)),
    )


def eval_by_steps(_: Any, given: Given) -> Answer:
    if "eval_steps" in given or "train.eval_steps" in given:
        return Answer("leave out", why="train.eval_steps turns it on")
    steps = given.get("logging_steps", given.get("train.logging_steps", 10))
    return Answer("write", {"train.eval_steps": steps}, "transformers takes logging_steps where it is not set")


_OBJECTIVES: Final = ("dpo", "kto", "orpo", "simpo", "grpo", "ppo")
_STAGES: Final = ("pref_loss", "stage", "rl", "rlhf_type")
"""Options that say what kind of training a run is."""


def objective(given: Given) -> str:
    """Return the plugin of a run that compares answers: LLaMA-Factory's pref_loss and stage, Axolotl's rl, ...

    It is dpo where none says.
    """
    # LLaMA-Factory reads pref_loss in the stage dpo alone.
    pref_loss = given.get("pref_loss") if given.get("stage", "dpo") == "dpo" else None
    pref_loss = "kto" if pref_loss == "kto_pair" else pref_loss
    names = (pref_loss, stage(given), *(name for name in _OBJECTIVES if f"plugins.{name}" in given))
    found = next((str(name) for name in names if name in _OBJECTIVES), "dpo")
    is_simpo = stage(given) == "cpo" and given.get("loss_type") == "simpo"
    return "simpo" if is_simpo else found


def is_of(given: Given, *names: str) -> bool:
    """Return whether a run may have one of these objectives: where nothing says what kind of training it is, it may."""
    is_said = any(given.get(name) for name in _STAGES) or any(f"plugins.{name}" in given for name in _OBJECTIVES)
    if not is_said:
        return True
    is_compared = stage(given) in (*_OBJECTIVES, "cpo", "ipo") or objective(given) != "dpo" or "plugins.dpo" in given
    return is_compared and objective(given) in names


def only_with(names: str, rule: Rule) -> Rule:
    """A rule for an option that these objectives read, and the others do not."""
    objectives = tuple(names.split())

    def make(value: Any, given: Given) -> Answer:
        if not is_of(given, *objectives):
            return Answer("leave out", why=f"without {' or '.join(objectives)} it has no effect")
        return rule.make(value, given)

    return dataclasses.replace(rule, make=make)


def dropout(value: Any, given: Given) -> Answer:
    """The trainers of answers that are compared turn all dropout off, in TRL and in those that build on them."""
    is_compared = stage(given) in ("dpo", "ipo", "kto", "orpo", "cpo", "simpo", "gkd")
    if value and (given["disable_dropout"] is True if "disable_dropout" in given else is_compared):
        return Answer("leave out", why=f"dropout is turned off in {stage(given)} there, LoRA's too")
    return Answer("write", {"plugins.lora.lora_dropout": value})


def stage_dpo(_: Any, given: Given) -> Answer:
    """LLaMA-Factory trains orpo and simpo in the stage dpo, by pref_loss."""
    return Answer("write", {f"plugins.{objective(given)}": {}})


def stage_cpo(_: Any, given: Given) -> Answer:
    if given.get("loss_type") == "simpo":
        return Answer("write", {"plugins.simpo": {}})
    return Answer("not here", why="of CPO's losses simpo is here; or take orpo, which needs no reference either")


_OPTIONS_OF: Final[Mapping[str, tuple[str, ...]]] = {
    "beta": ("dpo", "kto", "orpo", "simpo", "grpo"),
    "label_smoothing": ("dpo", "simpo"),
    "reference_model": ("dpo", "kto", "grpo", "ppo"),
    "reference": ("dpo", "kto"),
    "rpo_alpha": ("dpo",),
    "ld_alpha": ("dpo",),
}


def to_objective(option: str) -> Rule:
    """The value is written to an option of the run's preference loss, if it has it."""

    def make(value: Any, given: Given) -> Answer:
        name = objective(given)
        if not is_of(given, *_OBJECTIVES):
            return Answer("leave out", why="without a preference loss it has no effect")
        if name not in _OPTIONS_OF.get(option, (name,)):
            return Answer("not here", why=f"{name} has no such option")
        return Answer("write", {f"plugins.{name}.{option}": value})

    return made(make, f"plugins.dpo.{option}")


BETA: Final = to_objective("beta")


def of_rollout(option: str, otherwise: str) -> Rule:
    """An option of what makes answers to train on; elsewhere it says how answers are made that are only looked at."""

    def make(value: Any, given: Given) -> Answer:
        if objective(given) not in ("grpo", "ppo"):
            return Answer("leave out", why=otherwise)
        return Answer("write", {f"plugins.{objective(given)}.{option}": value})

    return made(make, f"plugins.grpo.{option}", why=otherwise and f"with grpo or ppo; else {otherwise}")


_DPO_LOSSES: Final = ("sigmoid", "hinge", "ipo", "robust", "sigmoid_norm")


def loss_type(value: Any, given: Given) -> Answer:
    """The loss within an objective; without one, TRL's SFT has `nll` and others."""
    kind = objective(given) if stage(given) != "sft" or "pref_loss" in given else "sft"
    names = value if isinstance(value, list) else [value]
    if kind == "sft":
        if set(names) <= {"nll", "chunked_nll"}:
            return Answer("leave out", why="logits are never materialised")
        return Answer("not here", why="a loss is a plugin: docs/plugins.md")
    if kind == "dpo":
        weights = given.get("loss_weights") or [1.0] * len(names)
        if names[0] not in _DPO_LOSSES or len(names) > 2 or names[1:] not in ([], ["sft"]):
            return Answer("not here", why=f"losses of dpo are {', '.join(_DPO_LOSSES)}, and rpo_alpha adds one of SFT")
        options = {"plugins.dpo.loss_type": names[0]}
        return Answer("write", options | ({"plugins.dpo.rpo_alpha": weights[1] / weights[0]} if names[1:] else {}))
    if kind == "grpo":
        return Answer("write", {"plugins.grpo.loss_type": names[0]})
    if names == [kind]:
        return Answer("leave out", why=f"it is the loss of {kind}")
    return Answer("not here", why=f"{kind} has one loss")


def of_quantization(option: str) -> Rule:
    """An option of a base in four bits, which means nothing without one."""

    def make(value: Any, given: Given) -> Answer:
        if not is_quantized(given):
            return Answer("leave out", why="without load_in_4bit it has no effect")
        return Answer("write", {f"plugins.qlora.{option}": value})

    return made(make, f"plugins.qlora.{option}")


_TEACHERS: Final = ("teacher_model_name_or_path", "teacher_model", "plugins.distill.teacher")


def beta(value: Any, given: Given) -> Answer:
    """TRL's beta is the teacher's share in a generalised JSD where there is a teacher, else that of an objective."""
    if not any(name in given for name in _TEACHERS):
        return BETA.make(value, given)
    if value in (0, 1):
        return Answer("write", {"plugins.distill.divergence": "reverse" if value else "forward"})
    return Answer("write", {"plugins.distill.divergence": "jsd", "plugins.distill.beta": value})


def precompute(_: Any, given: Given) -> Answer:
    return to_objective("reference").make("precompute", given)


def completion_length(value: Any, given: Given) -> Answer:
    if objective(given) == "grpo":
        return Answer("write", {"plugins.grpo.max_completion_length": value})
    return Answer("leave out", why="data.max_length bounds prompt and answer together")


def answering_engine(_: Any, given: Given) -> Answer:
    """Options of vLLM and SGLang, which make the answers of a rollout there."""
    if objective(given) in ("grpo", "ppo"):
        return Answer("leave out", why="answers are made by sftx's own engine")
    return Answer("not here", why=ENGINE)


def options_within(value: Any, _: Given) -> Answer:
    """A mapping of options that have rows of their own."""
    if not isinstance(value, dict):
        return Answer("not here", why="it is a mapping of options")
    return Answer("write", {}, inner=value)


def sequential(_: Any, given: Given) -> Answer:
    """TRL's KTO keeps the order of the file, since it estimates the distance to the reference from neighbours."""
    if objective(given) == "kto":
        return Answer("leave out", why="kto estimates the distance to the reference over the whole step")
    return Answer("not here", why="each epoch has another order, which follows from train.seed")
