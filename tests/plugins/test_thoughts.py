"""Thoughts in the text of an answer: each is read as Qwen3's own template reads it, or its row is refused."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from typing import Any

import pytest

from sftx import Conversation, DataError, Location, Message
from sftx_plugins.parsers._thoughts import split_reasoning
from sftx_plugins.parsers.alpaca import Alpaca
from sftx_plugins.parsers.hh_rlhf import HHRLHF
from sftx_plugins.parsers.messages import Messages
from sftx_plugins.parsers.prompt_completion import PromptCompletion
from sftx_plugins.parsers.sharegpt import ShareGPT
from templating import encoder_of, own_template, own_text, template_of, text_of, tokenizer_of

WHERE = Location("rows.jsonl", 7)
USER = {"role": "user", "content": "What is 2 + 2?"}
THOUGHT = "two and two make four"

READ = {
    "a thought": f"<think>\n{THOUGHT}\n</think>\n\n4",
    "opened by the prompt": f"{THOUGHT}\n</think>\n\n4",
    "on one line": f"<think>{THOUGHT}</think>4",
    "after white space": f"\n\n <think>{THOUGHT}</think>\n4",
    "several lines": f"<think>\n{THOUGHT}\n\nAnd on.\n</think>\n\n  4 \n",
    "empty": "<think>\n\n</think>\n\n4",
    "empty and opened by the prompt": "\n</think>\n\n4",
    "nothing but a thought": f"<think>\n{THOUGHT}\n</think>",
    "nothing but a thought that the prompt opened": f"{THOUGHT}\n</think>\n\n",
    "no tags": "4",
    "a fence that the thought leaves open": f"```\n{THOUGHT}\n</think>\n\n4",
    "half of a block of code": f"Well.\n```\n{THOUGHT}\n</think>\n\n4\n```",
    "words in quotation marks around the tag": f'{THOUGHT}, so "4"</think>"4"',
}
"""Texts that are split as Qwen3's own template splits them."""
REFUSED = {
    "not closed": f"<think>\n{THOUGHT}",
    "not closed after other text": f"Well. <think>{THOUGHT}",
    "closed twice": f"<think>{THOUGHT}</think>4</think>",
    "two thoughts": f"<think>{THOUGHT}</think>4<think>is it?</think>5",
    "nested": f"<think>a<think>{THOUGHT}</think>b</think>4",
    "opened twice": f"<think><think>{THOUGHT}</think>4",
    "reversed": f"</think>{THOUGHT}<think>4",
    "after other text": f"Well. <think>{THOUGHT}</think>4",
    "two ends": f"{THOUGHT}</think>4</think>",
    "closed by another tag": f"<think>{THOUGHT}</thinking>4",
    "opened by another tag": f"<thinking>{THOUGHT}</think>4",
    "a block of code that holds half of it": f"<think>a</think>Well.\n```\n{THOUGHT}\n</think>\n\n4\n```",
    "another kind after it": f"<think>{THOUGHT}</think>4 [THINK]a[/THINK]",
    "another kind, not closed": f"<thinking>{THOUGHT}",
    "another kind, twice": f"<thinking>{THOUGHT}</thinking>4<thinking>a</thinking>5",
    "a tool call in the thought, which ends after it": f"<think>{THOUGHT}<tool_call></think></tool_call></think>4",
}
MENTIONED = {
    "in code": "Write `</think>` after it.",
    "a pair in code": "`<think>…</think>` holds the thought.",
    "in a fence": 'Like this:\n```python\nre.sub(r"<think>.*?</think>", "", text)\n```\nDone.',
    "a single tag in a block": 'So:\n```python\ntext.split("</think>")[-1]\n```',
    "in quotation marks": 'The tag "</think>" ends it.',
    "a pair in quotation marks": "It is “<think>so</think>” there.",
}
SPELLINGS = {
    "<thinking>": "</thinking>",
    "<Think>": "</Think>",
    "[THINK]": "[/THINK]",
    "<|begin_of_thought|>": "<|end_of_thought|>",
    "<seed:think>": "</seed:think>",
    "◁think▷": "◁/think▷",
    "<|START_THINKING|>": "<|END_THINKING|>",
}

