"""`sftx merge` writes the result of a run as a plain model directory: the exporter `safetensors`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from sftx.cli.export import export_options, write
from sftx.config.run_file import Origins

_EXPORTER = "safetensors"


@click.command()
@click.option(
    "--into",
    metavar="DIR",
    type=click.Path(path_type=Path),
    help="Directory to write; it must be new or empty.  [default: RUN/merged]",
)
@click.option(
    "--dtype",
    type=click.Choice(["base", "float32", "bfloat16", "float16"]),
    default="base",
    help="Of the weights in the files; base is that of the base model's own files.  [default: base]",
)
@click.option(
    "--max-shard-size", metavar="SIZE", default="5GB", help="Largest file of weights, such as 500MB.  [default: 5GB]"
)
@export_options
def command(run: Path, into: Path | None, dtype: str, max_shard_size: str, **common: Any) -> None:
    """Fold the adapters of RUN into its base: a model directory that everything loads which loads transformers' models.

    RUN is a run directory, one of its checkpoints, an adapter or a model. It is merged in fp32 on the CPU, 4 bytes a
    parameter. What was written is loaded back by transformers alone and compared with the run, before it takes its
    place.
    """
    from sftx.checkpoint import layout

    origins = Origins()
    options = {"dtype": dtype, "max_shard_size": max_shard_size}
    for name in options:
        origins.set(f"plugins.{_EXPORTER}.{name}", f"--{name.replace('_', '-')}")
    write(run, _EXPORTER, options, origins, into or Path(layout.MERGED), is_given=into is not None, **common)
