"""Plugins that fill `sftx_trainable`: they choose which of the model's own parameters train.

They import the public names of `sftx`, and no torch.
"""
