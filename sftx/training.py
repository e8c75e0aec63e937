"""Run a fine-tuning: from options to a run directory with its result, in one straight line.

options -> plugins -> process group -> run directory -> data -> model -> steps -> artefact -> report. Checks come as
early as they can: options and plugins before torch is imported, data before weights are read; the run directory
appears when all of that has passed. Only the Python interface, the command line, the test-kit and `sftx verify` import
this module.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import importlib.metadata
import logging
import platform
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, cast

from sftx.assembly.registry import Assembly, activate
from sftx.background import in_background
from sftx.checkpoint import remote_runs, run_directory
from sftx.checkpoint.remote_runs import OutputPlace
from sftx.checkpoint.run_directory import RunDirectory
from sftx.checkpoint.uploading import Uploader, UploadError
from sftx.collector import collector_paused
from sftx.config.loading import LoadedConfig
from sftx.config.options import DataConfig, RunConfig, Source, TrainConfig
from sftx.data import sources
from sftx.distributed.process_group import ProcessGroup, check_environment, env_int, is_launched
from sftx.errors import ConfigError, ModelError, SftxError, counted
from sftx.events import Result, RunInfo, StartReport
from sftx.inspection.run_report.write_report import complete_reports
from sftx.model import names
from sftx.phases import PhaseTimes, listening, phase

if TYPE_CHECKING:
    import torch

    from sftx.assembly.stages.data_stages import ParserStage
    from sftx.assembly.stages.evaluation_stages import EvaluatorStage, MetricStage
    from sftx.assembly.stages.loss_stage import LossStage
    from sftx.assembly.stages.optimizer_stages import OptimizerStage, ScheduleStage
    from sftx.data.dataset import Dataset
    from sftx.data.pipeline import DataPipeline
    from sftx.data.sampler import Sampler
    from sftx.model.language_model import CausalLM
    from sftx.trainer.precision import Precision
    from sftx.trainer.session import Session
    from sftx.trainer.trainer import Trainer

log = logging.getLogger(__name__)

_LIBRARIES: Final = (
    "torch", "triton", "transformers", "tokenizers", "safetensors", "datasets", "pluggy", "pydantic",
)  # fmt: skip
"""Libraries whose versions the manifest records."""


def run(loaded: LoadedConfig, *, name: str = "run", resume: bool = False) -> Result:
    """Train as the options say, and return the run directory with its summary.

    `name` begins the name of the default output directory. `resume` continues the run of the same options in the output
    directory from its newest complete checkpoint; a run that is complete is left as it is. Raises SftxError, and Stop
    when a signal ended the run.
    """
    times = PhaseTimes()
    with listening(times), _prepared(loaded, name, resume=resume) as prepared:
        process_group, directory = prepared.process_group, prepared.directory
        if (done := process_group.run_on_rank0(directory.finished)) is not None:
            log.info("%s is complete, nothing is left to do", done.output_dir)
            process_group.run_on_rank0(partial(complete_reports, done.output_dir, again=False))
            if (uploader := prepared.uploader) is not None:
                uploader.changed(done.output_dir, done.summary.get("best", {}).get("step"))
                uploader.finish(prepared.config.upload_timeout)
            return done
        session = _assemble(prepared, times)
        with _uploading(session):
            result = session.run()
            with phase("writing", "the report"):
                process_group.run_on_rank0(lambda: complete_reports(result.output_dir))
        return result


@contextlib.contextmanager
def _uploading(session: Session) -> Iterator[None]:
    """Upload the rest of the run at the end, also of one that was stopped or failed. Raises UploadError."""
    if (uploader := session.uploader) is None:
        yield
        return
    try:
        yield
    except BaseException:
        try:
            uploader.finish(session.config.upload_timeout)
        except UploadError as error:
            log.warning("%s", error)
        raise
    session.ask_for_upload()  # one that went on from its last checkpoint has saved no other, and only now has a result
    uploader.finish(session.config.upload_timeout)
    session.checkpoints.prune(keep=(session.state.best_step,))  # one may have stayed as it was being uploaded


def assemble(loaded: LoadedConfig, *, name: str = "run", resume: bool = False) -> Session:
    """Do everything before the first step. All faults are found here, and nothing is written but the cache."""
    with assembled(loaded, name=name, resume=resume) as session:
        return session


@contextlib.contextmanager
def assembled(loaded: LoadedConfig, *, name: str = "run", resume: bool = False) -> Iterator[Session]:
    """Assemble a run as `assemble` does, and keep its process group until the end of the block."""
    with _prepared(loaded, name, resume=resume) as prepared:
        yield _assemble(prepared, PhaseTimes())


# --- before torch is imported ---------------------------------------------------------------------


@dataclasses.dataclass
class _Prepared:
    """A run whose options, plugins, process group and directory are known."""

    config: RunConfig
    """With batch sizes resolved."""
    loaded: LoadedConfig
    assembly: Assembly
    process_group: ProcessGroup
    directory: RunDirectory
    choose: Callable[[], RunDirectory]
    """Chooses a directory again, when another run took this one. Raises OutputError."""
    resolved: dict[str, Any]
    """The run file with every default and every plugin's options written out."""
    uploader: Uploader | None
    """What copies the run directory to a store; None on ranks other than 0, and where it stays on this machine."""


