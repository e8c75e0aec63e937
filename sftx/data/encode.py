"""Segments become token ids and a loss mask; rows become examples, and the ledger tells of those that do not.

Segments are encoded one by one and their ids concatenated, never the joined string, so that the mask needs no search
and no prefix. Control text is taken by its id. Everything else goes through a second tokenizer that knows no control
token at all: what a user writes can look like one, and can never become one.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from typing import TYPE_CHECKING, Final

from sftx.data import checked, sources
from sftx.data.ledger import Ledger
from sftx.errors import ConfigError, DataError, ModelError, PluginError, SftxError
from sftx.hookspecs import TEMPLATES
from sftx.plugins import Assembly, discover, find
from sftx.run_file import Origins
from sftx.types import (
    Conversation,
    Example,
    Location,
    Message,
    Parsed,
    Parser,
    PlainText,
    Record,
    Segment,
    Template,
)

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from sftx.config import DataConfig

NOTHING_TRAINED: Final = "no trained token"
EMPTY: Final = "every trained turn is empty"
NO_TURN: Final = "no assistant turn, so nothing to train"


def check_controls(template: Template, tokenizer: PreTrainedTokenizerBase) -> dict[str, int]:
    """The id of each control token of the template. Raises PluginError naming those that the tokenizer lacks."""
    checked.template(template)
    vocabulary = tokenizer.get_vocab()
    missing = sorted(token for token in template.controls if token not in vocabulary)
    if missing:
        raise PluginError(
            f"the template needs the control tokens {', '.join(missing)}, which the tokenizer of "
            f"{tokenizer.name_or_path} lacks; choose a template made for this model"
        )
    stray = sorted(set(template.stop) - template.controls)
    if stray:
        raise PluginError(f"the template's stop tokens {', '.join(stray)} are not among its controls")
    return {token: vocabulary[token] for token in template.controls}


class Encoder:
    """Encodes segments with one tokenizer and one template.

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
        eos = tokenizer.eos_token_id
        if template is not None:
            self.stop_ids = tuple(self._control_ids[token] for token in template.stop)
        else:
            self.stop_ids = (eos,) if isinstance(eos, int) else ()

    def plain(self, text: str) -> list[int]:
        """Ids of text that a user wrote. Raises DataError when it cannot be encoded without a control token."""
        try:
            ids: list[int] = self._plain.encode(text, add_special_tokens=False).ids
        except (TypeError, UnicodeEncodeError):  # what the Rust side says of a str that is not UTF-8
            raise DataError("text holds a lone surrogate, which no tokenizer can read") from None
        if not self._reserved.isdisjoint(ids):
            token = self.tokenizer.convert_ids_to_tokens(next(i for i in ids if i in self._reserved))
            raise DataError(f"this tokenizer makes the control token {token!r} of plain text")
        return ids

    def segments(self, segments: Iterable[Segment]) -> tuple[list[int], list[bool], list[float]]:
        """Ids, loss mask and loss weights. Neighbouring plain segments that agree are encoded as one text."""
        token_ids: list[int] = []
        loss_mask: list[bool] = []
        weights: list[float] = []
        for (control, trainable, weight), run in groupby(
            checked.segments(self.template, segments),
            key=lambda s: (s.control, s.trainable, s.weight if s.trainable else 1.0),
        ):
            texts = [segment.text for segment in run]
            if not 0 <= weight < math.inf:
                raise PluginError(f"a segment has the weight {weight:g}, expected a number of at least 0")
            ids = [self._control(text) for text in texts] if control else self.plain("".join(texts))
            token_ids += ids
            loss_mask += [trainable] * len(ids)
            weights += [weight] * len(ids)
        return token_ids, loss_mask, weights

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
            ids = [*self.plain(parsed.text), *self.stop_ids[:1]]
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


@dataclass(frozen=True)
class Question:
    """A held-out conversation without its last turn, and that turn as the right answer."""

    row_id: str
    prompt: str
    """The last turn before the answer, as a person reads it."""
    prompt_ids: list[int]
    reference: str


@dataclass
class Dataset:
    """The examples of one split, and the account of the rows they came from."""

    examples: list[Example] = field(default_factory=list)
    questions: list[Question] = field(default_factory=list)
    ledger: Ledger = field(default_factory=Ledger)
    formats: Counter[str] = field(default_factory=Counter)

    @property
    def num_tokens(self) -> int:
        return sum(example.num_tokens for example in self.examples)

    @property
    def num_real_tokens(self) -> int:
        return sum(len(example.token_ids) for example in self.examples)


def prepare(
    paths: Sequence[str],
    config: DataConfig,
    parsers: Mapping[str, Parser],
    encoder: Encoder,
    *,
    questions: bool = False,
) -> Dataset:
    """Reads, parses and encodes every row of `paths`; with `questions`, also keeps what can be asked of it.

    Raises DataError, naming file and line: a row that cannot be read, more dropped rows than `config.max_dropped`
    allows, or a stop token that no row trains.
    """
    data = Dataset()
    for path in paths:
        for where, record in sources.read(path):
            data.ledger.num_rows += 1
            name, parser = _parser_of(record, where, config.format, parsers)
            data.formats[name] += 1
            try:
                parsed = checked.parsed(parser, parser.parse(record, where))
                data.examples += encode_row(parsed, where, config, encoder, data.ledger, first_group=len(data.examples))
                if questions:
                    data.questions += _questions(parsed, where, encoder)
            except SftxError as error:
                if str(where) not in str(error):
                    error.args = (f"{where}: {error}",)
                raise
    data.ledger.check(config.max_dropped)
    _check_stop(data, encoder)
    return data


