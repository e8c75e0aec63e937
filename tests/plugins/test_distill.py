"""`distill`: its two kinds of teachers agree, layouts agree, TRL and Liger agree, and rows that do not fit are refused.

Dimensions: B rows, T tokens, N = B*T, V vocabulary, K stored log-probabilities.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from distilling import teacher_of, write_chats
from sessions import session_of
from sftx import ConfigError, DataError, Example, Location, ModelError
from sftx.data.collate import pack, pad
from sftx.testing import check_loss
from sftx.trainer.session import Session
from sftx_plugins.collators.padded import Padded
from sftx_plugins.losses.distill import Distill
from sftx_plugins.parsers._teacher import TeacherRows, stored
from trainers import planned

SessionOf = Callable[..., Session]
BETAS = {"forward": 0.0, "reverse": 1.0, "jsd": 0.5}

# trl sets options that transformers has renamed.
pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")


@pytest.fixture(autouse=True)
def no_notice_of_trl(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRL_EXPERIMENTAL_SILENCE", "1")


@pytest.fixture
def teacher(tiny_model: Path, tmp_path: Path) -> Path:
    return teacher_of(tiny_model, tmp_path / "teacher")


@pytest.fixture
def run_of(tiny_model: Path, teacher: Path, tmp_path: Path) -> SessionOf:
    """Return an assembled run on 16 conversations; LoRA's B is random, so that the student has moved."""
    write_chats(tmp_path / "chats.jsonl", 16)

    def make(*, data: Path = tmp_path / "chats.jsonl", **options: Any) -> Session:
        given = {
            "distill__teacher": str(teacher),
            "train__train_batch_size": 4,
            "train__per_device_train_batch_size": 2,
            "train__learning_rate": 1e-3,
            "train__lr_scheduler_type": "constant",
            "train__max_steps": 10,
            "train__use_cpu": True,
            "train__bf16": False,
        }
        session = session_of(tiny_model, data, "distill", **{**given, **options})
        generator = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for name, parameter in session.lm.named_parameters():
                if name.endswith("lora_B"):
                    parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
        return session

    return make


def loss_of(session: Session, batches: Sequence[Any]) -> tuple[float, dict[str, torch.Tensor]]:
    """Return the sum of the loss over the batches, and the gradients."""
    session.lm.eval()
    session.lm.zero_grad()
    total = 0.0
    for batch in batches:
        out = session.trainer.loss(session.lm, session.trainer.loss.with_extras(batch))
        out.sum.backward()
        total += out.sum.item()
    return total, {name: p.grad.clone() for name, p in session.lm.named_parameters() if p.grad is not None}


def assert_same(ours: tuple[float, dict[str, Any]], theirs: tuple[float, dict[str, Any]], rtol: float = 1e-4) -> None:
    assert ours[0] == pytest.approx(theirs[0], rel=1e-5)
    assert ours[1].keys() == theirs[1].keys()
    for name, gradient in ours[1].items():
        torch.testing.assert_close(gradient, theirs[1][name], rtol=rtol, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}")


def top_k_rows(teacher: Any, examples: Sequence[Example], k: int, temperature: float = 1.0) -> Iterator[dict[str, Any]]:
    """The rows that a user would write, by transformers' own forward."""
    for example in examples:
        ids_T = torch.from_numpy(example.token_ids).long()
        with torch.no_grad():
            logits_TV = teacher(input_ids=ids_T[None]).logits[0].double() / temperature
        top = logits_TV.log_softmax(1).topk(k)
        trained = [t > 0 and bool(is_trained) for t, is_trained in enumerate(example.loss_mask)]
        yield {
            "input_ids": ids_T.tolist(),
            "loss_mask": [int(one) for one in trained],
            "teacher_ids": [top.indices[t - 1].tolist() if one else [] for t, one in enumerate(trained)],
            "teacher_log_probs": [top.values[t - 1].tolist() if one else None for t, one in enumerate(trained)],
            "teacher_temperature": temperature,
        }


# ---- values


