"""Loads a tokenizer, a model's modules without weights, and the model with its weights, by name or directory."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, cast

import torch
from safetensors import SafetensorError, safe_open
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
from transformers.models.auto.modeling_auto import MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES
from transformers.quantizers.auto import AutoQuantizationConfig
from transformers.utils import logging as transformers_logging
from transformers.utils.quantization_config import QuantizationConfigMixin

from sftx.atomic_files import sha256_of_file
from sftx.errors import ModelError, is_out_of_memory, one_line
from sftx.model.added_tokens import grow_embeddings
from sftx.model.generation import load_generation_config
from sftx.model.library_messages import passed_on
from sftx.model.names import check_config, local_directory, quantization_of, refuse_quantised
from sftx.model.quantised import (
    LoadQuantised,
    ReadQuantised,
    find_quantised,
    forget_reading,
    quantize_of,
    replace_quantised,
)
from sftx.phases import Phase, phase
from sftx.types import Adapter, ModelSpec

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

log = logging.getLogger(__name__)

_FLOATING: Final = {"F64": torch.float64, "F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
"""The dtypes of weights that can be trained, by their names in safetensors files."""

_JSON_FILES: Final = (
    "config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json",
    "added_tokens.json", "model.safetensors.index.json",
)  # fmt: skip
"""Files of a model that hold one JSON object each."""
_TOKENIZER_FILES: Final = ("tokenizer.json", "vocab*", "*.model", "*.tiktoken", "tokenization*.py")

_OF_QUANTISED: Final = (
    ".SCB", ".absmax", ".quant_map", ".qweight", ".qzeros", ".g_idx", ".weight_scale", ".weight_scale_inv",
    ".weight_packed", "_blocks", "_scales",
)  # fmt: skip
"""How the names of tensors end that bitsandbytes, GPTQ, AWQ, FP8, compressed-tensors and MXFP4 keep beside weights."""


@contextmanager
def _loading(name: str, part: str) -> Iterator[None]:
    """Turns any error of transformers into a ModelError of one line, and passes its warnings on."""
    try:
        with passed_on(f"model {name}"):
            yield
    except ModelError:
        raise
    except Exception as error:  # transformers, safetensors and tokenizers have no common base class
        if "trust_remote_code" in str(error):
            raise ModelError(
                f"model {name}: it brings Python code of its own, which is not run; read that code, and add "
                "--trust-remote-code to run it"
            ) from error
        what = f"KeyError: {one_line(error)}" if isinstance(error, KeyError) else one_line(error)  # else the key alone
        cause = _wrong_file(name, part) or f"cannot load its {part}: {what}"
        raise ModelError(f"model {name}: {cause}") from error


def _wrong_file(name: str, part: str) -> str | None:
    """Returns which file of a model is damaged or missing, which the libraries' errors do not say."""
    directory = local_directory(name)
    if directory is None:
        return None
    for file in filter(Path.is_file, map(directory.joinpath, _JSON_FILES)):
        try:
            if not isinstance(json.loads(file.read_bytes()), dict):
                return f"its {file.name} is no JSON object"
        except (OSError, ValueError, RecursionError) as error:
            return f"its {file.name} cannot be read: {one_line(error)}"
    if part == "tokenizer" and not any(any(directory.glob(pattern)) for pattern in _TOKENIZER_FILES):
        return "has no tokenizer.json; copy the tokenizer's files of the base model beside it"
    if part != "weights":
        return None
    for index in directory.glob("*.safetensors.index.json"):
        named = json.loads(index.read_bytes()).get("weight_map")
        names = set(map(str, named.values())) if isinstance(named, dict) else ()
        if missing := sorted(name for name in names if not (directory / name).is_file()):
            return f"its {missing[0]} is missing, which {index.name} names; copy it too"
    for file in sorted(directory.glob("*.safetensors")):
        try:
            with safe_open(file, framework="pt"):
                pass
        except (OSError, SafetensorError) as error:
            return f"its {file.name} is damaged, or was not copied to its end ({one_line(error)}); copy it again"
    return None


def load_tokenizer(name: str, *, trust_remote_code: bool = False) -> PreTrainedTokenizerBase:
    """Loads the tokenizer of a model, or that saved with an adapter, which has no config.json. Raises ModelError."""
    if not Path(name).is_dir() or (Path(name) / "config.json").exists():
        load_config(name, trust_remote_code=trust_remote_code)  # what is wrong with it is known before data are read
    with _loading(name, "tokenizer"):
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(name, trust_remote_code=trust_remote_code)
    return tokenizer


def load_config(name: str, *, trust_remote_code: bool = False) -> PretrainedConfig:
    """Loads the configuration. Raises ModelError, also when it is that of weights that are quantised in another way."""
    with _loading(name, "configuration"):
        config: PretrainedConfig = AutoConfig.from_pretrained(name, trust_remote_code=trust_remote_code)
        check_config(name, config.to_dict())
    return config