@contextlib.contextmanager
def _prepared(loaded: LoadedConfig, name: str, *, resume: bool) -> Iterator[_Prepared]:
    """Check options and plugins, join the process group, and choose the directory, which is locked when it is resumed.

    Raises SftxError for wrong options and plugins, and when another run is in the directory.
    """
    config = loaded.config
    names.check(config.model, needs_weights=True)
    check_environment()
    world_size = env_int("WORLD_SIZE") if is_launched() else 1
    if is_launched():
        if env_int("TORCHELASTIC_MAX_RESTARTS", 0) and config.output_dir is None:
            raise ConfigError("torchrun --max-restarts needs --output-dir: what starts again finds its run there")
    elif config.train.fsdp_offload:
        raise ConfigError("option 'train.fsdp_offload': needs processes of their own; --nproc 1 starts one")
    elif config.train.distributed != "ddp":
        log.info("distributed: %s has no effect in one process; --nproc starts several", config.train.distributed)
    if not resume:  # a resumed run may continue with another number of processes: see _resolve
        config.train.resolve_batch_size(world_size)
    with phase("importing", "plugins"):
        assembly = activate(loaded)
    assembly.check_secrets()
    sources.check_data_config(config, assembly.row_sources)
    sources.check_separate(config.data, assembly.row_sources)
    config = assembly.complete(config)
    process_group = _join_process_group(config)
    with contextlib.ExitStack() as stack:
        stack.callback(process_group.close)
        try:
            # Each host counts only the restarts that it caused.
            resume = resume or process_group.all_reduce_max(env_int("TORCHELASTIC_RESTART_COUNT", 0)) > 0
            output = remote_runs.output_place(config)
            choose = partial(run_directory.resume if resume else run_directory.new, output.directory, name)
            if output.address is not None:
                process_group.run_on_rank0(partial(_check_store, output, name, resume=resume))
            directory = process_group.run_on_rank0(choose)
            config = dataclasses.replace(config, train=_resolve(config, directory, process_group))
            resolved = assembly.resolved(config)
            # Derived for this number of processes: the run may continue with another one.
            resolved["train"]["gradient_accumulation_steps"] = None
            resolved["model"] = names.absolute(config.model)  # whoever reads it may be in another directory
            if directory.resumed:
                providers = [dataclasses.asdict(provider) for provider in assembly.table()]
                process_group.run_on_rank0(lambda: directory.check_same(resolved, providers))
            process_group.run_on_rank0(lambda: stack.enter_context(directory.held()) and None)
            assembly.run = RunInfo(directory.path, resolved)
            uploader = None
            if output.address is not None and process_group.is_rank0:
                uploader = Uploader(output.address, config.train.checkpoints_kept)
            yield _Prepared(config, loaded, assembly, process_group, directory, choose, resolved, uploader)
        except SftxError as error:
            error.rank = process_group.rank if error.rank is None else error.rank
            raise


