"""The reward plugins: what they score, what they decline, and the errors of a user's own function."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from trl.rewards import get_soft_overlong_punishment

from sftx import Answer, ConfigError, Question, RunInfo
from sftx.assembly.discovery import instance, load_class
from sftx.assembly.entry_points import discover, find
from sftx.assembly.stages.rollout_stages import RewardStage
from sftx.assembly.stages.stage import make
from sftx.config.run_file import Origins
from sftx.errors import PluginError
from sftx.testing.kit import make_stage


def answer(text: str, reference: str = "", *, prompt: str = "?", row: int = 1, length: int = 1) -> Answer:
    question = Question(f"rows.jsonl:{row}", prompt, [1, 2], reference)
    return Answer(question, 0, text, (5,) * length, (-0.5,) * length, "stop")


def plugin(name: str, **options: Any) -> Any:
    info = find(name, discover())
    made = instance(info, load_class(info), options, Origins())
    if hasattr(made, "sftx_validate"):
        made.sftx_validate(RunInfo(Path(), {}))
    return made


def scores(name: str, *answers: Answer, **options: Any) -> list[float | None]:
    """Score as a run does, through the stage that checks the result."""
    return RewardStage(name, make_stage(plugin(name, **options), "sftx_reward"))(answers)


# --- exact match, JSON, regular expressions, length ------------------------------------------------


def test_exact_match_is_the_metric_of_that_name() -> None:
    given = [answer(" 42\n", "42"), answer("41", "42"), answer('{"b": 1, "a": 2}', '{"a":2,"b":1}')]
    assert scores("reward-exact-match", *given) == [1, 0, 0]
    assert scores("reward-exact-match", *given, as_json=True) == [1, 0, 1]
    metric = make(plugin("exact-match", as_json=True), "sftx_metric")
    assert [metric(one.text, one.question.reference) for one in given] == [1, 0, 1]


def test_without_a_reference_there_is_nothing_to_match() -> None:
    assert scores("reward-exact-match", answer("", ""), answer("x", "")) == [None, None]
    assert scores("reward-regex", answer("x 7"), pattern=r"x (\d)", group=1) == [None]
    assert scores("reward-regex", answer("x 7"), pattern=r"x (\d)") == [1]


def test_json_and_its_keys(tmp_path: Path) -> None:
    given = [answer(text) for text in ('{"name": "Ann", "age": 3}', '{"name": "Ann"}', "[1]", "NaN", "{", "")]
    assert scores("reward-json", *given) == [1, 1, 1, 0, 0, 0]
    assert scores("reward-json", *given, required_keys=["name", "age"]) == [1, 0, 0, 0, 0, 0]
    partly = scores("reward-json", *given, required_keys=["name", "age"], nonconforming=0.25)
    assert partly == [1, 0.25, 0.25, 0, 0, 0]
    schema = tmp_path / "schema.json"
    schema.write_text('{"type": "object", "properties": {"age": {"type": "integer"}}}')
    given.append(answer('{"age": "three"}'))
    assert scores("reward-json", *given, schema=str(schema)) == [1, 1, 0, 0, 0, 0, 0]
    metric = make(plugin("json-valid", schema=str(schema)), "sftx_metric")
    assert [metric(one.text, "") for one in given] == [1, 1, 0, 0, 0, 0, 0]
    assert scores("reward-json", *given, schema=str(schema), required_keys=["name"], nonconforming=-1)[-1] == -1


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"pattern": r"\d+"}, [1, 0, 0]),
        ({"pattern": r"\d+", "match": "search"}, [1, 1, 1]),
        ({"pattern": r"#### (\d+)", "match": "search", "group": 1}, [0, 1, 0]),
        ({"pattern": r"#### (?P<n>\d+)", "match": "last", "group": "n"}, [0, 1, 1]),
    ],
)
def test_a_pattern_on_the_whole_answer_or_a_group(options: dict[str, Any], expected: list[float]) -> None:
    given = [
        answer(" 42 ", "6 * 7\n#### 42"),
        answer("6 * 7 = 42\n#### 42", "6 * 7\n#### 42"),
        answer("#### 41, no, #### 42", "42"),
    ]
    assert scores("reward-regex", *given, **options) == expected


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"pattern": "(a"}, "option 'pattern': '\\(a' is no regular expression"),
        ({"pattern": "a", "group": 1}, "option 'group': 'a' has no group 1; its groups are 0"),
        ({"pattern": "(?P<n>a)", "group": "m"}, "its groups are 0, 1, 'n'"),
    ],
)
def test_a_pattern_that_cannot_be_used_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        plugin("reward-regex", **options)


@pytest.mark.parametrize("cache", [0, 4, 10])
def test_length_is_the_soft_punishment_of_trl(cache: int) -> None:
    given = [answer("x", length=length) for length in range(1, 14)]
    expected = get_soft_overlong_punishment(max_completion_len=10, soft_punish_cache=cache)(
        [list(one.token_ids) for one in given]
    )
    assert scores("reward-length", *given, max_completion_len=10, soft_punish_cache=cache) == expected
    assert expected[0] > -1 == expected[-1]


def test_a_length_that_cannot_be_is_refused() -> None:
    with pytest.raises(ConfigError, match="soft_punish_cache': is 11, and max_completion_len is 10"):
        plugin("reward-length", max_completion_len=10, soft_punish_cache=11)


# --- a function of the user's own ------------------------------------------------------------------

FUNCTIONS = '''
"""My rewards."""


def short(answer):
    return 1.0 / (1 + len(answer))


def right(prompt, answer, row):
    if "decline" in answer:
        return None
    return prompt == "2 + 2" and answer == row.reference


def best(answers, rows):
    longest = max(map(len, answers))
    return [float(len(answer) == longest) for answer in answers]


def raises(answer):
    half = 1
    return half / len(answer)


def no_number(answer):
    return "good"


def infinite(answer):
    return float("inf")


def too_few(answers):
    return [1.0]


def others(completion):
    return 1.0


constant = 3
'''


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "my reward.py"
    path.write_text(FUNCTIONS)
    return path


def test_a_function_takes_what_it_needs(file: Path) -> None:
    given = [answer("4", "4", prompt="2 + 2"), answer("5", "4", prompt="2 + 2"), answer("decline")]
    assert scores("reward-function", *given, function=f"{file}:short") == [0.5, 0.5, 0.125]
    assert scores("reward-function", *given, function=f"{file}:right") == [1, 0, None]
    assert scores("reward-function", *given, function=f"{file}:best") == [0, 0, 1]
    assert scores("reward-function", function=f"{file}:best") == []


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("raises", r":22: failed for the answer to rows.jsonl:8: ZeroDivisionError: division by zero"),
        ("no_number", r": no_number returned 'good' for the answer to rows.jsonl:7; return a finite number, or None"),
        ("infinite", r": infinite returned inf for the answer to rows.jsonl:7"),
        ("too_few", r": too_few returned 1 values for 2 answers"),
    ],
)
def test_an_error_of_a_function_names_file_line_and_row(file: Path, name: str, message: str) -> None:
    with pytest.raises(PluginError, match=rf"my reward\.py{message}"):
        scores("reward-function", answer("x", row=7), answer("", row=8), function=f"{file}:{name}")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("missing", "defines no function 'missing'; it defines short, right, best, raises"),
        ("constant", "defines no function 'constant'"),
        ("others", "others in .* has the parameters completion; give it some of prompt, answer, row, or of prompts,"),
    ],
)
def test_a_function_that_cannot_be_called_is_refused_at_the_start(file: Path, name: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        scores("reward-function", function=f"{file}:{name}")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("def f(:\n    pass\n", r"my reward\.py:1: .*SyntaxError"),
        ("\nimport nothing_of_this_name\n", r"my reward\.py:2: "),
    ],
)
def test_a_file_that_cannot_be_imported_is_named_with_its_line(file: Path, text: str, message: str) -> None:
    file.write_text(text)
    with pytest.raises(ConfigError, match=message):
        scores("reward-function", function=f"{file}:f")


def test_a_file_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=f"there is no file {tmp_path}/none.py; give FILE.py:FUNCTION"):
        plugin("reward-function", function=f"{tmp_path}/none.py:f")
    with pytest.raises(ConfigError, match="function"):
        plugin("reward-function", function=f"{tmp_path}/none.py")


def test_the_options_have_the_hash_of_the_file_and_hold_it(file: Path) -> None:
    first = plugin("reward-function", function=f"{file}:short")
    assert len(first.sha256) == 64
    again = plugin("reward-function", function=f"{file}:short", sha256=first.sha256)
    assert again.sha256 == first.sha256
    file.write_text(FUNCTIONS.replace("1.0 /", "2.0 /"))
    assert plugin("reward-function", function=f"{file}:short").sha256 != first.sha256
    with pytest.raises(ConfigError, match=r"is not the file that sha256 names .* bring that one back"):
        plugin("reward-function", function=f"{file}:short", sha256=first.sha256)
