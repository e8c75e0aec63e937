"""Reward plugins: they fill `sftx_reward`, which scores answers that the model has just given.

One module for each reward. What exact match and JSON mean stands with the metrics (`sftx_plugins.metrics`), so that a
reward and the metric of the same name never disagree. torch and transformers are imported when a run uses them.
"""