def _check_store(output: OutputPlace, name: str, *, resume: bool) -> None:
    """Fetch a run that is to go on, where the store has more of it; refuse a place in it that holds anything else.

    Raises ConfigError, OutputError.
    """
    assert output.address is not None
    if output.is_staged and is_launched() and env_int("WORLD_SIZE") > env_int("LOCAL_WORLD_SIZE", 1):
        raise ConfigError(
            "option 'output_dir': is in a store, and checkpoints of several hosts need a directory that all of them "
            f"see; name that as output_dir, and {output.address} as upload_to"
        )
    if resume:
        remote_runs.fetch_newer(output.address, run_directory.path_to_resume(output.directory, name))
    else:
        remote_runs.check_new(output.address)


def _join_process_group(config: RunConfig) -> ProcessGroup:
    """Initialise the process group. Raises ConfigError, TrainingError, LostPeerError."""
    if not is_launched():
        return ProcessGroup()
    with phase("importing", "torch"):
        from sftx.distributed.torch_process_group import TorchProcessGroup

    with phase("joining", "the other processes"):
        return TorchProcessGroup(config.train)


def _resolve(config: RunConfig, directory: RunDirectory, process_group: ProcessGroup) -> TrainConfig:
    """Return the training options with batch sizes filled in; a resumed run keeps the rows per step that it has."""
    train, world_size = config.train, process_group.world_size
    if not directory.resumed or train.train_batch_size is not None:
        return train.resolve_batch_size(world_size)
    recorded = process_group.run_on_rank0(directory.recorded_batch_size)
    kept = dataclasses.replace(train, train_batch_size=recorded, gradient_accumulation_steps=None)
    resolved = kept.resolve_batch_size(world_size)
    if train.gradient_accumulation_steps not in (None, resolved.gradient_accumulation_steps):
        log.warning(
            "the run keeps its %d rows per step, so gradient_accumulation_steps is %s and not %s",
            recorded,
            resolved.gradient_accumulation_steps,
            train.gradient_accumulation_steps,
        )
    return resolved


# --- data, model, trainer -------------------------------------------------------------------------


