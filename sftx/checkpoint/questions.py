"""Finds questions for a loaded run: those of its held-out rows, else of its training data, else samples."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any, Final

from jinja2 import TemplateError, TemplateSyntaxError

from sftx.assembly.entry_points import discover, find
from sftx.assembly.registry import Assembly
from sftx.checkpoint import layout
from sftx.checkpoint.load_run import LoadedRun, run_directory_of
from sftx.checkpoint.run_directory import RunDirectory
from sftx.config.loading import load
from sftx.data.export import to_record
from sftx.data.ledger import Ledger
from sftx.data.parsed_rows import parse_rows
from sftx.errors import DataError, ModelError, SftxError, one_line
from sftx.types import Conversation, Message, Parsed, PlainText, Tokens

log = logging.getLogger(__name__)

_NUM_CONTINUED: Final = 16
"""Tokens of a text that a run without a template continues."""
_LONG: Final = 1024
"""Tokens of a prompt beyond which shorter questions are preferred."""
_SAMPLES: Final = (
    "What is the capital of France?",
    "Write one sentence about the sea.",
    "What is 17 + 25?",
    'Return the JSON object {"name": "Ada", "age": 36} with the age increased by one.',
    "Translate into German: Good morning, how are you?",
    "Name three colours, one a line.\n- red",
    "北京是哪个国家的首都？",
    "def add(a, b):\n    return",
)


@dataclass(frozen=True)
class ComparedPrompt:
    """A ComparedPrompt is given to a run and to its export."""

    name: str
    """Place of its row, or `sample 1`."""
    token_ids: list[int]
    """Those after which the run is to answer."""
    messages: tuple[Mapping[str, Any], ...] = ()
    """In OpenAI's form, the arguments of calls as objects; empty for a text that is continued."""
    tools: tuple[Mapping[str, Any], ...] = ()


def find_questions(run: LoadedRun, limit: int) -> tuple[str, list[ComparedPrompt]]:
    """Return what kind of questions these are, and at most `limit` of them.

    A row whose prompt the run's own chat template renders otherwise than in training is left out: a text that spells a
    control token, or white space at a border of segments. Raises DataError when that is so for every row, and when no
    question can be asked.
    """
    reason = ""
    directory = run_directory_of(run.directory)
    if run.config is not None and directory is not None:
        for kind, rows in (("held-out", _held_out_rows), ("training", _training_rows)):
            try:
                found = list(islice(_questions(run, rows(directory)), 4 * limit))
            except (SftxError, OSError) as error:
                reason = one_line(error, max_chars=200)
                continue
            if chosen := _choose(run, found, limit):
                return f"{kind} rows", chosen
    if reason:
        log.warning("the questions are samples, since the run's data cannot be read: %s", reason)
    asked: list[Parsed] = [
        PlainText(text) if run.template is None else Conversation((Message("user", text), Message("assistant", "")))
        for text in _SAMPLES
    ]
    samples = list(_questions(run, ((f"sample {n}", parsed) for n, parsed in enumerate(asked, 1))))
    if not samples:
        raise DataError(f"{run.directory}: its template accepts no question; leave the comparison out with --no-verify")
    return "sample questions", _choose(run, samples, limit)


def _choose(run: LoadedRun, questions: Sequence[ComparedPrompt], limit: int) -> list[ComparedPrompt]:
    others = {question.name: _by_chat_template(run, question) for question in questions}
    served = [question for question in questions if others[question.name] in (None, question.token_ids)]
    if questions and not served:
        question = questions[0]
        raise DataError(
            f"{question.name}: the chat template of {run.directory} renders the prompt otherwise than it was trained: "
            f"{run.tokenizer.decode(others[question.name] or [])!r} instead of "
            f"{run.tokenizer.decode(question.token_ids)!r}; correct the template plugin's `chat_template`"
        )
    return sorted(served, key=lambda question: max(_LONG, len(question.token_ids)))[:limit]


