"""Loading the result of a run, or what PEFT or transformers saved, as a model that answers prompts. Reads no data."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable, Mapping, Sequence, Set
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import torch

from sftx.assembly.entry_points import discover, find
from sftx.assembly.peft_config import PEFT_CONFIG, read_peft_config
from sftx.assembly.registry import Assembly
from sftx.checkpoint import layout
from sftx.checkpoint.checkpoint import load_weights
from sftx.checkpoint.remote_runs import local_copy
from sftx.checkpoint.run_directory import RunDirectory
from sftx.config.loading import load
from sftx.config.options import RunConfig
from sftx.config.run_file import Origins
from sftx.data.encoder import Encoder
from sftx.errors import ConfigError, ModelError, PluginError, one_line
from sftx.model import names
from sftx.model.added_tokens import add_missing, ids_of
from sftx.model.generation import embed_prompts, generate_greedy, generation_defaults
from sftx.model.language_model import CausalLM
from sftx.model.load import load_model, load_spec, load_tokenizer
from sftx.model.shared_bases import SharedBases
from sftx.stores import is_address
from sftx.types import Adapter, Collator, Conversation, Example, ModelSpec, Template

if TYPE_CHECKING:
    from transformers import GenerationConfig, PretrainedConfig, PreTrainedTokenizerBase

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class LoadedRun:
    """A fine-tuned model and what is needed to prompt it as it was trained."""

    lm: CausalLM
    """The model with its adapters attached and their weights loaded; in eval mode, and nothing requires a gradient."""
    tokenizer: PreTrainedTokenizerBase
    """The tokenizer that was saved, with the chat template that the model was trained with."""
    template: Template | None
    """None when the model was trained on plain text, or its chat template cannot be used (`no_template` says why)."""
    encoder: Encoder
    directory: Path
    """The artefact, checkpoint, adapter or model that was loaded."""
    base_model: str
    """Directory or hub id of the model under the adapters; `directory` itself for a full model."""
    compute_dtype: torch.dtype
    """The dtype of matrix products; float32 means no autocast."""
    saved_dtype: torch.dtype
    """The dtype of the weights in the files of the base model, or of the full model."""
    config: RunConfig | None
    """Options of the run; None when no run.yaml belongs to the directory."""
    no_template: str = ""
    collator: Collator | None = None
    """Makes the extras of prompts that an adapter embeds; None when no adapter embeds any."""

    @property
    def stop_ids(self) -> tuple[int, ...]:
        """Ids of the tokens that end an answer."""
        return tuple(self.encoder.stop_ids)

    @property
    def generation_config(self) -> GenerationConfig:
        """The model's own generation settings, which stop at the template's stop tokens too."""
        config = self.lm.model.generation_config
        assert config is not None
        return config

    def prompt(self, conversation: Conversation) -> list[int]:
        """Return the token ids after which the model is to answer. Raises ConfigError when there is no template."""
        if self.template is None:
            raise ConfigError(f"{self.directory}: {self.no_template}; only plain text can be continued")
        return self.encoder.prompt(conversation)

    def answer(
        self,
        prompts: Sequence[Sequence[int]],
        *,
        max_new_tokens: int,
        batch_size: int = 8,
        extras: Sequence[Mapping[str, Any]] | None = None,
    ) -> list[list[int]]:
        """Return the greedy answer to each prompt as token ids, without the stop token that ended it.

        `extras`: those of each prompt, as the run's parser gives them (`Conversation.extras`), where an adapter embeds
        extras. Raises ConfigError where none does.
        """
        if extras is not None and self.collator is None:
            raise ConfigError(f"{self.directory}: no adapter of it embeds extras; leave them out")
        examples = [
            Example(np.asarray(prompt), np.zeros(len(prompt), np.bool_), f"prompt {n + 1}", n, extras=own)
            for n, (prompt, own) in enumerate(zip(prompts, extras or [{}] * len(prompts), strict=True))
        ]

        def embed(indices: Sequence[int]) -> list[torch.Tensor]:
            assert self.collator is not None
            chosen = [dataclasses.replace(examples[index], group=group) for group, index in enumerate(indices)]
            return embed_prompts(self.lm, self.collator.collate, chosen)

        with torch.no_grad(), self.autocast():
            by_index = dict(
                generate_greedy(
                    self.lm,
                    prompts,
                    max_new_tokens=max_new_tokens,
                    stop_ids=self.stop_ids,
                    batch_size=batch_size,
                    embed=None if self.collator is None else embed,
                )
            )
        return [by_index[index] for index in range(len(prompts))]

    def merge_adapters(self) -> bool:
        """Fold the adapters into the weights, so that answers take the time of the base's; return whether it was done.

        It is done where the tokens of answers stay the same: for weights and products in fp32. In bf16 the weights
        would be rounded once more. Afterwards the model has no adapters.
        """
        tensors = [*self.lm.model.parameters(), *self.lm.model.buffers()]
        is_fp32 = all(tensor.dtype in (torch.float32, torch.int64, torch.bool) for tensor in tensors)
        if self.compute_dtype != torch.float32 or not is_fp32 or self.collator is not None or not self.lm.adapters:
            return False
        for adapter in self.lm.adapters.values():
            adapter.merge(self.lm)
        self.lm.adapters.clear()
        return True

    def autocast(self) -> torch.autocast:
        """Return the context in which the model computes as in an evaluation of its run."""
        is_narrow = self.compute_dtype != torch.float32
        dtype = self.compute_dtype if is_narrow else None
        return torch.autocast(self.lm.device.type, dtype=dtype, enabled=is_narrow, cache_enabled=False)


def load_run(
    directory: str | Path,
    *,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
    trust_remote_code: bool = False,
    check: Callable[[PretrainedConfig], None] | None = None,
    bases: SharedBases | None = None,
    base: str | None = None,
) -> LoadedRun:
    """Load a fine-tuned model from a run directory, one of its checkpoints, or an adapter's or a model's directory.

    A run directory stands for its result, `adapter/` or `model/`; all of them may be addresses in a store. Where a
    run.yaml belongs to the directory, template and adapters are the plugins of that run, with its options. Otherwise
    `adapter_config.json` must be that of a LoRA, and the template is the tokenizer's own chat template.

    `device`: by default the first GPU, or the CPU. `dtype`: of weights and matrix products; by default weights are
    kept and multiplied as in the run's evaluations, and for a directory without run.yaml as its config.json says.
    `check` is called with the model's configuration before weights are read, and may refuse it. `bases`: models that
    are loaded with the same ones share the weights of their base in memory. `base`: another model under the adapters,
    none of whose layers are quantised: a directory or hub id, or "original" for the one that the run has quantised
    while it loaded it.
    Raises ModelError, ConfigError, PluginError and OutputError.
    """
    chosen = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    place = local_copy(directory) if isinstance(directory, str) and is_address(directory) else Path(directory)
    weights, run = layout.locate(place.expanduser())
    if run is not None:
        parts = _parts_of_run(weights, run, base, trust_remote_code=trust_remote_code)
    else:
        parts = _parts_of_directory(weights, base, trust_remote_code=trust_remote_code)
    if base is not None and not parts.adapters:
        raise ConfigError(f"--base {base}: {weights} is a full model, which has no base; leave it out")
    spec = parts.spec
    encoder = Encoder(parts.tokenizer, parts.template, no_template=parts.no_template)
    if check is not None:
        check(spec.config)
    is_full = not parts.adapters
    saved_dtype = getattr(spec.config, "dtype", None) or torch.float32
    compute_dtype = dtype or parts.compute_dtype or saved_dtype
    # Those of a run are loaded as it kept and evaluated them.
    full_dtype = torch.float32 if parts.config is not None and parts.has_fp32_weights else saved_dtype
    lm = build_model(
        spec,
        parts.adapters,
        parts.tokenizer,
        dtype=dtype or (full_dtype if is_full else compute_dtype),
        device=chosen,
        stop_ids=encoder.stop_ids,
        saved=weights,
        bases=bases,
        quantise=base is None,
    )
    lm.requires_grad_(False)
    lm.eval()
    return LoadedRun(
        lm=lm,
        tokenizer=parts.tokenizer,
        template=parts.template,
        encoder=encoder,
        directory=weights,
        base_model=spec.name,
        compute_dtype=compute_dtype,
        saved_dtype=saved_dtype,
        config=parts.config,
        no_template=parts.no_template,
        collator=parts.collator,
    )


def load_encoder(directory: Path, *, trust_remote_code: bool = False) -> Encoder:
    """Return the encoder with which `load_run` prompts, from the tokenizer that is saved in `directory`.

    No weights are read. Raises ModelError, ConfigError, PluginError and OutputError.
    """
    weights, run = layout.locate(directory)
    if run is not None:
        parts = _parts_of_run(weights, run, None, trust_remote_code=trust_remote_code)
    else:
        parts = _parts_of_directory(weights, None, trust_remote_code=trust_remote_code)
    return Encoder(parts.tokenizer, parts.template, no_template=parts.no_template)


def build_model(
    spec: ModelSpec,
    adapters: Mapping[str, Adapter],
    tokenizer: PreTrainedTokenizerBase,
    *,
    dtype: torch.dtype,
    device: torch.device,
    stop_ids: Sequence[int],
    saved: Path | None = None,
    seed: int | None = None,
    trainable: Set[str] | None = None,
    bases: SharedBases | None = None,
    quantise: bool = True,
) -> CausalLM:
    """Load the model of `spec`, attach the adapters, and let its generation settings stop at `stop_ids`.

    `saved`: an artefact or a checkpoint whose weights replace those of the full model, or of the adapters. `seed`: for
    the initial weights of adapters. `trainable`: the parameters that train, by name (`CausalLM.attach`). `bases`: those
    whose weights are shared. `quantise`: layers as the adapters ask for it. Raises ModelError.
    """
    if saved is not None and not adapters:
        spec = dataclasses.replace(spec, name=str(saved))
    load = load_model if bases is None else bases.load
    model = load(spec, list(adapters.values()) if quantise else [], dtype=dtype, device=device)
    lm = CausalLM(model, tokenizer)
    if seed is not None:
        torch.manual_seed(seed)
    lm.attach(adapters, trainable)
    if bases is not None and adapters:
        for parameter in lm.parameters():
            if parameter.requires_grad:  # one of the base's own, perhaps, which only this adapter has trained
                parameter.data = parameter.data.clone()
    lm.model.generation_config = generation_defaults(lm, stop_ids)
    if saved is not None and adapters:
        load_weights(lm, saved, trust_remote_code=spec.trust_remote_code)
    return lm


@dataclass(frozen=True)
class _Parts:
    """The parts that a model is built from."""

    spec: ModelSpec
    adapters: Mapping[str, Adapter]
    tokenizer: PreTrainedTokenizerBase
    template: Template | None
    no_template: str = ""
    config: RunConfig | None = None
    compute_dtype: torch.dtype | None = None
    collator: Collator | None = None
    has_fp32_weights: bool = True
    """Whether the run trained the model in fp32, if it trained all of it."""


def run_directory_of(weights: Path) -> Path | None:
    """Return the run directory to which an artefact or a checkpoint belongs, None when there is none."""
    return layout.locate(weights)[1]


def _parts_of_run(weights: Path, run: Path, other_base: str | None, *, trust_remote_code: bool) -> _Parts:
    loaded = load(run / layout.RUN)
    config = loaded.config
    manifest = RunDirectory(run).read_json(layout.MANIFEST) or {}
    stages: dict[str, set[str]] = {}
    for line in manifest.get("plugins", ()):
        stages.setdefault(line["plugin"], set()).add(line["stage"])
    assembly, installed = Assembly(loaded.origins), discover()
    for name, options in config.plugins.items():
        # Other plugins of the run, such as a tracker, need not be installed here.
        if name not in stages or stages[name] & {"template", "adapter"}:
            assembly.add(find(name, installed, origin=str(run / layout.RUN)), options)
    has_adapters = bool(assembly.providers("sftx_adapter"))
    if weights.name == layout.ADAPTER and not has_adapters:
        raise ModelError(
            f"{run / layout.RUN} names no adapter plugin, and {weights} is an adapter: the file was changed"
        )
    base = _resolve_base(config.model, f"model in {run / layout.RUN}", other_base) if has_adapters else str(weights)
    tokenizer = _load_tokenizer(weights, base, trust_remote_code=trust_remote_code)
    template = assembly.template(tokenizer)
    spec = load_spec(base, trust_remote_code=trust_remote_code)
    if has_adapters and config.add_tokens and template is not None:
        base_tokenizer = load_tokenizer(base, trust_remote_code=trust_remote_code)
        added = add_missing(template.controls, base_tokenizer)
        spec = dataclasses.replace(spec, new_token_ids=ids_of(added, tokenizer))
    described = str(manifest.get("dtype", ""))
    dtype = getattr(torch, described.partition(" ")[0], None)
    adapters, collator = assembly.adapters(spec, weights), None
    if any(hasattr(adapter, "embed") for adapter in adapters.values()):
        if not assembly.providers("sftx_collator"):
            (name,) = (name for name, of in stages.items() if "collator" in of)
            assembly.add(find(name, installed, origin=str(run / layout.RUN)), config.plugins.get(name, {}))
        collator = assembly.collator(config.data.max_length)
    return _Parts(
        spec=spec,
        adapters=adapters,
        collator=collator,
        tokenizer=tokenizer,
        template=template,
        no_template="was trained without a template",
        config=config,
        compute_dtype=dtype if isinstance(dtype, torch.dtype) else None,
        has_fp32_weights=layout.NO_FP32_COPY not in described,
    )


def _parts_of_directory(weights: Path, other_base: str | None, *, trust_remote_code: bool) -> _Parts:
    assembly, installed = Assembly(Origins()), discover()
    token_ids: tuple[int, ...] = ()
    if (weights / PEFT_CONFIG).exists():
        peft = read_peft_config(weights / PEFT_CONFIG)
        base = _resolve_base(peft.base, f"base_model_name_or_path in {weights / PEFT_CONFIG}", other_base)
        assembly.add(find(peft.plugin, installed), peft.options)
        token_ids = peft.token_ids
    else:
        base = str(weights)
        names.check(base)
    tokenizer = _load_tokenizer(weights, base, trust_remote_code=trust_remote_code)
    template, no_template = None, "its tokenizer has no chat template"
    if tokenizer.chat_template is not None:
        try:
            assembly.add(find("tokenizer", installed), {})
            template = assembly.template(tokenizer)
        except (PluginError, ConfigError) as error:
            no_template = one_line(error)
            log.warning("%s: its chat template cannot be used: %s", weights, no_template)
    spec = load_spec(base, trust_remote_code=trust_remote_code)
    num_rows = cast(Any, spec.skeleton.get_input_embeddings()).weight.shape[0]
    spec = dataclasses.replace(spec, new_token_ids=tuple(token_id for token_id in token_ids if token_id >= num_rows))
    return _Parts(spec, assembly.adapters(spec), tokenizer, template, no_template)


def _resolve_base(name: str, place: str, other: str | None) -> str:
    """Return the directory or hub id of an adapter's base model. Raises ModelError that says where it was named."""
    if other not in (None, names.ORIGINAL):
        names.check_base(other)
        return names.resolve(other)
    try:
        names.check(name)
    except ModelError as error:
        raise ModelError(
            f"{error}; the base of this adapter: put it back, name it with --base, or correct {place}"
        ) from error
    return names.resolve(name)


def _load_tokenizer(weights: Path, base: str, *, trust_remote_code: bool) -> PreTrainedTokenizerBase:
    """Load the tokenizer that was saved with the weights, or that of the base model when there is none."""
    is_saved = any(weights.glob("tokenizer*"))
    return load_tokenizer(str(weights) if is_saved else base, trust_remote_code=trust_remote_code)
