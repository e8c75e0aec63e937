"""The native templates: known renderings, their own Jinja, refused conversations, and text that stays text."""

from __future__ import annotations

import dataclasses
import re
from itertools import groupby
from pathlib import Path
from typing import Any, cast

import jinja2
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sftx import Conversation, DataError, Message, ToolCall
from sftx.testing.rendered import PLAIN, SPECIAL
from templating import (
    BRIEFED,
    CALLED,
    REAL,
    ROUNDS,
    TOOLS,
    chat,
    encoded_by,
    encoder_of,
    own_text,
    real,
    template_of,
    text_of,
    tokenizer_of,
    tokenizer_with,
)

# --- the known renderings ---------------------------------------------------------------------------

_QWEN = "<|im_start|>system\nSYS<|im_end|>\n<|im_start|>user\nU<|im_end|>\n<|im_start|>assistant\n"
_DEEPSEEK = "<｜begin▁of▁sentence｜>SYS<｜User｜>U<｜Assistant｜>"
RENDERED = [
    ("chatml", "qwen2_5", _QWEN, "A<|im_end|>\n"),
    ("qwen2.5", "qwen2_5", _QWEN, "A<|im_end|>\n"),
    ("minimind", "qwen2_5", _QWEN, "A<|im_end|>\n"),
    ("qwen3", "qwen3", _QWEN, "<think>\n\n</think>\n\nA<|im_end|>\n"),
    (
        "llama3",
        "llama3_1",
        "<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\nSYS<|eot_id|><|start_header_id|>user"
        "<|end_header_id|>\n\nU<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n",
        "A<|eot_id|>",
    ),
    ("llama2", "llama2", "<s>[INST] <<SYS>>\nSYS\n<</SYS>>\n\nU [/INST]", " A </s>"),
    ("mistral", "llama2", "<s>[INST] SYS\n\nU[/INST]", " A</s>"),
    ("mistral", "mistral_nemo", "<s>[INST]SYS\n\nU[/INST]", "A</s>"),
    ("gemma", "gemma3", "<bos><start_of_turn>user\nSYS\n\nU<end_of_turn>\n<start_of_turn>model\n", "A<end_of_turn>\n"),
    ("gemma3", "gemma3", "<bos><start_of_turn>user\nSYS\n\nU<end_of_turn>\n<start_of_turn>model\n", "A<end_of_turn>\n"),
    ("phi", "qwen2_5", "<|system|>\nSYS<|end|>\n<|user|>\nU<|end|>\n<|assistant|>\n", "A<|end|>\n<|endoftext|>"),
    ("deepseek3", "deepseek_v3", _DEEPSEEK, "A<｜end▁of▁sentence｜>"),
    ("alpaca-template", "qwen2_5", "SYS### Instruction:\nU\n\n### Response:\n", "A<|im_end|>"),
    ("alpaca-template", "llama2", "<s>SYS### Instruction:\nU\n\n### Response:\n", "A</s>"),
    ("vicuna", "qwen2_5", "SYS USER: U ASSISTANT:", " A<|im_end|>"),
    ("vicuna", "llama2", "<s>SYS USER: U ASSISTANT:", " A</s>"),
    ("zephyr", "llama2", "<|system|>\nSYS</s>\n<|user|>\nU</s>\n<|assistant|>\n", "A</s>\n"),
    ("ma-rlhf", "llama2", "<s>\n#SYSTEM:SYS\n#USER:U\n#ASSISTANT:", "A</s>"),
    ("ma-rlhf", "qwen2_5", "\n#SYSTEM:SYS\n#USER:U\n#ASSISTANT:", "A<|im_end|>"),
]


@pytest.mark.parametrize(("name", "tokenizer", "prompt", "trained"), RENDERED)
def test_the_prompt_and_the_trained_text(name: str, tokenizer: str, prompt: str, trained: str) -> None:
    asked = chat(("system", "SYS"), ("user", "U"))
    template = template_of(name, tokenizer)
    segments = template.render(dataclasses.replace(asked, messages=(*asked.messages, Message("assistant", "A"))))
    assert text_of(segments) == prompt + trained
    assert text_of(segment for segment in segments if segment.trainable) == trained
    assert text_of(template.generation_prompt(asked)) == prompt
    roles = [role for role, _ in groupby(segment.role for segment in segments if segment.role)]
    assert roles[-1] == "assistant"
    assert set(roles) == {"system", "user", "assistant"}


