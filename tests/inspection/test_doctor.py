"""Every check of `sftx doctor` finds its problem, and finds nothing in good rows."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import pytest
from click.testing import CliRunner

from architectures import MIXTURES, write_model

ASSETS = Path(__file__).parents[2] / ".assets" / "llamafactory"


def turns(user: str, assistant: str, **more: Any) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": user}, {"role": "assistant", "content": assistant}], **more}


GOOD = [turns(f"What is {n} and {n}?", f"It is {2 * n}, as anybody can see.") for n in range(10)]
HELD = [turns(f"What is {n} times {n}?", f"It is {n * n}.") for n in range(3)]


@pytest.fixture
def findings(make_view: Callable[..., Any]) -> Callable[..., list[tuple[str, str, str]]]:
    """(severity, check, what was seen) of each finding on these rows."""
    from sftx.inspection.diagnosis.diagnose import diagnose

    def find(rows: list[dict[str, Any]], **options: Any) -> list[tuple[str, str, str]]:
        found = diagnose(make_view(rows, **options)).findings
        assert all(finding.fix for finding in found)
        return [(finding.severity, finding.check, finding.seen) for finding in found]

    return find


Find = Callable[..., list[tuple[str, str, str]]]


def of(check: str, found: list[tuple[str, str, str]]) -> list[tuple[str, str]]:
    return [(severity, seen) for severity, name, seen in found if name == check]


def test_nothing_is_found_where_nothing_is_wrong(findings: Find, make_model: Callable[..., Path]) -> None:
    def pad_apart(tokenizer: Any) -> None:
        tokenizer.pad_token = "<|im_start|>"

    assert findings(GOOD, held_out=HELD, model=make_model(pad_apart)) == []


# --- rows ---------------------------------------------------------------------------------------

OF_ROWS: dict[str, tuple[list[dict[str, Any]], dict[str, Any], str, str, str]] = {
    "a format that nobody knows": ([*GOOD, {"a": 1}], {}, "unreadable-rows", "error", "1 row cannot be read: "),
    "the same, dropped": (
        [*GOOD, {"a": 1}], {"invalid_rows": "drop", "max_dropped": 0.5}, "unreadable-rows", "warning", "rows.jsonl:11",
    ),
    "too many without an answer": (
        [*GOOD, {"messages": [{"role": "user", "content": "x"}]}], {}, "dropped-rows", "error", "more than data.max",
    ),
    "all of them": ([{"messages": [{"role": "user", "content": "x"}]}], {}, "dropped-rows", "error", "1 of 1 row"),
    "duplicates": ([*GOOD, GOOD[3]], {}, "duplicated-rows", "warning", "1 of 11 examples"),
    "cut rows": ([*GOOD, turns("x", "y " * 300)], {"max_length": 200}, "cut-rows", "warning", "in 1 of them no"),
    "little trained": ([turns("x " * 300, "y")] * 1, {}, "trained-share", "warning", "% of the tokens"),
    "all trained": (GOOD, {"train_on_prompt": True}, "trained-share", "warning", "% of the tokens"),
    "an empty turn": ([*GOOD, turns("  ", "nothing to say?")], {}, "empty-turns", "warning", "rows.jsonl:11"),
    "an empty answer": ([*GOOD, turns("x", "")], {"max_dropped": 1.0}, "empty-turns", "warning", "no other to train"),
    "mojibake": ([*GOOD, turns("x", "itâ€™s a cafÃ©")], {}, "damaged-text", "warning", "rows.jsonl:11 has 'â€™'"),
    "a lost byte": ([*GOOD, turns("x", "caf\ufffd")], {}, "damaged-text", "warning", "rows.jsonl:11"),
    "rendered before": (
        [*GOOD, turns("x", "y<|im_end|>")], {}, "spelled-controls", "note", "rows.jsonl:11 has <|im_end|>",
    ),
    "text with a BOS": ([*GOOD, turns("<|endoftext|>x", "y")], {}, "spelled-controls", "warning", "begins with"),
    "much padding": ([*GOOD, turns("x", "y " * 300)], {}, "full-batches", "note", "padding"),
    "two BOS": ([*GOOD, {"input_ids": [0, 0, 65, 66], "labels": [-100, -100, 65, 66]}], {}, "bos", "error", "twice"),
    "an end that is not trained": (GOOD, {"train_turn_end": False}, "stop-tokens", "warning", "no example trains"),
    "every answer cut": ([turns("x", "y " * 300)], {"max_length": 50}, "stop-tokens", "error", "no example trains"),
}  # fmt: skip


@pytest.mark.parametrize("name", OF_ROWS)
def test_what_is_wrong_with_rows_is_found(findings: Find, name: str) -> None:
    rows, options, check, severity, words = OF_ROWS[name]
    assert (severity, True) in [(found, words in seen) for found, seen in of(check, findings(rows, **options))]
    quiet = [seen for found, seen in of(check, findings(GOOD)) if found == severity and words in seen]
    assert quiet == []


@pytest.mark.parametrize("invalid_rows", ["error", "drop"])
def test_rows_that_cannot_be_read_for_one_reason_are_one_finding(findings: Find, invalid_rows: str) -> None:
    def words(role: str) -> dict[str, Any]:
        return {"messages": [{"role": role, "content": "x"}, {"role": "assistant", "content": "y"}]}

    found = [
        (severity, seen)
        for severity, check, seen in findings([words("usr")] * 9 + [words("nobody")], invalid_rows=invalid_rows)
        if check in ("unreadable-rows", "dropped-rows")
    ]
    assert len(found) == 1
    assert found[0][0] == "error"
    assert found[0][1].count("did you mean 'user'?") == 1
    assert found[0][1].count("expected system, user") == 1
    assert found[0][1].count("rows.jsonl:1: ") == 1
    if invalid_rows == "error":
        assert re.search(r"10 rows cannot be read: 9 times, first in \S+rows\.jsonl:1: messages\[0\]", found[0][1])
        assert re.search(r"; \S+rows\.jsonl:10: messages\[0\]\.role is 'nobody'", found[0][1])


def test_rows_that_are_trained_and_held_out_are_found(findings: Find) -> None:
    other_answer = turns("What is 4 and 4?", "I do not know.")
    found = of("leakage", findings(GOOD, held_out=[*HELD, GOOD[2], other_answer]))
    assert [severity for severity, _ in found] == ["error", "warning"]
    assert "1 of 5 held-out examples (20.0%) is trained on" in found[0][1]
    assert "rows.jsonl:3" in found[0][1]
    assert "1 of 5 held-out examples has the prompt of a training row" in found[1][1]
    assert "rows.jsonl:5" in found[1][1]
    assert of("leakage", findings(GOOD, held_out=HELD)) == []


def test_half_empty_packed_rows_are_found(findings: Find) -> None:
    options: dict[str, Any] = {"plugins": ["chatml", "packed"]}
    long = [turns("x", f"{n} " + "y " * 60) for n in range(10)]
    lengths = len("<|im_start|>user\nx")  # more than half of the row is one example, so that no two fit
    found = of("full-batches", findings(long, max_length=230 + lengths, **options))
    assert [severity for severity, _ in found] == ["note"]
    assert "packed rows are" in found[0][1]
    assert of("full-batches", findings(GOOD * 20, max_length=2000, **options)) == []


# --- template, tokenizer, model -----------------------------------------------------------------


def _writes_bos(tokenizer: Any) -> None:
    from tokenizers.processors import TemplateProcessing

    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<|endoftext|> $A", special_tokens=[("<|endoftext|>", 0)]
    )


def test_a_template_without_the_tokenizers_bos_is_found(findings: Find, make_model: Callable[..., Path]) -> None:
    ((severity, seen),) = of("bos", findings(GOOD, model=make_model(_writes_bos)))
    assert severity == "warning"
    assert "no example begins with '<|endoftext|>'" in seen
    assert of("bos", findings([{"text": "plain"}], model=make_model(_writes_bos, called="other"))) == []


def test_padding_with_eos_is_noted(findings: Find, make_model: Callable[..., Path]) -> None:
    ((severity, seen),) = of("stop-tokens", findings(GOOD, model=make_model(called="alike")))
    assert severity == "note"
    assert "harmless here" in seen
    apart = make_model(lambda tokenizer: setattr(tokenizer, "pad_token", "<|im_end|>"))
    assert of("stop-tokens", findings(GOOD, model=apart)) == []


@pytest.mark.parametrize(("eos", "number"), [(0, 1), ([0, 2], 0), (2, 0)])
def test_generation_that_stops_elsewhere_is_found(
    findings: Find, make_model: Callable[..., Path], eos: int | list[int], number: int
) -> None:
    model = make_model()
    (model / "generation_config.json").write_text(json.dumps({"eos_token_id": eos}))
    assert len(of("generation-stop", findings(GOOD, model=model, plugins=["chatml", "lora"]))) == number
    assert of("generation-stop", findings(GOOD, model=model)) == [], "a full model is saved with settings of its own"


def test_a_template_unlike_the_tokenizers_is_found(findings: Find, make_model: Callable[..., Path]) -> None:
    def another(tokenizer: Any) -> None:
        tokenizer.chat_template = (
            "{% for m in messages %}{{ '<|im_start|>' + m.role + ': ' + m.content + '<|im_end|>\\n' }}{% endfor %}"
        )

    ((severity, seen),) = of("own-template", findings(GOOD, model=make_model(another)))
    assert severity == "warning"
    assert "is '\\n' by the run's template and ':' by the tokenizer's own" in seen

    def with_default(tokenizer: Any) -> None:
        start = "{% if messages[0].role != 'system' %}{{ '<|im_start|>system\\nHello<|im_end|>\\n' }}{% endif %}"
        tokenizer.chat_template = start + tokenizer.chat_template

    ((severity, seen),) = of("own-template", findings(GOOD, model=make_model(with_default, called="default")))
    assert severity == "note", "its form is the same"
    assert "without a system text" in seen
    assert of("own-template", findings(GOOD)) == []
    assert of("own-template", findings([*GOOD[:2], turns("<|im_end|>", "y")])) == [], "no template differs there"

    def broken(tokenizer: Any) -> None:
        tokenizer.chat_template = "{{ raise_exception('no') }}"

    assert of("own-template", findings(GOOD, model=make_model(broken, called="broken"))) == []


def test_a_vocabulary_that_is_too_small_is_found(findings: Find, make_model: Callable[..., Path]) -> None:
    found = of("vocabulary", findings(GOOD, model=make_model(vocab_size=300)))
    assert [severity for severity, _ in found] == ["error", "error"]
    assert "embedding of 640 rows, config.json says vocab_size=300" in found[0][1]
    assert "the embedding has 300 rows" in found[1][1]
    unused = make_model(lambda tokenizer: tokenizer.add_tokens([f"<unused{n}>" for n in range(200)]), called="unused")
    ((severity, seen),) = of("vocabulary", findings(GOOD, model=unused))
    assert severity == "warning"
    assert "knows 712 tokens, the embedding has 640 rows" in seen
    assert of("vocabulary", findings(GOOD)) == []


def test_a_base_model_with_a_chat_template_is_found(findings: Find, make_model: Callable[..., Path]) -> None:
    def without(tokenizer: Any) -> None:
        tokenizer.chat_template = None

    model, lora = make_model(without), ["chatml", "lora"]
    ((severity, seen),) = of("base-model", findings(GOOD, model=model, plugins=lora))
    assert severity == "warning"
    assert "<|im_end|>, <|im_start|>" in seen
    assert [severity for severity, _ in of("base-model", findings(GOOD, model=model))] == ["note"], "all is trained"
    trained = {"lora.modules_to_save": ["embed_tokens", "lm_head"]}
    assert [s for s, _ in of("base-model", findings(GOOD, model=model, plugins=lora, settings=trained))] == ["note"]
    trained = {"lora.trainable_token_indices": [1, 2]}
    assert [s for s, _ in of("base-model", findings(GOOD, model=model, plugins=lora, settings=trained))] == ["note"]
    named = of("base-model", findings(GOOD, model=make_model(called="tiny-0.1B-Base"), plugins=lora))
    assert "calls itself a base model" in named[0][1]
    assert of("base-model", findings(GOOD, plugins=lora, model=make_model(called="database-instruct"))) == []


def test_weights_that_are_not_adapted_are_named(findings: Find, tmp_path: Path) -> None:
    lora = ("chatml", "lora")
    experts = write_model(MIXTURES["mixtral"](), tmp_path / "mixtral")
    found = of("untrained-weights", findings(GOOD, model=experts, plugins=lora))
    assert [severity for severity, _ in found] == ["warning"]
    assert "MixtralTopKRouter" in found[0][1]
    settings = {"lora.target_modules": ["q_proj", "gate_up_proj"]}
    found = of("untrained-weights", findings(GOOD, model=experts, plugins=lora, settings=settings))
    assert "not adapted: mlp.experts.down_proj" in found[1][1]
    assert of("untrained-weights", findings(GOOD, model=experts)) == []


def test_what_freeze_leaves_untrained_is_known(findings: Find, make_model: Callable[..., Path]) -> None:
    """With the embedding frozen, a base model's rows of control tokens stay as they are; freeze can train them."""
    of_freeze: dict[str, Any] = {"model": make_model(called="tiny-0.1B-Base"), "plugins": ["chatml", "freeze"]}
    ((severity, _),) = of("base-model", findings(GOOD, **of_freeze))
    assert severity == "warning"
    of_freeze["settings"] = {"freeze.extra_modules": ["embed_tokens", "lm_head"]}
    ((severity, _),) = of("base-model", findings(GOOD, **of_freeze))
    assert severity == "note"
    of_freeze["settings"] = {"freeze.trainable_layers": 99}
    ((severity, text),) = of("untrained-weights", findings(GOOD, **of_freeze))
    assert (severity, "has 2 layers" in text) == ("error", True)


