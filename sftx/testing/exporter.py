"""The contract of an exporter: it refuses early what it cannot write, and what it writes answers as the run does."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path

import torch

from sftx.assembly.stages.adapter_stage import AdapterStage
from sftx.assembly.stages.exporter_stages import ExporterStage
from sftx.checkpoint.exporting import LoadedSource
from sftx.checkpoint.load_run import LoadedRun
from sftx.checkpoint.questions import ComparedPrompt, as_messages
from sftx.checkpoint.verification import ask, verify
from sftx.data.encoder import Encoder
from sftx.errors import ConfigError, PluginError, one_line
from sftx.model.generation import generation_defaults
from sftx.testing.clauses import ClauseError, ExemptError, Suite, must_not_raise
from sftx.testing.kit import CONVERSATIONS, Kit, built_in, make_stage
from sftx.testing.process import process


class _Case:
    def __init__(self, kit: Kit) -> None:
        self._kit = kit
        self.exporter = ExporterStage("the exporter", make_stage(kit.plugin, "sftx_exporter"))

    @cached_property
    def refusal(self) -> str:
        """Why it does not export the model of the check; empty when it does."""
        try:
            self.exporter.check(self._kit.spec.config)
        except ConfigError as error:
            return one_line(error)
        return ""

    def run(self) -> LoadedRun:
        """Return the result of a run whose LoRA changes every answer, and which has two stop tokens.

        The second one is the third token of its first answer, so that an answer ends there.
        """
        adapter = AdapterStage("lora", make_stage(built_in("lora"), "sftx_adapter", spec=self._kit.spec))
        lm = self._kit.language_model({"lora": adapter})
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for parameter in lm.parameters():
                if parameter.requires_grad:
                    parameter.normal_(0, 0.3, generator=generator)
        lm.requires_grad_(False)
        lm.eval()
        encoder = Encoder(self._kit.tokenizer, self._kit.template)
        lm.model.generation_config = generation_defaults(lm, encoder.stop_ids)
        run = LoadedRun(
            lm=lm,
            tokenizer=self._kit.tokenizer,
            template=self._kit.template,
            encoder=encoder,
            directory=self._kit.model_dir,
            base_model=str(self._kit.model_dir),
            compute_dtype=torch.float32,
            saved_dtype=torch.float32,
            config=None,
        )
        (answer,) = run.answer([self.questions(run)[0].token_ids], max_new_tokens=3)
        encoder.stop_ids = tuple(dict.fromkeys([*encoder.stop_ids, *answer[2:]]))
        lm.model.generation_config = generation_defaults(lm, encoder.stop_ids)
        return run

    def questions(self, run: LoadedRun) -> list[ComparedPrompt]:
        return [
            ComparedPrompt(f"conversation {n}", run.prompt(conversation), tuple(as_messages(conversation)))
            for n, conversation in enumerate(CONVERSATIONS[:3], 1)
        ]

    @contextmanager
    def exported(self, run: LoadedRun) -> Iterator[Path]:
        """Export the run into an empty directory. Raises ClauseError, and ExemptError for a model that it refuses."""
        if self.refusal:
            raise ExemptError(f"it does not export the model of this check, which --model replaces: {self.refusal}")
        with tempfile.TemporaryDirectory(prefix="sftx-exporter-") as place:
            directory = Path(place) / "export"
            directory.mkdir()
            with must_not_raise("export", "it gets every model that check accepts"):
                self.exporter.export(LoadedSource(run), directory)
            if outside := [path.name for path in Path(place).iterdir() if path != directory]:
                raise ClauseError(f"export wrote {outside[0]} beside its directory; write below it")
            yield directory


SUITE: Suite[_Case] = Suite("exporter", _Case)


@SUITE.clause("`check` accepts a model by its configuration, or raises a ConfigError that lists those that it knows.")
def checks_before_weights(case: _Case) -> None:
    from transformers import PretrainedConfig

    with must_not_raise("check of the model's configuration", "raise ConfigError for a model that it cannot write"):
        refusal = case.refusal
    unknown = PretrainedConfig(architectures=["UnknownForCausalLM"])
    with must_not_raise("check of an unknown architecture", "raise ConfigError for a model that it cannot write"):
        try:
            case.exporter.check(unknown)
        except ConfigError as error:
            if not refusal and "ForCausalLM" not in str(error).replace("UnknownForCausalLM", ""):
                raise ClauseError(f"check refused with {str(error)!r}; list the architectures that it knows") from error


@SUITE.clause("It writes files, into the directory that it is given and nowhere else.", needs=["checks-before-weights"])
def writes_its_directory(case: _Case) -> None:
    with case.exported(case.run()):
        pass


@SUITE.clause("`usage` says how to load the directory.", needs=["checks-before-weights"])
def says_how_to_load(case: _Case) -> None:
    directory = Path("runs") / "run-1" / "export"
    try:
        text = case.exporter.usage(directory)
    except PluginError as error:
        raise ClauseError(str(error)) from error
    if str(directory) not in text:
        raise ClauseError(f"usage says {text!r:.100}; name the directory, so that the lines can be copied")


@SUITE.clause(
    "What `load` reads has the run's prompts and stop tokens, and along the run's answers it chooses the same tokens.",
    needs=["writes-its-directory"],
)
def answers_as_the_run(case: _Case) -> None:
    if not case.exporter.can_load:
        raise ExemptError("it has no method load")
    run = case.run()
    answers = ask(run, case.questions(run))
    with case.exported(run) as directory, must_not_raise("load, or an answer", "it gets a directory that it wrote"):
        try:
            exported = case.exporter.load(directory)
            verify("questions of the check", answers, exported, run.tokenizer, run.stop_ids, case.exporter.rounding)
        except PluginError as error:
            raise ClauseError(
                f"{error}; write the merged model, tokenizer, template and all stop tokens, or declare with `rounding` "
                "how far weights are rounded"
            ) from error


@SUITE.clause(
    "It does not change random state, torch's modes, signal handlers or other state of the process.",
    needs=["writes-its-directory"],
)
def leaves_the_process(case: _Case) -> None:
    run, before = case.run(), process()
    with case.exported(run):
        changed = [name for name, value in process().items() if value is not None and before[name] != value]
    if changed:
        raise ClauseError(f"export changed {changed[0]}, which others share; restore it")


def check_exporter(plugin: object) -> None:
    """Check the plugin's exporter. Raises ContractError, which names the broken clauses."""
    SUITE.check(plugin)
