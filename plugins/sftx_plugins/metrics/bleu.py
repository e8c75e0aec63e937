"""BLEU of all answers together, computed by sacrebleu."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import Field

from sftx import Metric, PluginError, hookimpl
from sftx_plugins.metrics._answers import SPACELESS, import_library

log = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class Bleu:
    """sacrebleu's BLEU of the whole held-out set, from 0 to 100 (Papineni et al. 2002; Post 2018)."""

    tokenize: Annotated[
        Literal["13a", "intl", "zh", "ja-mecab", "ko-mecab", "char", "none"],
        Field(description="sacrebleu's name of the tokenizer; zh for Chinese, char for any script."),
    ] = "13a"
    lowercase: Annotated[bool, Field(description="Compare in lower case.")] = False

    @hookimpl
    def sftx_metric(self) -> Metric:
        bleu = import_library("sacrebleu.metrics", "sacrebleu").BLEU
        try:
            options = {"tokenize": self.tokenize, "lowercase": self.lowercase}
            return _Bleu(self.tokenize, bleu(**options), bleu(**options, effective_order=True))
        except (ImportError, RuntimeError) as error:  # the tokenizers for Japanese and Korean need further libraries
            raise PluginError(f"tokenize={self.tokenize}: {error}") from error


@dataclass
class _Bleu:
    tokenize: str
    corpus_bleu: Any
    sentence_bleu: Any
    """With `effective_order`: n-gram orders that are longer than the sentence are left out."""
    warned: bool = False

    def __call__(self, prediction: str, reference: str) -> float:
        return float(self.sentence_bleu.sentence_score(prediction, [reference]).score)

    def corpus(self, predictions: Sequence[str], references: Sequence[str]) -> float:
        spaceless = 0 if self.warned else sum(bool(SPACELESS.search(text)) for text in references)
        if spaceless and self.tokenize in ("13a", "intl", "none"):
            self.warned = True
            log.warning(
                "bleu: %d of %d references are in a script without spaces, where tokenize=%s takes a sentence for one "
                "word; set bleu.tokenize=zh for Chinese, or char",
                spaceless,
                len(references),
                self.tokenize,
            )
        return float(self.corpus_bleu.corpus_score(list(predictions), [list(references)]).score)
