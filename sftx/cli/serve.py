"""`sftx serve`: serve trained models over OpenAI's HTTP interface."""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path

import click

from sftx.cli.answering import check_model, load_model
from sftx.cli.run_argument import local_model
from sftx.errors import ConfigError, printable
from sftx.phases import phase
from sftx.stores import is_address

_KEY = "SFTX_API_KEY"


@click.command()
@click.argument("models", metavar="MODEL...", nargs=-1, required=True)
@click.option("--host", metavar="NAME", default="127.0.0.1", show_default=True, help="Address to listen on.")
@click.option("--port", metavar="N", type=click.IntRange(0, 65535), default=8000, show_default=True, help="0: any.")
@click.option(
    "--max-rows", metavar="N", type=click.IntRange(1, 4096), default=16, show_default=True,
    help="Answers that are computed together, of each model.",
)  # fmt: skip
@click.option(
    "--max-waiting", metavar="N", type=click.IntRange(0, 10**6), default=256, show_default=True,
    help="Answers that may wait; more are refused with status 503.",
)  # fmt: skip
@click.option(
    "--max-new-tokens", metavar="N", type=click.IntRange(1), default=4096, show_default=True,
    help="Most tokens of an answer.",
)  # fmt: skip
@click.option(
    "--max-body-bytes", metavar="N", type=click.IntRange(1), default=4 * 2**20, show_default=True,
    help="Largest request.",
)  # fmt: skip
@click.option(
    "--timeout", metavar="S", type=click.FloatRange(min=0, min_open=True), default=600, show_default=True,
    help="Seconds for one answer, waiting included.",
)  # fmt: skip
@click.option(
    "--dtype", type=click.Choice(["float32", "bfloat16", "float16"]),
    help="Of weights and products of all models.  [default: of each, as it was trained]",
)  # fmt: skip
@click.option("--device", metavar="NAME", help="Such as cpu or cuda:1.  [default: the first GPU, or cpu]")
@click.option("--trust-remote-code", is_flag=True, help="Run Python code that comes with the model.")
def command(
    *,
    models: tuple[str, ...],
    host: str,
    port: int,
    max_rows: int,
    max_waiting: int,
    max_new_tokens: int,
    max_body_bytes: int,
    timeout: float,
    dtype: str | None,
    device: str | None,
    trust_remote_code: bool,
) -> None:
    """Serve each MODEL (as in `sftx chat`) by its name, or as NAME=MODEL, over OpenAI's HTTP interface.

    Adapters of one base share its weights in memory, and the base itself does when it is a MODEL too.

    /v1/chat/completions, /v1/completions, /v1/models, /health and /metrics. With the environment variable SFTX_API_KEY
    clients must send that key.
    """
    if missing := [name for name in ("starlette", "uvicorn") if importlib.util.find_spec(name) is None]:
        raise ConfigError(f"sftx serve needs {' and '.join(missing)}; pip install 'sftx[serve]'")
    named = dict(map(_named, models))
    if len(named) < len(models):
        raise ConfigError("two models have one name; name them, as in: sftx serve first=runs/a second=runs/b")
    for model in named.values():
        check_model(model)
    with phase("importing", "torch and transformers"):
        from sftx.model.shared_bases import SharedBases
    bases = SharedBases()
    loaded = {
        name: load_model(model, device=device, trust_remote_code=trust_remote_code, dtype=dtype, bases=bases)
        for name, model in named.items()
    }
    import uvicorn

    from sftx.serving.server import Limits, Server
    from sftx.serving.worker import Worker

    worker = Worker(loaded, max_rows=max_rows, max_waiting=max_waiting)
    limits = Limits(max_body_bytes, max_new_tokens, timeout)
    server = Server(worker, limits=limits, api_key=os.environ.get(_KEY) or None)
    config = uvicorn.Config(server.app, host=host, port=port, log_level="warning", timeout_graceful_shutdown=30)
    try:
        listening = config.bind_socket()
    except SystemExit:  # uvicorn has logged why
        raise ConfigError(f"cannot listen on {host}:{port}; choose others with --host and --port") from None
    worker.start()
    port = listening.getsockname()[1]
    click.echo(f"serving {', '.join(loaded)} on http://{host}:{port}/v1", err=True)
    for base, sharing in bases.users if len(loaded) > 1 else ():
        names = [name for name, run in loaded.items() if run.lm.model in sharing]
        click.echo(printable(f"loaded once for {', '.join(names)}: {base}"), err=True)
    try:
        uvicorn.Server(config).run(sockets=[listening])
    except KeyboardInterrupt:  # a signal, which uvicorn raises again when the answers in progress have ended
        click.echo("stopped", err=True)
    finally:
        worker.close()


def _named(model: str) -> tuple[str, str]:
    """Return the name under which a model is served, and the model."""
    name, equals, path = model.partition("=")
    if equals and not (Path(model).exists() or is_address(model)):
        if not (name and path):
            raise ConfigError(f"{model}: is not of the form NAME=MODEL, such as first=runs/a")
        return name, local_model(path)
    if is_address(model):
        return model.rstrip("/").rpartition("/")[2], local_model(model)
    return Path(model).name if Path(model).is_dir() else model, model