def load_spec(name: str, *, trust_remote_code: bool = False) -> ModelSpec:
    """Loads the configuration, and builds the model's modules on the meta device. Raises ModelError."""
    config = load_config(name, trust_remote_code=trust_remote_code)
    _check_architecture(name, config)
    with _loading(name, "configuration"), torch.device("meta"):
        skeleton = AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code)
    return ModelSpec(name, config, skeleton, trust_remote_code)


def _check_architecture(name: str, config: PretrainedConfig) -> None:
    """Raise ModelError when transformers has no causal language model for this configuration."""
    brings_code = "AutoModelForCausalLM" in (getattr(config, "auto_map", None) or {})
    if brings_code or type(config) in AutoModelForCausalLM._model_mapping:
        return
    architecture = next(iter(config.architectures or ()), type(config).__name__)
    others = sorted(part.removesuffix("_config") for part in type(config).sub_configs if "text" not in part)
    if config.model_type in MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES or {"vision", "audio"} & set(others):
        what = f"is multimodal ({', '.join(others) or 'images or audio beside text'})"
        todo = "sftx trains text models, and those multimodal ones whose language model transformers loads by itself"
    elif config.is_encoder_decoder:
        what, todo = "is an encoder-decoder", "sftx trains decoders"
    else:
        what, todo = "predicts no next token", "sftx trains causal language models"
    raise ModelError(f"model {name}: {architecture} {what}, and has no causal language model in transformers; {todo}")


def load_model(
    spec: ModelSpec, adapters: Sequence[Adapter], *, dtype: torch.dtype, device: torch.device
) -> PreTrainedModel:
    """Loads the model with its weights in `dtype` on `device`. Raises ModelError.

    Modules that an adapter quantises are quantised on the device one after the other, each when its weights are read.
    """
    config = load_config(spec.name, trust_remote_code=spec.trust_remote_code)
    stored = quantization_of(config.to_dict())
    if not stored:
        with _explains_out_of_memory(spec, dtype, torch.device("cpu")):
            for tensor, tensor_dtype in _stored_dtypes(spec.name):
                if tensor.endswith("weight") and tensor_dtype not in _FLOATING:
                    raise refuse_quantised(spec.name, f"its files hold {tensor} as {tensor_dtype}")
    options = _quantization_config(spec, adapters, stored, dtype, device)
    if isinstance(options, ReadQuantised):
        for part in (config, config.get_text_config()):  # else transformers would ask for bitsandbytes
            part.__dict__.pop("quantization_config", None)
    with (
        _loading(spec.name, "weights"),
        _explains_out_of_memory(spec, dtype, torch.device("cpu")),
        phase("loading", "weights", unit="tensors") as progress,
        _counted_tensors(progress),
    ):
        try:
            loaded: Any = AutoModelForCausalLM.from_pretrained(
                spec.name,
                config=config if isinstance(options, ReadQuantised) else None,
                dtype=dtype,
                generation_config=load_generation_config(spec.name),
                output_loading_info=True,
                ignore_mismatched_sizes=True,  # the error below names the first of them
                trust_remote_code=spec.trust_remote_code,
                quantization_config=options,
            )
        except Exception:
            # transformers would report a traceback of what happens while it converts tensors.
            if isinstance(options, LoadQuantised | ReadQuantised) and options.error is not None:
                raise options.error from None
            raise
    model, info = cast("tuple[PreTrainedModel, dict[str, Any]]", loaded)
    missing, mismatched = sorted(info["missing_keys"]), sorted(info["mismatched_keys"])
    if missing or mismatched:
        first = (
            missing[0] if missing else "{} is {}, expected {}".format(mismatched[0][0], *map(list, mismatched[0][1:]))
        )
        raise ModelError(
            f"model {spec.name}: {len(missing)} tensors are missing and {len(mismatched)} have another shape "
            f"(first: {first}); the files do not fit its config.json"
        )
    unexpected = sorted(info["unexpected_keys"])
    if quantised := [tensor for tensor in unexpected if tensor.endswith(_OF_QUANTISED)]:
        raise refuse_quantised(spec.name, f"its files hold {quantised[0]}")
    if unexpected:
        log.warning(
            "%s: %d tensors of its files are not in the model (first: %s)", spec.name, len(unexpected), unexpected[0]
        )
    grow_embeddings(model, spec.new_token_ids)
    # transformers gives the embedding row of `pad_token_id` no gradient, and often that token also occurs in the text,
    # as the end of a turn for example. Our padding is masked by length and needs no such row.
    cast(Any, model.get_input_embeddings()).padding_idx = None
    if isinstance(options, LoadQuantised | ReadQuantised) and device.type == "cpu":
        # What stays dense may be a view of its file, which would keep all of the file's pages in memory.
        for parameter in model.parameters():
            if parameter.is_floating_point():
                parameter.data = parameter.data.clone()
    if isinstance(options, ReadQuantised):
        forget_reading(model)
    if stored and not isinstance(options, ReadQuantised):  # its weights are dense now
        replace_quantised(model, quantize_of(adapters))
    with _explains_out_of_memory(spec, dtype, device):
        cast(torch.nn.Module, model).to(device)
    return model


