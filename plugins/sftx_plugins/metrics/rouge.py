"""ROUGE-1, ROUGE-2 and ROUGE-L of the answers, by rouge-score."""

from __future__ import annotations

import logging
import unicodedata
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import Field

from sftx import Metric, hookimpl
from sftx_plugins.metrics._answers import SPACELESS, library

log = logging.getLogger(__name__)

_TYPES = ("rouge1", "rouge2", "rougeL")


@dataclass(frozen=True, eq=False)
class Rouge:
    """Means of the f-measures of rouge-score, from 0 to 1: rouge1, rouge2 and rougeL (Lin 2004)."""

    tokenizer: Annotated[
        Literal["ascii", "unicode"],
        Field(
            description="What a word is. ascii: of a-z and 0-9, as rouge-score has it, all else dropped; unicode: of "
            "letters of any script, those of Chinese and others without spaces one by one. Same on English."
        ),
    ] = "ascii"

    @hookimpl
    def sftx_metric(self) -> Metric:
        scorer = library("rouge_score.rouge_scorer", "rouge-score").RougeScorer
        if self.tokenizer == "unicode":
            return _Rouge(scorer(_TYPES, tokenizer=UnicodeWords()), warned=True)
        return _Rouge(scorer(_TYPES, tokenizer=library("rouge_score.tokenizers", "rouge-score").DefaultTokenizer()))


@dataclass
class _Rouge:
    scorer: Any
    warned: bool = False
    """Whether it has been said that letters are dropped."""

    def __call__(self, prediction: str, reference: str) -> Mapping[str, float]:
        if not self.warned and any(not c.isascii() and c.isalnum() for c in reference):
            self.warned = True
            log.warning(
                "rouge: the reference %.40r has letters that are dropped, as tokenizer=ascii knows a-z and 0-9 alone; "
                "set rouge.tokenizer=unicode",
                reference,
            )
        scores = self.scorer.score(reference, prediction)
        return {name: float(scores[name].fmeasure) for name in _TYPES}


class UnicodeWords:
    """A tokenizer in rouge-score's form: on ASCII text it gives what rouge-score's own gives."""

    def tokenize(self, text: str) -> list[str]:
        """Runs of letters, digits and their marks, in lower case; a character where the script has no spaces."""
        return "".join(map(_spaced, unicodedata.normalize("NFC", text.lower()))).split()


def _spaced(character: str) -> str:
    if unicodedata.category(character)[0] not in "LMN":
        return " "
    return f" {character} " if SPACELESS.match(character) else character
