"""The metrics' scores equal those of their libraries; a warning names text that they ignore."""

from __future__ import annotations

import json
import logging
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import sacrebleu
from hypothesis import given, settings
from hypothesis import strategies as st
from rouge_score.rouge_scorer import RougeScorer
from rouge_score.tokenizers import DefaultTokenizer

from sftx import PluginError, Question
from sftx.assembly.stages.evaluation_stages import MetricStage
from sftx.events import Sample
from sftx.testing.kit import built_in
from sftx.trainer.evaluate import score
from sftx_plugins.metrics.bleu import Bleu
from sftx_plugins.metrics.exact_match import ExactMatch
from sftx_plugins.metrics.json_valid import JsonValid
from sftx_plugins.metrics.rouge import Rouge, UnicodeWords

PREDICTIONS = [
    "The cat sat on the mat.",
    "a quick brown dog jumps over the lazy fox, it's said",
    "",
    "Nothing in common whatsoever",
    "He said: 'five o'clock is 17:00', twice.",
]
REFERENCES = [
    "The cat is sitting on the mat.",
    "The quick brown fox jumps over the lazy dog, it is said",
    "An answer was due here.",
    "Totally different words",
    "He said: 'five o'clock is 17:00', twice.",
]
CHINESE = ["北京是中国的首都。", "今天天气很好，我们去公园玩。"]
CHINESE_ANSWERS = ["中国的首都是北京。", "今天天气好，我们去学校。"]


def reported(plugin: Any, predictions: list[str], references: list[str]) -> dict[str, float]:
    samples = [Sample(f"row {n}", "?", r, p) for n, (p, r) in enumerate(zip(predictions, references, strict=True))]
    return scores({"name": plugin.sftx_metric()}, samples)


def scores(metrics: dict[str, Any], samples: list[Sample], *reported: str) -> dict[str, float]:
    """Score the samples as an evaluation does; `reported` are the names of other values."""
    stages = {name: MetricStage(f"plugin {name!r} (acme 1.0)", metric, name) for name, metric in metrics.items()}
    rows = [Question(sample.row_id, sample.prompt, [1], sample.reference) for sample in samples]
    return score(stages, [sample.prediction for sample in samples], rows, dict.fromkeys(reported, 0.0))


# --- against the libraries ----------------------------------------------------------------------


@pytest.mark.parametrize("tokenize", ["13a", "intl", "zh", "char", "none"])
@pytest.mark.parametrize("lowercase", [False, True])
def test_bleu_is_that_of_sacrebleu(tokenize: Any, lowercase: bool) -> None:
    predictions, references = PREDICTIONS + CHINESE_ANSWERS, REFERENCES + CHINESE
    expected = sacrebleu.corpus_bleu(predictions, [references], tokenize=tokenize, lowercase=lowercase).score
    assert reported(Bleu(tokenize, lowercase), predictions, references) == {"name": expected}
    assert 0 < expected < 100
    sentence = sacrebleu.sentence_bleu(predictions[0], references[:1], tokenize=tokenize, lowercase=lowercase).score
    assert Bleu(tokenize, lowercase).sftx_metric()(predictions[0], references[0]) == sentence


def test_bleu_of_a_set_is_not_the_mean_of_its_rows() -> None:
    metric = Bleu().sftx_metric()
    mean = sum(map(metric, PREDICTIONS, REFERENCES)) / len(PREDICTIONS)  # type: ignore[arg-type]
    assert abs(mean - reported(Bleu(), PREDICTIONS, REFERENCES)["name"]) > 1


def test_rouge_is_that_of_rouge_score() -> None:
    scorer = RougeScorer(["rouge1", "rouge2", "rougeL"])
    rows = [scorer.score(r, p) for p, r in zip(PREDICTIONS, REFERENCES, strict=True)]
    expected = {name: sum(row[name].fmeasure for row in rows) / len(rows) for name in rows[0]}
    assert list(expected) == ["rouge1", "rouge2", "rougeL"]
    assert reported(Rouge(), PREDICTIONS, REFERENCES) == expected
    assert reported(Rouge("unicode"), PREDICTIONS, REFERENCES) == expected, "on English both count the same words"


@settings(deadline=None)
@given(st.text(st.characters(max_codepoint=127)))
def test_on_ascii_the_unicode_words_are_those_of_rouge_score(text: str) -> None:
    assert UnicodeWords().tokenize(text) == DefaultTokenizer().tokenize(text)