def test_rows_past_the_models_length_are_found(findings: Find, make_model: Callable[..., Path]) -> None:
    ((severity, seen),) = of("positions", findings(GOOD, model=make_model(max_position_embeddings=16)))
    assert severity == "warning"
    assert "the model was made for 16" in seen
    assert of("positions", findings(GOOD)) == []


# --- mojibake -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text",
    ["It’s a naïve café, “déjà vu” — Straße, Ελλάδα, Привет, 日本語テスト, 请用中文回答我的问题", "žluťoučký kůň"],
)
@pytest.mark.parametrize("wrong", ["cp1252", "latin-1"])
def test_text_read_in_the_wrong_encoding_is_found(text: str, wrong: str) -> None:
    from sftx.inspection.diagnosis.mojibake import find_mojibake

    damaged = "".join(
        bytes([byte]).decode(wrong, "ignore") or bytes([byte]).decode("latin-1") for byte in text.encode("utf-8")
    )
    assert find_mojibake(damaged)
    assert not find_mojibake(text)


def test_chinese_read_as_gbk_is_found() -> None:
    from sftx.inspection.diagnosis.mojibake import find_mojibake

    assert find_mojibake("请用中文回答我的问题吧吧".encode().decode("gb18030", "ignore"))
    assert find_mojibake("锟斤拷")


