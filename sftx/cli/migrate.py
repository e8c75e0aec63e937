"""`sftx migrate`: write the run file of another tool's configuration."""

from __future__ import annotations

from pathlib import Path

import click

from sftx import atomic_files
from sftx.config import loading, run_file
from sftx.errors import ConfigError, SftxError, one_line


@click.command(context_settings={"ignore_unknown_options": True})
@click.argument("words", nargs=-1, required=True, metavar="FILE|COMMAND", type=click.UNPROCESSED)
@click.option(
    "--into", metavar="RUN_FILE",
    help="File to write, - for the terminal; by default the name of FILE with .sftx.yaml, or run.yaml for a command.",
)  # fmt: skip
@click.option(
    "--check", is_flag=True,
    help="Encode the first rows with both tools, which must be installed, and compare tokens and labels.",
)  # fmt: skip
@click.option(
    "--check-python", metavar="PYTHON",
    help="With --check: the Python interpreter of the environment that the other tool is installed in.",
)  # fmt: skip
@click.option("--check-rows", metavar="N", type=click.IntRange(1, 1000), default=8, show_default=True,
              help="With --check: rows of each source that are compared.")  # fmt: skip
@click.pass_context
def command(
    ctx: click.Context,
    *,
    words: tuple[str, ...],
    into: str | None,
    check: bool,
    check_python: str | None,
    check_rows: int,
) -> None:
    """Write a run file that means what FILE or COMMAND means to another tool.

    FILE is a YAML file of LLaMA-Factory, Axolotl, TRL or ms-swift, a Python script that calls SFTConfig and the like,
    which is read and never run, or a shell script; COMMAND is `trl sft --...`, `llamafactory-cli train FILE`,
    `axolotl train FILE`, `swift sft --...` or `python sft.py --...`. What cannot be carried over is named, with what
    to do. With --check it exits with 1 when the two tools' tokens or labels differ.
    """
    from sftx.assembly.discovery import options_class
    from sftx.migration.reading import read
    from sftx.migration.translation import translate
    from sftx.migration.writing import run_file_text, summary

    made = translate(read(words), options_class)
    path = Path(
        into or (f"{Path(words[0]).stem}.sftx.yaml" if len(words) == 1 and Path(words[0]).is_file() else "run.yaml")
    )
    is_shown = into == "-"
    if not is_shown and path.exists():
        raise ConfigError(f"{path}: exists already; remove it, or name another file with --into")
    text = run_file_text(made)
    problem = made.problem or _problem(text)
    if problem:
        text = run_file_text(made, checked=problem)
        # Lines are named as they are below this comment, which names them.
        problem = made.problem or _problem(text)
        text = run_file_text(made, checked=problem)
    if is_shown:
        click.echo(text, nl=False)
    else:
        atomic_files.write_text(path, text)
    click.echo(summary(made, "the run file above" if is_shown else str(path), checked=problem), err=is_shown)
    if not is_shown and not problem:
        click.echo(f"next: sftx inspect {path}, sftx plan {path}, sftx run {path}")
    if check or check_python is not None:
        from sftx.migration.comparison import compare

        if problem:
            raise ConfigError(f"--check: the run file is to be corrected first: {problem}")
        if not compare(made, text, python=check_python, num_rows=check_rows):
            ctx.exit(1)


def _problem(text: str) -> str:
    """Return what is wrong with the text of a run file; an empty text if nothing is."""
    import tempfile

    from sftx.assembly.discovery import options_class
    from sftx.assembly.registry import activate

    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "run.yaml"
        path.write_text(text, encoding="utf-8")
        try:
            run_file.read(path)
            activate(loading.load(path, plugin_class=options_class))
        except SftxError as error:
            return one_line(error, max_chars=300).replace(f"{path}:", "line ").replace(str(path), "the run file")
    return ""
