"""The table of other tools' options knows all of theirs, and names only options, plugins and values that exist here."""

from __future__ import annotations

import dataclasses
import json
import re
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

import assets
from migrating_pages import NESTED, annotated
from sftx.assembly.discovery import load_class
from sftx.assembly.entry_points import discover, find
from sftx.config import loading, other_tools, run_file, validation
from sftx.config.options import SECTION_CLASSES, SECTIONS, RunConfig, Source
from sftx.config.other_tools import ANY, TABLE, TOOLS, Answer, answer
from sftx.errors import ConfigError

RULES = [
    (row.names[0], key, rule) for rows in TABLE.values() for row in rows for key, rule in row.rules
]  # each rule with one of the names that it is for


def unanswered(options: dict[str, Any], **given: Any) -> list[str]:
    """Return the names without an answer, and those whose default is not here: a default asks for nothing."""
    found = {name: answer(name, value, given) for name, value in options.items() if name not in SECTIONS}
    return [name for name, made in found.items() if made is None or made.kind == "not here"]


def test_every_option_of_trl_transformers_and_peft_is_answered() -> None:
    """A field that a new version of them adds fails here, until the table has it."""
    import peft
    import transformers
    import trl

    stages = {trl.DPOConfig: "dpo", trl.KTOConfig: "kto", trl.GRPOConfig: "grpo"}
    for cls in (
        *stages, trl.SFTConfig, trl.RewardConfig, trl.ModelConfig, trl.ScriptArguments, trl.DatasetMixtureConfig,
        transformers.TrainingArguments, peft.LoraConfig,
    ):  # fmt: skip
        defaults = {
            field.name: field.default_factory() if callable(field.default_factory) else field.default
            for field in dataclasses.fields(cls)
        }
        assert len(defaults) > 2
        defaults = {name: None if value is dataclasses.MISSING else value for name, value in defaults.items()}
        assert unanswered(defaults, stage=stages.get(cls, "sft")) == [], cls


def test_every_option_of_llama_factory_and_axolotl_is_answered() -> None:
    theirs = [annotated(path) for path in sorted(assets.path("llamafactory_options").glob("*_args.py"))]
    assert sum(map(len, theirs)) > 200
    for options in theirs:
        # Its defaults are those of evaluation, export and vision too, which a run that sets none does not ask for.
        assert [name for name in options if answer(name, None, {}) is None and name not in SECTIONS] == []
    axolotl = [annotated(path, but=NESTED) for path in sorted(assets.path("axolotl_options").glob("*.py"))]
    assert sum(map(len, axolotl)) > 350
    for options in axolotl:
        # Options of a method that is not here have defaults, which mean nothing without their switch.
        of_methods = ("dion_", "qgalore_", "lisa_", "otel_", "relora_", "loftq_", "merge_method")
        assert [name for name in unanswered(options) if not name.startswith(of_methods)] == []
        assert [name for name in options if answer(name, None, {}) is None and name not in SECTIONS] == []


def test_no_name_has_two_rows() -> None:
    names = [name for rows in TABLE.values() for row in rows for name in row.names]
    assert [name for name, count in Counter(names).items() if count > 1] == []


SAMPLES: dict[str, Any] = {
    "dataset": "identity,alpaca_en_demo", "train_dataset": "a.yaml", "eval_dataset": "identity", "cutoff_len": 128,
    "datasets": [{"path": "a", "type": "alpaca", "split": "test", "name": "b"}], "test_datasets": [{"path": "a"}],
    "dataset_text_field": "content", "field_messages": "turns", "max_samples": 3, "val_size": 0.1, "buffer_size": 5,
    "dataset_num_proc": 2, "loraplus_lr_ratio": 16, "modules_to_save": "lm_head,embed_tokens", "target_modules": "q,v",
    "peft_config": {"name": "lora", "r": 4, "target_modules": "all"}, "lora_rank": 8, "warmup_ratio": 0.1,
    "lr_scheduler_kwargs": {"min_lr_rate": 0.1, "num_decay_steps": 3, "power": 2.0}, "lr_scheduler_type": "linear",
    "optim": "adamw_torch", "fsdp": "full_shard offload", "fsdp_config": {"fsdp_version": 2, "offload_params": True},
    "special_tokens": {"additional_special_tokens": ["a"]}, "report_to": ["wandb", "tensorboard"],
    "roles_to_train": ["assistant"], "chat_template_kwargs": {"a": 1}, "template": "llama3", "torch_dtype": "float16",
    "metric_for_best_model": "loss", "label_smoothing_factor": 0.1, "wandb_mode": "offline", "bf16": True, "tf32": True,
    "fp16": True, "gradient_checkpointing": True, "embedding_lr": 1e-3, "loraplus_lr_embedding": 1e-3, "lr": 1e-3,
    "cosine_min_lr_ratio": 0.5, "lora_dropout": 0.5, "early_stopping_steps": 2, "add_special_tokens": "<a>",
    "unfrozen_parameters": ["^lm_head"], "adapter_name_or_path": "first,second", "reward_funcs": ["rewards.score"],
}  # fmt: skip
"""A value for a row whose values are neither whole numbers nor text, by the row's first name."""