def test_rouge_of_chinese_counts_characters() -> None:
    class Characters:
        def tokenize(self, text: str) -> list[str]:
            return [c for c in text if c not in "。，"]

    scorer = RougeScorer(["rouge1", "rouge2", "rougeL"], tokenizer=Characters())
    rows = [scorer.score(r, p) for p, r in zip(CHINESE_ANSWERS, CHINESE, strict=True)]
    expected = {name: sum(row[name].fmeasure for row in rows) / len(rows) for name in rows[0]}
    assert reported(Rouge("unicode"), CHINESE_ANSWERS, CHINESE) == expected
    assert min(expected.values()) > 0.3


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("Das Café öffnet um 9 Uhr", ["das", "café", "öffnet", "um", "9", "uhr"]),
        ("Cafe\u0301", ["café"]),
        ("हिन्दी में", ["हिन्दी", "में"]),
        ("東京 Tokyo2020!", ["東", "京", "tokyo2020"]),
        ("한국어 문장", ["한국어", "문장"]),
        ("snake_case 🙂", ["snake", "case"]),
    ],
)
def test_unicode_words(text: str, words: list[str]) -> None:
    assert UnicodeWords().tokenize(text) == words


# --- warnings about ignored text -------------------------------------------------------------------


def test_rouge_warns_once_about_dropped_letters(caplog: pytest.LogCaptureFixture) -> None:
    metric = Rouge().sftx_metric()
    with caplog.at_level(logging.WARNING):
        assert metric("Paris!", "Paris!") == {"rouge1": 1, "rouge2": 0, "rougeL": 1}
        assert not caplog.records
        for text in CHINESE:
            assert metric(text, text) == {"rouge1": 0, "rouge2": 0, "rougeL": 0}
    (record,) = caplog.records
    assert "'北京是中国的首都。'" in record.getMessage()
    assert "rouge.tokenizer=unicode" in record.getMessage()


def test_bleu_warns_once_about_scripts_without_spaces(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "sftx_plugins"):
        metric: Any = Bleu().sftx_metric()
        for _ in range(2):
            metric.corpus(["x", *CHINESE_ANSWERS], ["y", *CHINESE])
        reported(Bleu("zh"), CHINESE_ANSWERS, CHINESE)
        reported(Bleu(), PREDICTIONS, REFERENCES)
    (message,) = [r.getMessage() for r in caplog.records if r.name.startswith("sftx_plugins")]
    assert "2 of 3 references" in message
    assert "tokenize=13a" in message
    assert "bleu.tokenize=zh" in message


# --- JSON ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("answer", "score"),
    [
        ('{"a": [1, null, true]}', 1),
        (' "text"\n', 1),
        ("", 0),
        ("{'a': 1}", 0),
        ('{"a": 1} and more', 0),
        ("NaN", 0),
        ('{"a": -Infinity}', 0),
        ("[" * 100_000 + "]" * 100_000, 0),
    ],
)
def test_json_valid_accepts_json(answer: str, score: float) -> None:
    assert JsonValid().sftx_metric()(answer, "whatever") == score


CALL = {
    "type": "object",
    "required": ["function"],
    "properties": {"function": {"type": "string"}, "minutes": {"type": "integer", "minimum": 1}},
}


@pytest.mark.parametrize(
    ("answer", "score"),
    [
        ('{"function": "set_timer", "minutes": 5}', 1),
        ('{"minutes": 5, "function": "set_timer"}', 1),
        ('{"function": "set_timer", "minutes": 0}', 0),
        ('{"minutes": 5}', 0),
        ("3", 0),
        ('{"function": ', 0),
    ],
)
def test_json_valid_checks_answers_against_a_schema(answer: str, score: float, tmp_path: Path) -> None:
    path = tmp_path / "schema.json"
    path.write_text(json.dumps(CALL))
    assert JsonValid(str(path)).sftx_metric()(answer, "whatever") == score


@pytest.mark.parametrize("schema", [None, "{", '{"type": "nothing"}', "NaN"])
def test_a_bad_schema_stops_the_run_at_its_start(schema: str | None, tmp_path: Path) -> None:
    path = tmp_path / "schema.json"
    if schema is not None:
        path.write_text(schema)
    with pytest.raises(PluginError, match=r"schema .*schema\.json: "):
        JsonValid(str(path)).sftx_metric()


