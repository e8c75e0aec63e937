"""LoRA on the stacked experts of a mixture: transformers 5 keeps the experts of a layer as parameters [E, O, K].

Each expert has an A and a B of its own. PEFT adapts such parameters as `target_parameters`.

Dimensions: T tokens, C experts chosen for a token, M = T * C rows, E experts, H hidden, R rank, K in, O out.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Collection, Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn

from sftx import ConfigError
from sftx_kernels import grouped_lora_linear
from sftx_plugins.adapters.lora_layers import LayerOptions, LoraLayer, check_fits


def stacked_weights(module: nn.Module) -> tuple[str, ...]:
    """Return the names of the experts' weights that a module keeps stacked, as transformers' experts interface does.

    Empty for every other module.
    """
    if not all(hasattr(module, name) for name in ("has_gate", "has_bias", "is_transposed", "num_experts")):
        return ()
    names = ("gate_up_proj" if module.has_gate else "up_proj", "down_proj")
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
def _adapted(experts: Any) -> type[LoraExperts]:
    """Return the class of LoRA layers that are experts of this class too, with its gate and its activation."""
    return cast("type[LoraExperts]", type(f"Lora{experts.__name__}", (LoraExperts, experts), {}))


class LoraExperts(LoraLayer):
    """Stacked experts with a low-rank update of each expert's weights. An instance is also one of the base's class.

    It computes what transformers' grouped experts do: rows are sorted by expert and multiplied group by group, and
    each token's results are summed in a fixed order.
    """

    num_experts: int
    _apply_gate: Any
    act_fn: Any
    post_expert_norm: Any

    def __new__(cls, base: nn.Module, *_: Any, **__: Any) -> LoraExperts:
        experts: Any = type(base)
        return super().__new__(_adapted(experts))

    def __init__(
        self, base: nn.Module, options: Mapping[str, LayerOptions], *, run_seed: Tensor, number: int, path: str
    ) -> None:
        """`options`: of each weight that is adapted, by its name.

        Raises ConfigError for experts that are changed already.
        """
        names = stacked_weights(base)
        if isinstance(base, LoraLayer) or any(name.partition("_lora")[1] for name in base._parameters):
            raise ConfigError(f"another adapter of this run has changed {path} already; leave one of the two out")
        super().__init__(base, next(iter(options.values())), run_seed=run_seed, number=number)
        for name, module in base._modules.items():
            self.add_module(name, module)
        vars(self).update({name: value for name, value in vars(base).items() if name not in vars(self)})
        self.updates = {name: options[name] for name in names if name in options}
        """The options of each weight's update, by the weight's name."""
        self.trained = set(self.updates)
        """The weights whose own update trains; all others have one that is frozen, or none."""
        for name, own in self.updates.items():
            weight = getattr(self, name)
            E, O, K = (weight.transpose(1, 2) if self.is_transposed else weight).shape  # noqa: E741
            A_ERK = torch.empty(E, own.r, K, dtype=torch.float32, device=weight.device)
            nn.init.kaiming_uniform_(A_ERK.view(-1, K), a=math.sqrt(5))  # as in PEFT, like the weight of nn.Linear
            B_EOR = torch.zeros(E, O, own.r, dtype=torch.float32, device=weight.device)
            self.register_parameter(f"{name}_lora_A", nn.Parameter(A_ERK))
            self.register_parameter(f"{name}_lora_B", nn.Parameter(B_EOR))

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """Return the weighted sum of the chosen experts' results, [T, H].

        hidden_states: [T, H]. top_k_index: [T, C] int64, the experts of each token. top_k_weights: [T, C].
        """
        if not any(map(self._parts, self.updates)):
            return cast(Tensor, super().forward(hidden_states, top_k_index, top_k_weights))
        num_tokens, num_chosen = top_k_index.shape
        expert_M, order_M = top_k_index.reshape(-1).sort(stable=True)
        experts_E = torch.arange(self.num_experts, device=expert_M.device)
        ends_E = torch.searchsorted(expert_M, experts_E, right=True)
        up = "gate_up_proj" if self.has_gate else "up_proj"
        out_MI = self._project(up, hidden_states[order_M // num_chosen], ends_E, number=0)
        out_MI = self._apply_gate(out_MI) if self.has_gate else self.act_fn(out_MI)
        out_MH = self._project("down_proj", out_MI, ends_E, number=1)
        if getattr(self, "has_post_expert_norm", False):
            out_MH = self.post_expert_norm(out_MH)
        out_MH = out_MH * top_k_weights.reshape(-1)[order_M, None]
        back_M = torch.empty_like(order_M)
        back_M[order_M] = torch.arange(len(order_M), device=order_M.device)
        return out_MH[back_M].view(num_tokens, num_chosen, -1).sum(1).to(hidden_states.dtype)

    def _project(self, name: str, x_MK: Tensor, ends_E: Tensor, *, number: int) -> Tensor:
        """Multiply rows that are sorted by expert with the weight of this name; `number` sets its dropout apart."""
        weight: Tensor = getattr(self, name)
        bias_EO: Tensor | None = getattr(self, f"{name}_bias") if self.has_bias else None
        if self._parts(name):
            own = self.updates[name]
            A_ERK, B_EOR = self._matrices(name)
            scaling, dropout_p = own.scaling, own.lora_dropout if self.training else 0.0
        else:
            num_out = weight.shape[2 if self.is_transposed else 1]
            A_ERK, B_EOR = (
                weight.new_empty(size) for size in ((len(weight), 0, x_MK.shape[1]), (len(weight), num_out, 0))
            )
            scaling, dropout_p = 1.0, 0.0
        return grouped_lora_linear(
            x_MK,
            weight,
            A_ERK,
            B_EOR,
            ends_E,
            scaling=scaling,
            transposed=bool(self.is_transposed),
            dropout_p=dropout_p,
            seed=self.dropout_seed() + number if dropout_p else None,
            bias=bias_EO,
        )

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
        weight: Tensor = getattr(self, name)
        E, O, K = (weight.transpose(1, 2) if self.is_transposed else weight).shape  # noqa: E741
        A_MK, B_OM = tensors[f"{prefix}lora_A.weight"], tensors[f"{prefix}lora_B.weight"]
        check_fits(A_MK, (B_OM.shape[-1], K))
        check_fits(B_OM, (O, A_MK.shape[0] // E * E))
        A_ERK, B_EOR = A_MK.view(E, -1, K), B_OM.view(O, -1, E).permute(2, 0, 1).contiguous()
        return A_ERK.to(weight.device, torch.float32), B_EOR.to(weight.device, torch.float32)

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
        for name in base._parameters:
            parameter = self._parameters[name]
            if name in self.updates:
                assert parameter is not None
                scaling, merged = self.updates[name].scaling, torch.empty_like(parameter)
                for weight, A_RK, B_OR, into in zip(parameter, *self._matrices(name), merged, strict=True):
                    update_OK = scaling * (B_OR @ A_RK)
                    into.copy_(weight + (update_OK.T if self.is_transposed else update_OK))
                parameter = nn.Parameter(merged, requires_grad=False)
            base.register_parameter(name, parameter)
        return base
