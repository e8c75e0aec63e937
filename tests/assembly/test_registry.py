"""Tests of discovery and assembly: plugins are found in metadata, imported when named, and checked before torch."""

from __future__ import annotations

import datetime
import importlib.metadata
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

import sftx
from sftx.assembly import discovery, entry_points, registry
from sftx.assembly.hookspecs import ONE_PROVIDER, RETURNS
from sftx.config import default_plugins, loading, options
from sftx.errors import ConfigError, DataError, PluginError, SftxError

HEAD = "from dataclasses import dataclass\nimport sftx\n"


def plugin(
    body: str, *, cls: str = "Acme", decorator: str = "@dataclass(frozen=True, eq=False)", head: str = ""
) -> str:
    """Return the source of a plugin's module."""
    lines = "".join(f"    {line}\n" for line in body.splitlines())
    return f"{HEAD}{head}\n{decorator}\nclass {cls}:\n{lines}"


METRIC = "@sftx.hookimpl\ndef sftx_metric(self):\n    return lambda prediction, reference: 1.0"
COLLATOR = "@sftx.hookimpl\ndef sftx_collator(self):\n    raise AssertionError('never called in these tests')"


def activate(*names: str, remove: Sequence[str] = (), settings: dict[str, Any] | None = None) -> registry.Assembly:
    """Return the assembly of `--plugin NAME ... --set NAME=VALUE`."""
    given = [("data.train", ["rows.jsonl"], "--data rows.jsonl")]
    given += [(name, value, f"--set {name}={value}") for name, value in (settings or {}).items()]
    return registry.activate(loading.load(None, add=names, remove=remove, assignments=given))


def error_of(*names: str, kind: type[SftxError] = PluginError, **kwargs: Any) -> str:
    with pytest.raises(kind) as caught:
        activate(*names, **kwargs)
    message = str(caught.value)
    assert "\n" not in message
    return message


# --- discovery ----------------------------------------------------------------------------------


def test_discovery_reads_metadata_and_imports_nothing(install_plugin: Any) -> None:
    install_plugin("acme-boom", "raise RuntimeError('imported')", {"boom": "Boom"}, version="2.5")
    (found,) = [info for info in entry_points.discover() if info.name == "boom"]
    assert (found.package, found.version, found.value) == ("acme-boom", "2.5", "acme_boom:Boom")
    assert str(found) == "plugin 'boom' (acme-boom 2.5)"
    assert "acme_boom" not in sys.modules


def test_an_unnamed_plugin_that_is_broken_is_of_no_concern(install_plugin: Any) -> None:
    install_plugin("acme-boom", "raise RuntimeError('imported')", {"boom": "Boom"})
    activate("lora")
    assert "acme_boom" not in sys.modules


def test_a_plugin_that_is_not_installed_is_named_with_what_typed_it_and_a_suggestion(tmp_path: Path) -> None:
    assert error_of("lorra") == "--plugin lorra: plugin 'lorra' is not installed; did you mean 'lora'?"
    assert error_of("zzz").startswith("--plugin zzz: plugin 'zzz' is not installed; installed are adafactor, adamw, ")
    path = tmp_path / "run.yaml"
    path.write_text("plugins:\n  chatml:\n  lorra: {r: 3}\n", encoding="utf-8")
    with pytest.raises(PluginError) as caught:
        registry.activate(loading.load(path))
    assert str(caught.value) == f"{path}:3: plugin 'lorra' is not installed; did you mean 'lora'?"


def test_a_default_to_be_left_out_must_exist() -> None:
    assert error_of(remove=["progres"]) == (
        "--no-plugin progres: plugin 'progres' is not installed; did you mean 'progress'?"
    )


def test_one_name_in_two_distributions_is_an_error_that_names_both_when_it_is_used(install_plugin: Any) -> None:
    install_plugin("acme-one", plugin(METRIC), {"twin": "Acme"}, version="1.1")
    install_plugin("acme-two", plugin(METRIC), {"twin": "Acme"}, version="2.2")
    activate("lora")
    assert error_of("twin") == (
        "--plugin twin: plugin 'twin' is provided by acme-one 1.1 and acme-two 2.2; uninstall one of them"
    )


