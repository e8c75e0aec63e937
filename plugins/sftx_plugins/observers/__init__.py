"""Observer plugins: they fill `sftx_observer`, which reports the events of a run.

`progress.py` prints to the terminal, `jsonl.py` writes metrics.jsonl, and `tensorboard.py`, `wandb.py` and `mlflow.py`
write to a tracking tool; `_tracking.py` is the base of these three. Modules here import the public names of `sftx` and
that module; the tools are imported when a run uses them.
"""