def _assemble(prepared: _Prepared, times: PhaseTimes) -> Session:
    """Load data and model and build everything that trains."""
    config, assembly, process_group = prepared.config, prepared.assembly, prepared.process_group
    directory = prepared.directory

    # From here on torch and transformers are needed: seconds of imports, after everything that is quick to check.
    with phase("importing", "torch and transformers"), collector_paused():
        from sftx.checkpoint.checkpoint import Checkpoints
        from sftx.data.held_out import check_overlap
        from sftx.data.pipeline import build_pipeline
        from sftx.data.rollout_sampler import RolloutSampler
        from sftx.inspection.dataset_view import DatasetView
        from sftx.inspection.diagnosis.check_inputs import CheckInputs
        from sftx.inspection.diagnosis.start_checks import log_start_checks
        from sftx.model.generation import read_generation_settings
        from sftx.model.load import fingerprint
        from sftx.trainer import parallel
        from sftx.trainer import precision as precisions
        from sftx.trainer.evaluate import ModelEvaluator
        from sftx.trainer.evidence import shown_rows
        from sftx.trainer.observers import Observers
        from sftx.trainer.precompute import Precomputation, identity_of
        from sftx.trainer.rollout import RolloutMaker
        from sftx.trainer.run_writer import RunWriter
        from sftx.trainer.schedule import num_warmup_steps
        from sftx.trainer.session import Session

    checkpoints = Checkpoints(directory.file("checkpoints"), config.train.checkpoints_kept)
    with phase("checking", "the files of checkpoints"):
        saved = process_group.run_on_rank0(checkpoints.newest_intact) if directory.resumed else None
    process_group.run_on_rank0(lambda: directory.check_extension(saved))
    optimizer = process_group.all_or_raise(assembly.optimizer)
    has_adapters = bool(assembly.providers("sftx_adapter"))
    process_group.all_or_raise(lambda: parallel.check(config.train, optimizer, has_adapters=has_adapters))
    precision = precisions.choose(config.train, process_group.local_rank, bf16_weights=optimizer.bf16_weights)

    def make_observers(path: Path) -> Observers:
        assembly.run = RunInfo(path, prepared.resolved)
        return Observers(assembly.observers() if process_group.is_rank0 else [])

    # Made before anything takes long: a library that an observer needs and that is missing is reported now.
    with phase("importing", "what the observers need"):
        observers = process_group.all_or_raise(lambda: make_observers(directory.path))
    controls = process_group.all_or_raise(lambda: assembly.controls() if process_group.is_rank0 else {})
    with phase("loading", "the tokenizer"):
        pipeline = process_group.rank0_first(lambda: build_pipeline(config, assembly, prepared.loaded.origins))
    weights_hash = in_background(lambda: fingerprint(pipeline.model))  # reads all of them, and computes beside the rest
    all_metrics = assembly.metrics()
    evaluators = process_group.all_or_raise(assembly.evaluators)
    loss = assembly.loss()
    rollouts = [str(active.info) for active in assembly.providers("sftx_rollout")]
    _check_loss(config, loss, assembly.parsers(), rollouts, process_group.world_size, has_adapters=has_adapters)
    # Rank 0 encodes; where the rows are many, the other ranks find them in the cache.
    data = process_group.rank0_first(pipeline.load_train)
    eval_data = process_group.rank0_first(lambda: pipeline.load_eval(questions=bool(all_metrics or evaluators)))
    has_loss = pipeline.rollout is None
    metrics = _check_evaluation(config, assembly, eval_data, all_metrics, evaluators, has_loss=has_loss)
    process_group.run_on_rank0(lambda: check_overlap(data, eval_data, config.data.max_overlap))
    with phase("planning", "steps"):
        sampler = pipeline.sampler(data, config.train)
    schedule = assembly.schedule(num_warmup_steps(config.train, sampler.num_steps), sampler.num_steps)
    _check_schedule(schedule, config.train, sampler.num_steps)
    config = _with_checkpointing(config, prepared.loaded, pipeline, precision, sampler, process_group)
    with phase("preparing", "the loss"):
        for examples in (sampler.examples, eval_data.examples):
            process_group.all_or_raise(partial(loss.prepare, examples))
    trainer = _build_trainer(
        config, assembly, loss, optimizer, schedule, pipeline, sampler, precision, saved, process_group
    )
    lm = trainer.lm
    rollout = None
    if isinstance(sampler, RolloutSampler) and pipeline.rollout is not None:
        rewards, stop_ids = process_group.all_or_raise(assembly.rewards), pipeline.encoder.stop_ids
        sampler.make = rollout = RolloutMaker(pipeline.rollout, rewards, trainer, pipeline.collator, stop_ids, config)
    _check_fit(config, sampler, lm, eval_data)
    for line in lm.untrained_parts():
        log.warning("%s: %s", config.model, line)

    def check_start() -> None:
        lm.tokenizer_entries = pipeline.saved_tokenizer.entries
        view = DatasetView(config, pipeline, {"train": data, "eval": eval_data})
        log_start_checks(CheckInputs(view, lm.model.config, read_generation_settings(pipeline.model)))

    with phase("checking", "data and model"):
        process_group.run_on_rank0(check_start)
    with phase("hashing", "model and data"):
        manifest = _manifest(
            config, assembly, pipeline, data, eval_data, lm, precision, process_group, weights_hash=weights_hash()
        )
    if directory.resumed:
        process_group.run_on_rank0(lambda: directory.check_inputs(manifest))
    precomputation = None
    if loss.has_precompute:
        is_cached = config.data.cache is not False
        precomputation = Precomputation(
            trainer.strategy,
            pipeline.collator,
            precision,
            process_group,
            config.train.per_device_eval_batch_size,
            {"training": data.examples, "held-out": eval_data.examples},
            identity_of(assembly, lm, precision, manifest["model"]["sha256"]) if is_cached else None,
        )
    return Session(
        config=config,
        process_group=process_group,
        data=data,
        eval_data=eval_data,
        sampler=sampler,
        lm=lm,
        trainer=trainer,
        evaluator=ModelEvaluator(
            eval_data,
            collator=pipeline.collator,
            strategy=trainer.strategy,
            process_group=process_group,
            metrics=metrics,
            evaluators=evaluators,
            encoder=pipeline.encoder,
            precision=precision,
            stop_ids=pipeline.encoder.stop_ids,
            batch_size=config.train.per_device_eval_batch_size,
            generation=config.generation,
            has_loss=has_loss,
        ),
        observers=observers,
        controls=controls,
        make_observers=make_observers,
        choose_directory=prepared.choose,
        writer=RunWriter(
            directory,
            prepared.resolved,
            manifest,
            {"ledger.jsonl": data, "ledger-held-out.jsonl": eval_data},
            shown_rows(sampler.examples, pipeline.tokenizer) if process_group.is_rank0 else [],
            times,
        ),
        checkpoints=checkpoints,
        checkpoint=saved,
        precomputation=precomputation,
        start_report=_start_report(config, assembly, data, eval_data, sampler, lm, precision, process_group),
        rollout=rollout,
        uploader=prepared.uploader,
        save_dtype=_save_dtype(config, pipeline, lm, precision),
    )


