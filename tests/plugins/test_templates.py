"""The token ids of each native template equal those of the chat template of its model."""

from __future__ import annotations

import dataclasses
import json

import pytest
from jinja2 import TemplateError
from jinja2.sandbox import ImmutableSandboxedEnvironment

from sftx import Conversation, DataError, Message, ToolCall
from sftx.data.encoder import Encoder
from sftx.data.row_encoder import split_units
from templating import (
    TOOLS,
    as_dicts,
    chat,
    decoded,
    encoder_of,
    own_ids,
    own_template,
    own_text,
    template_of,
    text_of,
    tokenizer_of,
    tokenizer_with,
)

CALLED = chat(
    ("system", "You know the weather."),
    ("user", "Is it warm in Paris and in 北京?"),
    Message("assistant", "", tool_calls=(ToolCall("weather", {"city": "Paris", "days": 2}),)),
    Message("tool", '{"celsius": 21}', name="weather"),
    ("assistant", "Warm enough 🙂"),
    tools=TOOLS,
)
TWO_CALLS = chat(
    ("user", "Paris? 北京?"),
    Message(
        "assistant",
        "I shall look.",
        tool_calls=(ToolCall("weather", {"city": "Paris"}), ToolCall("weather", {"city": "北京"})),
    ),
    Message("tool", "21", name="weather"),
    Message("tool", "30", name="weather"),
    ("assistant", "21 and 30."),
    ("user", "Thanks."),
    ("assistant", "You're welcome."),
    tools=TOOLS,
)
PLAIN = {
    "one turn": chat(("user", "What is 2 + 3?"), ("assistant", "5")),
    "three turns": chat(
        ("user", "Hello!"), ("assistant", "Hello."), ("user", "And?"), ("assistant", "Nothing."), ("user", "So?"),
        ("assistant", "So be it."),
    ),
    "Chinese": chat(("user", "你好，请介绍一下北京。"), ("assistant", "北京是中国的首都。")),
    "emoji": chat(("user", "🙂👩‍👩‍👧"), ("assistant", "👋🏽 hi")),
    "code": chat(("user", "def f(x):\n    return x\n\n\nWhy?"), ("assistant", "```python\nf(1)  # 1\n```\n\nDone.")),
    "asked": chat(("user", "One?"), ("assistant", "1"), ("user", "Two?")),
}  # fmt: skip
SYSTEM = {
    f"{name}, system": dataclasses.replace(c, messages=(Message("system", "Be terse.\n简洁"), *c.messages))
    for name, c in PLAIN.items()
}
FORMS: dict[str, tuple[str, dict[str, Conversation]]] = {
    "qwen2.5": ("qwen2_5", {**PLAIN, **SYSTEM, "called": CALLED, "two calls": TWO_CALLS}),
    "qwen3": ("qwen3", {**PLAIN, **SYSTEM, "called": CALLED, "two calls": TWO_CALLS}),
    "llama3": ("llama3_1", {**PLAIN, **SYSTEM}),
    "gemma3": ("gemma3", {**PLAIN, **SYSTEM}),
    "deepseek3": ("deepseek_v3", {**PLAIN, **SYSTEM}),
    "mistral": ("mistral_nemo", PLAIN),
}
"""Templates whose model's tokenizer has a chat template, and conversations that it writes correctly."""
CASES = [
    pytest.param(name, tokenizer, conversation, id=f"{name}, {what}")
    for name, (tokenizer, conversations) in FORMS.items()
    for what, conversation in conversations.items()
]


# --- token ids of the model's own template ---------------------------------------------


@pytest.mark.parametrize(("name", "tokenizer", "conversation"), CASES)
def test_token_ids_are_those_of_the_models_own_template(name: str, tokenizer: str, conversation: Conversation) -> None:
    assert encoder_of(name, tokenizer).encode(conversation)[0] == own_ids(tokenizer, conversation)


@pytest.mark.parametrize(("name", "tokenizer", "conversation"), CASES)
def test_prompts_are_those_of_the_models_own_template(name: str, tokenizer: str, conversation: Conversation) -> None:
    for end in range(1, len(conversation.messages) + 1):
        asked = dataclasses.replace(conversation, messages=conversation.messages[:end])
        if asked.messages[-1].role in ("user", "tool"):
            ids = encoder_of(name, tokenizer).prompt(asked)
            assert ids == own_ids(tokenizer, asked, add_generation_prompt=True)


def test_qwen2_5_is_chatml_with_qwens_system_text() -> None:
    qwen = template_of("qwen2.5", "qwen2_5")
    chatml = encoder_of("chatml", "qwen2_5", default_system=qwen.default_system)
    for conversation in FORMS["qwen2.5"][1].values():
        assert chatml.encode(conversation)[0] == own_ids("qwen2_5", conversation)


