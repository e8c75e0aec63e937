"""Loss plugins: they fill `sftx_loss`, which sums the loss of one micro-batch.

Modules here import the public names of `sftx` alone; torch is imported inside functions.
"""
