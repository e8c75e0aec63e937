"""`sftx inspect` shows exactly what training gets, for every row, policy and option, and rows that would stop a run."""

from __future__ import annotations

import dataclasses
import io
import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from rich.cells import cell_len
from rich.console import Console

from inspected_rows import ROWS
from sftx.errors import DataError, PluginError

ALL = 10_000
ANSWERED = {"messages": [{"role": "user", "content": "why"}, {"role": "assistant", "content": "because"}]}


def rows_of(view: Any, **selection: Any) -> tuple[Any, ...]:
    from sftx.inspection.token_report.explained_rows import RowSelection, inspect_rows

    return inspect_rows(view, "train", RowSelection(**({"max_rows": ALL} | selection))).rows


def why_of(row: Any, text: str) -> set[str]:
    """Why the tokens of the shown row are trained or not that hold `text`, wherever it stands."""
    whys = set()
    for example in row.examples:
        owners = [token for token in example.tokens for _ in token.text]
        whole = "".join(token.text for token in example.tokens)
        for found in re.finditer(re.escape(text), whole):
            whys |= {token.why for token in owners[found.start() : found.end()]}
    return whys


def printed(view: Any, *, ids: bool = False, **console: Any) -> str:
    from sftx.inspection.token_report import terminal
    from sftx.inspection.token_report.explained_rows import RowSelection, inspect_rows

    out = io.StringIO()
    report = inspect_rows(view, "train", RowSelection(max_rows=ALL))
    terminal.print_report(report, Console(file=out, highlight=False, **console), ids=ids)
    return out.getvalue()


# --- the very tokens ----------------------------------------------------------------------------

OPTIONS: dict[str, dict[str, Any]] = {
    "as it is": {},
    "cut_end": {"max_length": 40},
    "cut_oldest": {"max_length": 60, "long_rows": "cut_oldest"},
    "cut_proportional": {"max_length": 50, "long_rows": "cut_proportional"},
    "split": {"max_length": 30, "long_rows": "split"},
    "drop": {"max_length": 100, "long_rows": "drop"},
    "last turn": {"train_turns": "last"},
    "prompt": {"train_on_prompt": True},
    "no end": {"train_turn_end": False},
    "roles": {"train_roles": ["user", "assistant"], "train_turns": "last"},
    "system": {"system": "Another system text."},
    "no system": {"system": ""},
    "no duplicates": {"filters": {"duplicates": "drop", "min_turns": 1}},
}


@pytest.mark.parametrize("name", OPTIONS)
def test_every_row_is_shown_as_the_dataset_has_it(make_view: Callable[..., Any], name: str) -> None:
    view = make_view([*ROWS, ROWS[0]], **OPTIONS[name])
    data = view.dataset("train")
    shown = {e.name: e for row in rows_of(view) if row.status not in ("dropped", "filtered") for e in row.examples}
    assert list(shown) == [example.row_id for example in data.examples]
    assert len(shown) >= 3
    for example in data.examples:
        tokens = shown[example.row_id].tokens
        assert [token.id for token in tokens] == example.token_ids.tolist()
        assert [token.trained for token in tokens] == example.loss_mask.tolist()
        assert [token.weight for token in tokens] == pytest.approx(
            [1.0] * len(tokens) if example.weights is None else example.weights.tolist()
        )
        assert shown[example.row_id].num_label_tokens == example.num_label_tokens
        assert all(token.why for token in tokens)
        assert all(token.why.startswith("not") or ", not" in token.why for token in tokens if not token.trained)
    gone = [row for row in rows_of(view) if row.status in ("dropped", "filtered")]
    assert len(gone) == sum(entry.action in ("dropped", "filtered") for entry in data.ledger.entries)
    assert not any(token.trained for row in gone for example in row.examples for token in example.tokens)


