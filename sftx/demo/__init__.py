"""The demo task of sftx is to answer everyday requests with function calls: rows, their generator and the run file.

This package imports nothing of sftx, and no other package imports it: the files are found by their paths.
"""
