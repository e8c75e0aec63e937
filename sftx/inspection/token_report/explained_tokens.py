"""The tokens of a row's examples, each with its text, its role, and the reason why it is a label token or not.

Reasons are derived independently of training, so the resulting ids, labels and weights are compared with those that
training gets: see `explain_row`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Final

from sftx.config.options import DataConfig
from sftx.data import truncate
from sftx.data.encoder import EncodedRun, Encoder
from sftx.data.row_encoder import EncodedRow, RowEncoder, mark_trained, split_units
from sftx.data.token_text import token_texts
from sftx.errors import PluginError
from sftx.types import Conversation, Example, Message, Parsed, PlainText, Segment, Tokens

_MIN_SUBSTRING: Final = 8
"""A message of at least so many characters is recognised inside a longer segment; a shorter one must be all of it."""
_UNSTABLE: Final = "the template writes this row differently each time, so it cannot be shown"


@dataclass(frozen=True, slots=True)
class ExplainedToken:
    """One token as training gets it; the fields are those of `sftx inspect --json`."""

    id: int
    text: str
    """Empty for a token that continues the character of an earlier token."""
    role: str
    """The role of the turn it belongs to; empty when the template does not say."""
    control: bool
    trained: bool
    """True for a label token."""
    weight: float
    why: str
    """The reason why it is trained or not."""


def explain_row(encode: RowEncoder, parsed: Sequence[Parsed], row: EncodedRow) -> list[list[ExplainedToken]]:
    """Return the tokens of each of the row's examples; a dropped row has all its tokens, none of them trained.

    Raises PluginError when ids, labels or weights differ from those in `row`, because the template does not write the
    same row the same way each time.
    """
    if encode.answer_length is not None and row.questions:
        return [_question_tokens(question.prompt_ids, encode.encoder) for question in row.questions]
    explained: list[list[ExplainedToken]] = []
    for written in parsed:
        for unit in split_units(mark_trained(written, encode.config), encode.encoder):
            reasons = _message_reasons(written, unit, encode.config)
            tokens = _explain_unit(encode, unit, reasons)
            if not row.examples or len(tokens) <= encode.config.max_length or encode.wrapped:
                explained.append(tokens)
                continue
            labelled, is_control = encode.labelled, encode.encoder.is_control
            truncated = truncate.fit(unit, labelled(unit), encode.config, is_control, labelled)
            if truncated.unit is not unit:
                tokens = _explain_unit(encode, truncated.unit, reasons)
            explained += [[tokens[index] for index in kept] for kept in truncated.kept]
    if not row.examples:
        why = "the row does not reach training"
        return [[dataclasses.replace(t, trained=False, weight=1.0, why=why) for t in tokens] for tokens in explained]
    if len(explained) != len(row.examples) or not all(map(_is_equal, explained, row.examples)):
        raise PluginError(f"{row.where}: {_UNSTABLE}")
    return explained


def _is_equal(tokens: Sequence[ExplainedToken], example: Example) -> bool:
    weights = [1.0] * len(tokens) if example.weights is None else example.weights.tolist()
    return (
        [token.id for token in tokens] == example.token_ids.tolist()
        and [token.trained for token in tokens] == example.loss_mask.tolist()
        and all(abs(token.weight - weight) <= 1e-6 * weight for token, weight in zip(tokens, weights, strict=True))
    )


def _explain_unit(encode: RowEncoder, unit: Parsed, reasons: dict[int, str]) -> list[ExplainedToken]:
    """Return every token of a unit before it is truncated, with the labels that the run's options give it."""
    token_ids, loss_mask, weights = encode.labelled(unit)
    if isinstance(unit, Conversation):
        tokens = list(_conversation_tokens(unit, encode.encoder, reasons))
    elif isinstance(unit, PlainText):
        tokens = list(_text_tokens(unit.text, token_ids, encode.encoder))
    else:
        tokens = list(_id_tokens(unit, encode.encoder))
    if [token.id for token in tokens] != token_ids:
        raise PluginError(_UNSTABLE)
    explained = []
    for number, (token, is_label, weight) in enumerate(zip(tokens, loss_mask, weights, strict=True)):
        why = token.why
        if is_label and not token.trained:
            why = "trained: data.train_on_prompt"
        elif token.trained and not is_label:
            why = "not trained: data.train_turn_end=false"
        if is_label and number == 0:
            why += "; has no effect, since no token before it could predict it"
        if is_label and weight != 1:
            why += f"; weight {weight:g}"
        explained.append(dataclasses.replace(token, trained=is_label, weight=weight, why=why))
    return explained


# --- conversations ------------------------------------------------------------------------------


def _message_reasons(written: Parsed, unit: Parsed, config: DataConfig) -> dict[int, str]:
    """Return why each message of `unit`, by its `id()`, is trained or not.

    `written` is the conversation as the row has it. `mark_trained` decides which messages are trained, and a template
    that rewrites history makes a unit of each of them.
    """
    if not (isinstance(written, Conversation) and isinstance(unit, Conversation)):
        return {}
    marked = mark_trained(written, config)
    assert isinstance(marked, Conversation)
    in_row = [m for m in written.messages if config.system is None or m.role != "system"]
    # None stands for the system message that the run's options add.
    rows: list[Message | None] = [*[None] * (len(marked.messages) - len(in_row)), *in_row]
    # A unit holds the first messages of the marked conversation, in the same order.
    return {
        id(message): _message_reason(message, was_marked, row, config)
        for message, was_marked, row in zip(unit.messages, marked.messages, rows, strict=False)
    }


