"""Adapter plugins: they fill `sftx_adapter`, which adds trainable parameters to a frozen model.

`targets.py` holds the options that choose modules, `lora.py` and `vera.py` those of the two adapters, `lora_adapter.py`
what is attached, saved and merged, `lora_layers.py` and `vera_layers.py` the layers, `peft_files.py` the files,
`token_rows.py` the trainable embedding rows of added tokens. Modules here import the public names of `sftx`,
`sftx_kernels` and each other. Modules with options import torch inside functions alone, so that options can be checked
before torch is loaded.
"""
