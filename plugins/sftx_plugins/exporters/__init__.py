"""Exporter plugins: they fill `sftx_exporter`, which writes the result of a run in another format.

Modules here import the public names of `sftx` alone.
"""
