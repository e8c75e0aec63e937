"""Every mistake of a user is reported in one line on stderr with place, value and advice, and leaves no files behind.

The exit code is 1, or 2 when the command line itself is not valid.
"""

from __future__ import annotations

import contextlib
import json
import resource
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

import sftx
from sftx.cli import main

SFTX = f"(sftx {sftx.__version__})"
ROW = {"messages": [{"role": "user", "content": "Say hello."}, {"role": "assistant", "content": "Hello."}]}
BASE = ["--plugin", "chatml", "--plugin", "lora", "--data", "rows.jsonl", "--use-cpu"]


@pytest.fixture(autouse=True)
def _in_a_directory_with_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    directory = tmp_path / "work"
    directory.mkdir()
    monkeypatch.chdir(directory)
    rows([ROW] * 4)


def rows(records: list[Any], name: str = "rows.jsonl") -> None:
    Path(name).write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")


def run(*arguments: str | Path) -> Result:
    return CliRunner().invoke(main, ["run", *map(str, arguments)], catch_exceptions=False)


def files() -> set[str]:
    """Return all files and directories in the working directory."""
    return {str(path) for path in Path().rglob("*")}


def error_of(*arguments: str | Path, code: int = 1) -> str:
    """Return the error that `sftx run` prints for `arguments`: one line, and no file is left behind."""
    before = files()
    result = run(*arguments)
    assert result.exit_code == code, result.output
    assert result.stdout == ""
    assert files() == before
    if code == 2:  # click's own form: how the command is used, then what is wrong
        return result.stderr.splitlines()[-1]
    (line,) = without_template_line(result.stderr)
    assert result.stderr.endswith("\n")
    assert line.startswith("sftx: error: ")
    return line.removeprefix("sftx: error: ")


def without_template_line(stderr: str) -> list[str]:
    """Return the lines but for the one that says where chatml differs from the model's own template."""
    return [line for line in stderr.splitlines() if " by the run's template and " not in line]


