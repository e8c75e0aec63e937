"""Commands that only look at a run: its data before training, its memory before training, its results afterwards.

`token_report` is `sftx inspect`, `diagnosis` is `sftx doctor`, `run_report` is `sftx report`, `memory_plan` is
`sftx plan`, `first_run` is `sftx init`. This package may import every package below it: config, distributed, assembly,
model, data, checkpoint and trainer. Only `sftx.training` and `sftx.cli` may import this package, and nothing here
changes a run.
"""
