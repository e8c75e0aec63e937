"""`sftx export` writes the result of a run in the format of an exporter plugin."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import click

from sftx.errors import ConfigError, OutputError, printable
from sftx.phases import phase


@click.command()
@click.argument("run", metavar="RUN", type=click.Path(path_type=Path))
@click.option("--to", "name", metavar="NAME", required=True, help="The exporter plugin, such as safetensors.")
@click.option(
    "--into",
    metavar="DIR",
    type=click.Path(path_type=Path),
    help="Directory to write; it must be new or empty.  [default: RUN/export/NAME]",
)
@click.option("--set", "settings", metavar="NAME.OPTION=VALUE", multiple=True, help="An option of the exporter.")
@click.option("--trust-remote-code", is_flag=True, help="Run Python code that comes with the model.")
def command(run: Path, name: str, into: Path | None, settings: tuple[str, ...], trust_remote_code: bool) -> None:
    """Write the result of RUN in another format: a run directory, one of its checkpoints, an adapter or a model.

    The model is loaded in fp32 on the CPU, 4 bytes a parameter.
    """
    from sftx.assembly.registry import exporter
    from sftx.checkpoint import layout
    from sftx.cli.options import parse_settings
    from sftx.config.loading import load
    from sftx.config.options import as_dict
    from sftx.config.run_file import Origins
    from sftx.events import RunInfo

    options: dict[str, Any] = {}
    origins = Origins()
    for dotted, value, typed in parse_settings(settings):
        owner, _, option = dotted.removeprefix("plugins.").partition(".")
        if owner != name:
            raise ConfigError(f"{typed}: is not an option of the exporter {name!r}")
        options[option] = value
        origins.set(f"plugins.{name}.{option}", typed)
    run_file = run / layout.RUN
    if into is None and not run_file.exists():
        raise ConfigError(f"{run}: is no run directory; say with --into where the export is to be written")
    target = into or run / layout.EXPORT / name
    if os.path.lexists(target) and (target.is_symlink() or not target.is_dir() or any(target.iterdir())):
        raise OutputError(f"{target} exists already; move it away, or choose another place with --into")
    config = as_dict(load(run_file).config) if run_file.exists() else {}
    made = exporter(name, options, origins, RunInfo(run, config))
    with phase("importing", "torch and transformers"):
        from sftx.checkpoint.exporting import export_run

    export_run(run, target, made, trust_remote_code=trust_remote_code)
    files = [path for path in target.rglob("*") if path.is_file()]
    size = sum(path.stat().st_size for path in files)
    click.echo(printable(f"wrote {target}: {len(files)} files, {size / 1e6:,.1f} MB"))
    click.echo("\n".join(printable(line) for line in made.usage(target).splitlines()))
