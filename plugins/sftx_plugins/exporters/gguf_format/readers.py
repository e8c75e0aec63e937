"""Reads a GGUF file back, to compare it with the run: llama.cpp where it is installed, else transformers."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import io
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stderr
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import torch
from transformers.utils.chat_template_utils import render_jinja_template

from sftx import ConfigError, ExportedModel
from sftx_plugins.exporters.gguf_format import vocabulary
from sftx_plugins.exporters.gguf_format.llama_cpp_log import quiet

if TYPE_CHECKING:
    from torch import Tensor

_STOPS: Final = tuple(f"tokenizer.ggml.{name}_token_id" for name in ("eos", "eot", "eom"))


def read(file: Path) -> ExportedModel:
    """Return the model of a file. Raises ConfigError where transformers alone cannot read it."""
    return LlamaCppReader(file) if importlib.util.find_spec("llama_cpp") else TransformersGgufReader(file)


class LlamaCppReader:
    """llama.cpp: it loads, tokenises and computes; the template of the file is rendered by Jinja."""

    def __init__(self, file: Path) -> None:
        from llama_cpp import Llama

        self._file = file
        with quiet():
            self._vocabulary = Llama(str(file), vocab_only=True, verbose=False)
        self._model: Any = None

    @property
    def reader(self) -> str:
        return f"llama.cpp through llama-cpp-python {importlib.metadata.version('llama-cpp-python')}"

    @cached_property
    def stop_ids(self) -> frozenset[int]:
        import llama_cpp

        vocab = self._vocabulary._model.vocab
        return frozenset(n for n in range(self._vocabulary.n_vocab()) if llama_cpp.llama_vocab_is_eog(vocab, n))

    def encode(self, text: str) -> list[int]:
        tokens: list[int] = self._vocabulary.tokenize(text.encode(), add_bos=True, special=True)
        return tokens

    def prompt(self, messages: Sequence[Mapping[str, Any]], tools: Sequence[Mapping[str, Any]]) -> list[int]:
        metadata = self._vocabulary.metadata
        bos, eos = (self._text(f"tokenizer.ggml.{name}_token_id") for name in ("bos", "eos"))
        rendered: Any = render_jinja_template(
            [[dict(message) for message in messages]],
            tools=[dict(tool) for tool in tools] or None,
            chat_template=metadata["tokenizer.chat_template"],
            add_generation_prompt=True,
            bos_token=bos,
            eos_token=eos,
        )
        text: str = rendered[0][0]
        # As llama.cpp's server does: where the file asks for bos, the one of the template is not written twice.
        return self.encode(text.removeprefix(bos) if metadata["tokenizer.ggml.add_bos_token"] == "true" else text)

    def logits(self, token_ids: Sequence[int]) -> Tensor:
        from llama_cpp import GGML_TYPE_F32, Llama

        if self._model is None or self._model.n_ctx() < len(token_ids):
            self._model = None  # makes room for the larger one
            size = -(-len(token_ids) // 256) * 256
            sizes: Any = dict.fromkeys(("n_ctx", "n_batch", "n_ubatch"), size)
            exact: Any = dict.fromkeys(("type_k", "type_v"), GGML_TYPE_F32)  # of the cache, which is fp16 by default
            with quiet():
                self._model = Llama(str(self._file), **sizes, **exact, n_gpu_layers=0, logits_all=True, verbose=False)
        self._model.reset()
        self._model.eval(list(token_ids))
        return torch.from_numpy(self._model.scores[: len(token_ids)].copy())

    def _text(self, key: str) -> str:
        import llama_cpp

        number = self._vocabulary.metadata.get(key)
        if number is None:
            return ""
        text: bytes = llama_cpp.llama_vocab_get_text(self._vocabulary._model.vocab, int(number))
        return text.decode()


class TransformersGgufReader:
    """transformers' reader of GGUF files, which is given what it leaves out of a file.

    It takes defaults for some options of a configuration, and splits text as GPT-2 does under names of pre-tokenizers
    that it does not know.
    """

    def __init__(self, file: Path) -> None:
        from transformers import AutoTokenizer

        self._file = file
        with _advice():
            from transformers.integrations.gguf.reader import read_gguf_metadata  # which older versions lack

            self._metadata, self._tensors = read_gguf_metadata(str(file))
            self._tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
        backend = self._tokenizer.backend_tokenizer
        self._tokenizer._tokenizer = _split_as_the_file_says(backend, self._metadata)

    @property
    def reader(self) -> str:
        return f"the GGUF reader of transformers {importlib.metadata.version('transformers')}"

    @property
    def stop_ids(self) -> frozenset[int]:
        return frozenset(self._metadata[key] for key in _STOPS if key in self._metadata)

    def encode(self, text: str) -> list[int]:
        ids: list[int] = self._tokenizer(text).input_ids
        return ids

    def prompt(self, messages: Sequence[Mapping[str, Any]], tools: Sequence[Mapping[str, Any]]) -> list[int]:
        text = self._tokenizer.apply_chat_template(
            [dict(message) for message in messages],
            tools=[dict(tool) for tool in tools] or None,
            tokenize=False,
            add_generation_prompt=True,
        )
        ids: list[int] = self._tokenizer(text, add_special_tokens=False).input_ids
        return ids

    @torch.no_grad()
    def logits(self, token_ids: Sequence[int]) -> Tensor:
        logits_TV: Tensor = self._model(torch.tensor([list(token_ids)]), use_cache=False).logits[0]
        return logits_TV

    @cached_property
    def _model(self) -> Any:
        from transformers import AutoConfig, AutoModelForCausalLM
        from transformers.utils.quantization_config import GgufConfig

        place: dict[str, Any] = {"pretrained_model_name_or_path": self._file.parent, "gguf_file": self._file.name}
        with _advice():
            config = AutoConfig.from_pretrained(**place)
            _complete(config, self._metadata, self._tensors, self._factors)
            model: Any
            info: Any
            model, info = AutoModelForCausalLM.from_pretrained(  # type: ignore[misc]
                **place,
                config=config,
                dtype=torch.float32,
                quantization_config=GgufConfig(dequantize=True),
                output_loading_info=True,
            )
            if unread := info["missing_keys"] or info["mismatched_keys"]:
                raise ConfigError(f"it does not read {sorted(map(str, unread))[0]}")
        if (factors := self._factors.get("rope_freqs.weight")) is not None:
            model.get_decoder().rotary_emb.inv_freq /= factors
        return model.eval()

    @cached_property
    def _factors(self) -> dict[str, Tensor]:
        """By which numbers the frequencies of rotary positions are divided."""
        from transformers.integrations.gguf.reader import GgufHeader, load_gguf_state_dict

        tensors = load_gguf_state_dict(GgufHeader.from_file(str(self._file)))
        return {name: tensor[...] for name, tensor in tensors.items() if name.startswith("rope_")}


@contextmanager
def _advice() -> Iterator[None]:
    """Says what to do where transformers cannot read a file, and hides its bars. Raises ConfigError."""
    try:
        with redirect_stderr(io.StringIO()):  # the bar of its reader asks for no setting
            yield
    except Exception as error:  # transformers and tokenizers have no common base class
        raise ConfigError(
            f"the export cannot be read back by transformers: {' '.join(str(error).split())[:200]}; llama.cpp reads it "
            "once it is installed, pip install 'sftx[llama-cpp]'; --no-verify leaves it unread"
        ) from error


_OPTIONS: Final = {
    "context_length": "n_positions",
    "attention.key_length": "head_dim",
    "attention.sliding_window": "sliding_window",
    "attn_logit_softcapping": "attn_logit_softcapping",
    "final_logit_softcapping": "final_logit_softcapping",
    "expert_feed_forward_length": "moe_intermediate_size",
    "expert_shared_feed_forward_length": "shared_expert_intermediate_size",
}
"""Keys of a file, and the options of a configuration that transformers does not read from them."""
_BIASES: Final = {"attention_bias": "blk.0.attn_output.bias", "mlp_bias": "blk.0.ffn_down.bias"}


def _complete(config: Any, metadata: Mapping[str, Any], tensors: Sequence[str], factors: Mapping[str, Tensor]) -> None:
    """Set the options of a configuration that transformers does not read from the file."""
    prefix = f"{metadata['general.architecture']}."
    own = {key.removeprefix(prefix): value for key, value in metadata.items() if key.startswith(prefix)}
    for key, option in _OPTIONS.items():
        if key in own and hasattr(config, option):
            setattr(config, option, own[key])
    for option, tensor in _BIASES.items():
        if hasattr(config, option):
            setattr(config, option, tensor in tensors)
    if hasattr(config, "query_pre_attn_scalar"):  # Gemma's; llama.cpp takes it from the number of layers too
        is_27b = (prefix, config.num_hidden_layers) in (("gemma2.", 46), ("gemma3.", 62))
        config.query_pre_attn_scalar = config.hidden_size // config.num_attention_heads if is_27b else config.head_dim
    if "rope.freq_base" in own:
        rope = {"rope_type": own.get("rope.scaling.type", "default"), "rope_theta": own["rope.freq_base"]}
        size = own["attention.key_length"]
        if own["rope.dimension_count"] != size:
            rope["partial_rotary_factor"] = own["rope.dimension_count"] / size
        for key, name in _SCALING.items():
            if f"rope.scaling.{key}" in own:
                rope[name] = own[f"rope.scaling.{key}"]
        for length in ("long", "short"):
            if (values := factors.get(f"rope_factors_{length}.weight")) is not None:
                rope[f"{length}_factor"] = values.tolist()
        if "rope.freq_base_swa" in own:
            windowed = {"rope_type": "default", "rope_theta": own["rope.freq_base_swa"]}
            config.rope_parameters = {"full_attention": rope, "sliding_attention": windowed}
        else:
            config.rope_parameters = rope


_SCALING: Final = {
    "factor": "factor",
    "original_context_length": "original_max_position_embeddings",
    "attn_factor": "attention_factor",
    "yarn_beta_fast": "beta_fast",
    "yarn_beta_slow": "beta_slow",
}
"""Keys of scaled rotary positions below `rope.scaling.`, and what transformers calls them."""


def _split_as_the_file_says(backend: Any, metadata: Mapping[str, Any]) -> Any:
    """Return a tokenizer that splits text as llama.cpp does for this file."""
    from tokenizers import Tokenizer, normalizers

    if metadata["tokenizer.ggml.model"] == "gpt2":
        split = vocabulary.pre_tokenizer(metadata["tokenizer.ggml.pre"])
        if split is not None:
            backend.pre_tokenizer = split
    else:
        spaces = normalizers.Replace(" ", "▁")
        prefixed = normalizers.Sequence([normalizers.Prepend("▁"), spaces])
        backend.normalizer = prefixed if metadata["tokenizer.ggml.add_space_prefix"] else spaces
        backend.pre_tokenizer = None
    if not vocabulary.PHI_3.search(metadata.get("general.name", "")):
        return backend
    state = json.loads(backend.to_str())
    kept = (metadata.get("tokenizer.ggml.bos_token_id"), metadata.get("tokenizer.ggml.unknown_token_id"))
    for token in state["added_tokens"]:
        token["rstrip"] = token["id"] not in kept and token["content"] != "<|endoftext|>"
    return Tokenizer.from_str(json.dumps(state))
