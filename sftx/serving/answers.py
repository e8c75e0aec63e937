"""Answers to the rows of a file, in batches, to a file of JSON lines that is gone on with when it is begun already.

Rows are answered in windows of a fixed number of rows, whatever was written before, and the row's number decides what
is drawn for it: a file that was interrupted and gone on with has the same content as one that was not.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import torch

from sftx import atomic_files
from sftx.checkpoint.load_run import LoadedRun
from sftx.config.options import Source
from sftx.data import sources
from sftx.data.export import to_record
from sftx.data.row_encoder import EncodedRow, questions_of
from sftx.errors import ConfigError, DataError, counted, is_out_of_memory, one_line
from sftx.model.decoding import Decoder, Request, Sampling
from sftx.model.generation import embed_prompts
from sftx.model.text_stream import TextStream
from sftx.phases import phase
from sftx.serving.run_plugins import RunPlugins
from sftx.trainer.evaluate import score
from sftx.types import Conversation, Example, Parsed, PlainText, Question

_WINDOW_BATCHES: Final = 8
"""Batches of a window, at the end of which a batch runs empty."""


@dataclass
class Asked:
    """A row of the file: what is asked, or why it cannot be."""

    row_id: str
    prompt_ids: list[int]
    line: dict[str, Any]
    """What is written before the answer."""
    question: Question | None = None
    """With the answer that the row has, for metrics."""
    error: str = ""
    extras: Mapping[str, Any] = dataclasses.field(default_factory=dict)


def asked_of(parsed: Parsed, row: EncodedRow, loaded: LoadedRun) -> Asked:
    """Return what a row asks; the last turn of the assistant is its answer. Raises ConfigError without a template."""
    try:
        return _asked_of(parsed, row, loaded)
    except DataError as error:
        return Asked(str(row.where), [], {"id": str(row.where)}, error=one_line(error))


def _asked_of(parsed: Parsed, row: EncodedRow, loaded: LoadedRun) -> Asked:
    row_id = str(row.where)
    if isinstance(parsed, PlainText):
        return Asked(row_id, loaded.encoder.text(parsed.text), {"id": row_id, "prompt": parsed.text})
    if not isinstance(parsed, Conversation):
        return Asked(row_id, [], {"id": row_id}, error="token ids have no prompt")
    if loaded.template is None:
        raise ConfigError(f"{loaded.directory}: {loaded.no_template}; only plain text can be continued")
    question = next(questions_of([parsed], row, loaded.encoder), None)
    messages = parsed.messages if question is None else question.messages
    plain = tuple(dataclasses.replace(message, trainable=None, weight=1.0) for message in messages)
    line = {"id": row_id, **to_record(dataclasses.replace(parsed, messages=plain))}
    if not messages:
        return Asked(row_id, [], line, error="there is nothing before its answer")
    prompt_ids = loaded.prompt(parsed) if question is None else question.prompt_ids
    return Asked(row_id, prompt_ids, line, question, extras=parsed.extras)


@dataclass(frozen=True)
class Answerer:
    """Answers rows with one model and one way of choosing tokens."""

    loaded: LoadedRun
    sampling: Sampling
    stop: tuple[str, ...]
    batch_size: int

    @property
    def window(self) -> int:
        return _WINDOW_BATCHES * self.batch_size

    def lines(self, asked: Sequence[Asked], first: int) -> Iterator[dict[str, Any]]:
        """Yield the line of each row from the row `first` on, in order. Raises ConfigError for too large a batch."""
        for start in range(first - first % self.window, len(asked), self.window):
            numbers = range(start, min(start + self.window, len(asked)))
            yield from self._answered({number: asked[number] for number in numbers}, max(first, start))

    def _answered(self, asked: Mapping[int, Asked], next_number: int) -> Iterator[dict[str, Any]]:
        limit = getattr(self.loaded.lm.config, "max_position_embeddings", None)
        lines: dict[int, dict[str, Any]] = {}
        number_of: dict[Request, int] = {}
        for number, one in asked.items():
            room = self.sampling.max_new_tokens if limit is None else limit - len(one.prompt_ids)
            if not one.error and room < 1:
                one.error = f"its prompt has {len(one.prompt_ids)} tokens, and the model takes {limit} with the answer"
            if one.error:
                lines[number] = {**one.line, "error": one.error}
                continue
            sampling = dataclasses.replace(
                self.sampling,
                max_new_tokens=min(room, self.sampling.max_new_tokens),
                seed=_seed(self.sampling.seed, number),
            )
            text = TextStream(self.loaded.tokenizer, self.stop) if self.stop else None
            number_of[Request(one.prompt_ids, sampling, text)] = number

        def embed(requests: Sequence[Request]) -> list[torch.Tensor]:
            collator = self.loaded.collator
            assert collator is not None
            examples = [
                Example(
                    np.asarray(request.prompt_ids),
                    np.zeros(len(request.prompt_ids), np.bool_),
                    asked[number_of[request]].row_id,
                    group,
                    extras=asked[number_of[request]].extras,
                )
                for group, request in enumerate(requests)
            ]
            return embed_prompts(self.loaded.lm, collator.collate, examples)

        decoder = Decoder(
            self.loaded.lm,
            stop_ids=self.loaded.stop_ids,
            max_rows=self.batch_size,
            embed=None if self.loaded.collator is None else embed,
        )
        answers = decoder.run(number_of)
        while next_number in asked:
            if (line := lines.pop(next_number, None)) is not None:
                yield line
                next_number += 1
                continue
            try:
                with self.loaded.autocast():
                    request = next(answers)
            except Exception as error:
                if not is_out_of_memory(error):
                    raise
                raise ConfigError(
                    f"option '--batch-size': {self.loaded.lm.device} has not enough memory for "
                    f"{counted(self.batch_size, 'row')} at once; give a smaller one"
                ) from error
            lines[number_of[request]] = self._line(asked[number_of[request]], request)

    def _line(self, asked: Asked, request: Request) -> dict[str, Any]:
        decoded = self.loaded.tokenizer.decode(request.answer_ids, skip_special_tokens=True)
        answer = str(decoded) if request.text is None else request.text.text
        label = {} if asked.question is None else {"label": asked.question.reference}
        return {**asked.line, "answer": answer, "finish_reason": request.finish_reason, **label}


def _seed(seed: int, number: int) -> int:
    """Return the seed of a row by its number in the data."""
    return int.from_bytes(hashlib.blake2b(f"row {seed} {number}".encode(), digest_size=6).digest())


def summary_of(asked: Sequence[Asked], lines: Sequence[Mapping[str, Any]], plugins: RunPlugins) -> dict[str, Any]:
    """Return counts of the rows and the scores of the metrics, of rows that have an answer to compare with."""
    answered = [(one.question, line) for one, line in zip(asked, lines, strict=True) if "answer" in line]
    scored = [(question, str(line["answer"])) for question, line in answered if question is not None]
    metrics = plugins.assembly.metrics() if scored else {}
    questions, predictions = [question for question, _ in scored], [answer for _, answer in scored]
    return {
        "rows": len(lines),
        "answered": len(answered),
        "not_answered": len(lines) - len(answered),
        "cut": sum(line["finish_reason"] == "length" for _, line in answered),
        "scored": len(scored) if metrics else 0,
        "scores": score(metrics, predictions, questions, {}),
    }


def identity(answerer: Answerer, rows: Sequence[Source], plugins: RunPlugins, *, is_stdin: bool) -> dict[str, Any]:
    """Return everything that decides the answers, by name. `is_stdin`: the rows came from standard input."""
    loaded = answerer.loaded
    files = sorted([*loaded.directory.glob("*.safetensors"), *loaded.directory.glob("*.json")])
    with phase("hashing", "model and data"):
        weights = [[file.name, atomic_files.sha256_of_file(file)] for file in files]
        hashes = [sources.fingerprint(source, plugins.assembly.row_sources) for source in rows]
    paths = ["-"] if is_stdin else [source.path for source in rows]
    return {
        "model": hashlib.sha256(json.dumps([loaded.base_model, weights]).encode()).hexdigest(),
        "data": [list(pair) for pair in zip(paths, hashes, strict=True)],
        "format": plugins.config.data.format,
        **dataclasses.asdict(answerer.sampling),
        "stop": list(answerer.stop),
        "batch_size": answerer.batch_size,
    }