def test_rows_whose_history_is_rewritten_are_shown_as_their_examples(
    make_view: Callable[..., Any], install_plugin: Callable[..., None]
) -> None:
    code = (
        "from dataclasses import dataclass\n"
        "from sftx_plugins.templates.chatml import ChatML\n"
        "@dataclass(frozen=True, eq=False)\n"
        "class Rewrites(ChatML):\n"
        "    rewrites_history = True\n"
    )
    install_plugin("rewriting", code, {"rewrites": "Rewrites"})
    view = make_view(ROWS, plugins=["rewrites"])
    (row,) = rows_of(view, rows=(("rows.jsonl", 4),))
    assert [example.name.rpartition("#")[2] for example in row.examples] == ["1", "2", "3"]
    assert "not trained here: this turn is trained in an example of its own" in why_of(row, "first answer")
    trained = ["".join(t.text for t in example.tokens if t.trained) for example in row.examples]
    assert trained == ["the first answer<|im_end|>\n", "three<|im_end|>\n", "   the third   answer<|im_end|>\n"]


def test_texts_joined_are_what_the_template_wrote(make_view: Callable[..., Any]) -> None:
    rows = rows_of(make_view(ROWS))
    (example,) = rows[0].examples
    assert "".join(token.text for token in example.tokens) == "".join(
        f"<|im_start|>{message['role']}\n{message['content']}<|im_end|>\n" for message in ROWS[0]["messages"]
    )
    assert "".join(token.text for token in rows[4].examples[0].tokens) == f"{ROWS[4]['text']}<|endoftext|>"
    spelled = [token for token in example.tokens if token.control]
    assert [token.text for token in spelled] == ["<|im_start|>", "<|im_end|>"] * 3, "what a row spells is no control"


def test_a_character_of_several_tokens_is_whole_on_the_first(make_view: Callable[..., Any]) -> None:
    (row, *_) = rows_of(make_view(ROWS))
    tokens = row.examples[0].tokens
    llamas = [n for n, token in enumerate(tokens) if "🦙" in token.text]
    assert len(llamas) == 3
    assert all(tokens[n + 1].text == "" for n in llamas), "the tiny tokenizer takes a byte or two at a time"
    view = make_view([{"input_ids": [t.id for t in tokens], "loss_mask": [True] * len(tokens)}])
    again = rows_of(view)[0].examples[0].tokens
    assert "".join(token.text for token in again) == "".join(token.text for token in tokens)
    assert [token.text for token in again].count("") == [token.text for token in tokens].count("")


def test_every_label_says_why(make_view: Callable[..., Any]) -> None:
    rows = rows_of(make_view(ROWS))
    assert why_of(rows[0], "<|im_start|>") == {"control token, not trained"}
    ends = ("control token that ends the turn, trained", "control token that ends the turn, not trained")
    assert why_of(rows[0], "<|im_end|>") == {*ends, "not trained: user"}, "one of them only spelled"
    assert why_of(rows[0], "with a 🦙\tplease") == {"not trained: user"}
    assert why_of(rows[0], "assistant\n") == {"the template's own text, not trained"}
    assert why_of(rows[3], "the first answer") == {"trained: the assistant's turn; weight 0.5"}
    assert why_of(rows[3], "second") == {"not trained: the row says so"}
    assert why_of(rows[3], "three") == {"trained: the row says so"}
    assert why_of(rows[3], "third") == {"trained: the assistant's turn"}
    masks = {token.why for token in rows[5].examples[0].tokens}
    assert masks == {"not trained: the row's own mask", "trained: the row's own mask"}
    (first, *_) = rows[4].examples[0].tokens
    assert first.why.startswith("trained: plain text, every token is; has no effect")
    assert rows[4].examples[0].num_label_tokens == len(rows[4].examples[0].tokens) - 1


@pytest.mark.parametrize(
    ("option", "why"),
    [
        ({"train_turns": "last"}, "not trained: data.train_turns=last"),
        ({"train_turn_end": False}, "not trained: data.train_turn_end=false"),
        ({"train_on_prompt": True}, "trained: data.train_on_prompt"),
    ],
)
def test_options_are_named_as_reasons(make_view: Callable[..., Any], option: dict[str, Any], why: str) -> None:
    turns = [*ANSWERED["messages"], *ANSWERED["messages"]]
    (row,) = rows_of(make_view([{"messages": turns}], **option))
    assert any(token.why.startswith(why) for token in row.examples[0].tokens)
    (row,) = rows_of(make_view([{"messages": turns}]))
    assert not any(token.why.startswith(why) for token in row.examples[0].tokens)


