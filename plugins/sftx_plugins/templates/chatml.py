"""ChatML: `<|im_start|>role\\ncontent<|im_end|>\\n`, the form of SmolLM2, Qwen and many others.

Tools stand in the system turn, calls between `<tool_call>` tags, results between `<tool_response>` tags in a user's
turn: the form of Hermes, which Qwen took over.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Final

from pydantic import Field

from sftx import Conversation, Message, Segment
from sftx_plugins.templates.native import THINK, Native, Turn, as_json

START, END = "<|im_start|>", "<|im_end|>"
CALL: Final = frozenset({"<tool_call>", "</tool_call>"})
RESPONSE: Final = frozenset({"<tool_response>", "</tool_response>"})
ROLES: Final = frozenset({"system", "user", "assistant", "tool"})
TOOLS: Final = (
    "# Tools\n\nYou may call one or more functions to assist with the user query.\n\n"
    "You are provided with function signatures within <tools></tools> XML tags:\n<tools>",
    "\n</tools>\n\nFor each function call, return a json object with function name and arguments within "
    "<tool_call></tool_call> XML tags:\n<tool_call>\n"
    '{"name": <function-name>, "arguments": <args-json-object>}\n</tool_call>',
)
"""What Qwen says before and after the list of tools, word for word: its models were trained with it."""

# The parts of the Jinja form, for templates that write one of them in another way.
JINJA_SYSTEM: Final = """
    {% set default = none if tools and not $default_with_tools else $default %}
    {% set system = messages[0].content if messages and messages[0].role == 'system' else default %}
    {% if tools %}
        {{ '<|im_start|>system\\n' }}{% if system is not none %}{{ system + '\\n\\n' }}{% endif %}{{ $before }}
        {% for tool in tools %}{{ '\\n' + tool | tojson }}{% endfor %}{{ $after + '<|im_end|>\\n' }}
    {% elif system is not none %}{{ '<|im_start|>system\\n' + system + '<|im_end|>\\n' }}{% endif %}
"""
JINJA_TOOL: Final = """
    {% if loop.first or messages[loop.index0 - 1].role != 'tool' %}{{ '<|im_start|>user' }}{% endif %}
    {{ '\\n<tool_response>\\n' + message.content + '\\n</tool_response>' }}
    {% if loop.last or messages[loop.index0 + 1].role != 'tool' %}{{ '<|im_end|>\\n' }}{% endif %}
"""
JINJA_CALLS: Final = """
    {% for tool_call in message.tool_calls or [] %}
        {% set call = tool_call.function or tool_call %}
        {% if content or not loop.first %}{{ '\\n' }}{% endif %}
        {{ '<tool_call>\\n{"name": ' + call.name | tojson + ', "arguments": ' }}{{ arguments(call) }}
        {{ '}\\n</tool_call>' }}
    {% endfor %}
"""
_JINJA: Final = f"""
    {JINJA_SYSTEM}
    {{% for message in messages %}}
        {{% set content = message.content or '' %}}
        {{% if message.role == 'tool' %}}{JINJA_TOOL}
        {{% elif not (loop.first and message.role == 'system') %}}
            {{{{ '<|im_start|>' + message.role + '\\n' }}}}{{{{ thought(message) }}}}{{{{ content }}}}{JINJA_CALLS}
            {{{{ '<|im_end|>\\n' }}}}
        {{% endif %}}
    {{% endfor %}}
    {{% if add_generation_prompt %}}{{{{ '<|im_start|>assistant\\n' }}}}{{% endif %}}
"""


@dataclass(frozen=True, eq=False)
class ChatML(Native):
    """Turns between <|im_start|> and <|im_end|>; the assistant's text, <|im_end|> and newline are trained."""

    default_system: Annotated[
        str | None, Field(description="System text of conversations that begin without one; null adds none.")
    ] = None

    controls = frozenset({START, END})
    optional = THINK | CALL | RESPONSE
    stop = (END,)
    roles: ClassVar[frozenset[str] | None] = None
    has_tools = True
    default_with_tools = True
    """Whether the default system text stands before tools too."""

    @property
    def chat_template(self) -> str | None:
        return self._jinja(_JINJA, **self._literals())

    def _literals(self) -> dict[str, Any]:
        """What the Jinja form is completed with."""
        return {
            "default": self.default_system,
            "default_with_tools": self.default_with_tools,
            "before": TOOLS[0],
            "after": TOOLS[1],
        }

    def _turns(self, conversation: Conversation) -> Iterator[Segment]:
        messages = conversation.messages
        system = messages[0] if messages and messages[0].role == "system" else self._default(conversation)
        if system is not None or conversation.tools:
            yield from self._system(system, conversation)
        turns = messages[1:] if messages and messages[0].role == "system" else messages
        for number, message in enumerate(turns):
            if message.role == "tool":
                yield from self._result(turns, number)
            else:
                yield from self._spoken(turns, number)

    def _default(self, conversation: Conversation) -> Message | None:
        if self.default_system is None or (conversation.tools and not self.default_with_tools):
            return None
        return Message("system", self.default_system)

    def _system(self, system: Message | None, conversation: Conversation) -> Iterator[Segment]:
        turn = self._turn(system or Message("system", ""))
        yield from turn.opening(f"{START}system\n")
        if system is not None:
            yield from turn.says(system.content)
        if conversation.tools:
            yield from turn.opening(("\n\n" if system is not None else "") + TOOLS[0])
            yield from turn.given("".join(f"\n{as_json(tool)}" for tool in conversation.tools))
            yield from turn.opening(TOOLS[1])
        yield from turn.words(f"{END}\n")

    def _spoken(self, turns: Sequence[Message], number: int) -> Iterator[Segment]:
        message = turns[number]
        turn = self._turn(message)
        yield from turn.opening(f"{START}{message.role}\n")
        yield from turn.thinks(message.reasoning)
        yield from turn.says(message.content)
        yield from self._calls(turn, message, follows=bool(message.content))
        yield from turn.words(f"{END}\n")

    def _calls(self, turn: Turn, message: Message, *, follows: bool) -> Iterator[Segment]:
        for call in message.tool_calls:
            yield from turn.words("\n<tool_call>\n" if follows else "<tool_call>\n")
            yield from turn.says(f'{{"name": {as_json(call.name)}, "arguments": {as_json(call.arguments)}}}')
            yield from turn.words("\n</tool_call>")
            follows = True

    def _result(self, turns: Sequence[Message], number: int) -> Iterator[Segment]:
        """Results that follow one another share a user's turn."""
        turn = self._turn(turns[number])
        if number == 0 or turns[number - 1].role != "tool":
            yield from turn.opening(f"{START}user")
        yield from turn.opening("\n<tool_response>\n")
        yield from turn.says(turns[number].content)
        yield from turn.words("\n</tool_response>")
        if number + 1 == len(turns) or turns[number + 1].role != "tool":
            yield from turn.words(f"{END}\n")

    def _opening(self, conversation: Conversation) -> Iterator[Segment]:
        return Turn(self.controls, "assistant").opening(f"{START}assistant\n")
