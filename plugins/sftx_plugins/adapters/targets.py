"""The options by which an adapter chooses modules, under PEFT's names and with PEFT's meaning. Imports no torch."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Final, cast

from pydantic import Field

from sftx import ConfigError, ModelSpec

if TYPE_CHECKING:
    from torch import Tensor, nn
    from transformers import PreTrainedModel

ALL_LINEAR: Final = "all-linear"
EMBEDDING: Final = "input_embeddings"
"""Stands for the embedding in trainable_token_indices, whatever this model calls it."""
_LEAST_COVERAGE: Final = 0.5


@dataclass(frozen=True, eq=False)
class Targets:
    """Chooses the modules that an adapter changes, and those that are trained in full beside it."""

    adapts_ends: ClassVar[bool] = False
    """Whether the embedding and the output head can be adapted too, when they are named."""
    adapts_others: ClassVar[bool] = False
    """Whether transformers' Conv1D and the weights of stacked experts can be adapted too."""

    target_modules: Annotated[
        str | tuple[str, ...],
        Field(
            description="all-linear (all linear layers except the output head, with lora also the weights of stacked "
            "experts), a list of names, or a regular expression for the whole path."
        ),
    ] = ALL_LINEAR
    exclude_modules: Annotated[
        str | tuple[str, ...],
        Field(description="Modules that are not adapted: a list of names, or a regular expression for the whole path."),
    ] = ()
    layers_to_transform: Annotated[
        tuple[Annotated[int, Field(ge=0)], ...],
        Field(description="Numbers of the layers to adapt, counted from 0; empty for all of them."),
    ] = ()
    layers_pattern: Annotated[
        tuple[str, ...],
        Field(
            description="Names of the list that layers_to_transform counts, such as layers or h; found by itself where "
            "a model has one."
        ),
    ] = ()
    allow_low_coverage: Annotated[
        bool,
        Field(description="Let all-linear adapt less than half of the decoder's weights, which is an error otherwise."),
    ] = False
    modules_to_save: Annotated[
        tuple[str, ...],
        Field(description="Modules trained and saved in full, such as lm_head and embed_tokens."),
    ] = ()
    init_from: Annotated[
        str | None,
        Field(description="Directory of an adapter to begin with, ours or PEFT's; --model DIR sets it with the base."),
    ] = None

    def find(self, model: PreTrainedModel) -> tuple[list[str], list[str]]:
        """Return the paths of the modules to adapt and of those to train in full, all of the language model.

        Raises ConfigError for names that match nothing, and for choices that cannot be right.
        """
        saved = self.find_saved(model)
        # What trains in full needs no update beside it, and PEFT expects none there.
        targets = [path for path in self.find_targets(model) if not is_within(path, saved)]
        if not targets:
            raise ConfigError(
                f"modules_to_save {list(self.modules_to_save)} hold every layer that target_modules match, so nothing "
                "is left to adapt; leave the modules out, or train the whole model without an adapter"
            )
        return targets, saved

    def find_targets(self, model: PreTrainedModel) -> list[str]:
        """Return the paths of the modules to adapt, all of them in the language model.

        Raises ConfigError if there are none, or one cannot be adapted.
        """
        from torch import nn
        from transformers.pytorch_utils import Conv1D

        from sftx_plugins.adapters.lora_experts import stacked_weights

        head, embedding = path_of(model, model.get_output_embeddings()), path_of(model, model.get_input_embeddings())
        language_model = [path_of(model, model.get_decoder()), head]
        modules = [(name, module) for name, module in model.named_modules() if is_within(name, language_model)]
        layers = nn.Linear | Conv1D if self.adapts_others else nn.Linear
        linear = [name for name, module in modules if isinstance(module, layers)]
        stacked = [f"{path}.{name}" for path, module in modules for name in stacked_weights(module)]
        candidates = linear + (stacked if self.adapts_others else [])
        body = [name for name in candidates if name != head]
        if not body:
            kinds = "nn.Linear, Conv1D of transformers or stacked experts" if self.adapts_others else "nn.Linear"
            raise ConfigError(
                f"{type(model).__name__} has no layer that this adapter can change ({kinds}); train the whole model "
                "instead (leave the adapter out)"
            )
        parameters = self.named_parameters(stacked)
        targets = self._named(candidates if not self.adapts_ends else [*candidates, embedding], body, parameters)
        if self.target_modules == ALL_LINEAR:
            self._check_coverage(model, body)
        self._check_ends(model, [path for path in (embedding, head) if path in targets])
        return self._in_chosen_layers(self._not_excluded(targets))

    def named_parameters(self, stacked: Sequence[str]) -> list[str]:
        """Return those paths of experts' weights that another option than target_modules names."""
        return []

    def _named(self, candidates: Sequence[str], body: Sequence[str], parameters: Sequence[str]) -> list[str]:
        """Return the candidates that target_modules name, and these parameters."""
        if self.target_modules == ALL_LINEAR:
            return list(body)
        if isinstance(self.target_modules, str):
            pattern = _compiled("target_modules", self.target_modules)
            targets = [name for name in candidates if pattern.fullmatch(name)]
        else:
            targets = [name for name in candidates if ends_with(name, self.target_modules)]
            unused = [t for t in self.target_modules if not any(ends_with(name, (t,)) for name in candidates)]
            if unused and targets:
                raise ConfigError(f"target_modules {unused} match no linear layer; this model has {_last_names(body)}")
        targets += [path for path in parameters if path not in targets]
        if not targets:
            option = self.target_modules if isinstance(self.target_modules, str) else list(self.target_modules)
            raise ConfigError(f"target_modules {option!r} match no linear layer; this model has {_last_names(body)}")
        return targets

    def _check_ends(self, model: PreTrainedModel, ends: Sequence[str]) -> None:
        """Raise ConfigError when the embedding or the head is a target and cannot be one."""
        if not ends:
            return
        if not self.adapts_ends:
            raise ConfigError(
                f"target_modules match {ends[0]!r}, which this adapter cannot change; leave it out, or train it in "
                f"full with modules_to_save: [{ends[0]}]"
            )
        if is_tied(model):
            raise ConfigError(
                f"target_modules match {ends[0]!r}, but the embedding and the output head of this model are one "
                "tensor, and one update would have to serve both; leave it out, train single rows with "
                "trainable_token_indices, or both in full with modules_to_save: [embed_tokens, lm_head]"
            )

    def _not_excluded(self, targets: Sequence[str]) -> list[str]:
        if not self.exclude_modules:
            return list(targets)
        if isinstance(self.exclude_modules, str):
            pattern = _compiled("exclude_modules", self.exclude_modules)
            kept = [path for path in targets if not pattern.fullmatch(path)]
        else:
            kept = [path for path in targets if not ends_with(path, self.exclude_modules)]
            unused = [n for n in self.exclude_modules if not any(ends_with(path, (n,)) for path in targets)]
            if unused:
                raise ConfigError(f"exclude_modules {unused} match none of the layers that target_modules match")
        if len(kept) in (0, len(targets)):
            number = "every layer" if not kept else "none of the layers"
            raise ConfigError(f"exclude_modules {self.exclude_modules!r} match {number} that target_modules match")
        return kept

    def _in_chosen_layers(self, targets: Sequence[str]) -> list[str]:
        if not self.layers_to_transform:
            if self.layers_pattern:
                raise ConfigError("layers_pattern is given without layers_to_transform; give the layers' numbers too")
            return list(targets)
        if isinstance(self.target_modules, str) and self.target_modules != ALL_LINEAR:
            raise ConfigError(
                "layers_to_transform is for a list of target_modules; write the layers' numbers into the regular "
                "expression"
            )
        numbers = {path: self._layer_number(path) for path in targets}
        missing = sorted({*self.layers_to_transform} - {*numbers.values()})
        if missing:
            found = sorted(number for number in {*numbers.values()} if number is not None)
            have = f"layers {found[0]} to {found[-1]}" if found else "no numbered layer"
            raise ConfigError(
                f"layers_to_transform: {missing} are no layers that target_modules match; there are {have}"
            )
        return [path for path in targets if numbers[path] in self.layers_to_transform]

    def _layer_number(self, path: str) -> int | None:
        """Return the number of a module's layer, by PEFT's rule: the first number in its path after a name."""
        patterns = [rf"(?:^|.*?\.){name}\.(\d+)\." for name in self.layers_pattern] or [r".*?\.[^.]*\.(\d+)\."]
        match = next((match for pattern in patterns if (match := re.match(pattern, path))), None)
        return int(match[1]) if match else None

    def _check_coverage(self, model: PreTrainedModel, targets: Sequence[str]) -> None:
        """Raise ConfigError when the layers are less than half of the decoder's matrices, embeddings aside."""
        from torch import nn

        decoder = cast(nn.Module, model.get_decoder())
        embeddings = {id(p) for m in decoder.modules() if isinstance(m, nn.Embedding) for p in m.parameters()}
        sizes = {name: p.numel() for name, p in decoder.named_parameters() if p.ndim >= 2 and id(p) not in embeddings}
        reached = sum(weight_at(model, path).numel() for path in targets)
        share = reached / max(1, sum(sizes.values()))
        if share >= _LEAST_COVERAGE or self.allow_low_coverage:
            return
        largest = max(sizes, key=lambda name: sizes[name] if not name.endswith(".weight") else 0)
        raise ConfigError(
            f"target_modules all-linear reaches {100 * share:.0f} % of the decoder's weights, since others, such as "
            f"{largest}, belong to no layer that it can adapt; set allow_low_coverage: true to leave these as they are"
        )

    def find_saved(self, model: PreTrainedModel) -> list[str]:
        """Return the paths of the modules trained in full.

        Raises ConfigError if a name matches no module, or if the modules hold only one of two tied weights.
        """
        parts = [model.get_decoder(), model.get_input_embeddings(), model.get_output_embeddings()]
        language_model = [path_of(model, part) for part in parts]
        modules = [
            name
            for name, module in model.named_modules()
            if is_within(name, language_model) and any(True for _ in module.parameters())
        ]
        matched = [name for name in modules if ends_with(name, self.modules_to_save)]
        for ending in self.modules_to_save:
            if not any(ends_with(name, (ending,)) for name in matched):
                raise ConfigError(
                    f"modules_to_save {ending!r} matches no module of the language model; it has {_last_names(modules)}"
                )
        saved = [name for name in matched if not is_within(name, [other for other in matched if other != name])]
        head = path_of(model, model.get_output_embeddings())
        embedding = path_of(model, model.get_input_embeddings())
        if is_tied(model) and (head in saved) != (embedding in saved):
            raise ConfigError(
                f"modules_to_save {list(self.modules_to_save)} would split tied weights: {head} and {embedding} are "
                "one tensor in this model; name both to train it, or neither"
            )
        return saved


