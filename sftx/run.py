"""A run file and a command line, loaded, become a run directory: the whole way, from top to bottom.

options -> plugins -> tokenizer -> data -> model -> steps -> artefact. What can fail early does: plugins and their
options before torch is imported, data before weights are read; the run directory appears when all of that stands.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.metadata
import logging
import platform
import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, NamedTuple, cast

from sftx.assembly.registry import Assembly, activate
from sftx.checkpoint import run_directory
from sftx.checkpoint.run_directory import RunDirectory
from sftx.config.loading import Loaded
from sftx.config.options import DataConfig, RunConfig, Source, as_dict
from sftx.data import sources
from sftx.distributed.process_group import ProcessGroup, check_environment, env_int, is_launched
from sftx.errors import ConfigError, ModelError, SftxError
from sftx.events import Result, RunInfo
from sftx.inspection.run_report.run_report import complete_reports
from sftx.model import names
from sftx.types import Loss

if TYPE_CHECKING:
    from sftx.data.pipeline import Setup
    from sftx.data.preprocess import Dataset
    from sftx.data.sampler import Plan, StreamPlan
    from sftx.model.language_model import LanguageModel
    from sftx.trainer.precision import Precision
    from sftx.trainer.session import Session
    from sftx.trainer.trainer import Trainer

log = logging.getLogger(__name__)

_LIBRARIES: Final = (
    "torch",
    "triton",
    "transformers",
    "tokenizers",
    "safetensors",
    "datasets",
    "pluggy",
    "pydantic",
)


def run(loaded: Loaded, *, name: str = "run", resume: bool = False) -> Result:
    """Trains as `loaded` says; `name` begins the name of the default output directory.

    `resume`: goes on with the run of the same options that lies in the output directory, from its newest whole
    checkpoint; one that is complete is left as it is. Raises SftxError, and Stop when a signal ended it.
    """
    started = time.monotonic()
    begun = _begin(loaded, name, resume=resume)
    process_group = begun.process_group
    with contextlib.ExitStack() as stack:
        stack.callback(process_group.close)
        try:
            process_group.run_on_rank0(lambda: stack.enter_context(begun.directory.held()) and None)
            if (done := process_group.run_on_rank0(begun.directory.finished)) is not None:
                log.info("%s is complete, nothing is left to do", done.output_dir)
                process_group.run_on_rank0(partial(complete_reports, done.output_dir, again=False))
                return done
            return _assemble(begun).run(started)
        except SftxError as error:
            error.rank = process_group.rank if error.rank is None else error.rank
            raise


def assemble(loaded: Loaded, *, name: str = "run", resume: bool = False) -> Session:
    """Everything before the first step: all that can be wrong is found here; nothing is written but the cache."""
    return _assemble(_begin(loaded, name, resume=resume))


class _Begun(NamedTuple):
    """What is known of a run before torch is imported."""

    loaded: Loaded
    process_group: ProcessGroup
    choose: Callable[[], RunDirectory]
    directory: RunDirectory
    assembly: Assembly
    resolved: dict[str, Any]


def _begin(loaded: Loaded, name: str, *, resume: bool) -> _Begun:
    """Raises SftxError for what is wrong with options and plugins, and when another run lies in the directory."""
    config = loaded.config
    names.check(config.model)
    sources.check_data_config(config)
    check_environment()
    if is_launched():
        check_processes(config, env_int("WORLD_SIZE"))
    elif config.train.fsdp_offload:
        raise ConfigError("option 'train.fsdp_offload': needs processes of their own; --nproc 1 starts one")
    elif config.train.distributed != "ddp":
        log.info("distributed: %s has no effect in one process; --nproc starts several", config.train.distributed)
    assembly = activate(loaded)
    resolved = as_dict(config) | {"plugins": {active.info.name: active.options for active in assembly.active}}
    process_group = _meet(config)
    # Each host counts the starts that were its own fault.
    resume = resume or process_group.all_reduce_max(env_int("TORCHELASTIC_RESTART_COUNT", 0)) > 0
    choose = partial(run_directory.resume if resume else run_directory.new, config.output_dir, name)
    directory = process_group.run_on_rank0(choose)
    if directory.resumed:
        providers = [dataclasses.asdict(provider) for provider in assembly.table()]
        process_group.run_on_rank0(lambda: directory.check_same(resolved, providers))
    return _Begun(loaded, process_group, choose, directory, assembly, resolved)


def check_processes(config: RunConfig, num_processes: int) -> None:
    """Raises ConfigError when so many processes cannot do this run."""
    if env_int("TORCHELASTIC_MAX_RESTARTS", 0) and config.output_dir is None:
        raise ConfigError("torchrun --max-restarts needs --output-dir: what starts again finds its run there")
    train = config.train
    rows = train.per_device_train_batch_size * train.gradient_accumulation_steps
    if rows % num_processes:
        numbers = [n for n in range(1, min(rows, 64) + 1) if rows % n == 0]
        fitting = f"{', '.join(map(str, numbers[:-1]))} or {numbers[-1]}" if numbers[1:] else "1"
        raise ConfigError(
            f"{num_processes} processes cannot share the {rows} rows of a step evenly (per_device_train_batch_size "
            f"{train.per_device_train_batch_size} times gradient_accumulation_steps "
            f"{train.gradient_accumulation_steps}); start {fitting}, or change one of the two"
        )


def _meet(config: RunConfig) -> ProcessGroup:
    """Initialises the process group. Raises ConfigError, TrainingError, LostPeerError."""
    if not is_launched():
        return ProcessGroup()
    from sftx.distributed.torch_process_group import TorchProcessGroup

    return TorchProcessGroup(config.train)


def _assemble(begun: _Begun) -> Session:
    loaded, process_group, choose, directory, assembly, resolved = begun
    config = loaded.config

    # From here on torch and transformers are needed: seconds of imports, after everything that is quick to check.
    from sftx.checkpoint.checkpoint import Checkpoints
    from sftx.data.pipeline import set_up
    from sftx.trainer import precision as precisions
    from sftx.trainer.evaluate import Evaluator
    from sftx.trainer.evidence import shown_rows
    from sftx.trainer.observers import Observers
    from sftx.trainer.session import Session

    checkpoints = Checkpoints(directory.file("checkpoints"), config.train.checkpoints_kept)
    saved = process_group.run_on_rank0(checkpoints.newest_whole) if directory.resumed else None
    precision = precisions.choose(config.train, process_group.local_rank)
    # Made before anything takes long: what they need and is not installed is told now.
    info = RunInfo(directory.path, resolved)
    observers = process_group.all_or_raise(
        lambda: Observers(assembly.observers(info) if process_group.is_rank0 else [])
    )
    prepared = process_group.rank0_first(lambda: set_up(loaded, assembly))
    metrics, loss = assembly.metrics(), assembly.loss()
    # One process encodes; where the rows are many, the others take them from the cache.
    data = process_group.rank0_first(prepared.train)
    held_out = process_group.rank0_first(lambda: prepared.held_out(questions=bool(metrics)))
    _check_evaluation(config, held_out, metrics)
    plan = prepared.plan(data)
    trainer = _trainer(config, prepared, plan, loss, precision, saved, process_group)
    _check_fit(config, plan, trainer.lm, held_out)
    manifest = _manifest(config, assembly, prepared, trainer.lm, precision, process_group)
    if directory.resumed:
        process_group.run_on_rank0(lambda: directory.check_inputs(manifest))
    return Session(
        config=config,
        resolved=resolved,
        manifest=manifest,
        assembly=assembly,
        process_group=process_group,
        directory=directory,
        choose=choose,
        observers=observers,
        data=data,
        held_out=held_out,
        plan=plan,
        lm=trainer.lm,
        trainer=trainer,
        evaluator=Evaluator(
            held_out,
            collator=prepared.collator,
            engine=trainer.engine,
            process_group=process_group,
            metrics=metrics,
            precision=precision,
            stop_ids=prepared.encoder.stop_ids,
            batch_size=config.train.per_device_eval_batch_size,
            generation=config.generation,
        ),
        checkpoints=checkpoints,
        checkpoint=saved,
        rows=shown_rows(plan.examples, prepared.tokenizer) if process_group.is_rank0 else [],
    )


def _check_evaluation(config: RunConfig, held_out: Dataset, metrics: Mapping[str, Any]) -> None:
    """Raises ConfigError for an evaluation that could not be."""
    if metrics and not held_out.questions:
        raise ConfigError(
            f"the metric {', '.join(metrics)} needs held-out conversations that end with an assistant's turn; "
            "give some with --eval-data, or leave the metric out"
        )
    options = config.train
    for name, given in (("metric_for_best_model", options.best_metric), ("eval_steps", options.eval_steps)):
        if given is not None and not len(held_out.examples):
            raise ConfigError(f"option 'train.{name}' needs held-out rows; give some with --eval-data, or leave it out")


def _trainer(
    config: RunConfig,
    prepared: Setup,
    plan: Plan | StreamPlan,
    loss: Loss,
    precision: Precision,
    saved: Path | None,
    process_group: ProcessGroup,
) -> Trainer:
    """The model, ready to train, and checked to compute what its own forward computes, packed rows of examples too."""
    from sftx.trainer.self_checks import check_packing
    from sftx.trainer.trainer import Trainer

    def load() -> Trainer:
        lm = _load(config, prepared, precision, saved)
        return Trainer(lm, loss, prepared.collator, config.train, precision, plan.num_steps, process_group)

    # Each reads all of a model before it keeps its share: by turns, so that a host has it in memory once.
    by_turns = process_group.is_initialized and config.train.distributed == "fsdp2"
    trainer = process_group.one_rank_at_a_time(load) if by_turns else load()
    trainer.engine.broadcast_parameters()
    step, lm = trainer.engine.step, trainer.lm
    with process_group.detect_lost_peers(), precision.autocast():
        step.within(lm.check)
        step.within(lambda: check_packing(lm, prepared.collator, plan.examples))
    return trainer


def _load(config: RunConfig, prepared: Setup, precision: Precision, saved: Path | None) -> LanguageModel:
    """The model with its adapters; its weights are those of a checkpoint where one is `saved`."""
    import torch

    from sftx.checkpoint.checkpoint import load_weights
    from sftx.model.added_tokens import ids_of
    from sftx.model.generate import generation_defaults
    from sftx.model.language_model import LanguageModel
    from sftx.model.load import load_model, load_spec
    from sftx.trainer import parallel

    spec = load_spec(prepared.model, trust_remote_code=config.trust_remote_code)
    spec = dataclasses.replace(spec, new_token_ids=ids_of(prepared.added_tokens, prepared.tokenizer))
    adapters = prepared.assembly.adapters(spec)
    parallel.check(config.train, has_adapters=bool(adapters))
    if saved is not None and not adapters:
        spec = dataclasses.replace(spec, name=str(saved))
    dtype = precision.base_dtype(frozen=bool(adapters))
    # What is shared out goes to the device layer by layer, as a share.
    device = torch.device("cpu") if is_launched() and config.train.distributed == "fsdp2" else precision.device
    model = load_model(spec, list(adapters.values()), dtype=dtype, device=device)
    lm = LanguageModel(model, prepared.tokenizer)
    torch.manual_seed(config.train.seed)
    lm.attach(adapters)
    lm.model.generation_config = generation_defaults(lm, prepared.encoder.stop_ids)  # what is saved stops by itself
    if saved is not None and adapters:
        load_weights(lm, saved, trust_remote_code=config.trust_remote_code)
    return lm


def _check_fit(config: RunConfig, plan: Plan | StreamPlan, lm: LanguageModel, held_out: Dataset) -> None:
    """Raises ModelError for token ids without an embedding; notes what is likely a mistake."""
    from sftx.data.sampler import StreamPlan
    from sftx.trainer.schedule import num_decay_steps, num_warmup_steps

    num_rows = cast(Any, lm.model.get_input_embeddings()).weight.shape[0]
    largest = max(plan.scope.largest_id, held_out.examples.largest_id)
    if largest >= num_rows:
        raise ModelError(
            f"model {config.model}: its tokenizer gives the id {largest}, its embedding has {num_rows} rows; "
            "they do not belong together"
        )
    if isinstance(plan, StreamPlan):
        plan.num_embeddings = num_rows  # its later windows are held against this when they are read
    longest = max(plan.scope.longest, int(held_out.examples.lengths.max(initial=0)))
    limit = getattr(lm.config, "max_position_embeddings", None)
    if limit is not None and longest > limit:
        log.warning("the longest row has %d tokens, the model was made for %d; lower data.max_length", longest, limit)
    warmup = num_warmup_steps(config.train, plan.num_steps)
    decay = num_decay_steps(config.train, plan.num_steps)
    if config.train.lr_scheduler_type == "warmup_stable_decay" and warmup + decay >= plan.num_steps:
        log.warning("%d steps of warm-up and %d of decay leave no level part of %d", warmup, decay, plan.num_steps)
    if warmup >= plan.num_steps:
        log.warning(
            "all %d steps are warm-up (warmup_steps %d): the peak rate is never reached", plan.num_steps, warmup
        )


def _manifest(
    config: RunConfig,
    assembly: Assembly,
    prepared: Setup,
    lm: LanguageModel,
    precision: Precision,
    process_group: ProcessGroup,
) -> dict[str, Any]:
    """Versions, device and plugins, and hashes of what is read."""
    import torch

    from sftx import __version__
    from sftx.model.load import fingerprint

    return {
        "sftx": __version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "libraries": {name: _version(name) for name in _LIBRARIES},
        "device": str(lm.device),
        "num_threads": torch.get_num_threads(),
        "dtype": str(precision),
        "num_processes": process_group.world_size,
        "plugins": [dataclasses.asdict(provider) for provider in assembly.table()],
        "model": {
            "name": config.model,
            "files": prepared.model,
            "sha256": fingerprint(prepared.model),
            "revision": getattr(lm.model.config, "_commit_hash", None),
        },
        "data": [_described(source, config.data) for source in config.data.train],
        "eval_data": [_described(source, config.data) for source in config.data.eval],
    }


def _described(source: Source, config: DataConfig) -> dict[str, Any]:
    """A source and what its content was; a stream is not read twice over only to say that, but at its ends."""
    content = sources.glance(source) if config.streaming else sources.fingerprint(source)
    return {"path": source.path, "subset": source.subset, "split": source.split, "fingerprint": content}


def _version(library: str) -> str | None:
    try:
        return importlib.metadata.version(library)
    except importlib.metadata.PackageNotFoundError:
        return None
