"""The contract of an optimizer: it trains every parameter it is given, at the rate of its group, and can be resumed.

Dimensions: V tokens of a vocabulary, D hidden.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Final

import torch
from safetensors.torch import load, save
from torch import Tensor, nn

from sftx.assembly.stages.optimizer_stages import OptimizerStage
from sftx.errors import PluginError
from sftx.testing.clauses import ClauseError, ExemptError, Suite
from sftx.testing.kit import Kit, make_stage, run_info
from sftx.testing.observer_case import workplace
from sftx.testing.process import process
from sftx.trainer.optimizer import RunOptimizer
from sftx.types import TrainableParam

_SHAPES: Final[Mapping[str, tuple[int, ...]]] = {
    "embed_tokens.weight": (32, 128),
    "layers.0.proj.weight": (128, 128),
    "layers.0.norm.weight": (128,),
    "layers.1.proj.weight": (128, 128),
    "lm_head.weight": (32, 128),
}
"""Parameters of a small model, with the shapes that optimizers tell apart. Its matrices are large enough for 8 bits."""
_RATE: Final = 1e-2
_RATES: Final = (0.1, 1e-2, 1e-3, 1e-4)
_NUM_STEPS: Final = 6


class _Case:
    def __init__(self, kit: Kit) -> None:
        self._plugin = kit.plugin
        self.stage = self.make()
        # A plugin that needs a GPU is checked on one, where there is one.
        self.device = torch.device("cuda" if self.stage.needs_gpu and torch.cuda.is_available() else "cpu")

    def make(self, **train: float) -> OptimizerStage:
        """Return the plugin's builder in a run with these options of train."""
        with workplace() as directory:
            run = run_info(directory)
            config = {**run.config, "train": {**run.config["train"], **train}}
            made = make_stage(self._plugin, "sftx_optimizer", run=type(run)(run.output_dir, config))
            return OptimizerStage("the optimizer", made, "the optimizer")

    def params(self, scale: Callable[[str], float] = lambda name: 1.0) -> list[TrainableParam]:
        """Return new parameters, the same each time, with their scales."""
        generator = torch.Generator().manual_seed(0)
        dtype = torch.bfloat16 if self.stage.bf16_weights else torch.float32
        made = []
        for name, shape in _SHAPES.items():
            start = torch.randn(shape, generator=generator) * 0.1 + (len(shape) == 1)
            parameter = nn.Parameter(start.to(self.device, dtype))
            made.append(TrainableParam(name, parameter, scale(name), "embed" in name, "head" in name))
        return made

    def build(self, params: Sequence[TrainableParam], **train: float) -> RunOptimizer:
        """Build the optimizer of these parameters. Raises ExemptError, in every clause, where a GPU is missing."""
        if self.stage.needs_gpu and self.device.type == "cpu":
            raise ExemptError("it needs a GPU, and this machine has none")
        return RunOptimizer(params, self.make(**train) if train else self.stage)

    def after(
        self,
        num_steps: int,
        *,
        rate: float = _RATE,
        scale: Callable[[str], float] = lambda name: 1.0,
        gradient: Callable[[int, TrainableParam], Tensor | None] | None = None,
        **train: float,
    ) -> dict[str, Tensor]:
        """Return the parameters after so many steps."""
        params = self.params(scale)
        self.advance(self.build(params, **train), params, range(num_steps), rate=rate, gradient=gradient)
        return values(params)

    def advance(
        self,
        optimizer: RunOptimizer,
        params: Sequence[TrainableParam],
        steps: range,
        *,
        rate: float = _RATE,
        gradient: Callable[[int, TrainableParam], Tensor | None] | None = None,
    ) -> None:
        for step in steps:
            optimizer.set_learning_rate(rate)
            for number, param in enumerate(params):
                param.parameter.grad = (gradient or random_gradient)(step * len(params) + number, param)
            optimizer.step()


def random_gradient(number: int, param: TrainableParam) -> Tensor:
    """Return normal numbers, a pure function of `number`."""
    parameter = param.parameter
    drawn = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(number))
    return drawn.to(parameter.device, parameter.dtype)


def values(params: Sequence[TrainableParam]) -> dict[str, Tensor]:
    return {param.name: param.parameter.detach().cpu().clone() for param in params}


