"""Tests of `sftx plugins`: list (which imports nothing), info, check and schema."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from click.testing import CliRunner, Result

import sftx
from sftx import SftxError, paths
from sftx.assembly.hookspecs import RETURNS
from sftx.assembly.registry import activate
from sftx.cli import plugins as cli
from sftx.config import run_file
from sftx.config.loading import load

METRIC = """
from dataclasses import dataclass
from typing import Annotated

from pydantic import Field

import sftx


@dataclass(frozen=True, eq=False)
class Plugin:
    \"\"\"Scores with care.\"\"\"

    floor: Annotated[float, Field(ge=0, le=1, description="Lowest score.")]
    mode: Annotated[str | None, Field(description="How.")] = None

    @sftx.hookimpl
    def sftx_metric(self):
        return self

    def __call__(self, prediction, reference):
        return max(self.floor, float(prediction == reference))
"""


def plugins(*arguments: str) -> Result:
    """Run the command in this process; an error that it raises is in `.exception`."""
    return CliRunner().invoke(cli.command, list(arguments))


# --- many plugins -------------------------------------------------------------------------------


def test_two_hundred_plugins_are_listed_and_none_is_imported(install_plugin: Any, tmp_path: Path) -> None:
    """One of them is broken, which affects nothing else."""
    marker = tmp_path / "imported"
    for number in range(200):
        code = f"from pathlib import Path\nPath({str(marker)!r}).touch()\n" if number else "this is no Python"
        install_plugin(f"dummy-{number}", code, {f"dummy-{number}": "Plugin"}, requires=["sftx>=0.2,<0.3"])
    environment = os.environ | {"PYTHONPATH": str(tmp_path / "site-packages")}

    def timed(*arguments: str) -> str:
        command = [sys.executable, "-m", "sftx", *arguments]
        start = time.perf_counter()
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True, cwd=tmp_path)
        print(f"{' '.join(arguments)}: {time.perf_counter() - start:.2f} s with 200 plugins installed")
        return done.stdout

    assert "Usage" in timed("--help")
    listed = timed("plugins", "list")
    assert listed.count("dummy-") == 200 * 2  # name and distribution; the class is dummy_...
    assert "lora" in listed
    assert "lora.r" in timed("plugins", "info", "lora")
    loaded = load(None, add=["chatml", "lora"], assignments=[("data.train", ["rows.jsonl"], "--data")])
    assert {active.info.name for active in activate(loaded).active} >= {"chatml", "lora", "padded"}
    assert not marker.exists()


def test_built_in_plugins_are_listed_by_their_hook_and_others_last(install_plugin: Any) -> None:
    install_plugin("acme", METRIC, {"careful": "Plugin"})
    lines = [line.partition(" ")[0] if line[:1] != "#" else line for line in plugins("list").stdout.splitlines()]
    titles = [line for line in lines if line.startswith("#")]
    hooks = [hook.removeprefix("sftx_") for hook in RETURNS if hook != "sftx_rollout"]
    several = ["preference", "reinforcement"]  # their plugins implement several hooks
    assert titles == [f"# {kind}" for kind in (*hooks, *several, "of other packages")]
    group = lines[lines.index("# schedule") + 1 : lines.index("# metric") - 1]
    assert "cosine-schedule" in group
    assert "minimind-schedule" in group
    assert "minimind" in lines[: lines.index("# optimizer")]
    assert lines[-1] == "careful"


def test_two_distributions_of_one_name_are_both_listed_and_naming_it_names_both(install_plugin: Any) -> None:
    for distribution in ("acme", "acme-copy"):
        install_plugin(distribution, METRIC, {"careful": "Plugin"})
    lines = [line.split()[:3] for line in plugins("list").stdout.splitlines() if line.startswith("careful")]
    assert lines == [["careful", "acme", "1.0"], ["careful", "acme-copy", "1.0"]]
    for command in (["info"], ["check"], ["schema"]):
        error = plugins(*command, "careful").exception
        assert isinstance(error, SftxError)
        assert "provided by acme 1.0 and acme-copy 1.0; uninstall one of them" in str(error)
    done = plugins("schema", "--all")
    assert done.exit_code == 0
    assert done.stderr.count("left out: plugin 'careful' is provided by acme 1.0 and acme-copy 1.0") == 1


# --- info ---------------------------------------------------------------------------------------


def test_info_shows_where_a_plugin_comes_from_and_what_it_takes(install_plugin: Any) -> None:
    metadata = [
        "License-Expression: MIT",
        "Project-URL: Homepage, https://example.org",
        "Project-URL: Documentation, https://example.org/docs",
    ]
    install_plugin("acme", METRIC, {"careful": "Plugin"}, metadata=metadata)
    assert plugins("info", "careful").stdout == (
        "plugin        careful\n"
        "distribution  acme 1.0\n"
        "license       MIT\n"
        "docs          https://example.org/docs\n"
        "class         acme:Plugin\n"
        "hooks         sftx_metric\n"
        "\n"
        "Scores with care.\n"
        "\n"
        "OPTION         TYPE              DEFAULT   MEANING\n"
        "careful.floor  number >= 0 <= 1  required  Lowest score.\n"
        "careful.mode   string | null     null      How.\n"
    )
    assert "It takes no options." in plugins("info", "jsonl").stdout


def test_info_shows_a_default_that_is_made_anew_each_time() -> None:
    assert re.search(r"^sharegpt\.roles +object +\{\} +Further words", plugins("info", "sharegpt").stdout, re.MULTILINE)
    assert "required" not in plugins("info", "tokenizer").stdout


# --- check --------------------------------------------------------------------------------------


def test_check_prints_each_clause_and_exits_with_1_when_one_is_broken(install_plugin: Any) -> None:
    metadata = ["Summary: A metric.", "License-Expression: MIT", "", "# A metric"]
    requires = ["sftx>=0.2,<0.3"]
    options = {"metadata": metadata, "requires": requires, "files": ["py.typed"]}
    install_plugin("acme", METRIC, {"careful": "Plugin"}, **options)
    good = plugins("check", "careful", "--set", "careful.floor=0.5")
    assert good.exit_code == 0, good.output
    assert good.stdout.startswith("plugin 'careful' (acme 1.0)\n\nHOOK     CLAUSE")
    assert good.stdout.endswith(" clauses kept, 0 broken, 0 skipped\n")
    install_plugin("acme-two", METRIC.replace("max(self.floor,", "hash((self.floor, prediction)) * ("),
                   {"careless": "Plugin"}, **options)  # fmt: skip
    bad = plugins("check", "careless", "--set", "careless.floor=0.5", "--json")
    assert bad.exit_code == 0
    install_plugin("acme-three", METRIC.replace("float(prediction == reference)", "float(prediction)"),
                   {"fails": "Plugin"}, **options)  # fmt: skip
    bad = plugins("check", "fails", "--set", "fails.floor=0.5", "--json")
    assert bad.exit_code == 1
    findings = {(f["hook"], f["clause"]): f for f in json.loads(bad.stdout)}
    assert findings["metric", "takes-any-text"]["status"] == "failed"
    assert "raised ValueError: could not convert" in findings["metric", "takes-any-text"]["message"]
    assert findings["metric", "pure"]["status"] == "skipped"
    assert findings["package", "is-typed"]["status"] == "ok"
    assert findings["run", "trains"]["status"] == "failed"
    shown = plugins("check", "fails", "--set", "fails.floor=0.5")
    assert "metric   takes-any-text         FAILED\n" in shown.stdout
    assert "metric / takes-any-text: " in shown.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["lorra"], "plugin 'lorra' is not installed; did you mean 'lora'?"),
        (["lora", "--set", "lora.r=0"], f"--set lora.r=0: plugin 'lora' (sftx {version('sftx')}): option 'r': got 0"),
        (["lora", "--set", "padded.x=0"], "--set padded.x=0: is not an option of plugin 'lora'"),
    ],
)
def test_check_refuses_what_it_cannot_check(arguments: list[str], message: str) -> None:
    error = plugins("check", *arguments).exception
    assert isinstance(error, SftxError)
    assert str(error).startswith(message)


def test_check_says_which_options_it_needs(install_plugin: Any) -> None:
    install_plugin("acme", METRIC, {"careful": "Plugin"})
    error = plugins("check", "careful", "--set", "careful.mode=x").exception
    assert isinstance(error, SftxError)
    assert str(error) == (
        "plugin 'careful' (acme 1.0): floor has no default; to check its hooks, add --set careful.floor=..."
    )


def test_check_lists_the_hooks_of_a_plugin_whose_own_defaults_are_refused(install_plugin: Any) -> None:
    code = METRIC.replace('description="Lowest score.")]', 'description="Lowest score.")] = 7.0')
    install_plugin("acme", code, {"careful": "Plugin"})
    findings = json.loads(plugins("check", "careful", "--json").stdout)
    assert ("package", "takes-its-defaults", "failed") in {(f["hook"], f["clause"], f["status"]) for f in findings}
    (metric,) = [f for f in findings if f["hook"] == "metric"]
    assert (metric["clause"], metric["status"]) == ("made", "skipped")
    assert metric["message"] == "not checked, because its own defaults are refused"


OBSERVER = """
from dataclasses import dataclass
from pathlib import Path