@pytest.mark.parametrize(
    "text", ["MANHÃ”, disse", "CAFÉ” and É“", "”Å” och ”Ä”, ”Ö”", "ÂNGELA", "50 µm ± 2 °C · §3 ½", "Ça, c’est «bien»"]
)
def test_text_of_western_languages_is_none(text: str) -> None:
    from sftx.inspection.diagnosis.mojibake import find_mojibake

    assert not find_mojibake(text)


@pytest.mark.parametrize("name", ["alpaca_zh_demo.json", "dpo_zh_demo.json", "glaive_toolcall_zh_demo.json"])
def test_real_chinese_is_none(name: str) -> None:
    from sftx.inspection.diagnosis.mojibake import find_mojibake

    path = ASSETS / name
    assert path.is_file(), "run `make assets`"
    strings: list[str] = []

    def collect(value: Any) -> None:
        if isinstance(value, str):
            strings.append(value)
        for one in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
            collect(one)

    collect(json.loads(path.read_text(encoding="utf-8")))
    assert len(strings) > 900
    found = [(piece, text) for text in strings if (piece := find_mojibake(text))]
    assert all("\ufffd" in text or piece in ("锟斤拷", "烫烫烫") for piece, text in found), found[:3]
    assert len(found) <= 0.01 * len(strings)


