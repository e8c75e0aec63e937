"""A row becomes its tokens, each with its text, whose turn it is of, and why it is trained or not.

What is shown is taken from what training gets and compared with it, id by id: see `examples`.
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
from sftx.errors import PluginError
from sftx.types import Conversation, Example, Message, Parsed, PlainText, Segment, Tokens

_SURELY_NOT_BY_CHANCE: Final = 8
"""Characters of a message that are recognised inside of a longer segment; shorter ones must be all of it."""
_LONGEST_CHARACTER: Final = 8
"""Tokens that may make one character together: bytes of UTF-8, with room for an emoji's joiners."""


@dataclass(frozen=True, slots=True)
class Token:
    """One token as training gets it."""

    id: int
    text: str
    """Empty when it goes on with a character whose first bytes an earlier token holds."""
    role: str
    """Whose turn; empty where the template does not say."""
    control: bool
    trained: bool
    weight: float
    why: str
    """Why it is trained or not, in a few words."""


def examples(encode: RowEncoder, parsed: Sequence[Parsed], row: EncodedRow) -> list[list[Token]]:
    """The tokens of each of the row's examples; of a dropped row, those that it would have had, none of them trained.

    Raises PluginError when they are not the very ids, mask and weights that `row` has: a template that writes the
    same row differently each time.
    """
    found: list[list[Token]] = []
    for one in parsed:
        for unit in split_units(mark_trained(one, encode.config), encode.encoder):
            explain = _Explain(encode, one, unit)
            found += explain.pieces() if row.examples else [explain.tokens(unit)]
    if not row.examples:
        why = "the row does not reach training"
        return [[dataclasses.replace(token, trained=False, weight=1.0, why=why) for token in one] for one in found]
    if len(found) != len(row.examples) or not all(map(_agree, found, row.examples)):
        raise PluginError(f"{row.where}: the template writes this row differently each time, so it cannot be shown")
    return found


def _agree(tokens: Sequence[Token], example: Example) -> bool:
    weights = [1.0] * len(tokens) if example.weights is None else example.weights.tolist()
    return (
        [token.id for token in tokens] == example.token_ids.tolist()
        and [token.trained for token in tokens] == example.loss_mask.tolist()
        and all(abs(token.weight - weight) <= 1e-6 * weight for token, weight in zip(tokens, weights, strict=True))
    )


class _Explain:
    """Explains one unit of a row, and what is left of it when it is too long."""

    def __init__(self, encode: RowEncoder, written: Parsed, unit: Parsed) -> None:
        self._encode = encode
        self._unit = unit
        self._reasons = _reasons(written, unit, encode.config)

    def pieces(self) -> list[list[Token]]:
        """The tokens of each example that the unit becomes."""
        config, encoder = self._encode.config, self._encode.encoder
        whole = self.tokens(self._unit)
        if len(whole) <= config.max_length or self._encode.wrapped:
            return [whole]
        labelled = self._encode.labelled
        cut = truncate.fit(self._unit, labelled(self._unit), config, encoder.is_control, labelled)
        tokens = whole if cut.unit is self._unit else self.tokens(cut.unit)
        return [[tokens[n] for n in kept] for kept in cut.kept]

    def tokens(self, parsed: Parsed) -> list[Token]:
        """Every token of a unit, or of a shorter form of it."""
        token_ids, loss_mask, weights = self._encode.labelled(parsed)
        encoder = self._encode.encoder
        if isinstance(parsed, Conversation):
            found = list(_of_conversation(parsed, encoder, self._reasons))
        elif isinstance(parsed, PlainText):
            found = list(_of_text(parsed.text, token_ids, encoder))
        else:
            found = list(_of_ids(parsed, encoder))
        if [token.id for token in found] != token_ids:
            raise PluginError("the template writes this row differently each time, so it cannot be shown")
        return [
            _labelled(token, trained, weight, is_first=n == 0)
            for n, (token, trained, weight) in enumerate(zip(found, loss_mask, weights, strict=True))
        ]


def _labelled(token: Token, trained: bool, weight: float, *, is_first: bool) -> Token:
    """The token with what the run's options make of its label."""
    why = token.why
    if trained and not token.trained:
        why = "trained: data.train_on_prompt"
    elif token.trained and not trained:
        why = "not trained: data.train_turn_end=false"
    if trained and is_first:
        why += "; counts for nothing, since no token stands before it that could predict it"
    if trained and weight != 1:
        why += f"; weight {weight:g}"
    return dataclasses.replace(token, trained=trained, weight=weight, why=why)


# --- conversations ------------------------------------------------------------------------------


def _reasons(written: Parsed, unit: Parsed, config: DataConfig) -> dict[int, str]:
    """Why each message of the unit is trained or not, by the message's identity."""
    if not (isinstance(written, Conversation) and isinstance(unit, Conversation)):
        return {}
    marked = mark_trained(written, config)
    assert isinstance(marked, Conversation)
    rows = [m for m in written.messages if config.system is None or m.role != "system"]
    said = [*[None] * (len(marked.messages) - len(rows)), *rows]  # None: the system text that the run gives it
    # A unit holds the first messages of what was marked, in their order.
    return {
        id(message): _reason(message, was_marked, row, config)
        for message, was_marked, row in zip(unit.messages, marked.messages, said, strict=False)
    }