def test_every_native_template_is_in_these_tests() -> None:
    from sftx.config.default_plugins import TEMPLATES

    assert {name for name, *_ in RENDERED} == set(REAL)
    # The others would fit any tokenizer, or any that ChatML fits, so that naming them would say nothing.
    assert set(REAL) - set(TEMPLATES) == {"alpaca-template", "vicuna", "zephyr", "ma-rlhf", "minimind"}


SECOND = [
    ("llama2", "llama2", "<s>[INST] a [/INST] b </s><s>[INST] c [/INST] d </s>"),
    ("mistral", "llama2", "<s>[INST] a[/INST] b</s>[INST] c[/INST] d</s>"),
    (
        "alpaca-template",
        "llama2",
        "<s>### Instruction:\na\n\n### Response:\nb</s>\n\n### Instruction:\nc\n\n### Response:\nd</s>",
    ),
    ("vicuna", "llama2", "<s>USER: a ASSISTANT: b</s>USER: c ASSISTANT: d</s>"),
    ("zephyr", "llama2", "<|user|>\na</s>\n<|assistant|>\nb</s>\n<|user|>\nc</s>\n<|assistant|>\nd</s>\n"),
    ("ma-rlhf", "llama2", "<s>\n#USER:a\n#ASSISTANT:b</s>\n#USER:c\n#ASSISTANT:d</s>"),
]


@pytest.mark.parametrize(("name", "tokenizer", "text"), SECOND)
def test_two_rounds(name: str, tokenizer: str, text: str) -> None:
    options: dict[str, Any] = {"default_system": None} if name in ("alpaca-template", "vicuna") else {}
    rounds = chat(("user", "a"), ("assistant", "b"), ("user", "c"), ("assistant", "d"))
    assert text_of(template_of(name, tokenizer, **options).render(rounds)) == text


def test_default_system_texts() -> None:
    asked = chat(("user", "U"))
    texts = {name: text_of(template_of(name, REAL[name]).generation_prompt(asked)) for name in ("qwen2.5", "minimind")}
    assert "system\nYou are Qwen, created by Alibaba Cloud. You are a helpful assistant.<|im_end|>" in texts["qwen2.5"]
    assert "system\nYou are a helpful assistant<|im_end|>" in texts["minimind"]
    with_tools = text_of(template_of("minimind", "qwen2_5").generation_prompt(dataclasses.replace(asked, tools=TOOLS)))
    assert with_tools.startswith("<|im_start|>system\n# Tools\n\n")


# --- the same format in Jinja ------------------------------------------------------------------------------

HARD = (
    *PLAIN,
    *SPECIAL[:-1],  # without the empty one, which apply_chat_template does not take
    BRIEFED,
    CALLED,
    dataclasses.replace(CALLED, tools=TOOLS),
    chat(
        ("system", "S"),
        ("user", 'He said "no" \\ <b>'),
        Message("assistant", "I look.", reasoning="Hm.", tool_calls=(ToolCall("weather", {"city": '"x"', "n": [1]}),)),
        Message("tool", '"30"'),
        Message("tool", "31"),
        Message("assistant", "30.", reasoning="So it is.\n"),
        ("user", "Thanks"),
        Message("assistant", "", reasoning="What now?", tool_calls=(ToolCall("a", {}), ToolCall("b", {"c": None}))),
        tools=TOOLS,
    ),
    chat(("user", "U"), Message("assistant", "", reasoning="So.", tool_calls=(ToolCall("weather", {}, "abcdefgh1"),))),
    chat(("user", "a"), Message("assistant", "A", reasoning="Hm."), ("user", "b"), ("assistant", " B\n")),
    chat(("user", " a\n"), ("assistant", ""), ("system", "late"), ("user", "b")),
    chat(("system", "alone")),
    chat(("system", ""), ("user", "a"), ("assistant", "b")),
)
VARIANTS = [
    *((name, {}) for name in REAL),
    ("chatml", {"default_system": "Be 'brief' and \"kind\"."}),
    ("qwen2.5", {"default_system": None}),
    ("qwen3", {"thinking": "strip"}),
    ("qwen3", {"thinking": "empty"}),
    ("llama3", {"dates": True}),
    ("mistral", {"place": "last"}),
    ("deepseek3", {"earlier_reasoning": "drop"}),
    ("alpaca-template", {"default_system": None}),
    ("vicuna", {"default_system": None}),
]


