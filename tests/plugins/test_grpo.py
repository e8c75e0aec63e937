"""The plugin grpo: its losses and gradients are TRL's, and its runs do what a run with a rollout promises."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from sftx import Answer, Example, Question
from sftx.config.loading import load
from sftx.errors import ConfigError, DataError
from sftx.trainer.session import Session
from sftx.training import assemble
from sftx_plugins.reinforcement.grpo import advantages_of

REWARD = """
from dataclasses import dataclass
from sftx import hookimpl

@dataclass(frozen=True, eq=False)
class Digits:
    '''Scores answers by their tokens, and declines some.'''

    @hookimpl
    def sftx_reward(self):
        return self

    def __call__(self, answers):
        return [None if sum(a.token_ids) % 7 == 0 else sum(a.token_ids) % 5 / 5 for a in answers]
"""
STEPS, GENERATIONS, LENGTH = 10, 4, 8
SessionOf = Callable[..., Session]

# trl sets an option that transformers has renamed.
pytestmark = pytest.mark.filterwarnings("ignore:`gradient_checkpointing` is deprecated:FutureWarning")


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    path = tmp_path / "rows.jsonl"
    path.write_text(
        "".join(
            json.dumps({"prompt": f"What is {n} + {n % 3}?" + " Please." * (n % 4), "completion": str(n + n % 3)})
            + "\n"
            for n in range(7)
        ),
        encoding="utf-8",
    )
    return path


@pytest.fixture
def session_of(tiny_model: Path, tmp_path: Path, rows: Path, install_plugin: Any) -> SessionOf:
    """Return an assembled run: steps of 2 questions in 2 micro-batches, and an adapter with an effect."""
    install_plugin("digits-here", REWARD, {"digits": "Digits"})

    def make(*plugins: str, **options: Any) -> Session:
        import torch

        given: dict[str, Any] = {
            "model": str(tiny_model),
            "data.train": str(rows),
            "output_dir": str(tmp_path / "never-written"),
            "grpo.num_generations": GENERATIONS,
            "grpo.max_completion_length": LENGTH,
            "train.per_device_train_batch_size": 1,
            "train.train_batch_size": 2,
            "train.learning_rate": 5e-3,
            "train.lr_scheduler_type": "constant",
            "train.weight_decay": 0.01,
            "train.max_steps": STEPS,
            "train.use_cpu": True,
            **options,
        }
        assignments = [(name, value, name) for name, value in given.items()]
        session = assemble(load(None, add=["chatml", "lora", "grpo", "digits", *plugins], assignments=assignments))
        assert session.rollout is not None
        session.rollout.stop_ids = range(0, session.lm.head_weight.shape[0], 10)  # answers of different lengths
        torch.manual_seed(0)  # at another place a ratio may lie within rounding of the one that is clipped
        with torch.no_grad():
            for name, parameter in session.lm.named_parameters():
                if name.endswith("lora_B"):  # zero at first, which would hide any mistake
                    parameter.normal_(std=0.1)
        return session

    return make


# --- TRL ----------------------------------------------------------------------------------------


def oracle_of(model: Path, directory: Path, **options: Any) -> Any:
    """Return TRL's trainer on the same model with PEFT's LoRA. Its own data set is never read."""
    from datasets import Dataset
    from peft import LoraConfig
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl import GRPOConfig, GRPOTrainer

    oracle = GRPOTrainer(
        AutoModelForCausalLM.from_pretrained(model),
        reward_funcs=[lambda completions, **given: [0.0] * len(completions)],
        args=GRPOConfig(
            output_dir=str(directory / "trl"),
            per_device_train_batch_size=2 * GENERATIONS,
            num_generations=GENERATIONS,
            max_completion_length=LENGTH,
            use_cpu=True,
            bf16=False,
            gradient_checkpointing=False,
            report_to="none",
            disable_tqdm=True,
            **options,
        ),
        processing_class=AutoTokenizer.from_pretrained(model),
        train_dataset=Dataset.from_list([{"prompt": "a"}]),
        peft_config=LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM"),
    )
    oracle.current_gradient_accumulation_steps = 1
    return oracle


def copy_adapter(session: Session, peft_model: Any) -> None:
    """Copy our LoRA weights into PEFT's layers."""
    import torch

    ours = dict(session.lm.model.named_parameters())
    with torch.no_grad():
        for name, parameter in peft_model.named_parameters():
            if "lora_" in name:
                parameter.copy_(ours[name.removeprefix("base_model.model.").replace(".default.weight", "")])


