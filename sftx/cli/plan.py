"""`sftx plan`: memory, time and cost of a run, from its configuration alone."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import TYPE_CHECKING

import click

from sftx.cli.options import run_options
from sftx.config import loading
from sftx.errors import ConfigError
from sftx.inspection.memory_plan import MOST_ROWS, MOST_TOKENS, devices

if TYPE_CHECKING:
    from sftx.inspection.memory_plan.plan import Plan


@click.command()
@run_options("data", "train", "generation")
@click.option(
    "--gpu", metavar="SIZE|NAME|cpu",
    help="What to plan for: a GPU's memory (24GB is 24 * 10^9 bytes, 24GiB 24 * 2^30), a card's name, or cpu.",
)  # fmt: skip
@click.option("--nproc", type=click.IntRange(min=1), default=1, show_default=True, help="Processes, one a device.")
@click.option(
    "--tokens-per-second", type=click.FloatRange(min=0, min_open=True), help="Measured rate, all processes together."
)
@click.option("--price-per-hour", type=click.FloatRange(min=0), help="Of all devices together, in any currency.")
@click.option("--num-tokens", type=click.IntRange(min=1), help="Tokens of the whole run, all epochs together.")
@click.option("--json", "as_json", is_flag=True, help="Write one JSON object.")
@click.pass_context
def command(
    ctx: click.Context,
    *,
    file: Path | None,
    loaded: loading.Loaded,
    gpu: str | None,
    nproc: int,
    tokens_per_second: float | None,
    price_per_hour: float | None,
    num_tokens: int | None,
    as_json: bool,
) -> None:
    """Tell what memory and time a run of RUN_FILE and these options needs, before anything is loaded.

    The model's config.json is enough. Exits with 1 when --gpu is given and the run does not fit.
    """
    device = devices.parse(gpu or "cpu")
    rows, length = loaded.config.train.micro_batch_size, loaded.config.data.max_length
    if rows > MOST_ROWS or length > MOST_TOKENS:
        raise ConfigError(
            f"a batch of {rows} rows of {length} tokens is not planned; {MOST_ROWS} rows and {MOST_TOKENS} tokens are "
            "the most"
        )
    from sftx.inspection.memory_plan.plan import plan

    found = plan(
        loaded,
        device,
        num_processes=nproc,
        tokens_per_second=tokens_per_second,
        price_per_hour=price_per_hour,
        num_tokens=num_tokens,
    )
    if as_json:
        values = dataclasses.asdict(found)
        values["need"]["total"] = found.need.total
        click.echo(json.dumps(values, indent=1))
    else:
        _show(found)
    if found.fits is False:
        ctx.exit(1)


def _show(found: Plan) -> None:
    from rich.console import Console
    from rich.table import Table

    console, need = Console(highlight=False), found.need
    console.print(
        f"{found.model}: {need.num_parameters:,} parameters, {need.num_trainable:,} trained; {found.dtype}",
        markup=False,
    )
    where = found.device.name if found.num_processes == 1 else f"each of {found.num_processes} ({found.distributed})"
    rows = "1 row" if need.rows == 1 else f"{need.rows} rows"
    console.print(f"{rows} of {need.max_length} tokens on {where}", markup=False)
    table = Table("memory", "GB")
    table.columns[1].justify = "right"
    for kind, size in need.kinds.items():
        table.add_row(kind, f"{size / 1e9:.2f}")
    table.add_section()
    table.add_row(f"peak, in {need.when}", f"{need.total / 1e9:.2f}")
    console.print(table)
    if found.fits is not None:
        room = (found.device.num_bytes or 0) / 1e9
        verdict = "fits" if found.fits else "does not fit"
        console.print(f"{verdict}: {need.total / 1e9:.1f} of {room:.1f} GB", markup=False)
        console.print(
            f"largest batch: {found.largest_batch} rows of {need.max_length} tokens a process; longest single row: "
            f"{found.largest_length} tokens",
            markup=False,
        )
    for line in found.advice:
        console.print(f"  try {line}", markup=False)
    if found.seconds is not None:
        cost = "" if found.price is None else f", {found.price:,.2f} in money"
        console.print(f"time: {found.seconds / 3600:,.2f} h{cost}", markup=False)
    elif found.tokens_per_second is not None:
        console.print(f"rate: {found.tokens_per_second:,.0f} tokens/s; --num-tokens gives the time", markup=False)
    console.print("assumed: " + "; ".join(found.assumptions), markup=False)