@pytest.mark.parametrize(("name", "options"), VARIANTS)
def test_the_chat_template_writes_and_refuses_the_same(name: str, options: dict[str, Any]) -> None:
    tokenizer, template = real(name, **options)
    written = 0
    for conversation in HARD:
        for prompt, method in ((False, template.render), (True, template.generation_prompt)):
            kwargs = {"chat_template": template.chat_template, "add_generation_prompt": prompt}
            try:
                segments = method(conversation)
            except DataError:
                with pytest.raises(jinja2.TemplateError):
                    own_text(tokenizer, conversation, **kwargs)
            else:
                assert own_text(tokenizer, conversation, **kwargs) == text_of(segments)
                written += 1
    assert written >= 2 * (len(PLAIN) + 2)


# --- nothing is dropped silently ------------------------------------------------------


@pytest.mark.parametrize("name", REAL)
def test_every_text_of_a_conversation_is_written_or_the_row_is_refused(name: str) -> None:
    _, template = real(name)
    thought = chat(("user", "U"), Message("assistant", "A", reasoning="because"))
    assert "<think>\nbecause\n</think>\n\nA" in text_of(template.render(thought))
    for conversation in HARD:
        try:
            text = text_of(template.render(conversation))
        except DataError:
            continue
        for message in conversation.messages:
            content = message.content.strip()
            assert content in text or (message.role == "tool" and name == "llama3")  # which writes it as JSON
            assert all(call.name in text for call in message.tool_calls)
            assert name == "qwen3" or message.reasoning in text
        assert all(tool["function"]["name"] in text for tool in conversation.tools)


@pytest.mark.parametrize(
    ("name", "conversation", "message"),
    [
        ("gemma", dataclasses.replace(ROUNDS, tools=TOOLS), "Gemma .*tools.* chatml.* qwen2.5"),
        ("vicuna", CALLED, "Vicuna .*tool calls.* chatml.* qwen2.5"),
        ("zephyr", chat(("user", "U"), ("tool", "21")), "Zephyr .*'tool'.* chatml"),
        ("llama3", chat(("narrator", "A pause.")), "Llama3 .*'narrator'"),
        ("gemma3", chat(("user", "a"), ("user", "b")), "Gemma3 .*alternating.* user, user"),
        ("llama2", chat(("system", "alone")), "Llama2 .*system text.* first user turn"),
        ("deepseek3", chat(("user", "a"), ("system", "b")), "DeepSeek3 .*system text"),
        ("llama3", chat(("user", "a"), Message("assistant", "x", tool_calls=(ToolCall("f", {}),))), "Llama3 .*'x'"),
        ("qwen3", chat(Message("user", "a", reasoning="x")), "'user'.*reasoning.*assistant"),
    ],
)
def test_a_conversation_that_a_template_cannot_write_is_refused(
    name: str, conversation: Conversation, message: str
) -> None:
    _, template = real(name)
    for method in (template.render, template.generation_prompt):
        with pytest.raises(DataError, match=message):
            method(conversation)


def test_a_tokenizer_without_the_tokens_for_tools_is_named() -> None:
    with pytest.raises(DataError, match=r"\[/AVAILABLE_TOOLS\], .* chatml"):
        template_of("mistral", "llama2").render(dataclasses.replace(ROUNDS, tools=TOOLS))


def test_tags_are_control_tokens_where_the_tokenizer_has_them() -> None:
    called = dataclasses.replace(CALLED, tools=TOOLS)
    for tokenizer, found in (("qwen3", {"<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>"}),
                             ("qwen2_5", {"<tool_call>", "</tool_call>"}), ("llama3_1", set())):  # fmt: skip
        made = tokenizer_with(tokenizer, ["<|im_start|>", "<|im_end|>"])
        segments = template_of("chatml", made).render(called)
        assert {s.text for s in segments if s.control} == found | {"<|im_start|>", "<|im_end|>"}


# --- text stays text --------------------------------------------------------------------------------


