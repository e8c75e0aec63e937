"""What can be seen of a run's data without reading any of it, and before torch or numpy are imported."""

from __future__ import annotations

from sftx.config.options import RunConfig
from sftx.data import sources
from sftx.errors import ConfigError


def check(config: RunConfig) -> None:
    """Raises ConfigError or DataError for what can be seen without reading data or importing torch."""
    if not config.data.train:
        raise ConfigError("option 'data.train': no training data; give a file with --data")
    for source in (*config.data.train, *config.data.eval):
        sources.check(source)
    if not config.data.streaming:
        return
    if config.train.max_steps is None:
        raise ConfigError("option 'data.streaming': a stream has no end; say how many steps with --max-steps")
    filters = [config.data.filters, *(source.filters for source in config.data.train if source.filters is not None)]
    if any(one.duplicates == "drop" for one in filters):
        raise ConfigError("option 'data.streaming': filters.duplicates=drop needs all rows; leave one of them out")
