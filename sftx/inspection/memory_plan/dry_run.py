"""Dry runs of a training step on fake tensors, which give the memory that the step needs.

The model is its skeleton, with adapters attached and layers prepared as for training; batch, loss, backward, clipping
and optimizer are the run's own code. Fake tensors are on the CPU; for a GPU, the rules that differ there replace those
of the CPU.

Decoder layers that are all alike each add the same bytes to every phase of a step. So forward and backward run with
three and with four of them, and what the fourth adds is added once for each further layer: this is exact, and a model
of 80 layers takes no longer than one of 5. The optimizer's update runs with all layers.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Final, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensorMode,
    UnsupportedFakeTensorException,
    unset_fake_temporarily,
)
from transformers import DynamicCache, PreTrainedModel

from sftx.assembly.registry import Assembly
from sftx.assembly.stages.loss_stage import LossStage
from sftx.assembly.stages.optimizer_stages import OptimizerStage
from sftx.config.options import TrainConfig
from sftx.errors import ConfigError, ModelError, PluginError, one_line
from sftx.inspection.memory_plan.fake_tensors import (
    BLANK,
    FakeStepTracker,
    gpu_products,
    make_batch,
    materialise,
    to_fake_batch,
    track_phases,
)
from sftx.inspection.memory_plan.memory_tracker import MemorySnapshot, MemoryTracker, Phase
from sftx.model.decoding import next_token_logits
from sftx.model.language_model import CausalLM
from sftx.model.load import load_spec
from sftx.model.names import quantization_of
from sftx.model.quantised import num_weights, quantize_of, replace_quantised, stored_quantize
from sftx.trainer.layers import decoder_layers, prepare_layers
from sftx.trainer.optimizer import RunOptimizer
from sftx.trainer.parallel import TrainStep
from sftx.trainer.parameter_groups import trainable_params
from sftx.trainer.precision import Precision
from sftx.types import Batch, Example, ModelSpec

_FAKE_TENSOR_ERRORS: Final = (
    DataDependentOutputException,
    DynamicOutputShapeException,
    UnsupportedFakeTensorException,
)
_FEW_LAYERS: Final = 3
"""The fewest layers that include the first, the second, the last but one and the last."""


class ModelSize(NamedTuple):
    """Sizes of the whole model; tied parameters count once."""

    num_parameters: int
    num_trainable: int
    num_active: int
    """Parameters that one token is multiplied with: of the stacked experts, those that a router chooses."""
    trainable_bytes: int
    sharded_outside_bytes: int
    """Bytes that FSDP2 shards outside the decoder's layers: embedding, head and final norm."""
    sharded_layer_bytes: int
    """Bytes that FSDP2 shards of the largest layer. What adapters train is not sharded."""
    trained_outside_bytes: int
    """Those of the bytes outside of the layers that train."""
    trained_embedding_bytes: int
    """Those of the input embedding that train: its gradient is the last to be computed, tied or not."""
    max_positions: int | None
    """The model's maximum length in tokens, if its configuration has one."""
    num_layers: int
    has_equal_layers: bool
    has_adapters: bool
    untrained_parts: tuple[str, ...]
    """A line for each kind of weights that the run leaves as they are, and how much of them adapters reach."""


class _UpdateMemory(NamedTuple):
    peak: MemorySnapshot
    after: MemorySnapshot


