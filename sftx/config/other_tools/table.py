"""Lists by topic what to write here for an option of TRL, transformers, PEFT, LLaMA-Factory or Axolotl.

What means something else in one tool than in the others is in tools.py.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

from sftx.config.other_tools.conversions import (
    ENGINE,
    FUNCTIONS,
    LORA_ONLY,
    OPTIMIZERS,
    adapter_options,
    adapters,
    all_tokens,
    answering_engine,
    base,
    beta,
    completion_length,
    dropout,
    dtype,
    eval_by_steps,
    loss_type,
    name_list,
    of_freeze,
    of_quantization,
    of_rollout,
    of_tracker,
    only_with,
    optimizer,
    options_within,
    packing_strategy,
    padded,
    pissa,
    precompute,
    rank,
    reward_functions,
    run_name,
    save_best,
    schedule,
    schedule_options,
    sequential,
    sharding,
    sharding_options,
    special_tokens,
    split_names,
    stage_cpo,
    stage_dpo,
    template,
    test_split,
    to_objective,
    tokenizer_template,
    trackers,
    unfrozen,
    whole_number,
)
from sftx.config.other_tools.datasets import dataset, named_dataset, of_source, source_list
from sftx.config.other_tools.rules import Row, leave_out, made, not_here, plugin, row, to, write

_QUANTIZED: Final = "a base in 4 or 8 bits is that of bitsandbytes: plugins.qlora"
_PREFERENCE: Final = "objectives are plugins: dpo, kto, orpo, simpo and others (docs/preference.md, docs/plugins.md)"
_EXPORT: Final = "`sftx merge` and `sftx export` write the result in other formats"
_NO_SUCH_INIT: Final = "A and B begin as true, gaussian, orthogonal, pissa, pissa_niter_N or olora"
_VISION: Final = "text models only"
_OTHER_TRACKER: Final = "trackers here are wandb, tensorboard and mlflow"
_UPLOAD: Final = "`sftx push` uploads the result when the run is over"

TABLE: Final[Mapping[str, tuple[Row, ...]]] = {
    "Model": (
        row(
            "model_name_or_path base_model model_id base_model_name_or_path pretrained_model_name_or_path",
            made(base, "model"),
        ),
        row("torch_dtype dtype infer_dtype compute_dtype", made(dtype, "train.bf16", "train.fp16")),
        row(
            "model_revision revision revision_of_model",
            ("main", leave_out()),
            not_here("download that revision, and name its directory as the model"),
        ),
        row(
            (
                "attn_implementation flash_attn flash_attention flash_attention_2 sdp_attention "
                "xformers_attention eager_attention flex_attention flex_attn_compile_kwargs "
                "sage_attention attention fused_attn_kernel sdpa_varlen flash_attn_cross_entropy "
                "flash_attn_fuse_mlp flash_attn_rms_norm large_head_attention flash_attn_d512 "
                "gemma4_hybrid_attn_impl experts_implementation"
            ),
            leave_out("attention is chosen by what the model and the device support"),
        ),
        row(
            (
                "use_liger_kernel enable_liger_kernel liger_kernel_config liger_* lora_mlp_kernel "
                "lora_qkv_kernel lora_o_kernel lora_embedding_kernel chunked_cross_entropy "
                "chunked_cross_entropy_num_chunks use_kernels use_v1_kernels kernel_config tiled_mlp "
                "tiled_mlp_num_shards tiled_mlp_use_original_mlp"
            ),
            leave_out("fused kernels are used where they are measured to be faster"),
        ),
        row(
            "axolotl.integrations.liger.* axolotl.integrations.cut_cross_entropy.* axolotl.integrations.kernels.*",
            leave_out("fused kernels are used where they are measured to be faster"),
        ),
        row("axolotl.*", not_here("it is a plugin of Axolotl; plugins of sftx have other hooks: docs/plugins.md")),
        row(
            (
                "low_cpu_mem_usage use_cache use_kv_cache use_fast_tokenizer tokenizer_use_fast "
                "tokenizer_type tokenizer_legacy model_type type_of_model model_class cls_model_config "
                "is_falcon_derived_model is_llama_derived_model is_mistral_derived_model "
                "is_qwen_derived_model device_map device max_memory gpu_memory_limit "
                "tokenizer_save_jinja_files experimental_skip_move_to_device mean_resizing_embeddings "
                "embeddings_skip_upcast upcast_layernorm upcast_lmhead_output print_param_status "
                "fix_untrained_tokens"
            ),
            leave_out(),
        ),
        row(
            "base_model_config tokenizer_config",
            leave_out("configuration and tokenizer are those of the model's directory"),
        ),
        row("tokenizer_name tokenizer_name_or_path", not_here("the tokenizer is that of the model's directory")),
        row("load_in_4bit", (True, plugin("qlora", why="lora on a base in four bits")), (False, leave_out())),
        row("load_in_8bit", (True, write({"plugins.qlora.load_in_8bit": True})), (False, leave_out())),
        row(
            "quantization_bit quant_bits",
            (4, plugin("qlora", why="lora on a base in four bits")),
            (8, write({"plugins.qlora.load_in_8bit": True})),
            not_here(_QUANTIZED),
        ),
        row(
            "quantization_method quant_method",
            ("bnb", leave_out()),
            ("bitsandbytes", leave_out()),
            not_here(_QUANTIZED),
        ),
        row(
            "double_quantization use_bnb_nested_quant bnb_4bit_use_double_quant",
            of_quantization("bnb_4bit_use_double_quant"),
        ),
        row("quantization_type bnb_4bit_quant_type", ("nf4", leave_out()), ("fp4", not_here("four bits here are nf4"))),
        row("bnb_4bit_*", leave_out("the base is dequantised to the precision that the run computes in")),
        row(
            (
                "bnb_* quantization_* "
                "quant_config quantization gptq model_quantization_config "
                "model_quantization_config_kwargs qlora_sharded_model_loading use_onebitllms qat "
                "quantize_moe_experts"
            ),
            (False, leave_out()),
            not_here(_QUANTIZED),
        ),
        row(
            (
                "model_init_kwargs overrides_of_model_config overrides_of_model_kwargs rope_scaling "
                "shift_attn s2_attention mixture_of_depths train_from_scratch reinit_weights "
                "block_diag_attn scaling_softmax* llama4_linearized_experts ple_cpu_offload "
                "layer_offloading tokenizer_use_mistral_common"
            ),
            not_here("the model is taken as its directory has it"),
        ),
        row("router_aux_loss_coef moe_aux_loss_coef", not_here("no auxiliary loss of the router is added")),
        row(
            "cache_dir hf_hub_token hub_token ms_hub_token om_hub_token hf_use_auth_token",
            not_here("set HF_HOME or HF_TOKEN in the environment"),
        ),
        row(
            "resize_vocab resize_token_embeddings_to_32x shrink_embeddings",
            (
                True,
                write({"add_tokens": True}, why="adds the control tokens of the template that the tokenizer lacks"),
            ),
        ),
        row(
            "add_special_tokens new_special_tokens_config init_special_tokens tokens added_tokens_overrides",
            write(
                {"add_tokens": True}, why="adds the control tokens of the template that the tokenizer lacks, no others"
            ),
        ),
        row("split_special_tokens", (False, leave_out()), leave_out("text of a row never becomes a control token")),
        row("eos_token", leave_out("the template names the token that stops, which is trained and saved")),
        row("pad_token", leave_out("padding is masked by its length, whatever its token")),
        row("special_tokens", made(special_tokens, "add_tokens")),
    ),
    "Data": (
        row("dataset train_dataset", dataset("data.train")),
        row("eval_dataset", dataset("data.eval")),
        row(
            "dataset_name dataset_path data_path train_file train_files",
            named_dataset("data.train"),
        ),
        row("validation_file eval_file val_files", to("data.eval")),
        row("datasets pretraining_dataset", source_list("data.train")),
        row("test_datasets", source_list("data.eval")),
        row("dataset_config", of_source("subset")),
        row("dataset_train_split", ("train", leave_out()), of_source("split")),
        row("dataset_test_split", made(test_split, "data.eval")),
        row("dataset_streaming", (True, write({"data.streaming": True})), (False, leave_out())),
        row("buffer_size streaming_multipack_buffer_size pretrain_multipack_buffer_size", to("data.plan_window")),
        row("dataset_dir media_dir", leave_out("data.train has the paths of the files")),
        row(
            "dataset_text_field text_column",
            ("text", leave_out()),
            of_source("columns", lambda value: {"text": value}),
        ),
        row("field_messages", of_source("columns", lambda value: {"messages": value})),
        row("max_samples", of_source("limit")),
        row(
            "val_size val_set_size test_split_size",
            (0, leave_out()),
            to("data.eval_fraction"),
        ),
        row(
            "mix_strategy",
            ("interleave_once", not_here("data.mix_strategy is concat, interleave_under or interleave_over")),
            to("data.mix_strategy"),
        ),
        row("interleave_probs", not_here("write a weight for each source of data.train: {path: ..., weight: 0.3}")),
        row(
            "max_length cutoff_len max_seq_length max_seq_len seq_len seq_length sequence_len "
            "model_max_length max_tokens",
            to("data.max_length"),
        ),
        row(
            "truncation_mode",
            ("keep_start", leave_out()),
            ("keep_end", write({"data.long_rows": "cut_oldest"}, why="removes the oldest turns")),
        ),
        row(
            "excess_length_strategy",
            ("drop", write({"data.long_rows": "drop"})),
            ("truncate", write({"data.long_rows": "cut_end"})),
            ("raise", write({"data.long_rows": "error"})),
        ),
        row("min_sample_len", to("data.filters.min_length")),
        row("dataset_exact_deduplication", (True, write({"data.filters.duplicates": "drop"})), (False, leave_out())),
        row(
            "packing sample_packing neat_packing",
            (False, leave_out()),
            ("bfd", plugin("packed")),
            ("wrapped", write({"plugins.packed.strategy": "wrapped"})),
            plugin("packed", why="documents of a packed row never attend to one another"),
        ),
        row("max_packed_sequence_len", to("plugins.packed.length")),
        row("packing_strategy", made(packing_strategy, "plugins.packed.strategy")),
        row("eval_packing eval_sample_packing", leave_out("rows are evaluated alike, packed or not")),
        row(
            (
                "sample_packing_* multipack_real_batches pretraining_sample_concatenation "
                "pretrain_multipack_attn batching_strategy curriculum_sampling"
            ),
            leave_out("plugins.packed chooses the rows that share one"),
        ),
        row(
            "padding_free batch_flattening",
            (True, padded("padding_free")),
            ("auto", leave_out()),
            (False, leave_out()),
        ),
        row("pad_to_multiple_of", ("auto", leave_out()), padded("pad_to_multiple_of")),
        row("pad_to_sequence_len", leave_out("rows are padded to the longest of a micro-batch")),
        row(
            "group_by_length",
            (True, leave_out("rows of similar length share a step by default")),
            (False, padded("group_by_length")),
        ),
        row(
            "train_sampling_strategy",
            (
                "random",
                made(
                    lambda _, given: padded("group_by_length").make(False, given),
                    "plugins.padded.group_by_length: false",
                ),
            ),
            ("group_by_length", leave_out("rows of similar length share a step by default")),
            ("sequential", made(sequential, why="kto estimates the distance to the reference over the whole step")),
            not_here("each epoch has another order, which follows from train.seed"),
        ),
        row(
            "completion_only_loss",
            (True, leave_out("only answers are trained")),
            (False, all_tokens("trains prompts too; leave it out to train answers only")),
        ),
        row(
            "assistant_only_loss",
            (True, leave_out("only answers are trained")),
            (
                False,
                all_tokens(
                    "where rows have messages, of which TRL trains every token; leave it out where they have prompt "
                    "and completion, of which TRL trains the completion"
                ),
            ),
        ),
        row(
            "train_on_inputs",
            (True, write({"data.train_on_prompt": True})),
            (False, leave_out("only answers are trained")),
        ),
        row("mask_history train_on_last_step_only", (True, write({"data.train_turns": "last"})), (False, leave_out())),
        row("roles_to_train", to("data.train_roles", name_list)),
        row(
            "train_on_eos train_on_eot",
            ("none", write({"data.train_turn_end": False})),
            leave_out("the end of each trained turn is trained"),
        ),
        row(
            "template chat_template",
            ("tokenizer_default", plugin("tokenizer")),
            (dict, not_here("write the name of a template as a plugin")),
            made(
                template,
                "plugins.<template>",
                "plugins.tokenizer",
                why="a plugin of the template's name, or else the tokenizer's own",
            ),
        ),
        row("chat_template_path", to("plugins.tokenizer.template")),
        row("chat_template_jinja", not_here("write it into a file and name that: plugins.tokenizer.template")),
        row(
            "chat_template_kwargs",
            tokenizer_template("template_kwargs", "a template that is a plugin has options of its own"),
        ),
        row(
            "enable_thinking preserve_thinking",
            (True, leave_out("reasoning in the rows is trained")),
            (False, tokenizer_template("enable_thinking", "plugins.qwen3.thinking says what becomes of reasoning")),
        ),
        row("eot_tokens tool_format", leave_out("the template says how turns end and tools are written")),
        row(
            "default_system default_system_message system_prompt",
            to("data.system", why="replaces the system messages of the rows, too"),
        ),
        row("dataset_num_proc preprocessing_num_workers dataset_processes", to("data.num_proc")),
        row(
            (
                "dataset_prepared_path dataset_kwargs overwrite_cache tokenized_path "
                "preprocessing_batch_size skip_prepare_dataset dataset_keep_in_memory "
                "num_dataset_shards_to_save data_shared_file_system is_preprocess preprocess_iterable "
                "total_num_tokens total_supervised_tokens sample_packing_eff_est max_prompt_len "
                "eval_sequence_len"
            ),
            leave_out("encoded rows are kept by a hash of what made them (data.cache)"),
        ),
        row("dataset_shard_num dataset_shard_idx", not_here("divide the files")),
        row(
            "shuffle_dataset shuffle_merged_datasets shuffle_before_merging_datasets",
            (True, leave_out("rows are shuffled anew in each epoch")),
            (False, leave_out("rows are shuffled anew in each epoch")),
        ),
        row(
            "disable_shuffling",
            (False, leave_out()),
            not_here("each epoch has another order, which follows from train.seed"),
        ),
        row(
            "remove_unused_columns label_names length_column_name ignore_pad_token_for_loss eval_num_beams",
            leave_out(),
        ),
        row(
            "dataloader_drop_last",
            (False, leave_out()),
            not_here("the last, smaller step of an epoch is trained too"),
        ),
        row("dataloader_* loader_*", leave_out("batches are made while the device computes")),
        row("push_dataset_to_hub", not_here("sftx data export writes the rows to a file")),
        row("use_pose pose_*", not_here("positions are those of the rows")),
        row(
            (
                "image_* crop_to_patches video_* audio_* use_audio_in_video freeze_mm_modules "
                "freeze_vision_tower freeze_multi_modal_projector freeze_language_model processor_type "
                "processor_kwargs role_boundaries"
            ),
            not_here(_VISION),
        ),
    ),
    "Adapters": (
        row("use_peft", (True, plugin("lora")), (False, leave_out())),
        row(
            "finetuning_type adapter peft_type",
            ("lora", plugin("lora")),
            ("full", plugin("full", why="without an adapter everything is trained anyway")),
            ("freeze", plugin("freeze")),
            ("qlora", plugin("qlora")),
            ("vera", plugin("vera")),
            not_here(LORA_ONLY),
        ),
        row("peft_config peft lora_config", made(adapter_options, "plugins.lora")),
        row("r lora_r rank", to("plugins.lora.r")),
        row(
            "lora_rank",
            made(
                rank,
                "plugins.lora.r",
                "plugins.lora.lora_alpha",
                why="LLaMA-Factory's lora_alpha is twice the rank where none is given",
            ),
        ),
        row("lora_alpha", to("plugins.lora.lora_alpha")),
        row(
            "lora_dropout",
            made(
                dropout,
                "plugins.lora.lora_dropout",
                why="except with dpo, kto, orpo and the like, unless "
                "disable_dropout is false: their trainers turn it off",
            ),
        ),
        row(
            "target_modules lora_target lora_target_modules",
            *((all_of, write({"plugins.lora.target_modules": "all-linear"})) for all_of in ("all", "all-linear")),
            to("plugins.lora.target_modules", split_names),
        ),
        row("lora_target_linear", (True, write({"plugins.lora.target_modules": "all-linear"})), (False, leave_out())),
        row("modules_to_save lora_modules_to_save additional_target", to("plugins.lora.modules_to_save", name_list)),
        row("loraplus_lr_ratio", to("plugins.lora.loraplus_lr_ratio")),
        row("loraplus_lr_embedding embedding_lr", to("train.embedding_learning_rate")),
        row("embedding_lr_scale lr_groups", not_here("train.embedding_learning_rate is a rate, not a factor")),
        row("task_type lora_task_type", ("CAUSAL_LM", leave_out()), not_here("causal language models only")),
        row("bias", ("none", leave_out()), to("plugins.lora.bias")),
        row(
            "init_lora_weights peft_init_lora_weights",
            (True, leave_out()),
            ("default", leave_out()),
            *((name, not_here(_NO_SUCH_INIT)) for name in ("eva", "loftq", "corda", "lora_ga", "mica", False)),
            to("plugins.lora.init_lora_weights"),
        ),
        row("use_rslora peft_use_rslora", (False, leave_out()), to("plugins.lora.use_rslora")),
        row("use_dora peft_use_dora", (False, leave_out()), to("plugins.lora.use_dora")),
        row("lora_bias", (False, leave_out()), to("plugins.lora.lora_bias")),
        row(
            "pissa_init",
            (False, leave_out()),
            made(
                pissa,
                "plugins.lora.init_lora_weights",
                why="with pissa_iter: -1 it is pissa, LLaMA-Factory's default is pissa_niter_16",
            ),
        ),
        row("pissa_iter", leave_out("belongs to pissa_init")),
        row("pissa_convert", leave_out("the base keeps its weights, and the saved adapter is a plain LoRA")),
        row("exclude_modules", to("plugins.lora.exclude_modules", split_names)),
        row("target_parameters lora_target_parameters", to("plugins.lora.target_parameters", name_list)),
        row(
            "layers_to_transform peft_layers_to_transform",
            to("plugins.lora.layers_to_transform", lambda value: value if isinstance(value, list) else [value]),
        ),
        row("layers_pattern peft_layers_pattern", to("plugins.lora.layers_pattern", name_list)),
        row("rank_pattern lora_rank_pattern", to("plugins.lora.rank_pattern")),
        row("alpha_pattern lora_alpha_pattern", to("plugins.lora.alpha_pattern")),
        row(
            "trainable_token_indices peft_trainable_token_indices",
            to("plugins.lora.trainable_token_indices"),
        ),
        row(
            (
                "inference_mode auto_mapping peft_version fan_in_fan_out lora_fan_in_fan_out "
                "runtime_config lora_on_cpu peft_autocast_adapter_dtype megatron_core "
                "ensure_weight_tying peft_ensure_weight_tying merge_lora"
            ),
            leave_out(),
        ),
        row(
            "adapter_name_or_path",
            made(
                adapters,
                "plugins.lora.init_from",
                "plugins.lora.base_adapters",
                why="the last of several trains on, those before it stay as they are",
            ),
        ),
        row("create_new_adapter", leave_out("belongs to adapter_name_or_path")),
        row("lora_model_dir", to("plugins.lora.init_from")),
        row("adapter_folder", (False, leave_out()), not_here("lora.init_from takes the whole path")),
        row(
            (
                "loftq_config loftq_bits megatron_config eva_config "
                "corda_config lora_ga_config velora_config alora_invocation_tokens use_qalora "
                "monteclora_config layer_replication peft_layer_replication "
                "use_bdlora arrow_config kasa_config "
                "bnb_config_kwargs merge_method relora relora_* jagged_* oft_* module_dropout"
            ),
            (False, leave_out()),
            not_here(LORA_ONLY),
        ),
        row(
            "unfrozen_parameters",
            made(
                unfrozen,
                "plugins.freeze.trainable_layers: 0",
                "plugins.freeze.extra_modules",
                why="regular expressions of names, without ranges of rows",
            ),
        ),
        row("freeze_trainable_layers", of_freeze("trainable_layers")),
        row("freeze_trainable_modules", ("all", leave_out()), of_freeze("trainable_modules", split_names)),
        row("freeze_extra_modules", of_freeze("extra_modules", name_list)),
        row(
            "use_llama_pro lisa_*",
            (False, leave_out()),
            not_here("LoRA, chosen layers (freeze), or everything trains"),
        ),
    ),
    "Steps, rates and optimizers": (
        row("num_epochs epochs", to("train.num_train_epochs")),
        row("max_steps", (-1, leave_out()), (0, leave_out()), to("train.max_steps")),
        row("micro_batch_size per_gpu_train_batch_size", to("train.per_device_train_batch_size")),
        row(
            "batch_size global_batch_size",
            to("train.train_batch_size", why="rows of an optimizer step, over all processes"),
        ),
        row("eval_batch_size per_gpu_eval_batch_size", to("train.per_device_eval_batch_size")),
        row(
            "auto_find_batch_size",
            (False, leave_out()),
            not_here("sftx plan estimates what fits; train_batch_size keeps the rows of a step"),
        ),
        row("lr", to("train.learning_rate")),
        row("warmup_ratio", (0, leave_out()), to("train.warmup_steps", why="a value below 1 is a share of all steps")),
        row("lr_scheduler_type lr_scheduler", made(schedule, "train.lr_scheduler_type")),
        row(
            "lr_scheduler_kwargs",
            made(schedule_options, "train.min_lr_ratio", "train.lr_decay_steps", "train.lr_power"),
        ),
        row("cosine_min_lr_ratio", to("train.min_lr_ratio")),
        row(
            "lr_quadratic_warmup cosine_constant_lr_ratio lr_div_factor",
            not_here("warm-up is linear, and a cosine begins at its end"),
        ),
        row("optim optimizer", made(optimizer, "train.optim")),
        row("use_muon", (True, write({"train.optim": "muon"})), (False, leave_out())),
        row(
            (
                "optim_args optim_target_modules torchdistx_path adam_beta3 adam_epsilon2 dion_* "
                "qgalore_* galore_* use_galore apollo_* use_apollo badam_* use_badam use_adam_mini "
                "flash_optimum"
            ),
            (False, leave_out()),
            not_here(OPTIMIZERS),
        ),
        row("label_smoothing_factor", (0, leave_out()), to("plugins.masked-ce.label_smoothing")),
        row("loss_type", made(loss_type, "plugins.dpo.loss_type", "plugins.dpo.rpo_alpha", "plugins.grpo.loss_type")),
        row("loss_weights", leave_out("belongs to loss_type")),
        row("qalora_group_size", leave_out("without use_qalora it has no effect")),
        row("asft_alpha eaft_alpha eaft_k", leave_out("without its loss it has no effect")),
        row(
            "use_dft_loss use_asft_loss use_eaft_loss use_eaft",
            (False, leave_out()),
            not_here("a loss is a plugin: docs/plugins.md"),
        ),
        row("neftune_noise_alpha noisy_embedding_alpha", not_here("no noise is added to embeddings")),
        row(
            "average_tokens_across_devices",
            (True, leave_out("each trained token of a step counts the same")),
            not_here("each trained token of a step counts the same, over all processes"),
        ),
        row("data_seed", not_here("order and dropout follow from one seed, train.seed")),
        row(
            "full_determinism",
            (False, leave_out()),
            not_here(
                "order, dropout and initialisation follow from train.seed; kernels of a GPU may not be deterministic"
            ),
        ),
        row("ignore_data_skip", (False, leave_out()), not_here("a resumed run goes on where it was in its data")),
        row("loss_watchdog_threshold loss_watchdog_patience", leave_out("a run stops at a loss that is not finite")),
    ),
    "Precision and memory": (
        row(
            "bf16 bfloat16",
            ("auto", leave_out("the default on a GPU that supports it")),
            ("full", write({"train.bf16": True})),
            to("train.bf16"),
        ),
        row("fp16 float16", ("auto", leave_out()), to("train.fp16")),
        row("float32", (True, write({"train.bf16": False})), (False, leave_out())),
        row("tf32", ("auto", leave_out()), to("train.tf32")),
        row(
            "pure_bf16",
            (
                True,
                write(
                    {"train.bf16": True},
                    why="trained weights stay in fp32; train.optim: adamw_bf16 keeps them in bfloat16",
                ),
            ),
            (False, leave_out()),
        ),
        row(
            (
                "bf16_full_eval fp16_full_eval fp16_opt_level half_precision_backend fp16_backend "
                "fp32_norms fp32_norm_classes"
            ),
            leave_out("evaluation and norms have the precision of training"),
        ),
        row("fp8 fp8_* activation_dtype weight_dtype", (False, leave_out()), not_here("bfloat16, float16 and fp32")),
        row(
            "gradient_checkpointing",
            ("true", write({"train.gradient_checkpointing": True})),
            (str, write({"train.gradient_checkpointing": True})),
            to("train.gradient_checkpointing"),
        ),
        row(
            "activation_checkpointing",
            (True, write({"train.gradient_checkpointing": True})),
            (False, leave_out()),
            write({"train.gradient_checkpointing": True}),
        ),
        row(
            "disable_gradient_checkpointing",
            (True, leave_out()),
            (False, write({"train.gradient_checkpointing": True}, why="LLaMA-Factory's default")),
        ),
        row(
            "use_reentrant_gc gradient_checkpointing_kwargs activation_checkpointing_kwargs",
            leave_out("layers are recomputed without reentrant autograd"),
        ),
        row(
            "activation_offloading use_unsloth_gc",
            (False, leave_out()),
            write({"train.gradient_checkpointing": True}, why="layers are recomputed, not moved to the host"),
        ),
        row(
            "use_unsloth use_kt kt_* use_mca use_hyper_parallel hyper_parallel_args",
            (False, leave_out()),
            not_here("kernels here are sftx's own"),
        ),
        row(
            "torch_compile_backend torch_compile_mode torch_compile_options deepcompile",
            ("inductor", leave_out()),
            not_here("train.torch_compile compiles the decoder layers with inductor"),
        ),
        row("torch_empty_cache_steps gc_steps gc_collect_steps", leave_out()),
        row("no_cuda", (True, write({"train.use_cpu": True})), (False, leave_out())),
        row("use_mps_device", (False, leave_out()), not_here("a run on a Mac computes on the CPU")),
    ),
    "Evaluation and generation": (
        row(
            "eval_strategy evaluation_strategy",
            ("no", leave_out()),
            (False, leave_out()),
            ("steps", made(eval_by_steps, "train.eval_steps")),
            ("epoch", not_here("train.eval_steps takes a number of steps")),
            ("best", not_here("train.eval_steps takes a number of steps")),
        ),
        row("eval_steps", *whole_number("train.eval_steps")),
        row("evals_per_epoch", not_here("give train.eval_steps the steps of an epoch divided by it")),
        row("eval_delay", not_here("evaluation begins before the first step")),
        row(
            (
                "eval_on_start eval_do_concat_batches eval_use_gather_object eval_accumulation_steps "
                "include_for_metrics batch_eval_metrics prediction_loss_only do_eval "
                "include_inputs_for_metrics compute_accuracy eval_on_each_dataset eval_table_size"
            ),
            leave_out("held-out rows are evaluated before the first step, every train.eval_steps, and at the end"),
        ),
        row("metric_for_best_model", to("train.metric_for_best_model")),
        row("early_stopping_steps", to("train.early_stopping_patience")),
        row(
            "predict_with_generate do_predict",
            (True, write({"plugins.rouge": {}, "plugins.bleu": {}}, why="a metric has the held-out rows answered")),
            (False, leave_out()),
        ),
        row(
            "do_causal_lm_eval eval_causal_lm_metrics do_bench_eval bench_dataset bench_split",
            (False, leave_out()),
            not_here("metrics here are exact-match, rouge, bleu and json-valid, or plugins of your own"),
        ),
        row("generate_samples", leave_out("generation.num_samples answers are shown before and after")),
        row("num_generation_samples", to("generation.num_samples")),
        row("generation_max_new_tokens eval_max_new_tokens generation_max_length", to("generation.max_new_tokens")),
        row(
            "do_sample generation_do_sample",
            leave_out("answers are greedy, so that they can be compared"),
        ),
        row(
            (
                "num_beams repetition_penalty length_penalty skip_special_tokens "
                "generation_temperature generation_top_p generation_top_k generation_prompt_ratio "
                "generation_num_beams generation_config"
            ),
            leave_out("answers are greedy"),
        ),
        row(
            "task_dir lang n_shot save_dir download_mode",
            not_here("the plugin lm-eval runs benchmarks, and `sftx evaluate` after training (docs/answering.md)"),
        ),
    ),
    "Logging": (
        row("report_to", made(trackers, "plugins.wandb", "plugins.tensorboard", "plugins.mlflow")),
        row(
            "run_name mlflow_run_name wandb_name wandb_run_name",
            made(run_name, "plugins.wandb.name", "plugins.mlflow.run_name"),
        ),
        row("use_wandb", (True, plugin("wandb")), (False, leave_out())),
        row("wandb_project", to("plugins.wandb.project")),
        row("wandb_entity", to("plugins.wandb.entity")),
        row("wandb_mode", to("plugins.wandb.mode")),
        row("wandb_watch wandb_log_model wandb_run_id", not_here("W&B gets the metrics and the options of a run")),
        row("use_mlflow", (True, plugin("mlflow")), (False, leave_out())),
        row("mlflow_tracking_uri", to("plugins.mlflow.tracking_uri")),
        row("mlflow_experiment_name", to("plugins.mlflow.experiment")),
        row("use_tensorboard", (True, plugin("tensorboard")), (False, leave_out())),
        row("logging_dir", of_tracker("tensorboard", "log_dir")),
        row(
            (
                "hf_mlflow_log_artifacts use_comet comet_* use_trackio trackio_* use_swanlab swanlab_* "
                "use_otel_metrics otel_*"
            ),
            (False, leave_out()),
            not_here(_OTHER_TRACKER),
        ),
        row("project", ("huggingface", leave_out()), of_tracker("wandb", "project")),
        row("logging_steps", *whole_number("train.logging_steps")),
        row(
            "logging_strategy",
            ("steps", leave_out()),
            ("no", leave_out()),
            not_here("train.logging_steps takes a number of steps"),
        ),
        row(
            (
                "logging_first_step log_on_each_node logging_nan_inf_filter "
                "include_num_input_tokens_seen include_tokens_per_second include_tkps "
                "include_effective_tokens_per_second log_level log_level_replica disable_tqdm "
                "skip_memory_metrics plot_loss debug verbosity"
            ),
            leave_out("metrics.jsonl has every step, report.html the curves"),
        ),
        row(
            "profiler_steps profiler_steps_start enable_torch_profiler profiler_* profile_modules",
            (False, leave_out()),
            not_here("use torch's profiler on a step of your own"),
        ),
    ),
    "Saving and resuming": (
        row(
            "save_strategy",
            ("steps", leave_out()),
            ("no", leave_out("a checkpoint is saved every 30 minutes, and the result at the end")),
            ("best", made(save_best, "train.metric_for_best_model: loss")),
            not_here("train.save_steps takes a number of steps"),
        ),
        row("save_steps", *whole_number("train.save_steps")),
        row(
            "saves_per_epoch save_first_step",
            (False, leave_out()),
            not_here("checkpoints are saved every 30 minutes, or every train.save_steps"),
        ),
        row("save_total_limit", (0, leave_out()), to("train.save_total_limit")),
        row(
            (
                "save_only_model save_on_each_node save_safetensors enable_jit_checkpoint "
                "dynamic_checkpoint restore_callback_states_from_checkpoint"
            ),
            leave_out("a checkpoint holds safetensors and all that a resumed run needs"),
        ),
        row(
            "overwrite_output_dir",
            (False, leave_out()),
            leave_out("a run directory is never written over: choose one that does not exist"),
        ),
        row(
            "resume_from_checkpoint auto_resume_from_checkpoints",
            (False, leave_out()),
            not_here("resume with the same command and --resume"),
        ),
        row("hub_strategy hub_revision hub_always_push hub_private_repo", leave_out()),
        row("push_to_hub hub_*", (False, leave_out()), not_here(_UPLOAD)),
        row("export_*", not_here(_EXPORT)),
    ),
    "Several processes": (
        row(
            "fsdp deepspeed use_fsdp",
            (False, leave_out()),
            made(
                sharding,
                "train.distributed: fsdp2",
                "train.fsdp_offload",
                why="shards of every layer, with sftx run --nproc N",
            ),
        ),
        row("fsdp_config dist_config", made(sharding_options, "train.fsdp_offload")),
        row(
            "fsdp_version fsdp_final_state_dict_type fsdp_min_num_params fsdp_transformer_layer_cls_to_wrap",
            leave_out("train.distributed: fsdp2 needs no options of its own"),
        ),
        row(
            "ddp ddp_* local_rank world_size tpu_* ray_scope past_index mp_parameters",
            leave_out("sftx run --nproc N, or torchrun, starts the processes"),
        ),
        row(
            (
                "accelerator_config parallelism_config sequence_parallel_degree context_parallel_size "
                "tensor_parallel_size dp_shard_size dp_replicate_size heads_k_stride ring_attn_func "
                "use_ray ray_* resources_per_worker master_addr master_port"
            ),
            (1, leave_out()),
            not_here("processes share the rows (ddp), or the shards of every layer too (fsdp2)"),
        ),
        row("num_processes num_machines", not_here("sftx run --nproc N; docs/distributed.md for several hosts")),
    ),
    "Rewards and PPO": (
        row("num_ppo_epochs ppo_epochs", only_with("ppo", to("plugins.ppo.num_ppo_epochs"))),
        row("num_mini_batches ppo_buffer_size", only_with("ppo", to("plugins.ppo.steps_per_rollout"))),
        row("whiten_rewards ppo_whiten_rewards", only_with("ppo", to("plugins.ppo.whiten_rewards"))),
        row(
            "ppo_score_norm",
            (False, leave_out()),
            not_here("scores stay as they are; advantages are whitened (plugins.ppo.whiten_advantages)"),
        ),
        row("kl_coef init_kl_coef", only_with("ppo", to("plugins.ppo.kl_coef"))),
        row("kl_estimator", only_with("ppo", to("plugins.ppo.kl_estimator"))),
        row("ppo_target", only_with("ppo", to("plugins.ppo.kl_target"))),
        row(
            "adap_kl_ctrl",
            (False, leave_out("kl_coef stays as it is by default")),
            only_with("ppo", write({"plugins.ppo.kl_target": 6.0}, why="TRL's default target")),
        ),
        *(
            row(name, only_with("ppo", to(f"plugins.ppo.{name}")))
            for name in ("cliprange", "cliprange_value", "vf_coef", "gamma", "lam", "missing_eos_penalty")
        ),
        row("response_length", only_with("ppo", to("plugins.ppo.response_length"))),
        row("stop_token stop_token_id", leave_out("an answer ends at the stop token of the template")),
        row("total_episodes", not_here("set train.max_steps: the episodes divided by the prompts of a step")),
        row("local_rollout_forward_batch_size", to("train.per_device_eval_batch_size")),
        row("num_sample_generations", leave_out("rollouts.jsonl of the run has every answer")),
        row("sft_model_path", to("model")),
        row(
            "reward_model_path reward_model_name_or_path reward_model",
            only_with("ppo grpo", to("plugins.reward-model.model")),
        ),
        row(
            "reward_model_type",
            ("full", leave_out()),
            not_here("plugins.reward-model.model is a whole model; merge the adapter into its base"),
        ),
        row("reward_funcs", made(reward_functions, "plugins.reward-function.function", why=FUNCTIONS)),
        row(
            "reward_weights",
            not_here("plugins.grpo.reward_weights or plugins.ppo.reward_weights: a mapping by the names of plugins"),
        ),
    ),
    "The rest": (
        row(
            "stage rl rlhf_type",
            ("sft", leave_out()),
            ("pt", leave_out("rows with a text are trained as they are")),
            ("dpo", made(stage_dpo, "plugins.dpo", why="or the plugin that pref_loss names; docs/preference.md")),
            ("ipo", write({"plugins.dpo.loss_type": "ipo"})),
            ("kto", plugin("kto")),
            ("orpo", plugin("orpo")),
            ("simpo", plugin("simpo")),
            ("ppo", plugin("ppo", why="with a reward, such as plugins.reward-model.model")),
            ("grpo", plugin("grpo", why="with a reward, such as plugins.reward-function")),
            ("gkd", plugin("distill", why="it learns on the rows, as with lmbda 0")),
            ("cpo", made(stage_cpo, "plugins.simpo", why="where loss_type is simpo")),
            ("rm", not_here("a reward model is trained elsewhere; plugins.reward-model.model reads it")),
            not_here(_PREFERENCE),
        ),
        row(
            "pref_loss",
            *((name, only_with("dpo", write({"plugins.dpo.loss_type": name}))) for name in ("sigmoid", "hinge", "ipo")),
            ("kto_pair", only_with("kto", plugin("kto", why="it takes pairs too"))),
            *((name, only_with(name, plugin(name))) for name in ("orpo", "simpo")),
            not_here(_PREFERENCE),
        ),
        row("pref_beta rl_beta", to_objective("beta")),
        row(
            "beta",
            made(beta, "plugins.dpo.beta", why="with a teacher `plugins.distill.divergence`: 0 is forward, 1 reverse"),
        ),
        row("teacher_model_name_or_path teacher_model", to("plugins.distill.teacher")),
        row("kd_temperature", to("plugins.distill.temperature")),
        row(
            "lmbda",
            (0, leave_out("the student learns on the rows")),
            not_here("distill trains on the rows, as with lmbda 0; `sftx generate` answers their prompts first"),
        ),
        row(
            "seq_kd",
            (False, leave_out()),
            not_here("let the teacher answer the prompts (`sftx generate`), and train on its answers"),
        ),
        row("pref_ftx rpo_alpha", (0, leave_out()), to_objective("rpo_alpha")),
        row("ld_alpha", to_objective("ld_alpha")),
        row("label_smoothing dpo_label_smoothing", (0, leave_out()), to_objective("label_smoothing")),
        row(
            "kto_chosen_weight kto_desirable_weight desirable_weight",
            only_with("kto", to("plugins.kto.desirable_weight")),
        ),
        row(
            "kto_rejected_weight kto_undesirable_weight undesirable_weight",
            only_with("kto", to("plugins.kto.undesirable_weight")),
        ),
        row("orpo_alpha", only_with("orpo", to("plugins.orpo.beta"))),
        row("simpo_gamma", only_with("simpo", to("plugins.simpo.gamma"))),
        row("cpo_alpha", (0, leave_out()), only_with("simpo", to("plugins.simpo.cpo_alpha"))),
        row("ref_model", to_objective("reference_model")),
        row(
            "precompute_ref_log_probs",
            (True, made(precompute, "plugins.dpo.reference: precompute")),
            (False, leave_out()),
        ),
        row("trl", made(options_within, "plugins.grpo")),
        *(
            row(name, of_rollout(name, "answers that are only looked at are greedy"))
            for name in ("temperature", "top_p", "top_k", "min_p")
        ),
        row("num_generations", of_rollout("num_generations", "")),
        row(
            "max_completion_length",
            made(completion_length, "plugins.grpo.max_completion_length"),
        ),
        row("max_prompt_length", not_here("data.max_length bounds prompt and answer together")),
        *(
            row(name, only_with("grpo", to(f"plugins.grpo.{name}")))
            for name in (
                "epsilon",
                "epsilon_high",
                "delta",
                "importance_sampling_level",
                "scale_rewards",
                "num_iterations",
                "mask_truncated_completions",
                "steps_per_generation",
                "use_bias_correction_kl",
            )
        ),
        row("generation_batch_size", not_here("a rollout has the rows of a step; plugins.grpo.steps_per_generation")),
        row(
            "cast_lm_head_to_fp32 disable_dropout ds3_gather_for_generation cache_implementation log_completions "
            "log_multimodal num_completions_to_print log_unique_prompts num_generations_eval "
            "use_transformers_continuous_batching transformers_continuous_batching_config use_transformers_paged "
            "precompute_ref_batch_size sapo_* vespo_* entropy_* ref_model_mixup_alpha ref_model_sync_steps "
            "f_alpha_divergence_coef discopop_tau",
            leave_out(),
        ),
        row("multi_objective_aggregation", ("sum_then_normalize", leave_out()), not_here("rewards are added up")),
        row("f_divergence_type", ("reverse_kl", leave_out()), not_here("dpo measures the reverse KL")),
        row(
            "sync_ref_model use_weighting reference_free use_adaptive_entropy log_completions_hub_repo "
            "off_policy_mask_threshold normalize_advantages reward_clip_range generation_kwargs "
            "max_tool_calling_iterations",
            (False, leave_out()),
            not_here(_PREFERENCE),
        ),
        row("top_entropy_quantile", (1, leave_out()), not_here("every token of an answer is trained")),
        row("do_train", (True, leave_out()), not_here("sftx run trains; sftx doctor and sftx plan look at a run only")),
        row("config", not_here("name the run file alone: sftx run FILE")),
        row("env", not_here("set environment variables before the command")),
        row(
            "strict ignore_bias_buffers axolotl_config_path sample_backend infer_backend offload_folder plugins_dir",
            leave_out(),
        ),
        row(
            (
                "pref_* dpo_* kto_* simpo_* ppo_* cpo_* orpo_* ref_model_* "
                "reward_model* process_reward_model center_rewards_coefficient num_labels ebft"
            ),
            (False, leave_out()),
            not_here(_PREFERENCE),
        ),
        row("trainer_cls", not_here("a plugin changes what a stage does: docs/plugins.md")),
        row(
            "vllm* sglang_* use_vllm",
            made(answering_engine),
        ),
        row("gradio_*", not_here(ENGINE)),
        row("task", ("sft", leave_out()), not_here(_PREFERENCE)),
    ),
}
