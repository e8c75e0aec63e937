"""The example sftx-dpo compared with TRL's DPOTrainer on the same pairs, model and adapter."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from sftx import Example
from sftx.config.loading import load
from sftx.trainer.session import Session
from sftx.training import assemble
from trainers import planned

DPO = Path(__file__).parents[2] / "examples" / "sftx-dpo"
BETA, STEPS = 0.5, 10
METRICS = ("rewards/chosen", "rewards/rejected", "rewards/margins", "rewards/accuracies")
SessionOf = Callable[..., Session]

# trl sets an option that transformers has renamed.
pytestmark = pytest.mark.filterwarnings("ignore:`gradient_checkpointing` is deprecated:FutureWarning")


def write_pairs(path: Path, *, num: int) -> None:
    """Write pairs of different lengths.

    The answers have 8 words at most: the log-probabilities of longer ones add up to over 256 nats, where one rounding
    of fp32 is 3e-5, and TRL computes in fp32 whatever the model is in.
    """
    rng = random.Random("pairs")
    words = (
        "set",
        "the",
        "light",
        "in",
        "kitchen",
        "to",
        "blue",
        "play",
        "music",
        "at",
        "seven",
        "please",
        "wake",
        "me",
    )

    def text(most: int) -> str:
        return " ".join(rng.choices(words, k=rng.randint(1, most)))

    rows = [
        {
            "conversations": [{"from": "human", "value": text(30)}],
            "chosen": {"from": "gpt", "value": text(8)},
            "rejected": {"from": "gpt", "value": text(8)},
        }
        for _ in range(num)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


@pytest.fixture
def session_of(tiny_model: Path, tmp_path: Path, install_plugin: Any, monkeypatch: pytest.MonkeyPatch) -> SessionOf:
    """Return an assembled run with the example's source: 2 micro-batches of 2 pairs, and an adapter with an effect."""
    monkeypatch.syspath_prepend(DPO)
    install_plugin("dpo-here", "from sftx_dpo import DPO", {"dpo": "DPO"})
    write_pairs(tmp_path / "pairs.jsonl", num=16)

    def make(**options: Any) -> Session:
        import torch

        given: dict[str, Any] = {
            "model": str(tiny_model),
            "data.train": str(tmp_path / "pairs.jsonl"),
            "output_dir": str(tmp_path / "never-written"),
            "dpo.beta": BETA,
            "train.per_device_train_batch_size": 2,
            "train.gradient_accumulation_steps": 2,
            "train.learning_rate": 1e-3,
            "train.lr_scheduler_type": "constant",
            "train.weight_decay": 0.01,
            "train.max_steps": STEPS,
            "train.use_cpu": True,
            **options,
        }
        assignments = [(name, value, name) for name, value in given.items()]
        session = assemble(load(None, add=["chatml", "lora", "dpo"], assignments=assignments))
        with torch.no_grad():
            for name, parameter in session.lm.named_parameters():
                if name.endswith("lora_B"):  # zero at first, which would hide any mistake
                    parameter.normal_(std=0.1)
        return session

    return make


@pytest.fixture
def oracle(tiny_model: Path, tmp_path: Path) -> Any:
    """Return TRL's trainer on the same model with PEFT's LoRA. Its own data set is never read."""
    from datasets import Dataset
    from peft import LoraConfig
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl import DPOConfig, DPOTrainer

    return DPOTrainer(
        AutoModelForCausalLM.from_pretrained(tiny_model),
        args=DPOConfig(
            output_dir=str(tmp_path / "trl"),
            beta=BETA,
            loss_type="sigmoid",
            use_cpu=True,
            bf16=False,
            gradient_checkpointing=False,
            report_to="none",
            disable_tqdm=True,
        ),
        processing_class=AutoTokenizer.from_pretrained(tiny_model),
        train_dataset=Dataset.from_list([{"prompt": "a", "chosen": "b", "rejected": "c"}]),
        peft_config=LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM"),
    )


def copy_adapter(session: Session, peft_model: Any) -> None:
    """Copy our LoRA weights into PEFT's layers."""
    import torch

    ours = dict(session.lm.model.named_parameters())
    with torch.no_grad():
        for name, parameter in peft_model.named_parameters():
            if "lora_" in name:
                parameter.copy_(ours[name.removeprefix("base_model.model.").replace(".default.weight", "")])


