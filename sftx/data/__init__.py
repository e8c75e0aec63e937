"""Read data and prepare it for training: sources, files, encoding with a template, truncation, mixing and batching.

A record of a source is parsed, marked (which turns are trained), encoded and truncated; rows that are left out are
entries of the ledger, encoded rows can be cached, and the sampler plans each epoch. This package may import
`sftx.errors`, `sftx.types`, `sftx.events`, `sftx.atomic_files`, `sftx.paths`, `sftx.config`, `sftx.distributed`,
`sftx.assembly` and `sftx.model`; never `sftx.trainer`, `sftx.checkpoint` or `sftx.inspection`.
"""
