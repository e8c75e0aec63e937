"""`sftx bench`: the operations against every installed peer, and the static report of the kernels.

Needs torch and triton alone; rich makes the tables nicer and matplotlib the plots. `runner.run` measures,
`static.run` compiles; each is imported where it is used.
"""


class BenchError(ValueError):
    """What was asked for cannot be measured, read or written; the message is one line."""