# --- before anything is loaded ------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "option", "value", "advice"),
    [
        (["--plugin", "lorra"], "plugin 'lorra'", "", "'lora'"),
        (["--no-plugin", "progres"], "plugin 'progres'", "", "'progress'"),
        (["--set", "lora.alpha=3"], f"plugin 'lora' {SFTX}: option 'alpha'", "", "'lora_alpha'"),
        (["--set", "lora.r=0"], f"plugin 'lora' {SFTX}: option 'r'", "got 0", "greater than or equal to 1"),
        (["--set", "lora.r=many"], f"plugin 'lora' {SFTX}: option 'r'", 'got "many"', "integer"),
        (["--set", "train.sead=1"], "option 'train.sead'", "", "'seed'"),
        (["--learning-rate", "fast"], "option 'train.learning_rate'", 'got "fast"', "number"),
        (["--max-steps", "0"], "option 'train.max_steps'", "got 0", "greater than or equal to 1"),
        (["--no-plugin", "lora"], "", "", "--plugin lora"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_a_wrong_option_on_the_command_line(arguments: list[str], option: str, value: str, advice: str) -> None:
    message = error_of(*BASE, *arguments)
    assert message.startswith(f"{' '.join(arguments)}: {option}")
    assert value in message
    assert advice in message


def test_a_hook_that_needs_a_plugin_and_has_none() -> None:
    message = error_of(*BASE, "--no-plugin", "padded")
    assert "sftx_collator" in message
    assert "--plugin" in message
    assert "'padded'" in message


@pytest.mark.parametrize(
    ("line", "place", "value"),
    [
        ("plugins: {lorra: {}}", "run.yaml:2: plugin 'lorra'", "'lora'"),
        ("plugins: {lora: {alpha: 3}}", f"run.yaml:2: plugin 'lora' {SFTX}: option 'alpha'", "'lora_alpha'"),
        ("train: {max_steps: true}", "run.yaml:2: option 'train.max_steps': ", "got true"),
        ("plugins: {lora: {}", "run.yaml:3: ", "YAML"),
    ],
)
def test_a_wrong_line_of_a_run_file(line: str, place: str, value: str) -> None:
    Path("run.yaml").write_text(f"data: {{train: rows.jsonl}}\n{line}\n", encoding="utf-8")
    message = error_of("run.yaml")
    assert message.startswith(place)
    assert value in message


def test_a_run_file_that_is_not_there() -> None:
    assert error_of("none.yaml").startswith("none.yaml: ")


def test_no_training_data() -> None:
    Path("run.yaml").write_text("plugins: {chatml: {}}\n", encoding="utf-8")
    message = error_of("run.yaml")
    assert message.startswith("option 'data.train': ")
    assert "--data" in message


def test_two_templates(install_plugin: Any) -> None:
    code = (
        "from dataclasses import dataclass\nimport sftx\n@dataclass(frozen=True, eq=False)\nclass Other:\n"
        "    @sftx.hookimpl\n    def sftx_template(self):\n        raise AssertionError\n"
    )
    install_plugin("acme", code, {"other": "Other"}, version="1.2")
    message = error_of(*BASE, "--plugin", "other")
    assert message.startswith(f"plugin 'chatml' {SFTX} and plugin 'other' (acme 1.2) ")
    assert "sftx_template" in message


def test_a_plugin_whose_import_fails(install_plugin: Any) -> None:
    install_plugin("acme", "import missing_dependency", {"other": "Other"}, version="1.2")
    message = error_of(*BASE, "--plugin", "other")
    assert message.startswith("plugin 'other' (acme 1.2): ")
    assert "'acme:Other': ModuleNotFoundError: No module named 'missing_dependency'" in message


def test_data_files_that_are_not_there() -> None:
    for option, name in (("--data", "none.jsonl"), ("--eval-data", "none.csv")):
        message = error_of(*BASE, option, name)
        assert message.startswith(f"{name}: ")
        assert str(Path.cwd()) in message


def test_an_output_directory_that_holds_a_run_or_anything_else() -> None:
    Path("mine").mkdir()
    Path("mine/run.yaml").touch()
    Path("yours").mkdir()
    Path("yours/notes.txt").touch()
    for name, value in (("mine", "--resume"), ("yours", "files"), ("rows.jsonl", "a file")):
        message = error_of(*BASE, "--output-dir", name)
        assert message.startswith(f"output_dir {name}: ")
        assert value in message


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--frobnicate"], "sftx: error: --frobnicate: option 'frobnicate' does not exist; see --help"),
        (["-x"], "Error: No such option '-x'."),
        (["--set", "lora.r"], "Error: Invalid value for --set: 'lora.r' is not of the form PLUGIN.OPTION=VALUE"),
        (["--set", "=3"], "Error: Invalid value for --set: '=3' is not of the form PLUGIN.OPTION=VALUE"),
        (["--set", ".=3"], "Error: Invalid value for --set: '.=3' is not of the form PLUGIN.OPTION=VALUE"),
        (["--set"], "Error: Option '--set' requires an argument."),
        (["a.yaml", "b.yaml"], "Error: Got unexpected extra argument (b.yaml)"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_a_command_line_that_cannot_be_read_is_a_usage_error(arguments: list[str], message: str) -> None:
    assert message in error_of(*arguments, code=2)


@pytest.mark.parametrize("option", ["--data", "--output-dir", "--model"])
def test_an_empty_value_is_shown(option: str) -> None:
    assert error_of(option, "").startswith(f"{option} '': option ")


def test_an_unknown_command_is_a_usage_error() -> None:
    result = CliRunner().invoke(main, ["rum"])
    assert result.exit_code == 2
    assert "No such command 'rum'" in result.stderr


def test_debug_shows_the_traceback_instead() -> None:
    result = CliRunner().invoke(main, ["--debug", "run", *BASE, "--plugin", "lorra"])
    assert isinstance(result.exception, sftx.PluginError)


@pytest.mark.parametrize("arguments", [["plugins", "info", "lorra"]])
def test_other_commands_say_it_in_one_line_too(arguments: list[str]) -> None:
    result = CliRunner().invoke(main, arguments)
    assert (result.exit_code, result.stdout) == (1, "")
    assert result.stderr.startswith("sftx: error: plugin 'lorra' ")
    assert "'lora'" in result.stderr
    assert result.stderr.count("\n") == 1


# --- with a model -------------------------------------------------------------------------------


@pytest.fixture
def base(tiny_model_dir: Path) -> list[str]:
    return [*BASE, "--model", str(tiny_model_dir), "--max-steps", "1"]


def test_the_arguments_below_are_right_but_for_what_each_test_changes(base: list[str]) -> None:
    result = run(*base, "--output-dir", "out")
    assert (result.exit_code, without_template_line(result.stderr)) == (0, [])
    assert {path.name for path in Path("out/adapter").iterdir()} >= {"adapter_model.safetensors", "tokenizer.json"}
    assert {path.name for path in Path("out").iterdir()} >= {"run.yaml", "manifest.json", "metrics.jsonl"}
    assert error_of(*base, "--output-dir", "out").startswith("output_dir out: ")


def test_no_template(tiny_model_dir: Path) -> None:
    message = error_of("--plugin", "lora", "--data", "rows.jsonl", "--model", tiny_model_dir)
    assert message.startswith("rows.jsonl:1: ")
    assert "--plugin chatml" in message


@pytest.mark.parametrize(
    ("content", "place", "values"),
    [
        ("", "rows.jsonl: ", ["no rows"]),
        (json.dumps(ROW) + '\n{"messages": [\n', "rows.jsonl:2: ", ["JSON", "Expecting value", "column"]),
        (
            json.dumps(ROW) + '\n{"question": "x", "answer": "y"}\n',
            "rows.jsonl:2: ",
            ["'answer', 'question'", "prompt-completion: prompt, completion", "sharegpt: conversations"],
        ),
        (
            '{"messages": [{"role": "asistant", "content": "x"}]}',
            "rows.jsonl:1: messages[0].role is 'asistant'",
            ["did you mean", "'assistant'"],
        ),
        (
            '{"messages": [{"role": "user", "content": "x"}]}',
            "rows.jsonl:1: ",
            ["no assistant turn", "6 tokens", "1 of 1 row"],
        ),
        (
            '{"prompt": [{"role": "assistant", "content": "x"}], "completion": [{"role": "user", "content": "y"}]}\n'
            * 3,
            "rows.jsonl:1: ",
            ["13 tokens", "3 of 3 rows"],
        ),
    ],
    ids=["empty", "json", "format", "role", "no-assistant", "untrained"],
)
def test_rows_that_cannot_be_trained_on(base: list[str], content: str, place: str, values: list[str]) -> None:
    Path("rows.jsonl").write_text(content, encoding="utf-8")
    message = error_of(*base)
    assert message.startswith(place)
    assert [value for value in values if value not in message] == []


def test_too_many_rows_that_train_nothing(base: list[str]) -> None:
    rows([ROW, {"messages": ROW["messages"][:1]}, ROW])
    message = error_of(*base)
    assert message.startswith("rows.jsonl:2: ")
    assert [value for value in ("8 tokens", "1 of 3 rows", "data.max_dropped=0.05") if value not in message] == []


def test_a_max_length_shorter_than_the_prompt(base: list[str]) -> None:
    message = error_of(*base, "--max-length", "4")
    assert message.startswith("rows.jsonl:1: ")
    assert [value for value in ("max_length=4", "16 tokens", "4 of 4 rows") if value not in message] == []


def test_a_row_too_long_when_that_is_to_be_an_error(base: list[str]) -> None:
    message = error_of(*base, "--max-length", "12", "--long-rows", "error")
    assert message.startswith("rows.jsonl:1: ")
    assert "data.max_length=12" in message


def test_a_format_that_no_parser_of_the_run_has(base: list[str]) -> None:
    message = error_of(*base, "--format", "alpacca")
    assert message.startswith("--format alpacca: option 'data.format': ")
    assert "'alpaca'" in message


def test_a_metric_without_held_out_rows(base: list[str]) -> None:
    message = error_of(*base, "--plugin", "exact-match")
    assert "exact-match" in message
    assert "held-out" in message


@pytest.mark.parametrize("targets", ["[wq, wv]", r".*\.wq"])
def test_lora_targets_that_match_nothing(base: list[str], targets: str) -> None:
    message = error_of(*base, "--set", f"lora.target_modules={targets}")
    assert message.startswith(f"plugin 'lora' {SFTX}: target_modules ")
    assert "q_proj, k_proj, v_proj, o_proj, gate_proj, up_proj, down_proj" in message


@pytest.mark.parametrize(
    ("leave_out", "value"),
    [
        ("tokenizer*", "tokenizer.json"),
        ("config.json", "config.json"),
        ("model.safetensors", "weights"),
    ],
)
def test_a_model_directory_without_its_tokenizer_configuration_or_weights(
    base: list[str], tiny_model_dir: Path, leave_out: str, value: str
) -> None:
    shutil.copytree(tiny_model_dir, "model", ignore=shutil.ignore_patterns(leave_out))
    message = error_of(*base, "--model", "model")
    assert message.startswith("model model: ")
    assert value in message


def test_a_model_that_is_not_there(base: list[str]) -> None:
    assert error_of(*base, "--model", "./none").startswith("model ./none: ")


# --- a full disk --------------------------------------------------------------------------------


@contextlib.contextmanager
def _largest_file(num_bytes: int) -> Iterator[None]:
    """Make every write beyond `num_bytes` of a file fail, as on a full disk (EFBIG; Python ignores SIGXFSZ)."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_disk_that_has_no_room_for_the_tokenizer_is_found_before_the_first_step(
    base: list[str], tiny_model_dir: Path
) -> None:
    with _largest_file(100_000):
        message = error_of(*base, "--model", tiny_model_dir, "--output-dir", "out", "--max-steps", "1")
    assert "the tokenizer cannot be saved there: " in message
    assert "TMPDIR" in message


@pytest.mark.parametrize(
    ("plugins", "artefact"),
    [
        pytest.param(["--plugin", "lora", "--set", "lora.r=32"], "adapter", id="adapter_model.safetensors"),
        pytest.param([], "model", id="model.safetensors"),
    ],
)
def test_a_disk_that_is_full_while_saving_leaves_no_half_written_artefact(plugins: list[str], artefact: str) -> None:
    """Each case fills the disk at another file of the artefact, whose library reports it in its own way."""
    from sftx.model.tiny import model_dir

    model = model_dir()
    base = ["--plugin", "chatml", "--data", "rows.jsonl", "--use-cpu", "--max-steps", "1", "--output-dir", "out"]
    with _largest_file(100_000):
        result = run(*base, *plugins, "--model", model)
    assert result.exit_code == 1, result.output
    (line,) = [line for line in without_template_line(result.stderr) if not line.startswith("answers end with ")]
    assert line.startswith(f"sftx: error: {Path('out', artefact)}: ")
    assert " MB free" in line
    assert "--save-total-limit" in line
    assert {path.name for path in Path("out").iterdir()} == {
        "run.yaml",
        "manifest.json",
        "metrics.jsonl",
        "ledger.jsonl",
        "evidence.json",
    }


def test_a_directory_that_cannot_be_made(base: list[str]) -> None:
    Path("plain").touch()
    message = error_of(*base, "--output-dir", "plain/out")
    assert message.startswith("output_dir plain/out: ")


def test_a_run_directory_is_answered_with_its_run_file() -> None:
    Path("out").mkdir()
    assert "is a directory" in error_of("out", "--resume", code=2)
    Path("out/run.yaml").write_text("model: sftx:tiny\n")
    assert "out/run.yaml" in error_of("out", "--resume", code=2)
