"""Live oracles: what transformers, PEFT and torch compute from the same rows, on the real model."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest

from sessions import session_of
from sftx.distributed.process_group import ProcessGroup
from sftx.trainer.session import Session
from trainers import denominator, planned

ROWS = 20


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Short rows of the shipped data, so that the real model can take them on one core."""
    from sftx.data import sources

    lines = sources.resolve("sftx:demo/train.jsonl").read_text(encoding="utf-8").splitlines()
    path = tmp_path_factory.mktemp("rows") / "short.jsonl"
    path.write_text("\n".join(sorted(lines, key=len)[:ROWS]) + "\n", encoding="utf-8")
    return path


def hf_batch(session: Session, step: Any) -> dict[str, Any]:
    """The rows of one step as transformers takes them: labels not shifted, written without our collator."""
    import torch

    examples = [session.data.examples[index] for row in step for index in row]
    length = max(len(e.token_ids) for e in examples)
    ids = torch.full((len(examples), length), 2)
    labels, mask = torch.full_like(ids, -100), torch.zeros_like(ids)
    for number, example in enumerate(examples):
        for at, (token, trained) in enumerate(zip(example.token_ids, example.loss_mask, strict=True)):
            ids[number, at], mask[number, at] = token, 1
            labels[number, at] = token if trained else -100
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def copy_adapter(session: Session, peft_model: Any) -> None:
    """Gives PEFT's layers the values that ours begin with."""
    import torch

    ours = dict(session.lm.model.named_parameters())
    with torch.no_grad():
        for name, parameter in peft_model.named_parameters():
            if "lora_" in name:
                path = name.removeprefix("base_model.model.").replace(".default.weight", "")
                parameter.copy_(ours[path])


def test_ten_steps_give_the_losses_of_transformers_peft_and_adamw(real_model_dir: Path, rows: Path) -> None:
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    session = session_of(
        real_model_dir,
        rows,
        train__per_device_train_batch_size=2,
        train__learning_rate=1e-3,
        train__lr_scheduler_type="constant",
        train__weight_decay=0.01,
    )
    base = AutoModelForCausalLM.from_pretrained(real_model_dir, dtype=torch.float32)
    config = LoraConfig(r=16, lora_alpha=32, lora_dropout=0.0, target_modules="all-linear", task_type="CAUSAL_LM")
    oracle = get_peft_model(base, config)
    copy_adapter(session, oracle)
    trained = [p for p in oracle.parameters() if p.requires_grad]
    assert sum(p.numel() for p in trained) == session.start_report.num_trainable
    optimizer = torch.optim.AdamW(trained, lr=1e-3, weight_decay=0.01)
    ours, theirs = [], []
    for number, (epoch, step, *_) in zip(range(1, 11), session.sampler, strict=False):
        ours.append(
            session.trainer.train_step(
                number, epoch, session.trainer.micro_batches(planned(step, session.data.examples))
            ).loss
        )
        optimizer.zero_grad()
        loss = oracle(**hf_batch(session, step)).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        theirs.append(loss.item())
    assert len(ours) == 10
    assert ours == pytest.approx(theirs, abs=1e-4, rel=0)
    assert ours[-1] < ours[0], "nothing was learnt, so equal losses would prove little"


@pytest.mark.slow
def test_peft_loads_the_adapter_and_computes_our_logits(real_model_dir: Path, rows: Path, tmp_path: Path) -> None:
    import torch
    from peft import PeftConfig, PeftModel
    from transformers import AutoModelForCausalLM

    from sftx.checkpoint import checkpoint

    session = session_of(real_model_dir, rows)
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for name, parameter in session.lm.named_parameters():
            if name.endswith("lora_B"):  # zero at first, which would hide any mistake
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.02)
    (tmp_path / "adapter").mkdir()
    checkpoint.write_artefact(session.lm, tmp_path / "adapter", ProcessGroup())

    base = AutoModelForCausalLM.from_pretrained(real_model_dir, dtype=torch.float32)
    config = PeftConfig.from_pretrained(tmp_path / "adapter")
    assert config.base_model_name_or_path == str(real_model_dir)
    oracle = PeftModel(base, config)
    result = oracle.load_adapter(tmp_path / "adapter", adapter_name="default")
    assert [key for key in result.missing_keys if "lora" in key] == []
    assert list(result.unexpected_keys) == []

    batch = session.trainer.micro_batches(planned(session.sampler.epoch(0)[0][:2], session.data.examples))[0].batch
    with torch.no_grad():
        session.lm.eval()
        ours = session.lm.logits(session.lm.hidden(batch).hidden_BTD)
        with session.lm.without_adapters():
            plain = session.lm.logits(session.lm.hidden(batch).hidden_BTD)
        theirs = oracle.eval()(input_ids=batch.input_ids_BT, attention_mask=_mask(batch)).logits
        reference = base.eval()
        with oracle.disable_adapter():
            expected_plain = reference(input_ids=batch.input_ids_BT, attention_mask=_mask(batch)).logits
    real = _mask(batch).bool()
    assert (ours - plain)[real].abs().max() > 0.1, "the adapter does nothing, so equality would prove nothing"
    torch.testing.assert_close(ours[real], theirs[real], atol=1e-5 * theirs.abs().max().item(), rtol=1e-5)
    torch.testing.assert_close(plain[real], expected_plain[real], atol=1e-5 * theirs.abs().max().item(), rtol=1e-5)


