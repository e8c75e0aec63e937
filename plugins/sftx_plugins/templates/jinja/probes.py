"""Properties of a chat template, found before the first row by rendering a few conversations."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import replace
from typing import Final

from sftx import Conversation, DataError, Message, PluginError, ToolCall
from sftx_plugins.templates.jinja.placeholders import MessageFormat
from sftx_plugins.templates.jinja.regions import RegionFinder, common_prefix_length

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
_QUESTIONS: Final = (Message("user", "Where?"), Message("user", "And when?"))
_ANSWERS: Final = (Message("assistant", "Here."), Message("assistant", "Now."))
_REASONED: Final = tuple(replace(answer, reasoning=f"Hm {n}.") for n, answer in enumerate(_ANSWERS))


def _tool_conversation(num_calls: int, reasoning: str = "") -> Conversation:
    calls = _CALLS[:num_calls]
    calling = Message("assistant", "", reasoning=reasoning, tool_calls=calls)
    results = [Message("tool", f"{n} degrees", name=call.name, tool_call_id=call.id) for n, call in enumerate(calls)]
    answer = replace(_ANSWERS[0], reasoning=reasoning)
    return Conversation((_QUESTIONS[0], calling, *results, answer, _QUESTIONS[1], _ANSWERS[1]), tools=(_TOOL,))


_CONTENTS: Final = (MessageFormat(), MessageFormat(content_as_parts=True))
_PLAIN: Final = Conversation((_QUESTIONS[0], _ANSWERS[0], _QUESTIONS[1], _ANSWERS[1]))
_OTHERS: Final = (
    Conversation((Message("system", "Be brief."), *_PLAIN.messages)),
    Conversation((_QUESTIONS[0], _REASONED[0], _QUESTIONS[1], _REASONED[1])),
    _tool_conversation(1),
    _tool_conversation(2),
    _tool_conversation(2, "Let me see."),
)


def probe(finder: RegionFinder) -> tuple[RegionFinder, bool]:
    """Return the finder with all properties of its template set, and whether the template rewrites history.

    Raises PluginError with the reason if the trained regions of plain turns cannot be found.
    """
    plain = _plain_conversation(finder)
    finder = replace(finder, message_format=_message_format(finder, plain))
    finder = replace(finder, stop=(_stop_token(finder, plain),))
    finder = replace(finder, prompt_suffix=_prompt_suffix(finder, plain))
    finder = replace(finder, stop=(*finder.stop, *_stop_tokens_of_calls(finder)))
    rewrites = [_rewrites(finder, conversation) for conversation in (plain, *_OTHERS)]
    if rewrites[0] is None:
        raise PluginError(f"which text of the chat template belongs to which turn is unclear: {_reason(finder, plain)}")
    return finder, any(rewrites)


def _plain_conversation(finder: RegionFinder) -> Conversation:
    """Return plain turns that the template can write. Some templates need tools."""
    for tools in ((), (_TOOL,)):
        plain = replace(_PLAIN, tools=tools)
        if any(_can_write(finder, message_format, plain) for message_format in _CONTENTS):
            return plain
    raise PluginError(f"the chat template cannot write a plain conversation: {_reason(finder, _PLAIN)}")


def _message_format(finder: RegionFinder, plain: Conversation) -> MessageFormat:
    """Return the format of contents and tool calls in which the template writes them."""
    contents = next(message_format for message_format in _CONTENTS if _can_write(finder, message_format, plain))
    for num_calls, as_text, null in itertools.product((2, 1), (False, True), (False, True)):
        message_format = replace(contents, arguments_as_text=as_text, null_content=null)
        if _can_write(finder, message_format, _tool_conversation(num_calls)):
            return message_format
    return contents


def _can_write(finder: RegionFinder, message_format: MessageFormat, conversation: Conversation) -> bool:
    finder = replace(finder, message_format=message_format)
    skeleton = finder.skeleton(conversation)
    try:
        finder.check_nothing_lost(skeleton, finder.render(skeleton))
    except DataError:
        return False
    return True


def _reason(finder: RegionFinder, plain: Conversation) -> str:
    """Return why the regions of plain turns cannot be found; the reason of a single turn if that already fails."""
    for conversation in (*_single_answers(plain), plain):
        try:
            finder.trained_regions(finder.skeleton(conversation))
        except DataError as error:
            return str(error)
    return "no reason is known"


def _stop_token(finder: RegionFinder, plain: Conversation) -> str:
    """Return the last control token that ends an answer, whether another turn follows or not."""
    skeleton = finder.skeleton(replace(plain, messages=plain.messages[:3]))
    rendering, followed = finder.render(skeleton, 2), finder.render(skeleton)
    (answer,) = skeleton.texts_of(1, reasoning=False)
    start = max(part.end for part in rendering.parts if part.placeholder == answer)
    common = common_prefix_length(rendering.text, followed.text)
    after = [part for part in rendering.parts if part.control and part.start >= start]
    # A token at the end of everything, such as Phi's <|endoftext|>, ends a turn only if nothing else does.
    kept = [part for part in after if part.end <= common] or after
    if not kept:
        raise PluginError(
            f"the chat template ends an answer with {rendering.text[start:]!r:.60}, where the tokenizer has no control "
            "token, so a trained model would never stop; if it should be one, name it with "
            "--set 'tokenizer.controls=[TOKEN]' and add it with --add-tokens"
        )
    return kept[-1].text


def _prompt_suffix(finder: RegionFinder, plain: Conversation) -> str:
    """Return the end of the generation prompt that the template's own answers do not begin with, such as `<think>`."""
    skeleton = finder.skeleton(replace(plain, messages=plain.messages[:2]))
    question, prompt = finder.render(skeleton, 1).text, finder.render(skeleton, 1, prompt=True).text
    answered = finder.render(skeleton)
    if question == prompt and answered.text.startswith(question):
        (answer,) = skeleton.texts_of(1, reasoning=False)
        start = next(part.start for part in answered.parts if part.placeholder == answer)
        header = [part.text for part in answered.parts if part.control and len(question) <= part.start < start]
        if header:
            raise PluginError(
                f"the chat template writes {header[0]} before an answer and no generation prompt, so where the answer "
                "begins is unclear; it must obey add_generation_prompt"
            )
    same = common_prefix_length(prompt, answered.text)
    inside = next((part for part in answered.parts if part.control and part.start < same < part.end), None)
    if same < len(prompt) and inside is not None:
        same = inside.start
    if same < len(prompt) and same <= common_prefix_length(question, prompt):
        raise PluginError(
            f"the chat template asks for an answer with {prompt[len(question) :]!r:.60} and writes one in another way, "
            "so where an answer begins is unclear"
        )
    return prompt[same:]


