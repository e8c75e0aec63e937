"""Chooses how a model answers: by its own generation settings, as transformers does, unless options say otherwise."""

from __future__ import annotations

from typing import Any, Final

from transformers import GenerationConfig

from sftx.model.decoding import Sampling

DEFAULT_MAX_NEW_TOKENS: Final = 512


def sampling_of(config: GenerationConfig, **chosen: Any) -> Sampling:
    """Return the model's own settings with those that are `chosen`; None stands for the model's own.

    A model that does not ask for sampling answers greedily, unless a temperature is chosen. Raises ConfigError.
    """

    def own(name: str, neutral: Any) -> Any:
        value = getattr(config, name, None)
        return neutral if value is None else value

    chosen = {name: value for name, value in chosen.items() if value is not None}
    does_sample = bool(own("do_sample", False)) or bool(chosen.get("temperature"))
    settings: dict[str, Any] = {
        "max_new_tokens": own("max_new_tokens", DEFAULT_MAX_NEW_TOKENS),
        "repetition_penalty": own("repetition_penalty", 1.0),
    }
    if does_sample:
        settings |= {
            "temperature": own("temperature", 1.0),
            "top_k": own("top_k", 0),
            "top_p": own("top_p", 1.0),
            "min_p": own("min_p", 0.0),
        }
    return Sampling(**(settings | chosen))
