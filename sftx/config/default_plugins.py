"""The built-in plugins that sftx names: the defaults of each hook, and the templates that an error suggests."""

from __future__ import annotations

import re
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

SOURCES: Final = ("sqlite",)
"""The built-in source plugins, each named after its scheme. One is added when a path of the data has its scheme."""

SCHEME: Final = re.compile("[a-z][a-z0-9+-]+")  # a single letter is a drive of Windows
"""The part of a path before the colon that names a source plugin."""
RESERVED_SCHEMES: Final = ("sftx", "file", "http", "https", "hf", "s3", "gs", "gcs", "az", "abfs", "memory")
"""Schemes that no plugin may claim: `sftx:` is files of the package, the others are stores that sftx itself reads."""

TEMPLATES: Final = ("chatml", "qwen3", "qwen2.5", "llama3", "gemma3", "gemma", "phi", "deepseek3", "mistral", "llama2")
"""Templates that are tried on the tokenizer of a run without a template, so that the error can name those that fit."""