def trl_inputs(examples: Sequence[Example], num_prompts: Sequence[int], truncated: Sequence[bool]) -> dict[str, Any]:
    """Return the inputs of TRL's loss: prompts padded at the left, answers at the right."""
    import torch

    prompts = [example.token_ids[:n].tolist() for example, n in zip(examples, num_prompts, strict=True)]
    answers = [example.token_ids[n:].tolist() for example, n in zip(examples, num_prompts, strict=True)]
    widths = [max(map(len, side)) for side in (prompts, answers)]
    mask = [
        [not cut] * len(ids) + [False] * (widths[1] - len(ids)) for ids, cut in zip(answers, truncated, strict=True)
    ]
    inputs = {
        "prompt_ids": torch.tensor([[0] * (widths[0] - len(ids)) + ids for ids in prompts]),
        "prompt_mask": torch.tensor([[0] * (widths[0] - len(ids)) + [1] * len(ids) for ids in prompts]),
        "completion_ids": torch.tensor([ids + [0] * (widths[1] - len(ids)) for ids in answers]),
        "completion_mask": torch.tensor(mask).int(),
        "advantages": torch.tensor([example.extras["advantage"] for example in examples]),
    }
    return inputs | {"num_items_in_batch": inputs["completion_mask"].sum()}


def trl_log_probs(oracle: Any, inputs: dict[str, Any]) -> Any:
    """Return log-probabilities of the answers' tokens as TRL computes them."""
    import torch

    ids = torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], 1)
    mask = torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], 1)
    with torch.no_grad():
        return oracle._get_per_token_logps_and_entropies(oracle.model, ids, mask, inputs["completion_ids"].shape[1])[0]


CASES: list[dict[str, Any]] = [
    {"loss_type": "dapo"},
    {"loss_type": "dapo", "temperature": 0.7, "beta": 0.1, "scale_rewards": "batch"},
    {"loss_type": "grpo", "num_iterations": 2, "steps_per_generation": 2, "epsilon": 0.05, "epsilon_high": 0.1},
    {
        "loss_type": "bnpo",
        "beta": 0.05,
        "use_bias_correction_kl": False,
        "num_iterations": 3,
        "delta": 1.05,
        "epsilon": 0.02,
    },
    {"loss_type": "dr_grpo", "mask_truncated_completions": True, "scale_rewards": "none"},
    {"loss_type": "grpo", "importance_sampling_level": "sequence", "num_iterations": 3, "epsilon": 0.01},
]


@pytest.mark.parametrize("options", CASES, ids=lambda options: "-".join(f"{v}" for v in options.values()))
def test_ten_steps_have_the_losses_gradients_and_metrics_of_trl(
    session_of: SessionOf, tiny_model: Path, tmp_path: Path, options: dict[str, Any]
) -> None:
    import torch

    session = session_of(**{f"grpo.{name}": value for name, value in options.items()})
    oracle = oracle_of(tiny_model, tmp_path, **options)
    copy_adapter(session, oracle.model)
    trained = [parameter for parameter in oracle.model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=5e-3, weight_decay=0.01)
    oracle.model.train()
    questions = {question.row_id: question for question in session.data.questions}
    losses, clipped = [], 0.0
    for number, planned in enumerate(session.sampler, 1):
        examples = [planned.examples[index] for row in planned.rows for index in row]
        num_prompts = [len(questions[example.row_id.partition(" answer")[0]].prompt_ids) for example in examples]
        inputs = trl_inputs(examples, num_prompts, [example.num_label_tokens == 0 for example in examples])
        for name in ("old_log_probs", "ref_log_probs"):
            if name in examples[0].extras:
                width = inputs["completion_ids"].shape[1]
                rows = [e.extras[name][n:] for e, n in zip(examples, num_prompts, strict=True)]
                inputs[f"{name[:3]}_per_token_logps"] = torch.tensor([row + [0.0] * (width - len(row)) for row in rows])
        mask = inputs["completion_mask"].bool()
        if "ref_per_token_logps" in inputs:
            with oracle.model.disable_adapter():
                expected = trl_log_probs(oracle, inputs)
            torch.testing.assert_close(inputs["ref_per_token_logps"][mask], expected[mask], rtol=0, atol=1e-5)
        if number == 1 and "old_per_token_logps" in inputs:
            old = inputs["old_per_token_logps"][mask]
            torch.testing.assert_close(old, trl_log_probs(oracle, inputs)[mask], rtol=0, atol=1e-5)
        ours = session.trainer.train_step(number, planned.epoch, session.trainer.micro_batches(planned))
        optimizer.zero_grad()
        loss = oracle._compute_loss(oracle.model, inputs)
        if options["loss_type"] == "dapo" or mask.any():
            loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        assert ours.loss == pytest.approx(loss.item(), abs=1e-5, rel=0)
        assert ours.grad_norm == pytest.approx(norm.item(), rel=1e-4, abs=1e-6)
        theirs = {name: oracle._metrics["train"][name][-1] for name in ours.metrics if name in oracle._metrics["train"]}
        assert theirs.keys() >= {"entropy", "clip_ratio/region_mean"}
        assert {name: ours.metrics[name] for name in theirs} == pytest.approx(theirs, abs=1e-5, rel=0)
        clipped += ours.metrics["clip_ratio/region_mean"]
        losses.append(ours.loss)
    assert len(losses) == STEPS
    assert max(losses) - min(losses) > 1e-3, "the losses must differ, or equal ones would prove little"
    assert (clipped > 0) == ("num_iterations" in options), "ratios must be clipped where there are several steps"


