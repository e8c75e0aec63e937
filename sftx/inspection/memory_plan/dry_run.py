"""A run's configuration becomes the bytes that its step needs: the step itself, on tensors that have no memory.

The model is its skeleton, with adapters attached and layers prepared as in a run; batch, loss, backward, clipping and
optimizer are the run's own code. torch's fake tensors know shape, dtype and device of each result and nothing else.
They are on the CPU: for a GPU, the rules that differ there are put in their place.

Decoder layers that are all alike add the same bytes each, to every phase of a step. So forward and backward are gone
through with three and with four of them, and what the fourth added is added once for each layer more: exact, and a
model of 80 layers takes no longer than one of 5. The optimizer's update is gone through in full.
"""

from __future__ import annotations

import copy
import dataclasses
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Final, NamedTuple, TypeAlias, cast

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import PreTrainedModel

from sftx.assembly.registry import Assembly
from sftx.config.options import TrainConfig
from sftx.inspection.memory_plan.fake_tensors import (
    Stage,
    gpu_products,
    make_batch,
    mark_phases,
    take_place,
    without_values,
)
from sftx.inspection.memory_plan.memory_tracker import Kind, Phase, Tally
from sftx.model.language_model import LanguageModel
from sftx.model.load import load_spec
from sftx.trainer.layers import decoder_layers, prepare_layers
from sftx.trainer.optimizer import RunOptimizer
from sftx.trainer.parallel import TrainStep
from sftx.trainer.precision import Precision
from sftx.types import ModelSpec

Moment: TypeAlias = dict[Kind, int]
"""Bytes by what they are for, when they are most."""

_FEW: Final = 3
"""Layers that have among them the first, the one after it, the one before the last, and the last."""


class Counts(NamedTuple):
    """Of the whole model. Counts are of numbers, tied ones once."""

    num_parameters: int
    num_trainable: int
    trainable_bytes: int
    shared_outside: int
    """Bytes of what lies outside of the decoder's layers, and of the largest of these, without what adapters train."""
    shared_layer: int
    embedding: int
    """Bytes of the rows that tokens are looked up in: the last that has its gradient, tied or not."""
    longest: int | None
    """Tokens that the model was made for, where its configuration says."""
    depth: int
    alike: bool
    """Whether the decoder's layers are all alike."""


class _Update(NamedTuple):
    peak: Moment
    kept: Moment
    """What stays for the next forward."""


@dataclass
class Rehearsals:
    """Rehearsals of one run, with one kind of device and other options from time to time. Raises SftxError as a run."""

    assembly: Assembly
    precision: Precision
    model: str
    trust_remote_code: bool = False
    on_gpu: bool = False
    _updates: dict[tuple[str, bool], _Update] = field(default_factory=dict)

    @cached_property
    def spec(self) -> ModelSpec:
        return load_spec(self.model, trust_remote_code=self.trust_remote_code)

    @cached_property
    def counts(self) -> Counts:
        with torch.device("meta"):
            lm = self._built(self._skeleton())
            trained, layers = [p for p in lm.parameters() if p.requires_grad], decoder_layers(lm.model)
            shared = {id(p) for p in lm.parameters() if not (p.requires_grad and lm.adapters)}
            sizes = [_bytes([p for p in layer.parameters() if id(p) in shared]) for layer in layers]
            return Counts(
                num_parameters=sum(p.numel() for p in lm.parameters()),
                num_trainable=sum(p.numel() for p in trained),
                trainable_bytes=_bytes(trained),
                shared_outside=_bytes([p for p in lm.parameters() if id(p) in shared]) - sum(sizes),
                shared_layer=max(sizes, default=0),
                embedding=_bytes(list(lm.model.get_input_embeddings().parameters())),
                longest=getattr(lm.config, "max_position_embeddings", None),
                depth=len(layers),
                alike=_container(lm.model) is not None and all(_facts(one) == _facts(layers[0]) for one in layers),
            )

    def update(self, config: TrainConfig) -> Moment:
        """The first update, which makes the optimizer's state."""
        return self._updated(config).peak

    def step(self, config: TrainConfig, *, rows: int, max_length: int) -> list[Moment]:
        """The moments of forward and backward of `rows` rows of `max_length` tokens, all trained, after an update."""
        return self._moments(config, rows, max_length)

    def num_tokens(self, rows: int, max_length: int) -> int:
        """Of a batch, padding too."""
        return make_batch(self.assembly.collator(max_length), rows, max_length).input_ids_BT.numel()

    def _updated(self, config: TrainConfig) -> _Update:
        """With several micro-batches the gradients stay, for those that come after the first add to them."""
        key = (config.optim, (config.gradient_accumulation_steps or 1) == 1)
        if key not in self._updates:
            with torch.device("meta"):  # where adapters are made ten times as fast as of fake tensors
                lm = self._built(self._skeleton())
            with self._stage() as (_, tally):
                take_place(lm)
                tally.count([*lm.parameters(), *lm.buffers()], "weights")
                optimizer, trained = RunOptimizer(lm, config), [p for p in lm.parameters() if p.requires_grad]
                _make_gradients(tally, trained)
                tally.forget()
                with tally.making("optimizer"):
                    nn.utils.clip_grad_norm_(trained, config.max_grad_norm or math.inf)
                    optimizer.step()
                self._updates[key] = _Update(tally.peak, dict(tally.live))
        return self._updates[key]

    def _moments(self, config: TrainConfig, rows: int, max_length: int) -> list[Moment]:
        depth = self.counts.depth
        if self.counts.alike and depth > _FEW + 1:
            few, more = (self._peaks(config, rows, max_length, layers) for layers in (_FEW, _FEW + 1))
            moments = _deeper(few, more, depth)
        else:
            moments = list(self._peaks(config, rows, max_length, None).values())
        state = self._updated(config).kept["optimizer"]
        return [moment | {"optimizer": moment["optimizer"] + state} for moment in moments]

    def _peaks(self, config: TrainConfig, rows: int, max_length: int, depth: int | None) -> dict[Phase, Moment]:
        batch = make_batch(self.assembly.collator(max_length), rows, max_length)
        skeleton = self._skeleton(depth)
        with self._stage() as (mode, tally):
            lm = self._built(skeleton)
            tally.count([*lm.parameters(), *lm.buffers()], "weights")
            trained = [p for p in lm.parameters() if p.requires_grad]
            prepare_layers(lm.model, config)
            mark_phases(tally, decoder_layers(lm.model))
            step = TrainStep(lm.train(), self.assembly.loss())
            if (config.gradient_accumulation_steps or 1) > 1:
                _make_gradients(tally, trained)
            batch = without_values(mode, batch)
            tally.forget()
            with self.precision.autocast():
                out = step(batch)
            _count_arriving(tally, trained)
            objective = out.sum if out.aux_loss is None else out.sum + out.aux_loss
            del out
            objective.backward()
            return tally.peaks

    @contextmanager
    def _stage(self) -> Iterator[tuple[FakeTensorMode, Tally]]:
        tally = Stage(on_gpu=self.on_gpu)
        with FakeTensorMode(allow_non_fake_inputs=True) as mode, tally, gpu_products(self.on_gpu):
            yield mode, tally

    def _skeleton(self, depth: int | None = None) -> PreTrainedModel:
        """A copy of `depth` layers, or of all."""
        model = copy.deepcopy(self.spec.skeleton)
        if depth is not None:
            del cast(nn.ModuleList, _container(model))[depth:]
            cast(Any, model.config).get_text_config().num_hidden_layers = depth
        return model

    def _built(self, model: PreTrainedModel) -> LanguageModel:
        """The model with its adapters, on the default device."""
        adapters = self.assembly.adapters(dataclasses.replace(self.spec, skeleton=model))
        take_place(model, self.precision.base_dtype(frozen=bool(adapters)))
        lm = LanguageModel(model, cast(Any, None))
        lm.attach(adapters)
        return lm


