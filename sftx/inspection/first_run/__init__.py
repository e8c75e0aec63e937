"""Finds out and proposes for `sftx init`: a run file for a model, some data and a device.

`sampled_rows.py` looks at the data, `found_device.py` at the device; `proposal.py` chooses, and lets the planner say
what fits. The package may import what `sftx.inspection` may.
"""
