"""What each run checks before its first step: that answers stop outside of sftx, and that what is saved was trained."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from sessions import session_of

ASSETS = Path(__file__).parents[2] / ".assets" / "tokenizers"
ROWS = [
    {
        "messages": [
            {"role": "system", "content": "Be brief."},
            {"role": "user", "content": f"What is {n} and {n}?\n\n- as a number"},
            {"role": "assistant", "content": f"It is {2 * n}."},
            {"role": "user", "content": "Sure?"},
            {"role": "assistant", "content": "Yes."},
        ]
    }
    for n in range(6)
]


@pytest.fixture
def data(tmp_path: Path) -> Path:
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return path


@pytest.fixture
def said(data: Path, caplog: pytest.LogCaptureFixture) -> Callable[..., list[str]]:
    """What a run on this model logs before its first step, line by line."""

    def start(model: Path, *plugins: str, **options: Any) -> list[str]:
        caplog.clear()
        with caplog.at_level("INFO", "sftx"):
            session_of(model, data, *plugins, **options)
        assert all("\n" not in line for line in caplog.messages)
        return caplog.messages

    return start


Said = Callable[..., list[str]]
MakeModel = Callable[..., Path]


# --- answers that stop --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"eos_token_id": 0}, "stop at '<|endoftext|>'"),
        ({"bos_token_id": 0}, "never stop"),
        (None, "stop at '<|endoftext|>'"),  # as config.json says
        ({"eos_token_id": [0, 2]}, ""),
        ({"eos_token_id": 2}, ""),
    ],
)
def test_a_base_that_does_not_stop_where_answers_end_is_told(
    said: Said, make_model: MakeModel, settings: dict[str, Any] | None, words: str
) -> None:
    model = make_model()
    if settings is not None:
        (model / "generation_config.json").write_text(json.dumps(settings))
    lines = [line for line in said(model) if "generation settings" in line]
    assert len(lines) == bool(words)
    assert all(words in line and "answers end with '<|im_end|>'" in line for line in lines)


def test_a_full_model_gets_settings_of_its_own_and_needs_no_warning(data: Path, caplog: Any, make_model: Any) -> None:
    from sftx.config.loading import load
    from sftx.training import assemble

    values = {"model": str(make_model()), "data.train": str(data), "output_dir": str(data.parent / "out")}
    session = assemble(load(None, add=["chatml"], assignments=[(name, value, "") for name, value in values.items()]))
    assert "generation settings" not in caplog.text
    assert session.lm.model.generation_config.eos_token_id == [2, 0]
    assert session.lm.tokenizer.eos_token == "<|endoftext|>", "the run's own tokenizer stays as it is"
    assert session.lm.tokenizer_entries == {"eos_token": "<|im_end|>"}


# --- the model's own template -------------------------------------------------------------------


def test_the_first_difference_from_the_models_own_template_is_one_line(said: Said, make_model: MakeModel) -> None:
    def another(tokenizer: Any) -> None:
        tokenizer.chat_template = (
            "{% for m in messages %}{{ '<|im_start|>' + m.role + ': ' + m.content + '<|im_end|>\\n' }}{% endfor %}"
        )

    def of_template(lines: list[str]) -> list[str]:
        return [line for line in lines if "template" in line]

    (line,) = of_template(said(make_model(another)))
    assert "is '\\n' by the run's template and ':' by the tokenizer's own" in line
    assert of_template(said(make_model(called="same"))) == []
    bare = make_model(lambda tokenizer: setattr(tokenizer, "chat_template", None), called="bare")
    assert of_template(said(bare)) == []


def test_a_difference_that_only_the_data_show_is_found(make_view: Any, make_model: MakeModel) -> None:
    """Such as a turn that the model's own template leaves out."""
    from sftx.inspection.diagnosis.check_inputs import load_check_inputs
    from sftx.inspection.diagnosis.start_checks import own_template

    def without_doubt(tokenizer: Any) -> None:
        own = tokenizer.chat_template
        tokenizer.chat_template = own.replace("in messages", "in messages if 'Sure' not in message.content")

    (finding,) = own_template(load_check_inputs(make_view(ROWS, model=make_model(without_doubt))))
    assert finding.severity == "warning"
    assert "rows.jsonl:1: token" in finding.seen


# --- the tokenizer that is saved ----------------------------------------------------------------


