"""Export the result of a run in another format, which an exporter plugin writes, and compare it with the run."""

from __future__ import annotations

import gc
import logging
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, get_args

import torch

from sftx.atomic_files import atomic_directory
from sftx.checkpoint import checkpoint, model_card
from sftx.checkpoint.load_run import LoadedRun, load_run, run_directory_of
from sftx.checkpoint.questions import find_questions
from sftx.checkpoint.verification import ComparedAnswer, Verification, ask, verify
from sftx.distributed.process_group import ProcessGroup
from sftx.errors import ConfigError, ModelError, one_line
from sftx.model import saved_tokenizer
from sftx.model.library_messages import passed_on
from sftx.model.load import load_config
from sftx.model.names import ORIGINAL, quantization_of
from sftx.phases import phase
from sftx.types import Rounding

if TYPE_CHECKING:
    from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

    from sftx.assembly.stages.exporter_stages import ExporterStage
    from sftx.types import LanguageModel, Template

log = logging.getLogger(__name__)

_HALF: Final = (torch.bfloat16, torch.float16)
_CODES: Final = (torch.uint8, torch.int8)
"""The dtypes of quantised weights."""


class LoadedSource:
    """The loaded run as an exporter gets it: implements `sftx.ExportSource`."""

    def __init__(self, run: LoadedRun, *, trust_remote_code: bool = False) -> None:
        self._run = run
        self._trust_remote_code = trust_remote_code

    @property
    def lm(self) -> LanguageModel:
        return self._run.lm

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        return self._run.tokenizer

    @property
    def template(self) -> Template | None:
        return self._run.template

    @property
    def stop_ids(self) -> tuple[int, ...]:
        return self._run.stop_ids

    @property
    def generation_config(self) -> GenerationConfig:
        return self._run.generation_config

    @property
    def base_model(self) -> str:
        return self._run.base_model

    @property
    def dtype(self) -> torch.dtype:
        return self._run.saved_dtype

    def merge(self) -> PreTrainedModel:
        lm = self._run.lm
        for adapter in lm.adapters.values():
            adapter.merge(lm)
        lm.adapters.clear()
        _declare_untied(lm.model)
        return lm.model

    def save_adapter(self, directory: Path) -> None:
        if len(self._run.lm.adapters) != 1:
            raise ConfigError(
                f"{self._run.directory}: has {len(self._run.lm.adapters)} adapters, where one is expected"
            )
        self._settle_tokenizer()
        checkpoint.write_artefact(self._run.lm, directory, ProcessGroup())

    def save_pretrained(
        self, directory: Path, *, dtype: torch.dtype | None = None, max_shard_size: str = "5GB"
    ) -> None:
        self.merge()
        lm, dtype = self._run.lm, dtype or self.dtype
        if checkpoint.exceeds(lm, dtype, ProcessGroup()):
            raise ConfigError(
                f"{self._run.directory}: a weight is too large for {str(dtype).removeprefix('torch.')}, in which it is "
                "infinite; take bfloat16, which has the range of float32 (--dtype bfloat16)"
            )
        self._settle_tokenizer()
        checkpoint.write_artefact(lm, directory, ProcessGroup(), dtype=dtype, max_shard_size=max_shard_size)

    def _settle_tokenizer(self) -> None:
        """Let the tokenizer's files hold what makes it read back as it is."""
        saved = saved_tokenizer.save_and_read_back(
            self.tokenizer,
            self.stop_ids,
            self._run.lm.model.config.model_type,
            trust_remote_code=self._trust_remote_code,
        )
        self._run.lm.tokenizer_entries = saved.entries


def _declare_untied(model: PreTrainedModel) -> None:
    """Let config.json say so where the head was tied to the embedding, and an adapter has trained them apart."""
    head: Any = model.get_output_embeddings()
    embedding: Any = model.get_input_embeddings()
    config = model.config.get_text_config()
    if head is None or not config.tie_word_embeddings or head.weight is embedding.weight:
        return
    if torch.equal(head.weight, embedding.weight):
        head.weight = embedding.weight
        return
    model.config.tie_word_embeddings = config.tie_word_embeddings = False
    log.warning("the output head is no longer equal to the embedding: both are written, and config.json says so")


