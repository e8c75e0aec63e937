"""The checks of `sftx doctor` on a run's rows. Each check is one function that yields its findings."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Final

import numpy as np

from sftx.data.dataset import Examples
from sftx.data.held_out import describe_overlap, find_overlap
from sftx.data.pipeline import Split
from sftx.errors import counted
from sftx.inspection.dataset_statistics import dataset_statistics
from sftx.inspection.dataset_view import is_unreadable
from sftx.inspection.diagnosis.check_inputs import Check, CheckInputs, Finding, cut_entries, longest_row

_MAX_PLACES: Final = 3
"""A finding names at most so many rows."""
_MANY_CUT = _MANY_DUPLICATES = 0.01
_FEW_LABELS, _MANY_LABELS = 0.02, 0.95
_FULL_ROWS, _FULL_BATCHES = 0.9, 0.75
_MIN_PROMPT_TOKENS: Final = 8
"""Prompts of fewer tokens may be equal by chance."""


def _join_places(places: Sequence[str]) -> str:
    rest = f" and {len(places) - _MAX_PLACES:,} more" if len(places) > _MAX_PLACES else ""
    return ", ".join(places[:_MAX_PLACES]) + rest


def _splits(inputs: CheckInputs) -> tuple[Split, ...]:
    return ("train", "eval") if inputs.view.config.data.has_eval else ("train",)


def unreadable_rows(inputs: CheckInputs) -> Iterator[Finding]:
    """Find rows that no parser accepts, or that a parser or the template rejects."""
    stops = inputs.view.config.data.invalid_rows == "error"
    for split in _splits(inputs):
        entries = [entry for entry in inputs.view.dataset(split).ledger.entries if is_unreadable(entry)]
        # Dropped rows of the same cause that are too many are found below, with the cause.
        is_found = not stops and any(entries[0].reason in problem for problem in inputs.view.problems(split) if entries)
        if entries and not is_found:
            causes = Counter(entry.reason for entry in entries)
            first = {entry.reason: entry.where for entry in reversed(entries)}
            shown = "; ".join(
                (f"{number:,} times, first in " if number > 1 else "") + f"{first[reason]}: {reason}"
                for reason, number in causes.most_common(_MAX_PLACES)
            )
            if len(causes) > _MAX_PLACES:
                shown += f"; and {len(causes) - _MAX_PLACES:,} other causes"
            fix = "correct them, or name their fields with columns: {field: column}"
            yield Finding(
                "error" if stops else "warning",
                "unreadable-rows",
                f"data.{split}: {counted(len(entries), 'row cannot', 'rows cannot')} be read: {shown}",
                fix + ("; --invalid-rows drop leaves them out" if stops else ""),
            )


def dropped_rows(inputs: CheckInputs) -> Iterator[Finding]:
    """Find more dropped rows than the run allows, and whatever else would stop it."""
    for split in _splits(inputs):
        entries = inputs.view.dataset(split).ledger.entries
        unreadable = {f"{entry.where}: {entry.reason}" for entry in entries if is_unreadable(entry)}
        for problem in inputs.view.problems(split):
            if problem not in unreadable:
                fix = "see them with `sftx inspect --show dropped" + ("`" if split == "train" else " --split eval`")
                yield Finding("error", "dropped-rows", f"data.{split}: {problem}", fix)


def duplicated_rows(inputs: CheckInputs) -> Iterator[Finding]:
    """Find examples with exactly the tokens and labels of an earlier one."""
    examples = inputs.train.examples
    first: dict[bytes, int] = {}
    duplicates = [(first[key], n) for n, key in enumerate(examples.digests()) if first.setdefault(key, n) != n]
    if duplicates:
        earlier, later = (examples.where(at) for at in duplicates[0])
        yield Finding(
            "warning" if len(duplicates) > _MANY_DUPLICATES * len(examples) else "note",
            "duplicated-rows",
            f"{len(duplicates):,} of {counted(len(examples), 'example')} "
            f"{'has' if len(duplicates) == 1 else 'have'} exactly the tokens of an earlier one (first: "
            f"{later} equals {earlier})",
            "drop them with --set data.filters.duplicates=drop, unless they are meant to count more",
        )


def leakage(inputs: CheckInputs) -> Iterator[Finding]:
    """Find held-out rows that are trained on: a score on them says nothing."""
    held_out, train = inputs.held_out.examples, inputs.train.examples.whole
    equal = find_overlap(inputs.train, inputs.held_out)
    if equal:
        max_overlap = inputs.view.config.data.max_overlap
        yield Finding(
            "error" if len(equal) > max_overlap * len(held_out) else "warning",
            "leakage",
            describe_overlap(equal, inputs.train, inputs.held_out),
            "remove them from one of the two; a score on them says nothing",
        )
    equal_numbers = {n for n, _ in equal}
    train_prompts = {key: n for n, key in enumerate(_prompt_digests(train)) if key}
    same_prompt = [
        (n, train_prompts[key])
        for n, key in enumerate(_prompt_digests(held_out))
        if key in train_prompts and n not in equal_numbers
    ]
    if same_prompt:
        yield Finding(
            "warning",
            "leakage",
            f"{len(same_prompt):,} of {counted(len(held_out), 'held-out example')} "
            f"{'has' if len(same_prompt) == 1 else 'have'} the prompt of a training row with "
            f"another answer (first: {held_out.where(same_prompt[0][0])} and {train.where(same_prompt[0][1])})",
            "keep each prompt in one of the two, or read the held-out scores with care",
        )


def _prompt_digests(examples: Examples) -> Iterator[bytes]:
    """Yield a digest of the tokens before the first label token; empty when there are only a few of them."""
    for at in range(len(examples)):
        first = int(examples.tokens(at)[1].argmax())
        yield examples.prompt_digest(at, first) if first >= _MIN_PROMPT_TOKENS else b""


def cut_rows(inputs: CheckInputs) -> Iterator[Finding]:
    """Find rows that are longer than max_length, and answers whose stop token is cut off."""
    train, examples = inputs.train, inputs.train.examples
    cut = {str(entry.where) for entry in cut_entries(train)}
    if not cut:
        return
    num_without_stop = 0
    for at in range(len(examples)):
        if str(examples.where(at)) in cut:
            token_ids, loss_mask = examples.tokens(at)
            num_without_stop += not np.isin(token_ids[loss_mask], inputs.encoder.stop_ids).any()
    share = len(cut) / train.ledger.num_rows
    detail = f"; in {num_without_stop:,} of them no stop token is trained" if num_without_stop else ""
    yield Finding(
        "warning" if share > _MANY_CUT else "note",
        "cut-rows",
        f"{counted(len(cut), 'row is', 'rows are')} cut ({share:.1%}) to max_length="
        f"{inputs.view.config.data.max_length}{detail}",
        f"--max-length {longest_row(train)} cuts none, --long-rows drop leaves them out; data.long_rows has other ways "
        "to cut (cut_oldest keeps whole answers)",
    )


def trained_share(inputs: CheckInputs) -> Iterator[Finding]:
    """Find conversations in which hardly any token is a label token, or nearly all are."""
    train = inputs.train
    if inputs.has_rollout or not train.has_turns or not train.num_input_tokens:
        return
    share = train.num_label_tokens / train.num_input_tokens
    seen = f"{share:.1%} of the tokens are label tokens"
    if share < _FEW_LABELS:
        fix = "check with `sftx inspect` that the answers are trained; all other tokens are only context"
        yield Finding("warning", "trained-share", seen, fix)
    if share > _MANY_LABELS:
        fix = "prompts are trained too, which is rarely intended: " + (
            "--no-train-on-prompt trains the answers alone"
            if inputs.view.config.data.train_on_prompt
            else "see with `sftx inspect` what is trained"
        )
        yield Finding("warning", "trained-share", seen, fix)


def empty_turns(inputs: CheckInputs) -> Iterator[Finding]:
    """Find conversations with a turn that has no text and no tool call."""
    dropped = {str(entry.where) for entry in inputs.train.ledger.entries if entry.action == "dropped"}
    places = inputs.text_problems.empty_turns
    if kept := [place for place in places if place not in dropped]:
        seen = f"{counted(len(kept), 'row has', 'rows have')} an empty turn: {_join_places(kept)}"
        fix = "remove the turn or the row; a trained empty turn teaches the model to answer nothing"
        yield Finding("warning", "empty-turns", seen, fix)
    if left_out := [place for place in places if place in dropped]:
        rows = counted(len(left_out), "row has", "rows have")
        seen = f"{rows} an empty turn and no other to train: {_join_places(left_out)}"
        yield Finding("warning", "empty-turns", seen, "fill the turn or remove the row; the run leaves it out")


def damaged_text(inputs: CheckInputs) -> Iterator[Finding]:
    """Find text that was decoded with the wrong encoding."""
    damaged = inputs.text_problems.mojibake
    if damaged:
        places = _join_places([f"{where} has {piece!r}" for where, piece in damaged])
        seen = f"{counted(len(damaged), 'row holds', 'rows hold')} text that was read in the wrong encoding: {places}"
        fix = "read the original again as UTF-8 (or its own encoding); to repair: text.encode('cp1252').decode('utf-8')"
        yield Finding("warning", "damaged-text", seen, fix)


def spelled_controls(inputs: CheckInputs) -> Iterator[Finding]:
    """Find text that spells control tokens: the rows may have been rendered by a template already."""
    problems = inputs.text_problems
    if places := problems.leading_bos:
        seen = (
            f"{counted(len(places), 'row begins', 'rows begin')} with the text of the BOS token: {_join_places(places)}"
        )
        fix = "remove it from the rows: the template writes the BOS token, and text never becomes a control token"
        yield Finding("warning", "spelled-controls", seen, fix)
    if spelled := problems.spelled_controls:
        places = [f"{where} has {token}" for where, token in spelled]
        rows = counted(len(spelled), "row spells", "rows spell")
        seen = f"{rows} a control token, which is encoded as plain text: {_join_places(places)}"
        fix = "if the rows were rendered by a template before, use them as they were before that"
        yield Finding("note", "spelled-controls", seen, fix)


def full_batches(inputs: CheckInputs) -> Iterator[Finding]:
    """Find batches with much padding, and packed rows that are not filled."""
    if not len(inputs.train.examples):
        return
    filling = dataset_statistics(inputs.view, "train").filling
    if filling is None:  # of a run with a rollout
        return
    if filling.row_share is not None and filling.row_share < _FULL_ROWS and filling.num_rows > 1:
        fix = "raise data.max_length, so that more examples fit into a row"
        yield Finding("note", "full-batches", f"packed rows are {filling.row_share:.1%} full", fix)
    elif filling.row_share is None and filling.share < _FULL_BATCHES:
        seen = f"{1 - filling.share:.1%} of a batch is padding, which costs time and trains nothing"
        yield Finding("note", "full-batches", seen, "pack the rows: --plugin packed")


CHECKS: Final[tuple[Check, ...]] = (
    unreadable_rows,
    dropped_rows,
    duplicated_rows,
    leakage,
    cut_rows,
    trained_share,
    empty_turns,
    damaged_text,
    spelled_controls,
    full_batches,
)