# --- the command --------------------------------------------------------------------------------


def invoke(*arguments: str) -> Any:
    from sftx.cli import main

    return CliRunner().invoke(main, ["doctor", "--model", "sftx:tiny", "--plugin", "chatml", *arguments])


def _options_in(advice: str) -> list[list[str]]:
    """Return the options that an advice names, each with its value."""
    from sftx.cli.doctor import command

    switches = [option for option in command.params if isinstance(option, click.Option) and option.is_flag]
    names = {name for option in switches for name in (*option.opts, *option.secondary_opts)}
    named = re.findall(r"(--[a-z][a-z-]+)(?: ('[^']+'|[^\s,;:()]+))?", advice)
    return [[name] if name in names or not value else [name, *shlex.split(value)] for name, value in named]


_LONG = turns("x", "y " * 300)
FOLLOWED: dict[str, tuple[list[dict[str, Any]], list[str], str, int]] = {
    "unreadable rows": ([*GOOD * 10, {"a": 1}], [], "unreadable-rows", 1),
    "duplicates": ([*GOOD, GOOD[3]], [], "duplicated-rows", 1),
    "cut rows": ([*GOOD * 10, _LONG], ["--max-length", "200"], "cut-rows", 2),
    "every answer cut": ([_LONG], ["--max-length", "50"], "stop-tokens", 1),
    "no end": (GOOD, ["--no-train-turn-end"], "stop-tokens", 1),
    "all trained": (GOOD, ["--train-on-prompt"], "trained-share", 1),
    "much padding": ([*GOOD, _LONG], [], "full-batches", 1),
    "a base model": (GOOD, ["--plugin", "lora"], "base-model", 3),
    "another template": (GOOD, [], "own-template", 1),
    "beyond the model": ([turns("x", "y " * 400)], [], "positions", 1),
}


