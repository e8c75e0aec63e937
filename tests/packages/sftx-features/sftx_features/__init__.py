"""Questions about a list of numbers, which the model reads through a trained projector instead of as text.

The parser's conversations begin with a placeholder, one token whose embedding the adapter replaces by the projected
numbers. The collator makes them a tensor. Dimensions: B rows, T tokens, D hidden, F numbers, P placeholders.
"""

from __future__ import annotations

import contextlib
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, ClassVar

from pydantic import Field

from sftx import (
    Adapter,
    Batch,
    Collator,
    ConfigError,
    Conversation,
    DataError,
    Example,
    LanguageModel,
    Location,
    Message,
    ModelError,
    ModelSpec,
    Parser,
    Record,
    Row,
    Step,
    Window,
    hookimpl,
    pack,
    pad,
)

if TYPE_CHECKING:
    from torch import Tensor

FEATURES = "features"
"""The key of a conversation's extras, a list of F numbers, and of a batch's extras, fp32 [P, F]."""
FILE = "projector.safetensors"


@dataclass(frozen=True, eq=False)
class Features:
    """Trains a projector from numbers to the embedding of a placeholder."""

    size: Annotated[int, Field(ge=1, description="Numbers of a row.")] = 4
    placeholder: Annotated[str, Field(min_length=1, description="A text that is one token.")] = "~"
    placeholder_id: Annotated[int, Field(ge=0, description="The id of that token.")] = 96
    packed: Annotated[bool, Field(description="Concatenate the rows of a micro-batch.")] = False

    fields: ClassVar[str] = "features (numbers), question, answer"
    samples: ClassVar[Sequence[Record]] = (
        {"features": [1.0, 0.0, 0.0, 0.0], "question": "Which colour?", "answer": "red"},
        {"features": [0.0, 0.5, -2.0, 0.0], "question": "Which colour is it?", "answer": "blue"},
    )

    @hookimpl
    def sftx_parser(self) -> Parser:
        return self

    @hookimpl
    def sftx_collator(self) -> Collator:
        return self

    @hookimpl
    def sftx_adapter(self, spec: ModelSpec) -> Adapter:
        if spec.new_token_ids:
            raise ConfigError("the rows of added tokens are not trained; leave --add-tokens out")
        return Projector(self.size, self.placeholder_id)

    def accepts(self, record: Record) -> bool:
        return {"features", "question", "answer"} <= record.keys()

    def parse(self, record: Record, where: Location) -> tuple[Conversation, ...]:
        features, question, answer = record.get("features"), record.get("question"), record.get("answer")
        is_numbers = isinstance(features, list) and all(type(value) in (int, float) for value in features)
        if not (is_numbers and isinstance(question, str) and isinstance(answer, str)):
            raise DataError(f"{where}: expected a list of numbers, a question and an answer, both text")
        asked = Message("user", self.placeholder + question)
        return (Conversation((asked, Message("assistant", answer)), extras={FEATURES: features}),)

    def plan(self, window: Window) -> tuple[list[Step], Row]:
        members: dict[int, list[int]] = {}
        for index, group in enumerate(window.groups):
            members.setdefault(group, []).append(index)
        rows = [tuple(indices) for indices in members.values()]
        random.Random(f"features {window.seed} {window.epoch} {window.index}").shuffle(rows)
        size = window.rows_per_step
        end = len(rows) if window.is_last else len(rows) // size * size
        steps = [tuple(rows[at : min(at + size, end)]) for at in range(0, end, size)]
        return steps, tuple(index for row in rows[end:] for index in row)

    def collate(self, examples: Sequence[Example]) -> Batch:
        """Make a batch with the numbers of the examples that have a placeholder. Raises DataError for others."""
        import torch

        batch = pack(examples) if self.packed else pad(examples)
        found = []
        for example in examples:
            features = example.extras.get(FEATURES)
            num = int((example.token_ids == self.placeholder_id).sum())
            if num != (features is not None) or (features is not None and len(features) != self.size):
                given = "no numbers" if features is None else f"{len(features)} numbers"
                raise DataError(f"{example.row_id}: {num} placeholders and {given}, expected 1 and {self.size}")
            found += [] if features is None else [features]
        batch.extras[FEATURES] = torch.tensor(found, dtype=torch.float32).reshape(-1, self.size)
        return batch


class Projector(Adapter):
    """The projector of one model: a linear layer of fp32 beside the decoder."""

    def __init__(self, size: int, placeholder_id: int) -> None:
        self.size = size
        self.placeholder_id = placeholder_id

    def attach(self, lm: LanguageModel) -> None:
        import torch

        hidden = lm.model.config.get_text_config().hidden_size
        device = lm.head_weight.device
        self.linear = torch.nn.Linear(self.size, hidden, device=device, dtype=torch.float32)
        lm.model.add_module("feature_projector", self.linear)

    def embed(self, batch: Batch, embeds_BTD: Tensor) -> Tensor:
        projected_PD = self.linear(batch.extras[FEATURES]).to(embeds_BTD.dtype)
        is_placeholder_BT1 = (batch.input_ids_BT == self.placeholder_id)[..., None]
        return embeds_BTD.masked_scatter(is_placeholder_BT1, projected_PD)

    @contextlib.contextmanager
    def disabled(self) -> Iterator[None]:
        yield  # sftx calls no `embed` then

    def save(self, directory: Path) -> None:
        from safetensors.torch import save_file

        save_file({name: value.detach().contiguous() for name, value in self._state().items()}, directory / FILE)

    def load(self, directory: Path) -> None:
        from safetensors.torch import load_file

        tensors, own = load_file(directory / FILE), self._state()
        for name in tensors.keys() | own.keys():
            if name not in tensors or name not in own or tensors[name].shape != own[name].shape:
                raise ModelError(f"{directory / FILE}: the tensor {name!r} is missing, too many or of another shape")
            own[name].data.copy_(tensors[name])

    def merge(self, lm: LanguageModel) -> None:
        raise ConfigError("a projector is no part of the model's weights; keep it as an adapter")

    def _state(self) -> dict[str, Tensor]:
        return dict(self.linear.named_parameters())
