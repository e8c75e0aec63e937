"""A trained model that answers and is evaluated: how it samples, chats, files of answers, a server.

`sftx chat`, `generate`, `evaluate` and `serve` are its commands. May import all but `sftx.testing`.
"""
