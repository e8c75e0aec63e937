"""The built-in plugins, one small file each. They import the public names of sftx and the kernels, nothing else."""
