"""Tests of the template contract: good templates of several forms, and bad ones that break one clause each."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import pytest

from contracts import assert_every_clause_is_broken, assert_fails, assert_fails_only, assert_passes, whole_suite_cases
from sftx import Conversation, DataError, Message, Segment, hookimpl
from sftx.testing import ContractError
from sftx.testing.kit import built_in
from sftx.testing.template import SUITE, check_template
from sftx_plugins.templates.chatml import END, START, ChatML

EOT = "<|endoftext|>"

# --- good templates of other forms ----------------------------------------------------------------


class Brackets:
    """Has no system turn; the answer begins right after the prompt, and ends with the tokenizer's end of text."""

    controls: ClassVar[frozenset[str]] = frozenset({"[INST]", "[/INST]", "</s>"})
    stop: ClassVar[tuple[str, ...]] = ("</s>",)
    rewrites_history: ClassVar[bool] = False
    chat_template: ClassVar[str | None] = (
        "{% for m in messages %}{% if m.role == 'user' %}[INST]{{ m.content.strip() }}[/INST]"
        "{% else %}{{ m.content.strip() }}</s>{% endif %}{% endfor %}"
    )

    @hookimpl
    def sftx_template(self) -> Any:
        return self

    def render(self, conversation: Conversation) -> tuple[Segment, ...]:
        return tuple(self._segments(conversation))

    generation_prompt = render

    def _segments(self, conversation: Conversation) -> Iterator[Segment]:
        roles = [message.role for message in conversation.messages]
        by_turns = all(role == ("user", "assistant")[number % 2] for number, role in enumerate(roles))
        if conversation.tools or not by_turns:
            raise DataError(f"[INST] takes a user and an assistant by turns, not {', '.join(roles)}")
        for message in conversation.messages:
            asks = message.role == "user"
            if asks:
                yield Segment("[INST]", control=True)
            yield Segment(message.content.strip(), message.trained, weight=message.weight)
            end = "[/INST]" if asks else "</s>"
            yield Segment(end, message.trained and not asks, control=True, weight=message.weight)


class Instruction(Brackets):
    """Writes headings as plain text; its only control token is the end of text, which ends every answer."""

    controls: ClassVar[frozenset[str]] = frozenset({EOT})
    stop: ClassVar[tuple[str, ...]] = (EOT,)
    chat_template: ClassVar[str | None] = None
    headings: ClassVar[dict[str, str]] = {"user": "### Instruction:\n", "assistant": "### Response:\n"}

    def _segments(self, conversation: Conversation) -> Iterator[Segment]:
        for message in conversation.messages:
            yield Segment(self.headings.get(message.role, f"### {message.role}\n"))
            yield Segment(message.content, message.trained, weight=message.weight)
            if message.role == "assistant":
                yield Segment(EOT, message.trained, control=True, weight=message.weight)
            yield Segment("\n\n")

    def generation_prompt(self, conversation: Conversation) -> tuple[Segment, ...]:
        return (*self.render(conversation), Segment(self.headings["assistant"]))


class Thinking(ChatML):
    """Writes an empty thought before the last answer only, so that earlier turns change when a turn follows."""

    controls: ClassVar[frozenset[str]] = frozenset({START, END, "<think>", "</think>"})
    rewrites_history: ClassVar[bool] = True
    chat_template: ClassVar[str | None] = None

    def render(self, conversation: Conversation) -> tuple[Segment, ...]:
        segments = super().render(conversation)
        if not conversation.messages or conversation.messages[-1].role != "assistant":
            return segments
        last = conversation.messages[-1]
        empty = [("<think>", True), ("\n\n", False), ("</think>", True), ("\n\n", False)]
        thought = [Segment(text, last.trained, control, weight=last.weight) for text, control in empty]
        return (*segments[:-3], *thought, *segments[-3:])


GOOD = [built_in("chatml"), built_in("chatml", default_system="Be 'brief'."), Brackets(), Instruction(), Thinking()]