def _start_report(
    config: RunConfig,
    assembly: Assembly,
    data: Dataset,
    eval_data: Dataset,
    sampler: Sampler,
    lm: CausalLM,
    precision: Precision,
    process_group: ProcessGroup,
) -> StartReport:
    """Return what is known of the run before its first step."""
    from sftx.model.quantised import num_weights

    parameters, scope = {id(p): p for p in lm.parameters()}.values(), sampler.scope
    return StartReport(
        providers=assembly.table(),
        model=config.model,
        device=str(lm.device),
        dtype=", ".join(filter(None, (str(precision), precision.reason))),
        num_parameters=num_weights(parameters),
        num_trainable=sum(p.numel() for p in parameters if p.requires_grad),
        reach=lm.reach or "",
        num_rows=data.ledger.num_rows,
        num_examples=scope.num_examples,
        num_label_tokens=scope.num_label_tokens,
        num_input_tokens=scope.num_input_tokens,
        num_eval_rows=eval_data.ledger.num_rows,
        formats=dict(data.formats),
        ledger=(*data.ledger.summary(), *eval_data.ledger.summary()),
        num_steps=sampler.num_steps,
        num_processes=process_group.world_size,
        train_batch_size=config.train.rows_per_step,
        per_device_train_batch_size=config.train.micro_batch_size,
        gradient_accumulation_steps=config.train.gradient_accumulation_steps or 1,
        tokens_per_step=scope.num_label_tokens / max(1, scope.num_steps),
        is_stream=config.data.streaming,
    )


def _save_dtype(config: RunConfig, pipeline: DataPipeline, lm: CausalLM, precision: Precision) -> torch.dtype | None:
    """Return the dtype to save a full model in, None when it is that of its parameters, or when adapters are saved."""
    import torch

    from sftx.model.load import stored_dtype

    trained, option = precision.base_dtype(frozen=False), config.train.save_dtype
    if lm.adapters:
        return None
    if option == "auto":
        dtype = stored_dtype(pipeline.model, trust_remote_code=config.trust_remote_code)
        return dtype if dtype.itemsize < trained.itemsize else None  # a wider one would add no information
    dtype = getattr(torch, option)
    return dtype if dtype != trained else None


def _build_trainer(
    config: RunConfig,
    assembly: Assembly,
    loss: LossStage,
    optimizer: OptimizerStage,
    schedule: ScheduleStage,
    pipeline: DataPipeline,
    sampler: Sampler,
    precision: Precision,
    saved: Path | None,
    process_group: ProcessGroup,
) -> Trainer:
    """Load the model, make it ready to train, and check that it computes what its own forward computes, packed too."""
    from sftx.checkpoint.checkpoint import load_loss_module
    from sftx.trainer.self_checks import check_packing, share_prefixes
    from sftx.trainer.trainer import Trainer

    def load() -> Trainer:
        lm = _load_model(config, assembly, pipeline, precision, saved)
        trainer = Trainer(
            lm, loss, pipeline.collator, optimizer, schedule, config.train, precision, sampler.num_steps, process_group,
            needs_gradient=pipeline.rollout is None,
        )  # fmt: skip
        if saved is not None:
            load_loss_module(lm, saved)
        return trainer

    # With fsdp2 each rank reads the whole model before it keeps its shards: one at a time, so that a host has it in
    # memory once.
    is_sharded = process_group.is_initialized and config.train.distributed == "fsdp2"
    with phase("loading", "the model"):
        trainer = process_group.one_rank_at_a_time(load) if is_sharded else load()
        trainer.strategy.broadcast_parameters()
    step, lm = trainer.strategy.step, trainer.lm
    shares = loss.shares_prefixes or pipeline.collator.shares_prefixes
    pipeline.collator.share_prefixes(False)
    with phase("checking", "the model"), process_group.detect_lost_peers(), precision.autocast():
        step.call_in_forward(lm.check)
        step.call_in_forward(lambda: check_packing(lm, pipeline.collator, sampler.examples))
        if shares:
            step.call_in_forward(lambda: share_prefixes(lm, pipeline.collator, sampler.examples))
    return trainer