# --- import -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("code", "cause"),
    [
        ("raise RuntimeError('no\\nluck')", "RuntimeError: no luck"),
        ("import not_there_at_all", "ModuleNotFoundError: No module named 'not_there_at_all'"),
        ("class Other: pass", "AttributeError: module 'acme_boom' has no attribute 'Boom'"),
        ("def f(:", "SyntaxError: "),
        ("import sftx\nraise sftx.ConfigError('needs a GPU')", "ConfigError: needs a GPU"),
    ],
)
def test_a_plugin_that_cannot_be_imported_is_named_with_its_distribution_and_the_cause(
    install_plugin: Any, code: str, cause: str
) -> None:
    install_plugin("acme-boom", code, {"boom": "Boom"}, version="0.3")
    message = error_of("boom")
    assert message.startswith(f"plugin 'boom' (acme-boom 0.3): cannot be imported from 'acme_boom:Boom': {cause}")
    assert "reinstall acme-boom" in message


def test_an_exporter_has_no_part_in_a_run() -> None:
    assert "sftx export RUN --to gguf" in error_of("lora", "gguf")


def test_a_plugin_made_for_another_sftx_is_refused_before_it_is_imported(install_plugin: Any) -> None:
    install_plugin("acme-new", "raise RuntimeError('imported')", {"new": "New"}, requires=["numpy", "sftx>=9"])
    message = error_of("new")
    assert message.startswith("plugin 'new' (acme-new 1.0): ")
    assert "sftx >=9" in message
    assert f"this is sftx {sftx.__version__}" in message
    assert "acme_new" not in sys.modules


@pytest.mark.parametrize("requirement", ["sftx", "SFTX>=0.0.1", "sftx>=9; python_version < '3'", "not a requirement!"])
def test_a_plugin_that_asks_for_this_sftx_or_says_nothing_of_it_is_taken(install_plugin: Any, requirement: str) -> None:
    install_plugin("acme-fit", plugin(METRIC), {"fit": "Acme"}, requires=[requirement])
    assert "fit" in [active.info.name for active in activate("fit").active]


# --- the class ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("code", "expected"),
    [
        (f"{HEAD}class Acme:\n    pass", "'acme:Acme' is not a dataclass"),
        (f"{HEAD}Acme = 5", "'acme:Acme' is not a dataclass"),
        (
            plugin(METRIC, decorator="@dataclass(frozen=True)"),
            "declare it as @dataclass(frozen=True, eq=False)",
        ),
        (plugin(METRIC, decorator="@dataclass"), "declare it as @dataclass(frozen=True, eq=False)"),
        (plugin("pass"), "put @sftx.hookimpl above the method"),
        (
            plugin("@sftx.hookimpl\ndef sftx_metrics(self):\n    pass"),
            f"sftx_metrics is not a hook of sftx {sftx.__version__}; did you mean 'sftx_metric'?",
        ),
        (
            plugin("@sftx.hookimpl\ndef zzz(self):\n    pass"),
            f"zzz is not a hook of sftx {sftx.__version__}; hooks are sftx_source, sftx_parser, ",
        ),
        (
            plugin("@sftx.hookimpl\ndef sftx_template(self, tokenizer, vocab):\n    pass"),
            f"sftx_template has the parameter vocab, which sftx {sftx.__version__} does not pass; it passes tokenizer, "
            "run",
        ),
        (
            plugin("@sftx.hookimpl\ndef sftx_metric(self, rows):\n    pass"),
            f"sftx_metric has the parameter rows, which sftx {sftx.__version__} does not pass; it passes run",
        ),
        (
            plugin("@sftx.hookimpl(wrapper=True)\ndef sftx_metric(self):\n    return (yield)"),
            "sftx_metric is a wrapper",
        ),
        (
            plugin("@sftx.hookimpl(hookwrapper=True)\ndef sftx_metric(self):\n    yield"),
            "sftx_metric is a wrapper",
        ),
        (
            plugin(f"device: 'NotAType' = None\n{METRIC}"),
            "reading its options failed: ",
        ),
    ],
    ids=lambda value: None,
)
def test_a_class_that_is_no_plugin_is_refused_by_name(install_plugin: Any, code: str, expected: str) -> None:
    install_plugin("acme", code, {"acme": "Acme"}, version="1.0")
    message = error_of("acme")
    assert message.startswith("plugin 'acme' (acme 1.0): ")
    assert expected in message


