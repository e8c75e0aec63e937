"""`sftx bench`: the kernels against every installed peer; `--static`: what they compile to, without a GPU."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

import click

from sftx.errors import SftxError, did_you_mean
from sftx.phases import phase

# Listed here so that a wrong name is reported before torch is imported.
OPERATIONS: Final = (
    "cross-entropy", "linear-cross-entropy", "linear-kl", "lora", "grouped-lora", "rms-norm", "swiglu", "rotary"
)  # fmt: skip
ARCHS: Final = ("sm_80", "sm_90", "sm_100", "gfx942")
DTYPES: Final = ("fp32", "bf16", "fp16")
PROVIDERS: Final = (
    "sftx", "sftx-inplace", "sftx-low-memory", "sftx-separate", "sftx-torch",
    "torch-eager", "torch-eager-upcast", "torch-compile", "torch-fused", "frozen-linear", "added-weights",
    "liger-kernel", "cut-cross-entropy", "quack", "quack-inplace", "peft", "unsloth",
)  # fmt: skip

Callback = Callable[[click.Context, click.Parameter, str | None], Any]


def _names(known: tuple[str, ...]) -> Callback:
    """Return a callback that parses a comma-separated list of these names."""

    def read(_ctx: click.Context, _param: click.Parameter, value: str | None) -> tuple[str, ...] | None:
        if value is None:
            return None
        names = tuple(dict.fromkeys(name.strip() for name in value.split(",")))
        for name in names:
            if name not in known:
                hint = did_you_mean(name, known)
                raise click.BadParameter(f"got {name!r}; expected {', '.join(known)}{hint}")
        return names

    return read


def _masks(_ctx: click.Context, _param: click.Parameter, value: str | None) -> tuple[float, ...] | None:
    if value is None:
        return None
    try:
        masks = tuple(dict.fromkeys(float(part) for part in value.split(",")))
    except ValueError:
        masks = (math.nan,)
    if not all(0 <= mask <= 1 for mask in masks):
        raise click.BadParameter(f"got {value!r}; expected shares from 0 to 1, such as 0,.5,.9")
    return masks


def _share(_ctx: click.Context, _param: click.Parameter, value: str | None) -> float:
    """Parse a share such as `5%` or 0.05."""
    assert value is not None
    try:
        share = float(value.removesuffix("%")) / (100 if value.endswith("%") else 1)
    except ValueError:
        share = math.nan
    if not 0 <= share < math.inf:
        raise click.BadParameter(f"got {value!r}; expected a share such as 5% or 0.05")
    return share


def _device(_ctx: click.Context, _param: click.Parameter, value: str | None) -> str | None:
    kind, colon, index = ("cpu" if value is None else value).partition(":")
    if kind not in ("cpu", "cuda") or (colon and (kind == "cpu" or not index.isdecimal())):
        raise click.BadParameter(f"got {value!r}; expected cpu, cuda or cuda:N")
    return value


def _seconds(_ctx: click.Context, _param: click.Parameter, value: float | None) -> float | None:
    """Reject NaN, which click.FloatRange accepts."""
    if value is not None and math.isnan(value):
        raise click.BadParameter("got nan; expected seconds")
    return value


class _Target(click.Path):
    """A path to write to. An empty name is rejected: it would be the current directory."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        if not str(value).strip():
            self.fail(f"got {value!r}; expected a name", param, ctx)
        return super().convert(value, param, ctx)


_FILE = _Target(dir_okay=False, path_type=Path)
_INPUT = click.Path(dir_okay=False, exists=True, path_type=Path)
_DIRECTORY = _Target(file_okay=False, path_type=Path)


@click.command(
    epilog="A shapes file is a JSON list of objects, each one of:\n\n\b\n"
    '{"op": "cross-entropy", "rows": 8192, "vocab": 32000}\n'
    '{"op": "linear-cross-entropy", "rows": 8192, "hidden": 4096, "vocab": 128256, "trained": false}\n'
    '{"op": "lora", "rows": 8192, "in_features": 4096, "out_features": [4096, 1024, 1024], "rank": 16, "dropout": 0}\n'
    '{"op": "linear-kl", "rows": 512, "hidden": 576, "teacher_hidden": 960, "vocab": 49152, "divergence": "jsd"}\n'
    '{"op": "rms-norm", "rows": 8192, "width": 4096}, and the same of "swiglu"\n'
    '{"op": "rotary", "rows": 8192, "heads": 32, "kv_heads": 8, "head_dim": 128}\n'
    '\nThe first two may also have "logits": "zipf", for a softmax that follows Zipf\'s law.'
)
@click.argument("operation", metavar="[OPERATION]", type=click.Choice([*OPERATIONS, "all"]), default="all")
@click.option("--device", metavar="cpu|cuda[:N]", callback=_device, help="[default: the GPU if there is one]")
@click.option(
    "--dtype", "dtypes", metavar="A,B", callback=_names(DTYPES),
    help="Of fp32, bf16, fp16.  [default: bf16 on a GPU, fp32,bf16 on a CPU]",
)  # fmt: skip
@click.option("--shapes", metavar="FILE", type=_INPUT, help="Sizes to measure instead of the default ones; see below.")
@click.option(
    "--providers", metavar="A,B", callback=_names(PROVIDERS),
    help=f"Measure these alone, of {', '.join(PROVIDERS)}.  [default: all that are installed]",
)  # fmt: skip
@click.option("--mask", "masks", metavar="A,B", default="0,.5,.9", show_default=True, callback=_masks,
              help="Shares of the labels that are ignored.")  # fmt: skip
