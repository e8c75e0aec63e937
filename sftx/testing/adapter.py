"""The contract of an adapter: it starts as the identity, trains only its own parameters, and can be switched off.

Each clause works on a newly loaded model, trained for a few steps, so that a broken clause does not affect the others.
Dimensions: B rows, T tokens, V vocabulary.
"""

from __future__ import annotations

import dataclasses
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

from sftx.data.collate import groups_of
from sftx.errors import SftxError, one_line
from sftx.model.added_tokens import untrained_rows
from sftx.model.generation import embed_prompts
from sftx.model.load import load_model, load_spec
from sftx.model.quantised import find_quantised
from sftx.testing.adapter_case import LEARNING_RATE, STEPS, Attached, Case
from sftx.testing.batches import differences
from sftx.testing.clauses import ClauseError, ExemptError, Suite, must_not_raise
from sftx.testing.kit import make_stage
from sftx.trainer.layers import enable_checkpointing

_SAME: Final = 1e-6  # for the same computation, up to rounding
_CLOSE: Final = 1e-5  # for the same product summed in another order; the start-up check of a run allows as much

SUITE: Suite[Case] = Suite("adapter", Case)


@SUITE.clause("Attaching the adapter changes no logit, apart from what `embed` puts in.")
def begins_as_identity(case: Case) -> None:
    difference = _difference(case.begun_BTV, case.begun.base.logits_BTV)
    if not difference <= _CLOSE:
        raise ClauseError(
            f"attached and untrained, it changes the logits by {difference:.1e} (relative); initialise the new "
            "parameters so that they add nothing, as LoRA does with lora_B = 0"
        )


@SUITE.clause(
    "Every tensor that requires grad is a parameter of the model and gets a gradient; training lowers the loss."
)
def trains_something(case: Case) -> None:
    model = case.begun
    trainable = model.trainable()
    if not trainable:
        raise ClauseError("no parameter of the model requires grad after attach; add nn.Parameters that do")
    own = {id(parameter) for parameter in model.lm.parameters()}
    if outside := [list(leaf.shape) for leaf in _leaves(model.loss(seed=0)) if id(leaf) not in own]:
        raise ClauseError(
            f"{len(outside)} tensors that require grad are no parameters of the model (the first has the shape "
            f"{outside[0]}), so no optimizer sees them; keep them as nn.Parameter in a module of the model"
        )
    training = case.training
    if without := [name for name, parameter in trainable.items() if parameter.grad is None]:
        raise ClauseError(
            f"{len(without)} parameters require grad and get no gradient (first: {without[0]}); use them in the "
            "forward, not detached, or let them not require grad"
        )
    if not training.loss_after < training.loss_before:
        raise ClauseError(
            f"{STEPS} steps of AdamW at {LEARNING_RATE} bring the loss of their batch from "
            f"{training.loss_before:.6g} to {training.loss_after:.6g}; the trained parameters must affect the output"
        )


@SUITE.clause("Training leaves every tensor that does not require grad bit-identical.", needs=["trains-something"])
def leaves_the_base(case: Case) -> None:
    training = case.training
    if changed := _changed(training.frozen, training.model.state(frozen_only=True)):
        raise ClauseError(
            f"training changed {len(changed)} tensors that do not require grad (first: {changed[0]}); change nothing "
            "in a forward, and let the trained tensors require grad"
        )


_TRAINED: Final = ["trains-something", "leaves-the-base"]


