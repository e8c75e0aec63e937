"""Writes what accompanies the weights of a model: configuration, generation settings and its own code.

All of it comes from the base model, and transformers refuses to write some of what it reads. `check` therefore writes
these files before the first step as they will be written at the end.
"""

from __future__ import annotations

import contextlib
import json
import logging
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers import PreTrainedConfig
from transformers.utils import IMAGE_PROCESSOR_NAME, PROCESSOR_NAME, SAFE_WEIGHTS_NAME, VIDEO_PROCESSOR_NAME
from transformers.utils.hub import cached_file
from transformers.utils.logging import disable_progress_bar, enable_progress_bar

from sftx.errors import ModelError, one_line
from sftx.model import saved_tokenizer
from sftx.model.load import load_tokenizer
from sftx.model.trained_parts import is_multimodal

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel

    from sftx.model.language_model import CausalLM

log = logging.getLogger(__name__)


def save_model(
    model: PreTrainedModel,
    directory: Path,
    state_dict: Mapping[str, Tensor] | None = None,
    *,
    dtype: torch.dtype | None = None,
    max_shard_size: str = "50GB",
) -> None:
    """Write a model's files. `state_dict` replaces its weights; `dtype` is that of its parameters, if another one."""
    with _without_progress_bars(), _saveable(model.config):
        tensors = None if state_dict is None else dict(state_dict)
        model.save_pretrained(directory, state_dict=tensors, max_shard_size=max_shard_size)
        if dtype is not None:  # save_pretrained has written the dtype of the parameters on the device
            model.config.dtype = str(dtype).removeprefix("torch.")
            model.config.save_pretrained(directory)


def save_without_weights(model: PreTrainedModel, directory: Path) -> None:
    """Write a model's files but its weights."""
    save_model(model, directory, {})
    (directory / SAFE_WEIGHTS_NAME).unlink(missing_ok=True)  # without a tensor


def copy_processor(model: PreTrainedModel, directory: Path) -> None:
    """Copy the files that AutoProcessor reads beside the tokenizer's, as far as a multimodal model has them."""
    for name in (PROCESSOR_NAME, IMAGE_PROCESSOR_NAME, VIDEO_PROCESSOR_NAME) if is_multimodal(model) else ():
        file = cached_file(
            str(model.name_or_path),
            name,
            _raise_exceptions_for_missing_entries=False,
            _raise_exceptions_for_connection_errors=False,
            _raise_exceptions_for_gated_repo=False,
        )
        if file is not None:
            shutil.copyfile(file, directory / name)


def check(lm: CausalLM, directory: Path, name: str, *, trust_remote_code: bool) -> None:
    """Write everything but weights into an empty directory. Raises ModelError for what cannot be written, and OSError.

    What is written otherwise than transformers would is logged. `name` is the model's.
    """
    if not lm.adapters:
        if left_out := [key for config in _configs(lm.model.config) for key in _unsaveable(config)]:
            log.warning("model %s: the config.json of the result has no %s: no JSON", name, ", ".join(left_out))
        with _explains(name, "config.json"):
            save_without_weights(lm.model, directory)
            copy_processor(lm.model, directory)
    with _explains(name, "tokenizer"):
        if (error := saved_tokenizer.save(lm.tokenizer, directory, lm.tokenizer_entries)) is None:
            return
        copied = load_tokenizer(str(directory), trust_remote_code=trust_remote_code)
        if copied.get_vocab() != lm.tokenizer.get_vocab():
            raise error
    reason = one_line(error, max_chars=150)
    log.warning("model %s: its tokenizer cannot be saved (%s); the result has a copy of its files", name, reason)


@contextlib.contextmanager
def _explains(name: str, part: str) -> Iterator[None]:
    try:
        yield
    except OSError:
        raise
    except Exception as error:  # whatever the model's own code raises
        raise ModelError(f"model {name}: its {part} cannot be saved: {one_line(error)}") from error


@contextlib.contextmanager
def _without_progress_bars() -> Iterator[None]:
    disable_progress_bar()
    try:
        yield
    finally:
        enable_progress_bar()


@contextlib.contextmanager
def _saveable(config: PreTrainedConfig) -> Iterator[None]:
    """Take out of a configuration what is no JSON: a model's own code may keep there what it likes."""
    taken = [(vars(part), {key: vars(part).pop(key) for key in _unsaveable(part)}) for part in _configs(config)]
    try:
        yield
    finally:
        for values, left_out in taken:
            values.update(left_out)


def _configs(config: PreTrainedConfig) -> list[Any]:
    """Return a configuration and those of the parts of its model."""
    parts = [getattr(config, name, None) for name in config.sub_configs]
    return [config, *(part for part in parts if part is not None)]


def _unsaveable(config: PreTrainedConfig) -> list[str]:
    """Return the attributes of a configuration that cannot be written as JSON."""
    return [key for key, value in vars(config).items() if key not in config.sub_configs and not _is_json(value)]


def _is_json(value: object) -> bool:
    def known(other: object) -> str:
        if isinstance(other, torch.dtype | PreTrainedConfig):
            return ""  # transformers writes these itself
        raise TypeError

    try:
        json.dumps(value, sort_keys=True, default=known)
    except (TypeError, ValueError):
        return False
    return True
