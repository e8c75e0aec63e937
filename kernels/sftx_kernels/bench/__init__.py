"""This package is `sftx bench`: it measures the operations against installed peers and reports on compiled kernels.

`<operation>.py` holds an operation's shapes, problem, least work and providers, `operations.py` the list of all
operations; `runner.run` measures, `static.report.run` compiles without a GPU. The package imports torch, triton and
the rest of `sftx_kernels`; rich and matplotlib improve tables and draw plots where they are installed.
"""


class BenchError(ValueError):
    """A BenchError is a request that cannot be measured or a file that cannot be used; its message is one line."""