@SUITE.clause(
    "Inside disabled() the model computes what the base does; afterwards, also after an exception, it is restored.",
    needs=["begins-as-identity", *_TRAINED],
)
def disabled_is_the_base(case: Case) -> None:
    model = case.trained()
    trained_BTV = model.logits()

    def check_disabled(where: str) -> None:
        difference = _difference(model.logits(), model.base.logits_BTV)
        if not difference <= _SAME:
            raise ClauseError(
                f"{where} the logits differ from the base's by {difference:.1e} (relative); switch off everything that "
                "was added, and restore everything that was replaced"
            )

    def check_restored(after: str) -> None:
        if not torch.equal(model.logits(), trained_BTV):
            difference = _difference(model.logits(), trained_BTV)
            raise ClauseError(
                f"after {after} the logits differ from the trained ones by {difference:.1e} (relative); restore the "
                "previous state in a `finally` block"
            )

    with model.lm.without_adapters():
        check_disabled("within disabled()")
    check_restored("disabled()")
    suppressed = True
    try:
        with model.lm.without_adapters():
            raise _InterruptedError
    except _InterruptedError:
        suppressed = False
    check_restored("an exception within disabled()")
    if suppressed:
        raise ClauseError("disabled() swallowed an exception that was raised within it; let it pass on")
    with model.lm.without_adapters():
        with model.lm.without_adapters():
            check_disabled("within disabled() twice, one in the other,")
        check_disabled("after an inner disabled(), still within the outer one,")
    check_restored("disabled() twice, one in the other,")


class _InterruptedError(RuntimeError):
    """Raised inside disabled() to see whether the adapter is restored."""


@SUITE.clause("It is saved as safetensors and JSON and nothing else; saving does not change the model.", needs=_TRAINED)
def saves_data_only(case: Case) -> None:
    saved = case.saved
    files = sorted(path for path in saved.directory.rglob("*") if path.is_file())
    if others := [path.name for path in files if path.suffix not in (".safetensors", ".json")]:
        raise ClauseError(
            f"save wrote {', '.join(others)}; loading a pickle runs its code, so write tensors with "
            "safetensors.torch.save_file and everything else as JSON"
        )
    if not any(path.suffix == ".safetensors" for path in files):
        raise ClauseError("save wrote no .safetensors file into the directory; write the trained parameters there")
    for path in files:
        try:
            if path.suffix == ".json":
                json.loads(path.read_text(encoding="utf-8"))
            else:
                with safe_open(path, framework="pt") as file:
                    file.keys()
        except Exception as error:
            raise ClauseError(f"{path.name}, which save wrote, cannot be read: {one_line(error)}") from error
    changed = _changed(saved.state, saved.model.state())
    if changed or not torch.equal(saved.model.logits(), saved.logits_BTV):
        what = changed[0] if changed else "the logits"
        raise ClauseError(f"save changed {what}; training continues after it, so write copies and change nothing")


@SUITE.clause(
    "A new model that loads what was saved has the same logits, bit for bit, and can be trained further.",
    needs=[*_TRAINED, "saves-data-only"],
)
def round_trips(case: Case) -> None:
    saved = case.saved
    model = case.attached(seed=1)  # random values drawn while attaching are not those of the saved adapter
    begun = set(model.trainable())
    model.adapter.load(saved.directory)
    logits_BTV = model.logits()
    if not torch.equal(logits_BTV, saved.logits_BTV):
        raise ClauseError(
            f"after save and load the logits differ by {_difference(logits_BTV, saved.logits_BTV):.1e} (relative); "
            "save everything that they depend on, in its own dtype: what was trained, and what was drawn at random and "
            "then frozen"
        )
    if lost := begun - set(model.trainable()):
        raise ClauseError(
            f"after load {len(lost)} parameters no longer require grad (first: {min(lost)}); copy the values into the "
            "existing parameters (`parameter.data.copy_`)"
        )