def test_a_template_that_is_never_the_same_is_refused(
    make_view: Callable[..., Any], install_plugin: Callable[..., None]
) -> None:
    code = (
        "import itertools\n"
        "from dataclasses import dataclass\n"
        "from sftx import Segment\n"
        "from sftx_plugins.templates.chatml import ChatML\n"
        "counter = itertools.count()\n"
        "@dataclass(frozen=True, eq=False)\n"
        "class Restless(ChatML):\n"
        "    def render(self, conversation):\n"
        "        return (Segment(f'{next(counter)} '), *super().render(conversation))\n"
    )
    install_plugin("restless", code, {"restless": "Restless"})
    with pytest.raises(PluginError, match="differently each time"):
        rows_of(make_view([ANSWERED], plugins=["restless"]))


# --- which rows ---------------------------------------------------------------------------------


def test_what_would_stop_a_run_is_shown_with_its_reason(make_view: Callable[..., Any]) -> None:
    view = make_view(ROWS)
    rows = rows_of(view)
    assert [row.status for row in rows] == ["kept", "dropped", "dropped", *["kept"] * 4]
    assert rows[1].reasons == ("no assistant turn, so nothing to train",)
    assert rows[1].examples
    assert "no format has the fields" in rows[2].reasons[0]
    assert json.loads(rows[2].record) == ROWS[2]
    problems = view.problems("train")
    assert any("no format has the fields" in problem for problem in problems)
    assert any("more than data.max_dropped=0.05 allows" in problem for problem in problems)


def test_a_split_of_dropped_rows_alone_is_shown(make_view: Callable[..., Any]) -> None:
    from sftx.inspection.dataset_statistics import dataset_statistics

    view = make_view(ROWS[1:3])
    assert [row.status for row in rows_of(view)] == ["dropped", "dropped"]
    found = dataset_statistics(view, "train")
    assert (found.num_examples, found.lengths, found.filling, found.num_steps) == (0, None, None, None)
    # The second row cannot be read; without it the first one is all there is.
    assert len(found.problems) == 2
    assert "rows.jsonl:2: no format has the fields" in found.problems[0]
    assert "1 of 1 row trains nothing" in found.problems[1]


def test_rows_are_chosen(make_view: Callable[..., Any]) -> None:
    view = make_view(ROWS, max_length=100)
    status = {row.number: row.status for row in rows_of(view)}
    assert sorted(status.values()) == ["cut", "dropped", "dropped", "dropped", "kept", "kept", "kept"]

    def numbers(**selection: Any) -> list[int]:
        return [row.number for row in rows_of(view, **selection)]

    assert numbers(max_rows=2) == [1, 2]
    assert numbers(rows=(("", 6), ("rows.jsonl", 1))) == [6, 1]
    assert numbers(show="dropped") == [number for number in status if status[number] == "dropped"]
    assert numbers(show="cut") == [number for number in status if status[number] == "cut"]
    lengths = view.dataset("train").examples.lengths
    assert len(rows_of(view, show="longest", max_rows=1)[0].examples[0].tokens) == max(lengths)
    with pytest.raises(DataError, match=r"--row 8: there is no such row among the 7 of data\.train"):
        numbers(rows=(("", 8),))
    with pytest.raises(DataError, match=r"--row other\.jsonl:1"):
        numbers(rows=(("other.jsonl", 1),))


def test_a_page_has_some_of_each_kind(make_view: Callable[..., Any]) -> None:
    from sftx.inspection.token_report.explained_rows import sample_rows

    plain = [{"text": f"row {n}"} for n in range(60)]
    view = make_view([*plain, *ROWS], max_length=60)
    few = sample_rows(view, "train", 15)
    assert len(few.rows) == 15
    assert [row.number for row in few.rows] == sorted({row.number for row in few.rows})
    assert {"dropped", "cut", "kept"} == {row.status for row in few.rows}
    assert few.chosen.startswith("some")
    everything = sample_rows(view, "train", 100)
    assert len(everything.rows) == 67
    assert everything.chosen == "all"


