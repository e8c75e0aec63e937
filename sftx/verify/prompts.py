"""The check that a trained model is asked as it was trained, made with the files of a result.

`sftx chat`, `generate` and `serve` prompt with the encoder of a loaded run; other programs with the chat template of
the saved tokenizer. Both must give the tokens that stood before the answers in training.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from pathlib import Path

from sftx.checkpoint.load_run import load_encoder
from sftx.data.encoder import Encoder
from sftx.errors import DataError, counted
from sftx.inspection.diagnosis.start_checks import served_ids, spells_control
from sftx.types import Conversation, Example
from sftx.verify.findings import FailedError, Finding, NotCheckedError
from sftx.verify.rows import ReadRow


def check_prompts(result: Path, rows: Iterable[ReadRow], *, trust_remote_code: bool) -> Finding:
    """Compare the prompts of a result with the examples that it was trained on."""
    encoder = load_encoder(result, trust_remote_code=trust_remote_code)
    if encoder.template is None:
        raise NotCheckedError("the run has no template; plain text is continued, and nobody is asked")
    num_own = num_served = num_compared = num_other_pieces = 0
    first_other = ""
    for row in rows:
        for unit, example in row.pairs:
            if not isinstance(unit, Conversation) or not unit.messages:
                continue
            answer = unit.messages[-1]
            if answer.role != "assistant" or not answer.trained:
                continue
            asked = dataclasses.replace(
                unit, messages=tuple(dataclasses.replace(turn, trainable=None) for turn in unit.messages[:-1])
            )
            num_own += 1
            _check_own(encoder, row.where, asked, example)
            if spells_control(encoder.tokenizer, asked):
                continue  # it is text in training, and a control token where it is served
            prompt = served_ids(encoder.tokenizer, asked, is_prompt=True)
            if prompt is None:
                continue
            num_compared += 1
            trained = example.token_ids[: len(prompt)].tolist()
            if prompt == trained:
                num_served += 1
                continue
            # Text on both sides of a border between segments is encoded as one where it is served: rarely other pieces
            # of the same text.
            expected = encoder.prompt(asked)
            difference = f"{row.where}: {_difference(encoder, prompt, expected, 'the saved chat template')}"
            if encoder.tokenizer.decode(prompt) != encoder.tokenizer.decode(expected):
                raise FailedError(difference)
            num_other_pieces += 1
            first_other = first_other or difference
    if not num_own:
        raise NotCheckedError("no row that is compared ends with an answer that is trained")
    if num_other_pieces and not num_served:
        raise FailedError(first_other)
    seen = f"chat and generate prompt {counted(num_own, 'answer')} token for token as in training"
    if not num_compared:
        seen += "; the saved chat template accepts none of these rows"
    else:
        seen += f", and so does apply_chat_template for {num_served:,} of {num_compared:,}"
    if num_other_pieces:
        seen += f" (the others have the same text: {first_other})"
    return Finding(
        "prompt", "passed", seen, {"answers": num_own, "served_equal": num_served, "served_compared": num_compared}
    )


def _check_own(encoder: Encoder, where: str, asked: Conversation, example: Example) -> None:
    """Raise FailedError unless sftx's own prompt is what was trained before the answer, and ends where that begins."""
    try:
        prompt = encoder.prompt(asked)
    except DataError as error:
        raise FailedError(f"{where}: its prompt cannot be rendered: {error}") from error
    ids, mask = example.token_ids.tolist(), example.loss_mask.tolist()
    if prompt != ids[: len(prompt)]:
        raise FailedError(f"{where}: {_difference(encoder, prompt, ids, 'chat')}")
    if len(prompt) >= len(ids) or not mask[len(prompt)]:
        token = repr(str(encoder.tokenizer.decode(ids[len(prompt) : len(prompt) + 1])))
        raise FailedError(
            f"{where}: after the prompt comes {token}, which is not trained: the model is asked before its turn"
        )


def _difference(encoder: Encoder, prompt: list[int], trained: list[int], who: str) -> str:
    at = next(
        (n for n, (a, b) in enumerate(zip(prompt, trained, strict=False)) if a != b), min(len(prompt), len(trained))
    )
    tokens = [
        repr(str(encoder.tokenizer.decode(ids[at : at + 1]))) if at < len(ids) else "nothing"
        for ids in (prompt, trained)
    ]
    before = str(encoder.tokenizer.decode(trained[max(0, at - 3) : at]))
    return f"token {at}, after {before!r}, is {tokens[0]} in the prompt of {who}, and was {tokens[1]} in training"