@dataclass
class DryRunner:
    """Makes dry runs of one run for one kind of device; the options may vary. Raises SftxError as the run would."""

    assembly: Assembly
    optimizer: OptimizerStage
    precision: Precision
    model: str
    trust_remote_code: bool = False
    on_gpu: bool = False
    group: Sequence[Example] = (BLANK,)
    """The examples that one record becomes, of which each batch has copies."""
    declared_state: str = ""
    """Says so, where the optimizer's state is as the plugin declares it, because its step cannot be followed."""
    _updates: dict[bool, _UpdateMemory] = field(default_factory=dict)

    @cached_property
    def spec(self) -> ModelSpec:
        return load_spec(self.model, trust_remote_code=self.trust_remote_code)

    @cached_property
    def _trainable(self) -> frozenset[str] | None:
        return self.assembly.trainable(self.spec)

    @cached_property
    def size(self) -> ModelSize:
        with torch.device("meta"):
            lm = self.build(self.copy_skeleton())
            trained, layers = [p for p in lm.parameters() if p.requires_grad], decoder_layers(lm.model)
            sharded = {id(p) for p in lm.parameters() if not (p.requires_grad and lm.adapters)}
            layer_bytes = [_num_bytes([p for p in layer.parameters() if id(p) in sharded]) for layer in layers]
            structures = [(_structure(layer), [p.requires_grad for p in layer.parameters()]) for layer in layers]
            in_layers = {id(p) for layer in layers for p in layer.parameters()}
            embedding = {id(p) for p in lm.model.get_input_embeddings().parameters()}
            trained_outside = [p for p in trained if id(p) in sharded - in_layers]
            return ModelSize(
                num_parameters=num_weights(lm.parameters()),
                num_trainable=sum(p.numel() for p in trained),
                num_active=_num_active(lm),
                trainable_bytes=_num_bytes(trained),
                sharded_outside_bytes=_num_bytes([p for p in lm.parameters() if id(p) in sharded]) - sum(layer_bytes),
                sharded_layer_bytes=max(layer_bytes, default=0),
                trained_outside_bytes=_num_bytes(trained_outside),
                trained_embedding_bytes=_num_bytes([p for p in trained_outside if id(p) in embedding]),
                max_positions=getattr(lm.config, "max_position_embeddings", None),
                num_layers=len(layers),
                has_equal_layers=_layer_list(lm.model) is not None and all(s == structures[0] for s in structures),
                has_adapters=bool(lm.adapters),
                untrained_parts=(*lm.untrained_parts(), *([lm.reach] if lm.reach else [])),
            )

    def num_tokens(self, rows: int, max_length: int) -> int:
        """Return the number of positions of a batch, padding included."""
        return self._make_batch(rows, max_length, self.assembly.loss()).input_ids_BT.numel()

    def update_peak(self, config: TrainConfig) -> MemorySnapshot:
        """Return the peak of the first optimizer update, which creates the optimizer's state."""
        return self._update(config).peak

    def step_peaks(self, config: TrainConfig, *, rows: int, max_length: int) -> list[MemorySnapshot]:
        """Return the peak of each phase of forward and backward after an update.

        The batch has `rows` rows of `max_length` tokens, all of them label tokens.
        """
        return self._of_all_layers(config, lambda layers: self._phase_peaks(config, rows, max_length, layers))

    def evaluation_peaks(self, config: TrainConfig, *, max_length: int) -> list[MemorySnapshot]:
        """Return the peak of each phase of the forward of a held-out batch, whose rows have `max_length` tokens."""

        def forward(lm: CausalLM, mode: FakeTensorMode, tracker: MemoryTracker) -> None:
            with unset_fake_temporarily():
                loss = self.assembly.loss()
                real = self._make_batch(config.per_device_eval_batch_size, max_length, loss)
            batch = _with_precomputed(loss, lm, to_fake_batch(mode, real))
            tracker.reset_peaks()
            TrainStep(lm, loss)(batch)

        return self._without_gradients(config, forward)

    def answer_peaks(
        self, config: TrainConfig, *, rows: int, prompt_length: int, max_new_tokens: int
    ) -> list[MemorySnapshot]:
        """Return the peak of each phase of reading the prompts into the cache, and of writing the last new token."""

        def answer(lm: CausalLM, mode: FakeTensorMode, tracker: MemoryTracker) -> None:
            decoder = cast(Any, lm.model).get_decoder()
            cache = DynamicCache(config=lm.model.config.get_text_config())
            tracker.reset_peaks()
            mask_BT = torch.ones(rows, prompt_length + max_new_tokens - 1, dtype=torch.int64)
            prompt_BT, prompt_mask_BT = torch.zeros_like(mask_BT[:, :prompt_length]), mask_BT[:, :prompt_length]
            out = decoder(prompt_BT, attention_mask=prompt_mask_BT, past_key_values=cache, use_cache=True)
            next_token_logits(lm, out.last_hidden_state[:, -1].contiguous())
            del out
            tracker.enter_phase(Phase("start", 1))
            if max_new_tokens > 2:
                _grow(cache, max_new_tokens - 2)  # as after all new tokens but one
            out = decoder(prompt_BT[:, :1], attention_mask=mask_BT, past_key_values=cache, use_cache=True)
            next_token_logits(lm, out.last_hidden_state[:, -1].contiguous())

        return self._without_gradients(config, answer)

    def _without_gradients(
        self, config: TrainConfig, work: Callable[[CausalLM, FakeTensorMode, MemoryTracker], None]
    ) -> list[MemorySnapshot]:
        """Return the peaks of `work` in evaluation mode, while the last step's gradients and optimizer state remain."""

        def measure(num_layers: int | None) -> dict[Phase, MemorySnapshot]:
            skeleton = self.copy_skeleton(num_layers)
            with self._fake_step() as (mode, tracker):
                lm = self.build(skeleton).eval()
                tracker.track([*lm.parameters(), *lm.buffers()], "weights")
                track_phases(tracker, decoder_layers(lm.model))
                with (
                    torch.no_grad(),
                    self.precision.autocast(),
                    self._explain_unknown_operations(),
                    warnings.catch_warnings(action="ignore", category=FutureWarning),  # transformers changes names
                ):
                    work(lm, mode, tracker)
                return tracker.peaks

        gradients = self.size.trainable_bytes
        return [peak | {"gradients": gradients} for peak in self._of_all_layers(config, measure)]

    def _of_all_layers(
        self, config: TrainConfig, measure: Callable[[int | None], dict[Phase, MemorySnapshot]]
    ) -> list[MemorySnapshot]:
        """Return the peaks with all layers, from those with few where all are alike, and with the optimizer's state."""
        num_layers, peaks = self.size.num_layers, None
        if self.size.has_equal_layers and num_layers > _FEW_LAYERS + 1:
            with contextlib.suppress(ConfigError):  # options may name a later layer
                peaks = _extrapolate(measure(_FEW_LAYERS), measure(_FEW_LAYERS + 1), num_layers)
        if peaks is None:
            peaks = list(measure(None).values())
        state = self._update(config).after["optimizer"]
        return [peak | {"optimizer": peak["optimizer"] + state} for peak in peaks]

    def _make_batch(self, rows: int, max_length: int, loss: LossStage) -> Batch:
        """Return a batch with all extras that are made on the host."""
        batch = make_batch(self.assembly.collator(max_length), rows, max_length, self.group)
        loss.prepare(batch.examples)
        return loss.with_extras(batch)

    def _update(self, config: TrainConfig) -> _UpdateMemory:
        # With several micro-batches gradients stay allocated between them, since later ones add to the first.
        key = (config.gradient_accumulation_steps or 1) == 1
        if key not in self._updates:
            with torch.device("meta"):  # adapters are built ten times as fast as from fake tensors
                lm = self.build(self.copy_skeleton())
            with self._fake_step() as (_, tracker):
                materialise(lm)
                tracker.track([*lm.parameters(), *lm.buffers()], "weights")
                params = trainable_params(lm, config)
                optimizer, trained = RunOptimizer(params, self.optimizer), [param.parameter for param in params]
                _allocate_gradients(tracker, trained)
                tracker.reset_peaks()
                with tracker.allocating("optimizer"):
                    nn.utils.clip_grad_norm_(trained, config.max_grad_norm or math.inf)
                    allocated = dict(tracker.current)
                    try:
                        optimizer.step()
                        self._updates[key] = _UpdateMemory(tracker.peak, dict(tracker.current))
                    except PluginError as error:
                        if error.__cause__ is None:  # a refusal, as in a run
                            raise
                        # The step of another optimizer than ours may need values, which fake tensors do not have.
                        declared, cause = self.optimizer.state_bytes, one_line(error.__cause__, max_chars=80)
                        self.declared_state = (
                            f"{declared:g} bytes of optimizer state a parameter, as {self.optimizer} declares: "
                            f"sftx plan cannot follow its step ({cause})"
                        )
                        state = round(declared * sum(p.numel() for p in trained))
                        after = allocated | {"optimizer": state}
                        self._updates[key] = _UpdateMemory(after, after)
        return self._updates[key]

    def _phase_peaks(
        self, config: TrainConfig, rows: int, max_length: int, num_layers: int | None
    ) -> dict[Phase, MemorySnapshot]:
        """Return the peak of each phase of forward and backward with so many layers, or with all."""
        loss = self.assembly.loss()
        batch = self._make_batch(rows, max_length, loss)
        skeleton = self.copy_skeleton(num_layers)
        with self._fake_step() as (mode, tracker):
            lm = self.build(skeleton)
            tracker.track([*lm.parameters(), *lm.buffers()], "weights")
            trained = [p for p in lm.parameters() if p.requires_grad]
            prepare_layers(lm.model, config)
            track_phases(tracker, decoder_layers(lm.model))
            step = TrainStep(lm.train(), loss)
            if (config.gradient_accumulation_steps or 1) > 1:
                _allocate_gradients(tracker, trained)
            batch = to_fake_batch(mode, batch)
            with self.precision.autocast(), self._explain_unknown_operations():
                batch = _with_precomputed(loss, lm, batch)
            tracker.reset_peaks()
            with self.precision.autocast(), self._explain_unknown_operations():
                out = step(batch)
            for parameter in trained:
                parameter.register_post_accumulate_grad_hook(
                    lambda p: tracker.track([cast(Tensor, p.grad)], "gradients")
                )
            objective = out.sum if out.aux_loss is None else out.sum + out.aux_loss
            del out
            objective.backward()
            return tracker.peaks

    @contextmanager
    def _explain_unknown_operations(self) -> Iterator[None]:
        """Turn an error of fake tensors into a ModelError: no plugin is at fault when the model's code needs values."""
        try:
            yield
        except Exception as error:
            chain = [error, error.__cause__]
            if not any(isinstance(one, _FAKE_TENSOR_ERRORS) for one in chain):
                raise
            raise ModelError(
                f"model {self.model}: sftx plan cannot follow its forward, which depends on the values of tensors: "
                f"{one_line(error.__cause__ or error)}; sftx run may train it all the same"
            ) from error

    @contextmanager
    def _fake_step(self) -> Iterator[tuple[FakeTensorMode, MemoryTracker]]:
        tracker = FakeStepTracker(on_gpu=self.on_gpu)
        with FakeTensorMode(allow_non_fake_inputs=True) as mode, tracker, gpu_products(self.on_gpu):
            yield mode, tracker

    def copy_skeleton(self, num_layers: int | None = None) -> PreTrainedModel:
        """Return a copy of the model without weights, with its first layers alone if a number is given."""
        model = copy.deepcopy(self.spec.skeleton)
        if num_layers is not None:
            del cast(nn.ModuleList, _layer_list(model))[num_layers:]
            cast(Any, model.config).get_text_config().num_hidden_layers = num_layers
        return model

    def build(self, model: PreTrainedModel, device: torch.device | None = None) -> CausalLM:
        """Return the model with its adapters, materialised on the device, by default the default device."""
        adapters = self.assembly.adapters(dataclasses.replace(self.spec, skeleton=model))
        stored = quantization_of(self.spec.config.to_dict())
        if stored.get("quant_method") == "bitsandbytes":
            quantize = stored_quantize(stored)
        else:
            quantize = quantize_of(list(adapters.values()))
        with torch.device("meta"):
            replace_quantised(model, quantize)
        with device or contextlib.nullcontext():
            materialise(model, self.precision.base_dtype(frozen=bool(adapters)))
        lm = CausalLM(model, cast(Any, None))
        lm.attach(adapters, self._trainable)
        return lm