@pytest.mark.parametrize("name", sorted(options.SECTIONS))
def test_a_plugin_called_like_a_section_of_the_run_file_is_refused(install_plugin: Any, name: str) -> None:
    install_plugin("acme", plugin(METRIC), {name: "Acme"})
    assert error_of(name) == (
        f"plugin {name!r} (acme 1.0): the name {name!r} is a section of the run file; rename the plugin"
    )


# --- options ------------------------------------------------------------------------------------


def test_wrong_options_name_what_was_typed_the_plugin_its_distribution_and_the_bound(install_plugin: Any) -> None:
    install_plugin("acme", plugin(f"size: int = 3\n{METRIC}"), {"acme": "Acme"}, version="4.2")
    message = error_of("acme", kind=ConfigError, settings={"acme.size": True})
    assert message == (
        "--set acme.size=True: plugin 'acme' (acme 4.2): option 'size': got true, expected a valid integer"
    )
    message = error_of("lora", kind=ConfigError, settings={"lora.rr": 8})
    assert message == f"--set lora.rr=8: plugin 'lora' (sftx {sftx.__version__}): " + (
        "option 'rr' does not exist; did you mean 'r'?"
    )
    message = error_of("jsonl", kind=ConfigError, settings={"jsonl.x": 8})
    assert message.endswith("option 'x' does not exist; it takes none")


def test_options_reach_the_plugin_and_a_default_one_too() -> None:
    assembly = activate("lora", settings={"lora.r": 4, "padded.pad_to_multiple_of": 8})
    options = {active.info.name: active.options for active in assembly.active}
    assert options["lora"]["r"] == 4
    assert options["lora"]["lora_alpha"] == 32
    assert options["padded"]["pad_to_multiple_of"] == 8
    json.dumps(options)


# --- which plugins, in which order --------------------------------------------------------------


def test_without_names_the_defaults_fill_what_they_can() -> None:
    assembly = activate()
    filled = {hook: [active.info.name for active in assembly.providers(hook)] for hook in RETURNS}
    assert filled == {
        "sftx_source": [],
        "sftx_parser": ["messages", "prompt-completion", "alpaca", "sharegpt", "hh-rlhf", "tokens", "text"],
        "sftx_template": [],
        "sftx_collator": ["padded"],
        "sftx_adapter": [],
        "sftx_trainable": [],
        "sftx_loss": ["masked-ce"],
        "sftx_rollout": [],
        "sftx_reward": [],
        "sftx_optimizer": ["adamw"],
        "sftx_schedule": ["cosine-schedule"],
        "sftx_metric": [],
        "sftx_evaluator": [],
        "sftx_control": [],
        "sftx_observer": ["progress", "jsonl"],
        "sftx_exporter": [],
    }


def test_the_order_of_many_providers_is_that_of_naming_with_defaults_behind(install_plugin: Any) -> None:
    install_plugin("acme-a", plugin(METRIC), {"aaa": "Acme"})
    install_plugin("acme-b", plugin(METRIC), {"bbb": "Acme"})
    assert list(activate("bbb", "aaa").metrics()) == ["bbb", "aaa"]
    assert list(activate("aaa", "bbb").metrics()) == ["aaa", "bbb"]
    assert list(activate("sharegpt").parsers())[:4] == ["sharegpt", "messages", "prompt-completion", "alpaca"]


def test_a_plugin_for_a_hook_of_one_takes_the_default_s_place(install_plugin: Any) -> None:
    install_plugin("acme", plugin(COLLATOR), {"acme": "Acme"})
    assert [active.info.name for active in activate("acme").providers("sftx_collator")] == ["acme"]


def test_a_default_can_be_left_out_of_a_hook_of_many_but_a_hook_that_is_needed_must_be_filled() -> None:
    assert [a.info.name for a in activate(remove=["progress"]).providers("sftx_observer")] == ["jsonl"]
    message = error_of(remove=["padded"])
    assert "sftx_collator; name one with --plugin" in message
    assert "'padded'" in message


