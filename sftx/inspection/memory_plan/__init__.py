"""`sftx plan`: the memory, time and cost of a run, estimated from its configuration alone.

It may import the config, assembly, data, model and trainer packages, and `sftx_kernels`; it reads no
weights, and rows only to count what a run computes.
"""

from typing import Final

MAX_ROWS: Final = 4096
"""The most rows of a batch that are planned."""
MAX_TOKENS: Final = 2**24
"""The most tokens of a row that are planned."""
