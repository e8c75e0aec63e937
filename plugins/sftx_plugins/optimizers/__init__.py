"""Optimizer plugins: they fill `sftx_optimizer`, which makes torch optimizers of the trainable parameters.

Modules here import the public names of `sftx` alone; torch is imported inside functions, and at the top of those that
define an optimizer: `foreach_optimizers` and `split_adamw`.

In the formulas p is a parameter, g its gradient, lr the learning rate of its group. Weight decay is decoupled
everywhere: p <- p (1 - lr * weight_decay) before the update (Loshchilov & Hutter 2017, https://arxiv.org/abs/1711.05101).
"""
