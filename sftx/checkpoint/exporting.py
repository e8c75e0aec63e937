"""Export the result of a run in another format, which an exporter plugin writes."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import torch

from sftx.atomic_files import atomic_directory
from sftx.checkpoint import checkpoint
from sftx.checkpoint.load_run import LoadedRun, load_run
from sftx.distributed.process_group import ProcessGroup
from sftx.errors import ConfigError
from sftx.model import saved_tokenizer
from sftx.phases import phase

if TYPE_CHECKING:
    from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

    from sftx.assembly.stages import ExporterStage
    from sftx.types import LanguageModel, Template


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
        return lm.model

    def save_pretrained(
        self, directory: Path, *, dtype: torch.dtype | None = None, max_shard_size: str = "5GB"
    ) -> None:
        model, lm = self.merge(), self._run.lm
        saved = saved_tokenizer.save_and_read_back(
            self.tokenizer, self.stop_ids, model.config.model_type, trust_remote_code=self._trust_remote_code
        )
        lm.tokenizer_entries = saved.entries
        checkpoint.write_artefact(
            lm, directory, ProcessGroup(), dtype=dtype or self.dtype, max_shard_size=max_shard_size
        )


def export_run(directory: Path, target: Path, exporter: ExporterStage, *, trust_remote_code: bool = False) -> None:
    """Write the result of a run, or anything else that `load_run` takes, into `target`, which must not exist.

    The model is loaded in fp32 on the CPU. Raises ConfigError before weights are read for a model that the exporter
    does not write, ModelError, PluginError and OutputError.
    """
    with phase("loading", "the model"):
        run = load_run(
            directory, device="cpu", dtype=torch.float32, trust_remote_code=trust_remote_code, check=exporter.check
        )
    if run.collator is not None:
        raise ConfigError(
            f"{directory}: an adapter of this run embeds extras of a row, which it cannot fold into the model's weights"
        )
    with phase("exporting", "the model"), atomic_directory(target) as part:
        exporter.export(LoadedSource(run, trust_remote_code=trust_remote_code), part)
