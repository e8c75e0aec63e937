"""Checks of what is trained, made on the run's encoded rows: masks, stop tokens, the ledger, held-out rows.

What the rows say is read anew from their sources, and compared with the examples that the run trains on and with the
batches that its collator makes of them. No weights are read.

Dimensions: B rows, T tokens.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Final

import numpy as np

from sftx.assembly.stages.data_stages import CollatorStage
from sftx.data.collate import documents_of, groups_of
from sftx.data.encoder import Encoder
from sftx.data.held_out import describe_overlap, find_overlap
from sftx.data.row_encoder import EncodedRow, mark_trained, parse_record, split_units
from sftx.errors import DataError, counted
from sftx.inspection.dataset_view import DatasetView
from sftx.types import IGNORE_INDEX, Conversation, Example, Parsed, PlainText
from sftx.verify.findings import FailedError, Finding, NotCheckedError

_ROWS: Final = 200
"""So many training rows are compared with their source, from the beginning of the data."""
_BATCHED: Final = 64
"""So many of their examples are collated."""
_SHOWN_CHARS: Final = 60


@dataclass(frozen=True)
class ReadRow:
    """A training row as its source has it now, beside the examples that the run has of it."""

    where: str
    units: tuple[Parsed, ...]
    """What becomes one example each, with the turns marked that are trained."""
    examples: tuple[Example, ...]
    is_changed: bool
    """Whether the ledger has an entry for it: it was cut, split or left out."""

    @property
    def pairs(self) -> Iterator[tuple[Parsed, Example]]:
        """Yield each unit with its example; none for a row that was cut or split."""
        if not self.is_changed:
            yield from zip(self.units, self.examples, strict=True)


@dataclass
class RowChecks:
    """The checks of one run's rows, and the rows that they have in common."""

    view: DatasetView
    max_rows: int = _ROWS

    @property
    def encoder(self) -> Encoder:
        return self.view.pipeline.encoder

    @cached_property
    def read(self) -> list[ReadRow]:
        """The first training rows that have examples, or an entry in the ledger."""
        pipeline, data = self.view.pipeline, self.view.dataset("train")
        examples = data.examples.whole
        of_row: dict[tuple[int, str], list[Example]] = {}
        for index in range(len(examples)):
            key = int(examples.sources[index]), str(examples.where(index))
            if key not in of_row and len(of_row) == self.max_rows:
                break
            of_row.setdefault(key, []).append(examples[index])
        changed = {str(entry.where) for entry in data.ledger.entries if entry.action != "held out"}
        sources = self.view.sources("train")
        rows: dict[tuple[int, str], ReadRow] = {}
        for source, where, record in self.view.records("train"):
            place = str(where)
            key = next(number for number, one in enumerate(sources) if one is source), place
            if key not in of_row and place not in changed:
                continue
            try:
                parsed = parse_record(record, EncodedRow(where), pipeline.encode.parsers, source, pipeline.config)
                units = [
                    unit
                    for part in parsed
                    for unit in split_units(mark_trained(part, pipeline.config), pipeline.encoder)
                ]
            except DataError:
                continue  # the ledger says why
            rows[key] = ReadRow(place, tuple(units), tuple(of_row.get(key, ())), place in changed)
            if len(rows) == self.max_rows:
                break
        return list(rows.values())

    # --- masks ----------------------------------------------------------------------------------

    def masks(self) -> Finding:
        """Check that the label tokens of rows are the text of their answers, and the labels of batches those tokens."""
        self._need_examples()
        num_examples = num_labels = 0
        for row in self.read:
            if not row.is_changed and len(row.units) != len(row.examples):
                raise FailedError(
                    f"{row.where}: makes {len(row.units)} examples, and the run has {len(row.examples)} of it"
                )
            for unit, example in row.pairs:
                self._check_unit(row, unit, example)
                num_examples += 1
                num_labels += example.num_label_tokens
        num_batched = self._check_batches()
        figures = {"examples": num_examples, "label_tokens": num_labels, "batched_examples": num_batched}
        cut = sum(row.is_changed for row in self.read)
        besides = f"; {cut} that were truncated or left out apart" if cut else ""
        return Finding(
            "masks",
            "passed",
            f"{counted(num_labels, 'label token')} of {counted(num_examples, 'example')} are {self._what_is_trained}"
            f"{besides}; in batches of {num_batched} of them each label is the next token, and none is outside of a "
            "row",
            figures,
        )

    @property
    def _what_is_trained(self) -> str:
        data = self.view.config.data
        if data.train_on_prompt:
            return "all tokens (train_on_prompt)"
        what = "the answers" if data.train_roles == ("assistant",) else f"the turns of {' and '.join(data.train_roles)}"
        return what if data.train_turns == "all" else f"{what}, the last of each row"

    def _check_unit(self, row: ReadRow, unit: Parsed, example: Example) -> None:
        """Raise FailedError unless exactly the text is trained that the row and the options say."""
        data, ids, mask = self.view.config.data, example.token_ids.tolist(), example.loss_mask.tolist()
        now = self.view.pipeline.encode.labelled(unit)
        if (ids, mask) != (list(now[0]), list(now[1])):
            raise FailedError(f"{row.where}: is encoded otherwise now than in the run's data; remove the cache")
        if data.train_on_prompt:
            if not all(mask) and isinstance(unit, Conversation) and data.train_turn_end:
                raise FailedError(f"{row.where}: {mask.count(False)} tokens are not trained, with train_on_prompt")
            return
        trained = [token for token, on in zip(ids, mask, strict=True) if on]
        if isinstance(unit, PlainText):
            self._compare(row, trained, [unit.text], is_exact=True)
        elif isinstance(unit, Conversation):
            turns = [message for message in unit.messages if message.trained]
            is_exact = not any(turn.reasoning or turn.tool_calls for turn in turns)
            self._compare(row, trained, [turn.content for turn in turns], is_exact=is_exact)

    def _compare(self, row: ReadRow, trained: list[int], texts: Sequence[str], *, is_exact: bool) -> None:
        """Raise FailedError unless the trained tokens have these texts, in their order, white space aside.

        Of turns with reasoning and calls a template decides how they are written.
        """
        found = self._text([token for token in trained if not self.encoder.is_control(token)])
        expected = [self._text(self.encoder.plain(text)) for text in texts]
        at = 0
        for text, said in zip(expected, texts, strict=True):
            begin = found.find(text, at)
            if begin < 0 or (is_exact and begin > at):
                shown = f"{self._shown(trained)} is trained"
                raise FailedError(f"{row.where}: {shown}, and the answer is {_shorten(said)}")
            at = begin + len(text)
        if is_exact and at < len(found):
            raise FailedError(
                f"{row.where}: {self._shown(trained)} is trained, which is more than the answer {_shorten(texts[-1])}"
                if texts
                else f"{row.where}: {self._shown(trained)} is trained, and the row has no answer"
            )

    def _text(self, token_ids: list[int]) -> str:
        """Return the text of tokens without white space."""
        return "".join(str(self.encoder.tokenizer.decode(token_ids, clean_up_tokenization_spaces=False)).split())

    def _shown(self, token_ids: list[int]) -> str:
        return _shorten(str(self.encoder.tokenizer.decode(token_ids)))

    def _check_batches(self) -> int:
        """Collate examples of whole groups as the run does, and return their number. Raises FailedError."""
        view = self.view
        examples = view.dataset("train").examples
        collator = view.pipeline.collator
        chosen = examples[: min(_BATCHED, len(examples))]
        if len(examples) > len(chosen) and chosen[-1].group == examples[len(chosen)].group:
            chosen = [example for example in chosen if example.group != chosen[-1].group]
        size = view.config.train.micro_batch_size
        groups = groups_of(chosen)
        for at in range(0, len(groups), size):
            members = [example for group in groups[at : at + size] for example in group]
            _check_labels(collator, members)
        return len(chosen)

    # --- the other checks -----------------------------------------------------------------------

    def stop(self) -> Finding:
        """Check that each trained answer ends with a stop token that is trained."""
        self._need_examples()
        template, data = self.encoder.template, self.view.config.data
        if template is None:
            raise NotCheckedError("the run has no template, and its rows no turns")
        stop, num_answers = list(self.encoder.stop_ids), 0
        for row in self.read:
            for unit, example in row.pairs:
                if not isinstance(unit, Conversation):
                    continue
                answers = [turn for turn in unit.messages if turn.trained and turn.role == "assistant"]
                labels = example.token_ids[1:][example.loss_mask[1:]]
                num_stops = int(np.isin(labels, stop).sum())
                others = len([turn for turn in unit.messages if turn.trained]) - len(answers)
                is_open = others or data.train_on_prompt  # other turns may end with the same token
                wanted = len(answers) if data.train_turn_end else 0
                if num_stops < wanted or (num_stops > wanted and not is_open):
                    raise FailedError(
                        f"{row.where}: {counted(num_stops, 'label token is', 'label tokens are')} "
                        f"{' or '.join(template.stop)}, and it has {counted(len(answers), 'answer')} that are trained"
                        if data.train_turn_end
                        else f"{row.where}: {' or '.join(template.stop)} is trained, with train_turn_end: false"
                    )
                num_answers += len(answers)
        if not num_answers:
            raise NotCheckedError("the rows have no answers that are trained as turns")
        seen = f"{' or '.join(template.stop)} ends {counted(num_answers, 'answer')} and is trained after each"
        if not data.train_turn_end:
            seen = (
                f"{' or '.join(template.stop)} is trained after none of {num_answers} answers (train_turn_end: false)"
            )
        return Finding("stop", "passed", seen, {"answers": num_answers})

    def rows(self) -> Finding:
        """Check that each row is trained on or in the ledger, and each row that is too long too."""
        view, data = self.view, self.view.dataset("train")
        ledger = data.ledger
        counts = {
            action: sum(entry.action == action for entry in ledger.entries)
            for action in ("dropped", "filtered", "held out", "cut", "split")
        }
        examples = data.examples.whole
        places = {(int(examples.sources[n]), str(examples.where(n))) for n in range(len(examples))}
        num_left_out = counts["dropped"] + counts["filtered"] + counts["held out"]
        if len(places) + num_left_out != ledger.num_rows:
            raise FailedError(
                f"of {counted(ledger.num_rows, 'row')}, {len(places):,} are trained on and {num_left_out:,} are in the "
                "ledger as left out"
            )
        limit, encode = view.config.data.max_length, view.pipeline.encode
        is_limited = not encode.wrapped and encode.answer_length is None
        if is_limited and (longest := int(examples.lengths.max(initial=0))) > limit:
            raise FailedError(f"an example has {longest} tokens, more than max_length {limit}")
        for row in self.read if is_limited else ():
            length = max((len(encode.labelled(unit)[0]) for unit in row.units), default=0)
            if length > limit and not row.is_changed:
                raise FailedError(f"{row.where}: has {length} tokens, max_length is {limit}, and it is in no ledger")
        said = ", ".join(f"{number:,} {action}" for action, number in counts.items() if number) or "none in the ledger"
        return Finding(
            "rows",
            "passed",
            f"{counted(ledger.num_rows, 'row')}, {len(places):,} trained on; ledger: {said}",
            {"rows": ledger.num_rows, "trained": len(places)}
            | {name.replace(" ", "_"): n for name, n in counts.items()},
        )

    def held_out(self) -> Finding:
        """Check that no held-out example is among the training examples."""
        view = self.view
        if not view.config.data.has_eval:
            raise NotCheckedError("the run has no held-out rows")
        train, held_out = view.dataset("train"), view.dataset("eval")
        pairs = find_overlap(train, held_out)
        if pairs:
            raise FailedError(describe_overlap(pairs, train, held_out), overlap=len(pairs))
        num, first = len(held_out.examples), " of the first window" if view.config.data.streaming else ""
        return Finding(
            "held-out",
            "passed",
            f"none of {counted(num, 'held-out example')} is among {len(train.examples):,} training examples{first}",
            {"held_out": num, "overlap": 0},
        )

    def _need_examples(self) -> None:
        if self.view.pipeline.rollout is not None:
            raise NotCheckedError("the rows are questions of a rollout, of which nothing is trained")
        if not len(self.view.dataset("train").examples):
            raise FailedError("no row is trained on")