@SUITE.clause(
    "Files with a missing tensor, an additional one, or one of another shape are refused with an SftxError.",
    needs=["saves-data-only", "round-trips"],
)
def loads_strictly(case: Case) -> None:
    adapter = case.attached().adapter
    advice = "raise a ModelError that names the file and the tensor"
    with tempfile.TemporaryDirectory(prefix="sftx-adapter-") as directory:
        shutil.copytree(case.saved.directory, directory, dirs_exist_ok=True)
        path = min(Path(directory).rglob("*.safetensors"))
        with safe_open(path, framework="pt") as file:
            metadata, tensors = file.metadata(), {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        for damage, damaged in _damaged(tensors):
            save_file(damaged, path, metadata=metadata)
            with must_not_raise(f"load of a file in which {damage}", advice):
                try:
                    adapter.load(Path(directory))
                except SftxError:
                    continue
            raise ClauseError(f"load took a file in which {damage}; compare names and shapes, and {advice}")


def _damaged(tensors: Mapping[str, Tensor]) -> Iterator[tuple[str, dict[str, Tensor]]]:
    """Yield damaged copies of the tensors, each with a description of the damage."""
    name = max(tensors, key=lambda name: tensors[name].numel())
    tensor = tensors[name]
    # A single row instead of several: `copy_` would broadcast it silently.
    other = tensor[:1].clone() if tensor.ndim > 0 and len(tensor) > 1 else torch.stack([tensor, tensor])
    yield f"{name} is missing", {key: value for key, value in tensors.items() if key != name}
    yield "the tensor 'stranger' is too many", {**tensors, "stranger": tensor.clone()}
    yield f"{name} has the shape {list(other.shape)} for {list(tensor.shape)}", {**tensors, name: other}


@SUITE.clause(
    "merge leaves a plain model with the trained logits and the base's parameter names; no parameter requires grad. "
    "An adapter with `embed` may refuse with an SftxError.",
    needs=_TRAINED,
)
def merges(case: Case) -> None:
    model = case.trained()
    trained_BTV = model.logits()
    try:
        model.adapter.merge(model.lm)
    except SftxError as error:
        if not model.lm.embeds_extras:
            raise
        raise ExemptError(f"it embeds extras, and refuses: {one_line(error)}") from None
    difference = _difference(model.logits(), trained_BTV)
    # The additions happen in another order; in a deep model, rounding in fp32 alone exceeds _CLOSE.
    if not difference <= max(_CLOSE, 4 * case.rounding()):
        raise ClauseError(
            f"merged, the logits differ from the trained ones by {difference:.1e} (relative); fold the whole update "
            "into the weights, computed in fp32, with its scaling"
        )
    names, expected = {name for name, _ in model.lm.model.named_parameters()}, model.base.names
    if names != expected:
        raise ClauseError(
            f"merged, the model has {len(names - expected)} parameters that the base has not and lacks "
            f"{len(expected - names)} (first: {min(names ^ expected)}); put plain modules back under their names"
        )
    if trainable := model.trainable():
        raise ClauseError(
            f"merged, {len(trainable)} parameters still require grad (first: {min(trainable)}); freeze them"
        )


@SUITE.clause(
    "All random numbers of a forward derive from lm.seed, so that gradient checkpointing recomputes the same.",
    needs=_TRAINED,
)
def recomputes_the_same(case: Case) -> None:
    model = case.trained()
    first = model.gradients(seed=7, torch_seed=1)
    if _changed(first, model.gradients(seed=7, torch_seed=2)):
        raise ClauseError(
            "two forwards with the same lm.seed give different gradients; seed a generator from lm.seed, and "
            "keep no count from one forward to the next"
        )
    enable_checkpointing(model.lm.model)
    recomputed = model.gradients(seed=7, torch_seed=1)
    difference = _difference(*(torch.cat([g[name].flatten() for name in sorted(g)]) for g in (recomputed, first)))
    if not difference <= _SAME:
        raise ClauseError(
            f"with gradient checkpointing, which recomputes layers in another order, the gradients differ by "
            f"{difference:.1e} (relative); seed each layer from lm.seed and the layer's own number"
        )


@SUITE.clause("The hook needs only the configuration and the skeleton, and leaves the skeleton unchanged on meta.")
def plans_on_meta(case: Case) -> None:
    with tempfile.TemporaryDirectory(prefix="sftx-adapter-") as directory:
        shutil.copy(case.kit.model_dir / "config.json", directory)
        spec = load_spec(directory)
        before = layout_of(spec.skeleton)
        advice = "weights are available in quantize and attach, not before"
        with must_not_raise("with a configuration and no weights the hook", advice):
            make_stage(case.kit.plugin, "sftx_adapter", spec=spec)
        after = layout_of(spec.skeleton)
    if changed := sorted(name for name in before.keys() | after.keys() if before.get(name) != after.get(name)):
        raise ClauseError(
            f"the hook changed {len(changed)} modules or tensors of spec.skeleton (first: {changed[0]}); only read it, "
            "and change the model in attach"
        )


@SUITE.clause(
    "quantize replaces the same modules on the meta device as with weights, by tensors of the same shapes and dtypes "
    "that require no gradient."
)
def quantizes_by_shape(case: Case) -> None:
    spec = load_spec(str(case.kit.model_dir))
    plain = load_model(spec, [], dtype=torch.float32, device=torch.device("cpu"))
    adapter = make_stage(case.kit.plugin, "sftx_adapter", spec=spec)
    on_meta, with_weights = (find_quantised(model, adapter.quantize) for model in (spec.skeleton, plain))
    if other := sorted(on_meta.keys() ^ with_weights.keys()):
        raise ClauseError(
            f"with weights it replaces {len(with_weights)} modules and on the meta device {len(on_meta)} (first: "
            f"{other[0]}); decide by path, class and shapes"
        )
    for name, module in with_weights.items():
        sizes, planned = (
            {key: (t.shape, t.dtype) for key, t in one.state_dict().items()} for one in (module, on_meta[name])
        )
        if sizes != planned or any(p.requires_grad for p in module.parameters()):
            raise ClauseError(
                f"the replacement of {name} holds {sizes}, on the meta device {planned}; let both have the same, and "
                "let nothing in it require a gradient"
            )


@SUITE.clause(
    "When another adapter is attached already, it refuses with an SftxError or changes no logit.",
    needs=["begins-as-identity"],
)
def keeps_other_adapters(case: Case) -> None:
    model, before_BTV = case.beside_lora()
    try:
        model.adapter.attach(model.lm)
    except SftxError:
        return
    with model.lm.ignoring_extras():
        difference = _difference(model.logits(), before_BTV)
    if not difference <= _CLOSE:
        raise ClauseError(
            f"attached after lora, it changes the logits by {difference:.1e} (relative), so what lora trained is lost; "
            "refuse layers that have more than weight and bias with sftx.ConfigError, or keep what they compute"
        )


@SUITE.clause(
    "The rows of added tokens (spec.new_token_ids) train in the embedding and the head, and are saved; or the hook "
    "refuses them with an SftxError.",
    needs=[*_TRAINED, "round-trips"],
)
def trains_added_tokens(case: Case) -> None:
    num_tokens = case.begun.lm.head_weight.shape[0]
    ids = (num_tokens, num_tokens + 1)
    try:
        model = case.attached(new_token_ids=ids)
    except SftxError:
        return
    if untrained := untrained_rows(model.lm, ids):
        raise ClauseError(
            f"with new_token_ids {list(ids)} it leaves their rows untrained in {' and '.join(untrained)}, so the model "
            "would know them only as random vectors; train these rows, or raise ConfigError in the hook"
        )
    model.batch = dataclasses.replace(model.batch, input_ids_BT=model.batch.input_ids_BT.clone())
    model.batch.input_ids_BT[:, :2] = torch.tensor(ids)

    def rows(of: Attached) -> Tensor:
        embedding: Any = of.lm.model.get_input_embeddings()
        return torch.cat([embedding(torch.tensor(ids)), of.lm.head_weight[list(ids)]]).detach()

    before = rows(model).clone()
    model.train()
    trained = rows(model).clone()
    if torch.equal(trained, before):
        raise ClauseError("training leaves the rows of added tokens as they are; let the forward use what trains them")
    with tempfile.TemporaryDirectory(prefix="sftx-adapter-") as directory:
        model.adapter.save(Path(directory))
        loaded = case.attached(seed=1, new_token_ids=ids)
        loaded.adapter.load(Path(directory))
    if not torch.equal(rows(loaded), trained):
        raise ClauseError("a new model that loads what was saved has other rows of added tokens; save these rows too")


@SUITE.clause(
    "`embed`, where an adapter has it, returns a finite tensor of the shape and dtype that it was given, changes no "
    "batch, and gives each document the same whatever else is in its batch.",
)
def embeds_each_document_alone(case: Case) -> None:
    lm = case.begun.lm
    if not lm.embeds_extras:
        return
    examples, collate = case.examples, case.kit.collator.collate
    batch, again = collate(examples), collate(examples)
    given_BTD = lm.model.get_input_embeddings()(batch.input_ids_BT).detach()
    with torch.no_grad():
        made_BTD = lm.embed(batch, given_BTD.clone())
        alone = [row_TD for one in groups_of(examples) for row_TD in embed_prompts(lm, collate, one)]
        together = embed_prompts(lm, collate, examples)
    if (made_BTD.shape, made_BTD.dtype) != (given_BTD.shape, given_BTD.dtype) or not made_BTD.isfinite().all():
        raise ClauseError(
            f"embed made {made_BTD.dtype} {list(made_BTD.shape)} of {given_BTD.dtype} {list(given_BTD.shape)}, or "
            "numbers that are not finite; cast with .to(embeds_BTD.dtype)"
        )
    if changed := differences(batch, again):
        raise ClauseError(f"embed changed {changed[0]} of its batch; work on a copy")
    for example, alone_TD, together_TD in zip(examples, alone, together, strict=True):
        difference = _difference(together_TD, alone_TD)
        if not difference <= _CLOSE:
            raise ClauseError(
                f"embed gives {example.row_id} embeddings that differ by {difference:.1e} (relative) when other "
                "examples are in its batch; let each document have what its own extras say"
            )


def check_adapter(plugin: object, *, model: Path | None = None) -> None:
    """Check the plugin's adapter. Raises ContractError, which names the broken clauses.

    `model` is a model directory to use instead of the tiny one; it is loaded several times, in fp32 on the CPU.
    """
    SUITE.check(plugin, model=model)


def _difference(actual: Tensor, expected: Tensor) -> float:
    """Return the largest difference, relative to the largest expected value; NaN if a value is NaN."""
    return ((actual - expected).abs().max() / expected.abs().max()).item()


def _changed(before: Mapping[str, Tensor], after: Mapping[str, Tensor]) -> list[str]:
    """Return the names of the tensors that are missing or not bit-identical in `after`."""
    return [name for name, value in before.items() if name not in after or not torch.equal(after[name], value)]


def _leaves(loss: Tensor) -> list[Tensor]:
    """Return the tensors to which the backward of `loss` adds a gradient."""
    leaves: list[Tensor] = []
    seen: set[Any] = set()
    pending: list[Any] = [loss.grad_fn]
    while pending:
        node = pending.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if hasattr(node, "variable"):
            leaves.append(node.variable)
        pending += [function for function, _ in node.next_functions]
    return leaves


def layout_of(model: nn.Module) -> dict[str, tuple[object, ...]]:
    """Return the class of each module, and shape, device and requires_grad of each tensor."""
    modules: dict[str, tuple[object, ...]] = {
        f"module {name}": (type(module),) for name, module in model.named_modules()
    }
    tensors = [*model.named_parameters(), *model.named_buffers()]
    return modules | {name: (t.shape, t.device, t.requires_grad) for name, t in tensors}
