"""VeRA (Kopiczko et al. 2023, https://arxiv.org/abs/2310.11454): y = x W^T + b * (d * (dropout(x) A^T)) B^T.

A and B are drawn once for all layers and stay as they are; each layer trains the vectors d [R] and b [O].
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any

from pydantic import Field

from sftx import Adapter, ConfigError, ModelSpec, hookimpl
from sftx_plugins.adapters.targets import Targets, read_peft


@dataclass(frozen=True, eq=False)
class Vera(Targets):
    """Trains two vectors for each linear layer, which scale random matrices that all layers share; loadable by PEFT."""

    r: Annotated[
        int, Field(ge=1, le=2**24, description="Rank of the shared matrices; higher than LoRA's, as it costs little.")
    ] = 256
    vera_dropout: Annotated[float, Field(ge=0, lt=1, description="Dropout probability of the update's inputs.")] = 0.0
    d_initial: Annotated[float, Field(description="Value with which each vector d begins.")] = 0.1
    projection_prng_key: Annotated[int, Field(ge=0, lt=2**63, description="Seed of the shared matrices.")] = 0
    save_projection: Annotated[
        bool, Field(description="Save the shared matrices too, rather than draw them from the seed when loading.")
    ] = True

    @classmethod
    def options_of_peft(cls, config: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
        """Return the options for PEFT's adapter_config.json, and the keys of it that no option stands for."""
        options, others = read_peft(config, cls, {"bias", "init_weights", "fan_in_fan_out"})
        return options, others + (["bias"] if config.get("bias", "none") != "none" else [])

    @hookimpl
    def sftx_adapter(self, spec: ModelSpec) -> Adapter:
        from sftx_plugins.adapters.vera_layers import VeraAdapter

        if spec.new_token_ids:
            raise ConfigError("trains no rows of added tokens; take lora, or a template whose tokens the model has")
        targets, saved = self.find(spec.skeleton)
        return VeraAdapter(
            spec.name,
            targets,
            saved,
            r=self.r,
            dropout_p=self.vera_dropout,
            d_initial=self.d_initial,
            seed=self.projection_prng_key,
            save_projection=self.save_projection,
        )
