"""The reward of a sequence classifier is that of transformers' own pipeline and forward, one answer at a time."""

from __future__ import annotations

import json
import logging
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    LlamaConfig,
    LlamaForSequenceClassification,
    pipeline,
)

from sftx import Answer, ConfigError, Message, PluginError, Question, RunInfo
from sftx.assembly.stages.rollout_stages import RewardStage
from sftx.model import tiny
from sftx.testing import check_reward
from sftx.testing.kit import make_stage
from sftx_plugins.rewards.model import RewardModel

TEXTS = ["4", "The capital of France is Paris, and that of Italy is Rome.", "", "北京是中国的首都。", "yes, yes, no"]
TEMPLATE = "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"


@pytest.fixture(scope="module")
def directories(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A decoder with one logit whose tokenizer has a chat template, and an encoder of two classes without one."""
    torch.manual_seed(0)
    root, tokenizer = tmp_path_factory.mktemp("reward models"), tiny.make_tokenizer()
    size = {"hidden_size": 32, "num_attention_heads": 4, "num_hidden_layers": 2, "intermediate_size": 64}
    decoder = LlamaForSequenceClassification(
        LlamaConfig(vocab_size=len(tokenizer), num_labels=1, max_position_embeddings=256, pad_token_id=None, **size)
    )
    encoder = BertForSequenceClassification(
        BertConfig(vocab_size=len(tokenizer), id2label={0: "bad", 1: "good"}, max_position_embeddings=256, **size)
    )
    for model in (decoder, encoder):
        for parameter in model.parameters():  # logits that differ by more than rounding
            parameter.data.add_(0.2 * torch.randn_like(parameter))
    found = {}
    for name, model, template in (("decoder", decoder, TEMPLATE), ("encoder", encoder, None)):
        tokenizer.chat_template = template
        found[name] = root / name
        model.save_pretrained(found[name])
        tokenizer.save_pretrained(found[name])
    return found


def answers() -> list[Answer]:
    """Answers of very different lengths, to conversations of one and of three turns."""
    turns = (Message("user", "What is 2 + 2?"),)
    more = (Message("user", "Hello!"), Message("assistant", "Hello."), Message("user", "And now?"))
    return [
        Answer(Question(f"rows:{n}", said[-1].content, [1], "", messages=said), 0, text, (5,), (-1.0,), "stop")
        for n, (text, said) in enumerate((text, said) for text in TEXTS for said in (turns, more))
    ]


class Model:
    """What `prepare` asks of the model of the run."""

    device = torch.device("cpu")


def prepared(**options: Any) -> RewardStage:
    plugin = RewardModel(**options)
    plugin.sftx_validate(RunInfo(Path(), {}))
    stage = RewardStage("reward-model", make_stage(plugin, "sftx_reward"))
    stage.prepare(Model())  # type: ignore[arg-type]
    return stage


@pytest.mark.parametrize("options", [{}, {"input": "pair"}], ids=["chat", "pair"])
def test_it_keeps_the_contract(directories: dict[str, Path], options: dict[str, Any]) -> None:
    check_reward(RewardModel(str(directories["decoder"]), **options))


def as_text(tokenizer: Any, answer: Answer) -> str:
    turns = [*answer.question.messages, Message("assistant", answer.text)]
    messages = [{"role": turn.role, "content": turn.content} for turn in turns]
    text: str = tokenizer.apply_chat_template(messages, tokenize=False)
    return text


@pytest.mark.parametrize("batch_size", [1, 4])
def test_a_decoder_scores_chats_as_the_pipeline_of_transformers_does(
    directories: dict[str, Path], batch_size: int
) -> None:
    scores = prepared(model=str(directories["decoder"]), batch_size=batch_size)(answers())
    classify = pipeline("text-classification", model=str(directories["decoder"]), device="cpu")
    texts = [as_text(classify.tokenizer, answer) for answer in answers()]
    expected = [classify(text, function_to_apply="none")[0]["score"] for text in texts]
    assert scores == pytest.approx(expected, abs=1e-5)
    assert len({round(score or 0, 3) for score in scores}) == len(scores)


@pytest.mark.parametrize("label", ["good", 1, "bad"])
def test_an_encoder_scores_pairs_by_the_logit_of_a_class(directories: dict[str, Path], label: str | int) -> None:
    options = {"model": str(directories["encoder"]), "label": label, "input": "pair", "batch_size": 3}
    scores = prepared(**options)(answers())
    classify = pipeline("text-classification", model=str(directories["encoder"]), device="cpu")
    expected = []
    for answer in answers():
        logits = classify.model(**classify.tokenizer(answer.question.prompt, answer.text, return_tensors="pt")).logits
        expected.append(logits[0, 0 if label == "bad" else 1].item())
    assert scores == pytest.approx(expected, abs=1e-5)


def test_bfloat16_is_that_of_a_model_in_bfloat16(directories: dict[str, Path]) -> None:
    scores = prepared(model=str(directories["decoder"]), dtype="bfloat16", batch_size=1)(answers())
    model = LlamaForSequenceClassification.from_pretrained(directories["decoder"], dtype=torch.bfloat16)
    tokenizer = pipeline("text-classification", model=str(directories["decoder"]), device="cpu").tokenizer
    model.config.pad_token_id = tokenizer.pad_token_id
    texts = [as_text(tokenizer, answer) for answer in answers()]
    expected = [model(**tokenizer(text, return_tensors="pt", add_special_tokens=False)).logits.item() for text in texts]
    assert scores == expected
    assert scores != prepared(model=str(directories["decoder"]))(answers())


def test_a_long_conversation_loses_its_oldest_tokens_and_that_is_said_once(
    directories: dict[str, Path], caplog: pytest.LogCaptureFixture
) -> None:
    stage = prepared(model=str(directories["decoder"]), max_length=20)
    with caplog.at_level(logging.WARNING, "sftx_plugins"):
        scores = stage(answers())
    assert [record.name for record in caplog.records] == ["sftx_plugins.rewards.classifier"]
    assert "the last 20 are scored" in caplog.text
    model = LlamaForSequenceClassification.from_pretrained(directories["decoder"])
    tokenizer = pipeline("text-classification", model=str(directories["decoder"]), device="cpu").tokenizer
    model.config.pad_token_id = tokenizer.pad_token_id
    ids = [tokenizer(as_text(tokenizer, one), add_special_tokens=False)["input_ids"][-20:] for one in answers()]
    expected = [model(torch.tensor([one])).logits.item() for one in ids]
    assert scores == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("encoder", {}, "option 'input': the tokenizer of .* has no chat template; set input to pair"),
        ("encoder", {"input": "pair"}, "option 'label': .* has several classes; give one of 'bad', 'good'"),
        ("encoder", {"input": "pair", "label": "fine"}, "has no class 'fine'; give one of 'bad', 'good'"),
        ("decoder", {"label": 1}, "has no class 1; give one of"),
    ],
)
def test_options_that_do_not_fit_the_model_are_refused_before_its_weights_are_read(
    directories: dict[str, Path], name: str, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        make_stage(RewardModel(str(directories[name]), **options), "sftx_reward")


def test_a_model_without_a_classifier_is_no_reward_model(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="is a LlamaForCausalLM, which gives no rewards"):
        prepared(model=str(tiny.model_dir()))
    with pytest.raises(ConfigError, match=r"has no config\.json"):
        prepared(model=str(tmp_path))
    shutil.copytree(tiny.model_dir(), tmp_path, dirs_exist_ok=True)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "architectures": None, "num_labels": 1}))
    with pytest.raises(ConfigError, match=r"has no weights for score\.weight"):
        prepared(model=str(tmp_path))
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(PluginError, match="cannot be loaded as a sequence classifier"):
        prepared(model=str(tmp_path))
