"""Trainers of a small Llama on rows of random tokens, without a run around them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoTokenizer, LlamaForCausalLM, PreTrainedTokenizerFast

from sftx import Collator, Example, Step
from sftx.assembly.stages import CollatorStage, LossStage
from sftx.config.options import TrainConfig
from sftx.data.sampler import PlannedStep
from sftx.model.language_model import LanguageModel
from sftx.model.load import load_model, load_spec
from sftx.trainer import precision
from sftx.trainer.trainer import MicroBatch, Trainer
from sftx_plugins.adapters.lora import Lora
from sftx_plugins.collators.packed import PackedRows
from sftx_plugins.collators.padded import Padded
from sftx_plugins.losses.masked_ce import MaskedCE

ROWS_PER_STEP = 4


def trainer_of(
    model: Path, *, packed: bool = False, lora: bool = True, dropout: float = 0.0, **options: Any
) -> Trainer:
    """Two rows a micro-batch. LoRA's B is random, not zero, so that every gradient is something."""
    config = TrainConfig(per_device_train_batch_size=2, use_cpu=True, **options)
    numbers, spec = precision.choose(config), load_spec(str(model))
    adapters = {"lora": Lora(r=4, lora_dropout=dropout).sftx_adapter(spec)} if lora else {}
    dtype = numbers.base_dtype(frozen=lora)
    loaded = load_model(spec, list(adapters.values()), dtype=dtype, device=numbers.device)
    lm = LanguageModel(loaded, AutoTokenizer.from_pretrained(model))
    torch.manual_seed(1)
    lm.attach(adapters)
    for name, parameter in lm.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.02)
    collator: Collator = PackedRows(128, "bfd", "varlen") if packed else Padded()
    if packed:
        lm.attention_of(collator.collate(rows(2)))
    loss, stage = LossStage("the loss", MaskedCE()), CollatorStage("the collator", collator)
    return Trainer(lm, loss, stage, config, numbers, 10)


def rows(count: int, seed: int = 0, longest: int = 40) -> list[Example]:
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(4, longest, (count,), generator=generator).tolist()
    return [
        Example(torch.randint(3, 200, (length,), generator=generator).tolist(), [True] * length, f"row {n}", n)
        for n, length in enumerate(lengths)
    ]


def planned(step: Step, examples: Sequence[Example]) -> PlannedStep:
    """A step of these rows as a sampler gives it."""
    return PlannedStep(0.0, step, examples, np.array([len(example.token_ids) for example in examples], np.int64))


def denominator(batches: Sequence[MicroBatch]) -> float:
    """That of a step of these micro-batches, in one process."""
    return sum(one.denominator for one in batches)


def batches_of(trainer: Trainer, seed: int = 0) -> list[MicroBatch]:
    """Those of one step: rows of one example, or of several where the collator packs."""
    each = 3 if isinstance(trainer.collator._collator, PackedRows) else 1
    step = [tuple(range(at, at + each)) for at in range(0, ROWS_PER_STEP * each, each)]
    return trainer.micro_batches(planned(tuple(step), rows(ROWS_PER_STEP * each, seed)))


def gradients(trainer: Trainer, batches: Sequence[MicroBatch]) -> dict[str, torch.Tensor]:
    """Of one step, by the parameters' names."""
    trainer.optimizer.zero_grad()
    trainer.accumulate(batches, denominator(batches), 0)
    return {name: p.grad.clone() for name, p in trainer.lm.named_parameters() if p.grad is not None}


def small_model(directory: Path, **shape: Any) -> Path:
    """A random Llama of 200 tokens, with a tokenizer of as many words."""
    from tokenizers import Tokenizer, models
    from transformers import LlamaConfig

    vocabulary = {f"w{n}": n for n in range(200)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="w0"))
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="w2", pad_token="w1").save_pretrained(directory)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 2}
    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=200, num_key_value_heads=1, eos_token_id=2, **sizes | shape)
    LlamaForCausalLM(config).save_pretrained(directory)
    return directory
