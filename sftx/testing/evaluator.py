"""The contract of an evaluator: it scores the model by what it computes alone, and leaves everything as it was."""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from sftx.assembly.stages.evaluation_stages import EvaluatorStage
from sftx.assembly.stages.loss_stage import RESERVED_METRICS
from sftx.distributed.process_group import ProcessGroup
from sftx.errors import ConfigError, PluginError
from sftx.model.language_model import CausalLM
from sftx.testing.clauses import ClauseError, ExemptError, Suite
from sftx.testing.kit import Kit, make_stage
from sftx.testing.process import RANDOM, process, random_states_kept, seed_all
from sftx.trainer.evaluation import ModelEvaluation


class _Case:
    def __init__(self, kit: Kit) -> None:
        self._kit = kit
        self.evaluator = EvaluatorStage("the evaluator", make_stage(kit.plugin, "sftx_evaluator"))

    @cached_property
    def lm(self) -> CausalLM:
        return self._kit.language_model()

    def scores(self, *, seed: int = 0, step: int = 1, held_out: bool = True) -> dict[str, float]:
        """Evaluate the tiny model as a run does, after seeding. Raises ClauseError for what a run would refuse."""
        kit = self._kit
        evaluation = ModelEvaluation(
            lm=self.lm.eval(),
            step=step,
            rows=kit.held_out_rows if held_out else [],
            examples=kit.examples if held_out else [],
            encoder=kit.encoder,
            stop_ids=kit.encoder.stop_ids,
            batch_size=8,
            generation_batch_size=8,
            max_new_tokens=4,
            process_group=ProcessGroup(),
        )
        with random_states_kept(), torch.no_grad():
            seed_all(seed)
            try:
                return self.evaluator.named(self.evaluator.evaluate(evaluation))
            except PluginError as error:
                raise ClauseError(f"{error}; return a mapping of names to finite floats") from error


SUITE: Suite[_Case] = Suite("evaluator", _Case)


@SUITE.clause("It returns finite numbers by name, none of them a name that sftx reports itself.")
def scores(case: _Case) -> None:
    reserved = RESERVED_METRICS | {"loss"}
    if names := [name for name in case.scores() if name in reserved]:
        raise ClauseError(f"it reports the score {names[0]!r}, which sftx reports itself; choose another name")


@SUITE.clause(
    "It scores without held-out rows as well, or raises ConfigError, which says that it needs some.", needs=["scores"]
)
def without_rows(case: _Case) -> None:
    try:
        case.scores(held_out=False)
    except ConfigError as error:
        raise ExemptError(f"it needs held-out rows: {error}") from error


@SUITE.clause("The same model has the same scores, whatever the state of the random numbers.", needs=["scores"])
def repeats(case: _Case) -> None:
    first, second = case.scores(seed=0), case.scores(seed=1)
    if first != second:
        raise ClauseError(
            f"the scores were {first} and then {second}; draw random numbers from a generator with a fixed seed, and "
            "keep nothing between two evaluations"
        )


@SUITE.clause("It leaves the model as it was: weights, gradients, modes, settings and hooks.", needs=["scores"])
def leaves_the_model(case: _Case) -> None:
    before = state_of(case.lm.eval())
    case.scores()
    changed = [name for name, value in state_of(case.lm).items() if not equal(value, before.pop(name, None))]
    if changed or before:
        raise ClauseError(f"it changed {(changed or list(before))[0]}; training would go on otherwise")


@SUITE.clause("It does not change torch's modes, signal handlers or other state of the process.", needs=["scores"])
def leaves_the_process(case: _Case) -> None:
    case.scores()  # the first call may import a library, which sets environment variables
    before = process()
    case.scores()
    if changed := [name for name, value in process().items() if name not in RANDOM and before.get(name) != value]:
        raise ClauseError(f"it changed {changed[0]}; a run with it would not be the same as without it")


def state_of(lm: CausalLM) -> dict[str, Any]:
    """Return everything of a model that an evaluator could change, by name."""
    state: dict[str, Any] = {f"the weight {name}": value.clone() for name, value in lm.state_dict().items()}
    for name, parameter in lm.named_parameters():
        state[f"requires_grad of {name}"] = parameter.requires_grad
        state[f"the gradient of {name}"] = None if parameter.grad is None else parameter.grad.clone()
    for name, module in lm.named_modules():
        state[f"the mode of {name or 'the model'}"] = module.training
        hooks: list[Callable[..., object]] = [*module._forward_hooks.values(), *module._forward_pre_hooks.values()]
        state[f"the hooks of {name or 'the model'}"] = hooks
    model: Any = lm.model
    state["the config"] = model.config.to_dict()
    state["the generation config"] = model.generation_config.to_dict()
    state["the chat template"] = lm.tokenizer.chat_template
    return state


def equal(one: Any, other: Any) -> bool:
    if isinstance(one, torch.Tensor) and isinstance(other, torch.Tensor):
        return torch.equal(one, other)
    return bool(one == other)


def check_evaluator(plugin: object, *, model: Path | None = None) -> None:
    """Check the plugin's evaluator on the tiny model, or `model`. Raises ContractError, which names broken clauses."""
    SUITE.check(plugin, model=model)
