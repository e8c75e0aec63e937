"""What can be told of a chat template before the first row: by having it write a few conversations."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import replace
from typing import Final

from sftx import Conversation, DataError, Message, PluginError, ToolCall
from sftx_plugins.templates.jinja.data import Form
from sftx_plugins.templates.jinja.turns import Turns, common_length

_TOOL: Final = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "Tells the weather.",
        "parameters": {
            "type": "object",
            "properties": {"place": {"type": "string", "description": "A town."}},
            "required": ["place"],
        },
    },
}
_CALLS: Final = tuple(
    ToolCall("weather", {"place": place}, id) for place, id in (("Oslo", "oslo00001"), ("Rome", "rome00001"))
)
_SYSTEM = Message("system", "Be brief.")
_QUESTIONS: Final = (Message("user", "Where?"), Message("user", "And when?"))
_ANSWERS: Final = (Message("assistant", "Here."), Message("assistant", "Now."))
_THOUGHTS: Final = tuple(replace(answer, reasoning=f"Hm {n}.") for n, answer in enumerate(_ANSWERS))


def _rounds(*answers: Message) -> tuple[Message, ...]:
    return tuple(turn for pair in zip(_QUESTIONS, answers, strict=True) for turn in pair)


def _called(num_calls: int, reasoning: str = "") -> Conversation:
    calls = _CALLS[:num_calls]
    asking = Message("assistant", "", reasoning=reasoning, tool_calls=calls)
    results = [Message("tool", f"{n} degrees", name=call.name, tool_call_id=call.id) for n, call in enumerate(calls)]
    answer = replace(_ANSWERS[0], reasoning=reasoning)
    return Conversation((_QUESTIONS[0], asking, *results, answer, _QUESTIONS[1], _ANSWERS[1]), tools=(_TOOL,))


_CONTENTS: Final = (Form(), Form(content_as_parts=True))
_PLAIN: Final = Conversation(_rounds(*_ANSWERS))
_OTHERS: Final = (
    Conversation((_SYSTEM, *_PLAIN.messages)),
    Conversation(_rounds(*_THOUGHTS)),
    _called(1),
    _called(2),
    _called(2, "Let me see."),
)


def probed(turns: Turns) -> tuple[Turns, bool]:
    """The same, with all that is known of the template, and whether it rewrites history.

    Raises PluginError with the reason when masks cannot be found even for plain turns.
    """
    plain = _plain(turns)
    turns = replace(turns, form=_form(turns, plain))
    turns = replace(turns, stop=(_stop(turns, plain),))
    turns = replace(turns, tail=_tail(turns, plain))
    turns = replace(turns, stop=(*turns.stop, *_stop_of_calls(turns)))
    rewriting = [_rewrites(turns, conversation) for conversation in (plain, *_OTHERS)]
    if rewriting[0] is None:
        raise PluginError(f"whose turn is where in what the chat template writes cannot be told: {_why(turns, plain)}")
    return turns, any(rewriting)


def _plain(turns: Turns) -> Conversation:
    """Plain turns as this template writes them: some are made for conversations with tools only."""
    for tools in ((), (_TOOL,)):
        plain = replace(_PLAIN, tools=tools)
        if any(_writes(replace(turns, form=form), plain) for form in _CONTENTS):
            return plain
    raise PluginError(f"the chat template cannot write a plain conversation: {_why(turns, _PLAIN)}")


def _form(turns: Turns, plain: Conversation) -> Form:
    """How contents and calls have to be given so that they are written."""
    form = next(form for form in _CONTENTS if _writes(replace(turns, form=form), plain))
    for num_calls, text, null in itertools.product((2, 1), (False, True), (False, True)):
        other = replace(form, arguments_as_text=text, null_content=null)
        if _writes(replace(turns, form=other), _called(num_calls)):
            return other
    return form


def _writes(turns: Turns, conversation: Conversation) -> bool:
    shape = turns.shape(conversation)
    try:
        turns.check_kept(shape, turns.write(shape))
    except DataError:
        return False
    return True


def _why(turns: Turns, plain: Conversation) -> str:
    """The reason that makes plain turns impossible, asked of one turn alone if that is the trouble."""
    for conversation in (*_units(plain), plain):
        try:
            turns.regions(turns.shape(conversation))
        except DataError as error:
            return str(error)
    return "nothing is wrong with it"


def _stop(turns: Turns, plain: Conversation) -> str:
    """The last control token that an answer ends with, whether another turn follows or not."""
    shape = turns.shape(replace(plain, messages=plain.messages[:3]))
    written, followed = turns.write(shape, 2), turns.write(shape)
    (answer,) = shape.said(1, reasoning=False)
    start = max(part.end for part in written.parts if part.number == answer)
    common = common_length(written.text, followed.text)
    after = [part for part in written.parts if part.control and part.start >= start]
    # What stands only at the end of everything, such as Phi's <|endoftext|>, ends no turn, if something else does.
    kept = [part for part in after if part.end <= common] or after
    if not kept:
        raise PluginError(
            f"the chat template ends an answer with {written.text[start:]!r:.60}, where the tokenizer has no control "
            "token, so a trained model would never stop; if it should be one, name it with "
            "--set 'tokenizer.controls=[TOKEN]' and add it with --add-tokens"
        )
    return kept[-1].text


def _tail(turns: Turns, plain: Conversation) -> str:
    """What a generation prompt ends with that is not how the template's own answers begin, such as `<think>`."""
    shape = turns.shape(replace(plain, messages=plain.messages[:2]))
    before, asked = turns.write(shape, 1).text, turns.write(shape, 1, prompt=True).text
    whole = turns.write(shape)
    if before == asked and whole.text.startswith(before):
        (answer,) = shape.said(1, reasoning=False)
        start = next(part.start for part in whole.parts if part.number == answer)
        header = [part.text for part in whole.parts if part.control and len(before) <= part.start < start]
        if header:
            raise PluginError(
                f"the chat template writes {header[0]} before an answer and no generation prompt, so where the answer "
                "begins cannot be told; it must obey add_generation_prompt"
            )
    same = common_length(asked, whole.text)
    within = next((part for part in whole.parts if part.control and part.start < same < part.end), None)
    if same < len(asked) and within is not None:
        same = within.start
    if same < len(asked) and same <= common_length(before, asked):
        raise PluginError(
            f"the chat template asks for an answer with {asked[len(before) :]!r:.60} and writes one in another way, so "
            "where an answer begins cannot be told"
        )
    return asked[same:]


