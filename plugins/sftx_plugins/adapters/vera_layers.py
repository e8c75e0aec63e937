"""The layers of VeRA, and their adapter. Dimensions: R rank, K in, O out."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from sftx import ConfigError, LanguageModel
from sftx_kernels import QuantizedLinear, seeded_dropout
from sftx_plugins.adapters.lora_adapter import LoraAdapter
from sftx_plugins.adapters.lora_layers import LayerOptions, LoraLayer, check_unchanged


class Projections(nn.Module):
    """The matrices that all layers share: A [R, K] and B [O, R] for the largest K and O; smaller layers use a part."""

    vera_A: Tensor
    vera_B: Tensor

    def __init__(self, r: int, in_features: int, out_features: int, *, seed: int, device: torch.device) -> None:
        super().__init__()
        # As PEFT draws them: on the CPU, in this order, uniform with the bounds of He initialisation.
        generator = torch.Generator().manual_seed(seed)
        for name, shape in (("vera_A", (r, in_features)), ("vera_B", (out_features, r))):
            bound = math.sqrt(6 / shape[1])
            values = torch.empty(shape, device="cpu").uniform_(-bound, bound, generator=generator)
            self.register_buffer(name, values.to(device), persistent=False)


class VeraLinear(LoraLayer, nn.Linear):
    """A linear layer with an update that scales the shared matrices. `weight` and `bias` keep their names."""

    def __init__(
        self,
        base: nn.Linear,
        options: LayerOptions,
        shared: Projections,
        *,
        d_initial: float,
        run_seed: Tensor,
        number: int,
    ) -> None:
        super().__init__(base, options, run_seed=run_seed, number=number)
        self.out_features, self.in_features = self.weight.shape
        self.shared = shared
        device = self.weight.device
        self.vera_lambda_b = nn.Parameter(torch.zeros(self.out_features, device=device))
        self.vera_lambda_d = nn.Parameter(torch.full((options.r,), d_initial, device=device))

    def projections(self) -> tuple[Tensor, Tensor]:
        """Return this layer's part of A, [R, K], and of B, [O, R]."""
        return self.shared.vera_A[:, : self.in_features], self.shared.vera_B[: self.out_features]

    def forward(self, input: Tensor) -> Tensor:
        output = nn.functional.linear(input, self.weight, self.bias)
        if not self.enabled:
            return output
        dropout_p = self.options.lora_dropout if self.training else 0.0
        x = seeded_dropout(input, dropout_p, self.dropout_seed()) if dropout_p else input
        A_RK, B_OR = self.projections()
        scaled = nn.functional.linear(x, A_RK.to(x.dtype)) * self.vera_lambda_d
        update = nn.functional.linear(scaled.to(x.dtype), B_OR.to(x.dtype)) * self.vera_lambda_b
        return output + update.to(output.dtype)

    def tensors(self) -> dict[str, Tensor]:
        return {"vera_lambda_b": self.vera_lambda_b, "vera_lambda_d": self.vera_lambda_d}

    @torch.no_grad()
    def merged(self) -> nn.Module:
        base: Any = self.base[0]
        A_RK, B_OR = self.projections()
        update_OK = (self.vera_lambda_b[:, None] * B_OR) @ (self.vera_lambda_d[:, None] * A_RK)
        base.weight = nn.Parameter((self.weight + update_OK).to(self.weight.dtype), requires_grad=False)
        return self.base[0]


class VeraAdapter(LoraAdapter):
    """The VeRA layers of one model, and the modules trained in full."""

    def __init__(
        self,
        base: str,
        targets: Sequence[str],
        saved: Sequence[str],
        *,
        r: int,
        dropout_p: float,
        d_initial: float,
        seed: int,
        save_projection: bool,
    ) -> None:
        peft = {
            "d_initial": d_initial,
            "peft_type": "VERA",
            "projection_prng_key": seed,
            "r": r,
            "save_projection": save_projection,
            "vera_dropout": dropout_p,
        }
        options = LayerOptions(r=r, lora_alpha=r, lora_dropout=dropout_p)
        super().__init__(base, dict.fromkeys(targets, options), saved, peft=peft)
        self._shared: Projections | None = None

    def attach(self, lm: LanguageModel) -> None:
        layers = [lm.model.get_submodule(path) for path in self._targets]
        for path, layer in zip(self._targets, layers, strict=True):
            if isinstance(layer, QuantizedLinear):
                raise ConfigError(f"{path} is quantised, and vera adapts plain layers; take lora or qlora")
        shapes = [layer.weight.shape for layer in layers if isinstance(layer.weight, Tensor)]
        self._shared = Projections(
            self._peft["r"],
            max(K for _, K in shapes),
            max(O for O, _ in shapes),  # noqa: E741
            seed=self._peft["projection_prng_key"],
            device=lm.device,
        )
        super().attach(lm)

    def make_layer(
        self, path: str, base: nn.Module, options: LayerOptions, *, lm: LanguageModel, number: int
    ) -> LoraLayer:
        check_unchanged(path, base)
        assert isinstance(base, nn.Linear)
        assert self._shared is not None
        return VeraLinear(
            base, options, self._shared, d_initial=self._peft["d_initial"], run_seed=lm.seed, number=number
        )

    def _tensors(self) -> dict[str, Tensor]:
        assert self._shared is not None
        shared = {"base_model.vera_A": self._shared.vera_A, "base_model.vera_B": self._shared.vera_B}
        return super()._tensors() | (shared if self._peft["save_projection"] else {})

    def _config(self) -> dict[str, Any]:
        of_lora = ("ensure_weight_tying", "target_parameters", "trainable_token_indices")
        return {name: value for name, value in super()._config().items() if name not in of_lora}
