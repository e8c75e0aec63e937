"""`sftx verify` passes on good runs, names what it cannot check, and catches planted faults where they are."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from click.testing import CliRunner, Result

from sftx.cli import main
from sftx.verify.findings import CHECKS


@pytest.fixture
def rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Write rows of unequal lengths into the working directory."""
    words = ["one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"]
    for name, num in (("train", 24), ("held", 5)):
        lines = [
            {"prompt": f"{name}: count to {n}", "completion": " ".join(words[: 1 + n * 7 % 10])} for n in range(num)
        ]
        text = "".join(json.dumps(line) + "\n" for line in lines)
        (tmp_path / f"{name}.jsonl").write_text(text, encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def verify(*arguments: str) -> Result:
    """Run the command on the tiny model and these options."""
    common = ["--model", "sftx:tiny", "--data", "train.jsonl", "--per-device-train-batch-size", "2"]
    return CliRunner().invoke(main, ["verify", *common, *arguments], catch_exceptions=False)


def statuses(result: Result) -> dict[str, str]:
    return {finding["check"]: finding["status"] for finding in json.loads(result.stdout)["findings"]}


def seen(result: Result, check: str) -> str:
    return next(str(finding["seen"]) for finding in json.loads(result.stdout)["findings"] if finding["check"] == check)


LORA = ("--plugin", "chatml", "--plugin", "lora", "--set", "lora.lora_dropout=0.1", "--learning-rate", "1e-2")


def test_a_good_run_passes_every_check_and_leaves_nothing(rows: Path) -> None:
    before = sorted(rows.rglob("*"))
    result = verify(*LORA, "--eval-data", "held.jsonl", "--plugin", "exact-match", "--output-dir", "mine", "--json")
    assert result.exit_code == 0, result.output
    report = json.loads(result.stdout)
    assert statuses(result) == dict.fromkeys(CHECKS, "passed")
    figures = {finding["check"]: finding["figures"] for finding in report["findings"]}
    assert figures["resume"]["files"] > 20
    assert figures["masks"]["examples"] == figures["stop"]["answers"] == figures["prompt"]["served_equal"] == 24
    assert 0 < figures["accumulation"]["gradient_difference"] <= figures["accumulation"]["tolerance"]
    assert report["passed"]
    assert sorted(rows.rglob("*")) == before


def test_what_cannot_be_checked_is_listed_with_the_reason(rows: Path) -> None:
    result = verify("--only", "held-out", "--only", "stop", "--only", "masks", "--plugin", "chatml", "--json")
    assert result.exit_code == 0, result.output
    assert statuses(result) == {"masks": "passed", "stop": "passed", "held-out": "not checked"}
    assert seen(result, "held-out") == "the run has no held-out rows"


def test_the_page_is_80_columns_wide_and_ends_with_the_verdict(rows: Path) -> None:
    result = verify("--only", "masks", "--only", "rows", "--plugin", "chatml", "--max-length", "30")
    assert result.exit_code == 0, result.output
    lines = result.stdout.splitlines()
    assert max(map(len, lines)) <= 80
    assert "ledger: 18 cut" in " ".join(result.stdout.split())
    assert lines[-1].startswith("2 checks in ")
    assert lines[-1].endswith(": 2 passed, 0 failed, 0 not checked")


def test_rows_that_are_held_out_and_trained_on_fail(rows: Path) -> None:
    text = (rows / "held.jsonl").read_text(encoding="utf-8")
    with (rows / "train.jsonl").open("a", encoding="utf-8") as file:
        file.write(text.splitlines()[0] + "\n")
    result = verify("--only", "held-out", "--only", "start", *LORA, "--eval-data", "held.jsonl", "--json")
    assert result.exit_code == 1
    assert statuses(result)["held-out"] == "failed"
    assert "1 of 5 held-out examples (20.0%) is trained on" in seen(result, "held-out")
    assert statuses(result)["start"] == "failed", "the run itself refuses a tenth"


# --- planted faults -------------------------------------------------------------------------------


class Fault(NamedTuple):
    code: str
    """A module with the plugin `Fault`."""
    check: str
    """The check that fails."""
    says: str
    """What its line says, in part."""
    arguments: Sequence[str] = LORA


_START = """
from dataclasses import dataclass, replace
from sftx import *
from sftx import hookimpl
"""

SHIFTED = Fault(
    _START
    + """
from sftx_plugins.collators.padded import Padded

@dataclass(frozen=True, eq=False)
class Fault(Padded):
    def collate(self, examples):
        batch = super().collate(examples)
        return replace(batch, labels_BT=batch.labels_BT.roll(1, dims=1))
""",
    "masks",
    "gives position",
)
MEAN_OF_MEANS = Fault(
    _START
    + """
from sftx_plugins.losses.masked_ce import MaskedCE

@dataclass(frozen=True, eq=False)
class Fault(MaskedCE):
    def denominator(self, batch):
        return 1.0

    def __call__(self, lm, batch):
        out = super().__call__(lm, batch)
        return replace(out, sum=out.sum / batch.num_label_tokens)
""",
    "accumulation",
    "and a gradient that is",
)
LEAKING = Fault(
    _START
    + """
import torch
from sftx_plugins.collators.packed import Packed, PackedRows

@dataclass(frozen=True, eq=False)
class Fault(Packed):
    @hookimpl
    def sftx_collator(self, max_length):
        return Rows(max_length, "bfd", "varlen")

class Rows(PackedRows):
    def collate(self, examples):
        batch = super().collate(examples)
        total = batch.input_ids_BT.shape[1]
        return replace(
            batch, cu_seqlens=None, lengths_B=torch.tensor([total]), max_seqlen=total,
            position_ids_BT=torch.arange(total)[None],
        )
""",
    "packing",
    "padded together give the loss",
)
ONE_DOCUMENT = Fault(
    LEAKING.code.replace("=None, lengths_B=torch.tensor([total])", "=torch.tensor([0, total]).int()"), "start", ""
)
UNSTOPPED = Fault(
    _START
    + """
from sftx_plugins.templates.chatml import ChatML

@dataclass(frozen=True, eq=False)
class Fault(ChatML):
    def render(self, conversation):
        return tuple(replace(s, trainable=s.trainable and not s.control) for s in super().render(conversation))
""",
    "stop",
    "label tokens are <|im_end|>, and it has 1 answer",
    LORA[2:],
)
ASKS_OTHERWISE = Fault(
    _START
    + """
from sftx_plugins.templates.chatml import ChatML

@dataclass(frozen=True, eq=False)
class Fault(ChatML):
    def generation_prompt(self, conversation):
        return (*super().generation_prompt(conversation), Segment("Answer: "))
""",
    "prompt",
    "in the prompt of chat, and was",
    LORA[2:],
)
SERVED_OTHERWISE = Fault(
    _START
    + """
from sftx_plugins.templates.chatml import ChatML

@dataclass(frozen=True, eq=False)
class Fault(ChatML):
    @property
    def chat_template(self):
        return super().chat_template + "{{- 'Answer: ' if add_generation_prompt }}"
""",
    "prompt",
    "in the prompt of the saved chat template, and was",
    LORA[2:],
)
TRAINS_QUESTIONS = Fault(
    _START
    + """
from sftx_plugins.templates.chatml import ChatML

@dataclass(frozen=True, eq=False)
class Fault(ChatML):
    def render(self, conversation):
        return tuple(replace(s, trainable=True) if s.role == "user" else s for s in super().render(conversation))
""",
    "masks",
    "is trained, and the answer is",
    LORA[2:],
)
FORGETFUL = Fault(
    _START
    + """
import torch

class Momentum(torch.optim.Optimizer):
    def __init__(self, params, lr):
        super().__init__(params, {"lr": lr})
        self.remembered = {}

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for p in (p for p in group["params"] if p.grad is not None):
                self.remembered[p] = p.grad + 0.9 * self.remembered.get(p, 0)
                p.sub_(group["lr"] * self.remembered[p])

@dataclass(frozen=True, eq=False)
class Fault:
    state_bytes = 4.0
    elementwise = True

    @hookimpl
    def sftx_optimizer(self, run):
        self.__dict__["rate"] = run.config["train"]["learning_rate"]
        return self

    def build(self, params):
        return [Momentum(parameter_groups(params, 0.0), self.rate)]
""",
    "resume",
    "files differ from those of an uninterrupted run",
    (*LORA, "--set", "lora.lora_dropout=0"),
)
SKIPPING = Fault(
    _START
    + """
@dataclass(frozen=True, eq=False)
class Fault:
    scheme = "counting"

    @hookimpl
    def sftx_source(self):
        return self

    def check(self, address):
        pass

    def rows(self, address, start):
        for n in range(start + 2 * (start > 0), 40):
            yield Location(address, n + 1, "row"), {"prompt": f"say {n}", "completion": f"{n} " * (1 + n % 7)}

    def fingerprint(self, address):
        return "the same"
""",
    "resume",
    "files differ from those of an uninterrupted run",
    (*LORA, "--data", "counting:to-forty", "--streaming", "--plan-window", "4", "--max-steps", "50"),
)
BY_RANK = Fault(
    _START
    + """
import os
from sftx_plugins.losses.masked_ce import MaskedCE

@dataclass(frozen=True, eq=False)
class Fault(MaskedCE):
    def denominator(self, batch):
        return super().denominator(batch) * (1 + int(os.environ.get("RANK", "0")))
""",
    "processes",
    "2 processes give the loss",
)
RANDOM = Fault(
    _START
    + """
import random
from sftx_plugins.losses.masked_ce import MaskedCE

@dataclass(frozen=True, eq=False)
class Fault(MaskedCE):
    def __call__(self, lm, batch):
        out = super().__call__(lm, batch)
        return replace(out, sum=out.sum * (1 + random.SystemRandom().random()))
""",
    "resume",
    "two uninterrupted runs differ as well",
)
HOARDING = Fault(
    _START
    + """
import torch
from sftx_plugins.losses.masked_ce import MaskedCE

@dataclass(frozen=True, eq=False)
class Fault(MaskedCE):
    def __call__(self, lm, batch):
        if os.environ.get("HOARD") is None and type(batch.labels_BT) is torch.Tensor and torch.is_grad_enabled():
            lm.hoard = [*getattr(lm, "hoard", []), torch.ones(40_000_000)]
        return super().__call__(lm, batch)
""".replace("import torch", "import os\nimport torch", 1),
    "memory",
    "is accepted",
)


@pytest.mark.parametrize(
    "fault",
    [
        pytest.param(SHIFTED, id="labels are shifted twice"),
        pytest.param(TRAINS_QUESTIONS, id="questions are trained"),
        pytest.param(UNSTOPPED, id="the stop token is not trained"),
        pytest.param(MEAN_OF_MEANS, id="a mean of means"),
        pytest.param(LEAKING, id="documents see one another"),
        pytest.param(ASKS_OTHERWISE, id="another prompt than in training"),
        pytest.param(SERVED_OTHERWISE, id="another chat template", marks=pytest.mark.slow),
        pytest.param(FORGETFUL, id="an optimizer that forgets", marks=pytest.mark.slow),
        pytest.param(SKIPPING, id="a source that skips rows after a resume", marks=pytest.mark.slow),
        pytest.param(RANDOM, id="random numbers of nobody's seed", marks=pytest.mark.slow),
        pytest.param(BY_RANK, id="a denominator by rank", marks=pytest.mark.slow),
        pytest.param(HOARDING, id="memory that is never given back", marks=pytest.mark.slow),
    ],
)
def test_a_planted_fault_fails_its_check(fault: Fault, rows: Path, install_plugin: Callable[..., Any]) -> None:
    install_plugin("acme-fault", fault.code, {"fault": "Fault"})
    result = verify("--plugin", "fault", *fault.arguments, "--only", fault.check, "--json")
    assert result.exit_code == 1, result.output
    assert statuses(result) == {fault.check: "failed"}, result.output
    assert fault.says in seen(result, fault.check)


@pytest.mark.parametrize(
    ("fault", "says", "failed"),
    [
        (UNSTOPPED, "no row trains the stop token <|im_end|>", ["start", "stop"]),
        pytest.param(
            ONE_DOCUMENT, "packs 2 examples as 1 document, so that they", ["start", "masks"], marks=pytest.mark.slow
        ),
    ],
    ids=["a stop token that no row trains", "packed rows without boundaries"],
)
def test_a_run_that_is_refused_before_its_first_step_says_so(
    fault: Fault, says: str, failed: list[str], rows: Path, install_plugin: Callable[..., Any]
) -> None:
    install_plugin("acme-fault", fault.code, {"fault": "Fault"})
    result = verify("--plugin", "fault", *fault.arguments, "--json")
    assert result.exit_code == 1
    found = statuses(result)
    assert [check for check, status in found.items() if status == "failed"] == failed
    assert "refused before the first step: " in seen(result, "start")
    assert says in seen(result, "start")
    assert found["resume"] == found["accumulation"] == "not checked"
    assert seen(result, "resume") == "the run does not start"
