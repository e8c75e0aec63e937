"""Gradient checkpointing and torch.compile for the layers of the decoder.

Each layer gets a `forward` of its own that replaces its class's, so modules and parameter names stay as they are. It is
used in training only: evaluation and generation, with their cache and their many shapes, run the class's forward.
Checkpointing is done here and not by transformers, which applies it outside or inside of a layer's hooks depending on
its version; here it is inside of what is compiled, where the compiler sees it.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, Final

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from sftx.config.options import TrainConfig
from sftx.errors import ModelError, one_line

Forward = Callable[..., Any]

# The operations of torch that are the most expensive to recompute, except attention, which is matched by name below.
_MATRIX_PRODUCTS: Final = frozenset(
    {"aten::mm", "aten::addmm", "aten::bmm", "aten::baddbmm", "aten::_grouped_mm", "sftx::lora_linear"}
)


def prepare_layers(model: PreTrainedModel, config: TrainConfig) -> None:
    """Applies the options for checkpointing and compilation. Raises ModelError when the layers cannot be found."""
    if config.gradient_checkpointing:
        enable_checkpointing(model, selective=config.selective_checkpointing)
    if config.torch_compile:
        compile_layers(model)


def enable_checkpointing(model: PreTrainedModel, *, selective: bool = False) -> None:
    """Stores only the input of each layer, and recomputes the layer in the backward pass.

    With `selective` it also stores the results of matrix products and attention, which are not recomputed.
    """
    # The compiler rejects checkpoint's default context_fn when it is passed explicitly, so it is left out.
    options: dict[str, Any] = {"use_reentrant": False}
    if selective:
        options["context_fn"] = partial(create_selective_checkpoint_contexts, _selective_policy)
    for layer in decoder_layers(model):
        _set_training_forward(layer, partial(_checkpointed, layer.forward, partial(checkpoint, **options)))


def _checkpointed(forward: Forward, checkpoint: Forward, *args: Any, **kwargs: Any) -> Any:
    return checkpoint(partial(forward, **kwargs), *args)


def _selective_policy(_: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    name = op.name().partition(".")[0] if hasattr(op, "name") else str(op)
    is_stored = name in _MATRIX_PRODUCTS or "attention" in name or "attn" in name
    return CheckpointPolicy.MUST_SAVE if is_stored else CheckpointPolicy.PREFER_RECOMPUTE


def compile_layers(model: PreTrainedModel, *, backend: str = "inductor") -> None:
    """Compiles one graph for all layers and all lengths, at the first step.

    A layer that cannot be compiled as one graph raises ModelError then; it never runs partly compiled.
    """
    for layer in decoder_layers(model):
        compiled = torch.compile(layer.forward, backend=backend, fullgraph=True, dynamic=True)
        _set_training_forward(layer, partial(_run_compiled, type(model).__name__, compiled))


def _run_compiled(model_name: str, compiled: Forward, hidden_BTD: Tensor, *args: Any, **kwargs: Any) -> Any:
    from torch._dynamo import config, exc

    if not hidden_BTD.requires_grad:
        # The first layer's input, from a frozen embedding, would otherwise need a second graph of its own.
        hidden_BTD = hidden_BTD.detach().requires_grad_()
    try:
        # Floats are options (a scaling, an epsilon) and need no graph of their own. Integers of a layer are its index
        # and numbers derived from it; without the second option each layer would have its own graph.
        with config.patch(specialize_float=True, allow_unspec_int_on_nn_module=True):
            return compiled(hidden_BTD, *args, **kwargs)
    except (exc.TorchDynamoException, exc.FailOnRecompileLimitHit) as error:
        raise ModelError(
            f"{model_name}: torch.compile does not take its layers: {one_line(error)}; leave torch_compile (--compile) "
            "out"
        ) from error


def _set_training_forward(layer: nn.Module, training_forward: Forward) -> None:
    """Makes the layer run `training_forward` in training mode with gradients, and its present forward otherwise."""
    plain_forward = layer.forward

    def forward(hidden_BTD: Tensor, *args: Any, **kwargs: Any) -> Any:
        is_training = layer.training and torch.is_grad_enabled()
        return (training_forward if is_training else plain_forward)(hidden_BTD, *args, **kwargs)

    layer.forward = forward


def decoder_layers(model: PreTrainedModel) -> list[nn.Module]:
    """Returns the decoder's repeated blocks, without blocks inside of blocks. Raises ModelError if there are none."""
    decoder: nn.Module = model.get_decoder()
    blocks = [m for m in decoder.modules() if isinstance(m, GradientCheckpointingLayer) and m is not decoder]
    nested = {inner for block in blocks for inner in block.modules() if inner is not block}
    layers: list[nn.Module] = [block for block in blocks if block not in nested]
    if not layers:  # a model with its own code may not use transformers' class
        num_layers = model.config.get_text_config().num_hidden_layers
        lists = [m for m in decoder.modules() if isinstance(m, nn.ModuleList) and len(m) == num_layers]
        layers = list(lists[0]) if len(lists) == 1 else []
    if not layers:
        raise ModelError(
            f"{type(model).__name__}: cannot find the layers of its decoder; leave gradient_checkpointing and "
            "torch_compile out"
        )
    return layers