def _message_reason(message: Message, marked: Message, row: Message | None, config: DataConfig) -> str:
    if message.trained:
        is_by_row = row is not None and row.trainable is True
        return "trained: the row says so" if is_by_row else f"trained: the {message.role}'s turn"
    if marked.trained:
        return "not trained here: this turn is trained in an example of its own"
    if row is not None and row.trainable is False:
        return "not trained: the row says so"
    if message.role not in config.train_roles:
        return f"not trained: {message.role}"
    return "not trained: data.train_turns=last"


def _conversation_tokens(
    conversation: Conversation, encoder: Encoder, reasons: dict[int, str]
) -> Iterator[ExplainedToken]:
    assert encoder.template is not None
    at = 0  # the message that the last segment came from
    for run in encoder.runs(encoder.template.render(conversation)):
        if run.control:
            for segment, token_id in zip(run.segments, run.token_ids, strict=True):
                kind = "control token" + (" that ends the turn" if token_id in encoder.stop_ids else "")
                why = f"{kind}, {'trained' if segment.trainable else 'not trained'}"
                yield ExplainedToken(token_id, segment.text, segment.role, True, segment.trainable, segment.weight, why)
            continue
        segment_reasons = []
        for segment in run.segments:
            numbers = range(at, len(conversation.messages))
            number = next((n for n in numbers if _is_from(segment, conversation.messages[n])), None)
            at = at if number is None else number
            message = None if number is None else conversation.messages[number]
            segment_reasons.append(_segment_reason(segment, message, reasons))
        yield from _plain_tokens(run, encoder, segment_reasons)


def _is_from(segment: Segment, message: Message) -> bool:
    """Return whether a plain segment holds text of the message, so that the message's reason applies to it."""
    if segment.role not in ("", message.role):
        return False
    parts = [text for part in (message.content, message.reasoning) if (text := part.strip())]
    if segment.text.strip() in parts or any(len(part) >= _MIN_SUBSTRING and part in segment.text for part in parts):
        return True
    return any(f'"{call.name}"' in segment.text for call in message.tool_calls)


def _segment_reason(segment: Segment, message: Message | None, reasons: dict[int, str]) -> str:
    if message is None:
        return f"the template's own text, {'trained with the turn' if segment.trainable else 'not trained'}"
    if segment.trainable != message.trained:
        return f"{'trained' if segment.trainable else 'not trained'}: the template says so"
    return reasons.get(id(message), "trained" if segment.trainable else "not trained")


def _plain_tokens(run: EncodedRun, encoder: Encoder, reasons: Sequence[str]) -> Iterator[ExplainedToken]:
    """Yield the tokens of plain segments that were encoded as one text; `reasons` has one entry for each segment."""
    text = "".join(segment.text for segment in run.segments)
    at, begin, end = 0, 0, len(run.segments[0].text)  # the current segment, the token's begin, the segment's end
    for token_id, piece in zip(run.token_ids, _text_pieces(text, encoder, continues=run.continues), strict=True):
        # A token that spans two segments belongs to the one in which it begins.
        while at + 1 < len(run.segments) and end <= begin:
            at += 1
            end += len(run.segments[at].text)
        segment = run.segments[at]
        yield ExplainedToken(token_id, piece, segment.role, False, segment.trainable, segment.weight, reasons[at])
        begin += len(piece)


def _text_pieces(text: str, encoder: Encoder, *, continues: bool) -> Iterator[str]:
    """Yield the part of `text` that each of its tokens stands for; joined, the parts are exactly `text`.

    Unlike decoded tokens, the parts keep what the tokenizer drops or normalises. When several tokens hold the bytes of
    one character, the first gets the character and the others get an empty text.
    """
    begin = 0
    spans = encoder.offsets(text, continues=continues)
    for number, (_, end) in enumerate(spans, 1):
        end = len(text) if number == len(spans) else max(end, begin)
        yield text[begin:end]
        begin = end


# --- rows without a template --------------------------------------------------------------------


def _text_tokens(text: str, token_ids: Sequence[int], encoder: Encoder) -> Iterator[ExplainedToken]:
    """Yield the tokens of a plain text and of the control tokens that the encoder puts before and after it."""
    plain = encoder.plain(text)
    first = next((n for n in range(len(token_ids)) if list(token_ids[n : n + len(plain)]) == plain), 0)
    for number, token_id in enumerate(token_ids):
        if number == first:
            for plain_id, piece in zip(plain, _text_pieces(text, encoder, continues=False), strict=True):
                yield ExplainedToken(plain_id, piece, "", False, True, 1.0, "trained: plain text, every token is")
        if not first <= number < first + len(plain):
            why = f"control token that {'begins' if number < first else 'ends'} the text, trained"
            name = str(encoder.tokenizer.convert_ids_to_tokens(token_id))
            yield ExplainedToken(token_id, name, "", True, True, 1.0, why)


def _question_tokens(prompt_ids: Sequence[int], encoder: Encoder) -> list[ExplainedToken]:
    """Return the tokens of a question, which a rollout answers."""
    texts, why = token_texts(prompt_ids, encoder.tokenizer), "not trained: the question, which the model answers"
    return [
        ExplainedToken(token_id, text, "", encoder.is_control(token_id), False, 1.0, why)
        for token_id, text in zip(prompt_ids, texts, strict=True)
    ]


def _id_tokens(tokens: Tokens, encoder: Encoder) -> Iterator[ExplainedToken]:
    """Yield the tokens of a row that holds token ids and a loss mask itself."""
    texts = token_texts(tokens.token_ids, encoder.tokenizer)
    for token_id, is_label, text in zip(tokens.token_ids, tokens.loss_mask, texts, strict=True):
        why = f"{'trained' if is_label else 'not trained'}: the row's own mask"
        yield ExplainedToken(token_id, text, "", encoder.is_control(token_id), is_label, 1.0, why)
