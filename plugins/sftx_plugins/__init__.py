"""The built-in plugins of sftx, one module for each, in one package for each kind.

They import the public names of `sftx` (what `sftx.__all__` lists), the operations of `sftx_kernels`, and modules of
their own package. No package here imports another one.
"""
