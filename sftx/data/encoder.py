"""Encode the segments of a template as token ids and a loss mask.

Segments are encoded one by one and their ids concatenated, never the joined string, so that the mask needs no search
and no prefix. Control text is taken by its id. All other text goes through a second tokenizer that knows no control
token: text of a user can look like one, and can never become one.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import groupby
from typing import TYPE_CHECKING, Any, TypeAlias

from sftx.assembly.entry_points import discover, find
from sftx.assembly.registry import Assembly
from sftx.config.default_plugins import TEMPLATES
from sftx.config.run_file import Origins
from sftx.errors import ConfigError, DataError, ModelError, PluginError, counted
from sftx.types import Conversation, Parsed, PlainText, Segment, Template

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


KnownTexts: TypeAlias = dict[tuple[str, bool], list[int]]
"""Ids of texts that were encoded before, each with whether it continues other plain text."""


def check_controls(template: Template, tokenizer: PreTrainedTokenizerBase) -> dict[str, int]:
    """Return the id of each control token of the template. Raises PluginError for a template that cannot be used."""
    for name, kind in (("controls", frozenset), ("stop", tuple)):
        value: Any = getattr(template, name)
        if not (isinstance(value, kind) and all(isinstance(item, str) for item in value)):
            raise PluginError(f"{template}: {name} is {value!r:.60}, expected a {kind.__name__} of text")
    if not template.stop:
        raise PluginError(
            f"{template}: `stop` is empty, so a trained model would never end its answer; name the token that does"
        )
    rewrites: Any = template.rewrites_history
    if not isinstance(rewrites, bool):
        raise PluginError(f"{template}: rewrites_history is {rewrites!r:.60}, expected a bool")
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
class EncodedRun:
    """Neighbouring segments that are encoded together: control tokens, or plain text that agrees in its labels."""

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


class Encoder:
    """Encodes segments with one tokenizer and one template. It can be pickled.

    `stop_ids` are the ids of the template's stop tokens (without a template: the tokenizer's eos).
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, template: Template | None, *, no_template: str = "") -> None:
        """`no_template`: why a trained model, which can be given none any more, has no template. Raises ModelError."""
        from tokenizers import Tokenizer

        if not tokenizer.is_fast:
            raise ModelError(f"the tokenizer of {tokenizer.name_or_path} has no tokenizer.json; convert it first")
        self.tokenizer = tokenizer
        self.template = template
        self._no_template = no_template
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
        # Text that continues other text gets no space of its own in front, unlike SentencePiece's first text.
        self._continuing = Tokenizer.from_str(json.dumps(state))
        eos = tokenizer.eos_token_id
        self._end = (eos,) if isinstance(eos, int) else ()
        self.stop_ids = self._end if template is None else tuple(self._control_ids[token] for token in template.stop)
        # The tokenizer's own first token, put before pre-training text; a template writes its own.
        self._beginning = [i for i in tokenizer("")["input_ids"] if i == tokenizer.bos_token_id and i not in self._end]

    def encode(self, parsed: Parsed, *, known: KnownTexts | None = None) -> tuple[list[int], list[bool], list[float]]:
        """Return token ids, loss mask and loss weights of a parsed record. Raises DataError.

        `known` collects the ids of texts, so that conversations that share turns encode each of them once.
        """
        if isinstance(parsed, Conversation):
            if self.template is None:
                raise DataError(self._without_template())
            return self.encode_segments(self.template.render(parsed), known=known)
        if isinstance(parsed, PlainText):
            ids = [*self.text(parsed.text), *self._end]
            return ids, [True] * len(ids), [1.0] * len(ids)
        num, size = len(parsed.token_ids), len(self.tokenizer)
        if num != len(parsed.loss_mask):
            raise DataError(
                f"{counted(num, 'token id')} and {counted(len(parsed.loss_mask), 'value')} of the loss mask; "
                "give one each"
            )
        if not all(0 <= token < size for token in parsed.token_ids):
            raise DataError(f"a token id is outside of the tokenizer's 0..{size - 1}")
        return list(parsed.token_ids), list(parsed.loss_mask), [1.0] * num

    def text(self, text: str) -> list[int]:
        """Return the ids of a text that begins a document, after the tokenizer's own first token if it has one."""
        return [*self._beginning, *self.plain(text)]

    def prompt(self, conversation: Conversation) -> list[int]:
        """Return the ids after which the model is to answer: rendered by the same template as in training.

        Raises DataError when the run has no template.
        """
        if self.template is None:
            raise DataError(self._without_template())
        return self.encode_segments(self.template.generation_prompt(conversation))[0]

    def encode_segments(
        self, segments: Iterable[Segment], *, known: KnownTexts | None = None
    ) -> tuple[list[int], list[bool], list[float]]:
        """Return token ids, loss mask and loss weights of rendered segments."""
        token_ids: list[int] = []
        loss_mask: list[bool] = []
        weights: list[float] = []
        for run in self.runs(segments, known=known):
            num = len(run.token_ids)
            token_ids += run.token_ids
            loss_mask += [run.trainable] * num
            weights += [run.weight if run.trainable else 1.0] * num
        return token_ids, loss_mask, weights

    def runs(self, segments: Iterable[Segment], *, known: KnownTexts | None = None) -> Iterator[EncodedRun]:
        """Encode neighbouring plain segments that agree in their labels as one text. Raises PluginError, DataError."""
        known = {} if known is None else known
        continues = False
        for (control, _, _), run in groupby(
            segments, key=lambda s: (s.control, s.trainable, s.weight if s.trainable else 1.0)
        ):
            joined = tuple(run)
            texts = [segment.text for segment in joined]
            if control:
                for text in texts:
                    if text not in self._control_ids:
                        raise PluginError(f"the template wrote the control text {text!r}, which is not in its controls")
                ids = [self._control_ids[text] for text in texts]
            else:
                key = ("".join(texts), continues)
                if key not in known:
                    known[key] = self.plain(key[0], continues=continues)
                ids = known[key]
            was_plain, continues = continues, not control and (continues or any(texts))
            yield EncodedRun(joined, ids, was_plain and not control)

    def plain(self, text: str, *, continues: bool = False) -> list[int]:
        """Return the ids of a user's text; `continues`: it comes right after other plain text.

        Raises DataError when it cannot be encoded without a control token.
        """
        tokenizer = self._continuing if continues else self._plain
        try:
            ids: list[int] = tokenizer.encode(text, add_special_tokens=False).ids
        except (TypeError, UnicodeEncodeError):  # the Rust side refuses a str that is not UTF-8
            raise DataError("text holds a lone surrogate, which no tokenizer can read") from None
        if not self._reserved.isdisjoint(ids):
            token = self.tokenizer.convert_ids_to_tokens(next(i for i in ids if i in self._reserved))
            raise DataError(f"this tokenizer makes the control token {token!r} of plain text")
        return ids

    def offsets(self, text: str, *, continues: bool = False) -> list[tuple[int, int]]:
        """Return where in `text` each token of `plain(text)` begins and ends, in characters."""
        tokenizer = self._continuing if continues else self._plain
        offsets: list[tuple[int, int]] = tokenizer.encode(text, add_special_tokens=False).offsets
        return offsets

    def is_control(self, token_id: int) -> bool:
        """Return whether no plain text can give this id."""
        return token_id in self._reserved

    def _without_template(self) -> str:
        if self._no_template:
            return f"a conversation needs a template, and the model has none ({self._no_template}); give plain text"
        return f"a conversation needs a template, and the run has none{self.advice()}"

    def advice(self) -> str:
        """Return the end of an error: which built-in templates this tokenizer's vocabulary allows."""
        fitting = [f"--plugin {name}" for name in templates_that_fit(self.tokenizer)]
        return f"; add {' or '.join(fitting)}" if fitting else "; no built-in one fits this tokenizer"


def _without_prefix(part: Any) -> Any:
    """Return a normalizer or pre-tokenizer, as tokenizer.json has it, that puts nothing before a text, or None."""
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


def templates_that_fit(tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """Return the built-in templates whose control tokens this tokenizer has."""
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
