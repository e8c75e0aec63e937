"""LoRA on the stacked experts of a mixture: transformers 5 keeps the experts of a layer as parameters [E, O, K].

Each expert has an A and a B of its own. PEFT adapts such parameters as `target_parameters`.

Dimensions: T tokens, C experts chosen for a token, M = T * C rows, E experts, H hidden, R rank, K in, O out.
"""

from __future__ import annotations

import copy
import functools
import itertools
import math
from collections.abc import Collection, Mapping
from typing import Any, ClassVar, Final, cast

import torch
from torch import Tensor, nn

from sftx import ConfigError
from sftx_kernels import QuantizedStack, dequantize, grouped_lora_linear
from sftx_plugins.adapters.lora_layers import LayerOptions, LoraLayer, check_fits

_SCALES: Final = ("absmax", "nested_absmax", "offset")
"""How the names of the scales of a quantised weight end."""


def stacked_weights(module: nn.Module) -> tuple[str, ...]:
    """Return the names of the experts' weights that a module keeps stacked, as transformers' experts interface does.

    Empty for every other module.
    """
    if not all(hasattr(module, name) for name in ("has_gate", "has_bias", "is_transposed", "num_experts")):
        return ()
    names = ("gate_up_proj" if module.has_gate else "up_proj", "down_proj")
    if isinstance(module, GroupedExperts):
        return names
    weights = [module._parameters.get(name) for name in names]
    return names if all(w is not None and w.ndim == 3 and w.is_floating_point() for w in weights) else ()


def peft_prefixes(experts: nn.Module, names: Collection[str]) -> dict[str, str]:
    """Return what precedes the names of each weight's tensors in PEFT, which wraps the module once for each weight."""
    in_order = [name for name in experts._parameters if name in names]
    return {name: "base_layer." * depth for depth, name in enumerate(reversed(in_order))}


def by_module(
    model: nn.Module, targets: Mapping[str, LayerOptions]
) -> dict[str, LayerOptions | dict[str, LayerOptions]]:
    """Return the options of each module: those of a module itself, or by name those of its stacked weights.

    `targets`: paths of modules, and of stacked weights such as `model.layers.0.mlp.experts.down_proj`.
    """
    modules: dict[str, Any] = {}
    for path, options in targets.items():
        parent, _, name = path.rpartition(".")
        if name in stacked_weights(model.get_submodule(parent)):
            modules.setdefault(parent, {})[name] = options
        else:
            modules[path] = options
    return modules


@functools.cache
def _subclass(own: Any, experts: Any) -> Any:
    """Return a class of this module's that is one of experts too, with its gate and its activation."""
    return type(f"{own.prefix}{experts.__name__}", (own, experts), {})


