"""This package is `sftx bench --static`: it compiles the shipped kernels without a GPU and reports their properties.

`report.run` is the entry; `compiler` compiles a Launch, `assembly` reads its instructions and `occupancy` counts the
programs that fit a multiprocessor. It imports shared modules of `sftx_kernels.bench`, and `sftx_kernels.triton`.
"""