def _reason(message: Message, marked: Message, row: Message | None, config: DataConfig) -> str:
    if message.trained:
        by_row = row is not None and row.trainable is True
        return "trained: the row says so" if by_row else f"trained: the {message.role}'s turn"
    if marked.trained:
        return "not trained here: this turn is trained in an example of its own"
    if row is not None and row.trainable is False:
        return "not trained: the row says so"
    if message.role not in config.train_roles:
        return f"not trained: {message.role}"
    return "not trained: data.train_turns=last"


def _of_conversation(conversation: Conversation, encoder: Encoder, reasons: dict[int, str]) -> Iterator[Token]:
    assert encoder.template is not None
    turns = _Turns(conversation)
    stop = set(encoder.stop_ids)
    for run in encoder.runs(encoder.template.render(conversation)):
        if run.control:
            for segment, token_id in zip(run.segments, run.token_ids, strict=True):
                what = "control token" + (" that ends the turn" if token_id in stop else "")
                why = f"{what}, {'trained' if segment.trainable else 'not trained'}"
                yield Token(token_id, segment.text, segment.role, True, segment.trainable, segment.weight, why)
        else:
            yield from _of_run(run, encoder, [_why(s, turns.of(s), reasons) for s in run.segments])


def _of_run(run: EncodedRun, encoder: Encoder, whys: Sequence[str]) -> Iterator[Token]:
    """The tokens of plain segments that were encoded as one text."""
    text = "".join(segment.text for segment in run.segments)
    ends, end = [], 0
    for segment in run.segments:
        end += len(segment.text)
        ends.append(end)
    shown, at = 0, 0
    for token_id, piece in zip(run.token_ids, _pieces(text, encoder, continues=run.continues), strict=True):
        # A token that spans two segments goes with the one that it begins in.
        while at + 1 < len(ends) and ends[at] <= shown:
            at += 1
        segment = run.segments[at]
        yield Token(token_id, piece, segment.role, False, segment.trainable, segment.weight, whys[at])
        shown += len(piece)


def _pieces(text: str, encoder: Encoder, *, continues: bool) -> Iterator[str]:
    """The text of each token of `encoder.plain(text)`; joined they are `text`, whatever the tokenizer leaves out.

    Of tokens that hold bytes of one character, the first has the character and the others nothing.
    """
    shown = 0
    spans = encoder.offsets(text, continues=continues)
    for n, (_, end) in enumerate(spans):
        end = len(text) if n + 1 == len(spans) else max(end, shown)
        yield text[shown:end]
        shown = end


class _Turns:
    """Finds the message that a segment says, going forward through a conversation."""

    def __init__(self, conversation: Conversation) -> None:
        self._messages = conversation.messages
        self._at = 0

    def of(self, segment: Segment) -> Message | None:
        """None for what the template says by itself."""
        for at in range(self._at, len(self._messages)):
            message = self._messages[at]
            if segment.role in ("", message.role) and _says(segment.text, message):
                self._at = at
                return message
        return None


def _says(text: str, message: Message) -> bool:
    texts = [said for part in (message.content, message.reasoning) if (said := part.strip())]
    if text.strip() in texts or any(len(said) >= _SURELY_NOT_BY_CHANCE and said in text for said in texts):
        return True
    return any(f'"{call.name}"' in text for call in message.tool_calls)


def _why(segment: Segment, message: Message | None, reasons: dict[int, str]) -> str:
    if message is None:
        return f"the template's own text, {'trained with the turn' if segment.trainable else 'not trained'}"
    if segment.trainable != message.trained:
        return f"{'trained' if segment.trainable else 'not trained'}: the template says so"
    return reasons.get(id(message), "trained" if segment.trainable else "not trained")


# --- what needs no template ---------------------------------------------------------------------


def _of_text(text: str, token_ids: Sequence[int], encoder: Encoder) -> Iterator[Token]:
    plain = encoder.plain(text)
    first = next((n for n in range(len(token_ids)) if list(token_ids[n : n + len(plain)]) == plain), 0)
    for n, token_id in enumerate(token_ids):
        if n == first:
            for plain_id, piece in zip(plain, _pieces(text, encoder, continues=False), strict=True):
                yield Token(plain_id, piece, "", False, True, 1.0, "trained: plain text, every token is")
        if not first <= n < first + len(plain):
            why = f"control token that {'begins' if n < first else 'ends'} the text, trained"
            name = str(encoder.tokenizer.convert_ids_to_tokens(token_id))
            yield Token(token_id, name, "", True, True, 1.0, why)


def _of_ids(tokens: Tokens, encoder: Encoder) -> Iterator[Token]:
    texts = _decoded(tokens.token_ids, encoder)
    for token_id, trained, text in zip(tokens.token_ids, tokens.loss_mask, texts, strict=True):
        why = f"{'trained' if trained else 'not trained'}: the row's own mask"
        yield Token(token_id, text, "", encoder.is_control(token_id), trained, 1.0, why)


def _decoded(token_ids: Sequence[int], encoder: Encoder) -> list[str]:
    """The text of each; of those that make one character together, all of it on the first."""
    texts: list[str] = []
    waiting: list[int] = []
    for token_id in token_ids:
        waiting.append(token_id)
        text = str(encoder.tokenizer.decode(waiting, skip_special_tokens=False, clean_up_tokenization_spaces=False))
        if not text.endswith("\N{REPLACEMENT CHARACTER}") or len(waiting) == _LONGEST_CHARACTER:
            texts += [text, *[""] * (len(waiting) - 1)]
            waiting.clear()
    return texts + ["\N{REPLACEMENT CHARACTER}"] * len(waiting)
