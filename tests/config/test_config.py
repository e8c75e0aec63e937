"""Loading makes a RunConfig of a run file and a command line, or reports in one line what is wrong and where."""

from __future__ import annotations

import dataclasses
import pkgutil
import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, get_args, get_origin, get_type_hints

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import Field

from sftx import paths
from sftx.cli.options import parse_value
from sftx.config import loading, named_plugins, options, run_file, validation
from sftx.config.options import RunConfig
from sftx.errors import ConfigError

DATA = ("data.train", ["rows.jsonl"], "--data rows.jsonl")


@pytest.fixture
def write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Return a function that writes `run.yaml` into the working directory."""
    monkeypatch.chdir(tmp_path)

    def write(text: str) -> Path:
        Path("run.yaml").write_text(text, encoding="utf-8")
        return Path("run.yaml")

    return write


def load_error(*args: Any, **kwargs: Any) -> str:
    with pytest.raises(ConfigError) as caught:
        loading.load(*args, **kwargs)
    message = str(caught.value)
    assert "\n" not in message
    return message


# --- YAML ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-4", 1e-4),
        ("1E5", 1e5),
        ("2.0e-4", 2e-4),
        (".5", 0.5),
        ("-3", -3),
        ("010", 10),
        ("0o17", 15),
        ("0x1F", 31),
        ("true", True),
        ("False", False),
        ("null", None),
        ("~", None),
        ("yes", "yes"),
        ("off", "off"),
        ("n", "n"),
        ("2024-01-01", "2024-01-01"),
        ("12:30", "12:30"),
        ("1_000", "1_000"),
        ("<<", "<<"),
        (".inf", ".inf"),
        (".nan", ".nan"),
        ("'1e-4'", "1e-4"),
        ("[q_proj, 'no']", ["q_proj", "no"]),
        ("{a: 1e-3}", {"a": 1e-3}),
    ],
)
def test_yaml_is_read_as_version_1_2_says(write: Any, text: str, value: Any) -> None:
    """The command line reads the same values. Infinity, which JSON cannot record, is text."""
    values, _ = run_file.read(write(f"key: {text}\n"))
    assert values == {"key": value}
    assert type(values["key"]) is type(value)
    assert parse_value(text) == value


def test_what_is_not_yaml_on_the_command_line_is_text() -> None:
    assert parse_value("[q_proj") == "[q_proj"
    assert parse_value(r".*\.(q|v)_proj") == r".*\.(q|v)_proj"
    for text in ("Answer: yes", "Write C # and nothing else", "#1", "- a", " x ", "a\nb", "it's", "32 # rows"):
        assert parse_value(text) == text


@pytest.mark.parametrize(
    ("text", "place", "value"),
    [
        ("model: a/b\nmodel: c/d\n", "run.yaml:2: ", "'model'"),
        ("plugins:\n  lora: {}\n  lora: {}\n", "run.yaml:3: ", "'lora'"),
        ("model: a/b\ntrain: [1,\n", "run.yaml:3: ", ""),
        ("model: a/b\n1: 2\n", "run.yaml:2: ", "key"),
        ("model: a/b\n? [x]\n: 2\n", "run.yaml:2: ", "key"),
        ("- a\n", "run.yaml: ", "list"),
        ("model: a\x00b\n", "run.yaml: ", ""),
        ("model: a/b\ntrain: {seed: !!int x}\n", "run.yaml:2: ", "tag:yaml.org,2002:int"),
        ("model: a/b\ntrain: {seed: !mine 1}\n", "run.yaml:2: ", "!mine"),
        ("model: a/b\nplugins: !!set {lora}\n", "run.yaml:2: ", "tag:yaml.org,2002:set"),
        ("model: a/b\n---\nmodel: c/d\n", "run.yaml:2: ", ""),
        ("model: &a [*a]\n", "run.yaml: ", "alias"),
        (f"model: {'[' * 5000}", "run.yaml: ", "nested"),
        ("a: &a [0,0,0,0,0,0,0,0,0,0]\nb: &b [*a,*a,*a,*a,*a,*a,*a,*a,*a,*a]\nc: &c [*b,*b,*b,*b,*b,*b,*b,*b,*b,*b]\n"
         "d: &d [*c,*c,*c,*c,*c,*c,*c,*c,*c,*c]\ne: [*d,*d,*d,*d,*d,*d,*d,*d,*d,*d]\n", "run.yaml:", "alias"),
    ],
)  # fmt: skip
def test_a_file_that_is_no_run_file_is_named_with_its_line(write: Any, text: str, place: str, value: str) -> None:
    message = load_error(write(text))
    assert message.startswith(place)
    assert value in message


def test_a_run_file_that_is_missing_or_not_utf8_is_named(write: Any) -> None:
    path = write("")
    path.write_bytes(b"model: \xff\n")
    assert load_error(path) == "run.yaml:1: is not UTF-8: invalid start byte; save it as UTF-8 text"
    path.unlink()
    assert load_error(path) == "run.yaml: no such run file"


def test_an_empty_run_file_is_all_defaults(write: Any) -> None:
    assert loading.load(write("# nothing yet\n")).config == RunConfig()


# --- validation ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("train: {max_steps: true}", "option 'train.max_steps': got true, expected a valid integer"),
        ("train: {max_steps: '3'}", "option 'train.max_steps': got \"3\", expected a valid integer"),
        ("train: {max_steps: 3.0}", "option 'train.max_steps': got 3.0, expected a valid integer"),
        ("train: {learning_rate: true}", "option 'train.learning_rate': got true, expected a valid number"),
        ("train: {learning_rate: '1'}", "option 'train.learning_rate': got \"1\", expected a valid number"),
        ("train: {learning_rate: .inf}", "option 'train.learning_rate': got \".inf\", expected a valid number"),
        ("train: {gradient_checkpointing: 1}", "got 1, expected true or false"),
        ("train: {gradient_checkpointing: yes}", 'got "yes", expected true or false'),
        ("train: {max_steps: 0}", "got 0, expected a number greater than or equal to 1"),
        ("train: {learning_rate: 0}", "got 0, expected a number greater than 0"),
        ("data: {max_dropped: 1.5}", "got 1.5, expected a number less than or equal to 1"),
        ("train: {lr_scheduler_type: ''}", 'got "", expected '),
        ("train: {optim: 3}", "got 3, expected a valid string"),
        ("train: {seed: null}", "option 'train.seed': got null, expected a valid integer"),
        ("train: {learning_rate: 1e400}", "option 'train.learning_rate': got \"1e400\", expected a valid number"),
        ("train: {learning_rate: [1e-4]}", "option 'train.learning_rate': got [0.0001], expected a valid number"),
        ("train: {learning_rate: '1e-4'}", 'got "1e-4", expected a valid number; write 0.0001'),
        ("train: {learning_rate: nan}", 'got "nan", expected a valid number'),
        ("train: {learning_rate: 2024-01-01}", 'got "2024-01-01", expected a valid number'),
        ("train: {learning_rate: }", "got null, expected a valid number; give it a value, or leave it out"),
        ("train: {max_steps: 1_000}", 'got "1_000", expected a valid integer; write 1000'),
        ("train: {max_steps: 1e3}", "got 1000.0, expected a valid integer; write 1000"),
        ("train: {max_steps: -1}", "got -1, expected a number greater than or equal to 1"),
        (f"train: {{max_steps: 1{'0' * 19}}}", "expected a number of at most 18 digits"),
        (f"train: {{learning_rate: 1{'0' * 400}}}", "expected a number of at most 18 digits"),
        (f"train: {{learning_rate: {'9' * 5000}}}", '99999", expected a valid number'),
        ("data: {format: true}", 'got true, expected a valid string; put it in quotes: "true"'),
        ("model: 5", "option 'model': got 5, expected a valid string; put it in quotes: \"5\""),
        ("model: ''", "option 'model': got \"\", expected a string of at least 1 character"),
        ("data: {train: [a.jsonl, 5]}", "option 'data.train': got [\"a.jsonl\", 5], expected a path, or an object"),
        ("data: {train_roles: asistant}", "got \"asistant\", expected 'system', 'user', 'assistant' or 'tool'"),
        ("data: rows.jsonl", "option 'data': got \"rows.jsonl\", expected a mapping of options"),
        ("trian: {}", "option 'trian' does not exist; did you mean 'train'?"),
        ("train: {learning_rat: 1}", "option 'train.learning_rat' does not exist; did you mean 'learning_rate'?"),
        ("data: {zzz: 1}", "option 'data.zzz' does not exist; known are train, eval, eval_fraction, "),
        ("plugins: {lora: 5}", "option 'plugins.lora': got 5, expected a mapping of options"),
        ("plugins: chatml", 'got "chatml", expected a mapping of plugin names to options'),
        ("without: chatml", "option 'without': got \"chatml\", expected a valid array"),
    ],
)
def test_a_wrong_value_is_one_line_with_place_option_value_and_remedy(write: Any, text: str, message: str) -> None:
    error = load_error(write(f"# a comment\n{text}\n"))
    assert error.startswith("run.yaml:2: ")
    assert message in error


def test_a_nested_option_is_named_with_its_own_line(write: Any) -> None:
    path = write("data:\n  train: rows.jsonl\n\ntrain:\n  seed: x\n")
    assert load_error(path) == "run.yaml:5: option 'train.seed': got \"x\", expected a valid integer"


@pytest.mark.parametrize("text", ["train: {seed: 1e999}", "plugins: {lora: {r: !!binary aGk=}}", "model: &a [*a]"])
def test_what_json_cannot_record_is_refused(write: Any, text: str) -> None:
    assert load_error(write(text))


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (float("inf"), "got Infinity, expected a finite number"),
        (float("nan"), "got NaN, expected a finite number"),
        (2**63, "got 9223372036854775808, expected a number of at most 18 digits"),
        ([1, float("-inf")], "got [1, -Infinity], expected a finite number"),
        ("a\udcff", "expected text that is valid UTF-8"),
        ({"a\udcff": 1}, "expected text that is valid UTF-8"),
        ({1, 2}, 'got "{1, 2}", expected text, a number, true, false, null, a list or a mapping'),
    ],
)
def test_a_value_of_python_that_json_has_not_is_refused_with_its_option(value: Any, expected: str) -> None:
    """`--set` and run files cannot give most such values, Python can; a byte that is not UTF-8 needs a command line."""
    origins = run_file.Origins()
    origins.set("plugins.p.size", "run.yaml:7")
    with pytest.raises(ConfigError) as caught:
        validation.validate(
            Options, {"needed": 1, "size": value}, who="plugin 'p'", prefix="plugins.p.", origins=origins
        )
    assert str(caught.value).startswith("run.yaml:7: plugin 'p': option 'size")
    assert str(caught.value).endswith(expected)


def test_an_option_whose_name_is_not_utf8_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"^option 'a\\udcff': got 1, expected text that is valid UTF-8$"):
        validation.validate(Options, {"needed": 1, "a\udcff": 1}, origins=run_file.Origins())


@pytest.mark.parametrize("text", ["1e400", "inf", "-inf", "nan", ".inf", "yes", "1_000", "[1]", "{a: 1}", "", "-1"])
def test_a_wrong_number_is_one_line_wherever_it_stands(write: Any, text: str) -> None:
    """In a run file, after a flag and after --set, for options of sections and of plugins."""
    messages = [load_error(write(f"train:\n  learning_rate: {value}\n")) for value in (text, f"'{text}'")]
    messages.append(load_error(None, assignments=[DATA, ("train.learning_rate", parse_value(text), "--set x")]))
    for message, place in zip(messages, ("run.yaml:2: ", "run.yaml:2: ", "--set x: "), strict=True):
        assert message.startswith(f"{place}option 'train.learning_rate': got ")
        assert ", expected a " in message
    origins = run_file.Origins()
    origins.set("plugins.p.size", "--set x")
    values = {"needed": 1, "size": parse_value(text)}
    with pytest.raises(ConfigError, match=r"^--set x: plugin 'p': option 'size': got .*, expected a "):
        validation.validate(Options, values, who="plugin 'p'", prefix="plugins.p.", origins=origins)


def test_every_number_has_a_least_value(write: Any) -> None:
    """A count or a rate below zero is refused for every option, and none needs its own test."""
    for section, cls in options.SECTION_CLASSES.items():
        for field in dataclasses.fields(cls):
            for value in (-1, -0.5):
                file = write(f"{section}: {{{field.name}: {value}}}\n")
                with pytest.raises(ConfigError, match=field.name):
                    loading.load(file)


def test_every_whole_number_has_a_largest_value() -> None:
    """A slip such as ten zeros too many is refused for every option, those of the built-in plugins too."""
    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    plugins = [pkgutil.resolve_name(place) for place in project["entry-points"]["sftx.plugins"].values()]
    assert len(plugins) > 30
    unbounded = []
    for cls in [*options.SECTION_CLASSES.values(), options.Filters, options.Source, *plugins]:
        for name, hint in get_type_hints(cls, include_extras=True).items():
            plain = get_args(hint)[0] if get_origin(hint) is Annotated else hint
            bounds = [bound for part in get_args(hint)[1:] for bound in getattr(part, "metadata", ())]
            is_whole = int in (get_args(plain) or (plain,))
            if is_whole and not any(hasattr(bound, "le") or hasattr(bound, "lt") for bound in bounds):
                unbounded.append(f"{cls.__name__}.{name}")
    assert unbounded == []


@pytest.mark.parametrize(
    ("sizes", "result"),
    [
        ({"train_batch_size": 6, "gradient_accumulation_steps": 3}, (6, 2, 3)),
        ({"train_batch_size": 5, "gradient_accumulation_steps": 2}, (5, 3, 2)),
        (
            {"train_batch_size": 4, "gradient_accumulation_steps": 3},
            "make no 3 micro-batches of equal size, but 2 of 2",
        ),
        (
            {"train_batch_size": 4, "gradient_accumulation_steps": 9},
            "make no 9 micro-batches of equal size, but 4 of 1",
        ),
    ],
)
def test_the_number_of_micro_batches_is_as_given_or_refused(sizes: dict[str, int], result: Any) -> None:
    config = options.TrainConfig(**sizes)
    if isinstance(result, str):
        with pytest.raises(ConfigError, match=result):
            config.resolve_batch_size(1)
    else:
        done = config.resolve_batch_size(1)
        assert (
            done.train_batch_size, done.per_device_train_batch_size, done.gradient_accumulation_steps,
        ) == result  # fmt: skip


def test_two_names_of_one_option_must_agree_and_of_one_name_the_last_counts() -> None:
    twice = [DATA, ("lora.r", 3, "--set lora.r=3"), ("plugins.lora.r", 4, "--set plugins.lora.r=4")]
    message = "--set plugins.lora.r=4: contradicts --set lora.r=3; leave one of them out"
    assert load_error(None, add=["lora"], assignments=twice) == message
    both = [DATA, ("train.max_steps", 2, "--max-steps 2"), ("train.max_steps", 1, "--set train.max_steps=1")]
    assert "contradicts --max-steps 2" in load_error(None, assignments=both)
    assert loading.load(None, assignments=[*both[:2], both[1]]).config.train.max_steps == 2
    same = [DATA, ("train.max_steps", 1, "--set train.max_steps=1"), ("train.max_steps", 2, "--set train.max_steps=2")]
    assert loading.load(None, assignments=same).config.train.max_steps == 2


def test_an_error_names_what_was_typed(write: Any) -> None:
    """If both the file and the command line set an option, the error names the command line."""
    path = write("train:\n  seed: 1\n")
    error = load_error(path, assignments=[("train.seed", "x", "--seed x")])
    assert error == "--seed x: option 'train.seed': got \"x\", expected a valid integer"
    error = load_error(path, assignments=[("train.sead", 1, "--set train.sead=1")])
    assert error == "--set train.sead=1: option 'train.sead' does not exist; did you mean 'seed'?"


def test_an_option_of_an_item_of_a_list_is_named_with_its_index(write: Any) -> None:
    message = load_error(write("data:\n  train: [{path: a}, {path: b, weight: x}]\n"))
    assert message.startswith("run.yaml:2: option 'data.train.1.weight': got \"x\", ")
    message = load_error(write("data:\n  train: [{path: a}, {path: b, weigth: 1}]\n"))
    assert message.startswith("run.yaml:2: option 'data.train.1.weigth' does not exist")
    assert "'weight'" in message


@pytest.mark.parametrize("option", named_plugins.PLUGIN_OPTIONS, ids=lambda option: option.name)
def test_a_plugin_is_known_by_the_name_that_transformers_has_for_it(write: Any, option: Any) -> None:
    for alias, name in [*option.aliases.items(), *((name, name) for name in option.built_in)]:
        train = loading.load(write(f"train: {{{option.name}: {alias}}}\n")).config.train
        assert getattr(train, option.name) == name


def test_an_int_is_a_float_and_one_path_is_a_list_of_one(write: Any) -> None:
    loaded = loading.load(write("data: {train: rows.jsonl}\ntrain: {learning_rate: 1}\n")).config
    assert loaded.train.learning_rate == 1.0
    assert isinstance(loaded.train.learning_rate, float)
    assert loaded.data.train == (options.Source("rows.jsonl"),)


@dataclass(frozen=True, eq=False)
class Options:
    needed: int
    names: str | tuple[str, ...] = "all"
    size: Annotated[int, Field(ge=1)] = 2

    def __post_init__(self) -> None:
        if self.needed == 13:
            raise ValueError("needed and size do not go together")


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({}, "option 'needed' is missing; it has no default; give it with --set p.needed=..."),
        ({"needed": 1, "names": 5}, "option 'names': got 5, expected a valid string or a valid array"),
        ({"needed": 1, "names": ["a", 5]}, "option 'names': got 5, expected a valid string; put it in quotes: \"5\""),
        ({"needed": 1, "size": 0}, "option 'size': got 0, expected a number greater than or equal to 1"),
        ({"needed": 1, "sise": 1}, "option 'sise' does not exist; did you mean 'size'?"),
        ({"needed": 13}, "needed and size do not go together"),
    ],
)
def test_options_of_any_dataclass_are_validated_alike(values: dict[str, Any], message: str) -> None:
    """The error names `who` and the place of the options; for a list it names the wrong item."""
    origins = run_file.Origins()
    origins.set("plugins.p", "run.yaml:3")
    with pytest.raises(ConfigError) as caught:
        validation.validate(Options, values, who="plugin 'p' (acme 1.0)", prefix="plugins.p.", origins=origins)
    assert str(caught.value) == f"run.yaml:3: plugin 'p' (acme 1.0): {message}"


# --- file and command line together -------------------------------------------------------------


def test_the_command_line_wins_over_the_file_and_the_file_over_defaults(write: Any) -> None:
    path = write("model: a/b\ntrain: {seed: 1, max_steps: 5}\n")
    loaded = loading.load(path, assignments=[("train.seed", 2, "--seed 2"), ("model", "c/d", "--model c/d")]).config
    assert (loaded.model, loaded.train.seed, loaded.train.max_steps) == ("c/d", 2, 5)
    assert loaded.train.logging_steps == options.TrainConfig().logging_steps


def test_plugin_adds_after_those_of_the_file_and_keeps_their_options(write: Any) -> None:
    path = write("plugins:\n  lora: {r: 4}\n  chatml:\n")
    loaded = loading.load(path, add=["padded", "lora"]).config
    assert list(loaded.plugins.items()) == [("lora", {"r": 4}), ("chatml", {}), ("padded", {})]


def test_plugins_may_be_a_list_of_names(write: Any) -> None:
    assert loading.load(write("plugins: [lora, chatml]\n")).config.plugins == {"lora": {}, "chatml": {}}


def test_no_plugin_removes_what_the_file_names_and_is_remembered_for_defaults(write: Any) -> None:
    path = write("plugins: {chatml: {}, lora: {}}\nwithout: [jsonl]\n")
    loaded = loading.load(path, remove=["lora", "progress", "jsonl"]).config
    assert list(loaded.plugins) == ["chatml"]
    assert loaded.without == ("jsonl", "lora", "progress")


@pytest.mark.parametrize(
    ("arguments", "typed"),
    [
        ({"add": ["lora"]}, "--plugin lora"),
        (
            {"assignments": [DATA, ("padded.group_by_length", True, "--set padded.group_by_length=true")]},
            "--set padded",
        ),
    ],
)
def test_a_plugin_both_wanted_and_unwanted_on_the_command_line_is_refused(arguments: Any, typed: str) -> None:
    name = "lora" if "lora" in typed else "padded"
    message = load_error(None, remove=[name], **({"assignments": [DATA]} | arguments))
    assert typed in message
    assert f"--no-plugin {name}" in message


def test_set_takes_the_short_and_the_long_name_of_an_option() -> None:
    short = loading.load(None, add=["lora"], assignments=[DATA, ("lora.r", 32, "--set lora.r=32")])
    long = loading.load(None, add=["lora"], assignments=[DATA, ("plugins.lora.r", 32, "--set plugins.lora.r=32")])
    assert short.config == long.config
    assert short.config.plugins == {"lora": {"r": 32}}
    assert short.origins.of("plugins.lora.r") == "--set lora.r=32"


def test_an_option_alone_brings_no_plugin_into_a_run() -> None:
    message = load_error(None, assignments=[DATA, ("lora.r", 3, "--set lora.r=3")])
    assert message == "--set lora.r=3: plugin 'lora' is not in this run; add --plugin lora"


def test_an_option_of_a_plugin_that_is_not_installed_is_told_so() -> None:
    given = [DATA, ("nope.x", 1, "--set nope.x=1")]
    assert load_error(None, assignments=given).endswith("; add --plugin nope")
    message = load_error(None, assignments=given, plugin_class=lambda name: None)
    assert message == "--set nope.x=1: plugin 'nope' is not in this run, and none of that name is installed"
    given = [DATA, ("trian.seed", 1, "--set trian.seed=1")]
    assert load_error(None, assignments=given, plugin_class=lambda name: None).endswith("; did you mean 'train'?")


def test_set_through_a_value_that_has_no_options_is_refused(write: Any) -> None:
    path = write("plugins: {lora: {r: 8}}\n")
    message = load_error(path, assignments=[("lora.r.x", 1, "--set lora.r.x=1")])
    assert message == "--set lora.r.x=1: plugins.lora.r has no options of its own"


def test_with_neither_file_nor_data_it_is_the_embedded_run(
    write: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    embedded = tmp_path / "embedded.yaml"
    embedded.write_text("data: {train: 'sftx:demo/train.jsonl'}\ntrain: {seed: 7}\n", encoding="utf-8")
    monkeypatch.setattr(paths, "DEMO_RUN_FILE", embedded)
    assert loading.load(None, add=["lora"]).config.train.seed == 7
    with_data = loading.load(None, assignments=[DATA]).config
    assert (with_data.data.train, with_data.train) == ((options.Source("rows.jsonl"),), options.TrainConfig())
    assert loading.load(write("model: a/b\n")).config.data.train == ()


def test_the_embedded_run_that_ships_is_valid_and_its_data_are_there() -> None:
    from sftx.data import sources

    shipped = loading.load(None).config
    assert shipped.data.train
    assert shipped.data.eval
    for source in (*shipped.data.train, *shipped.data.eval):
        assert sources.num_bytes(source) > 0


# --- written and read back ----------------------------------------------------------------------


def test_a_resolved_run_file_reads_back_as_the_same_run(write: Any, tmp_path: Path) -> None:
    path = write(
        "model: a/b\ndata: {train: [x.jsonl, y.csv], eval: z.json, format: 'yes'}\n"
        "plugins: {lora: {r: 4, target_modules: [q_proj]}, chatml: {default_system: '1e-4'}}\n"
        "train: {learning_rate: 1e-5, adam_epsilon: 1e-12, warmup_steps: 0.1, bf16: false}\noutput_dir: runs/x\n"
    )
    first = loading.load(path, remove=["jsonl"]).config
    run_file.write(options.as_dict(first), tmp_path / "resolved.yaml")
    assert loading.load(tmp_path / "resolved.yaml").config == first


def test_a_resolved_run_file_writes_every_default_out() -> None:
    values = options.as_dict(RunConfig())
    assert set(values) == options.SECTIONS
    assert values["train"]["learning_rate"] == options.TrainConfig().learning_rate
    assert values["data"]["train"] == []


_TEXT = st.text(st.characters(exclude_categories=("Cs", "Cc", "Cn"))) | st.sampled_from(
    ["1e-4", "1e5", "0o17", "0x1F", "yes", "No", "~", "", "null", "1_000", "2024-01-01", "1:30", "=", "<<", ".5", "- a"]
)
_JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | _TEXT,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(_TEXT, inner, max_size=3),
    max_leaves=8,
)


@settings(deadline=None, max_examples=100, database=None)
@given(values=st.dictionaries(_TEXT, _JSON, max_size=3))
def test_whatever_is_written_reads_back(values: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> None:
    """Text that looks like a number in YAML 1.1 or 1.2 stays text, and numbers keep their value."""
    path = tmp_path_factory.getbasetemp() / "written.yaml"
    run_file.write(values, path)
    assert repr(run_file.read(path)[0]) == repr(values)


def test_several_roles_may_stand_between_commas() -> None:
    values = {"data": {"train_roles": ["assistant,tool", "user"]}}
    read = validation.validate(options.RunConfig, values, origins=run_file.Origins())
    assert read.data.train_roles == ("assistant", "tool", "user")