def changed(before: Mapping[str, Tensor], after: Mapping[str, Tensor]) -> list[str]:
    return [name for name, value in before.items() if not torch.equal(value, after[name])]


SUITE: Suite[_Case] = Suite("optimizer", _Case)


@SUITE.clause("It builds torch optimizers that have every parameter once, with its scale, and state that can be saved.")
def builds(case: _Case) -> None:
    def scale(name: str) -> float:
        return 2.0 if "proj" in name else 1.0

    try:
        case.after(1)
        scales = []
        for params in (case.params(), case.params(scale)):
            groups = [group for optimizer in case.build(params).optimizers for group in optimizer.param_groups]
            by_id = {id(p): group["scale"] for group in groups for p in group["params"]}
            scales.append({param.name: by_id[id(param.parameter)] for param in params})
    except PluginError as error:
        raise ClauseError(f"{error}; sftx.parameter_groups(params, weight_decay) makes the groups") from error
    wrong = [name for name in _SHAPES if scales[1][name] != scales[0][name] * scale(name)]
    if wrong:
        raise ClauseError(
            f"{wrong[0]} has the scale {scale(wrong[0])}, its group {scales[1][wrong[0]]:g}; make the groups with "
            "sftx.parameter_groups(params, weight_decay)"
        )


@SUITE.clause("It lowers a loss on a small problem.", needs=["builds"])
def lowers_a_loss(case: _Case) -> None:
    targets = values(case.params())
    targets = {name: value.float().roll(1, 0).to(case.device) for name, value in targets.items()}

    def loss(params: Sequence[TrainableParam]) -> Tensor:
        return torch.stack([(p.parameter.float() - targets[p.name]).square().sum() for p in params]).sum() / 2

    def gradient(number: int, param: TrainableParam) -> Tensor:
        return (param.parameter.detach().float() - targets[param.name]).to(param.parameter.dtype)

    seen, before = [], loss(case.params()).item()
    for rate in _RATES:
        params = case.params()
        case.advance(case.build(params, weight_decay=0.0), params, range(30), rate=rate, gradient=gradient)
        if (after := loss(params).item()) < 0.999 * before:
            return
        seen.append(f"{after:g} at {rate:g}")
    raise ClauseError(f"30 steps on a square took the loss from {before:g} to {', '.join(seen)}; follow -gradient")


@SUITE.clause("A step changes every parameter that has a gradient.", needs=["builds"])
def updates_every_parameter(case: _Case) -> None:
    after = case.after(_NUM_STEPS, rate=0.1)
    if same := sorted(set(_SHAPES) - set(changed(values(case.params()), after))):
        raise ClauseError(f"after {_NUM_STEPS} steps {same[0]} is what it was; update all parameters of all groups")


@SUITE.clause("A parameter without a gradient is not touched, nor decayed.", needs=["updates-every-parameter"])
def skips_what_has_no_gradient(case: _Case) -> None:
    without = "layers.0.proj.weight"

    def gradient(number: int, param: TrainableParam) -> Tensor | None:
        return None if param.name == without else random_gradient(number, param)

    try:
        after = case.after(2, gradient=gradient, weight_decay=0.1)
    except PluginError as error:
        raise ClauseError(f"a parameter whose grad is None: {error}; skip it") from error
    if without in changed(values(case.params()), after):
        raise ClauseError(f"{without} has no gradient and was changed; skip parameters whose grad is None")


@SUITE.clause("With gradients of 0 and without weight decay nothing changes.", needs=["updates-every-parameter"])
def rests(case: _Case) -> None:
    after = case.after(2, gradient=lambda _, param: torch.zeros_like(param.parameter), weight_decay=0.0)
    if moved := changed(values(case.params()), after):
        raise ClauseError(f"{moved[0]} moved by a gradient of 0; decay by train.weight_decay alone, and add no noise")


@SUITE.clause("A scale of 2 acts as twice the learning rate.", needs=["updates-every-parameter"])
def obeys_its_scale(case: _Case) -> None:
    once, twice = case.after(_NUM_STEPS), case.after(_NUM_STEPS, rate=2 * _RATE)
    scaled = case.after(_NUM_STEPS, scale=lambda name: 2.0)
    if same := sorted(set(_SHAPES) - set(changed(once, twice))):
        raise ClauseError(f"twice the rate moves {same[0]} just as far; read the rate from group['lr'] in each step")
    if other := changed(twice, scaled):
        raise ClauseError(f"{other[0]} with a scale of 2 is not as with twice the rate; read group['lr'] in each step")


