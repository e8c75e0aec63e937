"""`sftx plan`: what a run needs, from its configuration alone."""

from typing import Final

MOST_ROWS: Final = 4096
MOST_TOKENS: Final = 2**24
"""Of a batch and of its rows: nobody has more at once."""
