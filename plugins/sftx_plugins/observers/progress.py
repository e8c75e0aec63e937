"""Prints the assembled plugins, derived numbers, losses and the result."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import rich
from rich import markup
from rich.console import Console
from rich.table import Table

from sftx import EvalReport, Observer, RunInfo, StartReport, StepReport, hookimpl

_PLAIN_WIDTH = 120
_MAX_SAMPLE_CHARS = 160
"""At most so many characters of a prompt or an answer are printed; report.html has them all."""


@dataclass(frozen=True, eq=False)
class Progress:
    """Prints the start, the means of each logging_steps steps, evaluations and the result."""

    @hookimpl
    def sftx_observer(self, run: RunInfo) -> Observer:
        console = rich.get_console()  # that of the command's live display, which is drawn below what it prints
        if not console.is_terminal:
            console = Console(width=_PLAIN_WIDTH)
        return _Terminal(console, run.output_dir)


class _Terminal(Observer):
    def __init__(self, console: Console, output_dir: Path) -> None:
        self._console = console
        self._output_dir = output_dir

    def on_start(self, report: StartReport) -> None:
        self._console.print(_assembled_table(report), "", _derived_table(report, self._output_dir), "", sep="\n")
        for line in report.ledger:
            self._print(f"note: {line}")
        if report.resumed_step is not None:
            self._print(f"resumed after step {report.resumed_step}")

    def on_log(self, report: StepReport) -> None:
        self._print(f"step {report.step}/{report.num_steps}  {_values(report)}")

    def on_evaluate(self, report: EvalReport) -> None:
        values = "  ".join(f"{name} {value:.4g}" for name, value in report.metrics.items())
        what = "held-out" if "loss" in report.metrics else "evaluation"  # of evaluators alone
        self._print(f"{what}, step {report.step}: {values}  ({report.seconds:.0f} s)")

    def on_save(self, step: int, directory: Path) -> None:
        self._print(f"saved {directory}")

    def on_end(self, summary: Mapping[str, Any]) -> None:
        if summary.get("samples"):
            self._console.print(_samples_table(summary["samples"]))
        if "held_out" in summary:
            self._console.print(_scores_table(summary["held_out"]["before"], summary["held_out"]["after"]))
        self._print(
            f"{_counted(summary['num_steps'], 'step')}, {summary['tokens_per_second']:.0f} non-padding tokens/s, "
            f"peak {summary['peak_bytes'] / 1e9:.1f} GB, {summary['wall_seconds']:.0f} s in total"
        )
        self._print(f"result: {summary['artefact']}")

    def _print(self, line: str) -> None:
        self._console.print(escape(line), soft_wrap=True, highlight=False)


def _values(report: StepReport) -> str:
    values = (
        f"loss {report.loss:.4f}  lr {report.learning_rate:.2e}  grad norm {report.grad_norm:.3f}  "
        f"{report.tokens_per_second:.0f} tokens/s"
    )
    return values + "".join(f"  {name} {value:.4g}" for name, value in report.metrics.items())


def _assembled_table(report: StartReport) -> Table:
    table = Table("stage", "plugin", "distribution", "options", box=None, header_style="bold", pad_edge=False)
    seen: set[str] = set()
    for p in report.providers:
        # The options of a plugin that fills several stages are shown once.
        options = ", ".join(f"{name}={value}" for name, value in p.options.items()) if p.plugin not in seen else ""
        seen.add(p.plugin)
        table.add_row(p.stage, escape(p.plugin), escape(f"{p.distribution} {p.version}"), escape(options))
    return table


def _derived_table(report: StartReport, output_dir: Path) -> Table:
    trainable = report.num_trainable / report.num_parameters
    formats = ", ".join(f"{number} {name}" for name, number in report.formats.items())
    labels = report.num_label_tokens / max(1, report.num_input_tokens)
    scope = "in the first window" if report.is_stream else "per epoch"
    table = Table.grid(padding=(0, 2))
    for name, value in (
        ("model", f"{report.model} on {report.device}, {report.dtype}"),
        ("parameters", f"{report.num_parameters:,}, trainable {report.num_trainable:,} ({trainable:.2%})"),
        *([("reach", report.reach)] if report.reach else []),
        ("rows", f"{report.num_rows:,} ({formats}), held out {report.num_eval_rows:,}"),
        ("tokens", f"{report.num_input_tokens:,} {scope}, label tokens {report.num_label_tokens:,} ({labels:.1%})"),
        ("steps", f"{report.num_steps:,}, {report.tokens_per_step:.0f} label tokens per step"),
        ("batch", _batch_sizes(report)),
        ("output", str(output_dir)),
    ):
        if value:
            table.add_row(f"[bold]{name}[/bold]", escape(value))
    return table


def _batch_sizes(report: StartReport) -> str:
    num, size = report.gradient_accumulation_steps, report.per_device_train_batch_size
    most = "up to " * (num * size > report.train_batch_size)
    split = f"{num} micro-batch{'es' * (num > 1)} of {most}{_counted(size, 'row')}"
    where = f" on each of {report.num_processes} processes" if report.num_processes > 1 else ""
    return f"{_counted(report.train_batch_size, 'row')} per step: {split}{where}"


def _counted(number: int, noun: str) -> str:
    return f"1 {noun}" if number == 1 else f"{number:,} {noun}s"


def _samples_table(samples: list[Mapping[str, str]]) -> Table:
    table = Table("request", "before", "after", "expected", title="held-out rows", show_lines=True)
    for sample in samples:
        table.add_row(*(escape(_in_short(sample[name])) for name in ("prompt", "before", "after", "reference")))
    return table


def _in_short(text: str) -> str:
    """Return the beginning of a text, with a sign for each line break: an untrained model may answer with nothing else.

    A text that is cut ends with an ellipsis.
    """
    short = text if len(text) <= _MAX_SAMPLE_CHARS else f"{text[: _MAX_SAMPLE_CHARS - 1]}…"
    return short.replace("\r\n", "⏎").replace("\n", "⏎").replace("\r", "⏎").replace("\t", " ")


def _scores_table(before: Mapping[str, float], after: Mapping[str, float]) -> Table:
    table = Table(
        "held-out" if "loss" in before else "evaluation",
        "before",
        "after",
        box=None,
        header_style="bold",
        pad_edge=False,
    )
    for name in before:
        if name in after:
            table.add_row(escape(name), f"{before[name]:.4g}", f"{after[name]:.4g}")
    return table


def escape(text: str) -> str:
    """Return text that the terminal shows as it is: without rich's markup and without control characters from a row."""
    return markup.escape("".join(c if c.isprintable() or c in "\n\t" else "\N{REPLACEMENT CHARACTER}" for c in text))
