"""The preference losses compared with TRL's trainers on the same answers, model and adapter, over steps of training.

TRL's DPO, KTO, ORPO and CPO trainers compute their losses and gradients from our token ids. A mean over the tokens of
an answer is compared pair by pair, because TRL takes some of them over all tokens of a micro-batch.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from pair_rows import write_pair_rows
from sftx import Example
from sftx.config.loading import load
from sftx.model import tiny
from sftx.trainer.session import Session
from sftx.training import assemble
from trainers import planned

STEPS = 10

pytestmark = [
    # trl sets an option that transformers has renamed.
    pytest.mark.filterwarnings("ignore:`gradient_checkpointing` is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:.*[Ee]xperimental"),
]


def assembled(tmp_path: Path, plugins: Sequence[str], **options: Any) -> Session:
    """Return a run with 2 micro-batches of 2 rows, and an adapter that has an effect."""
    import torch

    write_pair_rows(tmp_path / "rows.jsonl", 16, labelled="kto" in plugins)
    given: dict[str, Any] = {
        "model": str(tiny.model_dir()),
        "data.train": str(tmp_path / "rows.jsonl"),
        "output_dir": str(tmp_path / "never-written"),
        "train.per_device_train_batch_size": 2,
        "train.gradient_accumulation_steps": 2,
        "train.learning_rate": 1e-3,
        "train.lr_scheduler_type": "constant",
        "train.weight_decay": 0.01,
        "train.max_steps": STEPS,
        "train.use_cpu": True,
        **options,
    }
    session = assemble(load(None, add=["chatml", *plugins], assignments=[(k, v, k) for k, v in given.items()]))
    with torch.no_grad():
        for name, parameter in session.lm.named_parameters():
            if name.endswith("lora_B"):  # zero at first, which would hide any mistake
                parameter.normal_(std=0.1)
    return session


Compute = Callable[[Any, Sequence[Example]], tuple[Any, dict[str, float]]]
"""Computes TRL's loss and metrics of a few pairs with a trainer."""


@pytest.fixture(scope="module")
def trainer_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Any]:
    """Return TRL's trainer of a method, made once, of the same model with PEFT's LoRA. Its own data is never read."""
    made: dict[str, Any] = {}

    def make(method: str) -> Any:
        from datasets import Dataset
        from peft import LoraConfig
        from transformers import AutoModelForCausalLM, AutoTokenizer

        if method in made:
            return made[method]
        rows: list[dict[str, Any]] = [{"prompt": "a", "chosen": "b", "rejected": "c"}]
        options: dict[str, Any] = {}
        match method:
            case "dpo":
                from trl import DPOConfig as Config
                from trl import DPOTrainer as Trainer
            case "kto":
                from trl import KTOConfig as Config
                from trl import KTOTrainer as Trainer

                rows = [{"prompt": "a", "completion": "b", "label": flag} for flag in (True, False)]
            case "orpo":
                from trl.experimental.orpo import ORPOConfig as Config
                from trl.experimental.orpo import ORPOTrainer as Trainer
            case _:
                from trl.experimental.cpo import CPOConfig as Config
                from trl.experimental.cpo import CPOTrainer as Trainer

                options = {"loss_type": "simpo"}
        made[method] = Trainer(
            AutoModelForCausalLM.from_pretrained(tiny.model_dir()),
            args=Config(
                output_dir=str(tmp_path_factory.mktemp("trl")),
                use_cpu=True,
                bf16=False,
                gradient_checkpointing=False,
                report_to="none",
                disable_tqdm=True,
                per_device_train_batch_size=2,
                **options,
            ),
            processing_class=AutoTokenizer.from_pretrained(tiny.model_dir()),
            train_dataset=Dataset.from_list(rows),
            peft_config=LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM"),
        )
        return made[method]

    return make


def copy_weights(session: Session, peft_model: Any) -> None:
    """Copy our LoRA weights into PEFT's layers."""
    import torch

    ours = dict(session.lm.model.named_parameters())
    with torch.no_grad():
        for name, parameter in peft_model.named_parameters():
            if "lora_" in name:
                parameter.copy_(ours[name.removeprefix("base_model.model.").replace(".default.weight", "")])


def split(example: Example) -> tuple[list[int], list[int]]:
    """Return the ids of prompt and answer."""
    begin = example.loss_mask.tolist().index(True)
    assert all(example.loss_mask[begin:])
    return example.token_ids[:begin].tolist(), example.token_ids[begin:].tolist()


