"""The contract of a template: what it writes, what of it is trained, and what can never become a control token."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Sequence
from itertools import groupby
from pathlib import Path

from sftx.data.encoder import check_controls
from sftx.errors import DataError, PluginError, one_line
from sftx.testing.clauses import ClauseError, Suite
from sftx.testing.rendered import PLAIN, SPECIAL, TemplateCase, Written, asked_of, difference
from sftx.types import Conversation, Segment

SUITE: Suite[TemplateCase] = Suite("template", lambda kit: TemplateCase(kit, kit.template))


@SUITE.clause("Its control tokens are tokens of the tokenizer, and at least one of them, in `stop`, ends an answer.")
def controls_exist(case: TemplateCase) -> None:
    try:
        check_controls(case.template, case.kit.tokenizer)
    except PluginError as error:
        raise ClauseError(
            f"{error}; name only tokens of the tokenizer, and in `stop` only some of `controls`"
        ) from error


@SUITE.clause("It writes a user and an assistant by turns; what it cannot write besides, it refuses with DataError.")
def writes_turns(case: TemplateCase) -> None:
    for conversation in (*PLAIN, *SPECIAL):
        roles = ", ".join(message.role for message in conversation.messages) or "none"
        try:
            writes = case.writes(conversation)
        except Exception as error:
            raise ClauseError(
                f"the turns {roles} raised {type(error).__name__}: {one_line(error)}; "
                "write them, or raise sftx.DataError saying which turn cannot be written"
            ) from error
        if not writes and conversation in PLAIN:
            raise ClauseError(f"the turns {roles} were refused with DataError; every template has to write those")


@SUITE.clause(
    "It writes segments: each control token is one by itself, and no other segment spells a token that has meaning.",
    needs=["controls-exist", "writes-turns"],
)
def writes_segments(case: TemplateCase) -> None:
    added = case.kit.tokenizer.added_tokens_decoder.values()
    tokens = case.template.controls | {token.content for token in added if token.special}
    for method, segments in case.written():
        given: object = segments
        if not isinstance(given, tuple | list) or not all(_is_segment(segment) for segment in given):
            raise ClauseError(f"{method} returned {given!r:.200}; return a tuple of Segment(text, ...)")
        for control, run in groupby(segments, key=lambda segment: segment.control):
            texts = [segment.text for segment in run]
            stray = next((text for text in texts if text not in case.template.controls), None)
            if control and stray is not None:
                raise ClauseError(
                    f"{method} wrote {stray!r} with control=True, which is not one token of `controls`; name it there, "
                    "and write each by itself"
                )
            spelled = next((token for token in sorted(tokens) if token in "".join(texts)), None)
            if not control and spelled is not None:
                raise ClauseError(
                    f"{method} wrote {spelled} within plain text, where it would be encoded as letters; "
                    "make it a Segment of its own with control=True, and name it in `controls`"
                )
        case.encoder.encode_segments(segments)


def _is_segment(segment: object) -> bool:
    expected = {"text": str, "trainable": bool, "control": bool, "weight": int | float}
    return isinstance(segment, Segment) and all(isinstance(getattr(segment, k), kind) for k, kind in expected.items())


@SUITE.clause(
    "The same conversation gives the same segments, whatever was written before, and is not changed.",
    needs=["writes-turns"],
)
def deterministic(case: TemplateCase) -> None:
    kept = case.conversations
    for name, method in case.methods.items():
        given = copy.deepcopy(kept)
        first = [tuple(method(conversation)) for conversation in given]
        if given != kept:
            raise ClauseError(f"{name} changed the conversation that it was given; work on a copy of extras and tools")
        again = [tuple(method(conversation)) for conversation in reversed(copy.deepcopy(kept))][::-1]
        for conversation, one, other in zip(kept, first, again, strict=True):
            if one != other:
                raise ClauseError(
                    f"{name} of the same conversation gave {difference(repr(one), repr(other))}; keep nothing "
                    f"between two calls, and draw no random numbers (it begins {_begin(conversation)})"
                )


def _begin(conversation: Conversation) -> str:
    return repr(conversation.messages[0].content[:40]) if conversation.messages else "with no turn"


@SUITE.clause(
    "The content of every turn stands in the text once, in the order of the turns.",
    needs=["writes-segments", "deterministic"],
)
def keeps_content(case: TemplateCase) -> None:
    for conversation in case.answered:
        text = Written(case.methods["render"](conversation)).text
        end = 0
        for message in conversation.messages:
            number = text.count(message.content)
            if number != 1:
                raise ClauseError(
                    f"the {message.role}'s {message.content!r} stands {number} times in {text!r:.200}; write it once, "
                    "as it is, or refuse the turn with sftx.DataError"
                )
            start = text.index(message.content)
            if start < end:
                raise ClauseError(
                    f"the {message.role}'s {message.content!r} stands before an earlier turn's; keep their order"
                )
            end = start + len(message.content)


@SUITE.clause(
    "All of the assistant's content is trained, and nothing of the other turns' content.", needs=["keeps-content"]
)
def trains_the_answers(case: TemplateCase) -> None:
    for conversation in case.answered:
        _check_trained(case, conversation)


def _check_trained(case: TemplateCase, conversation: Conversation) -> None:
    """Raises ClauseError unless exactly the contents of the turns that are to be trained are trained."""
    for unit, text in case.trained_units(conversation):
        for message, owners, _ in text.contents(unit):
            set_to = "" if message.trainable is None else f" with trainable={message.trainable}"
            wrong = sum(owner.trainable != message.trained for owner in owners)
            if wrong:
                raise ClauseError(
                    f"of the {message.role}'s {message.content!r}{set_to}, {wrong} of {len(owners)} characters are "
                    f"{'not ' if message.trained else ''}trained; give its segment trainable=message.trained"
                )


@SUITE.clause(
    "Each trained answer is followed by a stop token, the first control token after it, which is trained.",
    needs=["trains-the-answers"],
)
def trains_the_stop(case: TemplateCase) -> None:
    for conversation in case.answered:
        for unit, text in case.trained_units(conversation):
            for message, _, after in text.contents(unit):
                if not message.trained:
                    continue
                stop = next((segment for segment in after if segment.control), None)
                if stop is None or stop.text not in case.template.stop:
                    seen = "no control token" if stop is None else repr(stop.text)
                    wanted = " or ".join(case.template.stop)
                    raise ClauseError(
                        f"after the answer {message.content!r} comes {seen}, expected {wanted}; name in `stop` what "
                        "ends an answer, and write it after each"
                    )
                if not stop.trainable:
                    raise ClauseError(
                        f"{stop.text} after the answer {message.content!r} is not trained, so the model would never "
                        "stop; give its segment trainable=message.trained"
                    )


@SUITE.clause(
    "A message's `trainable` and `weight` decide whether its content and its stop token are trained, and how much.",
    needs=["trains-the-answers"],
)
def obeys_the_message(case: TemplateCase) -> None:
    question, answer, *others = PLAIN[1].messages
    untrained = dataclasses.replace(answer, trainable=False)
    asked = dataclasses.replace(question, trainable=True)
    _check_trained(case, Conversation((question, untrained, *others)))
    _check_trained(case, Conversation((asked, answer, *others)))
    system = Conversation((dataclasses.replace(SPECIAL[0].messages[0], trainable=True), *SPECIAL[0].messages[1:]))
    if case.writes(system):
        _check_trained(case, system)
    silent = Written(case.template.render(Conversation((question, untrained))))
    trained = next((owner for owner in silent.owners if owner.trainable), None)
    if trained is not None:
        raise ClauseError(
            f"{trained.text!r} is trained where the only answer has trainable=False; "
            "nothing of a turn is trained then, its stop token neither"
        )
    weighted = Conversation((question, dataclasses.replace(answer, weight=0.25), *others))
    for unit, text in case.trained_units(weighted):
        for message, owners, after in text.contents(unit):
            stop = [segment for segment in after if segment.control][:1]
            weights = {segment.weight for segment in (*owners, *stop) if segment.trainable}
            if message.trained and weights - {message.weight}:
                raise ClauseError(
                    f"the answer {message.content!r} or its stop token has the weight {max(weights):g}, expected "
                    f"{message.weight:g}; give each trained segment of a turn weight=message.weight"
                )


@SUITE.clause("Text that spells a control token stays text, in every turn.", needs=["keeps-content"])
def keeps_text_text(case: TemplateCase) -> None:
    control_ids = set(check_controls(case.template, case.kit.tokenizer).values())
    for token in filter(case.can_be_spelled, sorted(case.template.controls)):
        for harmless in case.answered:
            turns = [dataclasses.replace(m, content=f"{m.content} {token} {m.content}.") for m in harmless.messages]
            spelled = dataclasses.replace(harmless, messages=tuple(turns))
            for name, method in case.methods.items():
                try:
                    segments = method(spelled)
                except DataError:
                    continue  # a row that is refused teaches nothing wrong
                seen = [i for i in case.encoder.encode_segments(segments)[0] if i in control_ids]
                expected = [i for i in case.encoder.encode_segments(method(harmless))[0] if i in control_ids]
                if seen != expected:
                    raise ClauseError(
                        f"contents that spell {token} made {name} write {len(seen)} control tokens, where harmless "
                        f"ones have {len(expected)}; write a content as one plain segment, and never search it"
                    )
                text = Written(segments).text
                written = turns if name == "render" else turns[:-1]
                lost = next((turn for turn in written if turn.content not in text), None)
                if lost is not None:
                    raise ClauseError(
                        f"{name} changed the {lost.role}'s {lost.content!r:.100}; write it as it is, since plain "
                        "segments are encoded by a tokenizer that knows no control token"
                    )


@SUITE.clause(
    "The generation prompt is a prefix of what is trained on: it is not trained, the answer and its stop token are.",
    needs=["trains-the-stop", "obeys-the-message"],
)
def prompt_is_a_prefix(case: TemplateCase) -> None:
    for conversation in case.conversations:
        if not conversation.messages or conversation.messages[-1].role != "assistant":
            continue
        if not case.template.rewrites_history:
            _prompt_length(case, conversation)
        # No earlier turn is trained now, so that what is must be of the last one.
        *before, answer = conversation.messages
        silent = (*(dataclasses.replace(message, trainable=False) for message in before), answer)
        last = dataclasses.replace(conversation, messages=silent)
        num = _prompt_length(case, last)
        ids, loss_mask, _ = case.encoder.encode(last)
        if any(loss_mask[:num]):
            raise ClauseError(
                f"{_chosen(case, ids[:num], loss_mask[:num])} stands in the generation prompt and is trained; only "
                "what the model is to write itself is trained"
            )
        end = next((at for at, token in enumerate(ids) if at >= num and token in case.encoder.stop_ids), len(ids))
        if not all(loss_mask[num : end + 1]):
            untrained = [not trained for trained in loss_mask[num : end + 1]]
            raise ClauseError(
                f"{_chosen(case, ids[num : end + 1], untrained)} stands between the generation prompt and the stop "
                "token and is not trained; write it in the prompt too, or train it"
            )


def _chosen(case: TemplateCase, ids: Sequence[int], mask: Sequence[bool]) -> str:
    chosen = [token for token, trained in zip(ids, mask, strict=True) if trained]
    return repr(case.kit.tokenizer.decode(chosen))


def _prompt_length(case: TemplateCase, conversation: Conversation) -> int:
    """Tokens of the prompt that asks for the last answer, with which the whole must begin."""
    prompt, whole = case.encoder.prompt(asked_of(conversation)), case.encoder.encode(conversation)[0]
    if whole[: len(prompt)] != prompt:
        texts = [str(case.kit.tokenizer.decode(ids)) for ids in (prompt, whole)]
        tokens = [case.kit.tokenizer.convert_ids_to_tokens(ids) for ids in (prompt, whole)]
        seen = difference(*tokens) if texts[1].startswith(texts[0]) else difference(*texts)
        raise ClauseError(
            "generation_prompt and render begin differently, so that the model is asked in another way than it was "
            f"trained, with {seen}; let both write the turns by the same code"
        )
    return len(prompt)


@SUITE.clause(
    "What it wrote up to an answer's stop token stays when more turns follow, unless it says `rewrites_history`.",
    needs=["trains-the-stop"],
)
def keeps_history(case: TemplateCase) -> None:
    if case.template.rewrites_history:
        return
    for conversation in case.answered:
        whole = Written(case.template.render(conversation)).text
        for end, message in enumerate(conversation.messages, 1):
            if message.role != "assistant":
                continue
            begun = dataclasses.replace(conversation, messages=conversation.messages[:end])
            early = Written(case.template.render(begun))
            *_, (_, _, after) = early.contents(begun)
            until = next(at for at, segment in enumerate(after) if segment.control)
            text = early.text[: len(early.text) - len(after) + until + len(after[until].text)]
            if not whole.startswith(text):
                raise ClauseError(
                    f"the turns up to the answer {message.content!r} are written in another way once others follow: "
                    f"{difference(text, whole)}; write a turn whatever follows it, or say rewrites_history = True"
                )


@SUITE.clause(
    "Where it has a Jinja `chat_template`, that writes the same text, with and without the generation prompt.",
    needs=["deterministic", "writes-segments"],
)
def chat_template_agrees(case: TemplateCase) -> None:
    if case.template.chat_template is None:
        return
    for conversation in filter(lambda conversation: conversation.messages, case.conversations):
        for name, method in case.methods.items():
            prompted = name == "generation_prompt"
            asked = asked_of(conversation) if prompted else conversation
            messages = [{"role": message.role, "content": message.content} for message in asked.messages]
            try:
                rendered = case.kit.tokenizer.apply_chat_template(
                    messages,
                    tools=[dict(tool) for tool in conversation.tools] or None,
                    chat_template=case.template.chat_template,
                    add_generation_prompt=prompted,
                    tokenize=False,
                )
            except Exception as error:
                raise ClauseError(
                    f"chat_template raised {type(error).__name__} on the conversation that begins "
                    f"{_begin(conversation)}: {one_line(error)}; let it write what {name} writes, or give None"
                ) from error
            text = Written(method(conversation)).text
            if rendered != text:
                raise ClauseError(
                    f"chat_template and {name} write {difference(str(rendered), text)}; let both write the same, or "
                    "give None as chat_template"
                )


def check_template(plugin: object, *, model: Path | None = None) -> None:
    """Holds the plugin's template against each clause. Raises ContractError, naming those that it breaks.

    `model`: a directory with the tokenizer to check with; by default the tiny one, given the template's controls.
    """
    SUITE.check(plugin, model=model)