def written() -> list[tuple[str, Answer]]:
    """Return what each rule writes for a value that is its own, with the name that it is for."""
    given = {"dataset_name": "rows", "eval_strategy": "steps", "packing": True, "report_to": "wandb", "fsdp": True}
    found = []
    for name, key, rule in RULES:
        values = [SAMPLES[name]] if name in SAMPLES else ["wrapped", 2]
        for value in [key] if key is not ANY and not isinstance(key, type) else values:
            made = rule.make(value, given)
            if made.kind == "write" and not (made.write == {} or isinstance(key, type)):
                found.append((name, made))
    return found


def error_of(*assignments: tuple[str, Any, str]) -> str:
    """Return what is wrong with a run of these options, but for a sample that has not the right type."""
    try:
        loading.load(None, assignments=assignments)
    except ConfigError as error:
        message = str(error)
        return "another type" if re.search("expected|has no effect|needs", message) else message
    return ""


def test_what_is_written_exists_here_and_has_a_type_that_fits() -> None:
    """Each option is written into a run file alone and read; options of plugins are validated with the plugin."""
    installed = discover()
    made = written()
    assert len(made) > 80
    reached = {target.partition(": ")[0] for name, answered in made for target in answered.write}
    declared = {t.partition(": ")[0] for _, _, rule in RULES for t in rule.targets} - {"plugins.<template>"}
    own = {target for target in declared if not target.startswith(other_tools.EACH_SOURCE)}
    for name, answered in made:
        for target, value in answered.write.items():
            section, _, rest = target.partition(".")
            if section == "plugins":
                plugin, _, option = (rest, "", "") if value == {} else rest.partition(".")
                cls = load_class(find(plugin, installed))
                assert not option or option in {field.name for field in dataclasses.fields(cls)}, (name, target)
            else:
                field = target.removeprefix(other_tools.EACH_SOURCE)
                source = {"path": "rows.jsonl", field: value}
                assignment = (target, value, name) if field == target else ("data.train", [source], name)
                assert error_of(("data.train", ["rows"], ""), assignment) in ("", "another type"), (name, target)
    unreachable = {target for target in own - reached if not target.startswith("plugins.")}
    assert not unreachable


def test_what_the_rows_of_one_tool_write_exists_here() -> None:
    installed = discover()
    targets = {
        target.partition(": ")[0]
        for tool in TOOLS.values()
        for row in tool.rows
        for _, rule in row.rules
        for target in rule.targets
    }
    targets |= {target for tool in TOOLS.values() for habit in tool.habits for target in habit.write}
    assert len(targets) > 20
    for target in targets:
        section, _, option = target.partition(".")
        if section == "plugins":
            plugin, _, option = option.partition(".")
            cls = load_class(find(plugin, installed))
        else:
            cls = {"data.train.*": Source}.get(target.rpartition(".")[0], SECTION_CLASSES.get(section, RunConfig))
            option = target.rpartition(".")[2]
        assert not option or option in {field.name for field in dataclasses.fields(cls)}, target


