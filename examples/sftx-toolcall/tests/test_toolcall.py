"""The contracts of the hooks that the plugin fills, the text that it writes, and its scores."""

from __future__ import annotations

import json
from typing import Any

import pytest
from sftx import Conversation, DataError, Message, PluginError
from sftx.testing import check_metric, check_template

from sftx_toolcall import ToolCall

LIGHTS = '{"function": "set_light", "arguments": {"room": "kitchen", "on": true, "level": 5}}'
ROWS = [
    {"prompt": f"wait {n} minutes", "completion": json.dumps({"function": "timer", "arguments": {"minutes": n}})}
    for n in range(1, 7)
]


def test_it_keeps_the_contract_of_a_template() -> None:
    check_template(ToolCall())


def test_it_keeps_the_contract_of_a_metric() -> None:
    check_metric(ToolCall())
    check_metric(ToolCall(partial=0))


def test_the_text_of_a_conversation(tiny_tokenizer: Any) -> None:
    turns = [("system", "Call a function."), ("user", "lights on"), ("assistant", LIGHTS), ("user", "thanks")]
    conversation = Conversation(tuple(Message(role, content) for role, content in turns))
    template = ToolCall().sftx_template(tiny_tokenizer)
    expected = (
        f"### System\nCall a function.\n\n### Request\nlights on\n\n### Call\n{LIGHTS}<|endoftext|>\n\n"
        "### Request\nthanks"
    )
    assert "".join(segment.text for segment in template.render(conversation)) == expected
    asked = template.generation_prompt(conversation)
    assert "".join(segment.text for segment in asked) == f"{expected}\n\n### Call\n"
    assert [segment.text for segment in template.render(conversation) if segment.trainable] == [LIGHTS, "<|endoftext|>"]


def test_a_text_begins_with_bos_if_the_tokenizer_adds_it(tiny_tokenizer: Any) -> None:
    from tokenizers.processors import TemplateProcessing

    tiny_tokenizer.bos_token = "<|im_start|>"
    start = tiny_tokenizer.bos_token_id
    plain = ToolCall().sftx_template(tiny_tokenizer)
    assert not any(segment.text == "<|im_start|>" for segment in plain.render(Conversation((Message("user", "hi"),))))
    tiny_tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<|im_start|> $A", special_tokens=[("<|im_start|>", start)]
    )
    template = ToolCall().sftx_template(tiny_tokenizer)
    segments = template.generation_prompt(Conversation((Message("user", "hi"),)))
    assert segments[0].text == "<|im_start|>"
    assert segments[0].control
    assert template.controls == {"<|im_start|>", "<|endoftext|>"}
    turns = [{"role": "user", "content": "hi"}]
    jinja = tiny_tokenizer.apply_chat_template(
        turns, chat_template=template.chat_template, tokenize=False, add_generation_prompt=True
    )
    assert jinja == "".join(segment.text for segment in segments)


def test_it_refuses_what_it_cannot_write(tiny_tokenizer: Any) -> None:
    template = ToolCall().sftx_template(tiny_tokenizer)
    with pytest.raises(DataError, match=r"'critic'.* system, user"):
        template.render(Conversation((Message("critic", "no"),)))
    with pytest.raises(DataError, match="tools"):
        template.render(Conversation((Message("user", "hi"),), tools=({"name": "timer"},)))
    tiny_tokenizer.eos_token = None
    with pytest.raises(PluginError, match="eos token"):
        ToolCall().sftx_template(tiny_tokenizer)


@pytest.mark.parametrize(
    ("prediction", "score"),
    [
        (LIGHTS, 1),
        (
            json.dumps({"arguments": {"level": 5.0, "on": True, "room": "kitchen"}, "function": "set_light"}, indent=1),
            1,
        ),
        (LIGHTS.replace("kitchen", "hall"), 0.5),
        (LIGHTS.replace("true", "1"), 0.5),
        (LIGHTS.replace(', "level": 5', ""), 0.5),
        (LIGHTS.replace("set_light", "get_light"), 0),
        (f"Gladly! {LIGHTS}", 0),
        (LIGHTS[:-1], 0),
        ('{"function": "set_light"}', 0),
        ("[" * 100_000, 0),
        ("9" * 10_000, 0),
        ("", 0),
    ],
)
def test_scores(prediction: str, score: float) -> None:
    assert ToolCall().sftx_metric()(prediction, LIGHTS) == score


def test_an_answer_must_equal_a_reference_that_is_not_a_call() -> None:
    metric = ToolCall().sftx_metric()
    assert metric("I cannot do that.\n", "I cannot do that.") == 1
    assert metric(LIGHTS, "I cannot do that.") == 0


def test_partial_is_the_score_of_the_right_function_alone() -> None:
    assert ToolCall(partial=0.2).sftx_metric()(LIGHTS.replace("5", "6"), LIGHTS) == 0.2


def test_a_run_saves_the_format_with_the_result(plugin_run: Any) -> None:
    result = plugin_run("toolcall", "lora", rows=ROWS)
    assert "toolcall" in result.summary["held_out"]["after"]
    saved = (result.output_dir / "adapter" / "chat_template.jinja").read_text(encoding="utf-8")
    assert "### Call" in saved