def export_run(
    directory: Path,
    target: Path,
    exporter: ExporterStage,
    *,
    verify_rows: int | None = 8,
    base: str | None = None,
    trust_remote_code: bool = False,
) -> Verification | None:
    """Write the result of a run, or anything else that `load_run` takes, into `target`, which must not exist.

    The model is loaded in fp32 on the CPU. `verify_rows`: how many questions the run and its export are asked; None
    leaves the comparison out, and returns None. `base`: merge into this model instead of the one that was trained on:
    a directory or hub id, or "original" for a base that the run has quantised. Where the run's own base is missing, the
    questions are answered with this one.
    Raises ConfigError before weights are read for a model that the exporter does not write, ModelError, PluginError,
    also for an export that does not answer as the run, and OutputError.
    """
    load = partial(
        load_run,
        directory,
        device="cpu",
        dtype=torch.float32,
        trust_remote_code=trust_remote_code,
        check=exporter.check,
    )
    with phase("loading", "the model"):
        try:
            run = load()
        except ModelError as error:
            if base in (None, ORIGINAL):
                raise
            log.warning("%s; %s takes its place", one_line(error), base)
            run, base = load(base=base), None
    if run.collator is not None:
        raise ConfigError(
            f"{directory}: an adapter of this run embeds extras of a row, which it cannot fold into the model's weights"
        )
    rounding = exporter.rounding
    if rounding == "none" and run.saved_dtype in _HALF:
        rounding = "half"
    kind, answers = "", list[ComparedAnswer]()
    if verify_rows is not None:
        with phase("asking", "the run"):
            kind, questions = find_questions(run, verify_rows)
            answers = ask(run, questions)
    tokenizer, stop_ids = run.tokenizer, run.stop_ids
    origin = model_card.describe_origin(run_directory_of(run.directory), run.base_model, tokenizer, stop_ids)
    is_quantised = any(p.dtype in _CODES for p in run.lm.model.parameters())
    config = load_config(run.base_model, trust_remote_code=trust_remote_code)
    is_stored = is_quantised and bool(quantization_of(config.to_dict()))
    if is_quantised and base is None:
        log.info(
            "the base is quantised: the adapter is merged into its dequantised weights, those that it was trained on; "
            "--base %s merges into a base of 16 bits",
            "DIR|HUB_ID" if is_stored else ORIGINAL,
        )
    if base == ORIGINAL and is_stored:
        raise ConfigError(
            f"--base {ORIGINAL}: {run.base_model} is stored quantised; name the model that it was made of: --base "
            "DIR|HUB_ID"
        )
    if base == ORIGINAL and not is_quantised:
        raise ConfigError(f"--base {ORIGINAL}: {directory} was trained on a base that is not quantised; leave it out")
    if base is not None:
        del run
        gc.collect()
        with phase("loading", "the base"):
            run = load(base=base)
        if is_quantised:
            rounding = max(rounding, "4-bit", key=get_args(Rounding).index)
    verification = None
    with atomic_directory(target) as part:
        source = LoadedSource(run, trust_remote_code=trust_remote_code)
        del run
        with phase("exporting", "the model"):
            exporter.export(source, part)
        del source
        gc.collect()  # the model is in circles of references, and the reader loads another one
        if verify_rows is not None and exporter.can_load:
            with phase("verifying", "the export"), passed_on(str(exporter)):
                exported = exporter.load(part, trust_remote_code=trust_remote_code)
                verification = verify(kind, answers, exported, tokenizer, stop_ids, rounding)
                del exported
        if verification is not None:
            checked = f"Compared with the run that it comes from, {verification}."
        else:
            why = "the exporter cannot load what it writes" if verify_rows is not None else "--no-verify left it out"
            checked = f"It was not compared with the run that it comes from: {why}."
        model_card.write_export(part, origin, exporter.usage(Path(target.name)), checked)
    return verification