@pytest.mark.parametrize(
    ("name", "value", "given", "kind", "write"),
    [
        ("packing", True, {}, "write", {"plugins.packed": {}}),
        ("packing", False, {}, "leave out", {}),
        ("packing_strategy", "bfd", {}, "leave out", {}),
        ("packing_strategy", "wrapped", {"packing": True}, "write", {"plugins.packed.strategy": "wrapped"}),
        ("packing_strategy", "bfd_split", {"packing": True}, "write",
         {"plugins.packed": {}, "data.long_rows": "split"}),
        ("eval_strategy", "steps", {"eval_steps": 5}, "leave out", {}),
        ("eval_strategy", "steps", {"logging_steps": 3}, "write", {"train.eval_steps": 3}),
        ("eval_strategy", "epoch", {}, "not here", {}),
        ("eval_strategy", "no", {}, "leave out", {}),
        ("eval_steps", 0.1, {}, "not here", {}),
        ("warmup_ratio", 0.1, {}, "write", {"train.warmup_steps": 0.1}),
        ("warmup_ratio", 0.0, {}, "leave out", {}),
        ("lora_target", "all", {}, "write", {"plugins.lora.target_modules": "all-linear"}),
        ("lora_target", "q_proj, v_proj", {}, "write", {"plugins.lora.target_modules": ["q_proj", "v_proj"]}),
        ("target_modules", ["q_proj"], {}, "write", {"plugins.lora.target_modules": ["q_proj"]}),
        ("seq_length", 8, {}, "write", {"data.max_length": 8}),
        ("lora_rank", 8, {}, "write", {"plugins.lora.r": 8, "plugins.lora.lora_alpha": 16}),
        ("adapter_name_or_path", "a", {}, "write", {"plugins.lora.init_from": "a"}),
        (
            "adapter_name_or_path", "a,b,c", {}, "write",
            {"plugins.lora.init_from": "c", "plugins.lora.base_adapters": ["a", "b"]},
        ),
        (
            "adapter_name_or_path", "a,b", {"create_new_adapter": True}, "write",
            {"plugins.lora.base_adapters": ["a", "b"]},
        ),
        ("lora_rank", 8, {"lora_alpha": 32}, "write", {"plugins.lora.r": 8}),
        ("lora_r", 8, {}, "write", {"plugins.lora.r": 8}),
        ("use_rslora", True, {}, "write", {"plugins.lora.use_rslora": True}),
        ("use_rslora", False, {}, "leave out", {}),
        ("peft_use_dora", True, {}, "write", {"plugins.lora.use_dora": True}),
        ("pissa_init", True, {}, "write", {"plugins.lora.init_lora_weights": "pissa_niter_16"}),
        ("pissa_init", True, {"pissa_iter": -1}, "write", {"plugins.lora.init_lora_weights": "pissa"}),
        ("peft_init_lora_weights", "olora", {}, "write", {"plugins.lora.init_lora_weights": "olora"}),
        ("init_lora_weights", "eva", {}, "not here", {}),
        ("peft_layers_to_transform", 3, {}, "write", {"plugins.lora.layers_to_transform": [3]}),
        ("bias", "lora_only", {}, "write", {"plugins.lora.bias": "lora_only"}),
        ("max_seq_length", 9, {}, "write", {"data.max_length": 9}),
        ("max_steps", -1, {}, "leave out", {}),
        ("torch_dtype", "torch.bfloat16", {}, "write", {"train.bf16": True}),
        ("torch_dtype", "auto", {}, "leave out", {}),
        ("load_in_4bit", True, {}, "write", {"plugins.qlora": {}}),
        ("load_in_8bit", True, {}, "write", {"plugins.qlora.load_in_8bit": True}),
        ("quantization_bit", 4, {}, "write", {"plugins.qlora": {}}),
        ("quantization_bit", 3, {}, "not here", {}),
        ("lora_r", 4, {"load_in_4bit": True}, "write", {"plugins.qlora.r": 4}),
        ("adapter", "qlora", {}, "write", {"plugins.qlora": {}}),
        ("double_quantization", False, {}, "leave out", {}),
        ("use_bnb_nested_quant", False, {"load_in_4bit": True}, "write",
         {"plugins.qlora.bnb_4bit_use_double_quant": False}),
        ("group_by_length", False, {}, "write", {"plugins.padded.group_by_length": False}),
        ("stage", "grpo", {}, "write", {"plugins.grpo": {}}),
        ("stage", "cpo", {"loss_type": "simpo"}, "write", {"plugins.simpo": {}}),
        ("stage", "cpo", {}, "not here", {}),
        ("rlhf_type", "kto", {}, "write", {"plugins.kto": {}}),
        ("loss_type", "nll", {}, "leave out", {}),
        ("loss_type", "dft", {}, "not here", {}),
        ("loss_type", ["sigmoid", "sft"], {"stage": "dpo", "loss_weights": [2.0, 1.0]}, "write",
         {"plugins.dpo.loss_type": "sigmoid", "plugins.dpo.rpo_alpha": 0.5}),
        ("loss_type", "bco_pair", {"stage": "dpo"}, "not here", {}),
        ("loss_type", "dr_grpo", {"stage": "grpo"}, "write", {"plugins.grpo.loss_type": "dr_grpo"}),
        ("beta", 0.04, {"stage": "grpo"}, "write", {"plugins.grpo.beta": 0.04}),
        ("temperature", 0.7, {"stage": "grpo"}, "write", {"plugins.grpo.temperature": 0.7}),
        ("temperature", 0.7, {}, "leave out", {}),
        ("trl", {"num_generations": 4, "use_vllm": True}, {"rl": "grpo"}, "write", {"plugins.grpo.num_generations": 4}),
        ("load_in_4bit", False, {}, "leave out", {}),
        ("deepspeed", "ds_z3_config.json", {}, "write", {"train.distributed": "fsdp2"}),
        ("deepspeed", "ds_z3_offload_config.json", {}, "write",
         {"train.distributed": "fsdp2", "train.fsdp_offload": True}),
        ("fsdp", ["full_shard", "auto_wrap"], {}, "write", {"train.distributed": "fsdp2"}),
        ("fsdp", "", {}, "leave out", {}),
        ("fsdp", "full_shard offload", {}, "write", {"train.distributed": "fsdp2", "train.fsdp_offload": True}),
        ("fsdp_config", {"fsdp_offload_params": False}, {"fsdp": "x"}, "write", {"train.distributed": "fsdp2"}),
        ("deepspeed", {"zero_optimization": {"stage": 3, "offload_optimizer": {"device": "cpu"}}}, {}, "write",
         {"train.distributed": "fsdp2", "train.fsdp_offload": True}),
        ("report_to", "none", {}, "leave out", {}),
        ("report_to", ["wandb", "swanlab"], {}, "write", {"plugins.wandb": {}}),
        ("report_to", "swanlab", {}, "not here", {}),
        ("run_name", "x", {"report_to": "wandb"}, "write", {"plugins.wandb.name": "x"}),
        ("template", "qwen", {}, "write", {"plugins.qwen2.5": {}}),
        ("template", "baichuan2", {}, "write", {"plugins.tokenizer": {}}),
        ("optimizer", "adamw_bnb_8bit", {}, "write", {"train.optim": "adamw_8bit"}),
        ("optim", "schedule_free", {}, "not here", {}),
        ("lr_scheduler_type", "cosine_with_restarts", {}, "not here", {}),
        ("lr_scheduler_kwargs", {"min_lr": 1e-5}, {"learning_rate": 1e-4}, "write", {"train.min_lr_ratio": 0.1}),
        ("completion_only_loss", False, {}, "write", {"data.train_on_prompt": True}),
        ("assistant_only_loss", True, {}, "leave out", {}),
        ("completion_only_loss", False, {"assistant_only_loss": True}, "leave out", {}),
        ("dataset_text_field", "content", {}, "write", {"data.train.*.columns": {"text": "content"}}),
        ("dataset_name", "d", {"dataset_text_field": "c", "dataset_config": "e"}, "write",
         {"data.train": [{"path": "d", "subset": "e", "columns": {"text": "c"}}]}),
        ("val_size", 0.1, {}, "write", {"data.eval_fraction": 0.1}),
        ("val_size", 200, {}, "write", {"data.eval_fraction": 200}),
        ("pad_to_multiple_of", 8, {}, "write", {"plugins.padded.pad_to_multiple_of": 8}),
        ("pad_to_multiple_of", 8, {"packing": True}, "leave out", {}),
        ("padding_free", True, {"packing": True}, "leave out", {}),
        ("enable_thinking", False, {"template": "qwen3"}, "not here", {}),
        ("enable_thinking", False, {}, "write", {"plugins.tokenizer.enable_thinking": False}),
        ("logging_dir", "logs", {"report_to": "tensorboard"}, "write", {"plugins.tensorboard.log_dir": "logs"}),
        ("logging_dir", "logs", {}, "leave out", {}),
        ("dtype", "float32", {"bf16": True}, "leave out", {}),
        ("dtype", "float32", {}, "write", {"train.bf16": False}),
        ("save_strategy", "best", {"metric_for_best_model": "rouge1"}, "leave out", {}),
        ("peft_config", {"name": "lora", "r": 4, "use_qalora": True}, {}, "write", {"plugins.lora.r": 4}),
        ("mix_strategy", "interleave_once", {}, "not here", {}),
        ("mix_strategy", "concat", {}, "write", {"data.mix_strategy": "concat"}),
        ("finetuning_type", "full", {}, "write", {"plugins.full": {}}),
        ("finetuning_type", "freeze", {}, "write", {"plugins.freeze": {}}),
        ("freeze_trainable_layers", -2, {"finetuning_type": "freeze"}, "write",
         {"plugins.freeze.trainable_layers": -2}),
        ("freeze_trainable_layers", 2, {"finetuning_type": "lora"}, "leave out", {}),
        ("freeze_trainable_modules", "all", {}, "leave out", {}),
        ("freeze_trainable_modules", "mlp,self_attn", {}, "write",
         {"plugins.freeze.trainable_modules": ["mlp", "self_attn"]}),
        ("freeze_extra_modules", "norm", {}, "write", {"plugins.freeze.extra_modules": ["norm"]}),
        ("unfrozen_parameters", ["^lm_head.weight$", "model.layers.2[0-9]+.mlp", "^a|b"], {}, "write",
         {"plugins.freeze.trainable_layers": 0,
          "plugins.freeze.extra_modules": ["^lm_head.weight$", "^model.layers.2[0-9]+.mlp.*", "^(?:^a|b).*"]}),
        ("unfrozen_parameters", ["^model.embed_tokens.weight$[:32000]"], {}, "not here", {}),
        ("unfrozen_parameters", [], {}, "leave out", {}),
        ("bias", "none", {}, "leave out", {}),
        ("bias", "all", {}, "write", {"plugins.lora.bias": "all"}),
        ("learning_rate", 1e-4, {}, "write", {"train.learning_rate": 1e-4}),
        ("dataloader_num_workers", 4, {}, "leave out", {}),
        ("stage", "dpo", {}, "write", {"plugins.dpo": {}}),
        ("stage", "dpo", {"pref_loss": "simpo"}, "write", {"plugins.simpo": {}}),
        ("stage", "kto", {}, "write", {"plugins.kto": {}}),
        ("stage", "rm", {}, "not here", {}),
        ("rl", "ipo", {}, "write", {"plugins.dpo.loss_type": "ipo"}),
        ("pref_loss", "hinge", {"stage": "dpo"}, "write", {"plugins.dpo.loss_type": "hinge"}),
        ("pref_beta", 0.3, {"stage": "dpo", "pref_loss": "orpo"}, "write", {"plugins.orpo.beta": 0.3}),
        ("beta", 0.3, {}, "write", {"plugins.dpo.beta": 0.3}),
        ("beta", 0, {"teacher_model": "t"}, "write", {"plugins.distill.divergence": "forward"}),
        ("beta", 1.0, {"teacher_model": "t"}, "write", {"plugins.distill.divergence": "reverse"}),
        (
            "beta",
            0.3,
            {"teacher_model_name_or_path": "t"},
            "write",
            {"plugins.distill.divergence": "jsd", "plugins.distill.beta": 0.3},
        ),
        ("teacher_model_name_or_path", "t", {}, "write", {"plugins.distill.teacher": "t"}),
        ("lmbda", 0.5, {}, "not here", {}),
        ("rl_beta", 0.3, {"rl": "kto"}, "write", {"plugins.kto.beta": 0.3}),
        ("pref_ftx", 0.0, {}, "leave out", {}),
        ("pref_ftx", 0.5, {}, "write", {"plugins.dpo.rpo_alpha": 0.5}),
        ("ref_model", "base", {"stage": "kto"}, "write", {"plugins.kto.reference_model": "base"}),
        ("precompute_ref_log_probs", True, {}, "write", {"plugins.dpo.reference": "precompute"}),
        ("ref_model_adapters", "a", {}, "not here", {}),
        ("stage", "ppo", {}, "write", {"plugins.ppo": {}}),
        ("ppo_target", 6.0, {}, "write", {"plugins.ppo.kl_target": 6.0}),
        ("adap_kl_ctrl", True, {}, "write", {"plugins.ppo.kl_target": 6.0}),
        ("adap_kl_ctrl", False, {}, "leave out", {}),
        ("cliprange_value", 0.1, {}, "write", {"plugins.ppo.cliprange_value": 0.1}),
        ("reward_model", "rm", {}, "write", {"plugins.reward-model.model": "rm"}),
        ("reward_funcs", ["accuracy_reward", "my_lib.rewards.score"], {}, "write",
         {"plugins.reward-exact-match": {}, "plugins.reward-function.function": "my_lib/rewards.py:score"}),
        ("reward_funcs", "a.b,a.c", {}, "not here", {}),
    ],
)  # fmt: skip
def test_values_are_translated(name: str, value: Any, given: Any, kind: str, write: dict[str, Any]) -> None:
    made = answer(name, value, given)
    assert made is not None
    assert (made.kind, dict(made.write)) == (kind, write)
    assert made.kind != "not here" or made.why


