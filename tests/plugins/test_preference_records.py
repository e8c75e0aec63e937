"""The parser of preference records: every form that it reads, which rows it refuses, and what a run makes of them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from sftx import ConfigError, Conversation, DataError, Location, Message
from sftx.config.loading import load
from sftx.training import assemble
from sftx_plugins.preference.records import PreferenceParser

WHERE = Location("pairs.jsonl", 7)
PAIRS, LABELLED = PreferenceParser(), PreferenceParser(labelled=True)
QUESTION = [{"role": "user", "content": "A fruit?"}]
GOOD, BAD = [{"role": "assistant", "content": "Pear."}], [{"role": "assistant", "content": "Seven."}]
TWO_ANSWERS = QUESTION + GOOD + QUESTION + BAD
TOOL = {"type": "function", "function": {"name": "weigh", "parameters": {}}}
SAFE = {"prompt": "A fruit?", "response_0": "Pear.", "response_1": "Seven.", "better_response_id": 0}

SAME_PAIR: dict[str, dict[str, Any]] = {
    "text": {"prompt": "A fruit?", "chosen": "Pear.", "rejected": "Seven."},
    "messages with a prompt": {"prompt": QUESTION, "chosen": GOOD, "rejected": BAD},
    "messages with a prompt of text": {"prompt": "A fruit?", "chosen": GOOD, "rejected": BAD},
    "messages with a prompt in them": {"chosen": QUESTION + GOOD, "rejected": QUESTION + BAD},
    "ultrafeedback": {
        "prompt": "A fruit?",
        "chosen": QUESTION + GOOD,
        "rejected": QUESTION + BAD,
        "messages": QUESTION + GOOD,
        "score_chosen": 8.5,
    },
    "ranking of ShareGPT": {
        "conversations": [{"from": "human", "value": "A fruit?"}],
        "chosen": {"from": "gpt", "value": "Pear."},
        "rejected": {"from": "gpt", "value": "Seven."},
    },
    "ranking of OpenAI": {"messages": QUESTION, "chosen": GOOD[0], "rejected": BAD[0]},
    "ranking of Alpaca": {"instruction": "A fruit?", "input": "", "chosen": "Pear.", "rejected": "Seven."},
    "list of Alpaca": {"instruction": "A fruit?", "output": ["Pear.", "Seven."]},
    "hh-rlhf": {
        "chosen": "\n\nHuman: A fruit?\n\nAssistant: Pear.",
        "rejected": "\n\nHuman: A fruit?\n\nAssistant: Seven.",
    },
    "SafeRLHF": SAFE,
}


def read(parser: PreferenceParser, record: dict[str, Any]) -> list[Conversation]:
    assert parser.accepts(record)
    return [one for one in parser.parse(record, WHERE) if isinstance(one, Conversation)]


def shown(conversation: Conversation) -> list[tuple[str, str, bool]]:
    return [(message.role, message.content, message.trained) for message in conversation.messages]


@pytest.mark.parametrize("parser", [PAIRS, LABELLED], ids=["pairs", "labelled"])
@pytest.mark.parametrize("record", SAME_PAIR.values(), ids=SAME_PAIR)
def test_every_form_gives_the_same_pair(parser: PreferenceParser, record: dict[str, Any]) -> None:
    chosen, rejected = read(parser, record)
    assert shown(chosen) == [("user", "A fruit?", False), ("assistant", "Pear.", True)]
    assert shown(rejected) == [("user", "A fruit?", False), ("assistant", "Seven.", True)]
    assert [dict(one.extras) for one in (chosen, rejected)] == [{"preference": "chosen"}, {"preference": "rejected"}]


def test_only_the_answers_are_trained_and_the_rest_is_kept() -> None:
    record = {
        "system": "Be brief.",
        "conversations": [
            {"from": "human", "value": "Hello"},
            {"from": "gpt", "value": "Hello!"},
            {"from": "human", "value": "What does a pear weigh?"},
            {"from": "function_call", "value": '{"name": "weigh", "arguments": {}}'},
            {"from": "observation", "value": "200 g"},
        ],
        "chosen": {"from": "gpt", "value": "<think>\nThat is it.\n</think>\n\n200 g."},
        "rejected": {"from": "gpt", "value": "Much."},
        "tools": [TOOL],
    }
    chosen, rejected = read(PAIRS, record)
    assert chosen.messages[:-1] == rejected.messages[:-1]
    assert [m.role for m in chosen.messages] == [
        "system",
        "user",
        "assistant",
        "user",
        "assistant",
        "tool",
        "assistant",
    ]
    assert [m.trained for m in chosen.messages] == [False] * 6 + [True]
    assert (chosen.messages[-1].reasoning, chosen.messages[-1].content) == ("That is it.", "200 g.")
    assert chosen.tools == rejected.tools == (TOOL,)


def test_history_and_input_of_alpaca_are_the_question() -> None:
    record = {"instruction": "Translate.", "input": "house", "history": [["Hi", "Hello!"]], "output": ["Haus", "Maus"]}
    chosen, _ = read(PAIRS, record | {"system": "In German."})
    assert [m.content for m in chosen.messages] == ["In German.", "Hi", "Hello!", "Translate.\nhouse", "Haus"]
    assert [m.trained for m in chosen.messages] == [False, False, False, False, True]


def test_the_prompt_of_two_whole_conversations_is_that_of_trl() -> None:
    from trl.data_utils import extract_prompt

    def turn(role: str, content: str) -> dict[str, str]:
        return {"role": role, "content": content}

    start = [turn("system", "s"), turn("user", "a"), turn("assistant", "b"), turn("user", "c")]
    for chosen, rejected in (
        ([*start, turn("assistant", "d")], [*start, turn("assistant", "e")]),
        ([*start, turn("assistant", "d"), turn("user", "f"), turn("assistant", "g")], [*start, turn("assistant", "e")]),
        ([*start[:2], turn("assistant", "x")], [*start, turn("assistant", "y")]),
    ):
        theirs = extract_prompt({"chosen": chosen, "rejected": rejected})
        for ours, side in zip(
            read(PAIRS, {"chosen": chosen, "rejected": rejected}), ("chosen", "rejected"), strict=True
        ):
            num = len(theirs["prompt"])
            assert [m.content for m in ours.messages[:num]] == [m["content"] for m in theirs["prompt"]]
            assert [m.content for m in ours.messages[num:]] == [m["content"] for m in theirs[side]]
            assert not any(m.trained for m in ours.messages[:num])
            assert all(m.trained == (m.role == "assistant") for m in ours.messages[num:])


@pytest.mark.parametrize(
    ("is_safe", "better", "safer", "best"),
    [
        ((True, False), 1, None, 0),  # safe over unsafe, however helpful
        ((False, True), 0, 1, 1),
        ((True, True), 1, 0, 1),  # both safe: the more helpful one
        ((False, False), 1, 0, 0),  # neither safe: the safer one
        ((False, False), 1, None, 1),
        ((None, None), 1, None, 1),
    ],
)
def test_a_safe_response_is_chosen_over_an_unsafe_one(
    is_safe: tuple[bool | None, bool | None], better: int, safer: int | None, best: int
) -> None:
    flags = {f"is_response_{n}_safe": flag for n, flag in enumerate(is_safe)}
    chosen, rejected = read(PAIRS, SAFE | flags | {"better_response_id": better, "safer_response_id": safer})
    assert chosen.messages[-1].content == SAFE[f"response_{best}"]
    assert rejected.messages[-1].content == SAFE[f"response_{1 - best}"]


LABELLED_ROWS: dict[str, dict[str, Any]] = {
    "TRL": {"prompt": "A fruit?", "completion": "Pear."},
    "TRL's messages": {"prompt": QUESTION, "completion": GOOD},
    "LLaMA-Factory's messages": {"messages": QUESTION + GOOD},
    "ShareGPT": {"conversations": [{"from": "human", "value": "A fruit?"}, {"from": "gpt", "value": "Pear."}]},
    "Alpaca": {"instruction": "A fruit?", "output": "Pear."},
}


@pytest.mark.parametrize("label", ["label", "kto_tag"])
@pytest.mark.parametrize("record", LABELLED_ROWS.values(), ids=LABELLED_ROWS)
def test_a_labelled_answer_is_one_conversation(record: dict[str, Any], label: str) -> None:
    for is_good, side in ((True, "chosen"), (False, "rejected")):
        (one,) = read(LABELLED, record | {label: is_good})
        assert shown(one) == [("user", "A fruit?", False), ("assistant", "Pear.", True)]
        assert one.extras == {"preference": side}
        assert not PAIRS.accepts(record | {label: is_good})


def test_of_a_labelled_conversation_the_last_answer_is_trained() -> None:
    (one,) = read(LABELLED, {"messages": QUESTION + BAD + QUESTION + GOOD, "label": True})
    assert [m.trained for m in one.messages] == [False, False, False, True]


@pytest.mark.parametrize(
    "record",
    [
        {"messages": QUESTION + GOOD},
        {"prompt": "a", "completion": "b"},
        {"text": "a"},
        {"chosen": "a"},
        {"label": True},
    ],
)
def test_rows_of_other_formats_are_left_to_their_parsers(record: dict[str, Any]) -> None:
    assert not LABELLED.accepts(record)
    assert not PAIRS.accepts(record)


@pytest.mark.parametrize(
    ("record", "message"),
    [
        (SAME_PAIR["text"] | {"rejected": "Pear."}, "chosen and rejected are the same answer.*invalid_rows=drop"),
        (SAME_PAIR["messages with a prompt in them"] | {"rejected": QUESTION + GOOD}, ".* are the same answer"),
        (SAME_PAIR["text"] | {"rejected": None}, "rejected is missing or null, expected text"),
        (
            SAME_PAIR["ranking of ShareGPT"] | {"chosen": {"from": "human", "value": "x"}},
            "chosen has no turn of the as",
        ),
        (SAME_PAIR["ranking of ShareGPT"] | {"chosen": {"from": "bot", "value": "x"}}, "chosen.from is 'bot'"),
        (SAME_PAIR["ranking of ShareGPT"] | {"conversations": []}, "conversations does not end with a turn of the us"),
        (SAME_PAIR["messages with a prompt"] | {"prompt": GOOD}, "prompt does not end with a turn of the user"),
        ({"chosen": TWO_ANSWERS, "rejected": TWO_ANSWERS[:2]}, "rejected ends where the two begin to differ"),
        (
            {"chosen": QUESTION + GOOD, "rejected": [{"role": "user", "content": "?"}, *BAD]},
            r"chosen\[0\] is a turn of",
        ),
        ({"chosen": "Pear.", "rejected": "Seven."}, "chosen begins with 'Pear.', expected 'Human:'"),
        (
            {"instruction": "A fruit?", "output": "Pear."},
            "is no preference pair: output is text, expected a list of two",
        ),
        ({"instruction": "A fruit?", "output": ["Pear."]}, "output is a list of 1, expected two answers"),
        (SAFE | {"better_response_id": 2}, "better_response_id is 2, expected 0 or 1"),
        (SAFE | {"better_response_id": None}, "better_response_id is missing or null"),
        (SAFE | {"is_response_0_safe": "yes"}, "is_response_0_safe is 'yes', expected true or false"),
        (
            SAFE | {"is_response_0_safe": True, "is_response_1_safe": False, "safer_response_id": 1},
            "safer_response_id is 1, and is_response_0_safe says",
        ),
        (SAME_PAIR["text"] | {"images": ["a.png"]}, "images cannot be trained on"),
    ],
)
def test_a_row_that_is_no_pair_is_refused_with_its_place(record: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=rf"^pairs\.jsonl:7: {message}"):
        PAIRS.parse(record, WHERE)


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"prompt": "a", "completion": "b", "label": 1}, "label is 1, expected true or false"),
        ({"prompt": "a", "completion": "b", "label": None}, "label is missing or null, expected true or false"),
        ({"prompt": "a", "completion": "b", "label": True, "kto_tag": False}, "label and kto_tag contradict"),
        ({"messages": QUESTION, "label": True}, "messages does not end with an answer of the assistant"),
        ({"prompt": "a", "completion": None, "label": True}, "has a label and no answer"),
    ],
)
def test_a_row_without_a_clear_label_is_refused_with_its_place(record: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=rf"^pairs\.jsonl:7: {message}"):
        LABELLED.parse(record, WHERE)


def test_a_message_that_says_not_to_train_it_is_not_trained() -> None:
    chosen, _ = read(PAIRS, {"prompt": QUESTION, "chosen": [GOOD[0] | {"train": False}], "rejected": BAD})
    assert chosen.messages[-1] == Message("assistant", "Pear.", trainable=False)


def start(tmp_path: Path, tiny_model: Path, rows: list[dict[str, Any]], *plugins: str, **options: Any) -> Any:
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    given = {"model": str(tiny_model), "data.train": str(path), "output_dir": str(tmp_path / "out"), **options}
    assignments = [(name, value, name) for name, value in {"train.use_cpu": True, **given}.items()]
    return assemble(load(None, add=["chatml", "lora", *plugins], assignments=assignments))


def test_a_pair_with_an_empty_answer_is_dropped_whole(tmp_path: Path, tiny_model: Path) -> None:
    rows = [SAME_PAIR["text"], SAME_PAIR["text"] | {"rejected": " "}, SAME_PAIR["hh-rlhf"]]
    session = start(tmp_path, tiny_model, rows, "dpo", **{"data.max_dropped": 0.5})
    assert [(str(entry.where), entry.reason) for entry in session.data.ledger.entries] == [
        (f"{tmp_path / 'rows.jsonl'}:2", "every trained turn is empty")
    ]
    examples = session.data.examples
    assert [example.row_id.rpartition(":")[2] for example in examples] == ["1#1", "1#2", "3#1", "3#2"]
    assert [example.group for example in examples] == [0, 0, 1, 1]


def test_a_pair_without_a_difference_can_be_left_out(tmp_path: Path, tiny_model: Path) -> None:
    rows = [SAME_PAIR["text"], SAME_PAIR["text"] | {"rejected": "Pear."}]
    with pytest.raises(DataError, match=r"rows\.jsonl:2: chosen and rejected are the same answer"):
        start(tmp_path, tiny_model, rows, "dpo")
    session = start(tmp_path, tiny_model, rows, "dpo", **{"data.invalid_rows": "drop", "data.max_dropped": 0.5})
    assert len(session.data.examples) == 2
    assert "are the same answer" in session.data.ledger.entries[0].reason


def test_pairs_are_not_imitated(tmp_path: Path, tiny_model: Path) -> None:
    with pytest.raises(ConfigError, match=r"'preference' .* marked as worse ones, and plugin 'masked-ce' .*dpo, kto"):
        start(tmp_path, tiny_model, [SAME_PAIR["text"]], "preference")