@pytest.mark.parametrize("name", REAL)
@settings(max_examples=20, deadline=None, database=None)
@given(data=st.data())
def test_a_rows_text_is_never_a_control_token(name: str, data: st.DataObject) -> None:
    tokenizer, encoder = encoded_by(name)
    template = encoder.template
    assert template is not None
    known = sorted({token.content for token in tokenizer.added_tokens_decoder.values()} | template.controls)
    piece = st.one_of(st.sampled_from(sorted(template.controls)), st.sampled_from(known), st.text(max_size=5))
    texts = [("".join(data.draw(st.lists(piece, min_size=1, max_size=6)))) for _ in range(3)]
    spelled = tuple(Message(role, text) for role, text in zip(("user", "assistant", "user"), texts, strict=True))
    harmless = chat(("user", "a"), ("assistant", "b"), ("user", "c"))
    controls = [segment for segment in template.render(harmless) if segment.control]
    segments = template.render(Conversation(spelled))
    assert [segment for segment in segments if segment.control] == controls
    try:
        ids = encoder.encode_segments(segments)[0]
    except DataError:  # the row goes to the ledger: this tokenizer cannot write such text as text
        return
    reserved = {tokenizer.convert_tokens_to_ids(token) for token in template.controls} | set(tokenizer.all_special_ids)
    assert sum(token in reserved for token in ids) == len(controls)


def test_names_arguments_results_and_tools_are_text_too() -> None:
    for name in ("qwen3", "mistral", "llama3", "deepseek3"):
        _, encoder = encoded_by(name)
        assert encoder.template is not None
        bad = " ".join(sorted(encoder.template.controls))

        def conversation(text: str) -> Conversation:
            call = ToolCall("f" + text, {"a": text})
            tools = () if name == "deepseek3" else ({"type": "function", "function": {"name": text}},)  # noqa: B023
            return chat(
                ("user", text), Message("assistant", "", tool_calls=(call,)), Message("tool", text), tools=tools
            )

        controls = [
            [segment.text for segment in encoder.template.render(conversation(text)) if segment.control]
            for text in ("x", bad)
        ]
        assert controls[0] == controls[1]
        ids = encoder.encode(conversation(bad))[0]
        reserved = set(encoder.tokenizer.convert_tokens_to_ids(sorted(encoder.template.controls)))
        assert sum(token in reserved for token in ids) == len(controls[1])


# --- SentencePiece ------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["llama2", "mistral", "vicuna", "alpaca-template", "zephyr", "ma-rlhf"])
def test_an_answer_after_plain_text_gets_no_space_of_sentencepiece(name: str) -> None:
    """Such a tokenizer puts a space before each text that it encodes, and the answer is encoded by itself."""
    tokenizer, encoder = tokenizer_of("llama2"), encoder_of(name, "llama2")
    assert encoder.template is not None
    asked = chat(("user", "U"))
    conversation = dataclasses.replace(asked, messages=(*asked.messages, Message("assistant", "A")))
    ids, num = encoder.encode(conversation)[0], len(encoder.prompt(asked))
    joined = tokenizer(text_of(encoder.template.render(conversation)), add_special_tokens=False)["input_ids"]
    assert ids == joined
    assert ids[:num] == encoder.prompt(asked)


# --- the page ---------------------------------------------------------------------------------------


def test_the_page_describes_the_templates() -> None:
    page = (Path(__file__).parents[2] / "docs" / "templates.md").read_text(encoding="utf-8")
    rows = [row.split(" | ") for row in re.findall(r"^\| (`[^`]+` \| .+) \|$", page, flags=re.MULTILINE)]
    table = {row[0].strip("`"): row[1:] for row in rows if len(row) == 6}
    assert set(table) == set(REAL)
    for name, (_, begin, system, tools, thoughts) in table.items():
        tokenizer, template = real(name)
        opened = template.render(chat(("user", "U"), ("assistant", "A")))[0]
        assert begin == ("no" if opened.text != tokenizer.bos_token else "yes"), name
        turns = text_of(template.render(chat(("system", "SYS"), ("user", "USED"), ("assistant", "A"))))
        between = turns[turns.index("SYS") + 3 : turns.index("USED")]
        own_turn = any(end in between for end in template.stop)
        assert system.startswith("a turn" if own_turn else "text"), name
        written = {"definitions", "calls"}
        for what, conversation in (("definitions", dataclasses.replace(ROUNDS, tools=TOOLS)), ("calls", CALLED)):
            try:
                template.render(conversation)
            except DataError:
                written.remove(what)
        assert tools == {0: "no", 1: "calls and results", 2: "yes"}[len(written)], name
        options = {field.name for field in dataclasses.fields(cast(Any, template))}
        assert set(re.findall(r"`(\w+)`", thoughts)) <= options, name
    options = set(re.findall(r"^\| `[^|]+` \| `(\w+)` \|", page, flags=re.MULTILINE))
    assert options == {field.name for name in REAL for field in dataclasses.fields(cast(Any, real(name)[1]))}