def test_axolotls_patterns_choose_the_parameters_that_they_choose_there() -> None:
    """Axolotl trains a parameter when re.match finds one of its patterns at the beginning of the name."""
    from sftx.model import tiny
    from sftx.model.load import load_spec
    from sftx_plugins.trainable.freeze import Freeze

    spec = load_spec(str(tiny.model_dir()))
    for patterns in (
        ["^lm_head.weight$", "^model.embed_tokens.weight$"], ["model.layers.[1-9]+.mlp.up"], ["^model.embed|norm|lm_h"],
        ["model.(norm|layers.0.self_attn.q)", "lm_head"],
    ):  # fmt: skip
        made = answer("unfrozen_parameters", patterns, {})
        assert made is not None
        options = {target.removeprefix("plugins.freeze."): value for target, value in made.write.items()}
        theirs = {name for name in spec.parameter_names if any(re.match(pattern, name) for pattern in patterns)}
        assert theirs
        assert Freeze(**options).sftx_trainable(spec) == theirs, patterns


def test_any_value_is_answered() -> None:
    """A run file may hold anything, also what its own tool would refuse."""
    anything: list[Any] = [None, True, -1, 0.0, 1e300, 10**30, "", "ä,b", "none", [], [None, [1]], ["a", {}], {}]
    anything += [{"a": None}, {"path": [1], "type": {}}, [{"path": {}, "type": []}], {"name": [], "min_lr": 1e-5}]
    anything += [{"zero_optimization": 3}, [[]], [{"data_files": {}, "split": [1]}]]
    for name, _, _ in RULES:
        for value in anything:
            for given in ({}, {"learning_rate": 0.0, "dataset_dir": ["a"], "report_to": {}, "template": [1]}):
                made = answer(name.replace("*", "x"), value, given)
                assert made is not None, name
                assert made.write or made.kind != "write" or value == {}, (name, value)


