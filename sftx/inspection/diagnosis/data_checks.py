"""What `sftx doctor` checks of the rows: one function a check, each giving its findings."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from typing import Final

import numpy as np
from numpy.typing import NDArray

from sftx.data.dataset import Examples
from sftx.inspection.dataset_view import Split, is_unreadable
from sftx.inspection.diagnosis.facts import Check, Facts, Finding
from sftx.inspection.figures import figures

_FEW: Final = 3
_MANY_CUT = _MANY_TWICE = 0.01
_LITTLE_TRAINED, _MUCH_TRAINED = 0.02, 0.95
_FULL_ROWS, _FULL_BATCHES = 0.9, 0.75
_PROMPT: Final = 8
"""Tokens of a prompt that say something; shorter ones are alike by chance."""


def _some(places: Sequence[str]) -> str:
    rest = f" and {len(places) - _FEW:,} more" if len(places) > _FEW else ""
    return ", ".join(places[:_FEW]) + rest


def _rows(number: int, singular: str, plural: str) -> str:
    return f"1 row {singular}" if number == 1 else f"{number:,} rows {plural}"


def _splits(facts: Facts) -> tuple[Split, ...]:
    return ("train", "eval") if facts.look.sources("eval") else ("train",)


def unreadable_rows(facts: Facts) -> Iterator[Finding]:
    """Rows that no parser takes, or that a parser or the template refuses."""
    stops = facts.look.config.data.invalid_rows == "error"
    for split in _splits(facts):
        entries = [entry for entry in facts.look.dataset(split).ledger.entries if is_unreadable(entry)]
        if entries:
            shown = "; ".join(f"{entry.where}: {entry.reason}" for entry in entries[:_FEW])
            yield Finding(
                "error" if stops else "warning",
                "unreadable-rows",
                f"data.{split}: {_rows(len(entries), 'cannot', 'cannot')} be read: {shown}",
                "mend them, or name their fields with columns: {field: column}"
                + ("; --invalid-rows drop leaves them out" if stops else ""),
            )


def dropped_rows(facts: Facts) -> Iterator[Finding]:
    """More rows are dropped than the run allows, or something else stops it."""
    for split in _splits(facts):
        entries = facts.look.dataset(split).ledger.entries
        unreadable = {f"{entry.where}: {entry.reason}" for entry in entries if is_unreadable(entry)}
        for problem in facts.look.problems(split):
            if problem not in unreadable:
                fix = "see them with `sftx inspect --show dropped" + ("`" if split == "train" else " --split eval`")
                yield Finding("error", "dropped-rows", f"data.{split}: {problem}", fix)


def duplicated_rows(facts: Facts) -> Iterator[Finding]:
    """Examples that give the very tokens of an earlier one, and so count twice."""
    examples = facts.data.examples
    first: dict[bytes, int] = {}
    twice = [(first[key], n) for n, key in enumerate(_digests(examples)) if first.setdefault(key, n) != n]
    if twice:
        earlier, later = (examples.where(at) for at in twice[0])
        many = len(twice) > _MANY_TWICE * len(examples)
        yield Finding(
            "warning" if many else "note",
            "duplicated-rows",
            f"{len(twice):,} of {len(examples):,} examples give the very tokens of an earlier one (first: {later} is "
            f"{earlier})",
            "drop them with --set data.filters.duplicates=drop, unless they are meant to count more",
        )


def leakage(facts: Facts) -> Iterator[Finding]:
    """Held-out rows that are trained on: a score on them says nothing."""
    held, train = facts.held_out.examples, facts.data.examples
    known = {key: n for n, key in enumerate(_digests(train))}
    same = [(n, known[key]) for n, key in enumerate(_digests(held)) if key in known]
    if same:
        one, other = held.where(same[0][0]), train.where(same[0][1])
        yield Finding(
            "error",
            "leakage",
            f"{len(same):,} of {len(held):,} held-out examples are trained on (first: {one} is {other})",
            "take them out of one of the two; a score on them says nothing",
        )
    exact = {n for n, _ in same}
    prompts = {key: n for n, key in enumerate(_prompts(train)) if key}
    alike = [(n, prompts[key]) for n, key in enumerate(_prompts(held)) if key in prompts and n not in exact]
    if alike:
        one, other = held.where(alike[0][0]), train.where(alike[0][1])
        yield Finding(
            "warning",
            "leakage",
            f"{len(alike):,} of {len(held):,} held-out examples ask what a training row asks, with another answer "
            f"(first: {one} and {other})",
            "keep each prompt on one side, or read the held-out scores with care",
        )


def _digests(examples: Examples) -> Iterator[bytes]:
    for at in range(len(examples)):
        token_ids, loss_mask = examples.tokens(at)
        yield _digest(token_ids, loss_mask.tobytes())


def _prompts(examples: Examples) -> Iterator[bytes]:
    """A digest of what stands before the first trained token; nothing where that is short."""
    for at in range(len(examples)):
        token_ids, loss_mask = examples.tokens(at)
        first = int(loss_mask.argmax())
        yield _digest(token_ids[:first]) if first >= _PROMPT else b""


def _digest(token_ids: NDArray[np.int32], more: bytes = b"") -> bytes:
    return hashlib.blake2b(token_ids.tobytes() + more, digest_size=16).digest()


def cut_rows(facts: Facts) -> Iterator[Finding]:
    """Rows that are longer than max_length, and answers whose end is not there to be trained."""
    data = facts.data
    cut = {str(entry.where) for entry in data.ledger.entries if entry.action == "cut"}
    if not cut:
        return
    stop = facts.encoder.stop_ids
    endless = sum(
        1
        for at in range(len(data.examples))
        if str(data.examples.where(at)) in cut and not _trains(data.examples, at, stop)
    )
    share = len(cut) / data.ledger.num_rows
    words = f"; in {endless:,} of them no answer's end is trained" if endless else ""
    yield Finding(
        "warning" if share > _MANY_CUT else "note",
        "cut-rows",
        f"{_rows(len(cut), 'is', 'are')} cut ({share:.1%}) to max_length={facts.look.config.data.max_length}{words}",
        "raise data.max_length, or choose with --long-rows what is cut (cut_oldest keeps whole answers, drop leaves "
        "the row out)",
    )


def _trains(examples: Examples, at: int, wanted: Sequence[int]) -> bool:
    token_ids, loss_mask = examples.tokens(at)
    return bool(np.isin(token_ids[loss_mask], wanted).any())


def trained_share(facts: Facts) -> Iterator[Finding]:
    """Conversations of which hardly anything is trained, or everything."""
    data = facts.data
    if not data.has_turns or not data.num_input_tokens:
        return
    share = data.num_label_tokens / data.num_input_tokens
    seen = f"{share:.1%} of the tokens are trained"
    if share < _LITTLE_TRAINED:
        fix = "the rest is only read: check with `sftx inspect` that the answers are what is trained"
        yield Finding("warning", "trained-share", seen, fix)
    if share > _MUCH_TRAINED:
        fix = "prompts are trained too, which is rarely meant: leave out --train-on-prompt, look at data.train_roles"
        yield Finding("warning", "trained-share", seen, fix)


def empty_turns(facts: Facts) -> Iterator[Finding]:
    """Conversations with a turn that says nothing."""
    places = facts.texts.empty
    if places:
        seen = f"{_rows(len(places), 'has', 'have')} a turn that says nothing: {_some(places)}"
        fix = "take the turn or the row out; a trained one teaches to say nothing"
        yield Finding("warning", "empty-turns", seen, fix)


def damaged_text(facts: Facts) -> Iterator[Finding]:
    """Text that was read in the wrong encoding once."""
    found = facts.texts.damaged
    if found:
        places = _some([f"{where} has {piece!r}" for where, piece in found])
        seen = f"{_rows(len(found), 'holds', 'hold')} text that was read in the wrong encoding: {places}"
        fix = "read the original anew as UTF-8 (or what it is); mending by hand: text.encode('cp1252').decode('utf-8')"
        yield Finding("warning", "damaged-text", seen, fix)


def spelled_controls(facts: Facts) -> Iterator[Finding]:
    """Rows that were rendered by a template already, or only speak of one."""
    texts = facts.texts
    if texts.begins:
        seen = f"{_rows(len(texts.begins), 'begins', 'begin')} with the text of the BOS token: {_some(texts.begins)}"
        fix = "give the rows without it: the template writes what is needed, and text never becomes a control token"
        yield Finding("warning", "spelled-controls", seen, fix)
    if texts.spelled:
        places = _some([f"{where} has {token}" for where, token in texts.spelled])
        seen = f"{_rows(len(texts.spelled), 'spells', 'spell')} a control token, which is taken as plain text: {places}"
        fix = "if the rows were rendered by a template before, give them as they were before that"
        yield Finding("note", "spelled-controls", seen, fix)


def full_batches(facts: Facts) -> Iterator[Finding]:
    """Batches that are mostly padding, packed rows that stay half empty."""
    if not len(facts.data.examples):
        return
    filling = figures(facts.look, "train").filling
    assert filling is not None
    if filling.row_share is not None and filling.row_share < _FULL_ROWS and filling.num_rows > 1:
        fix = "raise data.max_length, so that more examples find room in a row"
        yield Finding("note", "full-batches", f"packed rows are {filling.row_share:.1%} full", fix)
    elif filling.row_share is None and filling.share < _FULL_BATCHES:
        seen = f"{1 - filling.share:.1%} of a batch are padding, which costs time and trains nothing"
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
