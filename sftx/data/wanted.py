"""Old name of `sources.check_data_config`, until inspection no longer uses it."""

from sftx.data.sources import check_data_config as check

__all__ = ["check"]
