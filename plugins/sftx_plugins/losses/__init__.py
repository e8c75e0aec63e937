"""Loss plugins: they fill `sftx_loss`, which sums the loss of one micro-batch.

Modules here import the public names of `sftx` and `sftx_kernels`; torch is imported inside functions alone.
"""