def pairs_of(examples: Sequence[Example]) -> list[tuple[list[int], list[int], list[int]]]:
    """Return prompt, chosen and rejected ids of each pair."""
    found = []
    for first, second in zip(examples[::2], examples[1::2], strict=True):
        assert [one.extras["preference"] for one in (first, second)] == ["chosen", "rejected"]
        (prompt, chosen), (same, rejected) = split(first), split(second)
        assert prompt == same
        found.append((prompt, chosen, rejected))
    return found


def dpo_loss(trainer: Any, examples: Sequence[Example]) -> tuple[Any, dict[str, float]]:
    rows = [{"prompt_ids": p, "chosen_ids": c, "rejected_ids": r} for p, c, r in pairs_of(examples)]
    loss = trainer.compute_loss(trainer.model, trainer.data_collator(rows))
    return loss, {name: values[-1] for name, values in trainer._metrics["train"].items()}


def _sides(trainer: Any, examples: Sequence[Example]) -> Any:
    """Return a batch of the ORPO and CPO trainers' collator."""
    rows = []
    for prompt, chosen, rejected in pairs_of(examples):
        row: dict[str, Any] = {}
        for name, answer in (("chosen", chosen), ("rejected", rejected)):
            ids = prompt + answer
            row |= {f"{name}_input_ids": ids, f"{name}_attention_mask": [1] * len(ids)}
            row[f"{name}_labels"] = [-100] * len(prompt) + answer
        rows.append(row)
    return trainer.data_collator(rows)


def cpo_loss(trainer: Any, examples: Sequence[Example]) -> tuple[Any, dict[str, float]]:
    return trainer.get_batch_loss_metrics(trainer.model, _sides(trainer, examples))  # type: ignore[no-any-return]


def orpo_loss(trainer: Any, examples: Sequence[Example]) -> tuple[Any, dict[str, float]]:
    """TRL's odds ratio, with the likelihood of the chosen answer alone: TRL adds the tokens of the prompt to it."""
    batch = _sides(trainer, examples)
    chosen, rejected, *_ = trainer.concatenated_forward(trainer.model, batch)
    losses = trainer.odds_ratio_loss(chosen, rejected)[0]
    _, metrics = trainer.get_batch_loss_metrics(trainer.model, batch)
    return -chosen.mean() - losses.mean(), metrics | {"nll_loss": -chosen.mean().item()}


def set_options(trainer: Any, **options: Any) -> None:
    for name, value in options.items():
        assert hasattr(trainer, name), name
        setattr(trainer, name, value)


MARGINS = (
    "rewards/chosen",
    "rewards/rejected",
    "rewards/margins",
    "rewards/accuracies",
    "logps/chosen",
    "logps/rejected",
)
DPO = {"loss_types": ["sigmoid"], "loss_weights": [1.0], "label_smoothing": 0.0, "ld_alpha": None, "beta": 0.5}
CPO = {"loss_type": "simpo", "beta": 2.0, "simpo_gamma": 1.0, "label_smoothing": 0.0, "cpo_alpha": 0.0}
# The plugin's options, TRL's attributes, the pairs that TRL computes at once, and further metrics.
CASES: dict[str, tuple[str, dict[str, Any], dict[str, Any], int, tuple[str, ...]]] = {
    "dpo": ("dpo", {"beta": 0.5}, DPO, 4, ()),
    "dpo hinge": ("dpo", {"beta": 0.5, "loss_type": "hinge"}, DPO | {"loss_types": ["hinge"]}, 4, ()),
    "dpo ipo": ("dpo", {"beta": 0.5, "loss_type": "ipo"}, DPO | {"loss_types": ["ipo"]}, 4, ()),
    "dpo robust": (
        "dpo",
        {"beta": 0.5, "loss_type": "robust", "label_smoothing": 0.2},
        DPO | {"loss_types": ["robust"], "label_smoothing": 0.2},
        4,
        (),
    ),
    "dpo sigmoid_norm": (
        "dpo",
        {"beta": 1, "loss_type": "sigmoid_norm"},
        DPO | {"loss_types": ["sigmoid_norm"], "beta": 1},
        4,
        (),
    ),
    "dpo ld": ("dpo", {"beta": 0.5, "ld_alpha": 0.3}, DPO | {"ld_alpha": 0.3}, 4, ()),
    # Of one pair, TRL's loss aot is DPO's with smoothed labels, which TRL has not.
    "dpo smoothed": (
        "dpo",
        {"beta": 0.5, "label_smoothing": 0.2},
        DPO | {"loss_types": ["aot"], "label_smoothing": 0.2},
        1,
        (),
    ),
    "dpo rpo": (
        "dpo",
        {"beta": 0.5, "rpo_alpha": 0.7},
        DPO | {"loss_types": ["sigmoid", "sft"], "loss_weights": [1.0, 0.7]},
        1,
        (),
    ),
    "orpo": ("orpo", {"beta": 0.4}, {"beta": 0.4}, 4, ("nll_loss", "log_odds_ratio", "log_odds_chosen")),
    "simpo": ("simpo", {}, CPO, 4, ()),
    "simpo smoothed": (
        "simpo",
        {"beta": 3, "gamma": 0.5, "label_smoothing": 0.1},
        CPO | {"beta": 3.0, "simpo_gamma": 0.5, "label_smoothing": 0.1},
        4,
        (),
    ),
    "simpo with cpo's term": ("simpo", {"cpo_alpha": 0.5}, CPO | {"cpo_alpha": 0.5}, 1, ("nll_loss",)),
}
COMPUTE: dict[str, Compute] = {"dpo": dpo_loss, "orpo": orpo_loss, "simpo": cpo_loss}
QUICK = ("dpo", "orpo", "simpo")