def _deeper(few: dict[Phase, Moment], more: dict[Phase, Moment], depth: int) -> list[Moment]:
    """The same phases in a model of `depth` layers: those of the first two layers, of the last two, and of the rest.

    In between, bytes rise or fall by the same amount from layer to layer, so that none of them has more than an end.
    """
    moments: list[Moment] = []
    for phase, kinds in few.items():
        of_layer = phase.name in ("forward", "backward")
        from_start, from_end = not of_layer or phase.layer <= 1, of_layer and phase.layer >= _FEW - 2
        for shift in [0] * from_start + [1] * from_end:
            added = more[phase._replace(layer=phase.layer + shift)]
            moments.append({kind: size + (added[kind] - size) * (depth - _FEW) for kind, size in kinds.items()})
    return moments


def _make_gradients(tally: Tally, trained: list[nn.Parameter]) -> None:
    for parameter in trained:
        parameter.grad = torch.empty_like(parameter)
    tally.count([cast(Tensor, parameter.grad) for parameter in trained], "gradients")


def _count_arriving(tally: Tally, trained: list[nn.Parameter]) -> None:
    def arrived(parameter: Tensor) -> None:
        tally.count([cast(Tensor, parameter.grad)], "gradients")

    for parameter in trained:
        parameter.register_post_accumulate_grad_hook(arrived)


def _container(model: Any) -> nn.ModuleList | None:
    """The list that has the decoder's layers, all of them and nothing else; None where they lie otherwise."""
    layers = decoder_layers(model)
    lists = (module for module in model.modules() if isinstance(module, nn.ModuleList))
    return next((found for found in lists if list(found) == layers), None)


def _facts(layer: nn.Module) -> list[Any]:
    """What can make a layer need other bytes than its neighbour: modules, shapes, and plain values but its number.

    Private ones are not compared: adapters keep seeds there.
    """
    return [
        (
            name,
            type(module),
            [(key, value) for key, value in vars(module).items() if _is_plain(key, value)],
            [(key, p.shape, p.dtype, p.requires_grad) for key, p in module.named_parameters(recurse=False)],
        )
        for name, module in layer.named_modules()
    ]


def _is_plain(name: str, value: object) -> bool:
    own = name == "layer_idx" or name.startswith("_")
    return not own and (value is None or isinstance(value, bool | int | float | str | tuple))


def _bytes(parameters: list[nn.Parameter]) -> int:
    return sum(p.numel() * p.element_size() for p in {id(p): p for p in parameters}.values())