def test_a_stream_is_shown_up_to_its_first_window(make_view: Callable[..., Any]) -> None:
    from sftx.inspection.dataset_statistics import dataset_statistics

    rows = [{"text": f"row {n}"} for n in range(60)]
    view = make_view(rows, streaming=True, plan_window=20, settings={"train.max_steps": 3})
    found = dataset_statistics(view, "train")
    assert (found.num_rows, found.num_steps, found.note) == (20, 3, "streamed: the first 20 rows")


def test_wrapped_rows_are_shown_whole(make_view: Callable[..., Any]) -> None:
    from sftx.inspection.dataset_statistics import dataset_statistics

    texts = [{"text": f"row {n} " * 30} for n in range(5)]
    view = make_view(texts, plugins=["packed"], max_length=32, settings={"packed.strategy": "wrapped"})
    shown = [token for row in rows_of(view) for example in row.examples for token in example.tokens]
    data = view.dataset("train").examples
    assert len(data) > 5
    assert [token.id for token in shown] == [token for example in data for token in example.token_ids]
    assert [token.trained for token in shown] == [trained for example in data for trained in example.loss_mask]
    assert dataset_statistics(view, "train").note.startswith("rows are shown whole; training cuts")


# --- figures ------------------------------------------------------------------------------------


def test_figures_are_those_of_the_dataset(make_view: Callable[..., Any]) -> None:
    from sftx.inspection.dataset_statistics import dataset_statistics

    view = make_view(ROWS, max_length=100)
    data, found = view.dataset("train"), dataset_statistics(view, "train")
    lengths = sorted(data.examples.lengths.tolist())
    assert found.lengths is not None
    assert (found.lengths.min, found.lengths.max) == (lengths[0], lengths[-1])
    assert found.lengths.median == lengths[(len(lengths) - 1) // 2]
    assert sum(one.count for one in found.lengths.histogram) == len(lengths)
    assert (found.num_label_tokens, found.num_input_tokens) == (
        sum(e.num_label_tokens for e in data.examples),
        sum(lengths),
    )
    assert {(change.action, change.count) for change in found.changes} == {("dropped", 1), ("cut", 1)}
    assert found.filling is not None
    padded = len(lengths) * lengths[-1]  # one batch
    assert found.filling.share == pytest.approx(sum(lengths) / padded)
    assert not found.filling.packs


def test_packed_rows_tell_how_full_they_are(make_view: Callable[..., Any], install_plugin: Callable[..., None]) -> None:
    from sftx.inspection.dataset_statistics import dataset_statistics

    code = (
        "from dataclasses import dataclass\n"
        "from sftx import Collator, hookimpl, pack\n"
        "@dataclass(frozen=True, eq=False)\n"
        "class Pairs:\n"
        "    @hookimpl\n"
        "    def sftx_collator(self) -> Collator:\n"
        "        return self\n"
        "    def plan(self, window):\n"
        "        num = len(window.lengths)\n"
        "        return [(tuple(range(at, min(at + 2, num))),) for at in range(0, num, 2)], ()\n"
        "    def collate(self, examples):\n"
        "        return pack(examples)\n"
    )
    install_plugin("pairing", code, {"pairs": "Pairs"})
    settings = {"train.per_device_train_batch_size": 1}
    view = make_view([ANSWERED] * 4, plugins=["chatml", "pairs"], max_length=100, settings=settings)
    found = dataset_statistics(view, "train")
    assert found.filling is not None
    assert found.filling.packs
    assert found.filling.share == 1
    assert found.filling.num_rows == 2
    assert found.filling.row_share == pytest.approx(found.num_input_tokens / 200)


# --- the terminal -------------------------------------------------------------------------------

CONTROL = re.compile(r"[\x00-\x09\x0b-\x1f\x7f-\x9f]")


def test_no_control_character_reaches_the_terminal(make_view: Callable[..., Any]) -> None:
    text = printed(make_view([*ROWS, {"\x1b]0;title\x07": "\x9b2J"}]), width=80)
    assert not CONTROL.search(text)
    assert "?[31mdo? that" in text
    assert "«No.⏎" in text
    assert "⇥" in text


def test_colours_carry_no_foreign_codes(make_view: Callable[..., Any]) -> None:
    view = make_view(ROWS)
    text = printed(view, width=80, force_terminal=True, color_system="truecolor", no_color=False)
    assert "«" not in text
    assert "\x1b[38;2;6;33;14;48;2;165;223;180mN" in text
    plain = re.sub(r"\x1b\[[\d;]*m", "", text)
    assert not CONTROL.search(plain)
    without = printed(view, width=80, force_terminal=True, color_system="truecolor", no_color=True)
    assert "«" in without
    assert "38;2" not in without


@pytest.mark.parametrize("width", [40, 60, 119])
def test_lines_fit_the_terminal(make_view: Callable[..., Any], width: int) -> None:
    turns = {"user": "好" * 100, "assistant": "🦙" * 50 + "a" * 90}
    wide = {"messages": [{"role": role, "content": text} for role, text in turns.items()]}
    text = printed(make_view([wide]), width=width, ids=True)
    lines = text.partition("<|im_start|>")[2].partition("«trained»")[0].splitlines()[1:]
    assert len(lines) > 10
    assert max(map(cell_len, lines)) <= width


def test_ids_are_shown_on_demand(make_view: Callable[..., Any]) -> None:
    view = make_view([ANSWERED])
    ids = view.dataset("train").examples[0].token_ids.tolist()
    assert [int(found) for found in re.findall(r"⟨(\d+)⟩", printed(view, ids=True))] == ids
    assert "⟨" not in printed(view)


# --- the command --------------------------------------------------------------------------------


def invoke(*arguments: str) -> Any:
    from sftx.cli import main

    return CliRunner().invoke(main, ["inspect", "--model", "sftx:tiny", "--plugin", "chatml", *arguments])


def test_json_is_the_same_structure(make_view: Callable[..., Any], tmp_path: Path) -> None:
    from sftx.inspection.token_report.explained_rows import RowSelection, inspect_rows

    expected = {"made_by": "sftx inspect"} | dataclasses.asdict(
        inspect_rows(make_view(ROWS), "train", RowSelection(max_rows=2))
    )
    done = invoke("--data", str(tmp_path / "rows.jsonl"), "--rows", "2", "--json", "-")
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout) == json.loads(json.dumps(expected))
    done = invoke("--data", str(tmp_path / "rows.jsonl"), "--rows", "2", "--json", str(tmp_path / "out.json"))
    assert json.loads((tmp_path / "out.json").read_text()) == json.loads(json.dumps(expected))


