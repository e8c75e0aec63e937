"""What the checks of `sftx doctor` look at, read once, and what they give."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any, Final, Literal

from sftx.data.dataset import Dataset
from sftx.data.encoder import Encoder
from sftx.data.row_encoder import EncodedRow, parse_record
from sftx.errors import DataError
from sftx.inspection.dataset_view import Look
from sftx.inspection.diagnosis.mojibake import mojibake
from sftx.types import Conversation, Parsed, PlainText

if TYPE_CHECKING:
    from transformers import GenerationConfig, PretrainedConfig, PreTrainedTokenizerBase

Severity = Literal["error", "warning", "note"]
"""`error`: the run stops, or trains what is not meant; `warning`: likely a mistake; `note`: good to know."""

_MOST_READ: Final = 100_000
"""Rows whose text is looked at; the figures are of all rows."""


@dataclass(frozen=True)
class Finding:
    """One thing that a check found."""

    severity: Severity
    check: str
    """Which one found it."""
    seen: str
    fix: str


@dataclass
class Texts:
    """What the text of the training rows shows, before it is encoded: where each was seen."""

    num_rows: int = 0
    empty: list[str] = field(default_factory=list)
    """Rows with a turn that says nothing."""
    damaged: list[tuple[str, str]] = field(default_factory=list)
    """Rows with mojibake, and the first piece of it."""
    spelled: list[tuple[str, str]] = field(default_factory=list)
    """Rows whose text spells a control token, and which."""
    begins: list[str] = field(default_factory=list)
    """Rows whose first text begins with the text of the BOS token."""


@dataclass
class Facts:
    """What the checks look at."""

    look: Look
    own: PreTrainedTokenizerBase
    """The tokenizer as it lies beside the model, with its own chat template."""
    model_config: PretrainedConfig
    generation_config: GenerationConfig | None

    @cached_property
    def data(self) -> Dataset:
        return self.look.dataset("train")

    @cached_property
    def held_out(self) -> Dataset:
        return self.look.dataset("eval")

    @property
    def encoder(self) -> Encoder:
        return self.look.prepared.encoder

    def adapters(self) -> list[str]:
        """Names of the plugins that train on a frozen model; none is full fine-tuning."""
        return [active.info.name for active in self.look.prepared.assembly.providers("sftx_adapter")]

    def token(self, token_id: int) -> str:
        return repr(str(self.own.decode([token_id], clean_up_tokenization_spaces=False)))

    @cached_property
    def texts(self) -> Texts:
        found = Texts()
        encode, tokenizer = self.look.prepared.encode, self.look.prepared.tokenizer
        controls: set[str] = set() if encode.encoder.template is None else set(encode.encoder.template.controls)
        controls |= {token for token in tokenizer.all_special_tokens if len(token) > 1}
        bos = str(tokenizer.bos_token or "")
        for source, where, record in self.look.records("train"):
            if found.num_rows == _MOST_READ:
                break
            found.num_rows += 1
            try:
                parsed = parse_record(record, EncodedRow(where), encode.parsers, source, encode.config)
            except DataError:
                continue  # the ledger has it
            _look_at(found, str(where), [one for part in parsed for one in _texts_of(part)], controls, bos)
            if any(_says_nothing(part) for part in parsed):
                found.empty.append(str(where))
        return found


def _texts_of(parsed: Parsed) -> Iterator[str]:
    if isinstance(parsed, Conversation):
        for message in parsed.messages:
            yield message.content
            yield message.reasoning
    elif isinstance(parsed, PlainText):
        yield parsed.text


def _says_nothing(parsed: Parsed) -> bool:
    return isinstance(parsed, Conversation) and any(
        not (message.content.strip() or message.reasoning.strip() or message.tool_calls) for message in parsed.messages
    )


def _look_at(found: Texts, where: str, texts: list[str], controls: set[str], bos: str) -> None:
    if piece := next(filter(None, map(mojibake, texts)), ""):
        found.damaged.append((where, piece))
    if token := next((token for token in sorted(controls) if any(token in text for text in texts)), ""):
        found.spelled.append((where, token))
    if bos and texts and texts[0].startswith(bos):
        found.begins.append(where)


Check = Callable[[Facts], Iterator[Finding]]


def facts_of(look: Look) -> Facts:
    """Reads the small files beside the model's weights. Raises ModelError."""
    from transformers import AutoConfig, GenerationConfig

    from sftx.model.load import load_tokenizer

    trust = look.config.trust_remote_code
    model = look.prepared.model
    try:
        generation: Any = GenerationConfig.from_pretrained(model)
    except (OSError, ValueError):  # many models have none
        generation = None
    own = load_tokenizer(model, trust_remote_code=trust)
    return Facts(look, own, AutoConfig.from_pretrained(model, trust_remote_code=trust), generation)
