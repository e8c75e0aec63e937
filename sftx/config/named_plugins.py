"""The options of train that name a plugin: the optimizer and the schedule of a run. Imports no torch.

Only names of built-in plugins are here, for errors, help and editors; what they are is said by the plugins.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final


@dataclass(frozen=True, kw_only=True)
class PluginOption:
    """An option of train whose value is the name of a plugin, which it adds to the run."""

    name: str
    """Of the field of TrainConfig."""
    hook: str
    """That the plugin must implement."""
    built_in: tuple[str, ...]
    """The values that name built-in plugins."""
    aliases: Mapping[str, str]
    """transformers' names of some of them."""
    suffix: str = ""
    """What may follow the value in the name of the plugin, because a plugin of another hook has the short name."""
    partial: tuple[str, ...]
    """Options of train that only some of these plugins read: those that name them in `train_options`."""

    def plugins(self, value: str) -> tuple[str, ...]:
        """Return the names that the plugin may have, the first that is installed counts."""
        return (f"{value.replace('_', '-')}{self.suffix}", value) if self.suffix else (value,)


OPTIM: Final = PluginOption(
    name="optim",
    hook="sftx_optimizer",
    built_in=(
        "adamw", "adamw_8bit", "paged_adamw", "paged_adamw_8bit", "adafactor", "lion", "sgd", "muon", "adamw_bf16",
    ),
    aliases={
        "adamw_torch": "adamw",
        "adamw_torch_fused": "adamw",
        "adamw_bnb_8bit": "adamw_8bit",
        "paged_adamw_32bit": "paged_adamw",
        "lion_32bit": "lion",
    },
    partial=("momentum", "adam_beta1", "adam_beta2", "adam_epsilon"),
)  # fmt: skip
LR_SCHEDULER_TYPE: Final = PluginOption(
    name="lr_scheduler_type",
    hook="sftx_schedule",
    built_in=("cosine", "linear", "constant", "polynomial", "warmup_stable_decay", "minimind"),
    aliases={"cosine_with_min_lr": "cosine", "constant_with_warmup": "constant"},
    suffix="-schedule",
    partial=("min_lr_ratio", "lr_power", "lr_decay_steps", "lr_decay_type"),
)
PLUGIN_OPTIONS: Final = (OPTIM, LR_SCHEDULER_TYPE)

ELEMENTWISE: Final = ("adamw", "lion", "sgd")
"""The built-in optimizers that update shards of a parameter, for the error about one that does not."""

_LEAN: Final = {"adafactor": 0.1, "sgd": 0.0}
"""Built-in optimizers that hardly have a state, with its bytes for each trained parameter; most first."""


def leaner_than(state_bytes: float) -> str | None:
    """Return the optimizer to try when there is no memory for a state of so many bytes a parameter, or None."""
    return next((name for name, less in _LEAN.items() if less < state_bytes), None)
