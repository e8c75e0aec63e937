"""Write what Slurm, SkyPilot and Kubernetes are given to start a run, from `launch:` of its run file.

`job.py` has what the three share: the commands that each host runs. Nothing is written or started here. The package may
import `sftx.config` and the modules directly under `sftx`; only `sftx.cli` imports it.
"""