def _with_precomputed(loss: LossStage, lm: CausalLM, batch: Batch) -> Batch:
    """Return the batch with what the loss computes of it before the first step, and before the step's backward."""
    with torch.no_grad():
        if loss.has_precompute:
            batch = dataclasses.replace(batch, extras={**batch.extras, **loss.precompute(lm, batch)})
        return dataclasses.replace(batch, statistics=loss.statistics(lm, batch)) if loss.has_statistics else batch


def _extrapolate(
    few: dict[Phase, MemorySnapshot], more: dict[Phase, MemorySnapshot], num_layers: int
) -> list[MemorySnapshot]:
    """Return the peaks of a model of `num_layers` layers from those of `few`, and of `more`, which has one layer more.

    The phases of the first two and of the last two layers suffice: between them, bytes change by the same amount from
    layer to layer, so that none of the layers between has a higher peak than both ends.
    """
    peaks: list[MemorySnapshot] = []
    for phase, snapshot in few.items():
        is_layer = phase.name in ("forward", "backward")
        from_start, from_end = not is_layer or phase.layer <= 1, is_layer and phase.layer >= _FEW_LAYERS - 2
        for shift in [0] * from_start + [1] * from_end:
            with_one_more = more[phase._replace(layer=phase.layer + shift)]
            num_added = num_layers - _FEW_LAYERS
            peaks.append({kind: size + (with_one_more[kind] - size) * num_added for kind, size in snapshot.items()})
    return peaks


