"""The demo task of sftx, everyday requests as function calls: its rows, their generator and the run file.

This package imports nothing of sftx, and no other package imports it: the files are found by their paths.
"""