ROWS: dict[str, Callable[[str], Any]] = {
    "messages": lambda text: Messages().parse({"messages": [USER, {"role": "assistant", "content": text}]}, WHERE),
    "parts": lambda text: Messages().parse(
        {"messages": [USER, {"role": "assistant", "content": [{"type": "text", "text": text}]}]}, WHERE
    ),
    "sharegpt": lambda text: ShareGPT().parse(
        {"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": text}]}, WHERE
    ),
    "alpaca": lambda text: Alpaca().parse({"instruction": "a", "output": text}, WHERE),
    "history": lambda text: Alpaca().parse({"instruction": "a", "output": "b", "history": [["q", text]]}, WHERE),
    "completion": lambda text: PromptCompletion().parse({"prompt": "a", "completion": text}, WHERE),
    "list as completion": lambda text: PromptCompletion().parse(
        {"prompt": [USER], "completion": [{"role": "assistant", "content": text}]}, WHERE
    ),
    "transcript": lambda text: HHRLHF().parse({"chosen": f"\n\nHuman: a\n\nAssistant: {text}"}, WHERE),
    "chosen": lambda text: HHRLHF().parse({"chosen": [USER, {"role": "assistant", "content": text}]}, WHERE),
}


def answer(text: str, read: Callable[[str], Any] = ROWS["messages"]) -> Message:
    (conversation,) = read(text)
    return next(m for m in conversation.messages if m.role == "assistant")


def conversation(text: str) -> Conversation:
    (found,) = ROWS["messages"](text)
    assert isinstance(found, Conversation)
    return found


@pytest.mark.parametrize("text", READ.values(), ids=READ)
def test_a_row_renders_as_in_qwen3s_own_template(text: str) -> None:
    row = [USER, {"role": "assistant", "content": text}]
    expected = own_text("qwen3", row, chat_template=own_template("Qwen-Qwen3-0.6B"))
    parsed = conversation(text)
    assert text_of(template_of("qwen3", "qwen3").render(parsed)) == expected
    # The thought and its tags are segments of their own, and it is not in the answer.
    thoughts = [s for s in template_of("qwen3", "qwen3").render(parsed) if s.text in ("<think>", "</think>")]
    assert [s.control for s in thoughts] == [True, True]
    assert THOUGHT not in parsed.messages[1].content


def test_random_texts_render_as_in_qwen3s_own_template_or_are_refused() -> None:
    rng = random.Random(3)
    own = own_template("Qwen-Qwen3-0.6B")
    pieces = ["<think>", "</think>", "\n", " ", "So.", "4", '"', "```", "`"]
    outcomes = {"read": 0, "refused": 0, "mentioned": 0}
    for _ in range(3000):
        text = "".join(rng.choices(pieces, [5, 5, 3, 2, 3, 3, 2, 1, 2], k=rng.randint(1, 7)))
        try:
            parsed = conversation(text)
        except DataError:
            outcomes["refused"] += 1
            continue
        said = parsed.messages[1]
        if "think" in said.content + said.reasoning:
            outcomes["mentioned"] += 1
            assert any(mark in text for mark in ('"', "`"))
            continue
        outcomes["read"] += 1
        rendered = text_of(template_of("qwen3", "qwen3").render(parsed))
        assert rendered == own_text("qwen3", [USER, {"role": "assistant", "content": text}], chat_template=own), text
    assert min(outcomes.values()) > 20, outcomes


@pytest.mark.parametrize("text", REFUSED.values(), ids=REFUSED)
def test_tags_that_are_not_one_thought_before_the_answer_are_refused_by_every_parser(text: str) -> None:
    for read in ROWS.values():
        with pytest.raises(DataError, match=r"^rows\.jsonl:7: .*(?i:think).*; expected one thought, before the an"):
            read(text)


@pytest.mark.parametrize("text", READ.values(), ids=READ)
def test_every_parser_splits_a_thought_off_alike(text: str) -> None:
    for name, read in ROWS.items():
        if name == "transcript":  # it strips white space around each text
            assert answer(text, read) == answer(text.strip())
        else:
            assert answer(text, read) == answer(text)


@pytest.mark.parametrize("text", MENTIONED.values(), ids=MENTIONED)
def test_a_tag_that_is_only_mentioned_is_text(text: str) -> None:
    assert answer(text) == Message("assistant", text)
    assert answer(f"<think>{THOUGHT}</think>{text}") == Message("assistant", text, reasoning=THOUGHT)
    assert answer(f"<think>They ask about `<think>`.</think>{text}").reasoning == "They ask about `<think>`."


@pytest.mark.parametrize("opening", SPELLINGS)
def test_a_thought_in_another_models_tags_is_a_thought(opening: str) -> None:
    close = SPELLINGS[opening]
    expected = Message("assistant", "4", reasoning=THOUGHT)
    assert answer(f"{opening}\n{THOUGHT}\n{close}\n\n4") == expected
    assert answer(f"{THOUGHT}\n{close}\n\n4") == expected


