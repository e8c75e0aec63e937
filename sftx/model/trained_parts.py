"""Which parts of a model a run trains: a multimodal model's language model, and what adapters reach of its weights."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection, Mapping
from typing import TYPE_CHECKING, Any, Final, cast

import torch
from torch import nn
from torch.nn.utils.parametrize import ParametrizationList
from transformers.pytorch_utils import Conv1D

from sftx.model.quantised import num_weights

if TYPE_CHECKING:
    from transformers import PreTrainedModel


_MAX_NAMED: Final = 8


def is_multimodal(model: PreTrainedModel) -> bool:
    """Return whether the model has more than a language model, such as a vision tower."""
    return model.config.get_text_config() is not model.config


def freeze_other_modalities(model: PreTrainedModel) -> None:
    """Freeze everything outside a multimodal model's language model: rows are text, so it would get no gradient."""
    for _, parameter in _other_modalities(model):
        parameter.requires_grad_(False)


def describe_untrained_parts(model: PreTrainedModel, num_parameters: int, *, has_adapters: bool) -> list[str]:
    """Return a line for each kind of weights that the run leaves as they are, with its share of the model's weights.

    These are the other modalities of a multimodal model and, with adapters, the matrices of the decoder that are no
    linear layers and that no adapter reaches, such as a router. Linear layers that an adapter leaves out are the user's
    choice, as are embeddings. `num_parameters`: those of the model without adapters.
    """

    def share(parameters: list[nn.Parameter]) -> str:
        return f"{100 * num_weights(parameters) / num_parameters:.1f} %"

    lines = []
    towers: dict[str, list[nn.Parameter]] = {}
    for name, parameter in _other_modalities(model):
        towers.setdefault(name.removeprefix(f"{model.base_model_prefix}.").partition(".")[0], []).append(parameter)
    for name, parameters in towers.items():
        lines.append(f"not trained: {name} {share(parameters)} of the model's weights, since rows are text")
    if not has_adapters:
        return lines
    ends: list[Any] = [model.get_input_embeddings(), model.get_output_embeddings()]
    embeddings = {id(parameter) for end in ends for parameter in end.parameters()}
    kinds: dict[tuple[str, str], dict[str, list[nn.Parameter]]] = {}
    for path, module in cast(nn.Module, model.get_decoder()).named_modules():
        if isinstance(module, nn.Linear | nn.Embedding | Conv1D):
            continue
        own = dict(module.named_parameters(recurse=False))
        for name, parameter in own.items():
            if _is_matrix(name, parameter) and not _is_reached(name, own) and id(parameter) not in embeddings:
                kind = kinds.setdefault((_without_layer(path), type(module).__name__), {})
                kind.setdefault(name, []).append(parameter)
    for (path, class_name), by_name in kinds.items():
        shares = ", ".join(f"{path}.{name} {share(parameters)}" for name, parameters in by_name.items())
        parameters = [parameter for parameters in by_name.values() for parameter in parameters]
        is_stack = all(map(_is_stack, parameters))
        names = [f"{path}.{name}" for name in by_name] if is_stack else [path]
        option = f"{'target_parameters' if is_stack else 'modules_to_save'}: [{', '.join(names)}]"
        line = f"not adapted: {shares} of the model's weights, which are parameters of {class_name}"
        lines.append(
            f"{line}; {'target' if is_stack else 'train'} {'it' if len(by_name) == 1 else 'them'} with {option}"
        )
    return lines


def describe_reach(model: PreTrainedModel, base: Collection[int]) -> str:
    """Return a line that says how much of the model adapters reach, and which of its layers they leave out.

    `base`: the ids of the parameters that the model had before. A weight is reached when its module has a trained
    parameter for it, be it the weight itself. Weights of one kind in all layers are one entry, the largest first.
    """
    reached, total = 0, 0
    left_out: dict[str, Counter[str]] = {}  # by the option of lora that would reach it
    seen: set[int] = set()
    for path, module in model.named_modules():
        own = dict(module.named_parameters(recurse=False))
        for name, parameter in own.items():
            if isinstance(module, ParametrizationList):
                # It may train some rows alone, and then no tensor of its own has the size of the weight.
                is_adapted = any(p.requires_grad and parameter.shape[0] in p.shape for p in module.parameters())
            else:
                is_adapted = _is_reached(name, own)
            if id(parameter) not in base or id(parameter) in seen:
                continue
            seen.add(id(parameter))
            total += num_weights([parameter])
            if is_adapted:
                reached += num_weights([parameter])
            elif _is_matrix(name, parameter) and not isinstance(module, nn.Embedding | ParametrizationList):
                kind = _without_layer(path) if name in ("weight", "codes") else f"{_without_layer(path)}.{name}"
                is_linear = isinstance(module, nn.Linear | Conv1D) or name == "codes"
                option = "target_modules" if is_linear else "target_parameters" if _is_stack(parameter) else ""
                left_out.setdefault(option or "modules_to_save", Counter())[kind] += num_weights([parameter])
    line = f"adapters reach {100 * reached / total:.1f} % of the model's weights"
    parts = []
    for option, kinds in left_out.items():
        names = [f"{name} {100 * size / total:.1f} %" for name, size in kinds.most_common(_MAX_NAMED)]
        more = f" and {len(kinds) - len(names)} more kinds" if len(kinds) > len(names) else ""
        parts.append(f"{', '.join(names)}{more} (name {'it' if len(kinds) == 1 else 'them'} in {option})")
    return f"{line}; not {', '.join(parts)}" if parts else line


