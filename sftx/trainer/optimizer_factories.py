"""`train.optim` becomes the optimizers of a run, each with its own parameters."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from typing import Any, Final

import torch
from torch.optim import AdamW, Muon, Optimizer

from sftx.config.options import TrainConfig
from sftx.errors import ConfigError, one_line
from sftx.trainer.optimizers import SGD, Lion, SplitAdamW
from sftx.trainer.parameter_groups import TrainableParam, groups

Kind = Callable[[TrainConfig, Sequence[TrainableParam]], list[Optimizer]]


def build(config: TrainConfig, members: Sequence[TrainableParam]) -> list[Optimizer]:
    """Raises ConfigError for what this machine, these parameters or these options do not allow."""
    if config.momentum is not None and config.optim not in ("sgd", "muon"):
        raise ConfigError(f"option 'train.momentum': {config.optim} has none; leave it out, or use sgd or muon")
    return _KINDS[config.optim](config, members)


def _adam_options(config: TrainConfig) -> dict[str, Any]:
    return {"lr": config.learning_rate, "betas": _betas(config, 0.999), "eps": config.adam_epsilon}


def _betas(config: TrainConfig, second: float) -> tuple[float, float]:
    """`second`: by default."""
    return config.adam_beta1, second if config.adam_beta2 is None else config.adam_beta2


def _adamw(config: TrainConfig, members: Sequence[TrainableParam]) -> list[Optimizer]:
    # Fused on a CPU too, where the update of SmolLM2-135M took 0.2 s, and one by one or foreach 1.0 s (one core).
    return [AdamW(groups(members, config.weight_decay), **_adam_options(config), fused=True)]


def _bitsandbytes(config: TrainConfig, members: Sequence[TrainableParam]) -> list[Optimizer]:
    """The embedding's state is kept in 32 bits, as its makers advise: few of its rows get a gradient in a step."""
    paged, eight_bits = config.optim.startswith("paged"), config.optim.endswith("8bit")
    if paged and members[0].parameter.device.type != "cuda":
        instead = config.optim.removeprefix("paged_")
        raise ConfigError(f"option 'train.optim': {config.optim} needs a GPU, whose memory it pages; use {instead}")
    try:
        library = importlib.import_module("bitsandbytes.optim")
    except ImportError as error:
        raise ConfigError(
            f"option 'train.optim': {config.optim} is bitsandbytes', which cannot be imported ({one_line(error)}); "
            "pip install bitsandbytes, or use adamw"
        ) from error
    name = "PagedAdamW" if paged else "AdamW"
    in_32 = [one for one in members if one.is_embedding or not eight_bits]
    in_8 = [one for one in members if not (one.is_embedding or not eight_bits)]
    return [
        getattr(library, cls)(groups(chosen, config.weight_decay), **_adam_options(config))
        for cls, chosen in ((f"{name}8bit", in_8), (name, in_32))
        if chosen
    ]


def _adafactor(config: TrainConfig, members: Sequence[TrainableParam]) -> list[Optimizer]:
    """As transformers' Trainer sets it up: the rate is the schedule's, an update's RMS at most 1, no first moment.

    Not torch's, which always multiplies the rate with the parameter's own RMS: LoRA's B, which begins as zero, would
    move by a thousandth of the rate, and rates that suit AdamW would train nothing.
    """
    from transformers.optimization import Adafactor

    options = {"scale_parameter": False, "relative_step": False}
    return [Adafactor(groups(members, config.weight_decay), lr=config.learning_rate, **options)]


def _lion(config: TrainConfig, members: Sequence[TrainableParam]) -> list[Optimizer]:
    betas = _betas(config, 0.99)  # its authors' default
    return [Lion(groups(members, config.weight_decay), lr=config.learning_rate, betas=betas)]


def _sgd(config: TrainConfig, members: Sequence[TrainableParam]) -> list[Optimizer]:
    return [SGD(groups(members, config.weight_decay), lr=config.learning_rate, momentum=config.momentum or 0.0)]


def _muon(config: TrainConfig, members: Sequence[TrainableParam]) -> list[Optimizer]:
    """Matrices within the model by Muon, its update scaled to AdamW's RMS, so that AdamW's rates and decay suit both.

    Embedding, head, vectors and stacked experts by AdamW. (Jordan 2024, https://kellerjordan.github.io/posts/muon;
    the scale: Liu et al. 2025, https://arxiv.org/abs/2502.16982, section 2.2.)
    """
    hidden = [one for one in members if one.parameter.ndim == 2 and not (one.is_embedding or one.is_head)]
    if not hidden:
        raise ConfigError("option 'train.optim': muon trains the layers' matrices, and none trains here; use adamw")
    muon = Muon(
        groups(hidden, config.weight_decay),
        lr=config.learning_rate,
        momentum=0.95 if config.momentum is None else config.momentum,
        adjust_lr_fn="match_rms_adamw",
    )
    chosen = {one.name for one in hidden}
    others = [one for one in members if one.name not in chosen]
    return [muon, *(_adamw(config, others) if others else [])]


def _split_adamw(config: TrainConfig, members: Sequence[TrainableParam]) -> list[Optimizer]:
    other = next((one for one in members if one.parameter.dtype != torch.bfloat16), None)
    if other is not None:
        raise ConfigError(
            f"option 'train.optim': {config.optim} is for full fine-tuning with bf16, whose weights it keeps in "
            f"bfloat16; {other.name} trains in {str(other.parameter.dtype).removeprefix('torch.')}; use adamw"
        )
    return [SplitAdamW(groups(members, config.weight_decay), **_adam_options(config))]


_KINDS: Final[dict[str, Kind]] = {
    "adamw": _adamw,
    "adamw_8bit": _bitsandbytes,
    "paged_adamw": _bitsandbytes,
    "paged_adamw_8bit": _bitsandbytes,
    "adafactor": _adafactor,
    "lion": _lion,
    "sgd": _sgd,
    "muon": _muon,
    "adamw_bf16": _split_adamw,
}
