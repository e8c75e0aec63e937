"""What a plugin is checked with: its own stages, the built-in ones where it fills none, and a small real model."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch

from sftx.assembly.discovery import discover, find
from sftx.assembly.hookspecs import DEFAULTS, TEMPLATES
from sftx.assembly.registry import Assembly
from sftx.assembly.stages import make
from sftx.config.options import DataConfig
from sftx.config.run_file import Origins
from sftx.data.encoder import Encoder
from sftx.data.row_encoder import Row, RowEncoder
from sftx.errors import DataError
from sftx.model import tiny
from sftx.model.language_model import LanguageModel
from sftx.model.load import load_model, load_spec, load_tokenizer
from sftx.types import Adapter, Collator, Conversation, Example, Location, Loss, Message, ModelSpec, Parser, Template

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

CONVERSATIONS = tuple(
    Conversation(tuple(Message(role, content) for role, content in turns))
    for turns in (
        [("user", "What is 2 + 3?"), ("assistant", "5")],
        [("user", "Name the largest planet."), ("assistant", "Jupiter is the largest planet of the sun.")],
        [("user", "Hello!"), ("assistant", "Hello."), ("user", "How are you today?"), ("assistant", "Well, thanks.")],
        [("user", "你好，请介绍一下北京。"), ("assistant", "北京是中国的首都。")],
        [("user", "Write a list.\n- one\n- two"), ("assistant", "- one\n- two\n\nThat is the list.")],
        [("user", "Say yes"), ("assistant", "yes"), ("user", "again"), ("assistant", "yes"), ("user", "and again"),
         ("assistant", "yes, yes")],
    )
)  # fmt: skip
"""Conversations that every template can write: turns of a user and an assistant by turns."""

MAX_LENGTH = 128
"""What a collator is told to be the longest example, in tokens: more than any of these has."""


class Kit:
    """One plugin, and whatever else a run around it needs; everything is made on first use.

    `model`: a directory with a model and its tokenizer; by default the tiny one, whose tokenizer then gets the
    control tokens that the plugin's template declares.
    """

    def __init__(self, plugin: object, model: Path | None = None) -> None:
        self.plugin = plugin
        self.model_dir = model or tiny.model_dir()
        self._is_tiny = model is None

    def fills(self, hook: str) -> bool:
        return hasattr(self.plugin, hook)

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        tokenizer = load_tokenizer(str(self.model_dir))
        if self._is_tiny and self.fills("sftx_template"):
            controls = make(self.plugin, "sftx_template", tokenizer=tokenizer).controls
            tokenizer.add_tokens(sorted(controls - set(tokenizer.get_vocab())), special_tokens=True)
        return tokenizer

    @cached_property
    def template(self) -> Template:
        return cast(Template, self._make("sftx_template", TEMPLATES[0], tokenizer=self.tokenizer))

    @cached_property
    def collator(self) -> Collator:
        return cast(Collator, self._make("sftx_collator", DEFAULTS["sftx_collator"][0], max_length=MAX_LENGTH))

    @cached_property
    def loss(self) -> Loss:
        return cast(Loss, self._make("sftx_loss", DEFAULTS["sftx_loss"][0]))

    @cached_property
    def encoder(self) -> Encoder:
        return Encoder(self.tokenizer, self.template)

    @cached_property
    def spec(self) -> ModelSpec:
        return load_spec(str(self.model_dir))

    def _make(self, hook: str, default: str, **arguments: Any) -> Any:
        plugin = self.plugin if self.fills(hook) else built_in(default)
        return make(plugin, hook, **arguments)

    @cached_property
    def examples(self) -> list[Example]:
        """The plugin's own samples, or the conversations above, encoded with its own template, or ChatML."""
        if self.fills("sftx_parser"):
            parser: Parser = make(self.plugin, "sftx_parser")
            place = Location("samples", 0)
            rows = [tuple(parser.parse(record, place)) for record in parser.samples]
            rows *= 1 + 3 // max(1, len(rows))  # a few rows at least, for batches worth the name
        else:
            rows = [(conversation,) for conversation in CONVERSATIONS]
        encode = RowEncoder({}, self.encoder, DataConfig())
        examples: list[Example] = []
        for number, parsed in enumerate(rows, 1):
            where = Location("samples", number)
            examples += encode.encode(parsed, Row(where)).as_examples(first_group=len(examples))
        if not examples:
            raise DataError("none of the samples trains anything")
        return examples

    def language_model(
        self, adapters: Mapping[str, Adapter] | None = None, *, dtype: torch.dtype = torch.float32
    ) -> LanguageModel:
        """The model read anew, with these adapters attached; all of it is trained without any."""
        adapters = adapters or {}
        model = load_model(self.spec, list(adapters.values()), dtype=dtype, device=torch.device("cpu"))
        lm = LanguageModel(model, self.tokenizer)
        with torch.random.fork_rng(devices=[]):  # an author's own tests keep their random numbers
            torch.default_generator.manual_seed(0)
            lm.attach(adapters)
        return lm


def built_in(name: str, **options: Any) -> object:
    """An instance of an installed plugin, with these options."""
    assembly = Assembly(Origins())
    assembly.add(find(name, discover()), options)
    return assembly.active[0].plugin