def _stop_tokens_of_calls(finder: RegionFinder) -> Iterator[str]:
    """Yield the token that ends a turn with tool calls alone, if it is another one."""
    for conversation in (_tool_conversation(2), _tool_conversation(1)):
        skeleton = finder.skeleton(Conversation(conversation.messages[:2], conversation.tools))
        try:
            rendering = finder.render(skeleton)
            finder.check_nothing_lost(skeleton, rendering)
        except DataError:
            continue
        end = max(part.end for part in rendering.parts if part.placeholder is not None)
        after = [part for part in rendering.parts if part.control and part.start >= end]
        if after and not any(part.text in finder.stop for part in after):
            stop = after[-1]
            is_unique = sum(part.text == stop.text for part in rendering.parts) == 1
            if is_unique and not rendering.text[stop.end :].strip():
                yield stop.text
        return


def _rewrites(finder: RegionFinder, conversation: Conversation) -> bool | None:
    """Return whether turns render differently once others follow; None if this conversation cannot be written."""
    if _has_regions(finder, conversation):
        return False
    return True if all(_has_regions(finder, single) for single in _single_answers(conversation)) else None


def _has_regions(finder: RegionFinder, conversation: Conversation) -> bool:
    try:
        finder.trained_regions(finder.skeleton(conversation))
    except DataError:
        return False
    return True


def _single_answers(conversation: Conversation) -> Iterator[Conversation]:
    """Yield each answer as a conversation of its own, with the untrained turns before it."""
    for end, message in enumerate(conversation.messages):
        if message.trained:
            before = (replace(turn, trainable=False) for turn in conversation.messages[:end])
            yield replace(conversation, messages=(*before, message))