def trl_inputs(oracle: Any, pairs: list[tuple[Example, Example]]) -> dict[str, Any]:
    """Return a batch of TRL's own collator from our token ids and masks."""
    rows = []
    for chosen, rejected in pairs:
        start = chosen.loss_mask.tolist().index(True)
        chosen_ids, rejected_ids = chosen.token_ids.tolist(), rejected.token_ids.tolist()
        assert chosen_ids[:start] == rejected_ids[:start]
        assert all(chosen.loss_mask[start:])
        assert all(rejected.loss_mask[start:])
        rows.append(
            {
                "prompt_ids": chosen_ids[:start],
                "chosen_ids": chosen_ids[start:],
                "rejected_ids": rejected_ids[start:],
            }
        )
    inputs: dict[str, Any] = oracle.data_collator(rows)
    return inputs


def last_metrics(oracle: Any) -> dict[str, float]:
    mode = "train" if oracle.model.training else "eval"
    return {name: oracle._metrics[mode][name][-1] for name in METRICS}


def pairs_of(session: Session, step: Any) -> list[tuple[Example, Example]]:
    examples = session.data.examples
    return [(examples[chosen], examples[rejected]) for chosen, rejected in step]


@pytest.mark.parametrize("gradient_checkpointing", [False, True])
def test_steps_of_training_give_the_losses_gradients_and_rewards_of_trl(
    session_of: SessionOf, oracle: Any, gradient_checkpointing: bool
) -> None:
    """With gradient checkpointing, the forward is recomputed after the adapters were disabled and enabled again."""
    import torch

    session = session_of(**{"train.gradient_checkpointing": gradient_checkpointing})
    copy_adapter(session, oracle.model)
    trained = {name: p for name, p in oracle.model.named_parameters() if p.requires_grad}
    assert sum(p.numel() for p in trained.values()) == session.start_report.num_trainable
    optimizer = torch.optim.AdamW(trained.values(), lr=1e-3, weight_decay=0.01)
    oracle.model.train()
    losses = []
    for number, (epoch, step, *_) in enumerate(session.sampler, 1):
        ours = session.trainer.train_step(
            number, epoch, session.trainer.micro_batches(planned(step, session.data.examples))
        )
        optimizer.zero_grad()
        loss = oracle.compute_loss(oracle.model, trl_inputs(oracle, pairs_of(session, step)))
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(trained.values(), 1.0)
        optimizer.step()
        assert ours.loss == pytest.approx(loss.item(), abs=1e-5, rel=0)
        assert ours.grad_norm == pytest.approx(norm.item(), rel=1e-4)
        assert ours.metrics == pytest.approx(last_metrics(oracle), abs=1e-5, rel=0)
        losses.append(ours.loss)
    assert len(losses) == STEPS
    assert min(abs(loss - math.log(2)) for loss in losses) > 1e-3, "the losses must differ from log 2"
    assert sum(losses[-4:]) < sum(losses[:4]), "the model must learn, or equal losses would prove little"


@pytest.mark.parametrize("label_smoothing", [0.0, 0.2])
@pytest.mark.parametrize("num_pairs", [1, 2, 5])
def test_held_out_batches_of_any_size_give_trls_loss(
    session_of: SessionOf, oracle: Any, num_pairs: int, label_smoothing: float
) -> None:
    """TRL has no conservative loss, but eps * -log sigmoid(-m) = eps * (m - log sigmoid(m)): TRL's loss and margin."""
    import torch

    session = session_of(**{"dpo.label_smoothing": label_smoothing})
    copy_adapter(session, oracle.model)
    oracle.model.eval()
    examples = session.data.examples[: 2 * num_pairs]
    batch = session.trainer.collator.collate(examples[::-1])  # the order of rows is the batch's own affair
    inputs = trl_inputs(oracle, list(zip(examples[::2], examples[1::2], strict=True)))
    with torch.no_grad():
        session.lm.eval()
        out = session.trainer.loss(session.lm, batch)
        theirs = oracle.compute_loss(oracle.model, inputs).item()
    metrics = last_metrics(oracle)
    assert session.trainer.loss.denominator(batch) == num_pairs
    ours = out.sum.item() / num_pairs
    assert ours == pytest.approx(theirs + label_smoothing * metrics["rewards/margins"], abs=1e-5, rel=0)
    for name, value in metrics.items():
        assert out.metrics[name].item() / num_pairs == pytest.approx(value, abs=1e-5, rel=0)
