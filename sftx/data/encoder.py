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
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias

from sftx.assembly.entry_points import discover, find
from sftx.assembly.registry import Assembly
from sftx.config.default_plugins import TEMPLATES
from sftx.config.run_file import Origins
from sftx.errors import ConfigError, DataError, ModelError, PluginError, counted
from sftx.types import Conversation, Parsed, PlainText, Segment, Template, Tokens

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


PlainPart: TypeAlias = tuple[str, bool]
"""Plain text that is encoded as one, and whether it continues other plain text."""
KnownTexts: TypeAlias = dict[PlainPart, list[int]]
"""Ids of texts that were encoded before."""


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


class Part(NamedTuple):
    """A part is encoded as one and agrees in its labels: tokens whose ids are known already, or plain text."""

    content: list[int] | PlainPart
    trainable: bool = True
    weight: float = 1.0
    segments: tuple[Segment, ...] = ()
    """Those that it was rendered as."""


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
        # Text that continues other text gets no space of its own in front, unlike SentencePiece's first text.
        changed = {part: _without_prefix(state[part]) for part in ("normalizer", "pre_tokenizer")}
        is_same = changed.items() <= state.items()  # as it is for most tokenizers by bytes
        self._continuing = self._plain if is_same else Tokenizer.from_str(json.dumps(state | changed))
        eos = tokenizer.eos_token_id
        self._end = (eos,) if isinstance(eos, int) else ()
        self.stop_ids = self._end if template is None else tuple(self._control_ids[token] for token in template.stop)
        # The tokenizer's own first token, put before pre-training text; a template writes its own.
        self._beginning = [i for i in tokenizer("")["input_ids"] if i == tokenizer.bos_token_id and i not in self._end]

    def encode(self, parsed: Parsed) -> tuple[list[int], list[bool], list[float]]:
        """Return token ids, loss mask and loss weights of a parsed record. Raises DataError, PluginError."""
        return self.joined(self.parts(parsed), {})

    def parts(self, parsed: Parsed | Iterable[Segment]) -> list[Part]:
        """Return what is encoded together of a parsed record, or of rendered segments. Raises DataError, PluginError.

        Neighbouring plain segments that agree in their labels are one text.
        """
        if isinstance(parsed, PlainText):
            return [Part(self._beginning), Part((parsed.text, False)), Part([*self._end])]
        if isinstance(parsed, Tokens):
            self._check_tokens(parsed)
            labelled = zip(parsed.token_ids, parsed.loss_mask, strict=True)
            return [
                Part([token for token, _ in run], trained) for trained, run in groupby(labelled, key=lambda one: one[1])
            ]
        if isinstance(parsed, Conversation):
            if self.template is None:
                raise DataError(self._without_template())
            parsed = self.template.render(parsed)
        parts = []
        continues = False
        for (control, trainable, weight), run in groupby(
            parsed, key=lambda s: (s.control, s.trainable, s.weight if s.trainable else 1.0)
        ):
            segments = tuple(run)
            if control:
                for segment in segments:
                    if segment.text not in self._control_ids:
                        raise PluginError(
                            f"the template wrote the control text {segment.text!r}, which is not in its controls"
                        )
                parts.append(Part([self._control_ids[one.text] for one in segments], trainable, weight, segments))
                continues = False
            else:
                text = "".join([segment.text for segment in segments])
                parts.append(Part((text, continues), trainable, weight, segments))
                continues = continues or text != ""
        return parts

    def _check_tokens(self, tokens: Tokens) -> None:
        num, size = len(tokens.token_ids), len(self.tokenizer)
        if num != len(tokens.loss_mask):
            raise DataError(
                f"{counted(num, 'token id')} and {counted(len(tokens.loss_mask), 'value')} of the loss mask; "
                "give one each"
            )
        if not all(0 <= token < size for token in tokens.token_ids):
            raise DataError(f"a token id is outside of the tokenizer's 0..{size - 1}")

    def joined(self, parts: Iterable[Part], known: KnownTexts) -> tuple[list[int], list[bool], list[float]]:
        """Return token ids, loss mask and loss weights of all parts, one after the other. Raises DataError.

        `known` has ids of texts, such as those that `learn` has added, and collects those of the others.
        """
        token_ids: list[int] = []
        loss_mask: list[bool] = []
        weights: list[float] = []
        for content, trainable, weight, _ in parts:
            if isinstance(content, tuple):
                ids = known.get(content)
                if ids is None:
                    ids = known[content] = self.plain(content[0], continues=content[1])
            else:
                ids = content
            token_ids += ids
            loss_mask += [trainable] * len(ids)
            weights += [weight] * len(ids)
        return token_ids, loss_mask, weights

    def learn(self, parts: Iterable[Part], known: KnownTexts) -> None:
        """Add the ids of all texts of the parts to `known`, by one call of each tokenizer.

        A text that cannot be encoded is left out: the error belongs to its row, and is raised when that is encoded.
        """
        texts = {part.content: None for part in parts if isinstance(part.content, tuple)}
        for tokenizer, is_continuing in ((self._plain, False), (self._continuing, True)):
            new = [text for text in texts if text[1] == is_continuing and text not in known]
            try:
                encodings = tokenizer.encode_batch_fast([text for text, _ in new], add_special_tokens=False)
            except (TypeError, UnicodeEncodeError):  # one of them is not UTF-8
                continue
            ids = (encoding.ids for encoding in encodings)
            known |= {text: found for text, found in zip(new, ids, strict=True) if self._reserved.isdisjoint(found)}

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

    def encode_segments(self, segments: Iterable[Segment]) -> tuple[list[int], list[bool], list[float]]:
        """Return token ids, loss mask and loss weights of rendered segments. Raises PluginError, DataError."""
        return self.joined(self.parts(segments), {})

    def runs(self, segments: Iterable[Segment]) -> Iterator[EncodedRun]:
        """Yield the parts of rendered segments with their ids. Raises PluginError, DataError."""
        for part in self.parts(segments):
            continues = isinstance(part.content, tuple) and part.content[1]
            yield EncodedRun(part.segments, self.joined([part], {})[0], continues)

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
