"""Train with TRL's SFTTrainer as a settings file says, and write what each step took."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

settings = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))


def main() -> None:
    import torch
    from clock import Clock
    from datasets import load_dataset
    from peft import LoraConfig
    from trl import SFTConfig, SFTTrainer

    torch.set_num_threads(settings["threads"])
    clock = Clock()
    batches: list[tuple[int, int]] = []

    trainer = SFTTrainer(
        model=settings["model"],
        train_dataset=load_dataset("json", data_files=settings["data"], split="train"),
        args=SFTConfig(
            output_dir=settings["output_dir"],
            per_device_train_batch_size=settings["rows"],
            max_length=settings["max_length"],
            packing=settings["packed"],
            bf16=settings["dtype"] == "bfloat16",
            learning_rate=settings["learning_rate"],
            lr_scheduler_type="constant",
            weight_decay=0.0,
            max_grad_norm=1.0,
            num_train_epochs=1,
            gradient_checkpointing=False,
            model_init_kwargs={"dtype": settings["dtype"] if settings["lora"] else "float32"},
            logging_steps=1,
            logging_nan_inf_filter=False,
            report_to="none",
            save_strategy="no",
            use_cpu=True,
            seed=settings["seed"],
        ),
        peft_config=LoraConfig(r=16, lora_alpha=32, target_modules="all-linear") if settings["lora"] else None,
        callbacks=[clock],
    )
    collate = trainer.data_collator

    def counting(examples: list[Any]) -> Any:
        batch = collate(examples)
        mask = batch.get("attention_mask")
        real = batch["input_ids"].numel() if mask is None else int(mask.sum())
        batches.append((real, int((batch["labels"] != -100).sum())))
        return batch

    trainer.data_collator = counting
    trainer.train()
    for step, (tokens, labels) in zip(clock.steps, batches, strict=False):
        step["tokens"], step["label_tokens"] = tokens, labels
    Path(settings["result"]).write_text(json.dumps(clock.steps), encoding="utf-8")


if __name__ == "__main__":
    main()
