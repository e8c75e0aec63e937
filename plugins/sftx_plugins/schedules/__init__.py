"""Schedule plugins: they fill `sftx_schedule`, which gives the factor of the learning rate after warm-up.

The formulas are those of transformers' get_scheduler, except `minimind`. Modules here import the public names of
`sftx` alone, and no torch.
"""