def _with_checkpointing(
    config: RunConfig,
    loaded: LoadedConfig,
    pipeline: DataPipeline,
    precision: Precision,
    sampler: Sampler,
    process_group: ProcessGroup,
) -> RunConfig:
    """Return the options with gradient checkpointing chosen; it is on for all ranks if one of them needs it."""
    import numpy as np

    from sftx.data.sampler import lengths_and_groups
    from sftx.inspection.memory_plan import checkpointing

    # Of a stream only the first window is known.
    longest = pipeline.collator.row_length or (
        config.data.max_length if config.data.streaming else sampler.scope.longest
    )
    if pipeline.rollout is not None:
        examples_per_row = pipeline.rollout.num_answers
    elif pipeline.collator.row_length is not None:
        examples_per_row = 1  # `longest` is a whole row
    else:
        examples_per_row = int(np.unique(lengths_and_groups(sampler.examples)[1], return_counts=True)[1].max())
    with phase("planning", "memory"):
        chosen = process_group.all_reduce_max(
            checkpointing.choose(
                loaded,
                config,
                precision.device,
                num_processes=process_group.world_size,
                longest=longest,
                examples_per_row=examples_per_row,
            )
        )
    return dataclasses.replace(config, train=dataclasses.replace(config.train, gradient_checkpointing=chosen > 0))


def _load_model(
    config: RunConfig, assembly: Assembly, pipeline: DataPipeline, precision: Precision, saved: Path | None
) -> CausalLM:
    """Load the model with its adapters; its weights are those of the checkpoint `saved` where there is one."""
    import torch

    from sftx.checkpoint.load_run import build_model
    from sftx.inspection.diagnosis.start_checks import find_untrained_tokens
    from sftx.model.added_tokens import ids_of, untrained_rows
    from sftx.model.load import load_spec

    spec = load_spec(pipeline.model, trust_remote_code=config.trust_remote_code)
    spec = dataclasses.replace(spec, new_token_ids=ids_of(pipeline.added_tokens, pipeline.tokenizer))
    adapters, trainable = assembly.adapters(spec, saved), assembly.trainable(spec)
    # With fsdp2 the model moves to the device layer by layer, as shards.
    is_sharded = is_launched() and config.train.distributed == "fsdp2"
    lm = build_model(
        spec,
        adapters,
        pipeline.tokenizer,
        dtype=precision.base_dtype(frozen=bool(adapters)),
        device=torch.device("cpu") if is_sharded else precision.device,
        stop_ids=pipeline.encoder.stop_ids,
        saved=saved,
        seed=config.train.seed,
        trainable=trainable,
    )
    if spec.new_token_ids and (untrained := untrained_rows(lm, spec.new_token_ids)):
        providers = (a for hook in ("sftx_adapter", "sftx_trainable") for a in assembly.providers(hook))
        raise ConfigError(
            f"--add-tokens: {' and '.join(str(a.info) for a in providers)} would leave the rows of the added tokens "
            f"untrained in {' and '.join(untrained)}; lora trains them, as does freeze with embedding and head "
            "in extra_modules, or leave the plugin out"
        )
    if not lm.head_weight.requires_grad:
        embedding = cast(Any, lm.model.get_input_embeddings())
        if (finding := find_untrained_tokens(pipeline, lm.head_weight, embedding.weight)) is not None:
            log.warning("%s", finding)
    return lm


# --- checks and the manifest ----------------------------------------------------------------------