def test_names_of_datasets_are_looked_up_in_llama_factorys_list(tmp_path: Path) -> None:
    (tmp_path / "dataset_info.json").write_text(json.dumps({"a": {"file_name": "a.json"}, "b": {"hf_hub_url": "x/b"}}))
    made = answer("dataset", "a, b, c", {"dataset_dir": str(tmp_path), "max_samples": 5})
    assert made is not None
    assert [source["path"] for source in made.write["data.train"]] == [str(tmp_path / "a.json"), "x/b", "c"]
    assert [source["limit"] for source in made.write["data.train"]] == [5, 5, 5]


def test_what_is_not_carried_over_from_a_mapping_is_said() -> None:
    sources = answer("datasets", [{"path": "a", "type": "alpaca", "message_property_mappings": {}, "shards": 2}], {})
    adapter = answer("peft_config", {"name": "lora", "r": 4, "use_qalora": True}, {})
    assert sources is not None
    assert [text.partition(":")[0] for text in sources.lost] == ["shards"]
    assert adapter is not None
    assert [text.partition(":")[0] for text in adapter.lost] == ["use_qalora"]


def test_nothing_of_sftx_has_another_meaning_there() -> None:
    """An option of sftx's own, in its own section, is never asked about."""
    for name in ("learning_rate", "seed", "weight_decay"):
        read = validation.validate(SECTION_CLASSES["train"], {name: 1}, origins=run_file.Origins())
        assert getattr(read, name) == 1
