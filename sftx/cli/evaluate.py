"""`sftx evaluate`: loss and scores of a trained model, as its run computes them."""

from __future__ import annotations

import json

import click

from sftx.cli.answering import check_model, load_model, model_argument, row_options, row_settings
from sftx.errors import ConfigError, counted, printable


@click.command()
@model_argument
@click.option(
    "--eval-data", "rows", metavar="PATH", multiple=True,
    help="Held-out rows; may be repeated.  [default: those of the run]",
)  # fmt: skip
@row_options
@click.option("--batch-size", metavar="N", type=click.IntRange(1), help="Rows computed at once.")
@click.option("--max-new-tokens", metavar="N", type=click.IntRange(1), help="Most tokens of an answer.")
@click.option("--max-rows", metavar="N", type=click.IntRange(1), help="Most rows that are answered, evenly spread.")
@click.option("--compare-base", is_flag=True, help="Evaluate the base model too, beside its adapter.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object instead of a table.")
@click.option("--device", metavar="NAME", help="Such as cpu or cuda:1.  [default: the first GPU, or cpu]")
@click.option("--trust-remote-code", is_flag=True, help="Run Python code that comes with the model.")
def command(
    *,
    model: str,
    rows: tuple[str, ...],
    plugins: tuple[str, ...],
    without: tuple[str, ...],
    settings: tuple[str, ...],
    format: str | None,
    batch_size: int | None,
    max_new_tokens: int | None,
    max_rows: int | None,
    compare_base: bool,
    as_json: bool,
    device: str | None,
    trust_remote_code: bool,
) -> None:
    """Evaluate MODEL (as in `sftx chat`): loss, perplexity, token accuracy, and the scores of metrics and evaluators.

    Rows are read and scored by the plugins of the run and those that are added, with the run's options, so that its own
    held-out rows give the numbers of its last evaluation.
    """
    check_model(model)
    from sftx.serving.run_plugins import check_has_rows, plugins_of

    chosen = {
        "train.per_device_eval_batch_size": batch_size,
        "generation.batch_size": batch_size,
        "generation.max_new_tokens": max_new_tokens,
        "generation.max_rows": max_rows,
    }
    assignments = row_settings(format, settings, chosen)
    of_run = plugins_of(model, rows=rows, add=plugins, remove=without, assignments=assignments)
    data = of_run.config.data
    if not of_run.assembly.providers("sftx_evaluator"):
        check_has_rows(data, model)
    of_run.check(data.train if data.eval_fraction is not None else data.eval)
    loaded = load_model(model, device=device, trust_remote_code=trust_remote_code)
    if compare_base and not loaded.lm.adapters:
        raise ConfigError(f"option '--compare-base': {model} has no adapter, so that there is no base model to compare")
    from sftx.serving.run_evaluator import RunEvaluator

    evaluator = RunEvaluator(loaded, of_run)
    for line in evaluator.data.ledger.summary():
        click.echo(printable(line), err=True)
    reports = {"trained": evaluator.trained()} | ({"base": evaluator.base()} if compare_base else {})
    num_rows, num_answers = evaluator.data.ledger.num_rows, len(reports["trained"].samples)
    if as_json:
        scores = {name: dict(report.metrics) for name, report in reports.items()}
        values = {"model": str(loaded.directory), "rows": num_rows, "answers": num_answers, **scores}
        click.echo(json.dumps(values, indent=2, ensure_ascii=False))
        return
    answered = f", {num_answers} of them answered" if num_answers else ""
    click.echo(printable(f"{loaded.directory}: {counted(num_rows, 'held-out row')}{answered}"))
    names = list(reports["trained"].metrics)
    width = max(map(len, names), default=0)
    if compare_base:
        click.echo(f"{'':{width}}  {'trained':>10}  {'base':>10}")
    for name in names:
        values_of = "  ".join(f"{report.metrics[name]:10.5g}" for report in reports.values() if name in report.metrics)
        click.echo(printable(f"{name:{width}}  {values_of}"))