def _mask(batch: Any) -> Any:
    import torch

    return (torch.arange(batch.input_ids_BT.shape[1]) < batch.lengths_B[:, None]).long()


@pytest.mark.slow
def test_the_accumulated_gradient_of_the_real_model_does_not_depend_on_the_split(
    real_model_dir: Path, rows: Path
) -> None:
    import torch

    session = session_of(real_model_dir, rows, train__per_device_train_batch_size=8)
    with torch.no_grad():
        for name, parameter in session.lm.named_parameters():
            if name.endswith("lora_B"):  # at zero, half of the gradients would be zero
                parameter.normal_(0, 0.02, generator=torch.Generator().manual_seed(len(name)))
    step = session.sampler.epoch(0)[0]
    gradients = {size: _gradient(session, step, size) for size in (8, 1)}
    difference = torch.linalg.vector_norm(gradients[1] - gradients[8]) / torch.linalg.vector_norm(gradients[8])
    assert difference <= 1e-5


def _gradient(session: Session, step: Any, size: int) -> Any:
    """The gradient of one step at the present weights, `size` rows a micro-batch."""
    import dataclasses

    import torch

    trainer = session.trainer
    trainer.config = dataclasses.replace(trainer.config, per_device_train_batch_size=size)
    trainer.optimizer.zero_grad()
    batches = trainer.micro_batches(planned(step, session.data.examples))
    assert len(batches) == -(-len(step) // size)
    trainer.accumulate(batches, denominator(batches), 0)
    return torch.cat([p.grad.flatten() for p in trainer.parameters if p.grad is not None])


SPLITS = [(8, 1), (4, 2), (2, 4), (1, 8)]


@pytest.fixture(scope="module")
def mixed_rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Rows of very different lengths and trained shares: where a mean of means would go wrong."""
    import json

    rng = random.Random(3)
    words = ["the", "quick", "brown", "fox", "jumps", "over", "a", "lazy", "dog", "中文", "数据", "🙂"]
    path = tmp_path_factory.mktemp("mixed") / "mixed.jsonl"
    with path.open("w", encoding="utf-8") as file:
        for _ in range(40):
            prompt = " ".join(rng.choices(words, k=rng.randint(1, 40)))
            completion = " ".join(rng.choices(words, k=rng.randint(1, 30)))
            file.write(json.dumps({"prompt": prompt, "completion": completion}, ensure_ascii=False) + "\n")
    return path


def split_session(model: Path, data: Path, split: tuple[int, int]) -> Session:
    size, accumulation = split
    return session_of(
        model,
        data,
        train__per_device_train_batch_size=size,
        train__gradient_accumulation_steps=accumulation,
        train__num_train_epochs=2,
        train__learning_rate=5e-3,
        train__max_grad_norm=0,
    )


def test_every_split_of_a_step_gives_one_gradient(tiny_model_dir: Path, mixed_rows: Path) -> None:
    import torch

    gradients = {}
    for split in SPLITS:
        session = split_session(tiny_model_dir, mixed_rows, split)
        with torch.no_grad():
            for name, parameter in session.lm.named_parameters():
                if name.endswith("lora_B"):
                    parameter.normal_(0, 0.05, generator=torch.Generator().manual_seed(len(name)))
        gradients[split] = _gradient(session, session.sampler.epoch(0)[0], split[0])
    norm = torch.linalg.vector_norm(gradients[8, 1])
    for split in SPLITS[1:]:
        assert torch.linalg.vector_norm(gradients[split] - gradients[8, 1]) <= 1e-5 * norm, split


@pytest.mark.slow
def test_every_split_gives_the_same_losses_over_ten_steps(tiny_model_dir: Path, mixed_rows: Path) -> None:
    losses = {}
    for split in SPLITS:
        session = split_session(tiny_model_dir, mixed_rows, split)
        losses[split] = [
            session.trainer.train_step(
                n, epoch, session.trainer.micro_batches(planned(step, session.data.examples))
            ).loss
            for n, (epoch, step, *_) in enumerate(session.sampler, 1)
        ]
    assert all(len(values) == 10 for values in losses.values())
    assert losses[8, 1][-1] < losses[8, 1][0] - 0.1
    for split in SPLITS[1:]:
        assert losses[split] == pytest.approx(losses[8, 1], abs=1e-5, rel=0), split


def test_every_split_gives_the_same_weights_in_fp64(tiny_model_dir: Path, mixed_rows: Path) -> None:
    import torch

    weights = {}
    for split in SPLITS:
        session = split_session(tiny_model_dir, mixed_rows, split)
        session.lm.double()
        start = torch.cat([p.detach().flatten().clone() for p in session.trainer.parameters])
        for n, (epoch, step, *_) in enumerate(session.sampler, 1):
            session.trainer.train_step(n, epoch, session.trainer.micro_batches(planned(step, session.data.examples)))
        weights[split] = torch.cat([p.detach().flatten() for p in session.trainer.parameters])
        assert weights[split].dtype == torch.float64
        assert (weights[split] - start).abs().max() > 1e-3, "nothing moved"
    for split in SPLITS[1:]:
        assert (weights[split] - weights[8, 1]).abs().max() <= 1e-9, split
