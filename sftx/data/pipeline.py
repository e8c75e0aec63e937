"""A run's options become its tokenizer, its encoder and its datasets: what `run`, `inspect` and `doctor` share."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from sftx.assembly.registry import Assembly
from sftx.config.loading import LoadedConfig
from sftx.config.options import RunConfig, Source
from sftx.data import mixture, preprocess
from sftx.data.cache import code_digest
from sftx.data.encoder import Encoder
from sftx.data.preprocess import Dataset
from sftx.data.row_encoder import RowEncoder
from sftx.data.stream import Stream
from sftx.errors import ConfigError, DataError, did_you_mean
from sftx.model import names
from sftx.types import Collator

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from sftx.data.sampler import Plan, StreamPlan


@dataclass
class Setup:
    """What data becomes examples with."""

    config: RunConfig
    assembly: Assembly
    model: str
    """Directory or hub id."""
    tokenizer: PreTrainedTokenizerBase
    encode: RowEncoder
    collator: Collator
    added_tokens: tuple[str, ...]
    """Control tokens of the template that the tokenizer lacked."""
    wrap_length: int | None
    """Where not None, examples are cut where their concatenation passes a multiple of it."""

    @property
    def encoder(self) -> Encoder:
        return self.encode.encoder

    @property
    def encode_held_out(self) -> RowEncoder:
        """Rows are never cut into one length here: a loss on them must not depend on what stands beside them."""
        return dataclasses.replace(self.encode, wrapped=False)

    def train(self, *, check: bool = True) -> Dataset:
        """The training rows; empty when they are streamed. Raises DataError, with `check` as a run would."""
        data = self.config.data
        if data.streaming:
            return Dataset()
        found = self._prepared(data.train, self.encode, check=check)
        if self.wrap_length is not None and len(found.examples):
            _check_can_be_cut(found)
            found.examples = found.examples.wrapped(self.wrap_length)
        return found

    def held_out(self, *, questions: bool = False, check: bool = True) -> Dataset:
        """The held-out rows, with what can be asked of them on demand. Raises DataError as `train` does."""
        data = self.config.data
        encode = dataclasses.replace(self.encode_held_out, questions=questions)
        return self._prepared(data.eval, encode, check=check)

    def _prepared(self, wanted: Sequence[Source], encode: RowEncoder, *, check: bool) -> Dataset:
        found = preprocess.prepare(wanted, encode, identity=self._identity())
        if check:
            found.check(encode)
        return found

    def plan(self, data: Dataset) -> Plan | StreamPlan:
        """The steps of the run."""
        from sftx.data.sampler import Plan, StreamPlan

        config, options = self.config.train, self.config.data
        if options.streaming:
            stream = Stream(options.train, self.encode, config.seed, data.ledger, data.formats)
            return StreamPlan(stream, self.collator, config, options.plan_window)
        draw = partial(
            mixture.sample,
            data.examples.groups,
            data.examples.sources,
            [source.weight for source in options.train],
            options.mix_strategy,
            seed=config.seed,
        )
        return Plan(data.examples, self.collator, config, lambda epoch: draw(epoch=epoch))

    def _identity(self) -> Mapping[str, Any]:
        """What decides, besides the options of `data` and the tokenizer, what a row becomes."""
        found: dict[str, Any] = {}
        packages = set()
        for hook in ("sftx_parser", "sftx_template"):
            for active in self.assembly.providers(hook):
                packages.add(type(active.plugin).__module__.partition(".")[0])
                found[f"{hook} {active.info.name}"] = [active.info.value, active.info.version, active.options]
        return found | {"code": {package: code_digest(package) for package in sorted(packages)}}


def set_up(loaded: LoadedConfig, assembly: Assembly) -> Setup:
    """Raises ConfigError, PluginError, ModelError; reads no data yet."""
    from sftx.model.added_tokens import add_missing
    from sftx.model.load import load_tokenizer

    config = loaded.config
    check_formats(loaded, [active.info.name for active in assembly.providers("sftx_parser")])
    model = names.resolve(config.model)
    tokenizer = load_tokenizer(model, trust_remote_code=config.trust_remote_code)
    template = assembly.template(tokenizer)
    if template is not None and template.chat_template is not None:
        tokenizer.chat_template = template.chat_template  # saved with the result: served as it was trained
    added = add_missing(template.controls, tokenizer) if config.add_tokens and template is not None else []
    collator = assembly.collator(config.data.max_length)
    wrap_length: int | None = getattr(collator, "wrap_length", None)
    if wrap_length is not None and config.data.streaming:
        raise ConfigError("option 'data.streaming': a stream is not cut into rows of one length; leave wrapping out")
    encoder = Encoder(tokenizer, template)
    encode = RowEncoder(assembly.parsers(), encoder, config.data, wrapped=wrap_length is not None)
    return Setup(config, assembly, model, tokenizer, encode, collator, tuple(added), wrap_length)


def check_formats(loaded: LoadedConfig, parsers: Collection[str]) -> None:
    """Raises ConfigError when a parser that is to read rows is not in the run."""
    data = loaded.config.data
    for wanted in (data.format, *(source.format for source in (*data.train, *data.eval))):
        if wanted is not None and wanted not in parsers:
            hint = did_you_mean(wanted, parsers) or f"; it has {', '.join(parsers)}"
            place = loaded.origins.of("data.format") or loaded.origins.of("data.train")
            raise ConfigError(f"{place}: option 'data.format': no parser {wanted!r} in this run{hint}")


def _check_can_be_cut(data: Dataset) -> None:
    """Raises DataError where a cut would part an answer from its question, or a pair."""
    if data.has_turns:
        raise DataError(
            f"{data.examples[0].row_id}: conversations are not wrapped, since a cut parts an answer from its "
            "question; pack them whole (packed.strategy=bfd)"
        )
    groups = data.examples.groups
    if len(groups) != len(set(groups.tolist())):
        raise DataError(f"{data.examples[0].row_id}: rows that belong together (pairs) are not wrapped")