def _allocate_gradients(tracker: MemoryTracker, trained: list[nn.Parameter]) -> None:
    for parameter in trained:
        parameter.grad = torch.empty_like(parameter)
    tracker.track([cast(Tensor, parameter.grad) for parameter in trained], "gradients")


def _layer_list(model: Any) -> nn.ModuleList | None:
    """Return the list that holds all decoder layers and nothing else; None if there is no such list."""
    layers = decoder_layers(model)
    lists = (module for module in model.modules() if isinstance(module, nn.ModuleList))
    return next((candidate for candidate in lists if list(candidate) == layers), None)


def _structure(layer: nn.Module) -> list[Any]:
    """Return what decides how many bytes a layer needs: its modules, shapes and plain attributes except its number.

    Private attributes are left out, since adapters keep random seeds there.
    """

    def is_compared(name: str, value: object) -> bool:
        is_excluded = name == "layer_idx" or name.startswith("_")
        return not is_excluded and (value is None or isinstance(value, bool | int | float | str | tuple))

    return [
        (
            name,
            type(module),
            [(key, value) for key, value in vars(module).items() if is_compared(key, value)],
            [(key, p.shape, p.dtype, p.requires_grad) for key, p in module.named_parameters(recurse=False)],
            [(key, buffer.shape, buffer.dtype) for key, buffer in module.named_buffers(recurse=False)],
        )
        for name, module in layer.named_modules()
    ]


