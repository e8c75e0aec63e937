"""Control plugins: they fill `sftx_control`, which decides after a step or an evaluation what a run does next.

Modules here import the public names of `sftx` alone.
"""