THOUGHTS = chat(
    ("user", "What is 2 + 3?"),
    Message("assistant", "5", reasoning="Two and three."),
    ("user", "And the weather in Paris?"),
    Message("assistant", "", reasoning="I must ask.", tool_calls=(ToolCall("weather", {"city": "Paris"}),)),
    Message("tool", "21"),
    Message("assistant", "It is 21.", reasoning="\n21, then.\n"),
    ("user", "Good."),
    ("assistant", "\nIndeed."),
    tools=TOOLS,
)


@pytest.mark.parametrize("thinking", ["keep", "strip", "empty"])
def test_each_trained_turn_of_qwen3_renders_as_in_qwen3s_own_template(thinking: str) -> None:
    encoder = encoder_of("qwen3", "qwen3", thinking=thinking)
    found = [unit for unit in split_units(THOUGHTS, encoder) if isinstance(unit, Conversation)]
    assert len(found) == 4
    for unit in found:
        turns = unit.messages
        if thinking != "keep":
            turns = tuple(dataclasses.replace(turn, reasoning="") for turn in turns)
        own = dataclasses.replace(unit, messages=turns)
        ids, mask, _ = encoder.encode(unit)
        assert ids == own_ids("qwen3", own)
        asked = dataclasses.replace(own, messages=turns[:-1])
        prompt = own_ids("qwen3", asked, add_generation_prompt=True, enable_thinking=thinking != "strip")
        assert ids[: len(prompt)] == prompt == encoder.prompt(asked)
        assert mask == [False] * len(prompt) + [True] * (len(ids) - len(prompt))
        thought = decoded("qwen3", ids[len(prompt) :])
        kept = turns[-1].reasoning.strip("\n")
        assert thought.startswith(f"<think>\n{kept}\n</think>\n\n") == (thinking != "strip")


def test_llama3_writes_tools_as_llama_3_1() -> None:
    own = own_template("meta-llama-Llama-3.1-8B-Instruct")
    silent = dataclasses.replace(CALLED, messages=CALLED.messages[1:])
    for conversation in (CALLED, silent):
        ids = encoder_of("llama3", "llama3_1").encode(conversation)[0]
        assert ids == own_ids("llama3_1", conversation, chat_template=own)
    for conversation in (*PLAIN.values(), *SYSTEM.values()):
        ids = encoder_of("llama3", "llama3_1", dates=True).encode(conversation)[0]
        assert ids == own_ids("llama3_1", conversation, chat_template=own)


def test_gemma_equals_gemma_2_and_gemma_3_and_writes_the_system_text_that_gemma_2_refuses() -> None:
    own = own_template("google-gemma-2-2b-it")
    gemma, gemma3 = template_of("gemma", "gemma3"), template_of("gemma3", "gemma3")
    for conversation in PLAIN.values():
        assert text_of(gemma.render(conversation)) == own_text("gemma3", conversation, chat_template=own)
    for conversation in (*PLAIN.values(), *SYSTEM.values()):
        assert gemma.render(conversation) == gemma3.render(conversation)
        assert gemma.generation_prompt(conversation) == gemma3.generation_prompt(conversation)


def test_deepseek3_writes_one_round_of_two_calls_as_deepseeks_own_does() -> None:
    """This is the only case in which DeepSeek's template writes every token. It takes arguments as text."""
    first, calls, *others = TWO_CALLS.messages
    conversation = Conversation((first, dataclasses.replace(calls, content=""), *others[:3]))
    encoder = encoder_of("deepseek3", "deepseek_v3")
    for prompt, num_turns in ((False, 5), (True, 4)):
        asked = Conversation(conversation.messages[:num_turns])
        ids = encoder.prompt(asked) if prompt else encoder.encode(asked)[0]
        own = deepseeks_own(asked, add_generation_prompt=prompt)
        assert ids == encoder.tokenizer(own, add_special_tokens=False)["input_ids"]


def deepseeks_own(conversation: Conversation, *, add_generation_prompt: bool = False) -> str:
    """Render DeepSeek's template with None as the content of calls, which apply_chat_template would drop."""
    messages = as_dicts(conversation)
    for call in (call for message in messages for call in message.get("tool_calls", ())):
        call["function"]["arguments"] = json.dumps(call["function"]["arguments"], ensure_ascii=False)
    for message in messages:
        message["content"] = None if "tool_calls" in message else message["content"]
    tokenizer = tokenizer_of("deepseek_v3")
    own = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True).from_string(str(tokenizer.chat_template))
    return own.render(messages=messages, bos_token=tokenizer.bos_token, add_generation_prompt=add_generation_prompt)


