"""The static report of `sftx bench --static`: what the shipped kernels compile to, without a GPU.

`report.run` is the entry; `compiler` compiles a Launch, `assembly` reads its instructions and `occupancy` counts the
programs that fit a multiprocessor. It imports shared modules of `sftx_kernels.bench`, and `sftx_kernels.triton`.
"""
