"""A trained model that answers: how it samples, text as it is generated, chats. May import all but `sftx.testing`.

`sftx chat` is its command. It imports nothing of training itself.
"""