def _check_labels(collator: CollatorStage, examples: Sequence[Example]) -> None:
    """Raise FailedError unless the labels of a batch are those of its examples, each one place ahead."""
    batch = collator.collate(examples)
    labels_N, ids_N = batch.labels_BT.flatten(), batch.input_ids_BT.flatten()
    documents = documents_of(batch)
    num_expected = 0
    for example, where in zip(batch.examples, documents, strict=True):
        ids = ids_N[where].tolist()
        if ids != example.token_ids.tolist():
            raise NotCheckedError(f"{collator} puts other tokens into its batches than examples have")
        expected = [
            token if on else IGNORE_INDEX
            for token, on in zip(example.token_ids[1:].tolist(), example.loss_mask[1:].tolist(), strict=True)
        ] + [IGNORE_INDEX]
        found = labels_N[where].tolist()
        num_expected += example.num_label_tokens
        if found != expected:
            at = next(n for n, (a, b) in enumerate(zip(found, expected, strict=True)) if a != b)
            shown = [("none" if label == IGNORE_INDEX else str(label)) for label in (found[at], expected[at])]
            raise FailedError(
                f"{example.row_id}: {collator} gives position {at} the label {shown[0]}, and the next token that is "
                f"trained is {shown[1]}"
            )
    num_labels = int((labels_N != IGNORE_INDEX).sum())
    if num_labels != num_expected:
        raise FailedError(
            f"{collator} makes a batch of {counted(num_labels, 'label')} of examples with {num_expected:,} label "
            "tokens; some are outside of the rows"
        )


def _shorten(text: str) -> str:
    return repr(text if len(text) <= _SHOWN_CHARS else f"{text[: _SHOWN_CHARS - 3]}...")
