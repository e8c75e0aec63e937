"""Teachers and rows for tests of distillation."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

WORDS = ["set", "the", "light", "in", "kitchen", "to", "blue", "play", "music", "at", "seven", "please", "wake", "me"]


def teacher_of(student: Path, directory: Path, *, num_rows: int = 648, **changes: Any) -> Path:
    """Save a Llama with the student's tokenizer of 512 tokens, another hidden size, and so many rows of its head."""
    tokenizer = AutoTokenizer.from_pretrained(student)
    torch.manual_seed(3)
    sizes = {"hidden_size": 48, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = LlamaConfig(vocab_size=num_rows, num_key_value_heads=2, **sizes | changes)
    model = LlamaForCausalLM(config)
    with torch.no_grad():
        model.get_output_embeddings().weight.mul_(20)
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return directory


def write_chats(path: Path, num: int, seed: int = 0) -> Path:
    """Write conversations of different lengths."""
    rng = random.Random(seed)
    rows = [
        {
            "prompt": " ".join(rng.choices(WORDS, k=rng.randint(1, 20))),
            "completion": " ".join(rng.choices(WORDS, k=rng.randint(1, 9))),
        }
        for _ in range(num)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path