@SUITE.clause("The same gradients lead to the same parameters.", needs=["builds"])
def repeats(case: _Case) -> None:
    if other := changed(case.after(_NUM_STEPS), case.after(_NUM_STEPS)):
        raise ClauseError(f"{other[0]} differs from one run to the next; draw no random numbers, keep no global state")


@SUITE.clause("It goes on from a checkpoint bit for bit.", needs=["repeats"])
def resumes(case: _Case) -> None:
    straight, params = case.after(_NUM_STEPS), case.params()
    optimizer = case.build(params)
    case.advance(optimizer, params, range(_NUM_STEPS // 2))
    tensors, described = optimizer.state_dict()
    saved = save({name: value.contiguous() for name, value in tensors.items()}), json.dumps(described)
    again = case.params()
    for new, old in zip(again, params, strict=True):
        new.parameter.data.copy_(old.parameter.data)
    resumed = RunOptimizer(again, case.make())
    resumed.load_state_dict(load(saved[0]), json.loads(saved[1]))
    case.advance(resumed, again, range(_NUM_STEPS // 2, _NUM_STEPS))
    if other := changed(straight, values(again)):
        raise ClauseError(
            f"continued after {_NUM_STEPS // 2} of {_NUM_STEPS} steps {other[0]} differs; keep all state in "
            "self.state[parameter], as tensors of the parameter's shape and numbers"
        )


@SUITE.clause("What it declares as `state_bytes` is about what its state takes.", needs=["builds"])
def declares_its_state(case: _Case) -> None:
    params = case.params()
    optimizer = case.build(params)
    case.advance(optimizer, params, range(1))
    tensors, _ = optimizer.state_dict()
    measured = sum(value.nbytes for value in tensors.values()) / sum(param.parameter.numel() for param in params)
    declared = case.stage.state_bytes
    if abs(measured - declared) > max(1.0, declared / 4):
        raise ClauseError(
            f"its state has {measured:.3g} bytes a parameter, and state_bytes is {declared:g}; sftx plan reads it"
        )


@SUITE.clause(
    "If it declares to be `elementwise`, it updates two halves of a parameter as it does the whole.", needs=["repeats"]
)
def is_elementwise(case: _Case) -> None:
    if not case.stage.elementwise:
        raise ExemptError("it does not declare to be elementwise, so fsdp2 gives it adapters alone")
    whole, params = case.after(_NUM_STEPS), case.params()
    halves = [
        TrainableParam(f"{param.name}/{part}", nn.Parameter(half.clone()), 1.0, param.is_embedding, param.is_head)
        for param in params
        for part, half in enumerate(param.parameter.detach().chunk(2))
    ]

    def gradient(number: int, half: TrainableParam) -> Tensor:
        name, _, part = half.name.partition("/")
        step, place = number // len(halves), [param.name for param in params].index(name)
        return random_gradient(step * len(params) + place, params[place]).chunk(2)[int(part)].clone()

    case.advance(case.build(halves), halves, range(_NUM_STEPS), gradient=gradient)
    updated = values(halves)
    for name, expected in whole.items():
        joined = torch.cat([updated[f"{name}/{part}"] for part in range(2)])
        if not torch.allclose(joined, expected, rtol=1e-6, atol=1e-7):
            raise ClauseError(
                f"{name} in two halves is updated by other numbers than as a whole; set elementwise to False, or use "
                "no norm, mean or shape of a parameter"
            )


@SUITE.clause(
    "It does not change random state, torch's modes, signal handlers or other state of the process.", needs=["builds"]
)
def leaves_the_process(case: _Case) -> None:
    before = process()
    case.after(2)
    if found := [name for name, value in process().items() if before.get(name) != value]:
        raise ClauseError(f"it changed {found[0]}; a run with it would not be the same after a resume")


def check_optimizer(plugin: object) -> None:
    """Check the plugin's optimizer. Raises ContractError, which names the broken clauses."""
    SUITE.check(plugin)