@pytest.mark.parametrize("hook", sorted(ONE_PROVIDER))
def test_two_providers_of_a_hook_of_one_are_both_named_with_distribution_and_version(
    install_plugin: Any, hook: str
) -> None:
    code = plugin(f"@sftx.hookimpl\ndef {hook}(self):\n    raise AssertionError")
    install_plugin("acme-one", code, {"one": "Acme"}, version="1.1")
    install_plugin("acme-two", code, {"two": "Acme"}, version="2.2")
    message = error_of("two", "one")
    assert message.startswith("plugin 'two' (acme-two 2.2) and plugin 'one' (acme-one 1.1) ")
    assert f"{hook}, which takes one; leave one of them out" in message


def test_one_class_under_two_names_is_two_plugins(install_plugin: Any) -> None:
    install_plugin("acme", plugin(f"size: int = 3\n{METRIC}"), {"first": "Acme", "second": "Acme"})
    assert list(activate("first", "second").metrics()) == ["first", "second"]


def test_the_table_has_a_line_a_stage_and_plugin_with_distribution_and_options(install_plugin: Any) -> None:
    install_plugin("acme", plugin(f"size: int = 3\n{METRIC}\n{COLLATOR}"), {"acme": "Acme"}, version="1.5")
    lines = [p for p in activate("acme").table() if p.plugin == "acme"]
    assert [(p.stage, p.distribution, p.version, p.options) for p in lines] == [
        ("collator", "acme", "1.5", {"size": 3}),
        ("metric", "acme", "1.5", {"size": 3}),
    ]


# --- calling the hooks --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("body", "stage", "expected"),
    [
        (
            "@sftx.hookimpl\ndef sftx_metric(self):\n    return None",
            "metrics",
            "returned NoneType, expected a Metric; is its `return` missing?",
        ),
        ("@sftx.hookimpl\ndef sftx_loss(self):\n    return 5", "loss", "returned int, expected a Loss"),
        (
            "def accepts(self, record):\n    return True\n@sftx.hookimpl\ndef sftx_parser(self):\n    return self",
            "parsers",
            "returned Acme, expected a Parser, which has also fields, parse, samples",
        ),
    ],
)
def test_a_hook_that_returns_the_wrong_thing_is_named_with_what_is_missing(
    install_plugin: Any, body: str, stage: str, expected: str
) -> None:
    install_plugin("acme", plugin(body), {"acme": "Acme"})
    assembly = activate("acme")
    with pytest.raises(PluginError) as caught:
        getattr(assembly, stage)()
    message = str(caught.value)
    assert message.startswith("plugin 'acme' (acme 1.0): sftx_")
    assert message.endswith(expected)


def test_an_observer_with_a_method_that_is_no_event_is_refused(install_plugin: Any) -> None:
    head = "class Watch(sftx.Observer):\n    def on_steps(self, report):\n        pass\n"
    code = plugin("@sftx.hookimpl\ndef sftx_observer(self):\n    return Watch()", head=head)
    install_plugin("acme", code, {"acme": "Acme"})
    with pytest.raises(PluginError, match=r"Watch\.on_steps is no event .*; did you mean 'on_step'\?"):
        activate("acme").observers()


def test_an_observer_must_be_an_observer(install_plugin: Any) -> None:
    install_plugin("acme", plugin("@sftx.hookimpl\ndef sftx_observer(self):\n    return print"), {"acme": "Acme"})
    assembly = activate("acme", remove=["progress", "jsonl"])
    with pytest.raises(PluginError, match="sftx_observer returned builtin_function_or_method, expected a"):
        assembly.observers()


@pytest.mark.parametrize(
    ("raised", "kind", "expected"),
    [
        ("sftx.DataError('no good')", DataError, "no good"),
        ("Special('no', 'good')", DataError, "no good"),
        ("ValueError('no\\ngood')", PluginError, "sftx_metric failed: ValueError: no good"),
        ("sftx.ConfigError(\"plugin 'acme' (acme 1.0): said so itself\")", ConfigError, "said so itself"),
    ],
)
def test_an_error_that_a_plugin_raises_gets_its_name_in_front_once(
    install_plugin: Any, raised: str, kind: type[SftxError], expected: str
) -> None:
    head = "class Special(sftx.DataError):\n    def __init__(self, a, b):\n        super().__init__(f'{a} {b}')\n"
    install_plugin(
        "acme", plugin(f"@sftx.hookimpl\ndef sftx_metric(self):\n    raise {raised}", head=head), {"acme": "Acme"}
    )
    assembly = activate("acme")
    with pytest.raises(kind) as caught:
        assembly.metrics()
    assert str(caught.value) == f"plugin 'acme' (acme 1.0): {expected}"


