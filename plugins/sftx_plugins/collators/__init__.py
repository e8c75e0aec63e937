"""Collator plugins: they fill `sftx_collator`, which decides which examples share a step and a row, and builds batches.

Modules here import the public names of `sftx` alone; torch is imported by the functions that build the tensors.
"""
