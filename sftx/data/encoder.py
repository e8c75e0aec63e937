"""What a parser found becomes token ids and a loss mask, by way of a template's segments.

Segments are encoded one by one and their ids concatenated, never the joined string, so that the mask needs no search
and no prefix. Control text is taken by its id. Everything else goes through a second tokenizer that knows no control
token at all: what a user writes can look like one, and can never become one.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import groupby
from typing import TYPE_CHECKING, Any

from sftx.assembly import data_checks
from sftx.assembly.discovery import discover, find
from sftx.assembly.hookspecs import TEMPLATES
from sftx.assembly.registry import Assembly
from sftx.config.run_file import Origins
from sftx.errors import ConfigError, DataError, ModelError, PluginError
from sftx.types import Conversation, Parsed, PlainText, Segment, Template

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def check_controls(template: Template, tokenizer: PreTrainedTokenizerBase) -> dict[str, int]:
    """The id of each control token of the template. Raises PluginError naming those that the tokenizer lacks."""
    data_checks.template(template)
    vocabulary = tokenizer.get_vocab()
    missing = sorted(token for token in template.controls if token not in vocabulary)
    if missing:
        raise PluginError(
            f"the template needs the control tokens {', '.join(missing)}, which the tokenizer of "
            f"{tokenizer.name_or_path} lacks; choose a template made for this model, or add them with --add-tokens"
        )
    stray = sorted(set(template.stop) - template.controls)
    if stray:
        raise PluginError(f"the template's stop tokens {', '.join(stray)} are not among its controls")
    return {token: vocabulary[token] for token in template.controls}


@dataclass(frozen=True)
class Run:
    """Neighbouring segments that are encoded as one: a control token each, or plain text that agrees in its labels."""

    segments: tuple[Segment, ...]
    token_ids: list[int]
    continues: bool = False
    """Whether it is plain text right after other plain text."""

    @property
    def control(self) -> bool:
        return self.segments[0].control

    @property
    def trainable(self) -> bool:
        return self.segments[0].trainable

    @property
    def weight(self) -> float:
        return self.segments[0].weight


def _without_prefix(part: Any) -> Any:
    """A normalizer or pre-tokenizer, as tokenizer.json has it, that puts nothing before a text; None for none."""
    match part:
        case {"type": "Prepend"}:
            return None
        case {"type": "Metaspace"}:
            return part | {"prepend_scheme": "never"}
        case {"type": "ByteLevel"}:
            return part | {"add_prefix_space": False}
        case {"type": "Sequence"}:
            (name,) = part.keys() - {"type"}
            return part | {name: [kept for inner in part[name] if (kept := _without_prefix(inner)) is not None]}
    return part


class Encoder:
    """Encodes segments with one tokenizer and one template. Can be sent to other processes.

    `stop_ids` are the ids of the template's stop tokens (without a template: the tokenizer's eos).
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, template: Template | None) -> None:
        from tokenizers import Tokenizer

        if not tokenizer.is_fast:
            raise ModelError(f"the tokenizer of {tokenizer.name_or_path} has no tokenizer.json; convert it first")
        self.tokenizer = tokenizer
        self.template = template
        self._control_ids = check_controls(template, tokenizer) if template is not None else {}
        self._reserved = {*self._control_ids.values(), *tokenizer.all_special_ids}
        # Special tokens, and those that the template declares without their being special (Qwen3's <tool_call>), must
        # be unknown to it: `split_special_tokens=True` leaves the latter in.
        state = json.loads(tokenizer.backend_tokenizer.to_str())
        state["added_tokens"] = [
            token for token in state["added_tokens"] if not token["special"] and token["id"] not in self._reserved
        ]
        state["post_processor"] = state["truncation"] = state["padding"] = None
        self._plain = Tokenizer.from_str(json.dumps(state))
        for part in ("normalizer", "pre_tokenizer"):
            state[part] = _without_prefix(state[part])
        # Text that goes on where other text ended begins with no space of its own, unlike SentencePiece's first.
        self._continuing = Tokenizer.from_str(json.dumps(state))
        eos = tokenizer.eos_token_id
        self._end = (eos,) if isinstance(eos, int) else ()
        self.stop_ids = self._end if template is None else tuple(self._control_ids[token] for token in template.stop)
        # What the tokenizer itself puts before a text, as before pre-training text; a template writes its own.
        self._beginning = [i for i in tokenizer("")["input_ids"] if i == tokenizer.bos_token_id and i not in self._end]

    def plain(self, text: str, *, continues: bool = False) -> list[int]:
        """Ids of text that a user wrote; `continues`: right after other plain text.

        Raises DataError when it cannot be encoded without a control token.
        """
        tokenizer = self._continuing if continues else self._plain
        try:
            ids: list[int] = tokenizer.encode(text, add_special_tokens=False).ids
        except (TypeError, UnicodeEncodeError):  # what the Rust side says of a str that is not UTF-8
            raise DataError("text holds a lone surrogate, which no tokenizer can read") from None
        if not self._reserved.isdisjoint(ids):
            token = self.tokenizer.convert_ids_to_tokens(next(i for i in ids if i in self._reserved))
            raise DataError(f"this tokenizer makes the control token {token!r} of plain text")
        return ids

    def runs(self, segments: Iterable[Segment]) -> Iterator[Run]:
        """The segments in their order. Raises PluginError for a segment that is none, or whose weight is no weight."""
        continues = False
        for (control, _, weight), run in groupby(
            data_checks.segments(self.template, segments),
            key=lambda s: (s.control, s.trainable, s.weight if s.trainable else 1.0),
        ):
            joined = tuple(run)
            if not 0 <= weight < math.inf:
                raise PluginError(f"a segment has the weight {weight:g}, expected a number of at least 0")
            texts = [segment.text for segment in joined]
            if control:
                ids = [self._control(text) for text in texts]
            else:
                ids = self.plain("".join(texts), continues=continues)
            was_plain, continues = continues, not control and (continues or any(texts))
            yield Run(joined, ids, was_plain and not control)

    def segments(self, segments: Iterable[Segment]) -> tuple[list[int], list[bool], list[float]]:
        """Ids, loss mask and loss weights. Neighbouring plain segments that agree are encoded as one text."""
        token_ids: list[int] = []
        loss_mask: list[bool] = []
        weights: list[float] = []
        for run in self.runs(segments):
            num = len(run.token_ids)
            token_ids += run.token_ids
            loss_mask += [run.trainable] * num
            weights += [run.weight if run.trainable else 1.0] * num
        return token_ids, loss_mask, weights

    def offsets(self, text: str, *, continues: bool = False) -> list[tuple[int, int]]:
        """Where in `text` each token of `plain(text)` begins and ends, in characters."""
        tokenizer = self._continuing if continues else self._plain
        found: list[tuple[int, int]] = tokenizer.encode(text, add_special_tokens=False).offsets
        return found

    def is_control(self, token_id: int) -> bool:
        """Whether no plain text can give this id."""
        return token_id in self._reserved

    def _control(self, text: str) -> int:
        try:
            return self._control_ids[text]
        except KeyError:
            raise PluginError(f"the template wrote the control text {text!r}, which is not in its controls") from None

    def encode(self, parsed: Parsed) -> tuple[list[int], list[bool], list[float]]:
        """Ids, loss mask and loss weights of what a parser found in a record."""
        if isinstance(parsed, Conversation):
            assert self.template is not None
            return self.segments(self.template.render(parsed))
        if isinstance(parsed, PlainText):
            ids = [*self._beginning, *self.plain(parsed.text), *self._end]
            return ids, [True] * len(ids), [1.0] * len(ids)
        num, size = len(parsed.token_ids), len(self.tokenizer)
        if num != len(parsed.loss_mask):
            raise DataError(f"{num} token ids and {len(parsed.loss_mask)} values of the loss mask; give one each")
        if not all(0 <= token < size for token in parsed.token_ids):
            raise DataError(f"a token id is outside of the tokenizer's 0..{size - 1}")
        return list(parsed.token_ids), list(parsed.loss_mask), [1.0] * num

    def prompt(self, conversation: Conversation) -> list[int]:
        """Ids after which the model is to answer: the same template's, so that inference cannot differ."""
        assert self.template is not None
        return self.segments(self.template.generation_prompt(conversation))[0]

    def advice(self) -> str:
        """Which built-in templates this tokenizer's vocabulary allows, as the end of an error."""
        fitting = [f"--plugin {name}" for name in templates_that_fit(self.tokenizer)]
        return f"; add {' or '.join(fitting)}" if fitting else "; no built-in one fits this tokenizer"


def templates_that_fit(tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """The built-in templates whose control tokens this tokenizer has."""
    fitting = []
    for name in TEMPLATES:
        assembly = Assembly(Origins())
        try:
            assembly.add(find(name, discover()), {})
            template = assembly.template(tokenizer)
            assert template is not None
            check_controls(template, tokenizer)
        except (PluginError, ConfigError):
            continue
        fitting.append(name)
    return fitting