def _quantization_config(
    spec: ModelSpec, adapters: Sequence[Adapter], stored: Mapping[str, Any], dtype: torch.dtype, device: torch.device
) -> QuantizationConfigMixin | None:
    """Returns how transformers is to read the weights: what it quantises or dequantises on the way."""
    quantize = quantize_of(adapters)
    is_quantising = bool(find_quantised(spec.skeleton, quantize))
    method = stored.get("quant_method")
    if method == "bitsandbytes":
        if not adapters:
            raise ModelError(
                f"model {spec.name}: bitsandbytes has quantised its layers, which cannot be trained themselves; train "
                "an adapter (--plugin lora), or take the original in bf16, fp16 or fp32"
            )
        if is_quantising:
            log.info("model %s: is quantised already; its layers are kept as they are", spec.name)
        return ReadQuantised(dtype, stored)
    if method in ("fp8", "mxfp4"):
        as_stored = {name: value for name, value in stored.items() if name != "key"}
        dense: QuantizationConfigMixin = AutoQuantizationConfig.from_dict({**as_stored, "dequantize": True})
        return dense
    return LoadQuantised(quantize, device) if is_quantising else None


@contextmanager
def _counted_tensors(progress: Phase) -> Iterator[None]:
    """Counts the tensors that transformers reads, over which it would draw a bar of its own."""

    def count(make: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if not args:  # a bar that is updated by hand
            return make(*args, **kwargs)
        progress.total = len(args[0])
        return progress.counted(args[0])

    previous = transformers_logging.set_tqdm_hook(count)
    try:
        yield
    finally:
        transformers_logging.set_tqdm_hook(previous)


@contextmanager
def _explains_out_of_memory(spec: ModelSpec, dtype: torch.dtype, device: torch.device) -> Iterator[None]:
    """Turns an out-of-memory error on `device` into a ModelError that gives the size of the weights."""
    try:
        yield
    except (RuntimeError, MemoryError, OSError) as error:
        if not is_out_of_memory(error):
            raise
        gibibytes = spec.skeleton.num_parameters() * dtype.itemsize / 2**30
        bf16 = " set --bf16, which halves a frozen base (--plugin lora), or" if dtype == torch.float32 else ""
        raise ModelError(
            f"model {spec.name}: {device} has not enough memory for its weights, {gibibytes:.1f} GiB in "
            f"{str(dtype).removeprefix('torch.')};{bf16} take a smaller model"
        ) from error


def stored_dtype(name: str, *, trust_remote_code: bool = False) -> torch.dtype:
    """Returns the dtype in which a model's weights are stored: that of its config.json, or of its first tensor."""
    dtype = getattr(load_config(name, trust_remote_code=trust_remote_code), "dtype", None)
    if isinstance(dtype, torch.dtype):
        return dtype
    found = (_FLOATING[stored] for _, stored in _stored_dtypes(name) if stored in _FLOATING)
    return next(found, torch.float32)


def _stored_dtypes(name: str) -> Iterator[tuple[str, str]]:
    """Yields the name and the dtype of each tensor in the model's safetensors files, as far as they are here."""
    directory = local_directory(name)
    for file in sorted(directory.glob("*.safetensors")) if directory is not None else ():
        try:
            with safe_open(file, framework="pt") as tensors:
                for tensor in tensors.keys():  # noqa: SIM118
                    yield tensor, tensors.get_slice(tensor).get_dtype()
        except (OSError, SafetensorError):
            return  # `load_model` says what is wrong with the file


def fingerprint(name: str) -> str | None:
    """Returns a SHA-256 over the names and contents of the weights and configuration of a model's, or an adapter's,
    directory; None for a hub id."""
    directory = Path(name)
    if not directory.is_dir():
        return None
    digest = hashlib.sha256()
    configurations = (directory / name for name in ("config.json", "adapter_config.json"))
    found = [*directory.glob("*.safetensors"), *directory.glob("*.bin"), *filter(Path.is_file, configurations)]
    for file in sorted(found):
        digest.update(file.name.encode())
        digest.update(bytes.fromhex(sha256_of_file(file)))
    return digest.hexdigest()
