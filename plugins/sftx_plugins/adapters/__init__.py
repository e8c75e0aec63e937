"""Adapter plugins: they fill `sftx_adapter`, which adds trainable parameters to a frozen model.

`lora.py` holds the options of LoRA, `lora_layers.py` its layers and files, `token_rows.py` the trainable embedding rows
of added tokens. Modules here import the public names of `sftx`, `sftx_kernels` and each other. `lora.py` imports torch
inside functions alone, so that options can be checked before torch is loaded.
"""