@pytest.mark.parametrize("divergence", list(BETAS))
def test_layouts_of_a_batch_give_the_same_loss_and_gradients(
    run_of: SessionOf, tiny_model: Path, tmp_path: Path, divergence: str
) -> None:
    fewer_rows = teacher_of(tiny_model, tmp_path / "fewer", num_rows=520)  # than the student's 640
    options = {"distill__alpha": 0.3, "distill__temperature": 1.5, "distill__teacher": str(fewer_rows)}
    session = run_of(distill__divergence=divergence, **options)
    examples = session.data.examples[:6]
    padded = loss_of(session, [pad(examples)])
    assert padded[0] > 1
    assert_same(loss_of(session, [pack(examples, attention="mask4d")]), padded)
    assert_same(loss_of(session, [pad(examples[:2]), pad(examples[2:3]), pad(examples[3:])]), padded)


@pytest.mark.parametrize("divergence", list(BETAS))
def test_all_log_probabilities_stored_are_the_model_itself_and_some_are_less(
    run_of: SessionOf, teacher: Path, tiny_model: Path, tmp_path: Path, divergence: str
) -> None:
    from transformers import AutoModelForCausalLM

    options = {"distill__divergence": divergence, "distill__temperature": 1.5, "distill__alpha": 0.2}
    session = run_of(**options)
    examples = session.data.examples[:6]
    by_model = loss_of(session, [pad(examples)])
    V = session.lm.head_weight.shape[0]
    model = AutoModelForCausalLM.from_pretrained(teacher)
    with torch.no_grad():  # without the rows that the student lacks
        model.get_output_embeddings().weight.data = model.get_output_embeddings().weight[:V]
    losses = []
    for k in (V, V - 1, 8):
        rows = list(top_k_rows(model, examples, k, temperature=1.5))
        path = tmp_path / f"top-{k}.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        of_rows = run_of(data=path, distill__teacher=None, **options)
        assert [len(one.token_ids) for one in of_rows.data.examples] == [len(one.token_ids) for one in examples]
        losses.append(loss_of(of_rows, [pad(of_rows.data.examples[:])]))
        assert_same(loss_of(of_rows, [pack(of_rows.data.examples[:], attention="mask4d")]), losses[-1])
    assert_same(losses[0], by_model)
    assert losses[1][0] == pytest.approx(by_model[0], rel=1e-4)
    assert 0 < losses[2][0] < by_model[0]


def test_alpha_1_is_cross_entropy(run_of: SessionOf) -> None:
    session = run_of(distill__alpha=1.0)
    batch = pad(session.data.examples[:4])
    with torch.no_grad():
        ours = session.trainer.loss(session.lm, batch)
        hidden = session.lm.hidden(batch)
        theirs = session.lm.cross_entropy(hidden.hidden_BTD, batch.labels_BT, stats=True)
    torch.testing.assert_close(ours.sum, theirs.loss)
    torch.testing.assert_close(ours.metrics["nll"], theirs.loss)
    assert ours.metrics["token_accuracy"] == theirs.correct_N.sum()


@pytest.mark.parametrize("divergence", ["forward", pytest.param("jsd", marks=pytest.mark.slow)])
def test_with_a_model_it_keeps_the_contract_of_a_loss(teacher: Path, divergence: Any) -> None:
    """The right gradient, the same for any batch and padding, of labels alone. Elsewhere it is checked with rows."""
    check_loss(Distill(teacher=str(teacher), divergence=divergence, temperature=2.0, alpha=0.2))


# ---- oracles


@pytest.fixture
def trl(tiny_model: Path, tmp_path: Path) -> Callable[..., Any]:
    """Return TRL's GKDTrainer on the tiny model. Its own data set is never read."""
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl.experimental.gkd import GKDConfig, GKDTrainer

    def make(teacher: Any, **options: Any) -> Any:
        tokenizer = AutoTokenizer.from_pretrained(tiny_model)
        return GKDTrainer(
            AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32),
            teacher_model=teacher,
            args=GKDConfig(
                output_dir=str(tmp_path / "trl"), use_cpu=True, bf16=False, gradient_checkpointing=False,
                report_to="none", disable_tqdm=True, lmbda=0.0, **options,
            ),
            processing_class=tokenizer,
            train_dataset=Dataset.from_list([{"messages": [{"role": "user", "content": "a"}]}]),
        )  # fmt: skip

    return make


def trl_inputs(batch: Any) -> dict[str, torch.Tensor]:
    """The same rows as TRL has them: labels are not shifted."""
    B, T = batch.input_ids_BT.shape
    labels_BT = torch.full((B, T), -100)
    labels_BT[:, 1:] = batch.labels_BT[:, :-1]
    mask_BT = (torch.arange(T) < batch.lengths_B[:, None]).long()
    return {"input_ids": batch.input_ids_BT, "attention_mask": mask_BT, "labels": labels_BT}