@pytest.mark.parametrize("plugin", GOOD, ids=lambda plugin: type(plugin).__name__)
def test_good_templates_keep_every_clause(plugin: object) -> None:
    assert_passes(SUITE, plugin)


# --- bad ones, at least one for each clause ---------------------------------------------------


class Changed(ChatML):
    """ChatML whose `turn` rewrites the five segments of each turn."""

    chat_template = None

    def _segments(self, conversation: Conversation) -> Iterator[Segment]:
        for message in conversation.messages:
            yield from self.turn(message, *ChatML._segments(self, Conversation((message,))))

    def turn(self, message: Message, *segments: Segment) -> Any:
        return segments


class GivesNumber(ChatML):
    @hookimpl
    def sftx_template(self) -> Any:
        return 3


class StopsNever(ChatML):
    stop = ()


class StopsOnStray(ChatML):
    stop = (EOT,)


class KnowsThreeRoles(ChatML):
    def _segments(self, conversation: Conversation) -> Iterator[Segment]:
        names = {"system": "system", "user": "user", "assistant": "assistant"}
        turns = tuple(dataclasses.replace(m, role=names[m.role]) for m in conversation.messages)
        return super()._segments(dataclasses.replace(conversation, messages=turns))


class WritesOneRound(ChatML):
    def _segments(self, conversation: Conversation) -> Iterator[Segment]:
        if len(conversation.messages) > 3:
            raise DataError("one question and one answer, please")
        return super()._segments(conversation)


class GivesText(ChatML):
    def render(self, conversation: Conversation) -> Any:
        return "".join(segment.text for segment in super().render(conversation))


class GivesStrings(ChatML):
    def render(self, conversation: Conversation) -> Any:
        return tuple(segment.text for segment in super().render(conversation))


class SpellsStart(ChatML):
    def render(self, conversation: Conversation) -> Any:
        return [dataclasses.replace(s, control=s.text == END) for s in super().render(conversation)]


class SpellsUndeclared(Changed):
    def render(self, conversation: Conversation) -> Any:
        return (Segment(EOT), *super().render(conversation))


class UndeclaredControl(Changed):
    def render(self, conversation: Conversation) -> Any:
        return (Segment(EOT, control=True), *super().render(conversation))


class TwoControlsInOne(Changed):
    def turn(self, message: Message, *segments: Segment) -> Any:
        return (*segments[:3], Segment(END + END, message.trained, control=True))


class CountsCalls(ChatML):
    calls: ClassVar[Iterator[int]] = itertools.count()

    def render(self, conversation: Conversation) -> Any:
        *others, newline = super().render(conversation) or [Segment("")]
        return (*others, dataclasses.replace(newline, trainable=next(self.calls) % 2 == 0))


class TakesExtras(ChatML):
    def render(self, conversation: Conversation) -> Any:
        conversation.extras.pop("topics", None)  # type: ignore[attr-defined]
        return super().render(conversation)


class DropsSystem(Changed):
    def turn(self, message: Message, *segments: Segment) -> Any:
        return () if message.role == "system" else segments


class WritesTwice(Changed):
    def turn(self, message: Message, *segments: Segment) -> Any:
        return (*segments[:3], *segments[2:])


class QuestionFirst(Changed):
    def _segments(self, conversation: Conversation) -> Iterator[Segment]:
        turns = sorted(conversation.messages, key=lambda message: message.role == "system")
        return super()._segments(Conversation(tuple(turns)))


class TrainsQuestions(Changed):
    def turn(self, message: Message, *segments: Segment) -> Any:
        return (*segments[:2], dataclasses.replace(segments[2], trainable=True), *segments[3:])


class TrainsHalf(Changed):
    def turn(self, message: Message, *segments: Segment) -> Any:
        middle = len(message.content) // 2
        halves = Segment(message.content[:middle], message.trained), Segment(message.content[middle:])
        return (*segments[:2], *halves, *segments[3:])


class LeavesStop(Changed):
    def turn(self, message: Message, *segments: Segment) -> Any:
        return (*segments[:3], Segment(END, control=True), *segments[4:])