_OF_EVERY_ADAPTER = frozenset(
    {"peft_type", "base_model_name_or_path", "task_type", "auto_mapping", "peft_version", "inference_mode", "revision"}
)
"""The keys of every adapter_config.json that say nothing of what the adapter computes."""


def read_peft(config: Mapping[str, Any], cls: type, ignored: Collection[str]) -> tuple[dict[str, Any], list[str]]:
    """Return the options of the plugin's class that have PEFT's names, and the other keys that are not empty."""
    names = {option.name for option in dataclasses.fields(cls)} - {*ignored}
    options = {name: value for name, value in config.items() if name in names and value is not None}
    for name in ("layers_to_transform", "layers_pattern"):  # PEFT takes one as well as several
        if name in options and not isinstance(options[name], list):
            options[name] = [options[name]]
    others = [name for name, value in config.items() if value and name not in {*names, *ignored, *_OF_EVERY_ADAPTER}]
    return options, others


def find_token_rows(spec: ModelSpec, token_ids: Sequence[int] | Mapping[str, Sequence[int]]) -> dict[str, list[int]]:
    """Return the ids of the tokens whose rows are trained, by the path of the embedding or the head, ascending.

    Added tokens are trained in both. Raises ConfigError for a token without a row, or a name of another module.
    """
    model = spec.skeleton
    embedding, head = path_of(model, model.get_input_embeddings()), path_of(model, model.get_output_embeddings())
    num_rows = cast(Any, model.get_input_embeddings()).weight.shape[0]
    rows = {embedding: {*spec.new_token_ids}, head: {*spec.new_token_ids}}
    by_name = token_ids if isinstance(token_ids, Mapping) else dict.fromkeys((embedding, head), token_ids)
    for name, ids in by_name.items():
        path = embedding if name == EMBEDDING else next((p for p in rows if ends_with(p, (name,))), None)
        if path is None:
            raise ConfigError(f"trainable_token_indices: {name!r} is neither the embedding {embedding} nor {head}")
        rows[path] |= {*ids}
    for token_id in sorted(set().union(*rows.values())):
        if token_id >= num_rows and token_id not in spec.new_token_ids:
            raise ConfigError(f"trainable_token_indices: {token_id} is beyond the embedding, which has {num_rows} rows")
    if is_tied(model):
        rows = {embedding: rows[embedding] | rows[head]}
    return {path: sorted(ids) for path, ids in rows.items() if ids}


