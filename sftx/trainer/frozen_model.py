"""Another model beside that of the run, which is never trained: a teacher, or a reference."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from torch._subclasses.fake_tensor import FakeTensor
from transformers import AutoModelForCausalLM

from sftx.assembly.peft_config import PEFT_CONFIG
from sftx.checkpoint import layout
from sftx.checkpoint.load_run import load_run
from sftx.checkpoint.remote_runs import local_copy
from sftx.errors import ModelError, counted
from sftx.model import load, names
from sftx.model.language_model import CausalLM
from sftx.phases import phase
from sftx.stores import is_address
from sftx.trainer.self_checks import check_packed_probe

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from sftx.types import LanguageModel


def load_model(name: str, *, like: LanguageModel, trust_remote_code: bool = False) -> LanguageModel:
    """Load a frozen model beside `like`: a teacher, or a reference, that a loss compares with.

    `name`: what `--model` takes (a directory or a hub id), or the directory of a run, whose adapters it then has. The
    model is in eval mode, none of its parameters requires a gradient, and it is on the device and in the compute dtype
    of `like` (within a loss: that of the run). Every process has all of it, also where the run's model is sharded.
    What a loss precomputes with it is cached by the content of its files.

    Raises ModelError, also when its tokenizer gives a token of the run another id: the batches of the run would mean
    something else to it.
    """
    other_of: Any = like
    dtype = _compute_dtype(other_of)
    if isinstance(other_of.head_weight, FakeTensor):
        return cast("LanguageModel", _without_weights(name, other_of, dtype, trust_remote_code=trust_remote_code))
    with phase("loading", f"the model {name}"):
        directory = local_copy(name) if is_address(name) else Path(name).expanduser()
        is_run = directory.is_dir() and (layout.run_of(directory) or (directory / PEFT_CONFIG).exists())
        if is_run:
            loaded = load_run(directory, device=like.device, dtype=dtype, trust_remote_code=trust_remote_code)
            lm, files = loaded.lm, [str(loaded.directory), *([loaded.base_model] if loaded.lm.adapters else [])]
        else:
            names.check(name, needs_weights=True)
            files = [names.resolve(name)]
            spec = load.load_spec(files[0], trust_remote_code=trust_remote_code)
            tokenizer = load.load_tokenizer(files[0], trust_remote_code=trust_remote_code)
            lm = CausalLM(load.load_model(spec, [], dtype=dtype, device=like.device), tokenizer)
        _check_tokenizer(name, lm, like.tokenizer)
        lm.requires_grad_(False)
        lm.eval()
        with torch.no_grad():
            lm.check()
            check_packed_probe(lm)
    other_of.other_models |= {file: load.fingerprint(file) for file in files}
    return cast("LanguageModel", lm)


def _compute_dtype(lm: CausalLM) -> torch.dtype:
    """Return the dtype of matrix products where this is called."""
    device = lm.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else lm.head_weight.dtype


def _without_weights(name: str, like: CausalLM, dtype: torch.dtype, *, trust_remote_code: bool) -> CausalLM:
    """Return the model as fake tensors, for a memory plan: only its config.json is read."""
    config = load.load_config(names.resolve(name), trust_remote_code=trust_remote_code)
    model = AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code, dtype=dtype)
    return CausalLM(model, like.tokenizer).requires_grad_(False).eval()


def _check_tokenizer(name: str, lm: CausalLM, expected: PreTrainedTokenizerBase) -> None:
    """Raise ModelError unless every token of the run has the same id in the other model, and a row there."""
    theirs, num_rows = lm.tokenizer.get_vocab(), cast(Any, lm.model.get_input_embeddings()).weight.shape[0]
    ours = expected.get_vocab()
    different = [token for token, token_id in ours.items() if theirs.get(token) != token_id or token_id >= num_rows]
    if different:
        first = min(different, key=ours.__getitem__)
        other = f"{theirs[first]}" if first in theirs else "unknown"
        raise ModelError(
            f"model {name}: its tokenizer gives other ids than that of the run: {counted(len(different), 'token')}, "
            f"such as {first!r}, which is {ours[first]} in the run and {other} there; take a model with the same "
            "tokenizer"
        )
