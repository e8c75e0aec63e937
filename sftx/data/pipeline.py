"""The data pipeline of a run: tokenizer, encoder and collator, and the datasets that are made with them.

`sftx run`, `inspect`, `doctor` and `plan` share it. Building it reads the tokenizer and no data.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

from sftx.assembly.registry import Assembly
from sftx.assembly.stages.data_stages import CollatorStage
from sftx.assembly.stages.rollout_stages import RolloutStage
from sftx.config.options import DataConfig, RunConfig, Source, TrainConfig
from sftx.config.run_file import Origins
from sftx.data import held_out, mixture, preprocess
from sftx.data.cache import code_digest
from sftx.data.dataset import Dataset
from sftx.data.encoder import Encoder
from sftx.data.preprocess import Part
from sftx.data.rollout_sampler import RolloutSampler
from sftx.data.row_encoder import RowEncoder
from sftx.data.sampler import EpochSampler, Sampler, StreamSampler
from sftx.data.stream import Stream
from sftx.errors import ConfigError, DataError, did_you_mean
from sftx.model import names
from sftx.phases import phase

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from sftx.model.saved_tokenizer import SavedTokenizer


Split: TypeAlias = Literal["train", "eval"]


@dataclass
class DataPipeline:
    """Turns the sources of a run into examples, and examples into steps."""

    config: DataConfig
    assembly: Assembly
    model: str
    """Directory or hub id of the model whose tokenizer this is."""
    tokenizer: PreTrainedTokenizerBase
    encode: RowEncoder
    collator: CollatorStage
    added_tokens: tuple[str, ...]
    """Control tokens of the template that the tokenizer lacked."""
    own_chat_template: str | None
    """The chat template that the model came with; the tokenizer has the run's."""
    trust_remote_code: bool = False
    rollout: RolloutStage | None = None
    """What makes examples of the training rows, which are questions then."""

    @property
    def encoder(self) -> Encoder:
        return self.encode.encoder

    @cached_property
    def saved_tokenizer(self) -> SavedTokenizer:
        """The tokenizer as it is saved with the result, read back from files."""
        from sftx.model.load import load_config
        from sftx.model.saved_tokenizer import save_and_read_back

        trust = self.trust_remote_code
        is_bare = trust or self.assembly.providers("sftx_adapter")  # code of the model's own reads its own config.json
        model_type = None if is_bare else load_config(self.model).model_type
        return save_and_read_back(self.tokenizer, self.encoder.stop_ids, model_type, trust_remote_code=trust)

    @property
    def encode_eval(self) -> RowEncoder:
        """The encoder of held-out rows. They are never cut in their concatenation: a row's loss depends on it alone."""
        return dataclasses.replace(self.encode, wrapped=False, answer_length=None)

    def load_train(self, *, check: bool = True) -> Dataset:
        """Encode the training rows; an empty dataset when they are streamed. `check`: refuse as a run does."""
        if self.config.streaming:
            return Dataset()
        data = self._load(self.config.train, self.encode, "training rows", self.part("train"), check=check)
        wrap_length = self.collator.wrap_length
        if wrap_length is not None and len(data.examples):
            groups = data.examples.groups
            if data.has_turns:
                raise DataError(
                    f"{data.examples[0].row_id}: conversations are not wrapped, since a cut separates an answer from "
                    "its question; pack them whole (packed.strategy=bfd)"
                )
            if len(groups) != len(set(groups.tolist())):
                raise DataError(f"{data.examples[0].row_id}: rows that belong together (pairs) are not wrapped")
            data.examples = data.examples.wrapped(wrap_length)
        return data

    def load_eval(self, *, questions: bool = False, check: bool = True) -> Dataset:
        """Encode the held-out rows, with `questions` for generation where asked for. `check`: refuse as a run does."""
        encode = dataclasses.replace(self.encode_eval, questions=questions)
        return self._load(self.sources("eval"), encode, "held-out rows", self.part("eval"), check=check)

    def sources(self, split: Split) -> tuple[Source, ...]:
        """Return the sources of a split; those of held-out rows are the training data where `eval_fraction` is set."""
        is_train = split == "train" or self.config.eval_fraction is not None
        return self.config.train if is_train else self.config.eval

    def part(self, split: Split) -> Part | None:
        """Return which rows of its sources a split has; None stands for all."""
        if self.config.eval_fraction is None:
            return None
        return Part(lambda: self._held_out, is_held_out=split == "eval")

    @cached_property
    def _held_out(self) -> frozenset[tuple[int, int]]:
        return held_out.choose(self.config.train, self.config, self.encode.parsers, self.assembly.row_sources)

    def _load(
        self, data_sources: Sequence[Source], encode: RowEncoder, what: str, part: Part | None, *, check: bool
    ) -> Dataset:
        # Besides the options of `data` and the tokenizer, this determines how a row is encoded.
        identity: dict[str, Any] = {}
        packages = set()
        for hook in ("sftx_source", "sftx_parser", "sftx_template"):
            for active in self.assembly.providers(hook):
                packages.add(type(active.plugin).__module__.partition(".")[0])
                identity[f"{hook} {active.info.name}"] = [active.info.value, active.info.version, active.options]
        identity["code"] = {package: code_digest(package) for package in sorted(packages)}
        with phase("encoding", what, unit="rows") as progress:
            data = preprocess.load_dataset(
                data_sources,
                encode,
                identity=identity,
                part=part,
                row_sources=self.assembly.row_sources,
                count=progress.update,
            )
        if check:
            data.check(encode)
        return data

    def sampler(self, data: Dataset, config: TrainConfig) -> Sampler:
        """Return the steps of a run on the dataset, or on the stream."""
        if self.config.streaming:
            stream = Stream(
                self.config.train,
                self.encode,
                config.seed,
                data.ledger,
                data.formats,
                row_sources=self.assembly.row_sources,
            )
            return StreamSampler(stream, self.collator, config, self.config.plan_window)
        weights = [source.weight for source in self.config.train]
        examples = data.examples
        draw = partial(
            mixture.sample, examples.groups, examples.sources, weights, self.config.mix_strategy, seed=config.seed
        )
        if self.rollout is not None:
            return RolloutSampler(
                examples, data.questions, self.collator, config, self.rollout, lambda epoch: draw(epoch=epoch)
            )
        return EpochSampler(examples, self.collator, config, lambda epoch: draw(epoch=epoch))


