"""Builds trainers of a small Llama on rows of random tokens, without a run around them."""

from __future__ import annotations

from collections.abc import Sequence, Set
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoTokenizer, LlamaForCausalLM, PreTrainedTokenizerFast

from optimizing import optimizer_stage, schedule_stage
from sftx import Collator, Example, Step
from sftx.assembly.stages.data_stages import CollatorStage
from sftx.assembly.stages.loss_stage import LossStage
from sftx.config.options import TrainConfig
from sftx.data.sampler import PlannedStep
from sftx.model.generation import generate_greedy
from sftx.model.language_model import CausalLM
from sftx.model.load import load_model, load_spec
from sftx.trainer import precision
from sftx.trainer.trainer import MicroBatch, Trainer
from sftx_plugins.adapters.lora import Lora
from sftx_plugins.collators.packed import PackedRows
from sftx_plugins.collators.padded import Padded
from sftx_plugins.losses.masked_ce import MaskedCE

ROWS_PER_STEP = 4


def trainer_of(
    model: Path,
    *,
    packed: bool = False,
    lora: bool = True,
    dropout: float = 0.0,
    trainable: Set[str] | None = None,
    **options: Any,
) -> Trainer:
    """Builds a trainer with 2 rows per micro-batch. LoRA's B is random, not zero, so that no gradient is zero.

    `trainable`: without LoRA, the parameters that train; by default all.
    """
    config = TrainConfig(per_device_train_batch_size=2, use_cpu=True, **options)
    optimizer, spec = optimizer_stage(config), load_spec(str(model))
    chosen = precision.choose(config, bf16_weights=optimizer.bf16_weights)
    adapters = {"lora": Lora(r=4, lora_dropout=dropout).sftx_adapter(spec)} if lora else {}
    dtype = chosen.base_dtype(frozen=lora)
    loaded = load_model(spec, list(adapters.values()), dtype=dtype, device=chosen.device)
    lm = CausalLM(loaded, AutoTokenizer.from_pretrained(model))
    torch.manual_seed(1)
    lm.attach(adapters, trainable)
    for name, parameter in lm.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.02)
    collator: Collator = PackedRows(128, "bfd", "varlen") if packed else Padded()
    if packed:
        lm.attention_of(collator.collate(rows(2)))
    loss, stage = LossStage("the loss", MaskedCE()), CollatorStage("the collator", collator)
    return Trainer(lm, loss, stage, optimizer, schedule_stage(config, 10), config, chosen, 10)


def rows(count: int, seed: int = 0, longest: int = 40) -> list[Example]:
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(4, longest, (count,), generator=generator).tolist()
    return [
        Example(torch.randint(3, 200, (length,), generator=generator).tolist(), [True] * length, f"row {n}", n)
        for n, length in enumerate(lengths)
    ]


def planned(step: Step, examples: Sequence[Example]) -> PlannedStep:
    """Returns the step of these rows as a sampler plans it."""
    return PlannedStep(0.0, step, examples, np.array([len(example.token_ids) for example in examples], np.int64))


def denominator(batches: Sequence[MicroBatch]) -> float:
    """Returns the denominator of a step of these micro-batches in one process."""
    return sum(micro_batch.denominator for micro_batch in batches)


def batches_of(trainer: Trainer, seed: int = 0) -> list[MicroBatch]:
    """Returns the micro-batches of one step; a row has one example, or three when the collator packs."""
    per_row = 3 if isinstance(trainer.collator._collator, PackedRows) else 1
    step = [tuple(range(at, at + per_row)) for at in range(0, ROWS_PER_STEP * per_row, per_row)]
    return trainer.micro_batches(planned(tuple(step), rows(ROWS_PER_STEP * per_row, seed)))


def gradients(trainer: Trainer, batches: Sequence[MicroBatch]) -> dict[str, torch.Tensor]:
    """Computes the gradients of one step, by parameter name."""
    trainer.optimizer.zero_grad()
    trainer.accumulate(batches, denominator(batches), 0)
    return {name: p.grad.clone() for name, p in trainer.lm.named_parameters() if p.grad is not None}


def answers_in_order(lm: CausalLM, prompts: Sequence[Sequence[int]], **options: Any) -> list[list[int]]:
    """Generates the answers to all prompts, in the order of the prompts."""
    answers = dict(generate_greedy(lm, prompts, **options))
    return [answers[index] for index in range(len(prompts))]


def small_model(directory: Path, **shape: Any) -> Path:
    """Saves a random Llama with a vocabulary of 200 tokens, and a tokenizer of as many words."""
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
