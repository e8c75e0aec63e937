"""`sftx verify`: proof, on a user's own configuration, of what sftx promises of every run.

A few steps of the run are made in a temporary directory, in processes of their own, and compared: with the same run
killed and resumed, with other splits of the same rows, with what the rows say, and with what `sftx plan` counts.

It may import every package but `cli` and `testing`.
"""