@click.option("--rss", is_flag=True, help="Measure peak resident memory too, in a process for each (CPU only).")
@click.option("--budget", "budget_s", metavar="SECONDS", type=click.FloatRange(min=0, min_open=True), callback=_seconds,
              help="Begin no case after this time; the cases left out are listed.")  # fmt: skip
@click.option("--json", "json_path", metavar="FILE", type=_FILE, help="Write every figure, versions and device.")
@click.option("--csv", "csv_path", metavar="FILE", type=_FILE, help="Write a line for each pass of each provider.")
@click.option("--plot", metavar="DIR", type=_DIRECTORY, help="Write a PNG for each operation (needs matplotlib).")
@click.option("--baseline", metavar="FILE", type=_INPUT, help="Compare with an earlier --json, exit 1 if worse.")
@click.option("--max-regress", metavar="SHARE", default="5%", show_default=True, callback=_share,
              help="How much slower or larger than the baseline ours may be.")  # fmt: skip
@click.option("--static", is_flag=True, help="Compile the kernels ahead of time and check the binaries; no GPU needed.")
@click.option(
    "--arch",
    "archs",
    metavar="A,B",
    callback=_names(ARCHS),
    help=f"With --static: of {', '.join(ARCHS)}.  [default: all]",
)
@click.option("--update-golden", is_flag=True, help="With --static: write the golden file anew.")
@click.option("--workers", type=click.IntRange(min=1), default=2, show_default=True,
              help="With --static: processes that compile.")  # fmt: skip
@click.pass_context
def command(ctx: click.Context, /, static: bool, **options: Any) -> None:
    """Measure the kernels against torch and every installed peer.

    Forward, backward and both: median and quantiles, memory, rates against the least work possible, and the error
    against fp64. OPERATION is cross-entropy, linear-cross-entropy, linear-kl, lora, grouped-lora or all.
    """
    _check_combination(ctx, static=static)
    from sftx_kernels.bench import BenchError

    try:
        if static:
            with phase("importing", "triton"):
                from sftx_kernels.bench.static import report

            code = report.run(options["archs"], options["json_path"], options["update_golden"], options["workers"])
        else:
            code = _measure(options)
    except BenchError as error:
        raise SftxError(str(error)) from error
    ctx.exit(code)


_STATIC_ONLY: Final = {"archs", "update_golden", "workers"}
_BOTH: Final = {"static", "json_path"}


def _check_combination(ctx: click.Context, *, static: bool) -> None:
    """Reject options that have no effect in the chosen mode."""
    passed = [
        param
        for param in ctx.command.params
        if ctx.get_parameter_source(str(param.name)) == click.core.ParameterSource.COMMANDLINE
    ]
    for param in passed:
        if param.name not in _BOTH and (param.name in _STATIC_ONLY) != static:
            raise click.UsageError(f"{param.opts[0]} has no meaning {'with' if static else 'without'} --static")
    names = {param.name for param in passed}
    if "max_regress" in names and "baseline" not in names:
        raise click.UsageError("--max-regress has no meaning without --baseline")


def _measure(options: dict[str, Any]) -> int:
    with phase("importing", "torch"):
        from sftx_kernels.bench import runner

    operation = options["operation"]
    return runner.run(
        runner.Options(
            operations=OPERATIONS if operation == "all" else (operation,),
            device=options["device"],
            dtypes=options["dtypes"],
            shapes=options["shapes"],
            providers=options["providers"],
            masks=options["masks"],
            json=options["json_path"],
            csv=options["csv_path"],
            plot=options["plot"],
            baseline=options["baseline"],
            max_regress=options["max_regress"],
            rss=options["rss"],
            budget_s=options["budget_s"],
        )
    )