@pytest.mark.parametrize("divergence", list(BETAS))
def test_ten_steps_of_training_are_those_of_trl(
    run_of: SessionOf, trl: Any, tiny_model: Path, tmp_path: Path, divergence: str
) -> None:
    """Full fine-tuning. TRL refuses a teacher with another number of rows, so this one has the student's."""
    from transformers import AutoModelForCausalLM

    directory = teacher_of(tiny_model, tmp_path / "same-rows", num_rows=640)
    session = run_of(adapter="full", distill__teacher=str(directory), distill__divergence=divergence)
    oracle = trl(AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32), beta=BETAS[divergence])
    decay = [p for p in oracle.model.parameters() if p.dim() > 1]
    rest = [p for p in oracle.model.parameters() if p.dim() <= 1]
    weight_decay = session.config.train.weight_decay
    optimizer = torch.optim.AdamW(
        [{"params": decay, "weight_decay": weight_decay}, {"params": rest, "weight_decay": 0.0}], lr=1e-3
    )
    oracle.model.train()
    losses = []
    for number, (epoch, step, *_) in enumerate(session.sampler, 1):
        batches = session.trainer.micro_batches(planned(step, session.data.examples))
        ours = session.trainer.train_step(number, epoch, batches)
        optimizer.zero_grad()
        count = sum(one.batch.num_label_tokens for one in batches)
        loss = sum(
            oracle.compute_loss(oracle.model, trl_inputs(one.batch), num_items_in_batch=torch.tensor(count))
            for one in batches
        )
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(oracle.model.parameters(), 1.0)
        optimizer.step()
        assert ours.loss == pytest.approx(loss.item(), abs=1e-5, rel=0)
        assert ours.grad_norm == pytest.approx(norm.item(), rel=1e-4)
        losses.append(ours.loss)
    assert len(losses) == 10
    assert losses[-1] < 0.95 * losses[0], "the student must learn, or equal losses would prove little"


@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("beta", [0.0, 0.1, 0.9, 1.0])
def test_the_loss_and_its_gradient_are_those_of_trl_and_liger(beta: float, temperature: float) -> None:
    from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss
    from trl.experimental.gkd import GKDTrainer

    from sftx_kernels import TeacherHead, linear_kl

    generator = torch.Generator().manual_seed(5)
    hidden_ND, teacher_NH = (torch.randn(40, size, generator=generator) for size in (16, 24))
    weight_VD, teacher_VH = (torch.randn(300, size, generator=generator) / 4 for size in (16, 24))
    labels_N = torch.randint(300, (40,), generator=generator)
    labels_N[::3] = -100
    num = int((labels_N != -100).sum())
    leaves = [hidden_ND.requires_grad_(), weight_VD.requires_grad_()]
    out = linear_kl(*leaves, labels_N, TeacherHead(teacher_NH, teacher_VH), beta=beta, temperature=temperature)
    ours = [out.loss / num, *torch.autograd.grad(out.loss / num, leaves)]
    logits = (hidden @ weight.T for hidden, weight in ((hidden_ND, weight_VD), (teacher_NH, teacher_VH)))
    loss = GKDTrainer.generalized_jsd_loss(*logits, labels=labels_N, beta=beta, temperature=temperature)
    results = [[loss, *torch.autograd.grad(loss, leaves)]]
    of_liger = LigerFusedLinearJSDLoss(0.0, 1.0, beta=beta, temperature=temperature, compiled=False)
    loss = of_liger(*leaves, teacher_NH, teacher_VH, labels_N)
    results.append([loss, *torch.autograd.grad(loss, leaves)])
    for theirs in results:
        for actual, expected in zip(ours, theirs, strict=True):
            torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)
        assert ours[0].item() == pytest.approx(theirs[0].item(), abs=1e-5)


# ---- runs


