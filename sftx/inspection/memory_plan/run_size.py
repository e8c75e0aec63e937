"""The size of a run from its data: its steps, tokens and evaluations, and what its examples are like."""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from sftx.assembly.registry import Assembly
from sftx.assembly.stages.data_stages import ParserStage
from sftx.config.loading import LoadedConfig
from sftx.config.options import Filters, RunConfig
from sftx.data import sources
from sftx.data.encoder import Encoder
from sftx.data.row_encoder import EncodedRow, RowEncoder, parse_record
from sftx.errors import DataError, SftxError
from sftx.inspection.dataset_view import view_dataset
from sftx.inspection.memory_plan.blank_policy import blank_group
from sftx.inspection.memory_plan.fake_tensors import BLANK
from sftx.model import names
from sftx.model.load import load_tokenizer
from sftx.types import Example, Location, Parsed


@dataclass(frozen=True)
class RunSize:
    """The size of a run: its steps, rows and tokens, all epochs and evaluations together."""

    num_steps: int
    num_input_tokens: int
    """Those of all steps."""
    num_evaluations: int = 0
    num_eval_rows: int = 0
    num_eval_tokens: int = 0
    """Input tokens of one evaluation."""
    prompt_lengths: tuple[int, ...] = ()
    """Tokens of each prompt that an evaluation answers."""


def measure_run(loaded: LoadedConfig) -> RunSize:
    """Encode the data of a run, or the first window of a stream, and count. The cache keeps what was encoded.

    Raises SftxError when there is no data or no tokenizer, or when the run would refuse its rows.
    """
    config = loaded.config
    view = view_dataset(loaded)
    data = view.dataset("train")
    if problems := view.problems("train"):
        raise DataError(problems[0])
    sampler = view.pipeline.sampler(data, config.train)
    tokens_per_step = sampler.scope.num_input_tokens / sampler.scope.num_steps
    num_steps = config.train.max_steps or sampler.num_steps
    size = RunSize(num_steps, round(num_steps * tokens_per_step))
    if not config.data.has_eval:
        return size
    has_metrics = bool(view.pipeline.assembly.providers("sftx_metric"))
    held_out = view.pipeline.load_eval(questions=has_metrics)
    every = config.train.eval_steps
    return RunSize(
        size.num_steps,
        size.num_input_tokens,
        # Before the first step and after the last, and every so many steps between.
        num_evaluations=2 + (0 if every is None else math.ceil(num_steps / every) - 1),
        num_eval_rows=len(held_out.examples),
        num_eval_tokens=int(held_out.examples.lengths.sum()),
        prompt_lengths=tuple(len(question.prompt_ids) for question in held_out.questions)[: config.generation.max_rows],
    )


def first_group(config: RunConfig, assembly: Assembly) -> tuple[Example, ...]:
    """Return the examples of one record, whose extras a collator may need: a preference pair has two sides.

    The record is the first of the run's data; without data, a sample of the plugin that also brings the collator or the
    loss; without such a parser, a plain conversation. Examples with extras have their tokens, some of which may stand
    for the extras, if the model has a tokenizer; others have none. Of a run with a rollout, the examples are those that
    it makes of one question.
    """
    if (rollout := assembly.rollout()) is not None:
        return blank_group(rollout, assembly)
    parsers = assembly.parsers()
    if (parsed := _parse_first(config, parsers, assembly)) is None:
        owners = [active.info.name for hook in ("sftx_collator", "sftx_loss") for active in assembly.providers(hook)]
        parser = next((parsers[name] for name in owners if name in parsers), None)
        parsed = () if parser is None else parser.parse(parser.samples[0], Location("sample", 1))
    if any(one.extras for one in parsed):
        with contextlib.suppress(SftxError):  # planning needs no tokenizer
            tokenizer = load_tokenizer(names.resolve(config.model), trust_remote_code=config.trust_remote_code)
            encode = RowEncoder(parsers, Encoder(tokenizer, assembly.template(tokenizer)), config.data)
            if examples := encode.encode(parsed, EncodedRow(Location("sample", 1)), Filters()).examples:
                return tuple(examples)
    return tuple(dataclasses.replace(BLANK, extras=one.extras) for one in parsed) or (BLANK,)


def _parse_first(config: RunConfig, parsers: Mapping[str, ParserStage], assembly: Assembly) -> Sequence[Parsed] | None:
    """Return what the first record of the data is parsed as; None when it cannot be read."""
    try:
        for source in config.data.train:
            for where, record in sources.read(source, assembly.row_sources, encoding=config.data.encoding):
                return parse_record(record, EncodedRow(where), parsers, source, config.data)
    except (SftxError, OSError):
        pass  # planning needs no data
    return None