class GroupedExperts(nn.Module):
    """Stacked experts. An instance is also one of the class of the experts whose place it takes.

    It computes what transformers' grouped experts do: rows are sorted by expert and multiplied group by group, and
    each token's results are summed in a fixed order.
    """

    prefix: ClassVar[str]
    num_experts: int
    is_transposed: bool
    _apply_gate: Any
    act_fn: Any
    post_expert_norm: Any
    stack_shapes: Mapping[str, tuple[int, int, int]] = {}
    """The shapes of weights that are quantised, by their names; the parameters of these names are their codes."""

    def __new__(cls, base: nn.Module, *_: Any, **__: Any) -> Any:
        return super().__new__(_subclass(cast(Any, cls), cast(Any, type(base))))

    def take_over(self, base: nn.Module) -> None:
        """Take the submodules and the attributes of another module that are not here yet."""
        for name, module in base._modules.items():
            self.add_module(name, module)
        vars(self).update({name: value for name, value in vars(base).items() if name not in vars(self)})

    def stack(self, name: str) -> Tensor | QuantizedStack:
        """Return the weight of this name, [E, O, K], or [E, K, O] where `is_transposed`."""
        weight = cast(Tensor, self._parameters[name])
        if name not in self.stack_shapes:
            return weight
        scales = (self._buffers[f"{name}_{scale}"] for scale in _SCALES)
        return QuantizedStack(weight, tuple(s for s in scales if s is not None), self.stack_shapes[name])

    def matrix(self, name: str, expert: int) -> Tensor:
        """Return the weight of an expert; one that is quantised is dequantised to fp32."""
        stack = self.stack(name)
        return stack[expert] if isinstance(stack, Tensor) else dequantize(stack.matrix(expert), torch.float32)

    def size(self, name: str) -> tuple[int, int, int]:
        """Return E, O and K of the weight of this name."""
        E, O, K = self.stack(name).shape  # noqa: E741
        return (E, K, O) if self.is_transposed else (E, O, K)

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """Return the weighted sum of the chosen experts' results, [T, H].

        hidden_states: [T, H]. top_k_index: [T, C] int64, the experts of each token. top_k_weights: [T, C].
        """
        num_tokens, num_chosen = top_k_index.shape
        expert_M, order_M = top_k_index.reshape(-1).sort(stable=True)
        experts_E = torch.arange(self.num_experts, device=expert_M.device)
        ends_E = torch.searchsorted(expert_M, experts_E, right=True)
        up = "gate_up_proj" if self.has_gate else "up_proj"
        out_MI = self.project(up, hidden_states[order_M // num_chosen], ends_E, number=0)
        out_MI = self._apply_gate(out_MI) if self.has_gate else self.act_fn(out_MI)
        out_MH = self.project("down_proj", out_MI, ends_E, number=1)
        if getattr(self, "has_post_expert_norm", False):
            out_MH = self.post_expert_norm(out_MH)
        out_MH = out_MH * top_k_weights.reshape(-1)[order_M, None]
        back_M = torch.empty_like(order_M)
        back_M[order_M] = torch.arange(len(order_M), device=order_M.device)
        return out_MH[back_M].view(num_tokens, num_chosen, -1).sum(1).to(hidden_states.dtype)

    def project(self, name: str, x_MK: Tensor, ends_E: Tensor, *, number: int) -> Tensor:
        """Multiply rows that are sorted by expert with the weight of this name; `number` sets its dropout apart."""
        E, O, K = self.size(name)  # noqa: E741
        A_ERK, B_EOR = x_MK.new_empty(E, 0, K), x_MK.new_empty(E, O, 0)
        return self.grouped_linear(name, x_MK, A_ERK, B_EOR, ends_E, scaling=1.0)

    def grouped_linear(
        self, name: str, x_MK: Tensor, A_ERK: Tensor, B_EOR: Tensor, ends_E: Tensor, **options: Any
    ) -> Tensor:
        bias_EO = self._parameters[f"{name}_bias"] if self.has_bias else None
        transposed = bool(self.is_transposed)
        return grouped_lora_linear(
            x_MK, self.stack(name), A_ERK, B_EOR, ends_E, transposed=transposed, bias=bias_EO, **options
        )


class QuantizedExperts(GroupedExperts):
    """Frozen experts of which some weights are quantised, each expert's by itself."""

    prefix = "Quantized"

    def __init__(self, base: nn.Module, stacks: Mapping[str, QuantizedStack]) -> None:
        """`stacks`: the quantised weights, by their names."""
        nn.Module.__init__(self)
        self.dtype = cast(Tensor, base._parameters[next(iter(stacks))]).dtype
        self.stack_shapes = {name: stack.shape for name, stack in stacks.items()}
        for name, parameter in base._parameters.items():
            if name in stacks:
                parameter = nn.Parameter(stacks[name].codes, requires_grad=False)
                for scale, values in itertools.zip_longest(_SCALES, stacks[name].scales):
                    self.register_buffer(f"{name}_{scale}", values)
            self.register_parameter(name, parameter)
        self.take_over(base)
        plain = copy.copy(base)
        plain._parameters = dict.fromkeys(base._parameters)  # or the whole weights would stay in memory
        self.plain = [plain]

    @torch.no_grad()
    def dequantized(self) -> nn.Module:
        """Return the module that this one took the place of, with the same values."""
        (plain,) = self.plain
        for name, parameter in self._parameters.items():
            if name in self.stack_shapes:
                matrices = [self.matrix(name, expert).to(self.dtype) for expert in range(self.num_experts)]
                parameter = nn.Parameter(torch.stack(matrices), requires_grad=False)
            plain._parameters[name] = parameter
        return plain


class LoraExperts(GroupedExperts, LoraLayer):
    """Stacked experts with a low-rank update of each expert's weights."""

    prefix = "Lora"

    def __init__(
        self, base: nn.Module, options: Mapping[str, LayerOptions], *, run_seed: Tensor, number: int, path: str
    ) -> None:
        """`options`: of each weight that is adapted, by its name.

        Raises ConfigError for experts that are changed already.
        """
        names = stacked_weights(base)
        if isinstance(base, LoraLayer) or any(name.partition("_lora")[1] for name in base._parameters):
            raise ConfigError(f"another adapter of this run has changed {path} already; leave one of the two out")
        LoraLayer.__init__(self, base, next(iter(options.values())), run_seed=run_seed, number=number)
        self.take_over(base)
        self.updates = {name: options[name] for name in names if name in options}
        """The options of each weight's update, by the weight's name."""
        self.trained = set(self.updates)
        """The weights whose own update trains; all others have one that is frozen, or none."""
        for name, own in self.updates.items():
            E, O, K = self.size(name)  # noqa: E741
            device = cast(Tensor, self._parameters[name]).device
            A_ERK = torch.empty(E, own.r, K, dtype=torch.float32, device=device)
            nn.init.kaiming_uniform_(A_ERK.view(-1, K), a=math.sqrt(5))  # as in PEFT, like the weight of nn.Linear
            B_EOR = torch.zeros(E, O, own.r, dtype=torch.float32, device=device)
            self.register_parameter(f"{name}_lora_A", nn.Parameter(A_ERK))
            self.register_parameter(f"{name}_lora_B", nn.Parameter(B_EOR))

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        arguments = hidden_states, top_k_index, top_k_weights
        if self.stack_shapes or any(map(self._parts, self.updates)):
            return super().forward(*arguments)
        return cast(Tensor, cast(Any, type(self.base[0])).forward(self, *arguments))

    def project(self, name: str, x_MK: Tensor, ends_E: Tensor, *, number: int) -> Tensor:
        if not self._parts(name):
            return super().project(name, x_MK, ends_E, number=number)
        own = self.updates[name]
        dropout_p = own.lora_dropout if self.training else 0.0
        seed = self.dropout_seed() + number if dropout_p else None
        matrices = self._matrices(name)
        return self.grouped_linear(name, x_MK, *matrices, ends_E, scaling=own.scaling, dropout_p=dropout_p, seed=seed)

    def _parts(self, name: str) -> list[tuple[Tensor, Tensor]]:
        """Return A [E, R, K] and B [E, O, R] of each update of a weight that is added now, first of its own."""
        parts = []
        if name in self.updates and (self.enabled or name not in self.trained):
            parts.append((getattr(self, f"{name}_lora_A"), getattr(self, f"{name}_lora_B")))
        below_A = getattr(self, f"{name}_below_A", None)
        return parts if below_A is None else [*parts, (below_A, getattr(self, f"{name}_below_B"))]

    def _matrices(self, name: str) -> tuple[Tensor, Tensor]:
        """Return A [E, R, K] and B [E, O, R] of all that is added to a weight, which is something."""
        parts = self._parts(name)
        if len(parts) == 1:
            return parts[0]
        As, Bs = zip(*parts, strict=True)
        return torch.cat(As, 1), torch.cat(Bs, 2)

    def tensors(self) -> dict[str, Tensor]:
        """Return copies in PEFT's layout: A [E R, K], expert by expert, and B [O, R E], rank by rank."""
        tensors = {}
        for name, prefix in peft_prefixes(self, self.updates).items():
            A_ERK, B_EOR = self._matrices(name)
            tensors[f"{prefix}lora_A.weight"] = A_ERK.flatten(0, 1)
            tensors[f"{prefix}lora_B.weight"] = B_EOR.permute(1, 2, 0).flatten(1)
        return tensors

    def _from_peft(self, name: str, prefix: str, tensors: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Return A [E, R, K] and B [E, O, R] of what PEFT saves for a weight. Raises ValueError for other shapes."""
        (E, O, K), device = self.size(name), cast(Tensor, self._parameters[name]).device  # noqa: E741
        A_MK, B_OM = tensors[f"{prefix}lora_A.weight"], tensors[f"{prefix}lora_B.weight"]
        check_fits(A_MK, (B_OM.shape[-1], K))
        check_fits(B_OM, (O, A_MK.shape[0] // E * E))
        A_ERK, B_EOR = A_MK.view(E, -1, K), B_OM.view(O, -1, E).permute(2, 0, 1).contiguous()
        return A_ERK.to(device, torch.float32), B_EOR.to(device, torch.float32)

    @torch.no_grad()
    def load(self, tensors: Mapping[str, Tensor]) -> None:
        for name, prefix in peft_prefixes(self, self.updates).items():
            A_ERK, B_EOR = self._from_peft(name, prefix, tensors)
            own_A, own_B = getattr(self, f"{name}_lora_A"), getattr(self, f"{name}_lora_B")
            r = own_A.shape[1]
            own_A.copy_(A_ERK[:, :r])
            own_B.copy_(B_EOR[:, :, :r])
            self._set_below(name, A_ERK[:, r:], B_EOR[:, :, r:])

    def _set_below(self, name: str, A_ERK: Tensor, B_EOR: Tensor) -> None:
        for end, matrices in (("A", A_ERK), ("B", B_EOR)):
            below = matrices.contiguous() if A_ERK.shape[1] else None
            self.register_buffer(f"{name}_below_{end}", below, persistent=False)

    @torch.no_grad()
    def add_below(self, tensors: Mapping[str, Tensor], options: LayerOptions | Mapping[str, LayerOptions]) -> None:
        assert isinstance(options, Mapping)
        for name, prefix in peft_prefixes(self, options).items():
            A_ERK, B_EOR = self._from_peft(name, prefix, tensors)
            if name not in self.updates:
                self.updates[name] = options[name]
                self.register_buffer(f"{name}_lora_A", A_ERK, persistent=False)
                self.register_buffer(f"{name}_lora_B", B_EOR, persistent=False)
                continue
            B_EOR.mul_(options[name].scaling / self.updates[name].scaling)
            if getattr(self, f"{name}_below_A", None) is not None:
                A_ERK = torch.cat([getattr(self, f"{name}_below_A"), A_ERK], 1)
                B_EOR = torch.cat([getattr(self, f"{name}_below_B"), B_EOR], 2)
            self._set_below(name, A_ERK, B_EOR)

    def freeze_update(self) -> None:
        super().freeze_update()
        self.trained.clear()

    def ranks(self) -> dict[str, tuple[int, float]]:
        return {name: (self._matrices(name)[0].shape[1], own.scaling) for name, own in self.updates.items()}

    @torch.no_grad()
    def merged(self) -> nn.Module:
        base = self.base[0]
        dtypes = dict.fromkeys(self.stack_shapes, base.dtype) if isinstance(base, QuantizedExperts) else {}
        plain = base.plain[0] if isinstance(base, QuantizedExperts) else base
        for name in plain._parameters:
            parameter = self._parameters[name]
            if name in self.updates or name in self.stack_shapes:
                assert parameter is not None
                E, rows, columns = self.stack(name).shape
                merged = torch.empty(E, rows, columns, dtype=dtypes.get(name, parameter.dtype), device=parameter.device)
                for expert, into in enumerate(merged):
                    matrix = self.matrix(name, expert)
                    if name in self.updates:
                        A_ERK, B_EOR = self._matrices(name)
                        update_OK = self.updates[name].scaling * (B_EOR[expert] @ A_ERK[expert])
                        matrix = matrix + (update_OK.T if self.is_transposed else update_OK)
                    into.copy_(matrix)
                parameter = nn.Parameter(merged, requires_grad=False)
            plain.register_parameter(name, parameter)
        return plain
