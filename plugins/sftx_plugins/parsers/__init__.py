"""Parser plugins: they fill `sftx_parser`, which recognises the records of one data format and reads them.

One module for each format. `_values.py` checks JSON values, `_tools.py` reads tool definitions and tool calls, and
`_turns.py` reads the messages of a conversation. Modules here import the public names of `sftx` and those three.
"""
