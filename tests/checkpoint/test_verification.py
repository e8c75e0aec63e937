"""Tests of the comparison of an export with its run: a right one passes, and each planted fault is named."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner, Result
from safetensors.torch import load_file, save_file
from torch import Tensor

from sftx import PluginError, load_run
from sftx.assembly.stages.exporter_stages import ExportedStage
from sftx.checkpoint.exporting import LoadedSource
from sftx.checkpoint.load_run import LoadedRun
from sftx.checkpoint.questions import ComparedPrompt, find_questions
from sftx.checkpoint.verification import ComparedAnswer, ask, verify
from sftx.cli import main
from sftx.testing.runs import run_tiny
from sftx.types import Rounding
from sftx_plugins.exporters.transformers_reader import TransformersReader


def sftx(*arguments: str | Path) -> Result:
    return CliRunner().invoke(main, list(map(str, arguments)))


def trained(directory: Path, names: Sequence[str] = ("lora",), **settings: Any) -> Path:
    options = {"train.learning_rate": 0.05, "train.warmup_steps": 0, **settings}
    return run_tiny(names, directory, settings=options).output_dir


@dataclass
class Exported:
    """A run, its answers, and its merged model in a directory."""

    directory: Path
    run: LoadedRun
    kind: str
    answers: list[ComparedAnswer]
    merged: Path

    def verify(self, directory: Path, rounding: Rounding = "none") -> Any:
        stage = ExportedStage("the exporter", TransformersReader(directory))
        return verify(self.kind, self.answers, stage, self.run.tokenizer, self.run.stop_ids, rounding)


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Exported:
    place = tmp_path_factory.mktemp("verified")
    directory = trained(place)
    run = load_run(directory, device="cpu", dtype=torch.float32)
    kind, questions = find_questions(run, 3)
    answers = ask(run, questions)
    merged = place / "merged"
    merged.mkdir()
    LoadedSource(run).save_pretrained(merged)
    return Exported(directory, run, kind, answers, merged)


def test_a_right_export_passes_and_says_how_near_it_is(exported: Exported) -> None:
    result = exported.verify(exported.merged)
    assert (result.kind, result.num_questions, result.ties) == ("held-out rows", 3, ())
    assert result.num_tokens == result.num_agreeing == sum(len(answer.token_ids) for answer in exported.answers)
    assert 0 <= result.divergence < 1e-8
    assert 0 < result.largest_difference < 1e-5
    assert f"and all {result.num_tokens} tokens of its 3 answers (held-out rows); " in str(result)


# --- planted faults -------------------------------------------------------------------------------

Plant = Callable[[Path, dict[str, Tensor], dict[str, Tensor]], None]
"""Plants a fault into a directory; gets the merged weights, which are written afterwards, and those of the base."""


def other_template(directory: Path, merged: dict[str, Tensor], base: dict[str, Tensor]) -> None:
    (directory / "chat_template.jinja").write_text("{% for m in messages %}[INST] {{ m.content }} [/INST]{% endfor %}")


def missing_stop(directory: Path, merged: dict[str, Tensor], base: dict[str, Tensor]) -> None:
    file = directory / "generation_config.json"
    values = json.loads(file.read_text())
    file.write_text(json.dumps(values | {"eos_token_id": values["eos_token_id"][1]}))


def no_adapter(directory: Path, merged: dict[str, Tensor], base: dict[str, Tensor]) -> None:
    merged.update(base)


def no_scaling(directory: Path, merged: dict[str, Tensor], base: dict[str, Tensor]) -> None:
    for name, weight in base.items():  # lora_alpha / r is 2 by default
        merged[name] = weight + (merged[name] - weight) / 2


def merged_twice(directory: Path, merged: dict[str, Tensor], base: dict[str, Tensor]) -> None:
    for name, weight in base.items():
        merged[name] = 2 * merged[name] - weight


def transposed(directory: Path, merged: dict[str, Tensor], base: dict[str, Tensor]) -> None:
    for name, weight in base.items():
        if weight.ndim == 2 and weight.shape[0] == weight.shape[1]:
            merged[name] = weight + (merged[name] - weight).T


def untied(directory: Path, merged: dict[str, Tensor], base: dict[str, Tensor]) -> None:
    """Without its weights, the head is initialised anew."""
    file = directory / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"tie_word_embeddings": False}))


def overflow(directory: Path, merged: dict[str, Tensor], base: dict[str, Tensor]) -> None:
    name = "model.layers.0.mlp.down_proj.weight"
    merged[name] = (merged[name] / merged[name].abs().max() * 1e5).to(torch.float16)


def other_vocabulary(directory: Path, merged: dict[str, Tensor], base: dict[str, Tensor]) -> None:
    file = directory / "tokenizer.json"
    values = json.loads(file.read_text())
    vocabulary = values["model"]["vocab"]
    vocabulary["W"], vocabulary["a"] = vocabulary["a"], vocabulary["W"]
    file.write_text(json.dumps(values))


FAULTS: dict[Plant, str] = {
    other_template: r"another chat template: the prompt of .*rows.jsonl:1 differs from token 0 on",
    missing_stop: r"a stop token is missing, '<\|im_end\|>': its answers would not end",
    no_adapter: r"it answers as the base model does, without the adapters",
    no_scaling: r"the adapters have another effect than in the run, as with a scaling \(lora_alpha / r\) that",
    merged_twice: r"as with a scaling \(lora_alpha / r\) that is missing or wrong",
    transposed: r"other weights, as with updates that are transposed",
    untied: r"a head that is tied to the embedding or untied from it wrongly",
    overflow: r"its logits are not finite, as with a weight too large for float16; take bfloat16",
    other_vocabulary: r"another vocabulary or tokenizer: the prompt of .*rows.jsonl:1 differs",
}


@pytest.mark.parametrize(("plant", "message"), FAULTS.items(), ids=[plant.__name__ for plant in FAULTS])
def test_each_planted_fault_is_refused_by_its_name(
    exported: Exported, plant: Plant, message: str, tmp_path: Path
) -> None:
    directory = shutil.copytree(exported.merged, tmp_path / "planted")
    merged = load_file(directory / "model.safetensors")
    base = load_file(exported.directory.parent / "model" / "model.safetensors")
    plant(directory, merged, base)
    save_file(
        {name: value.contiguous() for name, value in merged.items()}, directory / "model.safetensors", {"format": "pt"}
    )
    with pytest.raises(PluginError, match=message) as raised:
        exported.verify(directory)
    assert "read back by transformers" in str(raised.value)
    assert "\n" not in str(raised.value)


# --- tokens ---------------------------------------------------------------------------------------


@dataclass
class Reader:
    """An export of four tokens that gives one question's logits, [A, 4]."""

    logits_AV: Tensor
    reader: str = "a reader"
    stop_ids: tuple[int, ...] = (3,)
    prompt: Any = None

    def logits(self, token_ids: Sequence[int]) -> Tensor:
        return torch.cat([self.logits_AV[:1]] * (len(token_ids) - len(self.logits_AV)) + [self.logits_AV])