@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
@pytest.mark.parametrize(
    "case", [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in CASES]
)
def test_steps_of_training_give_the_losses_gradients_and_metrics_of_trl(
    tmp_path: Path, trainer_of: Callable[[str], Any], case: str, packed: bool
) -> None:
    import torch

    plugin, options, attributes, at_once, more = CASES[case]
    plugins = ["lora", plugin, *(["packed"] if packed else [])]
    layout = {"train.gradient_accumulation_steps": 4, "train.per_device_train_batch_size": 1} if packed else {}
    given = {f"{plugin}.{name}": value for name, value in options.items()}
    session = assembled(tmp_path, plugins, **given, **layout, **({"packed.length": 256} if packed else {}))
    trainer = trainer_of(plugin)
    set_options(trainer, **attributes)
    copy_weights(session, trainer.model)
    trained = {name: p for name, p in trainer.model.named_parameters() if p.requires_grad}
    optimizer = torch.optim.AdamW(trained.values(), lr=1e-3, weight_decay=0.01)
    trainer.model.train()
    losses, all_examples = [], session.data.examples
    for number, (epoch, step, *_) in enumerate(session.sampler, 1):
        ours = session.trainer.train_step(number, epoch, session.trainer.micro_batches(planned(step, all_examples)))
        examples = [all_examples[index] for row in step for index in row]
        optimizer.zero_grad()
        means: dict[str, float] = dict.fromkeys((*MARGINS, *more), 0.0)
        total = 0.0
        for at in range(0, len(examples), 2 * at_once):
            part = examples[at : at + 2 * at_once]
            loss, metrics = COMPUTE[plugin](trainer, part)
            share = len(part) / len(examples)
            (loss * share).backward()
            total += loss.item() * share
            means = {name: mean + metrics[name] * share for name, mean in means.items()}
        norm = torch.nn.utils.clip_grad_norm_(trained.values(), 1.0)
        optimizer.step()
        assert ours.loss == pytest.approx(total, abs=1e-5, rel=0)
        assert ours.grad_norm == pytest.approx(norm.item(), rel=1e-4)
        assert {name: ours.metrics[name] for name in means} == pytest.approx(means, abs=2e-5, rel=1e-6)
        losses.append(ours.loss)
    assert len(losses) == STEPS
    assert sum(losses[-4:]) < sum(losses[:4]), "the model must learn, or equal losses would prove little"