def _check_evaluation(
    config: RunConfig,
    assembly: Assembly,
    eval_data: Dataset,
    metrics: Mapping[str, MetricStage],
    evaluators: Mapping[str, EvaluatorStage],
    *,
    has_loss: bool,
) -> Mapping[str, MetricStage]:
    """Return the metrics that can score something: without held-out conversations those of larger plugins are left out.

    Raises ConfigError when options ask for an evaluation that the held-out rows do not allow.
    """
    if metrics and not eval_data.questions:
        needs = "needs held-out conversations that end with an assistant's turn"
        if alone := [name for name in metrics if not assembly.has_other_hooks(name, "sftx_metric")]:
            raise ConfigError(
                f"the metric {', '.join(alone)} {needs}; give some with --eval-data or --eval-fraction, or leave the "
                "metric out"
            )
        log.warning("the metric of %s is left out: it %s", ", ".join(map(str, metrics.values())), needs)
        metrics = {}
    options = config.train
    if not has_loss and options.best_metric in ("loss", "perplexity") and (metrics or evaluators):
        raise ConfigError(
            f"option 'train.metric_for_best_model': with a rollout there is no {options.best_metric} of held-out "
            f"rows; name a score of {', '.join([*metrics, *evaluators])}"
        )
    if len(eval_data.examples) and (has_loss or metrics):
        return metrics
    if evaluators:
        if options.best_metric in ("loss", "perplexity"):
            raise ConfigError(
                f"option 'train.metric_for_best_model': without held-out rows there is no {options.best_metric}; name "
                f"a score of {', '.join(evaluators)}, or give rows with --eval-data or --eval-fraction"
            )
        return metrics
    is_unscored = len(eval_data.examples) > 0
    why = "in a run with a rollout held-out rows have no loss, and nothing scores answers to them"
    remedy = "add a metric, such as --plugin exact-match"
    for name, value in (("metric_for_best_model", options.best_metric), ("eval_steps", options.eval_steps)):
        if value is not None:
            raise ConfigError(
                f"option 'train.{name}': {why}; {remedy}, or leave it out"
                if is_unscored
                else f"option 'train.{name}' needs held-out rows; give some with --eval-data or --eval-fraction, or "
                "leave it out"
            )
    if is_unscored:
        held_out = counted(len(eval_data.examples), "held-out row")
        log.warning("%s not used: %s; %s", held_out, why, remedy)
    return metrics


def _check_schedule(schedule: ScheduleStage, config: TrainConfig, num_steps: int) -> None:
    """Raise ConfigError when no step has a learning rate above 0; say how many have none, and warn of mistakes."""
    from sftx.trainer.schedule import num_steps_at_zero, num_warmup_steps

    warmup = num_warmup_steps(config, num_steps)
    num_at_zero = num_steps_at_zero(schedule, config, num_steps)
    steps = "the only step" if num_steps == 1 else f"all {num_steps} steps"
    if num_steps and num_at_zero == num_steps:
        raise ConfigError(
            f"option 'train.warmup_steps': nothing would be trained, since the learning rate is 0 in {steps} of this "
            f"run, of which {warmup} warm up from 0; leave warm-up out, or train more steps"
            if warmup
            else f"{schedule}: nothing would be trained, since the learning rate is 0 in {steps} of this run"
        )
    if num_at_zero:
        log.info("the learning rate is 0 in %d of %d steps (warm-up begins at 0)", num_at_zero, num_steps)
    if warmup >= num_steps:
        log.warning("%s warm up (warmup_steps %d): the peak rate is never reached", steps, warmup)


def _check_loss(
    config: RunConfig,
    loss: LossStage,
    parsers: Mapping[str, ParserStage],
    rollouts: Sequence[str],
    world_size: int,
    *,
    has_adapters: bool,
) -> None:
    """Raise ConfigError for a loss that this run cannot compute as it is meant. `rollouts`: names of plugins."""
    if not loss.answers_only and (unfit := [str(parser) for parser in parsers.values() if parser.has_rejected]):
        raise ConfigError(
            f"{' and '.join(unfit)} reads answers that are marked as worse ones, and {loss} would train the model to "
            "give them too; name a loss that compares answers in its place (dpo, kto, orpo or simpo), or leave it out: "
            "of a pair without a question of its own, hh-rlhf reads the chosen answer alone"
        )
    if loss.answers_only and config.data.train_on_prompt:
        raise ConfigError(
            f"option 'data.train_on_prompt': {loss} compares answers, and would take the prompts for a part of them; "
            "leave it out"
        )
    if loss.needs_adapter and not has_adapters:
        raise ConfigError(f"{loss}: compares with the model without its adapters, and there is none; add --plugin lora")
    if loss.has_precompute or loss.has_prepare:
        what = "computes a value of every example" if loss.has_precompute else "looks at all examples"
        if config.data.streaming:
            raise ConfigError(
                f"option 'data.streaming': {loss} {what} before the first step, and a stream has no end; leave it out, "
                "or choose options of the loss with which it needs none"
            )
        if rollouts:
            raise ConfigError(
                f"{loss} {what} before the first step, and {rollouts[0]} makes the examples of each step when it is "
                "due; leave one of them out"
            )
    rows, size = config.train.rows_per_step, config.train.micro_batch_size
    if loss.batch_statistic and (rows == 1 or size < rows or world_size > 1):
        advice = (
            "give it more than one row, with --train-batch-size"
            if rows == 1
            else f"compute the step at once, with --per-device-train-batch-size {rows} in one process"
        )
        raise ConfigError(f"{loss}: compares the examples of a step with one another; {advice}")


