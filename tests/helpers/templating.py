"""Real tokenizers with their own chat templates, and the built-in templates for them."""

from __future__ import annotations

import copy
import dataclasses
import importlib.util
from collections.abc import Iterable, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import pytest
from tokenizers import AddedToken
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from sftx import Conversation, Message, Segment, ToolCall
from sftx.assembly.stages.stage import make
from sftx.data.encoder import Encoder
from sftx.testing.kit import built_in

ASSETS = Path(__file__).parents[2] / ".assets"
TOOLS = (
    {
        "type": "function",
        "function": {
            "name": "weather",
            "description": "The weather of a city, 天气.",
            "parameters": {
                "type": "object",
                "properties": {"city": {"type": "string"}, "days": {"type": "integer", "default": 1}},
                "required": ["city"],
            },
        },
    },
)


def chat(*turns: tuple[str, str] | Message, tools: Sequence[Mapping[str, Any]] = ()) -> Conversation:
    return Conversation(tuple(t if isinstance(t, Message) else Message(*t) for t in turns), tools=tuple(tools))


@lru_cache
def tokenizer_of(name: str) -> PreTrainedTokenizerBase:
    directory = ASSETS / "tokenizers" / name
    if not (directory / "tokenizer.json").is_file():
        pytest.fail(f"{directory} is missing; run `make assets`")
    return PreTrainedTokenizerFast.from_pretrained(directory)


def tokenizer_with(name: str, tokens: Iterable[str], *, rstrip: bool = False) -> PreTrainedTokenizerBase:
    """Return a copy of a real tokenizer with added control tokens."""
    tokenizer = PreTrainedTokenizerFast.from_pretrained(ASSETS / "tokenizers" / name)
    tokenizer.add_tokens([AddedToken(token, rstrip=rstrip, special=True) for token in tokens])
    return tokenizer


def own_template(name: str) -> str:
    """Return the chat template of a model."""
    path = ASSETS / "chat_templates" / f"{name}.jinja"
    if not path.is_file():
        pytest.fail(f"{path} is missing; run `make assets`")
    return path.read_text(encoding="utf-8")


def training_template(name: str) -> str:
    """Return TRL's variant of a chat template, which marks the trained text."""
    spec = importlib.util.find_spec("trl")
    assert spec is not None
    assert spec.origin is not None
    return (Path(spec.origin).parent / "chat_templates" / f"{name}_training.jinja").read_text(encoding="utf-8")


@lru_cache
def template_of(name: str, tokenizer: str | PreTrainedTokenizerBase, **options: Any) -> Any:
    loaded = tokenizer_of(tokenizer) if isinstance(tokenizer, str) else tokenizer
    return make(built_in(name, **options), "sftx_template", tokenizer=loaded)


def encoder_of(name: str, tokenizer: str, **options: Any) -> Encoder:
    """Return an encoder. Templates with the same control tokens share its tokenizer, which takes a second to build."""
    template = template_of(name, tokenizer, **options)
    key = tokenizer, template.controls, template.stop
    if key not in _ENCODERS:
        _ENCODERS[key] = Encoder(tokenizer_of(tokenizer), template)
    encoder = copy.copy(_ENCODERS[key])
    encoder.template = template
    return encoder


_ENCODERS: dict[Any, Encoder] = {}


def as_dicts(conversation: Conversation) -> list[dict[str, Any]]:
    """Return the messages as `apply_chat_template` takes them."""
    dicts = []
    for message in conversation.messages:
        as_dict: dict[str, Any] = {"role": message.role, "content": message.content}
        if message.reasoning:
            as_dict["reasoning_content"] = message.reasoning
        if message.tool_calls:
            as_dict["tool_calls"] = [
                {"type": "function", "function": {"name": call.name, "arguments": dict(call.arguments)}}
                | ({"id": call.id} if call.id else {})
                for call in message.tool_calls
            ]
        if message.tool_call_id:
            as_dict["tool_call_id"] = message.tool_call_id
        dicts.append(as_dict)
    return dicts


def _apply(tokenizer: str | PreTrainedTokenizerBase, chat: Conversation | list[Any], **options: Any) -> Any:
    loaded = tokenizer_of(tokenizer) if isinstance(tokenizer, str) else tokenizer
    tools = [dict(tool) for tool in chat.tools] if isinstance(chat, Conversation) else []
    messages = as_dicts(chat) if isinstance(chat, Conversation) else chat
    return loaded.apply_chat_template(messages, tools=tools or None, **options)


def own_ids(tokenizer: str | PreTrainedTokenizerBase, chat: Conversation | list[Any], **options: Any) -> list[int]:
    """Return the token ids of the tokenizer's own chat template."""
    return list(_apply(tokenizer, chat, return_dict=False, **options))


def own_text(tokenizer: str | PreTrainedTokenizerBase, chat: Conversation | list[Any], **options: Any) -> str:
    return str(_apply(tokenizer, chat, tokenize=False, **options))


def trl_mask(
    tokenizer: str | PreTrainedTokenizerBase, chat: Conversation, training: str, **options: Any
) -> tuple[list[int], list[bool]]:
    """Return the token ids and the mask of TRL's training template."""
    encoded = _apply(
        tokenizer,
        chat,
        chat_template=training_template(training),
        return_dict=True,
        return_assistant_tokens_mask=True,
        **options,
    )
    return list(encoded["input_ids"]), [bool(trained) for trained in encoded["assistant_masks"]]


def text_of(segments: Iterable[Segment]) -> str:
    return "".join(segment.text for segment in segments)


def decoded(tokenizer: str, ids: Sequence[int]) -> str:
    return str(tokenizer_of(tokenizer).decode(list(ids)))


REAL = {
    "chatml": "qwen2_5",
    "qwen2.5": "qwen2_5",
    "qwen3": "qwen3",
    "llama2": "llama2",
    "llama3": "llama3_1",
    "mistral": "mistral_nemo",
    "gemma": "gemma3",
    "gemma3": "gemma3",
    "phi": "phi",
    "deepseek3": "deepseek_v3",
    "alpaca-template": "llama2",
    "vicuna": "llama2",
    "minimind": "qwen2_5",
    "zephyr": "llama2",
    "ma-rlhf": "llama2",
}
"""A real tokenizer for each native template: that of its model, or another one with the control tokens added."""


@lru_cache
def tokenizer_of_phi() -> Any:
    return tokenizer_with("llama3_1", ["<|system|>", "<|user|>", "<|assistant|>", "<|end|>", "<|endoftext|>"])


def real(name: str, **options: Any) -> tuple[Any, Any]:
    """Return the tokenizer of a template and the template for it."""
    tokenizer = tokenizer_of_phi() if REAL[name] == "phi" else tokenizer_of(REAL[name])
    return tokenizer, template_of(name, tokenizer, **options)


@lru_cache
def encoded_by(name: str) -> tuple[Any, Encoder]:
    """Return the tokenizer of a template and an encoder with both, which takes a second to build."""
    tokenizer, template = real(name)
    return tokenizer, Encoder(tokenizer, template) if REAL[name] == "phi" else encoder_of(name, REAL[name])


ROUNDS = chat(
    ("user", "Hello! 你好"), ("assistant", "Hello. 🙂"), ("user", "def f():\n    pass"), ("assistant", "```\nf()\n```")
)
BRIEFED = dataclasses.replace(ROUNDS, messages=(Message("system", "Be terse."), *ROUNDS.messages))
CALLED = chat(
    ("user", "Paris?"),
    Message("assistant", "", tool_calls=(ToolCall("weather", {"city": "Paris"}),)),
    Message("tool", "21"),
    ("assistant", "It is 21."),
)