def _by_chat_template(run: LoadedRun, question: ComparedPrompt) -> list[int] | None:
    """Return the prompt by the chat template that is saved with the run; None for a text, and where there is none."""
    if not question.messages or run.tokenizer.chat_template is None:
        return None
    asked: Any = [dict(message) for message in question.messages]
    tools: Any = [dict(tool) for tool in question.tools] or None
    try:
        ids: Any = run.tokenizer.apply_chat_template(asked, tools=tools, add_generation_prompt=True, return_dict=False)
    except TemplateSyntaxError as error:
        raise ModelError(
            f"{run.directory}: its chat template is no valid Jinja: {one_line(error)}; put its files back, or export a "
            "checkpoint of the run"
        ) from error
    except TemplateError:  # it refuses what the run's template takes
        return []
    return list(ids)


def _questions(run: LoadedRun, rows: Iterator[tuple[str, Parsed]]) -> Iterator[ComparedPrompt]:
    for name, parsed in rows:
        if isinstance(parsed, PlainText):
            ids = run.encoder.text(parsed.text)
            if run.template is None and len(ids) > 1:
                yield ComparedPrompt(name, ids[: min(_NUM_CONTINUED, len(ids) - 1)])
        elif isinstance(parsed, Tokens):
            first = next((n for n, trained in enumerate(parsed.loss_mask) if trained), 0)
            if prompt := list(parsed.token_ids[: first or _NUM_CONTINUED]):
                yield ComparedPrompt(name, prompt)
        elif run.template is not None and parsed.messages and parsed.messages[-1].role == "assistant":
            # Which turns train changes what some templates write of them, and is not known where a model is served.
            before = tuple(replace(message, trainable=False, weight=1.0) for message in parsed.messages[:-1])
            asked = replace(parsed, messages=before)
            try:
                ids = run.prompt(asked)
            except DataError:  # the template does not accept a sample, or what comes before the answer
                continue
            yield ComparedPrompt(name, ids, tuple(as_messages(asked)), parsed.tools)


def as_messages(conversation: Conversation) -> list[dict[str, Any]]:
    """Return the messages as chat templates of transformers expect them: arguments of calls are objects."""
    messages: list[dict[str, Any]] = to_record(conversation)["messages"]
    for message in messages:
        for key in ("train", "weight"):
            message.pop(key, None)
        for call in message.get("tool_calls", ()):
            call["function"]["arguments"] = json.loads(call["function"]["arguments"])
    return messages


# --- the rows of a run ----------------------------------------------------------------------------


def _held_out_rows(directory: Path) -> Iterator[tuple[str, Parsed]]:
    """Yield the held-out rows as they are parsed, in the order of their sources. Raises SftxError, OSError."""
    data = load(directory / layout.RUN).config.data
    if data.eval_fraction is None:
        yield from _rows(directory, is_train=False)
        return
    with (directory / "ledger.jsonl").open(encoding="utf-8") as lines:
        places = {str(entry.where) for entry in Ledger.read(lines) if entry.action == "held out"}
    yield from (row for row in _rows(directory, is_train=True) if row[0] in places)


def _training_rows(directory: Path) -> Iterator[tuple[str, Parsed]]:
    return _rows(directory, is_train=True)


def _rows(directory: Path, *, is_train: bool) -> Iterator[tuple[str, Parsed]]:
    loaded = load(directory / layout.RUN)
    config, installed = loaded.config, discover()
    assembly = Assembly(loaded.origins)
    for line in (RunDirectory(directory).read_json(layout.MANIFEST) or {}).get("plugins", ()):
        if line["stage"] in ("parser", "source") and line["plugin"] not in {a.info.name for a in assembly.active}:
            assembly.add(find(line["plugin"], installed), config.plugins.get(line["plugin"], {}))
    data = replace(config.data, invalid_rows="drop")
    sources = data.train if is_train else data.eval
    for row in parse_rows(sources, data, assembly.parsers(), assembly.row_sources):
        if row.parsed:
            yield str(row.row.where), row.parsed[0]