def _check_fit(config: RunConfig, sampler: Sampler, lm: CausalLM, eval_data: Dataset) -> None:
    """Raise ModelError for token ids without an embedding; warn of rows beyond its length."""
    from sftx.data.sampler import StreamSampler

    num_rows = cast(Any, lm.model.get_input_embeddings()).weight.shape[0]
    largest = max(sampler.scope.largest_id, eval_data.examples.largest_id)
    if largest >= num_rows:
        raise ModelError(
            f"model {config.model}: its tokenizer gives the id {largest}, its embedding has {num_rows} rows; "
            "they do not belong together"
        )
    if isinstance(sampler, StreamSampler):
        sampler.num_embeddings = num_rows  # later windows are checked against it when they are read
    longest = max(sampler.scope.longest, int(eval_data.examples.lengths.max(initial=0)))
    limit = getattr(lm.config, "max_position_embeddings", None)
    if limit is not None and longest > limit:
        log.warning("the longest row has %d tokens, the model was made for %d; lower data.max_length", longest, limit)


def _manifest(
    config: RunConfig,
    assembly: Assembly,
    pipeline: DataPipeline,
    data: Dataset,
    eval_data: Dataset,
    lm: CausalLM,
    precision: Precision,
    process_group: ProcessGroup,
    *,
    weights_hash: str | None,
) -> dict[str, Any]:
    """Return versions, device and plugins, and hashes of the model and the data."""
    import torch

    from sftx import __version__

    num_held_out = sum(entry.action == "held out" for entry in data.ledger.entries)
    versions: dict[str, str | None] = {}
    for library in _LIBRARIES:
        try:
            versions[library] = importlib.metadata.version(library)
        except importlib.metadata.PackageNotFoundError:
            versions[library] = None
    return {
        "sftx": __version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "libraries": versions,
        "device": str(lm.device),
        "num_threads": torch.get_num_threads(),
        "dtype": str(precision),
        "num_processes": process_group.world_size,
        "plugins": [dataclasses.asdict(provider) for provider in assembly.table()],
        "model": {
            "name": config.model,
            "files": pipeline.model,
            "sha256": weights_hash,
            "revision": getattr(lm.model.config, "_commit_hash", None),
        },
        "data": [_describe(source, config.data, assembly) for source in config.data.train],
        "eval_data": [_describe(source, config.data, assembly) for source in config.data.eval],
        "num_rows": {"training": data.ledger.num_rows - num_held_out, "held-out": eval_data.ledger.num_rows},
        "eval_split": _describe_split(data) if config.data.eval_fraction is not None else None,
    }


def _describe_split(data: Dataset) -> dict[str, Any]:
    """Return how many of the training data's rows are held out, with a hash of their places, which the ledger lists."""
    held_out = [str(entry.where) for entry in data.ledger.entries if entry.action == "held out"]
    digest = hashlib.sha256("\n".join(held_out).encode(errors="surrogateescape")).hexdigest()
    return {"num_rows": data.ledger.num_rows, "num_held_out": len(held_out), "sha256": digest}


def _describe(source: Source, config: DataConfig, assembly: Assembly) -> dict[str, Any]:
    """Return a source with a hash of its content; of a stream only its ends are hashed, which is read once."""
    look = sources.glance if config.streaming else sources.fingerprint
    content = look(source, assembly.row_sources)
    described = {"path": source.path, "subset": source.subset, "split": source.split, "fingerprint": content}
    return described | ({"files": files} if (files := sources.file_names(source, assembly.row_sources)) else {})
