"""The contracts of the hooks that AlphaPO fills, its formula, and its error messages."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from sftx import DataError, Location
from sftx.testing import check_loss, check_parser

from sftx_alphapo import AlphaPO, AlphaPOLoss

PAIRS = [{"prompt": f"What is {n} + 1?", "chosen": f"{n + 1}", "rejected": f"Perhaps {n + 2}?"} for n in range(6)]


@pytest.mark.parametrize("check", [check_parser, check_loss])
@pytest.mark.parametrize("plugin", [AlphaPO(), AlphaPO(alpha=-0.5, gamma=0)], ids=["default", "negative"])
def test_it_keeps_the_contracts(check: Any, plugin: AlphaPO) -> None:
    check(plugin)


@pytest.mark.parametrize("alpha", [0.25, 2.0, -0.5])
def test_the_reward_is_that_of_the_paper(alpha: float) -> None:
    """Evaluated with Python's floats on the probability of a whole answer and its number of tokens."""
    loss = AlphaPOLoss(alpha, beta=2.5, gamma=1.0)
    for log_prob, num_tokens in ((-3.0, 2), (-40.0, 20), (-0.001, 5)):
        expected = 2.5 * (1 - math.exp(log_prob) ** (-alpha / num_tokens)) / alpha
        found = loss.rewards(torch.tensor(log_prob / num_tokens, dtype=torch.float64)).item()
        assert found == pytest.approx(expected, rel=1e-9)


def test_a_small_alpha_is_simpo() -> None:
    log_probs = torch.tensor([-0.1, -1.0, -9.0], dtype=torch.float64)
    small, none = (AlphaPOLoss(alpha, 2.0, 1.0).rewards(log_probs) for alpha in (1e-8, 0.0))
    torch.testing.assert_close(small, none, rtol=1e-6, atol=0)
    torch.testing.assert_close(none, 2.0 * log_probs)


def test_a_run_learns_to_prefer_the_chosen_answers(plugin_run: Any) -> None:
    result = plugin_run("alphapo", "lora", rows=PAIRS, train__max_steps=20, train__learning_rate=0.02)
    before, after = (result.summary["held_out"][when] for when in ("before", "after"))
    assert after["loss"] < before["loss"]
    assert after["rewards/accuracies"] == 1
    assert after["rewards/margins"] == pytest.approx(after["rewards/chosen"] - after["rewards/rejected"], rel=1e-4)


def test_the_parser_of_sftx_gives_the_same_pairs(plugin_run: Any) -> None:
    """Other forms of pairs are read by naming `preference` first; both parsers mark the sides alike."""
    rows = [
        {
            "chosen": [{"role": "user", "content": row["prompt"]}, {"role": "assistant", "content": row["chosen"]}],
            "rejected": [{"role": "user", "content": row["prompt"]}, {"role": "assistant", "content": row["rejected"]}],
        }
        for row in PAIRS
    ]
    ours = plugin_run("alphapo", "lora", rows=PAIRS)
    theirs = plugin_run("preference", "alphapo", "lora", rows=rows)
    assert ours.summary["held_out"]["after"]["loss"] == theirs.summary["held_out"]["after"]["loss"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"chosen": 3}, "chosen is 3, expected text"),
        ({"rejected": None}, "rejected is None, expected text"),
        ({"rejected": "1"}, "chosen and rejected are the same answer"),
    ],
)
def test_a_record_that_is_not_a_pair_is_refused_with_its_place(change: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=rf"^pairs.jsonl:7: {message}"):
        AlphaPO().sftx_parser().parse(PAIRS[0] | change, Location("pairs.jsonl", 7))


def test_a_run_on_ordinary_rows_names_the_row(plugin_run: Any) -> None:
    with pytest.raises(DataError, match=r"rows.jsonl:7: is not a preference pair"):
        plugin_run("alphapo", "lora", rows=[*PAIRS, {"prompt": "1 plus 1", "completion": "2"}])
