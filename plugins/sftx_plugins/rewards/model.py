"""A reward by a trained reward model: a sequence classifier of transformers."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field

from sftx import ConfigError, Reward, RunInfo, hookimpl


@dataclass(frozen=True, eq=False)
class RewardModel:
    """Scores a conversation with its answer by a sequence-classification model, which has its own tokenizer.

    The model's logit is the reward. It is loaded once, on the run's device, and is not trained.
    """

    model: Annotated[
        str, Field(min_length=1, description="Directory or hub id of a sequence-classification model of transformers.")
    ]
    label: Annotated[
        Annotated[int, Field(ge=0, le=2**24)] | str | None,
        Field(description="Number or name of the class whose logit is the reward, of a model that has several."),
    ] = None
    input: Annotated[
        Literal["chat", "pair"],
        Field(
            description="chat: the conversation by the chat template of the model's tokenizer; pair: the prompt and "
            "the answer as two texts, for models without a template."
        ),
    ] = "chat"
    dtype: Annotated[
        Literal["float32", "bfloat16"], Field(description="Of the model's weights and what it computes.")
    ] = "float32"
    batch_size: Annotated[int, Field(ge=1, le=2**20, description="Answers that are scored in one forward.")] = 8
    max_length: Annotated[
        int | None,
        Field(
            ge=8,
            le=2**30,
            description="Longer conversations lose their oldest tokens; by default as long as the model allows.",
        ),
    ] = None

    @hookimpl
    def sftx_validate(self, run: RunInfo) -> None:
        directory = Path(self.model).expanduser()
        is_directory = directory.exists() or self.model.startswith((".", "/", "~"))
        if is_directory and not (directory / "config.json").is_file():
            raise ConfigError(f"option 'model': {directory} has no config.json; give the directory of a reward model")

    @hookimpl
    def sftx_reward(self) -> Reward:
        import torch

        from sftx_plugins.rewards.classifier import Classifier

        directory = Path(self.model).expanduser()
        return Classifier.of(
            str(directory) if directory.exists() else self.model,
            label=self.label,
            input=self.input,
            dtype=getattr(torch, self.dtype),
            batch_size=self.batch_size,
            max_length=self.max_length,
        )
