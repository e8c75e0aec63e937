"""The classifier of the plugin `reward-model`: it loads the model and scores answers in batches.

Dimensions: B answers of a batch, T tokens, C classes.
"""

from __future__ import annotations

import contextlib
import json
import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import logging as transformers_logging

from sftx import Answer, ConfigError, LanguageModel, Message, PluginError

log = logging.getLogger(__name__)

_UNLIMITED = 10**9
"""transformers says so or more where a tokenizer knows no largest length."""


@dataclass
class Classifier:
    """A sequence classifier in evaluation mode, with its tokenizer. Its weights are read by `prepare`."""

    name: str
    """Directory, or id on the hub."""
    config: PretrainedConfig
    tokenizer: PreTrainedTokenizerBase
    label: int
    """Index of the class whose logit is the reward."""
    input: Literal["chat", "pair"]
    dtype: torch.dtype
    batch_size: int
    max_length: int | None
    model: PreTrainedModel | None = field(default=None, init=False)
    has_warned: bool = field(default=False, init=False)

    @classmethod
    def of(
        cls,
        name: str,
        *,
        label: int | str | None,
        input: Literal["chat", "pair"],
        dtype: torch.dtype,
        batch_size: int,
        max_length: int | None,
    ) -> Classifier:
        """Read configuration and tokenizer. Raises PluginError for files that cannot be read, and ConfigError."""
        with _reading(name):
            config = AutoConfig.from_pretrained(name)
            tokenizer = AutoTokenizer.from_pretrained(name)
        if any(name.endswith("ForCausalLM") for name in config.architectures or ()):
            raise ConfigError(
                f"option 'model': {name} is a {config.architectures[0]}, which gives no rewards; give a "
                "sequence-classification model"
            )
        if input == "chat" and not tokenizer.chat_template:
            raise ConfigError(
                f"option 'input': the tokenizer of {name} has no chat template; set input to pair, or give a "
                "model whose tokenizer has one"
            )
        if tokenizer.pad_token_id is None:
            if tokenizer.eos_token_id is None:
                raise ConfigError(
                    f"option 'model': the tokenizer of {name} has neither pad_token nor eos_token, one of "
                    "which pads answers that are scored together"
                )
            tokenizer.pad_token = tokenizer.eos_token
        if config.pad_token_id is None:  # a decoder looks for the last token before padding
            config.pad_token_id = tokenizer.pad_token_id
        tokenizer.padding_side = "right"
        limits = [max_length, getattr(config, "max_position_embeddings", None), tokenizer.model_max_length]
        limit = min((one for one in limits if isinstance(one, int) and 0 < one < _UNLIMITED), default=None)
        return cls(name, config, tokenizer, _index_of(label, name, config), input, dtype, batch_size, limit)

    def prepare(self, lm: LanguageModel) -> None:
        """Read the weights, to the device of the run. Raises PluginError, and ConfigError where some are missing."""
        with _reading(self.name):
            model, info = AutoModelForSequenceClassification.from_pretrained(
                self.name,
                config=self.config,
                dtype=self.dtype,
                output_loading_info=True,
            )
        if missing := sorted(info["missing_keys"]):
            raise ConfigError(
                f"option 'model': {self.name} has no weights for {missing[0]}, so it is no trained reward "
                "model; give a sequence-classification model"
            )
        self.model = cast(PreTrainedModel, cast(nn.Module, model).to(lm.device).requires_grad_(False).eval())

    @torch.no_grad()
    def __call__(self, answers: Sequence[Answer]) -> list[float]:
        """Return the logit of each answer."""
        assert self.model is not None
        inputs = [self._input(answer) for answer in answers]
        # Rows of similar length share a batch.
        order = sorted(range(len(inputs)), key=lambda number: len(inputs[number]["input_ids"]))
        scores = [0.0] * len(inputs)
        for start in range(0, len(order), self.batch_size):
            chosen = order[start : start + self.batch_size]
            batch = self.tokenizer.pad([inputs[number] for number in chosen], return_tensors="pt")
            # Outside of the run's autocast: this model computes in its own dtype.
            with torch.autocast(self.model.device.type, enabled=False):
                logits_BC: Tensor = self.model(**batch.to(self.model.device)).logits
            for number, score in zip(chosen, logits_BC[:, self.label].float().tolist(), strict=True):
                scores[number] = score
        return scores

    def _input(self, answer: Answer) -> dict[str, Any]:
        """Return the token ids of a conversation with its answer, and what else the model takes of each token."""
        if self.input == "pair":
            made = self.tokenizer(answer.question.prompt, answer.text)
        else:
            turns = [*answer.question.messages, Message("assistant", answer.text)]
            text = self.tokenizer.apply_chat_template(
                [_as_chat(turn) for turn in turns],
                tools=[dict(tool) for tool in answer.question.tools] or None,
                tokenize=False,
            )
            made = self.tokenizer(text, add_special_tokens=False)  # the template has written them
        lists = {name: list(values) for name, values in made.items()}
        length = len(lists["input_ids"])
        if self.max_length is not None and length > self.max_length:
            if not self.has_warned:
                self.has_warned = True
                log.warning(
                    "reward-model: the conversation of %s has %d tokens, of which the last %d are scored, and so with "
                    "others that are too long",
                    answer.question.row_id, length, self.max_length,
                )  # fmt: skip
            lists = {name: values[-self.max_length :] for name, values in lists.items()}
        return lists


@contextlib.contextmanager
def _reading(name: str) -> Iterator[None]:
    """Turn an error of transformers into a PluginError of one line, and draw none of its bars."""
    has_bars = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    try:
        yield
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        first = str(error).strip().partition("\n")[0]
        raise PluginError(f"model {name}: cannot be loaded as a sequence classifier: {first}") from error
    finally:
        if has_bars:
            transformers_logging.enable_progress_bar()


def _index_of(label: int | str | None, name: str, config: Any) -> int:
    """Return the index of the logit that is the reward. Raises ConfigError."""
    names: Mapping[int, str] = config.id2label or {}
    num: int = config.num_labels
    if label is None and num == 1:
        return 0
    index = {text: number for number, text in names.items()}.get(label) if isinstance(label, str) else label
    if index is None or not 0 <= index < num:
        got = "has several classes" if label is None else f"has no class {label!r}"
        raise ConfigError(
            f"option 'label': {name} {got}; give one of {', '.join(repr(names.get(n, n)) for n in range(num))}"
        )
    return index


def _as_chat(message: Message) -> dict[str, Any]:
    """Return a turn as chat templates of transformers expect it: arguments of calls are objects."""
    turn: dict[str, Any] = {"role": message.role, "content": message.content}
    if message.reasoning:
        turn["reasoning_content"] = message.reasoning
    if message.name is not None:
        turn["name"] = message.name
    if message.tool_call_id is not None:
        turn["tool_call_id"] = message.tool_call_id
    if message.tool_calls:
        turn["tool_calls"] = [
            {"type": "function", "function": {"name": call.name, "arguments": json.loads(json.dumps(call.arguments))}}
            for call in message.tool_calls
        ]
    return turn
