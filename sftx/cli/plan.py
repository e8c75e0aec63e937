"""`sftx plan`: estimate memory, time and cost of a run from its configuration alone."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from sftx.cli.options import RunCommand, run_options
from sftx.config import loading
from sftx.errors import ConfigError, counted
from sftx.inspection.memory_plan import MAX_ROWS, MAX_TOKENS, target_device
from sftx.phases import phase

if TYPE_CHECKING:
    from sftx.inspection.memory_plan.planner import RunPlan


class _NumProcesses(click.IntRange):
    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        if value == "gpu":
            self.fail("a plan needs their number, such as 8: `gpu` stands for those of the host that runs", param, ctx)
        return super().convert(value, param, ctx)


class _Rate(click.FloatRange):
    """A number that a plan can divide by. Not a number, which click.FloatRange accepts, is rejected."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        rate = super().convert(value, param, ctx)
        if math.isnan(rate):
            self.fail("nan is no number", param, ctx)
        return rate


@click.command(cls=RunCommand)
@run_options("data", "train", "generation")
@click.option(
    "--gpu", metavar="SIZE|NAME|cpu",
    help="Device to plan for: a GPU's memory (24GB is 24 * 10^9 bytes, 24GiB 24 * 2^30), a card's name, or cpu.",
)  # fmt: skip
@click.option(
    "--nproc", metavar="N", type=_NumProcesses(min=1, max=2**20), default=1, show_default=True,
    help="Processes, each on a device of its own.",
)  # fmt: skip
@click.option(
    "--tokens-per-second", type=_Rate(min=0, min_open=True, max=1e12),
    help="Measured throughput of all processes together.",
)  # fmt: skip
@click.option("--price-per-hour", type=_Rate(min=0, max=1e12), help="Price of all devices together, in any currency.")
@click.option(
    "--num-tokens",
    type=click.IntRange(min=1, max=10**18),
    help="Tokens of the whole run, all epochs together; by default those of the data.",
)
@click.option("--json", "as_json", is_flag=True, help="Write one JSON object.")
@click.pass_context
def command(
    ctx: click.Context,
    *,
    file: Path | None,
    loaded: loading.LoadedConfig,
    gpu: str | None,
    nproc: int,
    tokens_per_second: float | None,
    price_per_hour: float | None,
    num_tokens: int | None,
    as_json: bool,
) -> None:
    """Estimate the memory and time of a run of RUN_FILE and these options, before anything is loaded.

    The model's config.json is enough. Exits with 1 when --gpu is given and the run does not fit.
    """
    device = target_device.parse("cpu" if gpu is None else gpu)
    rows, length = loaded.config.train.micro_batch_size, loaded.config.data.max_length
    if rows > MAX_ROWS or length > MAX_TOKENS:
        raise ConfigError(
            f"a batch of {counted(rows, 'row')} of {counted(length, 'token')} is not planned; the most are "
            f"{MAX_ROWS:,} rows and {MAX_TOKENS:,} tokens: lower --per-device-train-batch-size or --max-length"
        )
    with phase("importing", "torch and transformers"):
        from sftx.inspection.memory_plan.planner import plan_run

    with phase("planning", "the run"):
        plan = plan_run(
            loaded,
            device,
            num_processes=nproc,
            tokens_per_second=tokens_per_second,
            price_per_hour=price_per_hour,
            num_tokens=num_tokens,
        )
    if as_json:
        values = dataclasses.asdict(plan)
        values["need"]["total"] = plan.need.total
        click.echo(json.dumps(values, indent=1))
    else:
        _print_plan(plan)
    if plan.fits is False:
        ctx.exit(1)


def _print_plan(plan: RunPlan) -> None:
    from rich.console import Console
    from rich.table import Table

    console, need = Console(highlight=False), plan.need
    parameters = f"{need.num_parameters:,} parameters, {need.num_trainable:,} trained"
    console.print(f"{plan.model}: {parameters}; {plan.dtype}", markup=False)
    for line in plan.untrained_parts:
        console.print(line, markup=False)
    where = plan.device.name if plan.num_processes == 1 else f"each of {plan.num_processes} ({plan.distributed})"
    console.print(f"{counted(need.rows, 'row')} of {counted(need.max_length, 'token')} on {where}", markup=False)
    table = Table("memory", "GB")
    table.columns[1].justify = "right"
    for kind, size in need.kinds.items():
        table.add_row(kind, f"{size / 1e9:.2f}")
    table.add_section()
    table.add_row(f"peak, in {need.when}", f"{need.total / 1e9:.2f}")
    console.print(table)
    if plan.fits is not None:
        limit = (plan.device.num_bytes or 0) / 1e9
        verdict = "fits" if plan.fits else "does not fit"
        console.print(f"{verdict}: {need.total / 1e9:.1f} of {limit:.1f} GB", markup=False)
        console.print(
            f"largest batch: {counted(plan.largest_batch or 0, 'row')} of {counted(need.max_length, 'token')} a "
            f"process; longest single row: {counted(plan.largest_length or 0, 'token')}",
            markup=False,
        )
    for line in plan.advice:
        console.print(f"  try {line}", markup=False)
    if plan.fits is False and not plan.advice:
        console.print(
            "no change was found with which it fits: checkpointing, fewer rows, half the length, a leaner optimizer, "
            "fsdp2, lora",
            markup=False,
        )
    if plan.seconds is not None:
        cost = "" if plan.price is None else f", at a price of {plan.price:,.2f}"
        tokens = f"{plan.num_tokens:,} tokens"
        console.print(f"time: {_duration(plan.seconds)} for {tokens}{cost}", markup=False)
    elif plan.tokens_per_second is not None:
        console.print(f"rate: {plan.tokens_per_second:,.0f} tokens/s; --num-tokens gives the time", markup=False)
    console.print("assumed: " + "; ".join(plan.assumptions), markup=False)


def _duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.1f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:,.2f} h"
