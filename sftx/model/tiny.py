"""Creates a small tokenizer and a small model in a second, without a network, for checks and tests.

The tokenizer is a byte-level BPE trained on the embedded data; the model is a Llama of two layers with random weights.
"""

from __future__ import annotations

import atexit
import json
import shutil
import tempfile
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Final

from sftx.paths import DEMO_RUN_FILE

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

END_OF_TEXT, START, END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
_CHAT_TEMPLATE: Final = (
    "{% for message in messages %}"
    f"{{{{ '{START}' + message.role + '\\n' + message.content + '{END}\\n' }}}}"
    "{% endfor %}"
    f"{{% if add_generation_prompt %}}{{{{ '{START}assistant\\n' }}}}{{% endif %}}"
)
_VOCAB_SIZE: Final = 512
_NUM_EMBEDDINGS: Final = 640  # more than the vocabulary, so that a template's control tokens can be added
_MAX_LENGTH: Final = 1024


def make_tokenizer() -> PreTrainedTokenizerBase:
    """Returns a new tokenizer of 512 tokens: bytes, merges of them, and ChatML's control tokens."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=_VOCAB_SIZE,
        special_tokens=[END_OF_TEXT, START, END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    rows = (DEMO_RUN_FILE.parent / "held_out.jsonl").read_text(encoding="utf-8").splitlines()
    bpe.train_from_iterator((message["content"] for row in rows for message in json.loads(row)["messages"]), trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        bos_token=END_OF_TEXT,
        eos_token=END_OF_TEXT,
        pad_token=END_OF_TEXT,
        chat_template=_CHAT_TEMPLATE,
        model_max_length=_MAX_LENGTH,
    )


@lru_cache
def model_dir() -> Path:
    """Creates the model (tied embeddings, fp32) and its tokenizer in a directory that is deleted at exit."""
    import torch
    from safetensors.torch import save_file
    from transformers import LlamaConfig, LlamaForCausalLM

    directory = Path(tempfile.mkdtemp(prefix="sftx-tiny-"))
    atexit.register(shutil.rmtree, directory, ignore_errors=True)
    tokenizer = make_tokenizer()
    config = LlamaConfig(
        vocab_size=_NUM_EMBEDDINGS,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=_MAX_LENGTH,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)  # the CPU's generator only: random states of GPUs stay as they are
        model = LlamaForCausalLM(config)
    config.architectures = [type(model).__name__]
    # save_pretrained writes on rank 0 only; here every process has a directory of its own.
    config.to_json_file(directory / "config.json")
    model.generation_config.to_json_file(directory / "generation_config.json")
    save_file(dict(model.named_parameters()), directory / "model.safetensors", metadata={"format": "pt"})
    tokenizer.save_pretrained(directory)
    return directory
