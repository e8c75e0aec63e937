"""A trained model that answers: how it samples, chats, a server. May import all but `sftx.testing`.

`sftx chat` and `sftx serve` are its commands. It imports nothing of training itself.
"""