@pytest.mark.parametrize("name", FOLLOWED)
def test_advice_that_is_followed_helps(
    name: str, make_view: Callable[..., Any], make_model: Callable[..., Path], tmp_path: Path
) -> None:
    """Each option that a finding names is given to the same command, and the finding is gone, or no error any more."""

    def change(tokenizer: Any) -> None:
        if name == "a base model":
            tokenizer.chat_template = None
        elif name == "another template":
            tokenizer.chat_template = (
                "{% for m in messages %}{{ m.role + ': ' + m.content + '<|im_end|>' }}{% endfor %}"
            )

    rows, options, check, num_remedies = FOLLOWED[name]
    make_view(rows)
    limits = {"max_position_embeddings": 128} if name == "beyond the model" else {}
    base = ["--model", str(make_model(change, **limits)), "--data", str(tmp_path / "rows.jsonl")]

    def found(*arguments: str) -> list[dict[str, str]]:
        from sftx.cli import main

        template = [] if {"alpaca-template", "vicuna", "tokenizer"} & set(arguments) else ["--plugin", "chatml"]
        done = CliRunner().invoke(main, ["doctor", "--json", *base, *template, *arguments])
        assert done.stdout, done.stderr
        findings = json.loads(done.stdout)["findings"]
        return [one for one in findings if one["check"] == check and not one["fix"].startswith("nothing")]

    (first,) = found(*options)
    remedies = _options_in(first["fix"])
    assert len(remedies) == num_remedies, first["fix"]
    for remedy in remedies:
        is_instead = options and options[0].replace("--no-", "--") == remedy[0].replace("--no-", "--") != "--plugin"
        after = found(*([] if is_instead else options), *remedy)
        is_left_out = check == "unreadable-rows" and [one["severity"] for one in after] == ["warning"]
        assert after == [] or is_left_out, (remedy, after)


def test_the_exit_code_says_whether_there_is_an_error(make_view: Callable[..., Any], tmp_path: Path) -> None:
    rows = tmp_path / "rows.jsonl"
    make_view(GOOD)
    done = invoke("--data", str(rows))
    assert done.exit_code == 0, done.output
    assert "20 checks on 10 rows: 0 errors, 0 warnings, 1 note" in done.stdout
    make_view([*GOOD, {"\x1b[2J": 1}])
    done = invoke("--data", str(rows))
    assert done.exit_code == 1
    assert done.stdout.startswith("error")
    assert "\x1b" not in done.stdout
    assert max(map(len, done.stdout.splitlines())) <= 120
    done = invoke("--data", str(rows), "--json")
    assert done.exit_code == 1
    said = json.loads(done.stdout)
    assert {"error", "note"} <= {finding["severity"] for finding in said["findings"]}
    assert len(said["checks"]) == 20


def test_the_embedded_default_is_sound(real_model_dir: Path) -> None:
    from sftx.cli import main

    del real_model_dir  # it sees to it that the embedded model is converted
    done = CliRunner().invoke(main, ["doctor", "--plugin", "chatml", "--plugin", "lora"])
    assert done.exit_code == 0, done.output
    assert "0 errors, 0 warnings" in done.stdout
