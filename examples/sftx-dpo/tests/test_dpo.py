"""The contracts of the hooks that DPO fills, its formula, and its error messages."""

from __future__ import annotations

import math
from typing import Any

import pytest
from sftx import ConfigError, DataError, Example, Location
from sftx.testing import check_collator, check_loss, check_parser

from sftx_dpo import DPO

PAIRS = [
    {
        "conversations": [{"from": "human", "value": f"What is {n} + 1?"}],
        "chosen": {"from": "gpt", "value": f"{n + 1}"},
        "rejected": {"from": "gpt", "value": f"Perhaps {n + 2}?"},
    }
    for n in range(6)
]


@pytest.mark.parametrize("check", [check_parser, check_collator, check_loss])
@pytest.mark.parametrize("plugin", [DPO(), DPO(beta=0.5, label_smoothing=0.1)], ids=["default", "smoothed"])
def test_it_keeps_the_contracts(check: Any, plugin: DPO) -> None:
    check(plugin)


def test_a_run_starts_at_log_2_and_learns_to_prefer_the_chosen_answers(plugin_run: Any) -> None:
    result = plugin_run("dpo", "lora", rows=PAIRS, dpo__beta=0.5, train__max_steps=20, train__learning_rate=0.02)
    before, after = (result.summary["held_out"][when] for when in ("before", "after"))
    assert before["loss"] == pytest.approx(math.log(2)), "before training, the model equals its reference"
    assert before["rewards/margins"] == pytest.approx(0, abs=1e-4)
    assert after["loss"] < 0.5
    assert after["rewards/accuracies"] == 1
    assert after["rewards/margins"] == pytest.approx(after["rewards/chosen"] - after["rewards/rejected"], rel=1e-4)


def test_only_the_answers_are_trained(tiny_tokenizer: Any) -> None:
    record = {
        "system": "Be brief.",
        "conversations": [
            {"from": "human", "value": "Hello"},
            {"from": "gpt", "value": "Hello!"},
            {"from": "human", "value": "Bye"},
        ],
        "chosen": {"from": "gpt", "value": "Goodbye."},
        "rejected": {"from": "gpt", "value": "Hello."},
    }
    chosen, rejected = DPO().sftx_parser().parse(record, Location("pairs.jsonl", 1))
    assert [m.content for m in chosen.messages] == ["Be brief.", "Hello", "Hello!", "Bye", "Goodbye."]
    assert [m.trained for m in chosen.messages] == [m.trained for m in rejected.messages] == [False] * 4 + [True]
    assert chosen.messages[:-1] == rejected.messages[:-1]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"chosen": {"from": "human", "value": "x"}}, "chosen.from .*'human'.*'gpt'"),
        ({"rejected": None}, "rejected .*missing or null"),
        ({"conversations": []}, r"conversations .*\[\]"),
        ({"conversations": [{"from": "gpt", "value": "Hi"}]}, r"the last turn of conversations .*human"),
        ({"conversations": [{"from": "bot", "value": "Hi"}]}, r"conversations\[0\].from .*'bot'.* human"),
        ({"tools": "[]"}, "tools"),
        ({"system": 3}, r"system .*3.* text"),
    ],
)
def test_a_record_that_is_not_a_pair_is_refused_with_its_place(change: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=rf"^pairs.jsonl:7: {message}"):
        DPO().sftx_parser().parse(PAIRS[0] | change, Location("pairs.jsonl", 7))


def test_an_ordinary_row_is_refused_with_its_place() -> None:
    ordinary = Example([5, 6, 7], [False, True, True], row_id="chat.jsonl:3", group=3)
    with pytest.raises(DataError, match=r"^chat.jsonl:3: .*preference pair"):
        DPO().sftx_collator().collate([ordinary])


def test_a_run_on_ordinary_rows_names_the_row(plugin_run: Any) -> None:
    rows = [*PAIRS, {"prompt": "1 plus 1", "completion": "2"}]
    with pytest.raises(DataError, match=r"rows.jsonl:7: .*preference pair"):
        plugin_run("dpo", "lora", rows=rows)
    with pytest.raises(DataError, match=r"rows.jsonl:7: conversations .*missing or null"):
        plugin_run("dpo", "lora", rows=rows, data__format="dpo")


def test_full_fine_tuning_has_no_reference_and_says_so(plugin_run: Any) -> None:
    with pytest.raises(ConfigError, match=r"plugin 'dpo' \(sftx-dpo 0\.1\.0\): .* add --plugin lora"):
        plugin_run("dpo", rows=PAIRS)
