"""The contract of an adapter: nothing at first, then only what it says, and off again without a trace.

Each clause looks at a model of its own, trained for a few steps, so that one that is broken spoils no other.
Dimensions: B rows, T tokens, V vocabulary.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Final

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from sftx.assembly.stages import make
from sftx.errors import SftxError, one_line
from sftx.model.load import load_spec
from sftx.testing.adapter_case import LEARNING_RATE, STEPS, Case
from sftx.testing.clauses import ClauseError, Suite
from sftx.trainer.layers import enable_checkpointing

_SAME: Final = 1e-6  # the same computation: what differs is rounding
_CLOSE: Final = 1e-5  # the same product in another order of additions, as the start-up check of a run allows
_FORMATS: Final = {".safetensors", ".json"}

SUITE: Suite[Case] = Suite("adapter", Case)


@SUITE.clause("An adapter that was just attached changes no logit.")
def begins_as_identity(case: Case) -> None:
    difference = _difference(case.begun_BTV, case.begun.base.logits_BTV)
    if not difference <= _CLOSE:
        raise ClauseError(
            f"attached and untrained, it changes the logits by {difference:.1e} (relative); initialise what is added "
            "so that it adds nothing, as LoRA does with lora_B = 0"
        )


@SUITE.clause("Whatever requires grad is a parameter of the model and gets a gradient; training it lowers the loss.")
def trains_something(case: Case) -> None:
    model = case.begun
    trainable = model.trainable()
    if not trainable:
        raise ClauseError("no parameter of the model requires grad after attach; add nn.Parameters that do")
    own = {id(parameter) for parameter in model.lm.parameters()}
    strangers = [list(leaf.shape) for leaf in _leaves(model.loss(seed=0)) if id(leaf) not in own]
    if strangers:
        raise ClauseError(
            f"{len(strangers)} tensors that require grad are no parameters of the model (the first has the shape "
            f"{strangers[0]}), so no optimizer sees them; keep them as nn.Parameter in a module of the model"
        )
    training = case.training
    without = [name for name, parameter in trainable.items() if parameter.grad is None]
    if without:
        raise ClauseError(
            f"{len(without)} parameters require grad and get no gradient (first: {without[0]}); use them in the "
            "forward, not detached, or let them not require grad"
        )
    if not training.loss_after < training.loss_before:
        raise ClauseError(
            f"{STEPS} steps of AdamW at {LEARNING_RATE} bring the loss of their batch from "
            f"{training.loss_before:.6g} to {training.loss_after:.6g}; what is trained must reach the output"
        )


@SUITE.clause("Training leaves what does not require grad as it is, bit for bit.", needs=["trains-something"])
def leaves_the_base(case: Case) -> None:
    training = case.training
    after = training.model.state(frozen=True)
    changed = [name for name, value in training.frozen.items() if not _identical(after.get(name), value)]
    if changed:
        raise ClauseError(
            f"training changed {len(changed)} tensors that do not require grad (first: {changed[0]}); change nothing "
            "in a forward, and let what is trained require grad"
        )


_TRAINED: Final = ["trains-something", "leaves-the-base"]


@SUITE.clause(
    "Within disabled() the model computes what it did before; afterwards, also after an error, what it was trained to.",
    needs=["begins-as-identity", *_TRAINED],
)
def disabled_is_the_base(case: Case) -> None:
    model = case.trained()
    trained_BTV = model.logits()

    def stands_aside(where: str) -> None:
        difference = _difference(model.logits(), model.base.logits_BTV)
        if not difference <= _SAME:
            raise ClauseError(
                f"{where} the logits differ from the base's by {difference:.1e} (relative); switch off all that was "
                "added, and put back what was replaced"
            )

    def is_back(where: str) -> None:
        if not _identical(model.logits(), trained_BTV):
            difference = _difference(model.logits(), trained_BTV)
            raise ClauseError(
                f"after {where} the logits differ from the trained ones by {difference:.1e} (relative); put back what "
                "was found, in a `finally`"
            )

    with model.lm.without_adapters():
        stands_aside("within disabled()")
    is_back("disabled()")
    swallowed = True
    try:
        with model.lm.without_adapters():
            raise _InterruptedError
    except _InterruptedError:
        swallowed = False
    is_back("an exception within disabled()")
    if swallowed:
        raise ClauseError("disabled() swallowed an exception that was raised within it; let it pass on")
    with model.lm.without_adapters():
        with model.lm.without_adapters():
            stands_aside("within disabled() twice, one in the other,")
        stands_aside("after an inner disabled(), still within the outer one,")
    is_back("disabled() twice, one in the other,")


class _InterruptedError(RuntimeError):
    """What a clause raises to see who tidies up."""


@SUITE.clause(
    "It is saved as safetensors and JSON and nothing else; saving changes nothing in the model.", needs=_TRAINED
)
def saves_data_only(case: Case) -> None:
    saved = case.saved
    files = sorted(path for path in saved.directory.rglob("*") if path.is_file())
    others = [path.name for path in files if path.suffix not in _FORMATS]
    if others:
        raise ClauseError(
            f"save wrote {', '.join(others)}; who loads a pickle runs its code: write tensors with "
            "safetensors.torch.save_file and everything else as JSON"
        )
    if not any(path.suffix == ".safetensors" for path in files):
        raise ClauseError("save wrote no .safetensors file into the directory; write what was trained there")
    for path in files:
        _read(path)
    after = saved.model.state()
    changed = [name for name, value in saved.state.items() if not _identical(after.get(name), value)]
    if changed or not _identical(saved.model.logits(), saved.logits_BTV):
        what = changed[0] if changed else "the logits"
        raise ClauseError(f"save changed {what}; training goes on after it, so write copies and change nothing")


def _read(path: Path) -> None:
    """Raises ClauseError when the file is not what its name says."""
    try:
        if path.suffix == ".json":
            json.loads(path.read_text(encoding="utf-8"))
        else:
            with safe_open(path, framework="pt") as file:
                file.keys()
    except Exception as error:
        raise ClauseError(f"{path.name}, which save wrote, cannot be read: {one_line(error)}") from error


@SUITE.clause(
    "A new model with a new adapter that loads what was saved gives the same logits, bit for bit, and can train on.",
    needs=[*_TRAINED, "saves-data-only"],
)
def round_trips(case: Case) -> None:
    saved = case.saved
    other = case.attached(seed=1)  # what was drawn while it was attached is no part of what was saved
    begun = set(other.trainable())
    other.adapter.load(saved.directory)
    loaded_BTV = other.logits()
    if not _identical(loaded_BTV, saved.logits_BTV):
        raise ClauseError(
            f"after save and load the logits differ by {_difference(loaded_BTV, saved.logits_BTV):.1e} (relative); "
            "save all that they depend on in the dtype that it has: what was trained, and what was drawn at random and "
            "then frozen"
        )
    if lost := begun - set(other.trainable()):
        raise ClauseError(
            f"after load {len(lost)} parameters no longer require grad (first: {min(lost)}); copy the values into the "
            "parameters that are there (`parameter.data.copy_`)"
        )


@SUITE.clause(
    "Files in which a tensor is missing, one too many, or one of another shape are refused with an SftxError.",
    needs=["saves-data-only", "round-trips"],
)
def loads_strictly(case: Case) -> None:
    adapter = case.attached().adapter
    with tempfile.TemporaryDirectory(prefix="sftx-adapter-") as place:
        shutil.copytree(case.saved.directory, place, dirs_exist_ok=True)
        path = min(Path(place).rglob("*.safetensors"))
        with safe_open(path, framework="pt") as file:
            metadata, tensors = file.metadata(), {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        for what, damaged in _damages(tensors):
            save_file(damaged, path, metadata=metadata)
            try:
                adapter.load(Path(place))
            except SftxError:
                continue
            except Exception as error:
                raise ClauseError(
                    f"load of a file in which {what} raised {type(error).__name__}: {one_line(error)}; raise a "
                    "ModelError that names the file and the tensor"
                ) from error
            raise ClauseError(
                f"load took a file in which {what}; compare names and shapes with the adapter's own, and raise a "
                "ModelError that names the file and the tensor"
            )


def _damages(tensors: Mapping[str, Tensor]) -> Iterator[tuple[str, dict[str, Tensor]]]:
    """What is wrong with the tensors, and the tensors."""
    name = max(tensors, key=lambda name: tensors[name].numel())
    tensor = tensors[name]
    # One row, where there are more: `copy_` would spread it over all of them without a word.
    shorter = tensor.ndim > 0 and len(tensor) > 1
    other = tensor[:1].clone() if shorter else torch.stack([tensor, tensor])
    yield f"{name} is missing", {key: value for key, value in tensors.items() if key != name}
    yield "the tensor 'stranger' is too many", {**tensors, "stranger": tensor.clone()}
    yield f"{name} has the shape {list(other.shape)} for {list(tensor.shape)}", {**tensors, name: other}


@SUITE.clause(
    "merge leaves a plain model: the trained logits, the base's parameter names, and nothing that requires grad.",
    needs=_TRAINED,
)
def merges(case: Case) -> None:
    model = case.trained()
    trained_BTV = model.logits()
    model.adapter.merge(model.lm)
    difference = _difference(model.logits(), trained_BTV)
    # Another order of the same additions: in a deep model the rounding of fp32 alone is more than _CLOSE.
    if not difference <= max(_CLOSE, 4 * case.rounding()):
        raise ClauseError(
            f"merged, the logits differ from the trained ones by {difference:.1e} (relative); fold the whole update "
            "into the weights, formed in fp32, with its scaling"
        )
    names, plain = {name for name, _ in model.lm.model.named_parameters()}, model.base.names
    if names != plain:
        raise ClauseError(
            f"merged, the model has {len(names - plain)} parameters that the base has not and lacks "
            f"{len(plain - names)} (first: {min(names ^ plain)}); put plain modules back under their names"
        )
    if left := model.trainable():
        raise ClauseError(f"merged, {len(left)} parameters require grad still (first: {min(left)}); freeze them")


@SUITE.clause(
    "Whatever is random in a forward derives from lm.seed, so that gradient checkpointing computes the same anew.",
    needs=_TRAINED,
)
def recomputes_the_same(case: Case) -> None:
    model = case.trained()
    first = model.gradients(seed=7, elsewhere=1)
    again = model.gradients(seed=7, elsewhere=2)
    if not all(_identical(again.get(name), value) for name, value in first.items()):
        raise ClauseError(
            "two forwards with the same lm.seed give other gradients; draw from a generator that lm.seed seeds, not "
            "from torch's own, and count nothing from one forward to the next"
        )
    enable_checkpointing(model.lm.model)
    recomputed = model.gradients(seed=7, elsewhere=1)
    difference = _difference(_flat(recomputed), _flat(first))
    if not difference <= _SAME:
        raise ClauseError(
            f"with gradient checkpointing the gradients differ by {difference:.1e} (relative): layers are computed "
            "again in another order, so let a layer draw from lm.seed and its own number, and count nothing"
        )


@SUITE.clause("The hook needs the configuration and the skeleton alone, and leaves the skeleton as it is, on meta.")
def plans_on_meta(case: Case) -> None:
    with tempfile.TemporaryDirectory(prefix="sftx-adapter-") as place:
        shutil.copy(case.kit.model_dir / "config.json", place)
        spec = load_spec(place)
        before = _layout(spec.skeleton)
        try:
            make(case.kit.plugin, "sftx_adapter", spec=spec)
        except Exception as error:
            raise ClauseError(
                f"with a configuration and no weights the hook raised {type(error).__name__}: {one_line(error)}; "
                "weights are there in quantize and attach, not before"
            ) from error
        after = _layout(spec.skeleton)
    changed = sorted(name for name in before.keys() | after.keys() if before.get(name) != after.get(name))
    if changed:
        raise ClauseError(
            f"the hook changed {len(changed)} modules or tensors of spec.skeleton (first: {changed[0]}); only look at "
            "it, and change the model in attach"
        )


@SUITE.clause(
    "Beside an adapter that was attached before it, it refuses with an SftxError or changes no logit.",
    needs=["begins-as-identity"],
)
def keeps_other_adapters(case: Case) -> None:
    model, before_BTV = case.beside_lora()
    try:
        model.adapter.attach(model.lm)
    except SftxError:
        return
    difference = _difference(model.logits(), before_BTV)
    if not difference <= _CLOSE:
        raise ClauseError(
            f"attached after lora, it changes the logits by {difference:.1e} (relative): what lora trained is lost; "
            "refuse layers that have more than weight and bias with sftx.ConfigError, or keep what they compute"
        )


def check_adapter(plugin: object, *, model: Path | None = None) -> None:
    """Holds the plugin's adapter against each clause. Raises ContractError, naming those that it breaks.

    `model`: a directory to check against instead of the tiny model; it is read several times, in fp32 on the CPU.
    """
    SUITE.check(plugin, model=model)


def _difference(got: Tensor, expected: Tensor) -> float:
    """The largest difference, relative to the largest value; not a number when one is not."""
    return ((got - expected).abs().max() / expected.abs().max()).item()


def _identical(got: Tensor | None, expected: Tensor) -> bool:
    return got is not None and torch.equal(got, expected)


def _flat(gradients: Mapping[str, Tensor]) -> Tensor:
    return torch.cat([gradients[name].flatten() for name in sorted(gradients)])


def _leaves(loss: Tensor) -> list[Tensor]:
    """The tensors to which the backward of `loss` adds a gradient."""
    leaves: list[Tensor] = []
    seen: set[Any] = set()
    waiting: list[Any] = [loss.grad_fn]
    while waiting:
        node = waiting.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if hasattr(node, "variable"):
            leaves.append(node.variable)
        waiting += [following for following, _ in node.next_functions]
    return leaves


def _layout(model: nn.Module) -> dict[str, tuple[object, ...]]:
    """Each module's class, and each tensor's shape, device and whether it requires grad."""
    modules: dict[str, tuple[object, ...]] = {
        f"module {name}": (type(module),) for name, module in model.named_modules()
    }
    tensors = [*model.named_parameters(), *model.named_buffers()]
    return modules | {name: (t.shape, t.device, t.requires_grad) for name, t in tensors}
