"""The report of a run holds what the run recorded, whatever is missing or damaged, and shows hostile text as text."""

from __future__ import annotations

import base64
import hashlib
import json
import math
import re
import shutil
from pathlib import Path
from typing import Any

import pytest

from run_pages import Page, as_json, lines, sftx, step, write_run
from sftx.inspection.run_report.run_record import read_run, thin_out
from sftx.inspection.run_report.write_report import key_figures, page_data, write_reports

HOSTILE = "</script><img src=x onerror=alert(1)><!-- {{data}} {{policy}} \u2028 \ud800 \u202e ש"
BLANK = "an empty run"


# --- a real run ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def real(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from sftx.testing.runs import run_tiny

    settings = {"train.eval_steps": 1, "train.use_cpu": True}
    return run_tiny(["lora", "exact-match"], tmp_path_factory.mktemp("real"), settings=settings).output_dir


def test_a_run_ends_with_its_report(real: Path) -> None:
    page = Page(real / "report.html")
    data, summary = page.data, json.loads((real / "summary.json").read_text())
    assert data["notes"] == []
    (run,) = data["runs"]
    told = [json.loads(line) for line in (real / "metrics.jsonl").read_text().splitlines()]
    steps = [line for line in told if line["event"] == "step"]
    for name in ("step", "loss", "learning_rate", "grad_norm", "tokens_per_second", "peak_bytes"):
        assert run["steps"][name] == [line[name] for line in steps]
    assert run["steps"]["tokens"][-1] == summary["num_label_tokens"]
    held = {line["step"]: line["loss"] for line in told if line["event"] == "evaluate"}
    assert dict(zip(run["evaluations"]["step"], run["evaluations"]["loss"], strict=True)) == held
    details = data["details"]
    assert [one["after"] for one in details["samples"]] == [one["after"] for one in summary["samples"]]
    assert len(details["samples"]) == 2
    assert ["adapter", "lora"] in [line[:2] for line in details["plugins"]]
    assert details["run_yaml"] == (real / "run.yaml").read_text(encoding="utf-8")
    assert (real / "loss.png").read_bytes().startswith(b"\x89PNG")


def test_a_run_records_masks_and_the_loss_of_tokens(real: Path) -> None:
    details = page_data([read_run(real)])["details"]
    assert 0 < len(details["rows"]) <= 5
    for row in details["rows"]:
        assert any(trained for _, trained in row["tokens"])
        assert not all(trained for _, trained in row["tokens"])
    losses = details["token_losses"]
    length = len(losses["tokens"])
    assert length == len(losses["trained"]) == len(losses["before"]) == len(losses["after"])
    assert losses["before"][0] is None
    assert all(value > 0 for value in losses["before"][1:])
    assert losses["before"] != losses["after"], "training has changed them"


def test_of_a_run_that_is_asked_for_again_nothing_but_the_report_changes(real: Path) -> None:
    before = {path: path.read_bytes() for path in real.rglob("*") if path.is_file()}
    done = sftx(real)
    assert done.exit_code == 0, done.output
    assert done.stdout.splitlines() == [
        f"wrote {real / name}, in place of the one before" for name in ("report.html", "loss.png")
    ]
    assert {path: path.read_bytes() for path in real.rglob("*") if path.is_file()} == before


# --- what is missing, damaged or no number ------------------------------------------------------


def test_every_file_may_be_missing(real: Path, tmp_path: Path) -> None:
    names = ("run.yaml", "manifest.json", "metrics.jsonl", "summary.json", "evidence.json", "trainer_state.json")
    for name in names:
        copy = Path(shutil.copytree(real, tmp_path / name))
        (copy / name).unlink()
        notes = [note for _, note in as_json([copy])["notes"]]
        assert [note for note in notes if note.startswith(name)] or name == "trainer_state.json"


@pytest.mark.parametrize("text", ["", "{", "[]", "null", "3", '"text"', "\x00\xff", '{"a": ' * 5000])
def test_every_file_may_be_damaged(real: Path, tmp_path: Path, text: str) -> None:
    copy = Path(shutil.copytree(real, tmp_path / "run"))
    for name in ("run.yaml", "manifest.json", "metrics.jsonl", "summary.json", "evidence.json", "ledger.jsonl"):
        (copy / name).write_bytes(text.encode("latin-1"))
    assert len(as_json([copy])["notes"]) >= 3