def test_a_student_learns_from_its_teacher_on_held_out_rows(tiny_model: Path, tmp_path: Path, plugin_run: Any) -> None:
    """The teacher is one that was trained on such rows; the student sees its distributions and no label."""
    import sftx

    train, held_out = (write_chats(tmp_path / f"{seed}.jsonl", 32, seed) for seed in (1, 2))
    options = {
        "model": str(tiny_model), "data": str(train), "eval_data": str(held_out), "learning_rate": 1e-2,
        "train_batch_size": 8, "max_steps": 40, "use_cpu": True, "bf16": False,
    }  # fmt: skip
    teacher = sftx.run(plugins=["chatml"], output_dir=str(tmp_path / "taught"), **options)
    student = sftx.run(
        plugins={"chatml": {}, "distill": {"teacher": str(teacher.output_dir)}},
        output_dir=str(tmp_path / "student"),
        **options,
    )
    before, after = (student.summary["held_out"][when] for when in ("before", "after"))
    assert before["loss"] == pytest.approx(before["divergence"])
    assert after["divergence"] < 0.3 * before["divergence"]
    assert after["perplexity"] < 0.2 * before["perplexity"]


def test_the_rows_that_the_command_writes_are_what_the_teacher_says(
    run_of: SessionOf, teacher: Path, tmp_path: Path
) -> None:
    from click.testing import CliRunner
    from transformers import AutoModelForCausalLM

    from sftx.cli import main

    path = tmp_path / "top.jsonl"
    arguments = [
        "data", "distill", "--model", teacher, "--data", tmp_path / "chats.jsonl", "--plugin", "chatml", "--top-k", 5,
        "--temperature", 1.5, "--output", path, "--use-cpu", "--no-bf16", "--per-device-eval-batch-size", 3,
    ]  # fmt: skip
    examples = run_of().data.examples[:]
    result = CliRunner().invoke(main, list(map(str, arguments)))
    assert result.exit_code == 0, result.output
    written = [json.loads(line) for line in path.read_text().splitlines()]
    model = AutoModelForCausalLM.from_pretrained(teacher)
    expected = list(top_k_rows(model, examples, 5, temperature=1.5))
    assert len(written) == len(expected) == 16
    for ours, theirs in zip(written, expected, strict=True):
        assert ours["input_ids"] == theirs["input_ids"]
        assert [int(label != -100) for label in ours["labels"]] == theirs["loss_mask"]
        for name in ("teacher_ids", "teacher_log_probs"):
            assert [len(one) for one in ours[name]] == [len(one or []) for one in theirs[name]]
        flat = [[value for one in row["teacher_log_probs"] for value in one or []] for row in (ours, theirs)]
        assert flat[0] == pytest.approx(flat[1], abs=2e-5)
    again = CliRunner().invoke(main, list(map(str, arguments)))
    assert again.exit_code == 1
    assert "exists already" in str(again.exception) + again.output


# ---- what is refused