@pytest.mark.parametrize("packed", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["padded", "packed"])
def test_kto_gives_the_losses_gradients_and_metrics_of_trl(
    tmp_path: Path, trainer_of: Callable[[str], Any], packed: bool
) -> None:
    """The step is one micro-batch of TRL's, whose estimate of the distance to the reference is then the step's."""
    import torch

    plugins = ["lora", "kto", *(["packed"] if packed else [])]
    options = {"kto.beta": 0.5, "kto.desirable_weight": 0.8, "kto.undesirable_weight": 1.7}
    session = assembled(tmp_path, plugins, **options, **({"packed.length": 160} if packed else {}))
    trainer = trainer_of("kto")
    set_options(trainer, beta=0.5, desirable_weight=0.8, undesirable_weight=1.7)
    copy_weights(session, trainer.model)
    trained = {name: p for name, p in trainer.model.named_parameters() if p.requires_grad}
    optimizer = torch.optim.AdamW(trained.values(), lr=1e-3, weight_decay=0.01)
    trainer.model.train()
    losses, distances, all_examples = [], [], session.data.examples
    for number, (epoch, step, *_) in enumerate(session.sampler, 1):
        ours = session.trainer.train_step(number, epoch, session.trainer.micro_batches(planned(step, all_examples)))
        rows = []
        for index in (index for row in step for index in row):
            prompt, answer = split(all_examples[index])
            other = split(all_examples[(index + len(all_examples) // 2) % len(all_examples)])[1]
            label = all_examples[index].extras["preference"] == "chosen"
            rows.append({"prompt_ids": prompt, "completion_ids": answer, "KL_completion_ids": other, "label": label})
        optimizer.zero_grad()
        trainer._metrics["train"].clear()
        loss = trainer.compute_loss(trainer.model, trainer.data_collator(rows))
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(trained.values(), 1.0)
        optimizer.step()
        assert ours.loss == pytest.approx(loss.item(), abs=1e-5, rel=0)
        assert ours.grad_norm == pytest.approx(norm.item(), rel=1e-4)
        names = ("rewards/chosen", "rewards/rejected", "rewards/margins", "logps/chosen", "logps/rejected", "kl")
        theirs = {name: values[-1] for name, values in trainer._metrics["train"].items() if name in names}
        assert theirs.keys() >= {"kl"}
        assert {name: ours.metrics.get(name) for name in theirs} == pytest.approx(theirs, abs=2e-5, rel=1e-6)
        losses.append(ours.loss)
        distances.append(theirs["kl"])
    assert len(losses) == STEPS
    assert max(distances) > 0.01, "the distance to the reference must matter"


def full_trainer(directory: Path) -> Any:
    """Return TRL's trainer of a whole model, whose reference is another copy of it."""
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl import DPOConfig, DPOTrainer

    return DPOTrainer(
        AutoModelForCausalLM.from_pretrained(tiny.model_dir()),
        ref_model=AutoModelForCausalLM.from_pretrained(tiny.model_dir()),
        args=DPOConfig(
            output_dir=str(directory / "trl"),
            beta=0.5,
            use_cpu=True,
            bf16=False,
            gradient_checkpointing=False,
            report_to="none",
            disable_tqdm=True,
        ),
        processing_class=AutoTokenizer.from_pretrained(tiny.model_dir()),
        train_dataset=Dataset.from_list([{"prompt": "a", "chosen": "b", "rejected": "c"}]),
    )


@pytest.mark.parametrize("packed", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["padded", "packed"])
def test_a_whole_model_with_precomputed_log_probabilities_trains_as_in_trl(tmp_path: Path, packed: bool) -> None:
    """TRL runs a second model in every step; here its log-probabilities were computed before the first."""
    import torch

    plugins = ["dpo", *(["packed"] if packed else [])]
    options = {"dpo.beta": 0.5, "train.weight_decay": 0.0, **({"packed.length": 256} if packed else {})}
    if packed:
        options |= {"train.gradient_accumulation_steps": 4, "train.per_device_train_batch_size": 1}
    planner, runner = (assembled(tmp_path, plugins, **options) for _ in range(2))
    reports: list[Any] = []
    train_step = runner.trainer.train_step
    runner.trainer.train_step = lambda *args: reports.append(train_step(*args)) or reports[-1]  # type: ignore[method-assign]
    runner.run()
    trainer = full_trainer(tmp_path)
    optimizer = torch.optim.AdamW(trainer.model.parameters(), lr=1e-3, weight_decay=0.0)
    trainer.model.train()
    assert len(reports) == STEPS
    for ours, (_, step, *_) in zip(reports, planner.sampler, strict=True):
        examples = [planner.data.examples[index] for row in step for index in row]
        optimizer.zero_grad()
        loss, metrics = dpo_loss(trainer, examples)
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(trainer.model.parameters(), 1.0)
        optimizer.step()
        assert ours.loss == pytest.approx(loss.item(), abs=1e-5, rel=0)
        assert ours.grad_norm == pytest.approx(norm.item(), rel=1e-4)
        expected = {name: metrics[name] for name in MARGINS}
        assert {name: ours.metrics[name] for name in MARGINS} == pytest.approx(expected, abs=2e-5, rel=1e-6)
    assert reports[0].loss == pytest.approx(0.6931, abs=1e-4)
    assert reports[-1].loss < 0.6