class StopsOnAnother(ChatML):
    controls = frozenset({START, END, EOT})
    stop = (EOT,)


class TrainsEveryAnswer(ChatML):
    def _segments(self, conversation: Conversation) -> Iterator[Segment]:
        turns = (
            dataclasses.replace(m, trainable=None if m.trainable is False else m.trainable)
            for m in conversation.messages
        )
        return super()._segments(dataclasses.replace(conversation, messages=tuple(turns)))


class TrainsNoQuestion(Changed):
    def turn(self, message: Message, *segments: Segment) -> Any:
        if message.role == "assistant":
            return segments
        return [dataclasses.replace(segment, trainable=False) for segment in segments]


class AlwaysTrainsStop(Changed):
    def turn(self, message: Message, *segments: Segment) -> Any:
        return (*segments[:3], Segment(END, message.role == "assistant", control=True, weight=message.weight))


class IgnoresWeight(Changed):
    def turn(self, message: Message, *segments: Segment) -> Any:
        return [dataclasses.replace(segment, weight=1.0) for segment in segments]


class WeighsNoStop(Changed):
    def turn(self, message: Message, *segments: Segment) -> Any:
        return (*segments[:3], Segment(END, message.trained, control=True), *segments[4:])


class ReadsControls(Changed):
    def turn(self, message: Message, *segments: Segment) -> Any:
        before, found, after = message.content.partition(END)
        content = segments[2]
        if not found:
            return segments
        found = dataclasses.replace(content, text=END, control=True)
        parts = dataclasses.replace(content, text=before), found, dataclasses.replace(content, text=after)
        return (*segments[:2], *parts, *segments[3:])


class Sanitises(Changed):
    def turn(self, message: Message, *segments: Segment) -> Any:
        clean = dataclasses.replace(segments[2], text=message.content.replace(START, ""))
        return (*segments[:2], clean, *segments[3:])


class AsksAnother(Changed):
    def generation_prompt(self, conversation: Conversation) -> Any:
        return (*self._segments(conversation), Segment(START, control=True), Segment("model\n"))


class AsksTooShort(Changed):
    def generation_prompt(self, conversation: Conversation) -> Any:
        return (*self._segments(conversation), Segment(START, control=True))


class TrainsHeader(Changed):
    def turn(self, message: Message, *segments: Segment) -> Any:
        return (segments[0], Segment(segments[1].text, message.trained, weight=message.weight), *segments[2:])


class AsksWithoutMask(ChatML):
    """Encodes the prompt as one text and the training text in parts: the same characters, but other tokens."""

    controls = frozenset({END})
    chat_template = None

    def render(self, conversation: Conversation) -> Any:
        return tuple(self._segments(conversation))

    def generation_prompt(self, conversation: Conversation) -> Any:
        segments = (*self._segments(conversation), Segment("assistant: "))
        return [dataclasses.replace(segment, trainable=False) for segment in segments]

    def _segments(self, conversation: Conversation) -> Iterator[Segment]:
        for message in conversation.messages:
            yield Segment(f"{message.role}: ")
            yield Segment(message.content, message.trained, weight=message.weight)
            yield Segment(END, message.trained, control=True, weight=message.weight)


class RewritesUnsaid(Thinking):
    rewrites_history = False


class JinjaForgetsLine(ChatML):
    @property
    def chat_template(self) -> str:
        return super().chat_template.replace("\\n", "")


class JinjaForgetsPrompt(ChatML):
    @property
    def chat_template(self) -> str:
        return super().chat_template.partition("{% if add")[0]


class JinjaRefuses(ChatML):
    chat_template = "{{ raise_exception('not today') }}"


class NeverTrainsSystem(ChatML):
    def render(self, conversation: Conversation) -> tuple[Segment, ...]:
        turns = [dataclasses.replace(m, trainable=False) if m.role == "system" else m for m in conversation.messages]
        return super().render(dataclasses.replace(conversation, messages=tuple(turns)))