def build_pipeline(config: RunConfig, assembly: Assembly, origins: Origins) -> DataPipeline:
    """Load the tokenizer and call the hooks of the data stages. Raises ConfigError, PluginError, ModelError."""
    from sftx.model.added_tokens import add_missing
    from sftx.model.load import load_tokenizer

    check_formats(config.data, origins, [active.info.name for active in assembly.providers("sftx_parser")])
    model = names.resolve(config.model)
    tokenizer = load_tokenizer(model, trust_remote_code=config.trust_remote_code)
    own_chat_template = tokenizer.chat_template
    template = assembly.template(tokenizer)
    if template is not None and template.chat_template is not None:
        tokenizer.chat_template = template.chat_template  # saved with the result: served as it was trained
    added = add_missing(template.controls, tokenizer) if config.add_tokens and template is not None else []
    collator = assembly.collator(config.data.max_length)
    is_wrapped = collator.wrap_length is not None
    if is_wrapped and config.data.streaming:
        raise ConfigError("option 'data.streaming': a stream is not cut into rows of one length; leave wrapping out")
    rollout = assembly.rollout()
    if rollout is not None and (config.data.streaming or is_wrapped):
        option = "data.streaming" if config.data.streaming else "packed.strategy"
        raise ConfigError(
            f"option {option!r}: {rollout} asks whole questions of a dataset that is complete; leave it out"
        )
    encode = RowEncoder(
        assembly.parsers(),
        Encoder(tokenizer, template),
        config.data,
        answer_length=None if rollout is None else rollout.max_new_tokens,
        wrapped=is_wrapped,
    )
    return DataPipeline(
        config=config.data,
        assembly=assembly,
        model=model,
        tokenizer=tokenizer,
        encode=encode,
        collator=collator,
        added_tokens=tuple(added),
        own_chat_template=own_chat_template if isinstance(own_chat_template, str) else None,
        trust_remote_code=config.trust_remote_code,
        rollout=rollout,
    )


def check_formats(data: DataConfig, origins: Origins, parsers: Collection[str]) -> None:
    """Raise ConfigError when a requested format has no parser in the run."""
    for name in (data.format, *(source.format for source in (*data.train, *data.eval))):
        if name is not None and name not in parsers:
            hint = did_you_mean(name, parsers) or f"; it has {', '.join(parsers)}"
            place = origins.of("data.format") or origins.of("data.train")
            raise ConfigError(f"{place}: option 'data.format': no parser {name!r} in this run{hint}")
