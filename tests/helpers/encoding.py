"""Encode files of rows as a run does, without a run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from sftx.assembly.stages.data_stages import ParserStage
from sftx.config.options import DataConfig, Source
from sftx.data.dataset import Dataset
from sftx.data.encoder import Encoder
from sftx.data.preprocess import load_dataset
from sftx.data.row_encoder import RowEncoder
from sftx.types import Parser


def prepared(
    paths: Sequence[str | Path],
    config: DataConfig,
    parsers: Mapping[str, Parser],
    encoder: Encoder,
    *,
    questions: bool = False,
) -> Dataset:
    """Encode every row of these files without the cache, and check the result as a run does."""
    stages = {name: ParserStage(f"plugin {name!r}", parser) for name, parser in parsers.items()}
    encode = RowEncoder(stages, encoder, config, questions=questions)
    data = load_dataset([Source(str(path)) for path in paths], encode)
    data.check(encode)
    return data
