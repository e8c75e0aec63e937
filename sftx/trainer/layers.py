"""The decoder's layers while they train: computed again in the backward pass, compiled, or both.

Each layer gets a `forward` of its own in place of its class's, so that modules and the names of parameters stay as they
are. It is used in training alone: evaluation and generation, with their cache and their many shapes, run what the
class has. Checkpointing is done here and not by transformers, whose place for it, around a layer's hooks or within
them, differs from version to version; here it lies within what is compiled, where the compiler can see it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
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

# What costs most to compute again, by the names of torch's operations; attention's are known by their names below.
_PRODUCTS: Final = frozenset(
    {"aten::mm", "aten::addmm", "aten::bmm", "aten::baddbmm", "aten::_grouped_mm", "sftx::lora_linear"}
)


def prepare_layers(model: PreTrainedModel, config: TrainConfig) -> None:
    """Makes the decoder's layers train as the options say. Raises ModelError when they are not to be found."""
    if config.gradient_checkpointing:
        enable_checkpointing(model, selective=config.selective_checkpointing)
    if config.torch_compile:
        compile_layers(model)


def enable_checkpointing(model: PreTrainedModel, *, selective: bool = False) -> None:
    """Keeps of each layer its input alone, or with `selective` also what products and attention gave."""
    # An argument of its own where it is wanted: the compiler refuses checkpoint's default when it is given by name.
    kept: dict[str, Any] = {}
    if selective:
        kept["context_fn"] = partial(create_selective_checkpoint_contexts, _keep_products)
    for layer in decoder_layers(model):
        _train_by(layer, partial(_recomputed, layer.forward, partial(checkpoint, use_reentrant=False, **kept)))


def compile_layers(model: PreTrainedModel, *, backend: str = "inductor") -> None:
    """One graph for all layers and all lengths, made at the first step.

    What cannot be compiled as a whole is a ModelError then, and never run in pieces unsaid.
    """
    for layer in decoder_layers(model):
        compiled = torch.compile(layer.forward, backend=backend, fullgraph=True, dynamic=True)
        _train_by(layer, partial(_compiled, type(model).__name__, compiled))


def decoder_layers(model: PreTrainedModel) -> list[nn.Module]:
    """The repeated blocks of the decoder, none of which is part of another. Raises ModelError when there are none."""
    decoder: nn.Module = model.get_decoder()
    layers = list(_outermost(decoder))
    if not layers:  # a model that brings its own code may know nothing of transformers' class
        depth = model.config.get_text_config().num_hidden_layers
        lists = [m for m in decoder.modules() if isinstance(m, nn.ModuleList) and len(m) == depth]
        layers = list(lists[0]) if len(lists) == 1 else []
    if not layers:
        raise ModelError(
            f"{type(model).__name__}: the layers of its decoder are not to be found; leave gradient_checkpointing and "
            "torch_compile out"
        )
    return layers


def _outermost(module: nn.Module) -> Iterator[nn.Module]:
    for child in module.children():
        if isinstance(child, GradientCheckpointingLayer):
            yield child
        else:
            yield from _outermost(child)


def _train_by(layer: nn.Module, forward: Forward) -> None:
    """Lets a layer compute by `forward` wherever gradients are wanted in training."""
    plain = layer.forward

    def choose(hidden_BTD: Tensor, *args: Any, **kwargs: Any) -> Any:
        training = layer.training and torch.is_grad_enabled()
        return (forward if training else plain)(hidden_BTD, *args, **kwargs)

    layer.forward = choose


def _recomputed(forward: Forward, checkpointed: Forward, *args: Any, **kwargs: Any) -> Any:
    return checkpointed(partial(forward, **kwargs), *args)


def _keep_products(_: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    name = op.name().partition(".")[0] if hasattr(op, "name") else str(op)
    kept = name in _PRODUCTS or "attention" in name or "attn" in name
    return CheckpointPolicy.MUST_SAVE if kept else CheckpointPolicy.PREFER_RECOMPUTE


def _compiled(model: str, compiled: Forward, hidden_BTD: Tensor, *args: Any, **kwargs: Any) -> Any:
    from torch._dynamo import config, exc

    if not hidden_BTD.requires_grad:
        # The first layer's input, of a frozen embedding: it would cost a second graph to know that it wants none.
        hidden_BTD = hidden_BTD.detach().requires_grad_()
    try:
        # Floats are options (a scaling, an epsilon) and make no graph of their own; integers of a layer are its
        # number and what is derived from it, and would make a graph for each layer.
        with config.patch(specialize_float=True, allow_unspec_int_on_nn_module=True):
            return compiled(hidden_BTD, *args, **kwargs)
    except (exc.TorchDynamoException, exc.FailOnRecompileLimitHit) as error:
        raise ModelError(
            f"{model}: torch.compile does not take its layers: {one_line(error)}; leave torch_compile (--compile) out"
        ) from error
