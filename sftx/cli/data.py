"""The command `sftx data` converts the data of a run."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import click

from sftx import atomic_files, stores
from sftx.cli.options import RunCommand, run_options
from sftx.config import loading
from sftx.errors import ConfigError, OutputError, counted, one_line, printable
from sftx.phases import phase

_SUFFIXES = (".jsonl", ".ndjson")


@click.group()
def command() -> None:
    """Convert the data of a run."""


@command.command(cls=RunCommand)
@run_options("data")
@click.option("--output", metavar="FILE", required=True, help="JSON lines file to write, or - for the terminal.")
def export(file: Path | None, loaded: loading.LoadedConfig, output: str) -> None:
    """Write the training rows of RUN_FILE or the options, merged, filtered and converted, as messages JSON lines.

    Each row is written once, whatever the weight of its source. Filters that count tokens do not apply; nor does
    max_length.
    """
    from sftx.assembly.registry import activate
    from sftx.data import sources

    with phase("importing", "numpy and pyarrow"):
        from sftx.data.export import export_lines
        from sftx.data.ledger import Ledger
        from sftx.data.pipeline import check_formats

    data = loaded.config.data
    if not data.train:
        raise ConfigError("option 'data.train': no data to export; give a file with --data")
    sources.check_eval_fraction(data)
    if output != "-":
        _check_output(output)
    assembly = activate(loaded)
    stores.refresh()
    for source in data.train:
        sources.check(source, assembly.row_sources)
    parsers = assembly.parsers()
    check_formats(data, loaded.origins, parsers)
    ledger = Ledger()
    lines = export_lines(data.train, data, parsers, ledger, assembly.row_sources)
    if output == "-":
        if sys.stdout is None:
            raise OutputError("--output -: standard output is closed")
        sys.stdout.buffer.writelines(f"{line}\n".encode() for line in lines)
        sys.stdout.flush()
    else:
        path = _ready(output)
        exporting = phase("exporting", "rows", unit="rows")
        with exporting as progress, atomic_files.open_text(path, overwrite=False) as stream:
            stream.writelines(f"{line}\n" for line in progress.counted(lines))
    for line in ledger.summary():
        click.echo(printable(line), err=True)
    filters = [source.filters or data.filters for source in data.train]
    if any(one.min_length or one.max_length is not None for one in filters):
        click.echo("filters.min_length and max_length count tokens and are not applied to an export", err=True)
    num_written = f"{ledger.num_rows - len(ledger.entries):,} of {counted(ledger.num_rows, 'row')}"
    click.echo(printable(f"{num_written} written to {output}"), err=True)


@command.command(cls=RunCommand)
@run_options("data", "train")
@click.option("--top-k", type=click.IntRange(min=1), default=64, show_default=True,
              help="How many of the most likely tokens are kept in place of each trained token.")  # fmt: skip
@click.option("--temperature", type=click.FloatRange(min=0, min_open=True), default=1.0, show_default=True,
              help="Divides the teacher's logits; distill.temperature of the run that reads the file.")  # fmt: skip
@click.option("--output", metavar="FILE", required=True, help="JSON lines file to write.")
def distill(file: Path | None, loaded: loading.LoadedConfig, top_k: int, temperature: float, output: str) -> None:
    """Write the training rows as tokens, with the most likely tokens of a teacher, for the plugin distill.

    The model of RUN_FILE or the options is the teacher: it has the tokenizer of the student. Rows are encoded as a run
    encodes them, each once; held-out rows are left out.
    """
    from sftx.assembly.registry import activate
    from sftx.data import sources
    from sftx.model import names

    config = loaded.config
    if not config.data.train or config.data.streaming:
        raise ConfigError("option 'data.train': give a file with --data, and leave data.streaming out")
    names.check(config.model, needs_weights=True)
    _check_output(output)
    assembly = activate(loaded)
    sources.check_data_config(config, assembly.row_sources)
    path = _ready(output)
    with phase("importing", "torch and transformers"):
        from sftx.data.pipeline import build_pipeline
        from sftx.data.teacher_rows import teacher_rows
        from sftx.model.language_model import CausalLM
        from sftx.model.load import load_model, load_spec
        from sftx.trainer import precision as precisions

    pipeline = build_pipeline(config, assembly, loaded.origins)
    examples = pipeline.load_train().examples
    precision = precisions.choose(config.train)
    spec = load_spec(pipeline.model, trust_remote_code=config.trust_remote_code)
    model = load_model(spec, [], dtype=precision.base_dtype(frozen=True), device=precision.device)
    lm = CausalLM(model, pipeline.tokenizer).eval()
    rows = teacher_rows(
        lm,
        examples,
        top_k=top_k,
        temperature=temperature,
        batch_size=config.train.per_device_eval_batch_size,
        autocast=precision.autocast,
    )
    writing = phase("distilling", "rows", total=len(examples), unit="rows")
    with writing as progress, atomic_files.open_text(path, overwrite=False) as stream:
        stream.writelines(f"{json.dumps(row)}\n" for row in progress.counted(rows))
    click.echo(printable(f"{counted(len(examples), 'row')} written to {output}"), err=True)


def _ready(output: str) -> Path:
    """Return the path of a file in a directory that exists. Raises OutputError."""
    path = Path(output).expanduser()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(f"--output {output}: cannot be written: {one_line(error)}") from error
    return path


def _check_output(output: str) -> None:
    """Raise OutputError when the file exists or its suffix is not that of JSON lines."""
    try:
        path = Path(output).expanduser()
    except RuntimeError as error:
        raise OutputError(f"--output {output}: {one_line(error)}") from None
    if path.suffix not in _SUFFIXES:
        raise OutputError(
            f"--output {output}: JSON lines are written; name a file that ends in {' or '.join(_SUFFIXES)}"
        )
    if path.exists() or path.is_symlink():
        raise OutputError(f"--output {output}: exists already and is never overwritten; choose another name")
