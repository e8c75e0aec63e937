"""`sftx run --dry-run`: the complete run file that a command line means."""

from __future__ import annotations

import dataclasses
from typing import Any, Final

from sftx.assembly.registry import activate
from sftx.config import loading
from sftx.config.commented import commented
from sftx.config.flatten import flatten
from sftx.config.options import Source
from sftx.data import sources
from sftx.model import names

_SOURCE: Final[dict[str, Any]] = dataclasses.asdict(Source(""))


def complete_run_file(loaded: loading.LoadedConfig) -> str:
    """Return the run file with every option and every plugin's options, each that was given with its place beside it.

    What a run checks before torch is imported is checked: options, plugins, and that model and data are there. Raises
    SftxError.
    """
    config = loaded.config
    names.check(config.model)
    config.train.resolve_batch_size(1)
    assembly = activate(loaded)
    sources.check_data_config(config, assembly.row_sources)
    values = assembly.resolved(config)
    for split in ("train", "eval"):  # of a source, the path and what was given
        values["data"][split] = [
            {name: value for name, value in source.items() if name == "path" or value != _SOURCE[name]}
            for source in values["data"][split]
        ]
    comments = {name: loaded.origins.of(name) for name in flatten(values) if loaded.origins.has(name)}
    head = "# Every option of this run: one that was given has its place beside it, and all others are defaults.\n"
    return head + commented(values, comments, beside=True)
