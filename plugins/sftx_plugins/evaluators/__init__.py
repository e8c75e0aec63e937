"""Evaluator plugins: they fill `sftx_evaluator`, which scores the model itself at each evaluation.

Modules here import the public names of `sftx` alone.
"""
