"""Train with LLaMA-Factory as a settings file says, and write what each step took.

Its own interpreter runs this, since its releases need other versions of the libraries. The rows are given as its
tokenised data (`tokenized_path`), with the labels of all trainers.
"""

from __future__ import annotations

import importlib.machinery
import importlib.util
import json
import os
import sys
import types
from pathlib import Path
from typing import Any

settings = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))


def main() -> None:
    os.environ |= {"DISABLE_VERSION_CHECK": "1", "WANDB_DISABLED": "true", "CUDA_VISIBLE_DEVICES": ""}
    import torch
    from clock import Clock
    from datasets import Dataset, DatasetDict

    if importlib.util.find_spec("torchaudio") is None:  # LLaMA-Factory imports it for sounds, which no row has
        sys.modules["torchaudio"] = types.ModuleType("torchaudio")
        sys.modules["torchaudio"].__spec__ = importlib.machinery.ModuleSpec("torchaudio", None)
    from llamafactory.train.sft import workflow
    from llamafactory.train.tuner import run_exp

    torch.set_num_threads(settings["threads"])
    clock = Clock()
    batches: list[tuple[int, int]] = []

    class Counting(workflow.SFTDataCollatorWith4DAttentionMask):  # type: ignore[misc, valid-type]
        def __call__(self, features: Any) -> Any:
            batch = super().__call__(features)
            batches.append((int(batch["attention_mask"].bool().sum()), int((batch["labels"] != -100).sum())))
            return batch

    workflow.SFTDataCollatorWith4DAttentionMask = Counting
    lines = [json.loads(line) for line in Path(settings["data"]).read_text(encoding="utf-8").splitlines()]
    rows = [line | {"attention_mask": [1] * len(line["input_ids"])} for line in lines]
    tokenised = Path(settings["output_dir"]).with_suffix(".tokenised")
    DatasetDict({"train": Dataset.from_list(rows)}).save_to_disk(str(tokenised))
    is_bf16 = settings["dtype"] == "bfloat16"
    adapter = {"finetuning_type": "lora", "lora_rank": 16, "lora_alpha": 32, "lora_target": "all"}
    run_exp(
        {
            "stage": "sft",
            "do_train": True,
            "model_name_or_path": settings["model"],
            "template": "smollm2",
            "dataset": "rows",  # required, and not read beside tokenized_path
            "tokenized_path": str(tokenised),
            "cutoff_len": settings["max_length"],
            "output_dir": settings["output_dir"],
            "overwrite_output_dir": True,
            "per_device_train_batch_size": settings["rows"],
            "gradient_accumulation_steps": 1,
            "learning_rate": settings["learning_rate"],
            "lr_scheduler_type": "constant",
            "weight_decay": 0.0,
            "num_train_epochs": 1,
            "bf16": is_bf16,
            "disable_gradient_checkpointing": True,
            "logging_steps": 1,
            "logging_nan_inf_filter": False,
            "report_to": "none",
            "save_strategy": "no",
            "use_cpu": True,
            "seed": settings["seed"],
            **(adapter if settings["lora"] else {"finetuning_type": "full"}),
        },
        callbacks=[clock],
    )
    for step, (tokens, labels) in zip(clock.steps, batches, strict=False):
        step["tokens"], step["label_tokens"] = tokens, labels
    Path(settings["result"]).write_text(json.dumps(clock.steps), encoding="utf-8")


if __name__ == "__main__":
    main()
