"""Plugins that train on answers of the model: rollouts (`sftx_rollout`) with the losses of their examples.

Modules here import the public names of `sftx` alone; torch is imported inside functions.
"""
