"""Reads the options of train that several optimizers have, as their constructors take them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

ADAM_OPTIONS: Final = ("adam_beta1", "adam_beta2", "adam_epsilon")
"""The options of train that AdamW reads, in any of its forms."""


def betas(train: Mapping[str, Any], *, default_beta2: float) -> tuple[float, float]:
    return train["adam_beta1"], default_beta2 if train["adam_beta2"] is None else train["adam_beta2"]


def adam_options(train: Mapping[str, Any]) -> dict[str, Any]:
    """Return learning rate, betas and epsilon of AdamW."""
    return {"lr": train["learning_rate"], "betas": betas(train, default_beta2=0.999), "eps": train["adam_epsilon"]}
