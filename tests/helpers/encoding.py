"""Files of rows as the datasets of a run, without a run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from sftx.assembly.stages import ParserStage
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
    """Every row of these files, encoded, not cached, and checked as for a run."""
    stages = {name: ParserStage(f"plugin {name!r}", parser) for name, parser in parsers.items()}
    encode = RowEncoder(stages, encoder, config, questions=questions)
    data = load_dataset([Source(str(path)) for path in paths], encode)
    data.check(encode)
    return data
