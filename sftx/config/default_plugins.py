"""The built-in plugins that sftx names: the defaults of each hook, and the templates that an error suggests."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

ENTRY_POINTS: Final = "sftx.plugins"
"""The group of entry points under which plugins are installed."""

DEFAULT_PLUGINS: Final[Mapping[str, tuple[str, ...]]] = {
    "sftx_parser": ("messages", "prompt-completion", "alpaca", "sharegpt", "hh-rlhf", "tokens", "text"),
    "sftx_collator": ("padded",),
    "sftx_loss": ("masked-ce",),
    "sftx_observer": ("progress", "jsonl"),
}
"""The plugins, by hook, of a run that names none for it. Where a hook takes many, they follow those that are named."""

TEMPLATES: Final = ("chatml", "qwen3", "qwen2.5", "llama3", "gemma3", "gemma", "phi", "deepseek3", "mistral", "llama2")
"""Templates that are tried on the tokenizer of a run without a template, so that the error can name those that fit."""