def test_a_teacher_with_another_tokenizer_is_refused(run_of: SessionOf, tiny_model: Path, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    directory = teacher_of(tiny_model, tmp_path / "other")
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    described = json.loads((directory / "tokenizer.json").read_text())
    vocabulary = described["model"]["vocab"]
    first, second = list(vocabulary)[100:102]
    vocabulary[first], vocabulary[second] = vocabulary[second], vocabulary[first]
    (directory / "tokenizer.json").write_text(json.dumps(described))
    assert tokenizer.get_vocab()[first] == vocabulary[second]
    session = run_of(distill__teacher=str(directory))
    with pytest.raises(ModelError, match=r"other: its tokenizer gives other ids .* with the same tokenizer"):
        loss_of(session, [pad(session.data.examples[:2])])


def test_rows_without_log_probabilities_need_a_model(run_of: SessionOf) -> None:
    session = run_of(distill__teacher=None)
    with pytest.raises(ConfigError, match=r"chats.jsonl:\d+: has no log-probabilities .* \(distill.teacher\)"):
        session.trainer.micro_batches(next(iter(session.sampler)))


def rows_of(*records: dict[str, Any]) -> list[Example]:
    examples = []
    for number, record in enumerate(records, 1):
        (tokens,) = TeacherRows().parse(record, Location("rows.jsonl", number))
        examples.append(
            Example(tokens.token_ids, tokens.loss_mask, f"rows.jsonl:{number}", number, extras=tokens.extras)
        )
    return examples


def with_top(size: int, **changes: Any) -> dict[str, Any]:
    record: dict[str, Any] = {
        "input_ids": [5, 6, 7, 8],
        "labels": [-100, -100, 7, 8],
        "teacher_ids": [[], [], list(range(size)), list(range(10, 10 + size))],
        "teacher_log_probs": [[], None, [-2.0 - n for n in range(size)], [-1.5 - n for n in range(size)]],
    }
    return record | changes


def extras_of(examples: list[Example], **options: Any) -> dict[str, torch.Tensor]:
    from sftx.events import RunInfo

    loss: Any = Distill(**options).sftx_loss(RunInfo(Path(), {}))
    extras: dict[str, torch.Tensor] = loss.extras(pad(examples))
    return extras


def test_stored_log_probabilities_follow_the_labels() -> None:
    shorter = with_top(
        2, input_ids=[5, 6], labels=[-100, 6], teacher_ids=[[], [3, 4]], teacher_log_probs=[[], [-1, -2]]
    )
    examples = rows_of(with_top(2), shorter)
    ids_MK, log_probs_MK = extras_of(examples).values()
    assert ids_MK.tolist() == [[0, 1], [10, 11], [3, 4]]
    assert log_probs_MK.tolist() == [[-2, -3], [-1.5, -2.5], [-1, -2]]
    kept = stored(examples[0])
    assert kept is not None
    assert kept.places == [0, 0, 0, 1]
    json.dumps(dict(examples[0].extras))


def test_the_batch_of_a_memory_plan_has_log_probabilities_for_every_token() -> None:
    """A plan makes rows longer and trains all of their tokens."""
    from sftx.events import RunInfo
    from sftx.inspection.memory_plan.fake_tensors import make_batch

    batch = make_batch(Padded(), 3, 64, rows_of(with_top(2)))
    loss: Any = Distill().sftx_loss(RunInfo(Path(), {}))
    assert batch.num_label_tokens == 63 + 62 + 62
    assert [list(value.shape) for value in loss.extras(batch).values()] == [[batch.num_label_tokens, 2]] * 2


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"teacher_ids": [[], [1, 2]]}, r"teacher_ids has 2 entries for 4 input_ids"),
        ({"teacher_log_probs": [[], [], 3, [-1, -2]]}, r"teacher_log_probs\[2\] is 3, expected a list"),
        ({"teacher_ids": [[], [], [], [1, 2]]}, r"teacher_ids\[2\] is empty, and input_ids\[2\] is trained"),
        ({"teacher_ids": [[], [], [1, 2], [1, 2, 3]]}, r"teacher_log_probs\[3\] has 2 numbers for 3 of teacher_ids"),
        ({"teacher_ids": [[], [], [1, 1], [1, 2]]}, r"teacher_ids\[2\] has a token twice"),
        ({"teacher_ids": [[], [], [1, -2], [1, 2]]}, r"teacher_ids\[2\] has -2"),
        ({"teacher_log_probs": [[], [], [-1, "a"], [-1, -2]]}, r"teacher_log_probs\[2\] has 'a', expected finite"),
        ({"teacher_log_probs": [[], [], [7.5, 3], [-1, -2]]}, r"teacher_log_probs\[2\] .* not logits"),
        (
            {
                "teacher_ids": [[], [], [1], [1, 2]],
                "teacher_log_probs": [[], [], [-1], [-1, -2]],
            },
            r"teacher_ids has 1 tokens at one place and 2 at another",
        ),
        ({"teacher_temperature": 0}, r"teacher_temperature is 0, expected a number above 0"),
        ({"attention_mask": [0, 1, 1, 1]}, r"has padding"),
    ],
)
def test_rows_that_are_wrong_are_refused_with_their_place(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=rf"^rows.jsonl:1: {message}"):
        rows_of(with_top(2, **changes))


def test_rows_that_do_not_fit_the_run_or_one_another_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"rows.jsonl:1: .* of temperature 2, and distill.temperature is 1"):
        extras_of(rows_of(with_top(2, teacher_temperature=2.0)))
    with pytest.raises(DataError, match=r"rows.jsonl:2: has 3 log-probabilities .* rows.jsonl:1 has 2"):
        extras_of(rows_of(with_top(2), with_top(3)))
    (example,) = rows_of(with_top(2))
    cut = Example(example.token_ids[:3], example.loss_mask[:3], "rows.jsonl:1", 0, extras=example.extras)
    with pytest.raises(DataError, match=r"rows.jsonl:1: was cut to 3 tokens, .* raise data.max_length"):
        extras_of([cut])
    more = Example(example.token_ids, [False, True, True, True], "rows.jsonl:1", 0, extras=example.extras)
    with pytest.raises(DataError, match=r"rows.jsonl:1: trains 3 tokens, and has log-probabilities for 2"):
        extras_of([more])
