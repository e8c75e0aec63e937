"""`sftx report`: a page and a picture made from the files of one or several run directories.

It only reads files. It may not import torch, and of sftx only `config`, `checkpoint.layout`, `errors`, `atomic_files`.
"""