@pytest.fixture(scope="module")
def llama2_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A SentencePiece tokenizer with `legacy: true` beside a configuration of Llama."""
    assert (ASSETS / "llama2").is_dir(), "run `make assets`"
    directory = Path(shutil.copytree(ASSETS / "llama2", tmp_path_factory.mktemp("llama2") / "model"))
    assert json.loads((directory / "tokenizer_config.json").read_text())["legacy"] is True
    (directory / "config.json").write_text(json.dumps({"model_type": "llama", "vocab_size": 32000}))
    return directory


def served(tokenizer: Any, row: dict[str, Any]) -> list[int]:
    ids: list[int] = tokenizer.apply_chat_template(row["messages"], return_dict=False)
    return ids


@pytest.mark.parametrize("plugin", ["llama2", "vicuna", "alpaca-template"])
def test_a_legacy_tokenizer_gives_the_trained_ids_when_it_is_read_back(
    make_view: Any, llama2_dir: Path, tmp_path: Path, plugin: str
) -> None:
    from transformers import AutoTokenizer

    from sftx.inspection.diagnosis.check_inputs import load_check_inputs
    from sftx.inspection.diagnosis.start_checks import saved_tokenizer as check
    from sftx.model import saved_tokenizer

    view = make_view(ROWS, model=llama2_dir, plugins=[plugin])
    assert list(check(load_check_inputs(view))) == []
    pipeline, examples = view.pipeline, view.dataset("train").examples
    for name, entries in (("repaired", pipeline.saved_tokenizer.entries), ("as transformers saves it", {})):
        (tmp_path / name).mkdir()
        saved_tokenizer.save(pipeline.tokenizer, tmp_path / name, entries)
        tokenizer = AutoTokenizer.from_pretrained(tmp_path / name)
        equal = [served(tokenizer, row) == examples.tokens(n)[0].tolist() for n, row in enumerate(ROWS)]
        assert equal == [name == "repaired"] * len(ROWS), name


def test_a_class_that_builds_another_tokenizer_is_replaced_or_told(
    make_view: Any, llama2_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """LlamaTokenizer ignores the normaliser in tokenizer.json."""
    from tokenizers import normalizers

    from sftx.inspection.diagnosis.check_inputs import load_check_inputs
    from sftx.inspection.diagnosis.start_checks import saved_tokenizer as check
    from sftx.model import saved_tokenizer

    def lower_case() -> Any:
        view = make_view(ROWS, model=llama2_dir, plugins=["vicuna"])
        tokenizer = view.pipeline.tokenizer
        tokenizer.backend_tokenizer.normalizer = normalizers.Lowercase()
        view.pipeline.encode.encoder.__init__(tokenizer, view.pipeline.encoder.template)
        return view

    view = lower_case()
    assert list(check(load_check_inputs(view))) == []
    assert view.pipeline.saved_tokenizer.entries["tokenizer_class"] == "PreTrainedTokenizerFast"
    trained = view.dataset("train").examples.tokens(0)[0].tolist()
    assert served(view.pipeline.saved_tokenizer.tokenizer, ROWS[0]) == trained
    monkeypatch.setattr(saved_tokenizer, "_AS_IN_FILE", {})
    (finding,) = check(load_check_inputs(lower_case()))
    assert "rows.jsonl:1: transformers reads this tokenizer back as another one: token" in finding.seen


def test_a_chat_template_that_writes_other_ids_than_were_trained_is_told(make_view: Any) -> None:
    from sftx.inspection.diagnosis.check_inputs import load_check_inputs
    from sftx.inspection.diagnosis.start_checks import saved_tokenizer

    view = make_view(ROWS)
    assert list(saved_tokenizer(load_check_inputs(view))) == []
    del view.pipeline.saved_tokenizer
    view.pipeline.tokenizer.chat_template = view.pipeline.tokenizer.chat_template.replace("'\\n'", "' '")
    (finding,) = saved_tokenizer(load_check_inputs(view))
    assert "by the chat template that is saved" in finding.seen


def test_rows_that_are_served_otherwise_by_their_nature_are_no_finding(make_view: Any) -> None:
    """A row that spells a control token, and an answer that begins with a line break, which joins the one before it."""
    from sftx.inspection.diagnosis.check_inputs import load_check_inputs
    from sftx.inspection.diagnosis.start_checks import saved_tokenizer

    def row(answer: str) -> dict[str, Any]:
        return {"messages": [{"role": "user", "content": "x"}, {"role": "assistant", "content": answer}]}

    view = make_view([row("<|im_end|>"), row("\n\n    two"), row("two"), {"text": "plain"}])
    assert list(saved_tokenizer(load_check_inputs(view))) == []


# --- tokens that the model was never trained on --------------------------------------------------


def with_equal_rows(model: Path, *, tied: bool, noise: float = 0.0) -> Path:
    """Give the tiny model's <|im_start|> and <|im_end|> one row, as a base model has that has never seen them."""
    import torch
    from safetensors.torch import load_file, save_file

    weights = load_file(model / "model.safetensors")
    embedding = weights["model.embed_tokens.weight"]
    embedding[2] = embedding[1] + noise * embedding[1].norm() / embedding.shape[1] ** 0.5
    if not tied:
        weights["lm_head.weight"] = torch.randn_like(embedding)
        weights["lm_head.weight"][2] = weights["lm_head.weight"][600]  # 600 has no token
        config = json.loads((model / "config.json").read_text()) | {"tie_word_embeddings": False}
        (model / "config.json").write_text(json.dumps(config))
    save_file(weights, model / "model.safetensors", metadata={"format": "pt"})
    return model