def test_no_rows_leave_the_summary_and_a_cause_is_said_once(make_view: Callable[..., Any], tmp_path: Path) -> None:
    make_view([ANSWERED, {"messages": [{"role": "usr", "content": "x"}]}])
    done = invoke("--data", str(tmp_path / "rows.jsonl"), "--rows", "0")
    assert done.exit_code == 0, done.output
    assert re.search(r"^rows +2 of data.train", done.stdout, re.MULTILINE)
    assert "«trained»" not in done.stdout
    assert done.stdout.count("did you mean 'user'?") == 1
    assert re.search(r"^stops +the run at .*rows\.jsonl:2$", done.stdout.replace("\n          ", " "), re.MULTILINE)


@pytest.mark.parametrize(
    ("option", "name", "message"),
    [
        ("--json", "rows.jsonl", "name a file that ends in .json"),
        ("--html", "other.html", "holds something else"),
        ("--json", "other.json", "holds something else"),
    ],
)
def test_nothing_is_written_over(
    make_view: Callable[..., Any], tmp_path: Path, option: str, name: str, message: str
) -> None:
    make_view(ROWS)
    for other in ("other.html", "other.json"):
        (tmp_path / other).write_text("mine")
    before = (tmp_path / name).read_bytes()
    done = invoke("--data", str(tmp_path / "rows.jsonl"), option, str(tmp_path / name))
    assert (done.exit_code, message in done.output) == (2, True), done.output
    assert (tmp_path / name).read_bytes() == before


