"""`sftx migrate`: a configuration of another tool becomes a run file.

`reading.py` finds the options of a file, a command line or a script, `translation.py` says what each becomes, and
`writing.py` writes the run file. What single options become is in `sftx/config/other_tools/`. `comparison.py` lets both
tools encode the same rows.

Inside `sftx/` it may import `config`, `assembly`, and what lies below `inspection`.
"""