def test_an_error_of_a_plugin_s_own_check_of_its_options_gets_its_name_in_front(install_plugin: Any) -> None:
    body = f"size: int = 3\ndef __post_init__(self):\n    raise sftx.ConfigError('size is odd')\n{METRIC}"
    install_plugin("acme", plugin(body), {"acme": "Acme"})
    assert error_of("acme", kind=ConfigError) == "plugin 'acme' (acme 1.0): size is odd"
    install_plugin("acme-b", plugin(body.replace("sftx.ConfigError", "ValueError")), {"bbb": "Acme"})
    message = error_of("bbb", kind=ConfigError, settings={"bbb.size": 5})
    assert message.endswith("plugin 'bbb' (acme-b 1.0): size is odd")


PARSER = "fields = 'x'\nsamples = ()\n@sftx.hookimpl\ndef sftx_parser(self):\n    return self\n"


@pytest.mark.parametrize(
    ("body", "stage", "call", "expected"),
    [
        (
            "def accepts(self, record):\n    return record['x'] > 1\ndef parse(self, record, where):\n    return ()",
            "parser",
            lambda parser: parser.accepts({}),
            "accepts failed: KeyError: 'x'",
        ),
        (
            "def accepts(self, record):\n    return True\ndef parse(self, record, where):\n    return None",
            "parser",
            lambda parser: parser.parse({}, None),
            "parse returned NoneType, expected a list",
        ),
        (
            "def __call__(self, a, b):\n    return 1 / 0",
            "metric",
            lambda metric: metric.scores(["a"], [sftx.Question("rows:1", "q", [1], "b")]),
            "metric failed: Zero",
        ),
        (
            "def __call__(self, a, b):\n    return a",
            "metric",
            lambda metric: metric.scores(["a"], [sftx.Question("rows:1", "q", [1], "b")]),
            "metric returned str",
        ),
    ],
)
def test_a_stage_that_fails_or_returns_the_wrong_thing_later_is_named_too(
    install_plugin: Any, body: str, stage: str, call: Any, expected: str
) -> None:
    head = PARSER if stage == "parser" else "@sftx.hookimpl\ndef sftx_metric(self):\n    return self\n"
    install_plugin("acme", plugin(head + body), {"acme": "Acme"})
    made = getattr(activate("acme"), f"{stage}s")()["acme"]
    with pytest.raises(PluginError) as caught:
        call(made)
    assert str(caught.value).startswith(f"plugin 'acme' (acme 1.0): {expected}")


def test_errors_of_a_row_the_memory_or_the_disk_are_not_attributed_to_the_plugin() -> None:
    import torch

    from sftx.assembly.stages.adapter_stage import AdapterStage
    from sftx.assembly.stages.data_stages import ParserStage

    class Stage:
        def parse(self, error: Any, where: Any = None) -> Any:
            raise error

        load = save = parse

    made: Any = Stage()
    parser, adapter = ParserStage("plugin 'acme' (acme 1.0)", made), AdapterStage("plugin 'acme' (acme 1.0)", made)
    error: Any
    for error in (DataError("rows:3: no"), MemoryError(), torch.OutOfMemoryError("no")):
        with pytest.raises(type(error)) as caught:
            parser.parse(error, sftx.Location("rows", 3))
        assert caught.value is error
        assert "acme" not in str(error)
    error = OSError("full")
    with pytest.raises(OSError, match="full"):
        adapter.save(error)
    with pytest.raises(PluginError, match="load failed: OSError: full"):
        adapter.load(error)


