"""Models and tokenizers in GGUF, llama.cpp's format: written with the package gguf, and read back by others.

Modules here import the public names of `sftx` and one another.
"""