def _grow(cache: DynamicCache, num_tokens: int) -> None:
    """Add so many tokens to a cache; layers of linear attention have a state of one size, and stay as they are."""
    for layer in cache.layers:
        keys, values = getattr(layer, "keys", None), getattr(layer, "values", None)
        if isinstance(keys, Tensor) and isinstance(values, Tensor):
            added = (one.new_empty((*one.shape[:-2], num_tokens, one.shape[-1])) for one in (keys, values))
            cast(Any, layer).update(*added)


def _num_active(lm: CausalLM) -> int:
    chosen = getattr(lm.config, "num_experts_per_tok", None)
    stacked = [(n, p) for n, p in lm.named_parameters() if ".experts." in n] if chosen else []
    # Quantised, a stack of experts is one of codes; a linear layer's have this name.
    experts = [p for n, p in stacked if p.ndim == 3 or (p.ndim == 2 and p.dtype == torch.uint8 and "codes" not in n)]
    idle = sum(num_weights([p]) * (1 - min(1, (chosen or 0) / p.shape[0])) for p in experts)
    return num_weights(lm.parameters()) - round(idle)


def _num_bytes(parameters: list[nn.Parameter]) -> int:
    return sum(p.numel() * p.element_size() for p in {id(p): p for p in parameters}.values())
