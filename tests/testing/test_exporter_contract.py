"""Tests of the exporter contract: good exporters, and bad ones that break one clause each."""

from __future__ import annotations

import random
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from contracts import assert_every_clause_is_broken, assert_fails, assert_fails_only, assert_passes, whole_suite_cases
from sftx import ConfigError, ExportedModel, ExportSource, hookimpl
from sftx.testing.exporter import SUITE
from sftx.testing.kit import built_in

KNOWN = ("LlamaForCausalLM", "MistralForCausalLM")


class Directory:
    """Writes a model directory; the classes below change one thing."""

    @hookimpl
    def sftx_exporter(self) -> Any:
        return self

    def check(self, config: Any) -> None:
        if unknown := set(config.architectures or [""]) - set(KNOWN):
            raise ConfigError(f"{', '.join(unknown)} is not known; known are {', '.join(KNOWN)}")

    def export(self, source: ExportSource, directory: Path) -> None:
        source.save_pretrained(directory)

    def usage(self, directory: Path) -> Any:
        return f"serve {directory}"

    def load(self, directory: Path) -> ExportedModel:
        reads: Any = built_in("safetensors")
        exported: ExportedModel = reads.load(directory)
        return exported


class KnowsOthers(Directory):
    def check(self, config: Any) -> None:
        raise ConfigError("known are MistralForCausalLM alone")


class Rounds(Directory):
    rounding = "8-bit"

    def export(self, source: ExportSource, directory: Path) -> None:
        import torch

        source.save_pretrained(directory, dtype=torch.float16)


class GivesNone(Directory):
    @hookimpl
    def sftx_exporter(self) -> Any:
        return None


class RaisesKeyError(Directory):
    def check(self, config: Any) -> None:
        if (config.architectures or [""])[0] not in KNOWN:
            raise KeyError(config.architectures)


class ListsNothing(Directory):
    def check(self, config: Any) -> None:
        if (config.architectures or [""])[0] not in KNOWN:
            raise ConfigError("not known")


class WritesNothing(Directory):
    def export(self, source: ExportSource, directory: Path) -> None:
        pass


class WritesBeside(Directory):
    def export(self, source: ExportSource, directory: Path) -> None:
        super().export(source, directory)
        (directory.parent / "more.txt").write_text("more")


class Fails(Directory):
    def export(self, source: ExportSource, directory: Path) -> None:
        raise ValueError("no tokenizer.model")


class SaysNothing(Directory):
    def usage(self, directory: Path) -> Any:
        return "Load it with the program of your choice."


class SaysNone(Directory):
    def usage(self, directory: Path) -> Any:
        return None


class ForgetsTheAdapter(Directory):
    def export(self, source: ExportSource, directory: Path) -> None:
        from transformers import AutoModelForCausalLM

        source.save_pretrained(directory)
        base = AutoModelForCausalLM.from_pretrained(source.base_model)
        base.generation_config = source.generation_config
        base.save_pretrained(directory)


class StopsAtTheFirstAlone(Directory):
    def export(self, source: ExportSource, directory: Path) -> None:
        source.generation_config.eos_token_id = source.stop_ids[0]
        super().export(source, directory)


class NamesNoReader(Directory):
    def load(self, directory: Path) -> Any:
        return SimpleNamespace(stop_ids=[0], prompt=None, logits=None)


class ForgetsTheTemplate(Directory):
    def export(self, source: ExportSource, directory: Path) -> None:
        source.tokenizer.chat_template = "{{ messages[0].content }}"
        super().export(source, directory)


class Draws(Directory):
    def export(self, source: ExportSource, directory: Path) -> None:
        random.random()
        super().export(source, directory)


BAD = [
    (GivesNone, "made", "is its `return` missing?"),
    (RaisesKeyError, "checks-before-weights", "KeyError: ['UnknownForCausalLM']; raise ConfigError"),
    (ListsNothing, "checks-before-weights", "list the architectures that it knows"),
    (WritesNothing, "writes-its-directory", "export wrote no file"),
    (WritesBeside, "writes-its-directory", "export wrote more.txt beside its directory"),
    (Fails, "writes-its-directory", "export failed: ValueError: no tokenizer.model"),
    (SaysNothing, "says-how-to-load", "name the directory"),
    (SaysNone, "says-how-to-load", "usage returned NoneType, expected text"),
    (ForgetsTheAdapter, "answers-as-the-run", "write the merged model"),
    (StopsAtTheFirstAlone, "answers-as-the-run", "a stop token is missing, "),
    (ForgetsTheTemplate, "answers-as-the-run", "another chat template: the prompt of conversation 1 differs"),
    (NamesNoReader, "answers-as-the-run", "load returned SimpleNamespace, which has no reader"),
    (Draws, "leaves-the-process", "export changed Python's random numbers"),
]


@pytest.mark.parametrize("plugin", [Directory(), built_in("safetensors", max_shard_size="20KB")])
def test_good_exporters_keep_every_clause(plugin: object) -> None:
    assert_passes(SUITE, plugin)


def test_an_exporter_that_does_not_know_the_model_or_rounds_is_exempt_from_what_it_cannot_keep() -> None:
    def exempt(plugin: object) -> list[str]:
        findings = SUITE.findings(plugin)
        assert {finding.status for finding in findings} <= {"ok", "exempt"}
        return [finding.clause for finding in findings if finding.status == "exempt"]

    assert exempt(KnowsOthers()) == ["writes-its-directory", "answers-as-the-run", "leaves-the-process"]
    assert exempt(Rounds()) == []  # its bound is another one


@pytest.mark.parametrize(("bad", "clause", "message"), BAD)
def test_a_bad_exporter_fails_its_clause_with_a_message(bad: Any, clause: str, message: str) -> None:
    assert_fails(SUITE, bad(), clause, message)


@pytest.mark.parametrize(("bad", "clause"), whole_suite_cases(BAD))
def test_a_bad_exporter_fails_nothing_else(bad: Any, clause: str) -> None:
    assert_fails_only(SUITE, bad(), clause)


def test_each_clause_has_a_bad_exporter() -> None:
    assert_every_clause_is_broken(SUITE, [clause for _, clause, _ in BAD])
