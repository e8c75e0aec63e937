"""The Triton kernels, and for each the function that plans its launch. Imported only where they run."""
