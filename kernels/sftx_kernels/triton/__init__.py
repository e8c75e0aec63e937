"""This package holds the Triton kernels, a module for each operation. It is imported only to run or compile them.

A module has functions that turn tensors and a `Chip` into a `Launch` (see `launch.py`), `shipped(chip)`, which yields
the launches of the static report, and functions that run what the operation needs. The package imports torch and triton
and nothing else of `sftx_kernels`.
"""