def test_the_page_says_where_the_time_went(tmp_path: Path) -> None:
    seconds = {"other": 0.5, "saving": 0.25, "loading": 30.0, "training": 3700.0, "checking": "long", "joining": -1}
    run = write_run(tmp_path / "run", summary={"seconds": seconds})
    assert as_json([run])["details"]["seconds"] == [
        ["training", 3700.0, "1 h 1 min"],
        ["loading", 30.0, "30 s"],
        ["other", 0.75, "0.8 s"],
    ]
    assert as_json([write_run(tmp_path / "old", summary={"num_steps": 1})])["details"]["seconds"] == []


WRONG: list[Any] = [None, 3, "text", [], {}, [[]], [{}], [3], {"a": 1}, 10**400, True]


@pytest.mark.parametrize("wrong", WRONG, ids=lambda value: repr(value)[:12])
def test_values_of_another_kind_break_nothing(tmp_path: Path, wrong: Any) -> None:
    names = ("loss", "held_out", "samples", "num_steps", "wall_seconds", "peak_bytes", "best", "tokens_per_second")
    names += ("seconds",)
    manifest = dict.fromkeys(("sftx", "libraries", "plugins", "model", "data", "eval_data", "device"), wrong)
    keys = ("row", "tokens", "trained", "before", "after", "left_out")
    evidence = {"rows": [dict.fromkeys(keys, wrong), wrong], "token_losses": dict.fromkeys(keys, wrong)}
    told = [step(1, **dict.fromkeys(("loss", "grad_norm", "num_label_tokens", "seconds", "num_steps"), wrong)), wrong]
    told += [{"event": "evaluate", "step": wrong, "loss": wrong}, {"event": "step", "step": wrong}, step(2)]
    run = write_run(
        tmp_path / "run",
        metrics=lines(told),
        config={"model": str(wrong), "plugins": {"x": {"y": 1}}},
        summary=dict.fromkeys(names, wrong),
        manifest=manifest,
        evidence=evidence,
    )
    other = write_run(tmp_path / "other", manifest={"plugins": [{"plugin": "lora", "version": wrong}]})
    assert 2.0 in as_json([run])["runs"][0]["steps"]["step"]
    assert len(as_json([run, other])["runs"]) == 2


def test_whatever_is_left_out_is_noted_once(tmp_path: Path) -> None:
    def noted(name: str, content: str) -> list[str]:
        run = write_run(tmp_path / str(len(list(tmp_path.iterdir()))), metrics=lines([step(1), step(2)]))
        (run / name).write_bytes(content.encode("latin-1"))
        return [note for note in read_run(run).notes if "missing" not in note]

    for name, content, note in (
        ("run.yaml", "", "run.yaml is empty: the options are not known"),
        ("evidence.json", '{"rows": 5}', "evidence.json: rows is a number and left out; expected a list"),
        ("manifest.json", '{"plugins": {}}', "manifest.json: plugins is an object and left out; expected a list"),
        ("summary.json", '{"best": "x"}', "summary.json: best is text and left out; expected an object"),
        ("metrics.jsonl", "\xff\x00\n\xfe\n\x80", "metrics.jsonl is damaged: none of its lines is a JSON object"),
        (
            "metrics.jsonl",
            '{"step": "x", "loss": []}\n{"event": "step"}\n',
            "metrics.jsonl: 2 lines are neither a step nor an evaluation, and left out",
        ),
    ):
        assert noted(name, content) == [note]
    for name in ("evidence.json", "summary.json", "manifest.json"):
        assert noted(name, '{"rows": null}') == []


def test_a_line_that_was_cut_off_is_normal_and_another_is_named(tmp_path: Path) -> None:
    metrics = lines([step(1)]) + "{damaged\n" + lines([step(2), step(3)]) + '{"event": "st'
    record = read_run(write_run(tmp_path / "run", metrics=metrics))
    assert record.steps["step"] == [1, 2, 3]
    assert [note for note in record.notes if "metrics" in note] == [
        "metrics.jsonl: the last line is incomplete, as after a killed run",
        "metrics.jsonl: 1 line is damaged and left out: line 2",
    ]


def test_what_is_no_number_is_a_gap(tmp_path: Path) -> None:
    told = [step(1), step(2, loss=math.nan), step(3, loss=math.inf, grad_norm=math.nan), step(4)]
    run = write_run(tmp_path / "run", metrics=lines(told))
    record = read_run(run)
    assert record.steps["loss"] == [2.0, None, None, 0.5]
    (note,) = [note for note in record.notes if note.startswith("loss ")]
    assert "2 steps" in note
    assert "first: step 2)" in note
    assert as_json([run])["runs"][0]["steps"]["loss"] == [2.0, None, None, 0.5]
    write_reports(run)
    assert (run / "loss.png").exists()


