"""`sftx export` writes the result of a run in the format of an exporter plugin; `sftx merge` is one such format."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

import click

from sftx.cli.run_argument import RunPath
from sftx.config.run_file import Origins
from sftx.errors import ConfigError, OutputError, printable
from sftx.phases import phase

_MOST_TIES: Final = 5

_COMMON = (
    click.argument("run", metavar="RUN", type=RunPath()),
    click.option(
        "--verify/--no-verify", default=True, help="Compare what was written with the run.  [default: verify]"
    ),
    click.option(
        "--verify-rows",
        metavar="N",
        type=click.IntRange(1),
        default=8,
        help="Questions that are compared.  [default: 8]",
    ),
    click.option(
        "--base",
        metavar="original|DIR|HUB_ID",
        help="Merge into this model: original is the one that the run has quantised.  [default: as it was trained]",
    ),
    click.option("--trust-remote-code", is_flag=True, help="Run Python code that comes with the model."),
)


def export_options(function: Callable[..., None]) -> Callable[..., None]:
    """Give a command RUN and the options of every export."""
    for decorate in reversed(_COMMON):
        function = decorate(function)
    return function


@click.command()
@click.option("--to", "name", metavar="NAME", required=True, help="The exporter plugin, such as safetensors.")
@click.option(
    "--into",
    metavar="DIR",
    type=click.Path(path_type=Path),
    help="Directory to write; it must be new or empty.  [default: RUN/export/NAME]",
)
@click.option("--set", "settings", metavar="NAME.OPTION=VALUE", multiple=True, help="An option of the exporter.")
@export_options
def command(run: Path, name: str, into: Path | None, settings: tuple[str, ...], **common: Any) -> None:
    """Write the result of RUN in another format: a run directory, one of its checkpoints, an adapter or a model.

    The model is loaded in fp32 on the CPU, 4 bytes a parameter. What was written is loaded back by another program
    and compared with the run, before it takes its place.
    """
    from sftx.checkpoint import layout
    from sftx.cli.options import parse_settings

    options: dict[str, Any] = {}
    origins = Origins()
    for dotted, value, typed in parse_settings(settings):
        owner, _, option = dotted.removeprefix("plugins.").partition(".")
        if owner != name:
            raise ConfigError(f"{typed}: is not an option of the exporter {name!r}")
        options[option] = value
        origins.set(f"plugins.{name}.{option}", typed)
    write(run, name, options, origins, into or Path(layout.EXPORT, name), is_given=into is not None, **common)


def write(
    run: Path,
    name: str,
    options: dict[str, Any],
    origins: Origins,
    place: Path,
    *,
    is_given: bool,
    verify: bool,
    verify_rows: int,
    base: str | None,
    trust_remote_code: bool,
) -> None:
    """Export RUN with the plugin `name` and say what was written; a place that was not given is one in the run."""
    from sftx import stores
    from sftx.assembly.peft_config import PEFT_CONFIG
    from sftx.assembly.registry import exporter
    from sftx.checkpoint import layout
    from sftx.config.loading import load
    from sftx.config.options import as_dict
    from sftx.events import RunInfo
    from sftx.model import names

    weights, of_run = layout.locate(run)
    if of_run is None and not (weights / PEFT_CONFIG).exists():
        names.check(str(weights), needs_weights=True)
    if base not in (None, names.ORIGINAL):
        names.check_base(base)
    run_file = run / layout.RUN
    if not is_given and (not run_file.exists() or stores.is_copy(run)):
        what = "is a copy of what is in a store" if stores.is_copy(run) else "is no run directory"
        raise ConfigError(f"{run}: {what}; say with --into where the export is to be written")
    target = place if is_given else run / place
    if os.path.lexists(target) and (target.is_symlink() or not target.is_dir() or any(target.iterdir())):
        raise OutputError(f"{target} exists already; move it away, or choose another place with --into")
    parent = next(parent for parent in target.absolute().parents if os.path.lexists(parent))
    if not parent.is_dir() or not os.access(parent, os.W_OK):
        problem = "may not be written to" if parent.is_dir() else "is no directory"
        raise OutputError(f"{target}: cannot be written, since {parent} {problem}; choose another place with --into")
    config = as_dict(load(run_file).config) if run_file.exists() else {}
    made = exporter(name, options, origins, RunInfo(run, config))
    with phase("importing", "torch and transformers"):
        from sftx.checkpoint.exporting import export_run

    rows = verify_rows if verify else None
    verified = export_run(run, target, made, verify_rows=rows, base=base, trust_remote_code=trust_remote_code)
    files = [path for path in target.rglob("*") if path.is_file()]
    size = sum(path.stat().st_size for path in files)
    click.echo(printable(f"wrote {target}: {len(files)} files, {size / 1e6:,.1f} MB"))
    if verified is None:
        why = f"{made} cannot load what it writes" if verify else "--no-verify"
        click.echo(printable(f"not verified: {why}"))
    else:
        click.echo(printable(f"verified: {verified}"))
        for tie in verified.ties[:_MOST_TIES]:
            click.echo(printable(f"  a tie of rounding: {tie}"))
    click.echo("\n".join(printable(line) for line in made.usage(target).splitlines()))