def test_what_the_models_own_templates_drop_or_refuse() -> None:
    """docs/templates.md lists these differences and the reasons."""
    briefed = SYSTEM["three turns, system"]
    with pytest.raises(TemplateError, match="System role not supported"):
        own_text("gemma3", briefed, chat_template=own_template("google-gemma-2-2b-it"))
    assert "Be terse" not in own_text("mistral_nemo", briefed)
    assert "Be terse" in text_of(template_of("mistral", "mistral_nemo").render(briefed))
    called = chat(("user", "?"), Message("assistant", "I look.", tool_calls=(ToolCall("f", {}, "abcdefgh1"),)))
    assert "I look" not in own_text("mistral_nemo", called)
    assert "I look" not in own_text("llama3_1", called, chat_template=own_template("meta-llama-Llama-3.1-8B-Instruct"))
    nameless = chat(("user", "?"), Message("assistant", "", tool_calls=(ToolCall("f", {}),)))
    with pytest.raises(TemplateError, match="Tool call IDs"):
        own_text("mistral_nemo", nameless)
    assert not deepseeks_own(nameless).endswith("<｜tool▁calls▁end｜><｜end▁of▁sentence｜>")
    written = text_of(template_of("deepseek3", "deepseek_v3").render(nameless))
    assert written.endswith("<｜tool▁calls▁end｜><｜end▁of▁sentence｜>")


def test_deepseek3_drops_earlier_reasoning_as_an_option() -> None:
    asked = dataclasses.replace(THOUGHTS, tools=())
    kept, dropped = (template_of("deepseek3", "deepseek_v3", earlier_reasoning=p) for p in ("keep", "drop"))
    assert (kept.rewrites_history, dropped.rewrites_history) == (False, True)
    assert text_of(kept.render(asked)).count("<think>") == 3
    assert text_of(dropped.render(asked)).count("<think>") == 0
    last = Conversation(asked.messages[:2])
    assert text_of(dropped.render(last)).endswith("<think>\nTwo and three.\n</think>\n\n5<｜end▁of▁sentence｜>")


def test_mistral_writes_system_and_tools_before_the_last_question_as_an_option() -> None:
    call = dataclasses.replace(CALLED.messages[2], tool_calls=(ToolCall("weather", {"city": "Paris"}, "abcdefgh1"),))
    result = dataclasses.replace(CALLED.messages[3], tool_call_id="abcdefgh1")
    conversation = chat(("user", "Hi"), ("assistant", "Hello"), ("user", "Paris?"), call, result, tools=TOOLS)
    own = own_ids("mistral_nemo", conversation)
    assert encoder_of("mistral", "mistral_nemo", place="last").encode(conversation)[0] == own
    assert encoder_of("mistral", "mistral_nemo").encode(conversation)[0] != own
    alone = dataclasses.replace(conversation, messages=(*conversation.messages[2:], Message("assistant", "Warm.")))
    assert encoder_of("mistral", "mistral_nemo").encode(alone)[0] == own_ids("mistral_nemo", alone)
    asked = chat(("system", "Be terse."), ("user", "Hi"), ("assistant", "Hello"), ("user", "Well?"))
    assert encoder_of("mistral", "mistral_nemo", place="last").prompt(asked) == own_ids("mistral_nemo", asked)
    assert template_of("mistral", "mistral_nemo", place="last").rewrites_history


def test_mistral_numbers_calls_that_have_no_id_and_refuses_other_ids() -> None:
    turns = (Message("user", "?"), *TWO_CALLS.messages[1:5])
    silent = dataclasses.replace(turns[1], content="")
    text = text_of(template_of("mistral", "mistral_nemo").render(Conversation((turns[0], silent, *turns[2:]))))
    assert '"id": "call00000"}, {"name"' in text
    assert '[TOOL_RESULTS]{"content": 30, "call_id": "call00001"}[/TOOL_RESULTS]' in text
    bad = dataclasses.replace(silent, tool_calls=(ToolCall("weather", {}, "call_1"),))
    with pytest.raises(DataError, match=r"'call_1'.*nine"):
        template_of("mistral", "mistral_nemo").render(Conversation((turns[0], bad)))


def test_phi_writes_what_phi_3_5_does() -> None:
    tokens = ["<|system|>", "<|user|>", "<|assistant|>", "<|end|>", "<|endoftext|>"]
    own = own_template("microsoft-Phi-3.5-mini-instruct")
    for taken in (False, True):  # Phi's own tokens take the white space after them away
        tokenizer = tokenizer_with("llama3_1", tokens, rstrip=taken)
        encoder = Encoder(tokenizer, template_of("phi", tokenizer))
        for conversation in (*PLAIN.values(), *SYSTEM.values(), chat(("user", "  x"), ("assistant", "  y"))):
            prompt = conversation.messages[-1].role == "user"
            ids = encoder.prompt(conversation) if prompt else encoder.encode(conversation)[0]
            assert ids == own_ids(
                tokenizer, conversation, chat_template=own, add_generation_prompt=prompt, eos_token="<|endoftext|>"
            )