import sftx

SEEN = Path(__file__).with_name("seen")


class Posts(sftx.Observer):
    def __init__(self):
        self.seen = False

    def __getattribute__(self, name):
        if name.startswith("on_") and not self.seen:
            self.seen = True
            with SEEN.open("a") as file:
                file.write("a run\\n")
        return super().__getattribute__(name)


@dataclass(frozen=True, eq=False)
class Plugin:
    @sftx.hookimpl
    def sftx_observer(self):
        return Posts()
"""


def test_check_says_first_that_an_observer_gets_the_events_of_made_up_runs(install_plugin: Any, tmp_path: Path) -> None:
    install_plugin("acme", OBSERVER, {"posts": "Plugin"})
    seen = tmp_path / "site-packages" / "seen"
    left_out = plugins("check", "posts", "--skip", "observer", "--json")
    assert not seen.exists()
    assert "made-up" not in left_out.stderr
    skipped = {f["hook"]: f["message"] for f in json.loads(left_out.stdout) if f["status"] == "skipped"}
    assert skipped == dict.fromkeys(["observer", "run"], "left out with --skip observer")
    checked = plugins("check", "posts", "--json")
    assert checked.stderr.startswith(
        f"sftx: plugin 'posts' (acme 1.0) gets the events of {cli.NUM_MADE_UP_RUNS} made-up runs, and posts them "
    )
    assert len(seen.read_text().splitlines()) == cli.NUM_MADE_UP_RUNS
    assert (
        "--skip loss: plugin 'posts' (acme 1.0) implements observer"
        in plugins("check", "posts", "--skip", "loss").stderr
    )


# --- schema -------------------------------------------------------------------------------------


def schema(*arguments: str) -> dict[str, Any]:
    done = plugins("schema", *arguments)
    assert done.exit_code == 0, done.output
    made: dict[str, Any] = json.loads(done.stdout)
    jsonschema.Draft202012Validator.check_schema(made)
    return made


def is_valid(text: str, made: dict[str, Any], tmp_path: Path) -> bool:
    """Return whether the schema accepts a run file, after asserting that the loader agrees."""
    path = tmp_path / "run.yaml"
    path.write_text(text)
    values, _ = run_file.read(path)
    valid = jsonschema.Draft202012Validator(made).is_valid(values)
    try:
        activate(load(path))
        loads = True
    except SftxError:
        loads = False
    assert valid == loads, f"schema {valid}, sftx run {loads}: {text}"
    return valid


GOOD = [
    "",
    "model: some/model\n",
    "plugins: [chatml, lora]\n",
    "plugins:\n  chatml:\n  lora: {r: 4, lora_alpha: 8, target_modules: [q_proj, v_proj]}\n",
    "plugins:\n  lora:\n    target_modules: all-linear\n  padded: {group_by_length: false}\n",
    "data:\ntrain:\nplugins:\n",
    "data: {train: a.jsonl, eval: [b.jsonl, c.csv], max_dropped: 1}\n",
    "train: {learning_rate: 2e-4, num_train_epochs: 3, max_steps: null, warmup_steps: 0.1, bf16: true}\n",
    "generation: {max_rows: 5}\nwithout: [progress]\noutput_dir: out\ntrust_remote_code: false\n",
    "train.seed: 1\nplugins.lora.r: 4\nplugins.chatml: {}\ndata.train: a.jsonl\n",
]
BAD = [
    "modell: x\n",
    "plugins: {chatml: {}, lora: {rank: 4}}\n",
    "plugins: {lora: {r: 0}}\n",
    "plugins: {lora: {r: '4'}}\n",
    "plugins: {lora: {r: true}}\n",
    "plugins: {nothing-of-that-name: {}}\n",
    "plugins: [lora, 3]\n",
    "data: {train: 3}\n",
    "train: {learning_rate: 0}\n",
    "train: {lr_scheduler_type: step}\n",
    "train: [1]\n",
    "train.sead: 1\n",
    "train.seed: x\n",
    "plugins.lora.r: 0\n",
    "trust_remote_code: yes\n",
]


def test_the_schema_takes_what_a_run_takes_and_refuses_what_it_refuses(tmp_path: Path) -> None:
    made = schema("chatml", "lora")
    assert [text for text in GOOD if not is_valid(text, made, tmp_path)] == []
    assert [text for text in BAD if is_valid(text, made, tmp_path)] == []


def test_the_schema_takes_every_run_file_that_the_project_shows(tmp_path: Path) -> None:
    root = Path(sftx.__file__).parents[1]
    readme = (root / "README.md").read_text(encoding="utf-8")
    shown = [block.partition("```")[0] for block in readme.split("```yaml\n")[1:]]
    assert shown
    made = schema("--all")
    validator = jsonschema.Draft202012Validator(made)
    for text in [*shown, paths.DEMO_RUN_FILE.read_text(encoding="utf-8")]:
        validator.validate(run_file.parse(text)[0])


def test_the_schema_helps_an_editor_with_descriptions_defaults_and_only_these_plugins() -> None:
    made = schema("lora")
    options = made["properties"]["plugins"]["anyOf"][0]["properties"]
    assert set(options) == {"lora", "padded", "masked-ce", "progress", "jsonl", "sqlite", "messages",
                            "prompt-completion", "alpaca", "sharegpt", "hh-rlhf", "tokens", "text"}  # fmt: skip
    lora = made["$defs"][options["lora"]["anyOf"][0]["$ref"].rpartition("/")[2]]
    assert lora["properties"]["r"]["description"] == "Rank of the update."
    assert (lora["properties"]["r"]["default"], lora["properties"]["r"]["minimum"]) == (16, 1)
    assert made["$defs"]["TrainConfig"]["properties"]["learning_rate"]["description"] == "Peak learning rate."


def test_all_says_what_it_imports_and_leaves_out_what_is_broken(install_plugin: Any) -> None:
    install_plugin("acme", METRIC, {"careful": "Plugin"})
    install_plugin("broken", "raise RuntimeError('no')", {"broken": "Plugin"})
    done = plugins("schema", "--all")
    assert done.exit_code == 0
    assert "sftx: importing all" in done.stderr
    assert "left out: plugin 'broken' (broken 1.0): cannot be imported" in done.stderr
    options = json.loads(done.stdout)["properties"]["plugins"]["anyOf"][0]["properties"]
    assert {"careful", "lora"} <= set(options)
    assert "broken" not in options


def test_schema_needs_names_or_all() -> None:
    done = plugins("schema")
    assert done.exit_code == 2
    assert "name the plugins of the run file, or give --all" in done.stderr


# --- hostile and damaged packages ---------------------------------------------------------------


@pytest.mark.parametrize(
    "code",
    [
        "import sys\nsys.exit(0)\n",
        METRIC + "\n    def __post_init__(self):\n        raise SystemExit(0)\n",
        METRIC.replace("        return self\n", "        raise SystemExit(0)\n"),
        METRIC.replace("        return max(", "        raise SystemExit(0)\n        return max("),
    ],
    ids=["at import", "with its options", "in its hook", "while it scores"],
)
def test_a_plugin_that_exits_is_a_broken_one_and_no_success(
    install_plugin: Any, code: str, tmp_path: Path, tiny_model: Path
) -> None:
    from sftx.testing.runs import run_tiny

    install_plugin("acme", code, {"leaves": "Plugin"})
    with pytest.raises(SftxError, match=r"plugin 'leaves' \(acme 1\.0\): .*SystemExit: 0"):
        run_tiny(["leaves"], tmp_path, model=tiny_model, settings={"leaves.floor": 0.5})
    checked = plugins("check", "leaves", "--set", "leaves.floor=0.5")
    assert checked.exit_code == 1
    assert "SystemExit" in checked.output + str(checked.exception)


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("METADATA", b"Metadata-Version: 2.4\n"),
        ("METADATA", "Name: bröken\nVersion: 1\n".encode("latin-1")),
        ("entry_points.txt", b"[sftx.plugins]\nno equals sign\n"),
        ("entry_points.txt", b"[sftx.plugins]\nx = \xff:X\n"),
    ],
)
def test_a_distribution_whose_metadata_is_damaged_is_left_out_with_a_warning(
    install_plugin: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture, file: str, content: bytes
) -> None:
    install_plugin("acme", METRIC, {"careful": "Plugin"})
    install_plugin("broken", METRIC, {"broken": "Plugin"})
    (tmp_path / "site-packages" / "broken-1.0.dist-info" / file).write_bytes(content)
    listed = plugins("list")
    assert listed.exit_code == 0, listed.exception
    assert "careful" in listed.stdout
    assert "\nbroken " not in listed.stdout
    assert plugins("info", "lora").exit_code == 0
    assert "its metadata cannot be read, so its plugins are left out" in caplog.text


def test_a_distribution_that_calls_itself_sftx_takes_no_plugin_s_place(install_plugin: Any, tmp_path: Path) -> None:
    install_plugin("acme", METRIC, {"padded": "Plugin"})
    metadata = tmp_path / "site-packages" / "acme-1.0.dist-info" / "METADATA"
    metadata.write_text(metadata.read_text().replace("Name: acme", "Name: sftx"))
    loaded = load(None, assignments=[("data.train", ["rows.jsonl"], "--data")])
    with pytest.raises(SftxError, match=r"'padded' is provided by .* of sftx .* and .* of sftx "):
        activate(loaded)


def test_what_a_plugin_prints_is_not_among_the_findings(install_plugin: Any) -> None:
    code = (
        METRIC.replace("        return max(", "        print('hello')\n        return max(") + "\nprint('imported')\n"
    )
    install_plugin("acme", code, {"prints": "Plugin"})
    done = plugins("check", "prints", "--set", "prints.floor=0.5", "--json")
    assert {finding["hook"] for finding in json.loads(done.stdout)} == {"package", "metric", "run"}


def test_an_option_that_run_yaml_cannot_hold_is_refused(install_plugin: Any) -> None:
    secret = METRIC.replace("from pydantic import Field", "from pydantic import Field, SecretStr").replace(
        "    mode: ", "    token: SecretStr = SecretStr('secret')\n    mode: "
    )
    install_plugin("acme", secret, {"secret": "Plugin"})
    loaded = load(None, add=["secret"], assignments=[("data.train", ["r.jsonl"], ""), ("secret.floor", 0.5, "")])
    with pytest.raises(SftxError, match=r"option 'token' .* run\.yaml"):
        activate(loaded)


def test_the_terminal_gets_no_control_characters_of_a_package(install_plugin: Any) -> None:
    escape = "\x1b[31m\x9b"
    metadata = [f"License: {escape}", f"Project-URL: docs, {escape}"]
    install_plugin("acme", METRIC.replace("Scores with", f"Scores {escape}"), {"careful": "Plugin"}, metadata=metadata)
    for command in (["list"], ["info", "careful"], ["check", "careful"], ["schema", "careful"]):
        output = CliRunner().invoke(cli.command, command, color=True).output
        assert escape[0] not in output
        assert escape[-1] not in output


def test_a_full_stdout_is_one_line() -> None:
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            [sys.executable, "-m", "sftx", "plugins", "list"],
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
            check=False,
        )
    assert done.returncode != 0
    assert "Traceback" not in done.stderr
    assert "No space left on device" in done.stderr