def test_a_hook_gets_only_the_arguments_it_asks_for(install_plugin: Any) -> None:
    code = plugin(
        "@sftx.hookimpl\ndef sftx_observer(self, run):\n    return type('O', (sftx.Observer,), {'run': run})()"
    )
    install_plugin("acme", code, {"acme": "Acme"})
    assembly = activate("acme", settings={"train.logging_steps": 3})
    made = {info.name: observer for info, observer in assembly.observers()}
    assert made["acme"].run is assembly.run  # type: ignore[attr-defined]
    assert assembly.run.config["train"]["logging_steps"] == 3
    assert assembly.run.config["plugins"]["acme"] == {}
    assert set(made) == {"acme", "progress", "jsonl"}


# --- what ships ---------------------------------------------------------------------------------

BUILT_IN = sorted(importlib.metadata.distribution("sftx").entry_points.select(group=entry_points.PLUGINS).names)


def test_every_stage_of_the_design_has_a_built_in_plugin() -> None:
    filled = {hook for name in BUILT_IN for hook in _hooks(name)}
    assert filled == set(RETURNS)


@pytest.mark.parametrize("name", BUILT_IN)
def test_every_built_in_entry_point_loads_and_fills_a_hook(name: str) -> None:
    assert _hooks(name)


def _hooks(name: str) -> list[str]:
    info = entry_points.find(name, [info for info in entry_points.discover() if info.package == "sftx"])
    return discovery.hooks_of(info, discovery.load_class(info))


def test_every_default_is_a_built_in_plugin() -> None:
    named = {name for names in default_plugins.DEFAULT_PLUGINS.values() for name in names} | set(
        default_plugins.TEMPLATES
    )
    assert named <= set(BUILT_IN)


_ITSELF: list[Any] = []
_ITSELF.append(_ITSELF)


@pytest.mark.parametrize(
    ("extras", "message"),
    [
        ({"span": (1, 2)}, "parse gave extras['span'] = (1, 2) (tuple)"),
        ({"of": [{"deep": {3: "x"}}]}, "parse gave extras['of'][0]['deep'] with the key 3"),
        ({"kind": {"a"}}, "parse gave extras['kind'] = {'a'} (set)"),
        ({"rate": float("nan")}, "parse gave extras['rate'] = nan (float)"),
        ({"day": datetime.date(2026, 1, 2)}, "parse gave extras['day'] = datetime.date(2026, 1, 2) (date)"),
        ({"itself": _ITSELF}, "parse failed: RecursionError"),
    ],
)
def test_extras_that_json_does_not_hold_unchanged_are_told_with_plugin_and_row(extras: Any, message: str) -> None:
    """In memory, in the cache and in other processes they would be different ones."""
    from sftx.assembly.stages.data_stages import ParserStage
    from sftx.config.options import DataConfig, Source
    from sftx.data.encoder import Encoder
    from sftx.data.row_encoder import RowEncoder
    from sftx.model.load import load_tokenizer
    from sftx.model.tiny import model_dir

    class Along:
        fields = "text"
        samples = ()

        def accepts(self, record: sftx.Record) -> bool:
            return True

        def parse(self, record: sftx.Record, where: sftx.Location) -> Sequence[sftx.PlainText]:
            return [sftx.PlainText("A text.", extras=extras)]

    parsers = {"along": ParserStage("plugin 'along' (acme 1.0)", Along())}
    encode = RowEncoder(parsers, Encoder(load_tokenizer(str(model_dir())), None), DataConfig())
    with pytest.raises(PluginError) as caught:
        encode(sftx.Location("rows.jsonl", 7), {"text": "A text."}, Source(path="rows.jsonl"))
    assert str(caught.value).startswith(f"rows.jsonl:7: plugin 'along' (acme 1.0): {message}")
    extras = {"n": [1, 2.5, True, None, {"a": "b"}]}
    (example,) = encode(sftx.Location("rows.jsonl", 7), {"text": ""}, Source(path="rows.jsonl")).examples
    assert example.extras == extras


def test_a_stage_can_be_copied_and_pickled() -> None:
    """Workers of the preprocessing get their stages by pickle."""
    import copy
    import pickle

    from sftx.assembly.stages.data_stages import ParserStage
    from sftx_plugins.parsers.text import Text

    stage = ParserStage("plugin 'acme' (acme 1.0)", Text())
    for other in (copy.copy(stage), copy.deepcopy(stage), pickle.loads(pickle.dumps(stage))):
        assert other.fields == stage.fields
        assert str(other) == "plugin 'acme' (acme 1.0)"
