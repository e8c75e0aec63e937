"""ROUGE-1, ROUGE-2 and ROUGE-L of the answers, computed by rouge-score."""

from __future__ import annotations

import logging
import unicodedata
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import Field

from sftx import Metric, hookimpl
from sftx_plugins.metrics._answers import SPACELESS, import_library

log = logging.getLogger(__name__)

_TYPES = ("rouge1", "rouge2", "rougeL")


@dataclass(frozen=True, eq=False)
class Rouge:
    """The mean f-measures of rouge-score, from 0 to 1: rouge1, rouge2 and rougeL (Lin 2004)."""

    tokenizer: Annotated[
        Literal["ascii", "unicode"],
        Field(
            description="ascii: words of a-z and 0-9 as in rouge-score, other letters are dropped; unicode: words in "
            "any script, one for each character of Chinese and other scripts without spaces. Same on English."
        ),
    ] = "ascii"

    @hookimpl
    def sftx_metric(self) -> Metric:
        scorer = import_library("rouge_score.rouge_scorer", "rouge-score").RougeScorer
        if self.tokenizer == "unicode":
            return _Rouge(scorer(_TYPES, tokenizer=UnicodeWords()), warned=True)
        return _Rouge(
            scorer(_TYPES, tokenizer=import_library("rouge_score.tokenizers", "rouge-score").DefaultTokenizer())
        )


@dataclass
class _Rouge:
    scorer: Any
    warned: bool = False

    def __call__(self, prediction: str, reference: str) -> Mapping[str, float]:
        if not self.warned and any(not c.isascii() and c.isalnum() for c in reference):
            self.warned = True
            log.warning(
                "rouge: letters of the reference %.40r are dropped, because tokenizer=ascii knows only a-z and 0-9; "
                "set rouge.tokenizer=unicode",
                reference,
            )
        scores = self.scorer.score(reference, prediction)
        return {name: float(scores[name].fmeasure) for name in _TYPES}


class UnicodeWords:
    """A tokenizer for rouge-score. On ASCII text it gives the same words as rouge-score's own."""

    def tokenize(self, text: str) -> list[str]:
        """Return words of letters, digits and marks in lower case, and single characters of scripts without spaces."""
        return "".join(map(_spaced, unicodedata.normalize("NFC", text.lower()))).split()


def _spaced(character: str) -> str:
    if unicodedata.category(character)[0] not in "LMN":
        return " "
    return f" {character} " if SPACELESS.match(character) else character