def _parser_of(
    record: Record, where: Location, wanted: str | None, parsers: Mapping[str, Parser]
) -> tuple[str, Parser]:
    if wanted is not None:
        return wanted, parsers[wanted]
    for name, parser in parsers.items():
        if parser.accepts(record):
            return name, parser
    known = "; ".join(f"{name}: {parser.fields}" for name, parser in parsers.items())
    raise DataError(f"{where}: no format has the fields {sorted(map(str, record))}; known are {known}")


def encode_row(
    parsed: Sequence[Parsed],
    where: Location,
    config: DataConfig,
    encoder: Encoder,
    ledger: Ledger,
    *,
    first_group: int,
) -> list[Example]:
    """The examples of one record, one group each unless they belong together; none when the ledger has it."""
    found = [unit for one in parsed for unit in units(one, where, encoder)]
    if not found:  # nothing parsed, or a template that makes an example of each trained turn, and none is
        ledger.drop(where, _why_nothing_is_trained(parsed))
    paired = len(parsed) > 1
    examples: list[Example] = []
    for number, unit in enumerate(found):
        token_ids, loss_mask, weights = encoder.encode(unit)
        length = len(token_ids)
        if not any(loss_mask[1:]):
            ledger.drop(where, _why_nothing_is_trained([unit]), length=length)
            return []
        if isinstance(unit, Conversation) and not any(m.trained and m.content.strip() for m in unit.messages):
            ledger.drop(where, EMPTY, length=length)  # it would teach to say nothing
            return []
        if length > config.max_length:
            if config.long_rows == "error":
                raise DataError(f"{where}: {length} tokens, more than data.max_length={config.max_length}")
            token_ids, loss_mask = token_ids[: config.max_length], loss_mask[: config.max_length]
            if not any(loss_mask[1:]):
                ledger.drop(where, f"its prompt alone fills max_length={config.max_length}", length=length)
                return []
            if config.long_rows == "drop":
                ledger.drop(where, f"longer than max_length={config.max_length}", length=length)
                return []
            ledger.cut(where, f"longer than max_length={config.max_length}", length=length, kept=config.max_length)
        weights = weights[: len(token_ids)]
        examples.append(
            Example(
                token_ids=token_ids,
                loss_mask=loss_mask,
                row_id=str(where) if len(found) == 1 else f"{where}#{number + 1}",
                group=first_group if paired else first_group + number,
                weights=weights if any(weight != 1 for weight in weights) else None,
                extras=unit.extras,
            )
        )
    return examples


def units(parsed: Parsed, where: Location, encoder: Encoder) -> Iterator[Parsed]:
    """What becomes one example each: where a template rewrites history, every trained turn with what led to it."""
    template = encoder.template
    if not isinstance(parsed, Conversation):
        yield parsed
    elif template is None:
        fitting = [f"--plugin {name}" for name in _templates_that_fit(encoder.tokenizer)]
        hint = f"add {' or '.join(fitting)}" if fitting else "no built-in one fits this tokenizer"
        raise DataError(f"{where}: a conversation needs a template, and the run has none; {hint}")
    elif not template.rewrites_history:
        yield parsed
    else:
        for end, message in enumerate(parsed.messages, 1):
            if message.trained:
                yield dataclasses.replace(parsed, messages=(*_untrained(parsed.messages[: end - 1]), message))


def _untrained(messages: Sequence[Message]) -> tuple[Message, ...]:
    return tuple(dataclasses.replace(message, trainable=False) for message in messages)


def _templates_that_fit(tokenizer: PreTrainedTokenizerBase) -> list[str]:
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


def _why_nothing_is_trained(parsed: Sequence[Parsed]) -> str:
    turns = [message for one in parsed if isinstance(one, Conversation) for message in one.messages]
    return NO_TURN if turns and not any(turn.role == "assistant" for turn in turns) else NOTHING_TRAINED


def _questions(parsed: Sequence[Parsed], where: Location, encoder: Encoder) -> Iterator[Question]:
    for one in parsed[:1]:  # of a preference pair, the answer that is preferred
        if isinstance(one, Conversation) and one.messages and one.messages[-1].role == "assistant":
            *before, answer = one.messages
            # Asked as it is trained: where a text is encoded in pieces depends on what is trained.
            rewrites = encoder.template is not None and encoder.template.rewrites_history
            asked = dataclasses.replace(one, messages=_untrained(before) if rewrites else tuple(before))
            yield Question(
                row_id=str(where),
                prompt=_last_content(before),
                prompt_ids=encoder.prompt(asked),
                reference=answer.content,
            )


def _last_content(messages: Sequence[Message]) -> str:
    return messages[-1].content if messages else ""


def _check_stop(data: Dataset, encoder: Encoder) -> None:
    """A model whose stop token is never trained does not stop. Rows that were cut cannot count."""
    if not encoder.stop_ids or encoder.template is None or not data.examples:
        return
    stop = set(encoder.stop_ids)
    for example in data.examples:
        if any(trained and token in stop for token, trained in zip(example.token_ids, example.loss_mask, strict=True)):
            return
    raise DataError(
        f"{data.examples[0].row_id}: no row trains the stop token {', '.join(encoder.template.stop)}, so the model "
        "would never end its answer; raise data.max_length if every row was cut, or mend the template"
    )