def test_a_run_under_way_tells_how_far_it_is(tmp_path: Path) -> None:
    record = read_run(write_run(tmp_path / "run", metrics=lines([step(1), step(2)])))
    figures = key_figures(record)
    assert not record.is_complete
    assert figures["steps"] == "2 of 4"
    assert figures["training loss"] == "2 → 1"
    assert figures["label tokens"] == "20"


def test_steps_that_were_done_anew_count_once(tmp_path: Path) -> None:
    told = [step(1), step(2), step(3), step(2, loss=7.0), step(3, loss=8.0)]
    record = read_run(write_run(tmp_path / "run", metrics=lines(told)))
    assert record.steps["loss"] == [2.0, 7.0, 8.0]
    assert record.steps["tokens"] == [10, 20, 30]
    assert record.steps["minutes"] == pytest.approx([0.1, 0.2, 0.3])


def test_without_metrics_the_trainers_state_has_the_curves(tmp_path: Path) -> None:
    history = [{"loss": 3.0, "step": 1, "learning_rate": 0.1}, {"eval_loss": 2.0, "eval_runtime": 1, "step": 1}]
    run = write_run(tmp_path / "run")
    (run / "metrics.jsonl").unlink()
    for number in (9, 10):
        place = run / "checkpoints" / f"step-{number}"
        place.mkdir(parents=True)
        state = {"log_history": history[: number - 8], "max_steps": 20}
        (place / "trainer_state.json").write_text(json.dumps(state))
    record = read_run(run)
    assert record.steps["loss"] == [3.0]
    assert record.evaluations["loss"] == [2.0], "the newest checkpoint's"
    assert record.num_steps == 20


def test_a_run_of_sftx_0_1_is_read_by_its_old_names(tmp_path: Path) -> None:
    told = [step(1), step(2)]
    old = {"num_label_tokens": "num_tokens", "num_input_tokens": "num_real_tokens"}
    run = write_run(
        tmp_path / "run",
        metrics=lines([{old.get(name, name): value for name, value in line.items()} for line in told]),
        summary={"num_steps": 2, "num_tokens": 21},
    )
    assert "num_tokens" in (run / "metrics.jsonl").read_text()
    record = read_run(run)
    assert record.steps["tokens"] == [10, 20]
    assert key_figures(record)["label tokens"] == "21"


def test_evaluations_lie_where_their_steps_are(tmp_path: Path) -> None:
    record = read_run(write_run(tmp_path / "run"))
    assert record.evaluations["step"] == [0, 4]
    assert record.evaluations["tokens"] == [0, 40]
    assert record.evaluations["minutes"] == pytest.approx([0, 0.4])


def test_long_curves_are_thinned_to_means() -> None:
    columns = {name: [float(n) for n in range(10)] for name in ("step", "tokens", "loss", "peak_bytes")}
    columns["loss"][4] = None  # type: ignore[call-overload]
    found, size = thin_out(columns, 4)
    assert size == 3
    assert found["step"] == found["peak_bytes"] == [2, 5, 8, 9]
    assert found["loss"] == [1.0, 4.0, 7.0, 9.0]
    assert thin_out(columns, 10) == (columns, 1)


