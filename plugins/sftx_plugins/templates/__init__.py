"""Template plugins: they fill `sftx_template`, which writes a conversation as text segments and marks the trained ones.

One module for each chat format. `native.py` holds the base classes of the formats written in Python; the package
`jinja` holds the plugin that renders the tokenizer's own chat template. Modules here import the public names of `sftx`
and each other. A module with options imports torch and transformers inside functions alone, so that options can be
checked before they are loaded.
"""
