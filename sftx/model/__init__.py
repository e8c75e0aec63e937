"""Models: from a name to a tokenizer and a model, and what training computes with it.

`names` says which directory or hub id a name stands for, `load` reads tokenizer and weights, `language_model` adds what
losses need (hidden states, cross-entropy), `packed_attention` keeps the documents of a packed row apart, `generate`
answers prompts. This package may import `sftx.errors`, `types`, `events`, `atomic_files`, `config`, `distributed` and
`assembly`; never `data`, `trainer` or `inspection`.
"""
