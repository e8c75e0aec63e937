"""The configuration of a run: declarations of options, run files, validation, and tables of plugins and optimizers.

`options.py` declares every option as a dataclass field; `loading.load` makes one frozen RunConfig of a run file and a
command line. May import `sftx.errors`, `sftx.paths` and `sftx.atomic_files` only, and never torch.
"""