BAD = [
    (NeverTrainsSystem, "obeys-the-message", "of the system's"),
    (GivesNumber, "made", "returned int, expected a Template"),
    (StopsNever, "controls-exist", "`stop` is empty"),
    (StopsOnStray, "controls-exist", "stop tokens <|endoftext|> are not among its controls"),
    (KnowsThreeRoles, "writes-turns", "the turns user, assistant, tool, assistant raised KeyError"),
    (WritesOneRound, "writes-turns", "were refused with DataError; every template has to render those"),
    (GivesText, "writes-segments", "render returned '<|im_start|>user"),
    (GivesStrings, "writes-segments", "render returned ('<|im_start|>', 'user"),
    (SpellsStart, "writes-segments", "render wrote <|im_start|> within plain text"),
    (SpellsUndeclared, "writes-segments", "name it in `controls`"),
    (UndeclaredControl, "writes-segments", "render wrote '<|endoftext|>' with control=True, which is not one token"),
    (TwoControlsInOne, "writes-segments", "render wrote '<|im_end|><|im_end|>' with control=True"),
    (CountsCalls, "deterministic", "draw no random numbers"),
    (TakesExtras, "deterministic", "render changed its conversation"),
    (DropsSystem, "keeps-content", "the system's 'Reply as a chemist would.' occurs 0 times"),
    (WritesTwice, "keeps-content", "occurs 2 times"),
    (QuestionFirst, "keeps-content", "before the content of an earlier turn"),
    (TrainsQuestions, "trains-the-answers", "characters are trained; give its segment trainable=message.trained"),
    (TrainsHalf, "trains-the-answers", "characters are not trained"),
    (LeavesStop, "trains-the-stop", "is not trained, so the model would never stop"),
    (StopsOnAnother, "trains-the-stop", "comes '<|im_end|>', expected <|endoftext|>"),
    (TrainsEveryAnswer, "obeys-the-message", "with trainable=False, "),
    (TrainsNoQuestion, "obeys-the-message", "with trainable=True, "),
    (AlwaysTrainsStop, "obeys-the-message", "neither may its stop token"),
    (IgnoresWeight, "obeys-the-message", "has the weight 1, expected 0.25"),
    (WeighsNoStop, "obeys-the-message", "has the weight 1, expected 0.25"),
    (ReadsControls, "keeps-text-text", "contents that spell <|im_end|> made render write"),
    (Sanitises, "keeps-text-text", "render changed the user's"),
    (AsksAnother, "prompt-is-a-prefix", "<|im_start|>model\\n' and '"),
    (AsksTooShort, "prompt-is-a-prefix", "is not trained"),
    (TrainsHeader, "prompt-is-a-prefix", "is in the generation prompt and is trained"),
    (AsksWithoutMask, "prompt-is-a-prefix", "begin differently"),
    (RewritesUnsaid, "keeps-history", "rewrites_history = True"),
    (JinjaForgetsLine, "chat-template-agrees", "chat_template and render write"),
    (JinjaForgetsPrompt, "chat-template-agrees", "chat_template and generation_prompt write"),
    (JinjaRefuses, "chat-template-agrees", "not today"),
]


@pytest.mark.parametrize(("bad", "clause", "message"), BAD)
def test_a_bad_template_fails_its_clause_with_a_message(bad: type, clause: str, message: str) -> None:
    assert_fails(SUITE, bad(), clause, message)


@pytest.mark.parametrize(("bad", "clause"), whole_suite_cases(BAD))
def test_a_bad_template_fails_nothing_else(bad: type, clause: str) -> None:
    assert_fails_only(SUITE, bad(), clause)


def test_every_clause_of_the_template_has_a_bad_one() -> None:
    assert_every_clause_is_broken(SUITE, (clause for _, clause, _ in BAD))


def test_with_a_model_of_its_own_a_template_needs_that_tokenizers_tokens(tiny_model: Path) -> None:
    check_template(ChatML(), model=tiny_model)
    with pytest.raises(ContractError, match=r"needs the control tokens </s>, \[/INST\], \[INST\], which the tokenizer"):
        check_template(Brackets(), model=tiny_model)