def test_a_schema_fetches_nothing_from_elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import urllib.request

    def fetch(*args: Any, **kwargs: Any) -> None:
        pytest.fail("the schema was fetched")

    monkeypatch.setattr(urllib.request, "urlopen", fetch)
    path = tmp_path / "schema.json"
    path.write_text('{"$ref": "https://example.org/schema.json"}')
    with pytest.raises(Exception, match=r"example\.org"):
        JsonValid(str(path)).sftx_metric()("1", "1")


@pytest.mark.parametrize(
    ("answer", "reference", "text", "as_json"),
    [
        ('{"a": 1, "b": [2, 3]}', '{"b":[2,3],"a":1}', 0, 1),
        ('{"a": 1}', ' {"a": 1}\n', 1, 1),
        ("[2, 1]", "[1, 2]", 0, 0),
        ("1", "true", 0, 0),
        ('"\\u00e9"', '"é"', 0, 1),
        ("not JSON", "not JSON ", 1, 1),
        ("NaN", "NaN", 1, 1),
        ("Paris", '"Paris"', 0, 0),
    ],
)
def test_exact_match_as_text_and_as_json(answer: str, reference: str, text: float, as_json: float) -> None:
    assert ExactMatch()(answer, reference) == text
    assert ExactMatch(as_json=True)(answer, reference) == as_json
    assert ExactMatch(as_json=True)(reference, answer) == as_json


# --- libraries ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "missing", "distribution"),
    [
        (Bleu, "sacrebleu", "sacrebleu"),
        (Rouge, "rouge_score", "rouge-score"),
        (lambda: JsonValid("schema.json"), "jsonschema", "jsonschema"),
    ],
)
def test_a_missing_library_is_named_with_what_installs_it(
    make: Any, missing: str, distribution: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in [name for name in sys.modules if name.partition(".")[0] == missing]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, missing, None)  # type: ignore[arg-type]
    with pytest.raises(PluginError, match=rf"{distribution}.*pip install {distribution}"):
        make().sftx_metric()


def test_plugins_import_their_libraries_only_when_used() -> None:
    code = (
        "import sys\n"
        "from sftx_plugins.metrics import bleu, exact_match, json_valid, rouge\n"
        "print(sorted({'sacrebleu', 'rouge_score', 'jsonschema', 'torch', 'nltk'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"


# --- the reported values ---------------------------------------------------------------------------


class Returns:
    """A metric that returns these scores, one for each answer."""

    def __init__(self, *scores: Any) -> None:
        self._scores = list(scores)

    def __call__(self, prediction: str, reference: str) -> Any:
        return self._scores.pop(0)


ROWS = [Sample("row 1", "?", "a", "a"), Sample("row 2", "?", "b", "x")]


def test_means_by_name_and_by_plugin() -> None:
    metrics = {"one": Returns(1, 0.5), "two": Returns({"p": 1.0, "r": 0}, {"r": 1.0, "p": 0.0})}
    assert scores(metrics, ROWS, "loss") == {"one": 0.75, "p": 0.5, "r": 0.5}


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ([1.0, math.nan], "row 2 .*nan.*finite"),
        ([1.0, 10**400], "row 2 .*1000.*finite"),
        ([1.0, "0.5"], "str.*float"),
        ([{"f": math.inf}, {"f": 1.0}], "'f' of row 1 .*inf.*finite"),
        ([{}, {}], r"row 1 .*\[\]"),
        ([{1: 1.0}, {1: 1.0}], r"row 1 .*\[1\]"),
        ([{"f": 1.0}, 1.0], "row 2 .*odd.*row 1 f"),
        ([{"accuracy": 1.0}] * 2, "'accuracy'"),
        ([{"loss": 1.0}] * 2, "'loss'"),
    ],
)
def test_misleading_scores_are_refused(given: list[Any], message: str) -> None:
    with pytest.raises(PluginError, match=rf"^plugin 'odd' \(acme 1\.0\): .*{message}"):
        scores({"odd": Returns(*given)}, ROWS, "accuracy")


def test_two_metrics_may_not_report_one_name() -> None:
    with pytest.raises(PluginError, match="'f'"):
        scores({"one": Returns({"f": 1.0}, {"f": 1.0}), "two": Returns({"f": 1.0}, {"f": 1.0})}, ROWS)


@pytest.mark.parametrize("name", ["bleu", "rouge", "json-valid", "exact-match"])
def test_the_metrics_are_found_by_name(name: str) -> None:
    assert hasattr(built_in(name), "sftx_metric")