def is_tied(model: PreTrainedModel) -> bool:
    """Return whether the embedding and the output head are one tensor."""
    return bool(model.config.get_text_config().tie_word_embeddings)


def ends_with(path: str, endings: Iterable[str]) -> bool:
    return any(path == ending or path.endswith(f".{ending}") for ending in endings)


def is_within(path: str, parents: Iterable[str]) -> bool:
    """Return whether a module's path is one of these, or below one of them."""
    return any(not parent or path == parent or path.startswith(f"{parent}.") for parent in parents)


def weight_at(model: nn.Module, path: str) -> Tensor:
    """Return the weight of the module at this path, or the weight of stacked experts that has this path."""
    parent, _, name = path.rpartition(".")
    weight = model.get_submodule(parent)._parameters.get(name)
    return cast("nn.Linear", model.get_submodule(path)).weight if weight is None else weight


def path_of(model: nn.Module, module: nn.Module) -> str:
    return next(str(path) for path, other in model.named_modules() if other is module)


def _compiled(option: str, pattern: str) -> re.Pattern[str]:
    try:
        return re.compile(pattern)
    except re.error as error:
        raise ConfigError(f"{option} {pattern!r} is not a regular expression: {error}") from None


def _last_names(paths: Iterable[str]) -> str:
    """Return the last names of the paths, each once, for an error message."""
    names = [path.rpartition(".")[2] for path in paths]
    return ", ".join(dict.fromkeys(name for name in names if not name.isdigit()))
