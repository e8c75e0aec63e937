"""`CheckInputs` is what the checks of `sftx doctor` read, and `Finding` is what they return."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from itertools import islice
from typing import TYPE_CHECKING, Any, Final, Literal

from sftx.data import sources
from sftx.data.dataset import Dataset
from sftx.data.encoder import Encoder
from sftx.data.ledger import Entry
from sftx.data.row_encoder import EncodedRow, mark_trained, parse_record
from sftx.errors import DataError, SftxError
from sftx.inspection.dataset_view import DatasetView
from sftx.inspection.diagnosis.mojibake import find_mojibake
from sftx.types import Conversation, Location, ModelSpec, Parsed, PlainText

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedTokenizerBase

Severity = Literal["error", "warning", "note"]
"""`error`: the run stops, or trains something unintended; `warning`: a likely mistake; `note`: worth knowing."""

_MAX_TEXT_ROWS: Final = 100_000
"""The text of at most so many rows is read; all other checks see every row."""
_SAMPLE_ROWS: Final = 4
"""So many rows of each source are rendered to compare ids."""


@dataclass(frozen=True)
class Finding:
    """One problem that a check found."""

    severity: Severity
    check: str
    """The name of the check."""
    seen: str
    """The problem and its place."""
    fix: str

    def __str__(self) -> str:
        return f"{self.seen}; {self.fix}"


@dataclass
class TextProblems:
    """Places of training rows whose text looks wrong before it is encoded."""

    empty_turns: list[str] = field(default_factory=list)
    mojibake: list[tuple[str, str]] = field(default_factory=list)
    """The place of each row with text that was decoded wrongly, and the first damaged piece."""
    spelled_controls: list[tuple[str, str]] = field(default_factory=list)
    """The place of each row whose text spells a control token, and that token."""
    leading_bos: list[str] = field(default_factory=list)
    """The place of each row whose first text begins with the text of the BOS token."""


@dataclass
class CheckInputs:
    """The data, tokenizer and configuration of one run; expensive parts are computed once, when first used."""

    view: DatasetView
    model_config: PretrainedConfig
    generation_settings: Mapping[str, Any] | None
    """The values of generation_config.json; None when the model has none."""

    @cached_property
    def train(self) -> Dataset:
        return self.view.dataset("train")

    @cached_property
    def held_out(self) -> Dataset:
        return self.view.dataset("eval")

    @property
    def has_rollout(self) -> bool:
        """Return whether the training rows are questions, of which nothing is trained."""
        return self.view.pipeline.rollout is not None

    @property
    def encoder(self) -> Encoder:
        return self.view.pipeline.encoder

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The run's tokenizer. Its chat template is the run's; the model's own is `own_chat_template`."""
        return self.view.pipeline.tokenizer

    @property
    def own_chat_template(self) -> str | None:
        return self.view.pipeline.own_chat_template

    @property
    def has_turns(self) -> bool:
        """Return whether the training rows are conversations; of a stream, the first ones are looked at."""
        return self.train.has_turns or any(isinstance(parsed, Conversation) for _, parsed in self.sample)

    @cached_property
    def sample(self) -> list[tuple[Location, Parsed]]:
        """The first training rows of each source that can be read, with the turns marked that are trained."""
        encode, rows = self.view.pipeline.encode, []
        for source in self.view.sources("train"):
            config = encode.config
            row_sources = self.view.pipeline.assembly.row_sources
            rows_of_source = sources.read(source, row_sources, encoding=config.encoding, streaming=config.streaming)
            for where, record in islice(rows_of_source, _SAMPLE_ROWS):
                try:
                    parsed = parse_record(record, EncodedRow(where), encode.parsers, source, encode.config)
                except DataError:
                    continue  # the ledger lists rows that cannot be read
                rows += [(where, mark_trained(part, encode.config)) for part in parsed]
        return rows

    @cached_property
    def spec(self) -> ModelSpec:
        from sftx.model.load import load_spec

        return load_spec(self.view.pipeline.model, trust_remote_code=self.view.config.trust_remote_code)

    def adapters(self) -> list[str]:
        """Return the names of the adapter plugins; without one, all weights are trained."""
        return [active.info.name for active in self.view.pipeline.assembly.providers("sftx_adapter")]

    def freezes_ends(self) -> bool:
        """Return whether a plugin has chosen what trains, and embedding or head are not among it."""
        try:
            trainable = self.view.pipeline.assembly.trainable(self.spec)
        except SftxError:  # another check reports it
            return False
        model: Any = self.spec.skeleton
        ends = {id(model.get_input_embeddings().weight), id(model.get_output_embeddings().weight)}
        names = model.named_parameters(remove_duplicate=False)
        return trainable is not None and bool(ends - {id(parameter) for name, parameter in names if name in trainable})

    def token_repr(self, token_id: int) -> str:
        return repr(str(self.tokenizer.decode([token_id], clean_up_tokenization_spaces=False)))

    @cached_property
    def text_problems(self) -> TextProblems:
        problems = TextProblems()
        encode, tokenizer = self.view.pipeline.encode, self.view.pipeline.tokenizer
        template = encode.encoder.template
        controls = set(template.controls) if template is not None else set()
        controls |= {token for token in tokenizer.all_special_tokens if len(token) > 1}
        bos = str(tokenizer.bos_token or "")
        for number, (source, where, record) in enumerate(self.view.records("train")):
            if number == _MAX_TEXT_ROWS:
                break
            try:
                parsed = parse_record(record, EncodedRow(where), encode.parsers, source, encode.config)
            except DataError:
                continue  # the ledger lists rows that cannot be read
            texts = [text for part in parsed for text in _texts(part)]
            if damaged := next(filter(None, map(find_mojibake, texts)), ""):
                problems.mojibake.append((str(where), damaged))
            if spelled := next((token for token in sorted(controls) if any(token in text for text in texts)), ""):
                problems.spelled_controls.append((str(where), spelled))
            if bos and texts and texts[0].startswith(bos):
                problems.leading_bos.append(str(where))
            if any(_has_empty_turn(part) for part in parsed):
                problems.empty_turns.append(str(where))
        return problems


def cut_entries(data: Dataset) -> list[Entry]:
    """Return the entries of rows that were longer than max_length and are cut."""
    return [entry for entry in data.ledger.entries if entry.action == "cut"]


def longest_row(data: Dataset) -> int:
    """Return the length of the longest row before rows were cut, in tokens."""
    return max((entry.length for entry in cut_entries(data)), default=0)


Check = Callable[[CheckInputs], Iterator[Finding]]
"""A check's name is that of its function, with `-` for `_`."""


def _texts(parsed: Parsed) -> Iterator[str]:
    if isinstance(parsed, Conversation):
        for message in parsed.messages:
            yield message.content
            yield message.reasoning
    elif isinstance(parsed, PlainText):
        yield parsed.text


def _has_empty_turn(parsed: Parsed) -> bool:
    return isinstance(parsed, Conversation) and any(
        not (message.content.strip() or message.reasoning.strip() or message.tool_calls) for message in parsed.messages
    )


def load_check_inputs(view: DatasetView) -> CheckInputs:
    """Load the small configuration files of the model. Raises ModelError."""
    from sftx.model.generation import load_generation_config, read_generation_settings
    from sftx.model.load import load_spec

    model = view.pipeline.model
    # The modules are built too, without weights: what transformers has to say of them, and sftx of the settings, is
    # passed on.
    config = load_spec(model, trust_remote_code=view.config.trust_remote_code).config
    load_generation_config(model)
    return CheckInputs(view, config, read_generation_settings(model))
