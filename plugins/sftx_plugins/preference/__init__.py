"""Preference plugins: losses that compare a better answer with a worse one, and the parser of their records.

`records.py` reads the records of all of them, `pairs.py` has what losses of pairs share, and `reference.py` the model
that an answer's log-probability is compared with. Modules here import the public names of `sftx`, the parsers and one
another; torch is imported inside functions.
"""