class Letters:
    """A tokenizer that decodes."""

    def __len__(self) -> int:
        return 4

    def decode(self, ids: list[int]) -> str:
        return "".join("abc."[token] for token in ids)


OWN_AV = torch.tensor([[9.0, 1, 1, 1], [1, 9, 8.95, 1], [1, 1, 1, 9]])


def compared(logits_AV: Tensor, rounding: Rounding) -> Any:
    answer = ComparedAnswer(ComparedPrompt("rows.jsonl:7", [0, 1]), [0, 1, 3], OWN_AV, None)
    tokenizer: Any = Letters()
    return verify("held-out rows", [answer], ExportedStage("x", Reader(logits_AV)), tokenizer, [3], rounding)


def test_the_first_other_token_is_named_with_its_question_and_place() -> None:
    other_AV = OWN_AV.clone()
    other_AV[1] = torch.tensor([1, 8.95, 9, 1])
    with pytest.raises(PluginError, match="of 3 tokens it chooses 2 as the run") as raised:
        compared(other_AV, "none")
    named = "rows.jsonl:7, token 2 of the answer: 'b' by the run, 'c' by the export, which the run rates 0.05 lower"
    assert named in str(raised.value)


def test_a_tie_of_rounding_is_reported_and_is_no_fault() -> None:
    other_AV = OWN_AV.clone()
    other_AV[1] = torch.tensor([1, 8.94, 8.96, 1])
    result = compared(other_AV, "half")
    assert (result.num_tokens, result.num_agreeing, len(result.ties)) == (3, 2, 1)
    assert "and 2 of 3 tokens of its 1 answer (held-out rows; 1 tie of rounding); " in str(result)
    with pytest.raises(PluginError):
        compared(other_AV, "none")


def test_a_vocabulary_that_lacks_tokens_is_refused() -> None:
    with pytest.raises(PluginError, match="it has logits of 3 tokens, the run of 4: another vocabulary"):
        compared(OWN_AV[:, :3], "none")
