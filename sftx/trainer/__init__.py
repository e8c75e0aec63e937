"""The trainer: one optimizer step, how parameters are distributed, optimizers and schedule, evaluation, the session.

`trainer.py` runs steps on one model; `session.py` is a whole run in progress: it starts or resumes, evaluates, saves
and finishes. It may import everything below it: errors, events, types, config, distributed, assembly, model, data and
checkpoint. It knows neither inspection nor the command line.
"""
