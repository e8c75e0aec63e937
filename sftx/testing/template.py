"""The contract of a template: it keeps and trains the right text, and user text never becomes a control token."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Sequence
from itertools import groupby
from pathlib import Path

from sftx.data.encoder import check_controls
from sftx.errors import DataError, PluginError
from sftx.testing.clauses import ClauseError, Suite, must_not_raise
from sftx.testing.rendered import PLAIN, SPECIAL, Rendered, TemplateCase, difference, without_answer
from sftx.types import Conversation, Segment

SUITE: Suite[TemplateCase] = Suite("template", lambda kit: TemplateCase(kit, kit.template))


@SUITE.clause("`controls` holds tokens of the tokenizer, and `stop` holds those that end an answer, at least one.")
def controls_exist(case: TemplateCase) -> None:
    try:
        check_controls(case.template, case.kit.tokenizer)
    except PluginError as error:
        raise ClauseError(f"{error}; name tokens of the tokenizer, and in `stop` only some of `controls`") from error


@SUITE.clause("It renders alternating user and assistant turns, and refuses what it cannot render with DataError.")
def writes_turns(case: TemplateCase) -> None:
    for conversation in (*PLAIN, *SPECIAL):
        roles = ", ".join(message.role for message in conversation.messages) or "none"
        advice = "render them, or raise sftx.DataError saying which turn cannot be rendered"
        with must_not_raise(f"the turns {roles}", advice):
            if not case.accepts(conversation) and conversation in PLAIN:
                raise ClauseError(f"the turns {roles} were refused with DataError; every template has to render those")


@SUITE.clause(
    "It returns segments: each control token is a segment of its own, and no plain text spells a special token.",
    needs=["controls-exist", "writes-turns"],
)
def writes_segments(case: TemplateCase) -> None:
    types = {"text": str, "trainable": bool, "control": bool, "weight": int | float}

    def is_segment(segment: object) -> bool:
        return isinstance(segment, Segment) and all(isinstance(getattr(segment, k), t) for k, t in types.items())

    added = case.kit.tokenizer.added_tokens_decoder.values()
    special = sorted(case.template.controls | {token.content for token in added if token.special})
    for name, method in case.methods.items():
        for segments in map(method, case.conversations):
            result: object = segments
            if not isinstance(result, tuple | list) or not all(map(is_segment, result)):
                raise ClauseError(f"{name} returned {result!r:.200}; return a tuple of Segment(text, ...)")
            for control, group in groupby(segments, key=lambda segment: segment.control):
                texts = [segment.text for segment in group]
                unknown = [text for text in texts if text not in case.template.controls]
                if control and unknown:
                    raise ClauseError(
                        f"{name} wrote {unknown[0]!r} with control=True, which is not one token of `controls`; add it "
                        "there, and write each token as a segment of its own"
                    )
                spelled = [token for token in special if token in "".join(texts)]
                if not control and spelled:
                    raise ClauseError(
                        f"{name} wrote {spelled[0]} within plain text, where it would be encoded as letters; make it a "
                        "Segment of its own with control=True, and name it in `controls`"
                    )
            case.encoder.encode_segments(segments)


@SUITE.clause(
    "The same conversation gives the same segments, whatever was rendered before, and is not changed.",
    needs=["writes-turns"],
)
def deterministic(case: TemplateCase) -> None:
    originals = case.conversations
    for name, method in case.methods.items():
        conversations = copy.deepcopy(originals)
        results = [tuple(method(conversation)) for conversation in conversations]
        if conversations != originals:
            raise ClauseError(f"{name} changed its conversation; work on a copy of extras and tools")
        again = [tuple(method(conversation)) for conversation in reversed(copy.deepcopy(originals))][::-1]
        for conversation, first, second in zip(originals, results, again, strict=True):
            if first != second:
                raise ClauseError(
                    f"{name} of the same conversation gave {difference(repr(first), repr(second))}; keep no state "
                    f"between two calls, and draw no random numbers (it begins {_begin(conversation)})"
                )


def _begin(conversation: Conversation) -> str:
    return repr(conversation.messages[0].content[:40]) if conversation.messages else "with no turn"


@SUITE.clause(
    "The text contains the content of every turn exactly once, in the order of the turns.",
    needs=["writes-segments", "deterministic"],
)
def keeps_content(case: TemplateCase) -> None:
    for conversation in case.answered:
        text = Rendered(case.methods["render"](conversation)).text
        end = 0
        for message in conversation.messages:
            content = f"the {message.role}'s {message.content!r}"
            count = text.count(message.content)
            if count != 1:
                raise ClauseError(
                    f"{content} occurs {count} times in {text!r:.200}; write it once and unchanged, or refuse the turn "
                    "with sftx.DataError"
                )
            start = text.index(message.content)
            if start < end:
                raise ClauseError(f"{content} comes before the content of an earlier turn; keep the order of the turns")
            end = start + len(message.content)


@SUITE.clause("All of the assistant's content is trained, and no content of the other turns.", needs=["keeps-content"])
def trains_the_answers(case: TemplateCase) -> None:
    for conversation in case.answered:
        _check_trained(case, conversation)


def _check_trained(case: TemplateCase, conversation: Conversation) -> None:
    """Raise ClauseError unless exactly the contents of the trained turns are trained."""
    for unit, rendered in case.trained_units(conversation):
        for message, owners, _ in rendered.contents(unit):
            wrong = sum(owner.trainable != message.trained for owner in owners)
            if wrong:
                option = "" if message.trainable is None else f" with trainable={message.trainable}"
                raise ClauseError(
                    f"of the {message.role}'s {message.content!r}{option}, {wrong} of {len(owners)} characters are "
                    f"{'not ' if message.trained else ''}trained; give its segment trainable=message.trained"
                )


@SUITE.clause(
    "Each trained answer is followed by a stop token: the first control token after it, which is trained too.",
    needs=["trains-the-answers"],
)
def trains_the_stop(case: TemplateCase) -> None:
    for conversation in case.answered:
        for unit, rendered in case.trained_units(conversation):
            for message, _, after in rendered.contents(unit):
                if not message.trained:
                    continue
                stop = next((segment for segment in after if segment.control), None)
                if stop is None or stop.text not in case.template.stop:
                    seen = "no control token" if stop is None else repr(stop.text)
                    raise ClauseError(
                        f"after the answer {message.content!r} comes {seen}, expected {' or '.join(case.template.stop)}"
                        "; name the token that ends an answer in `stop`, and write it after each answer"
                    )
                if not stop.trainable:
                    raise ClauseError(
                        f"{stop.text} after the answer {message.content!r} is not trained, so the model would never "
                        "stop; give its segment trainable=message.trained"
                    )


@SUITE.clause(
    "`trainable` and `weight` of a message apply to its content and to its stop token.", needs=["trains-the-answers"]
)
def obeys_the_message(case: TemplateCase) -> None:
    question, answer, *others = PLAIN[1].messages
    untrained = dataclasses.replace(answer, trainable=False)
    _check_trained(case, Conversation((question, untrained, *others)))
    _check_trained(case, Conversation((dataclasses.replace(question, trainable=True), answer, *others)))
    system = Conversation((dataclasses.replace(SPECIAL[0].messages[0], trainable=True), *SPECIAL[0].messages[1:]))
    if case.accepts(system):
        _check_trained(case, system)
    rendered = Rendered(case.template.render(Conversation((question, untrained))))
    trained = next((owner for owner in rendered.owners if owner.trainable), None)
    if trained is not None:
        raise ClauseError(
            f"{trained.text!r} is trained although the only answer has trainable=False; then nothing of the turn may "
            "be trained, and neither may its stop token"
        )
    weighted = Conversation((question, dataclasses.replace(answer, weight=0.25), *others))
    for unit, rendered in case.trained_units(weighted):
        for message, owners, after in rendered.contents(unit):
            stop = [segment for segment in after if segment.control][:1]
            weights = {segment.weight for segment in (*owners, *stop) if segment.trainable}
            if message.trained and weights - {message.weight}:
                raise ClauseError(
                    f"the answer {message.content!r} or its stop token has the weight {max(weights):g}, expected "
                    f"{message.weight:g}; give each trained segment of a turn weight=message.weight"
                )


@SUITE.clause("Content that spells a control token stays plain text, in every turn.", needs=["keeps-content"])
def keeps_text_text(case: TemplateCase) -> None:
    control_ids = set(check_controls(case.template, case.kit.tokenizer).values())

    def controls_in(segments: Sequence[Segment]) -> list[int]:
        return [token for token in case.encoder.encode_segments(segments)[0] if token in control_ids]

    for token in sorted(case.template.controls):
        try:
            case.encoder.plain(token)
        except DataError:
            continue  # this tokenizer cannot encode the token as plain text, so a row with it is refused
        for harmless in case.answered:
            turns = [dataclasses.replace(m, content=f"{m.content} {token} {m.content}.") for m in harmless.messages]
            for name, method in case.methods.items():
                try:
                    segments = method(dataclasses.replace(harmless, messages=tuple(turns)))
                except DataError:
                    continue  # a row that is refused is not trained on
                seen, expected = controls_in(segments), controls_in(method(harmless))
                if seen != expected:
                    raise ClauseError(
                        f"contents that spell {token} made {name} write {len(seen)} control tokens, harmless contents "
                        f"{len(expected)}; write a content as one plain segment, and never search it"
                    )
                text = Rendered(segments).text
                for turn in turns if name == "render" else turns[:-1]:
                    if turn.content not in text:
                        raise ClauseError(
                            f"{name} changed the {turn.role}'s {turn.content!r:.100}; write it unchanged, since plain "
                            "segments are encoded by a tokenizer without control tokens"
                        )


@SUITE.clause(
    "The generation prompt is a prefix of the training text; the prompt is not trained, the answer and its stop are.",
    needs=["trains-the-stop", "obeys-the-message"],
)
def prompt_is_a_prefix(case: TemplateCase) -> None:
    for conversation in case.conversations:
        if not conversation.messages or conversation.messages[-1].role != "assistant":
            continue
        if not case.template.rewrites_history:
            _prompt_length(case, conversation)
        # With the earlier turns untrained, every trained token belongs to the last one.
        *earlier, answer = conversation.messages
        untrained = (dataclasses.replace(message, trainable=False) for message in earlier)
        conversation = dataclasses.replace(conversation, messages=(*untrained, answer))
        length = _prompt_length(case, conversation)
        ids, loss_mask, _ = case.encoder.encode(conversation)
        if any(loss_mask[:length]):
            raise ClauseError(
                f"{_selected(case, ids[:length], loss_mask[:length])} is in the generation prompt and is trained; "
                "train only what the model has to write itself"
            )
        end = next((at for at, token in enumerate(ids) if at >= length and token in case.encoder.stop_ids), len(ids))
        if not all(loss_mask[length : end + 1]):
            untrained_mask = [not trained for trained in loss_mask[length : end + 1]]
            raise ClauseError(
                f"{_selected(case, ids[length : end + 1], untrained_mask)} comes between the generation prompt and the "
                "stop token and is not trained; write it in the prompt too, or train it"
            )


def _selected(case: TemplateCase, ids: Sequence[int], mask: Sequence[bool]) -> str:
    return repr(case.kit.tokenizer.decode([token for token, selected in zip(ids, mask, strict=True) if selected]))


def _prompt_length(case: TemplateCase, conversation: Conversation) -> int:
    """Return the number of prompt tokens. Raises ClauseError unless the encoded conversation begins with them."""
    prompt, full = case.encoder.prompt(without_answer(conversation)), case.encoder.encode(conversation)[0]
    if full[: len(prompt)] != prompt:
        texts = [str(case.kit.tokenizer.decode(ids)) for ids in (prompt, full)]
        tokens = [case.kit.tokenizer.convert_ids_to_tokens(ids) for ids in (prompt, full)]
        seen = difference(*tokens) if texts[1].startswith(texts[0]) else difference(*texts)
        raise ClauseError(
            f"generation_prompt and render begin differently, with {seen}, so that the model is prompted in another "
            "way than it was trained; let both write the turns with the same code"
        )
    return len(prompt)


@SUITE.clause(
    "Text up to an answer's stop token does not change when turns follow, unless `rewrites_history` is True.",
    needs=["trains-the-stop"],
)
def keeps_history(case: TemplateCase) -> None:
    if case.template.rewrites_history:
        return
    for conversation in case.answered:
        full = Rendered(case.template.render(conversation)).text
        for end, message in enumerate(conversation.messages, 1):
            if message.role != "assistant":
                continue
            beginning = dataclasses.replace(conversation, messages=conversation.messages[:end])
            rendered = Rendered(case.template.render(beginning))
            *_, (_, _, after) = rendered.contents(beginning)
            at = next(at for at, segment in enumerate(after) if segment.control)
            text = rendered.text[: len(rendered.text) - len(after) + at + len(after[at].text)]
            if not full.startswith(text):
                raise ClauseError(
                    f"the turns up to the answer {message.content!r} change when others follow: "
                    f"{difference(text, full)}; write a turn whatever follows it, or set rewrites_history = True"
                )


@SUITE.clause(
    "A Jinja `chat_template`, if there is one, writes the same text, with and without the generation prompt.",
    needs=["deterministic", "writes-segments"],
)
def chat_template_agrees(case: TemplateCase) -> None:
    if case.template.chat_template is None:
        return
    for conversation in filter(lambda conversation: conversation.messages, case.conversations):
        for name, method in case.methods.items():
            is_prompt = name == "generation_prompt"
            messages = (without_answer(conversation) if is_prompt else conversation).messages
            with must_not_raise(
                f"chat_template, on the conversation that begins {_begin(conversation)},",
                f"let it write what {name} writes, or set it to None",
            ):
                rendered = case.kit.tokenizer.apply_chat_template(
                    [{"role": message.role, "content": message.content} for message in messages],
                    tools=[dict(tool) for tool in conversation.tools] or None,
                    chat_template=case.template.chat_template,
                    add_generation_prompt=is_prompt,
                    tokenize=False,
                )
            text = Rendered(method(conversation)).text
            if rendered != text:
                raise ClauseError(
                    f"chat_template and {name} write {difference(str(rendered), text)}; let both write the same, or "
                    "set chat_template to None"
                )


def check_template(plugin: object, *, model: Path | None = None) -> None:
    """Check the plugin's template. Raises ContractError, which names the broken clauses.

    `model` is a directory with a tokenizer; by default the tiny one, which gets the template's control tokens.
    """
    SUITE.check(plugin, model=model)
