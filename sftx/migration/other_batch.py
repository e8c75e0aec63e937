"""Makes the first batch of another tool: a script for that tool's own interpreter, which does not import sftx.

`python other_batch.py REQUEST.json ANSWER.json`; the request has `tool`, `options` (as they were given to it), `model`
and `num_rows`. The answer has `documents`, a pair of token ids and of what is trained for each row of the batch, and
`version`.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import json
import os
import sys
import tempfile
from typing import Any

IGNORE = -100


def main(request_path: str, answer_path: str) -> None:
    with open(request_path, encoding="utf-8") as file:
        request = json.load(file)
    os.environ.update({"TOKENIZERS_PARALLELISM": "false", "DISABLE_VERSION_CHECK": "1", "WANDB_DISABLED": "true"})
    made = llama_factory(request) if request["tool"] == "llama-factory" else trl(request)
    with open(answer_path, "w", encoding="utf-8") as file:
        json.dump(made, file)


# --- TRL ------------------------------------------------------------------------------------------------


def trl(request: dict[str, Any]) -> dict[str, Any]:
    import dataclasses

    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    trl: Any = importlib.import_module("trl")
    accelerator: Any = importlib.import_module("accelerate").Accelerator
    accelerator.prepare_model = lambda _, model, **__: model  # the reference has no weights either
    options = dict(request["options"])
    stage = options.get("stage", "sft")
    if stage not in ("sft", "dpo", "kto"):
        raise SystemExit(f"batches of TRL's {stage} are not compared")
    config_class, trainer_class = {
        "sft": (trl.SFTConfig, trl.SFTTrainer),
        "dpo": (trl.DPOConfig, trl.DPOTrainer),
        "kto": (trl.KTOConfig, trl.KTOTrainer),
    }[stage]
    names = {field.name for field in dataclasses.fields(config_class) if field.init}
    renamed = {"max_seq_length": "max_length"}
    given = {renamed.get(name, name): value for name, value in options.items()}
    device = {"bf16", "fp16", "tf32", "torch_compile", "deepspeed", "fsdp", "fsdp_config", "use_liger_kernel", "optim"}
    taken = {name: value for name, value in given.items() if name in names - device}
    forced = {
        "report_to": "none", "use_cpu": True, "bf16": False, "gradient_checkpointing": False, "push_to_hub": False,
        "eval_strategy": "no", "precompute_ref_log_probs": False, "dataloader_num_workers": 0,
    }  # fmt: skip
    taken |= {name: value for name, value in forced.items() if name in names}
    rows = trl_rows(options, request["num_rows"])
    taken |= {"per_device_train_batch_size": len(rows), "output_dir": tempfile.mkdtemp()}
    if options.get("class") == "TrainingArguments":
        raise SystemExit("transformers' own Trainer is given tokens by its script; nothing to compare with")

    class OnlyData(trainer_class):  # type: ignore[misc, valid-type]
        """Makes batches, and never moves the model, which has no weights."""

        def _move_model_to_device(self, model: Any, device: Any) -> None:
            pass

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(request["model"]))
    extra = {}
    if stage in ("dpo", "kto"):
        with torch.device("meta"):
            extra["ref_model"] = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(request["model"]))
    trainer = OnlyData(
        model=model,
        args=config_class(**taken),
        train_dataset=rows,
        processing_class=AutoTokenizer.from_pretrained(request["model"]),
        **extra,
    )
    features = [trainer.train_dataset[at] for at in range(len(trainer.train_dataset))]
    batch = trainer.data_collator(features)
    return {"documents": documents(batch), "version": importlib.metadata.version("trl")}


def trl_rows(options: dict[str, Any], num_rows: int) -> Any:
    from datasets import concatenate_datasets, load_dataset

    split = options.get("dataset_train_split", "train")
    if isinstance(options.get("datasets"), list):
        entries = options["datasets"]
    else:
        entries = [{"path": options["dataset_name"], "name": options.get("dataset_config"), "split": split}]
    found = []
    for entry in entries:
        path, files = entry["path"], entry.get("data_files")
        if files is None and os.path.isfile(path):
            path, files = ("parquet" if path.endswith(".parquet") else "csv" if path.endswith(".csv") else "json"), path
        rows = load_dataset(path, entry.get("name"), data_files=files, split=entry.get("split", "train"))
        found.append(rows.select(range(min(num_rows, len(rows)))))
    return found[0] if len(found) == 1 else concatenate_datasets(found)


# --- LLaMA-Factory ------------------------------------------------------------------------------------


def llama_factory(request: dict[str, Any]) -> dict[str, Any]:
    import torch

    data: Any = importlib.import_module("llamafactory.data")
    get_train_args = importlib.import_module("llamafactory.hparams").get_train_args
    load_tokenizer = importlib.import_module("llamafactory.model").load_tokenizer

    # What concerns devices, trackers and weights says nothing about a batch, and may not be installed.
    dropped = {
        "deepspeed", "fsdp", "fsdp_config", "bf16", "fp16", "pure_bf16", "quantization_bit", "quantization_method",
        "use_kt", "flash_attn", "enable_liger_kernel", "use_unsloth", "resume_from_checkpoint", "optim",
        "preprocessing_num_workers", "dataloader_num_workers", "eval_dataset", "eval_strategy", "val_size", "use_v1",
    }  # fmt: skip
    options = {name: value for name, value in request["options"].items() if name not in dropped}
    options |= {"model_name_or_path": request["model"], "max_samples": request["num_rows"], "do_train": True}
    options |= {"report_to": "none", "output_dir": tempfile.mkdtemp(), "overwrite_cache": True, "use_cpu": True}
    model_args, data_args, training_args, finetuning_args, _ = get_train_args(options)
    training_args.remove_unused_columns = False
    module = load_tokenizer(model_args)
    template = data.get_template_and_fix_tokenizer(module["tokenizer"], data_args)
    stage = {"dpo": "rm"}.get(finetuning_args.stage, finetuning_args.stage)
    rows = data.get_dataset(template, model_args, data_args, training_args, stage=stage, **module)["train_dataset"]
    features = [rows[at] for at in range(len(rows))]
    common = {"template": template, "pad_to_multiple_of": 8, "label_pad_token_id": IGNORE, **module}
    if stage == "pt":
        from transformers import DataCollatorForLanguageModeling

        batch = DataCollatorForLanguageModeling(tokenizer=module["tokenizer"], mlm=False)(features)
    elif stage == "rm":
        batch = data.PairwiseDataCollatorWithPadding(**common)(features)
    elif stage == "kto":
        batch = data.KTODataCollatorWithPadding(**common)(features)
    elif stage == "sft":
        positions = [feature.get("position_ids") for feature in features]
        batch = data.SFTDataCollatorWith4DAttentionMask(
            **common, attn_implementation="eager", compute_dtype=torch.float32
        )(features)
        if data_args.packing:
            batch = {"input_ids": batch["input_ids"], "labels": batch["labels"], "position_ids": positions}
    else:
        raise SystemExit(f"batches of LLaMA-Factory's stage {stage} are not compared")
    return {"documents": documents(batch), "version": importlib.metadata.version("llamafactory")}


# --- batches --------------------------------------------------------------------------------------------


def documents(batch: Any) -> list[list[list[int]]]:
    """Return token ids and labels of each document of a batch: rows without their padding, packed ones taken apart."""
    ids = batch["input_ids"].tolist()
    if "labels" in batch:
        trained = [[int(label != IGNORE) for label in row] for row in batch["labels"].tolist()]
    else:
        trained = batch["completion_mask"].tolist()
    positions: Any = batch["position_ids"] if "position_ids" in batch else None  # noqa: SIM401 - a BatchEncoding
    positions = positions.tolist() if hasattr(positions, "tolist") else positions
    mask = batch["attention_mask"].tolist() if "attention_mask" in batch else None
    found = []
    for at, row in enumerate(ids):
        if positions is not None:
            places = positions[at]
            starts = [n for n, place in enumerate(places) if place == 0]
            ends = [*starts[1:], len(places)]
            found += [[row[a:b], trained[at][a:b]] for a, b in zip(starts, ends, strict=True) if b - a > 1]
            continue
        keep = range(len(row)) if mask is None else [n for n, there in enumerate(mask[at]) if there]
        found.append([[row[n] for n in keep], [trained[at][n] for n in keep]])
    return found


if __name__ == "__main__":
    main(*sys.argv[1:])