def test_the_ledger_is_counted_by_reason(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run")
    entries = [{"where": f"a.jsonl:{n}", "action": "cut", "reason": "long"} for n in (3, 5)]
    entries += [{"where": "a.jsonl:9", "action": "dropped", "reason": HOSTILE}]
    (run / "ledger.jsonl").write_text(lines(entries))
    assert read_run(run).ledger == [
        ("training", "cut", "long", 2, "a.jsonl:3"),
        ("training", "dropped", HOSTILE, 1, "a.jsonl:9"),
    ]


# --- hostile text -------------------------------------------------------------------------------


@pytest.fixture
def hostile(tmp_path: Path) -> Path:
    tokens = [[HOSTILE, 1], ["plain", 0]]
    columns = {"tokens": [HOSTILE, "b"], "trained": [0, 1], "before": [None, 2.5], "after": [None, 0.5]}
    sample = dict.fromkeys(("row", "prompt", "reference", "before", "after"), HOSTILE)
    named = HOSTILE.replace("/", "_").replace("\ud800", "").replace("\x00", "")
    return write_run(
        tmp_path / named,
        config={"model": HOSTILE.replace("\ud800", ""), "plugins": {"</script>": {"a": "<!--"}}},
        manifest={"plugins": [{"plugin": HOSTILE, "options": {HOSTILE: HOSTILE}}], "python": HOSTILE},
        summary={"num_steps": 4, "samples": [sample]},
        evidence={
            "rows": [{"row": HOSTILE, "tokens": tokens, "left_out": [0, 7]}],
            "token_losses": {"row": HOSTILE, **columns},
        },
    )


def test_text_is_data_and_nothing_else(hostile: Path, tmp_path: Path) -> None:
    write_reports(hostile)
    harmless = write_run(tmp_path / BLANK)
    write_reports(harmless)
    page = Page(hostile / "report.html")
    assert page.elements == Page(harmless / "report.html").elements, "it makes no element and no attribute"
    block = page.text.partition('id="data">')[2].partition("</script>")[0]
    assert "<" not in block
    details = page.data["details"]
    assert page.data["runs"][0]["name"] == hostile.name
    assert details["samples"][0] == dict.fromkeys(("row", "prompt", "reference", "before", "after"), HOSTILE)
    assert details["rows"][0] == {"row": HOSTILE, "tokens": [[HOSTILE, 1], ["plain", 0]], "left_out": [0, 7]}
    assert details["token_losses"]["tokens"][0] == HOSTILE
    assert details["plugins"][0][1] == HOSTILE
    assert "<!--" in details["run_yaml"]


def test_nothing_is_fetched_and_only_its_own_script_may_run(hostile: Path, tmp_path: Path) -> None:
    done = sftx(hostile, write_run(tmp_path / "_$\\frac{$"), "-o", tmp_path / "_out")
    assert done.exit_code == 0, done.output
    page = Page(tmp_path / "_out" / "report.html")
    for tag, attributes in page.elements:
        assert tag not in ("link", "img", "iframe", "object", "embed", "base", "form", "a")
        assert not {"src", "href", "style", "action", "data"} & set(attributes)
        assert not any(name.startswith("on") for name in attributes)
    (policy,) = [a["content"] for _, a in page.elements if a.get("http-equiv") == "Content-Security-Policy"]
    directives = dict(part.strip().split(" ", 1) for part in str(policy).split(";"))
    assert directives["default-src"] == "'none'"
    assert directives["base-uri"] == directives["form-action"] == "'none'"
    for tag, name in (("style", "style-src"), ("script", "script-src")):
        digest = base64.b64encode(hashlib.sha256(page.only(tag).encode()).digest()).decode()
        assert directives[name] == f"'sha256-{digest}'"
        assert not re.search(
            r"https?:(?!//www\.w3\.org/2000/svg)|url\(|@import|innerHTML|eval\(|fetch\(", page.only(tag)
        )


# --- colours ------------------------------------------------------------------------------------


def _luminance(colour: str) -> float:
    """Relative luminance as WCAG 2.1 defines it."""
    parts = [int(colour[n : n + 2], 16) / 255 for n in (1, 3, 5)]
    linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
    return sum(weight * part for weight, part in zip((0.2126, 0.7152, 0.0722), linear, strict=True))


def contrast(one: str, other: str) -> float:
    low, high = sorted(map(_luminance, (one, other)))
    return (high + 0.05) / (low + 0.05)


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_colours_are_legible(tmp_path: Path, scheme: str) -> None:
    run = write_run(tmp_path / "run")
    write_reports(run)
    light, _, dark = Page(run / "report.html").only("style").partition("@media screen and (prefers-color-scheme: dark)")
    css = light if scheme == "light" else dark.partition("\n}")[0]
    colour = dict(re.findall(r"--([\w-]+): (#[0-9a-f]{6})", css))
    papers = {"ink": ["page", "card", "plain-2", "button"], "soft": ["page", "card", "plain-2"], "warn": ["card"]}
    papers |= {"trained-ink": ["trained", "trained-2"], "page": ["ink"]} | {f"k{n}": [f"h{n}"] for n in range(7)}
    for ink, backgrounds in papers.items():
        for background in backgrounds:
            assert contrast(colour[ink], colour[background]) >= 4.5, f"{ink} on {background}"
    # WCAG 2.1, 1.4.11: what is no text needs 3.
    assert all(contrast(colour[f"c{n}"], colour["card"]) >= 3 for n in range(7))
    heat = [_luminance(colour[f"h{n}"]) for n in range(7)]
    assert heat == sorted(heat, reverse=scheme == "light"), "a higher loss stands out more"
