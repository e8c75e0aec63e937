"""Models: from a name to a tokenizer and a model, and what training computes with it.

`names` says which directory or hub id a name stands for, `load` reads tokenizer and weights, `language_model` adds what
losses need (hidden states, cross-entropy), `packed_attention` keeps the documents of a packed row apart, `generation`
answers prompts. This package may import `sftx.config`, `sftx.distributed`, `sftx.assembly` and the modules beside them
(`errors`, `types`, `events`, `paths`, `atomic_files`); never `sftx.data`, `sftx.trainer` or `sftx.inspection`.
"""