def _is_matrix(name: str, parameter: nn.Parameter) -> bool:
    """Return whether a parameter is a matrix, or a stack of them; stacked experts have stacked biases too."""
    return (parameter.ndim >= 2 or name == "codes") and not name.endswith("bias")


def _is_stack(parameter: nn.Parameter) -> bool:
    """Return whether a parameter is a stack of matrices, or the codes of one."""
    return parameter.ndim == 3 or (parameter.ndim == 2 and parameter.dtype == torch.uint8)


def _is_reached(name: str, own: Mapping[str, nn.Parameter]) -> bool:
    """Return whether one of a module's own parameters is trained, or has trained parameters of an adapter beside it.

    An adapter of one of several parameters begins the names of its own with that parameter's name.
    """
    trained = [other for other, parameter in own.items() if parameter.requires_grad]
    adapted = {one for one in own for other in trained if other.startswith(f"{one}_")}
    return name in trained or name in adapted or (bool(trained) and not adapted)


def describe_trained(model: PreTrainedModel) -> str:
    """Return a line that says which of the model's own weights train, and how much of it that is.

    Layers are named together where the same of their parts train; tied weights are named together, as one tensor.
    """
    parts: dict[str, dict[str, bool]] = {}  # whether each parameter trains, by what follows its layer's number
    outside: dict[int, list[str]] = {}  # the names of each parameter that trains
    num_all = num_trained = 0
    seen: set[int] = set()
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if match := re.match(r"(.*?\.\d+)\.(.*)", name):
            parts.setdefault(match[1], {})[match[2]] = parameter.requires_grad
        elif parameter.requires_grad:
            short = name.removesuffix(".weight").removeprefix(f"{model.base_model_prefix}.")
            outside.setdefault(id(parameter), []).append(short)
        if id(parameter) not in seen:
            seen.add(id(parameter))
            num_all += parameter.numel()
            num_trained += parameter.numel() * parameter.requires_grad
    layers: dict[str, list[int]] = {}
    for path, trains in parts.items():
        names = dict.fromkeys(name.partition(".")[0] for name, does in trains.items() if does)
        if names:
            what = "" if all(trains.values()) else f"{', '.join(names)} of "
            place, _, number = path.removeprefix(f"{model.base_model_prefix}.").rpartition(".")
            layers.setdefault(f"{what}{place}", []).append(int(number))
    entries = [*(f"{what} {_ranges(numbers)}" for what, numbers in layers.items()), *map(" = ".join, outside.values())]
    return f"{100 * num_trained / num_all:.1f} % of the model's weights train: {'; '.join(entries)}"


def _ranges(numbers: list[int]) -> str:
    """Return "0-3, 5" for [0, 1, 2, 3, 5]."""
    starts = [number for number in numbers if number - 1 not in numbers]
    ends = [number for number in numbers if number + 1 not in numbers]
    return ", ".join(str(a) if a == b else f"{a}-{b}" for a, b in zip(starts, ends, strict=True))


def _other_modalities(model: PreTrainedModel) -> list[tuple[str, nn.Parameter]]:
    """Return the parameters, by name, that are no part of a multimodal model's language model."""
    if not is_multimodal(model):
        return []
    parts: list[Any] = [model.get_decoder(), model.get_input_embeddings(), model.get_output_embeddings()]
    own = {id(parameter) for part in parts if part is not None for parameter in part.parameters()}
    return [(name, parameter) for name, parameter in model.named_parameters() if id(parameter) not in own]


def _without_layer(path: str) -> str:
    """Return what follows the last number in a module's path, which is that of its layer; the whole path if none."""
    names = path.split(".")
    last = max((at for at, name in enumerate(names) if name.isdigit()), default=-1)
    return ".".join(names[last + 1 :]) or path
