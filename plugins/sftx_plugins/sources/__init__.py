"""Source plugins: they fill `sftx_source`, which reads rows from what is no file of rows.

Modules here import the public names of `sftx` alone.
"""