def of_rows(lines: list[str]) -> list[str]:
    return [line for line in lines if "never trained on" in line]


@pytest.mark.parametrize("tied", [True, False])
def test_control_tokens_with_one_row_are_told_with_what_to_do(
    said: Said, make_model: MakeModel, make_view: Any, tied: bool
) -> None:
    from sftx.inspection.diagnosis.check_inputs import load_check_inputs
    from sftx.inspection.diagnosis.model_checks import untrained_tokens

    model = with_equal_rows(make_model(), tied=tied, noise=1e-3)
    (line,) = of_rows(said(model))
    assert "no answer can end with <|im_end|>" in line
    option, value = line.partition("--set '")[2].removesuffix("'").split("=")
    assert option == "lora.trainable_token_indices"
    assert of_rows(said(model, lora__trainable_token_indices=json.loads(value))) == []
    modules = ["embed_tokens", "lm_head"]
    assert of_rows(said(model, lora__modules_to_save=modules)) == []
    (finding,) = untrained_tokens(load_check_inputs(make_view(ROWS, model=model, plugins=["chatml", "lora"])))
    assert str(finding) == line
    assert list(untrained_tokens(load_check_inputs(make_view(ROWS, model=model)))) == [], "all is trained"


def test_rows_of_a_model_that_knows_its_tokens_are_no_finding(said: Said, make_model: MakeModel) -> None:
    assert of_rows(said(make_model())) == []
    assert of_rows(said(with_equal_rows(make_model(called="near"), tied=True, noise=0.1))) == []


def test_a_model_that_could_not_stop_does_when_the_advice_is_followed(
    make_model: MakeModel, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """After a short training by which the model learns its answers: PEFT loads the rows, and generation stops."""
    import torch
    from peft import AutoPeftModelForCausalLM
    from transformers import AutoTokenizer

    import answering

    model = with_equal_rows(make_model(), tied=True)
    answering.write_rows(tmp_path)
    ends = {}
    for name, advice in (("before", {}), ("after", {"plugins__lora__trainable_token_indices": [1, 2]})):
        options = {"train__learning_rate": 3e-2, "train__num_train_epochs": 15, "train__save_steps": 500, **advice}
        out = answering.train(tmp_path, tmp_path / name, "lora", model=str(model), **options)
        adapter = out / "adapter"
        tokenizer = AutoTokenizer.from_pretrained(adapter)
        peft = AutoPeftModelForCausalLM.from_pretrained(adapter).eval()
        asked = tokenizer.apply_chat_template(
            [{"role": "user", "content": answering.QUESTIONS[0]}], add_generation_prompt=True, return_tensors="pt"
        )
        with torch.no_grad():
            ids = peft.generate(**asked, max_new_tokens=40, do_sample=False, eos_token_id=tokenizer.eos_token_id)
        ends[name] = tokenizer.decode(ids[0, -1])
    assert ends["after"] == "<|im_end|>" != ends["before"]