def _stop_of_calls(turns: Turns) -> Iterator[str]:
    """The token that ends a turn which only calls, where that is another one."""
    for conversation in (_called(2), _called(1)):
        shape = turns.shape(Conversation(conversation.messages[:2], conversation.tools))
        try:
            written = turns.write(shape)
            turns.check_kept(shape, written)
        except DataError:
            continue
        end = max(part.end for part in written.parts if part.number is not None)
        after = [part for part in written.parts if part.control and part.start >= end]
        if after and not any(part.text in turns.stop for part in after):
            stop = after[-1]
            if not written.text[stop.end :].strip() and sum(part.text == stop.text for part in written.parts) == 1:
                yield stop.text
        return


def _rewrites(turns: Turns, conversation: Conversation) -> bool | None:
    """Whether turns change once others follow; None when this conversation cannot be written at all."""
    if _regions(turns, conversation):
        return False
    return True if all(_regions(turns, unit) for unit in _units(conversation)) else None


def _regions(turns: Turns, conversation: Conversation) -> bool:
    try:
        turns.regions(turns.shape(conversation))
    except DataError:
        return False
    return True


def _units(conversation: Conversation) -> Iterator[Conversation]:
    """Each answer with what led to it, none of which is trained."""
    for end, message in enumerate(conversation.messages):
        if message.trained:
            before = (replace(turn, trainable=False) for turn in conversation.messages[:end])
            yield replace(conversation, messages=(*before, message))