@pytest.mark.parametrize("text", [READ["a thought"], READ["opened by the prompt"], f"[THINK]{THOUGHT}[/THINK]4"])
def test_no_template_trains_a_thought_as_the_answer(text: str) -> None:
    for name, tokenizer in (
        ("chatml", "qwen3"),
        ("qwen3", "qwen3"),
        ("deepseek3", "deepseek_v3"),
        ("llama3", "llama3_1"),
    ):
        for options in ({}, {"thinking": "strip"}, {"thinking": "empty"}):
            if name != "qwen3" and options:
                continue
            segments = template_of(name, tokenizer, **options).render(conversation(text))
            written = text_of(segments)
            assert written.count("</think>") == 1
            assert (THOUGHT in written) == (not options)
            after = written.partition("</think>")[2]
            assert after.lstrip("\n").startswith("4")
    dropped = template_of("deepseek3", "deepseek_v3", earlier_reasoning="drop")
    asked = (*conversation(text).messages, Message("user", "And 3 + 3?"), Message("assistant", "6"))
    assert THOUGHT not in text_of(dropped.render(Conversation(asked)))


def test_a_thought_without_an_answer_is_refused_where_the_thought_is_not_trained() -> None:
    only = conversation(f"<think>{THOUGHT}</think>\n\n")
    for thinking in ("strip", "empty"):
        with pytest.raises(DataError, match=rf"and no answer, so thinking={thinking} leaves nothing to train"):
            template_of("qwen3", "qwen3", thinking=thinking).render(only)


def test_tags_in_a_turn_of_the_user_or_of_a_tool_are_plain_text() -> None:
    for text in (*READ.values(), *REFUSED.values()):
        record = {
            "messages": [
                {"role": "user", "content": text},
                {"role": "assistant", "content": "", "tool_calls": [{"name": "f", "arguments": {}}]},
                {"role": "tool", "content": text},
                {"role": "assistant", "content": "4"},
            ]
        }
        (found,) = Messages().parse(record, WHERE)
        assert [found.messages[n].content for n in (0, 2)] == [text, text]
        encoder = encoder_of("chatml", "qwen3")
        think = tokenizer_of("qwen3").convert_tokens_to_ids(["<think>", "</think>"])
        assert not set(think) & set(encoder.encode(found)[0])


FIELDS = ("reasoning_content", "reasoning", "thinking")


@pytest.mark.parametrize("key", FIELDS)
def test_reasoning_in_a_field_and_in_the_text(key: str) -> None:
    def read(content: Any, **fields: Any) -> Message:
        turn = {"role": "assistant", "content": content, **fields}
        (found,) = Messages().parse({"messages": [USER, turn]}, WHERE)
        return found.messages[1]

    expected = Message("assistant", "4", reasoning=THOUGHT)
    assert read("4", **{key: THOUGHT}) == expected
    assert read(f"<think>\n{THOUGHT}\n</think>\n\n4", **{key: THOUGHT}) == expected
    assert read(f"<think>{THOUGHT}</think>4", **{key: ""}) == expected
    assert read(None, **{key: THOUGHT}).content == ""
    parts = [{"type": "thinking", "thinking": "other"}, {"type": "text", "text": "4"}]
    for content in ("<think>other</think>4", "<think>\n\n</think>4", "other</think>4", parts):
        with pytest.raises(
            DataError, match=rf"messages\[1\].{key} and .*messages\[1\].content have different reasoning"
        ):
            read(content, **{key: THOUGHT})
    for thought in (f"<think>{THOUGHT}</think>", f"{THOUGHT}</think>", f"<think>{THOUGHT}"):
        with pytest.raises(DataError, match=rf"messages\[1\].{key} has </?think>; leave out the tags"):
            read("4", **{key: thought})
    assert read("4", **{key: "They ask about `</think>`."}).reasoning == "They ask about `</think>`."
    for other in FIELDS:
        if other != key:
            assert read("4", **{key: THOUGHT, other: THOUGHT}) == expected
            with pytest.raises(DataError, match=r"have different reasoning .*; keep one of them"):
                read("4", **{key: THOUGHT, other: "another"})


@pytest.mark.parametrize("text", ["", f"<think>{THOUGHT}</think>", f"{THOUGHT}</think>"])
def test_a_call_after_a_thought(text: str) -> None:
    arguments = {"code": "re.sub('</think>', '', text)", "tag": "<think>"}
    call = json.dumps({"name": "f", "arguments": arguments})
    (found,) = ShareGPT().parse({"conversations": [{"from": "function_call", "value": text + call}]}, WHERE)
    assert found.messages[0].reasoning == (THOUGHT if text else "")
    assert found.messages[0].tool_calls[0].arguments == arguments


@pytest.mark.parametrize("text", ["<think>", "</think>\n", "`</think>", '"<think>', "```</think>", "~~~ ", "<think>`"])
def test_a_megabyte_of_tags_is_refused_with_a_short_error(text: str) -> None:
    with pytest.raises(DataError) as refused:
        split_reasoning("<think>" + text * 100_000 + "</think>4</think>", "output", WHERE)
    assert len(str(refused.value)) < 200
