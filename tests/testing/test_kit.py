"""Tests of the test-kit: the tiny model and tokenizer, the fixtures, and the findings of a suite."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from sftx import ConfigError
from sftx.testing import ContractError
from sftx.testing.clauses import ClauseError, Suite


def test_the_tiny_tokenizer_is_the_same_each_time_and_reads_any_text(tiny_model: Path, tiny_tokenizer: Any) -> None:
    from transformers import AutoTokenizer

    text = "Hällo 北京 🙂\n\t<|im_end|>"
    saved = AutoTokenizer.from_pretrained(tiny_model)
    assert saved.get_vocab() == tiny_tokenizer.get_vocab()
    assert len(tiny_tokenizer) == 512
    ids = tiny_tokenizer(text, add_special_tokens=False).input_ids
    assert saved(text, add_special_tokens=False).input_ids == ids
    assert tiny_tokenizer.decode(ids) == text
    assert len(ids) < len(text.encode())  # it has merges: the joined string is not its parts
    asked = tiny_tokenizer.apply_chat_template([{"role": "user", "content": "hi"}], tokenize=False)
    assert asked == "<|im_start|>user\nhi<|im_end|>\n"


def test_plugin_run_trains_two_steps_and_takes_options(plugin_run: Any) -> None:
    result = plugin_run("lora", "exact-match", lora__r=3, train__learning_rate=0.01)
    assert result.summary["num_steps"] == 2
    assert "exact-match" in result.summary["held_out"]["after"]
    assert json.loads((result.output_dir / "adapter" / "adapter_config.json").read_text())["r"] == 3
    other = plugin_run("lora", rows=[{"prompt": "1 plus 1", "completion": "2"}] * 4)
    assert other.output_dir != result.output_dir
    with pytest.raises(ConfigError, match=r"^lora\.r=0: plugin 'lora'"):
        plugin_run("lora", lora__r=0)


def test_a_suite_reports_each_clause_and_skips_what_says_nothing() -> None:
    suite: Suite[int] = Suite("metric", lambda kit: kit.plugin)  # type: ignore[arg-type,return-value]

    @suite.clause("It is positive.")
    def is_positive(case: int) -> None:
        if case <= 0:
            raise ClauseError(f"it is {case}; add to it")

    @suite.clause("Its root is whole.", needs=["is-positive"])
    def has_root(case: int) -> None:
        if (case**0.5) % 1:
            raise ClauseError("it is no square")

    @suite.clause("Ten can be divided by it.")
    def divides(case: int) -> None:
        assert 10 // case

    def states(case: int) -> dict[str, str]:
        return {finding.clause: finding.status for finding in suite.findings(case)}

    assert states(4) == {"made": "ok", "is-positive": "ok", "has-root": "ok", "divides": "ok"}
    assert states(-4) == {"made": "ok", "is-positive": "failed", "has-root": "skipped", "divides": "ok"}
    assert states(0)["divides"] == "failed"
    suite.check(4)
    with pytest.raises(ContractError) as caught:
        suite.check(0)
    assert "metric / is-positive: It is positive.\n    it is 0; add to it" in str(caught.value)
    assert "raised ZeroDivisionError" in str(caught.value)
    assert "has-root" not in str(caught.value)
    assert len(caught.value.findings) == 4


def test_a_plugin_whose_hook_fails_fails_that_and_the_rest_says_nothing() -> None:
    from sftx.testing.metric import SUITE

    class Bad:
        def sftx_metric(self) -> int:
            return 3

    made, *others = SUITE.findings(Bad())
    assert (made.clause, made.status) == ("made", "failed")
    assert "returned int, expected a Metric" in made.message
    assert {finding.status for finding in others} == {"skipped"}


def test_a_suite_bites_without_assertions_too() -> None:
    """`python -O` removes assert statements, so clauses must raise exceptions."""
    import subprocess
    import sys

    code = (
        "from sftx import Observer\n"
        "from sftx.testing.observer import SUITE\n"
        "class Bad(Observer):\n"
        "    def on_end(self, summary): raise ValueError('no')\n"
        "class Plugin:\n"
        "    def sftx_observer(self, run): return Bad()\n"
        "print([finding.clause for finding in SUITE.findings(Plugin()) if finding.status == 'failed'])\n"
    )
    done = subprocess.run([sys.executable, "-O", "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "['takes-every-event']\n"


def test_checking_leaves_the_author_s_random_numbers() -> None:
    import torch

    from sftx.testing import check_adapter
    from sftx.testing.kit import built_in

    before = torch.get_rng_state()
    check_adapter(built_in("lora"))
    assert torch.equal(torch.get_rng_state(), before)