def test_a_link_that_leads_back_to_itself_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "loop.jsonl").symlink_to("loop.jsonl")
    done = invoke("--data", str(tmp_path / "loop.jsonl"))
    assert done.exit_code == 1
    assert done.stderr.endswith("loop.jsonl: is a link that leads back to itself\n")


def test_a_line_break_in_the_name_of_a_file_is_no_line_break_here(tmp_path: Path) -> None:
    file = tmp_path / "a\nb.jsonl"
    file.write_text(json.dumps(ANSWERED) + '\n{"neither": 1}\n', encoding="utf-8")
    done = invoke("--data", str(file))
    assert done.exit_code == 0, done.output
    assert done.stdout.count("a b.jsonl:") >= 3
    assert "\nb.jsonl" not in done.stdout


def test_what_it_wrote_is_written_again(make_view: Callable[..., Any], tmp_path: Path) -> None:
    make_view(ROWS)
    for _ in range(2):
        for option, name in (("--html", "view.html"), ("--json", "view.json")):
            assert invoke("--data", str(tmp_path / "rows.jsonl"), option, str(tmp_path / name)).exit_code == 0


def test_held_out_rows_are_shown(tmp_path: Path, make_view: Callable[..., Any]) -> None:
    make_view(ROWS[:1], held_out=[ANSWERED])
    files = ["--data", str(tmp_path / "rows.jsonl"), "--eval-data", str(tmp_path / "held.jsonl")]
    done = invoke(*files, "--split", "eval")
    assert done.exit_code == 0, done.output
    assert "1 of data.eval" in done.stdout
    assert "«because<|im_end|>⏎»" in done.stdout


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--row", "x"], "expected PATH:LINE"),
        (["--row", "rows.jsonl:0"], "expected PATH:LINE"),
        (["--row", "1", "--rows", "2"], "leave --rows and --show out"),
        (["--max-rows", "5"], "no meaning without --html"),
        (["--split", "eval", "--data", "x.jsonl"], "no held-out rows"),
        (["--show", "all"], "longest"),
    ],
)
def test_wrong_options_are_told(arguments: list[str], words: str) -> None:
    done = invoke(*arguments)
    assert done.exit_code == 2
    assert words in done.output


def test_wrong_options_are_told_before_torch_is_imported() -> None:
    code = (
        "import sys\nfrom sftx.cli import main\n"
        "try: main(sys.argv[1:])\n"
        "except SystemExit as end: assert end.code == 2, end.code\n"
        "assert not {'torch', 'transformers'} & set(sys.modules)\n"
    )
    arguments = ["inspect", "--plugin", "chatml", "--row", "x"]
    subprocess.run([sys.executable, "-c", code, *arguments], check=True, capture_output=True)


def test_without_colours_every_trained_turn_stands_between_signs(make_view: Callable[..., Any], tmp_path: Path) -> None:
    make_view(ROWS[:1])
    done = invoke("--data", str(tmp_path / "rows.jsonl"), "--train-on-prompt", "--rows", "1")
    assert done.exit_code == 0, done.output
    turns = done.output.partition("rows.jsonl:1")[2].partition("«trained»")[0]
    assert turns.count("«") == turns.count("»") > 1


def test_what_adapters_reach_is_said(make_view: Callable[..., Any]) -> None:
    from sftx.inspection.coverage import coverage_lines
    from sftx.inspection.token_report.explained_rows import RowSelection, inspect_rows

    rows = [{"prompt": "say one", "completion": "one"}]
    report = inspect_rows(make_view(rows, plugins=["chatml", "lora"]), "train", RowSelection())
    assert report.coverage[0].startswith("adapters reach ")
    assert coverage_lines(make_view(rows)) == ()
    (stops,) = coverage_lines(make_view(rows, plugins=["chatml", "lora"], settings={"plugins.lora.r": 4096}))
    assert stops.startswith("the run stops: ")
    assert "r=4096" in stops
