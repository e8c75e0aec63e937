"""Metric plugins: they fill `sftx_metric`, which scores a generated answer against its reference.

One module for each metric. `_answers.py` holds what several metrics share. Modules here import the public names of
`sftx` and that module; the scoring libraries are imported when a run uses the metric.
"""