def test_advantages_are_those_of_trl() -> None:
    import torch
    from trl.trainer.utils import nanstd

    question = Question("rows:1", "x", [1], "y")
    scores = [[0.0, 1.0, 0.5, None], [1.0, 1.0, 1.0, 1.0], [None, 2.0, None, -1.0], [0.25, 0.0, 0.0, 0.0]]
    groups = [
        [
            Answer(question, n, "", (1,), (-1.0,), "stop", {} if s is None else {"r": s}, s or 0.0)
            for n, s in enumerate(group)
        ]
        for group in scores
    ]
    rewards = torch.tensor([[math.nan if s is None else s for s in group] for group in scores])  # TRL's are fp32
    centred = rewards - rewards.nanmean(1, keepdim=True)
    std = nanstd(rewards, dim=1)
    for scale, expected in (
        ("group", centred / (std[:, None] + 1e-4)),
        ("batch", centred / (nanstd(rewards) + 1e-4)),
        ("none", centred),
    ):
        found, metrics = advantages_of(groups, scale)  # type: ignore[arg-type]
        assert found == pytest.approx(expected.nan_to_num(nan=0.0).flatten().tolist(), abs=1e-6)
        assert metrics["reward"] == pytest.approx(rewards.nanmean().item())
        assert metrics["reward_std"] == pytest.approx(nanstd(rewards).item())
        assert metrics["rewards/r/mean"] == pytest.approx(rewards.nanmean().item())
        assert metrics["frac_reward_zero_std"] == 0.25


@pytest.mark.parametrize("options", [CASES[1], CASES[4], CASES[5]], ids=lambda options: f"{options['loss_type']}")
def test_packed_rows_that_share_a_question_give_the_same_losses_and_gradients(
    session_of: SessionOf, options: dict[str, Any]
) -> None:
    given = {f"grpo.{name}": value for name, value in options.items()}
    padded, packed = session_of(**given), session_of("packed", **given)
    for number, (one, other) in enumerate(zip(padded.sampler, packed.sampler, strict=True), 1):
        assert [e.token_ids.tolist() for e in one.examples] == [e.token_ids.tolist() for e in other.examples]
        batches = packed.trainer.micro_batches(other)
        num_tokens = sum(len(other.examples[index].token_ids) for row in other.rows for index in row)
        assert sum(micro.batch.input_ids_BT.numel() for micro in batches) < num_tokens, "the question stands once"
        expected = padded.trainer.train_step(number, one.epoch, padded.trainer.micro_batches(one))
        found = packed.trainer.train_step(number, other.epoch, batches)
        assert found.loss == pytest.approx(expected.loss, abs=1e-5, rel=0)
        assert found.grad_norm == pytest.approx(expected.grad_norm, rel=1e-4, abs=1e-6)
        assert found.metrics == pytest.approx(expected.metrics, abs=1e-5, rel=1e-5)
        if number == 4:
            break


def test_answers_do_not_depend_on_the_directory_of_the_data(session_of: SessionOf, rows: Path, tmp_path: Path) -> None:
    elsewhere = tmp_path / "elsewhere" / rows.name
    elsewhere.parent.mkdir()
    elsewhere.write_bytes(rows.read_bytes())
    one, other = (next(iter(session_of(**{"data.train": str(path)}).sampler)) for path in (rows, elsewhere))
    assert [e.token_ids.tolist() for e in one.examples] == [e.token_ids.tolist() for e in other.examples]


def test_held_out_rows_that_nothing_scores_are_not_silently_ignored(
    session_of: SessionOf, rows: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    held = tmp_path / "held.jsonl"
    held.write_text('{"prompt": "What is 8 + 2?", "completion": "10"}\n', encoding="utf-8")
    session_of(**{"data.eval": str(held)})
    assert "1 held-out row not used: in a run with a rollout" in caplog.text
    assert "add a metric, such as --plugin exact-match" in caplog.text
    with pytest.raises(
        ConfigError, match=r"'train.eval_steps': in a run with a rollout .* add a metric, .* leave it out"
    ):
        session_of(**{"data.eval": str(held), "train.eval_steps": 2})
    caplog.clear()
    session_of("exact-match", **{"data.eval": str(held), "train.eval_steps": 2})
    assert "not used" not in caplog.text


def test_a_held_out_question_that_is_trained_on_is_refused(session_of: SessionOf, rows: Path, tmp_path: Path) -> None:
    held = tmp_path / "held.jsonl"
    held.write_text(rows.read_text(encoding="utf-8").splitlines()[0] + "\n", encoding="utf-8")
    with pytest.raises(DataError, match="max_overlap"):
        session_of("exact-match", **{"data.eval": str(held)})
