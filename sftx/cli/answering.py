"""The argument and options of all commands that answer: which model, and how its tokens are chosen."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import click

from sftx.cli.run_argument import local_model
from sftx.config.options import MAX_TOKENS
from sftx.phases import phase

if TYPE_CHECKING:
    from sftx.checkpoint.load_run import LoadedRun
    from sftx.model.decoding import Sampling
    from sftx.model.shared_bases import SharedBases

model_argument = click.argument("model", metavar="MODEL", callback=lambda ctx, param, model: local_model(model))

_POSITIVE = click.FloatRange(min=0, min_open=True)


def sampling_options(function: Callable[..., Any]) -> Callable[..., Any]:
    """Add the options of how tokens are chosen; without one, the model's own generation settings decide."""
    options = (
        click.option(
            "--max-new-tokens", metavar="N", type=click.IntRange(1, MAX_TOKENS), help="Most tokens of an answer."
        ),
        click.option(
            "--temperature", metavar="X", type=click.FloatRange(min=0), help="0 takes the most likely token each time."
        ),
        click.option("--top-k", metavar="N", type=click.IntRange(min=0), help="Draw from the N most likely tokens."),
        click.option(
            "--top-p", metavar="X", type=click.FloatRange(0, 1, min_open=True),
            help="Draw from the most likely tokens that together have this probability.",
        ),
        click.option(
            "--min-p", metavar="X", type=click.FloatRange(0, 1),
            help="Draw from tokens with this share of the probability of the most likely one.",
        ),
        click.option("--repetition-penalty", metavar="X", type=_POSITIVE, help="Penalty for tokens that were said."),
        click.option("--seed", metavar="N", type=int, default=0, show_default=True, help="Seed of what is drawn."),
        click.option("--stop", metavar="TEXT", multiple=True, help="End an answer before this text; may be repeated."),
        click.option("--device", metavar="NAME", help="Such as cpu or cuda:1.  [default: the first GPU, or cpu]"),
        click.option("--trust-remote-code", is_flag=True, help="Run Python code that comes with the model."),
    )  # fmt: skip
    return functools.reduce(lambda wrapped, option: option(wrapped), reversed(options), function)


def row_options(function: Callable[..., Any]) -> Callable[..., Any]:
    """Add the options of how rows are read and scored, of commands that use the plugins of a run."""
    options = (
        click.option(
            "--plugin", "plugins", metavar="NAME", multiple=True, help="Add a plugin, such as a metric or a parser."
        ),
        click.option("--no-plugin", "without", metavar="NAME", multiple=True, help="Leave out a plugin of the run."),
        click.option(
            "--set", "settings", metavar="NAME=VALUE", multiple=True, help="Set an option: exact-match.as_json=true."
        ),
        click.option("--format", "format", metavar="NAME", help="Parser plugin that reads every row."),
    )
    return functools.reduce(lambda wrapped, option: option(wrapped), reversed(options), function)


def row_settings(
    format: str | None, settings: tuple[str, ...], chosen: Mapping[str, Any] = MappingProxyType({})
) -> list[tuple[str, Any, str]]:
    """Return the options that are given, as a run file takes them; `chosen`: others by their dotted names."""
    from sftx.cli.options import parse_settings
    from sftx.config.options import flag

    given = [
        (name, value, flag(name)) for name, value in {"data.format": format, **chosen}.items() if value is not None
    ]
    return [*given, *parse_settings(settings)]


def loaded_model(
    model: str, *, device: str | None, trust_remote_code: bool, merge: bool = True, **chosen: Any
) -> tuple[LoadedRun, Sampling]:
    """Load MODEL, and return how its tokens are chosen. Raises ConfigError, ModelError.

    `merge`: fold its adapters into the weights where that changes no answer (`LoadedRun.merge_adapters`).
    """
    loaded = load_model(model, device=device, trust_remote_code=trust_remote_code)
    from sftx.serving.settings import sampling_of

    if merge:
        with phase("loading", "the adapters into the weights"):
            loaded.merge_adapters()
    return loaded, sampling_of(loaded.generation_config, **chosen)


def check_model(model: str) -> None:
    """Raise ConfigError or ModelError for a MODEL that is not there, before torch is imported."""
    from sftx.model import names

    if not Path(model).expanduser().is_dir():
        names.check(model, needs_weights=True)


def load_model(
    model: str,
    *,
    device: str | None,
    trust_remote_code: bool,
    dtype: str | None = None,
    bases: SharedBases | None = None,
) -> LoadedRun:
    """Load MODEL: a run directory, an adapter, a model directory or a hub id. Raises ConfigError, ModelError.

    `dtype` and `bases` are those of `load_run`.
    """
    from sftx.model import names

    check_model(model)
    directory = Path(model).expanduser()
    with phase("importing", "torch and transformers"):
        import torch

        from sftx.checkpoint.load_run import load_run
        from sftx.errors import ConfigError, one_line

    if device is not None:
        try:
            torch.empty(0, device=device)
        except (RuntimeError, AssertionError) as error:
            raise ConfigError(
                f"option '--device': {device!r} cannot be used: {one_line(error, max_chars=120)}"
            ) from error
    with phase("loading", "the model"):
        if not directory.is_dir():
            directory = names.files_of(model)
        return load_run(
            directory,
            device=device,
            dtype=None if dtype is None else getattr(torch, dtype),
            trust_remote_code=trust_remote_code,
            bases=bases,
        )
